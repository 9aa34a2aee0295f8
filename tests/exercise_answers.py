"""Answers to the exercises: the code of the repository with the signature of an exercise, and frequent mistakes.

Used by test_exercises.py: each entry of `SOLUTIONS` passes the tests of its exercise, and each entry of `WRONG` fails
one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from data_types import Episode
from grpo import compute_advantages
from model.attention import EagerAttention, KVCache
from model.head_logprobs import token_logprobs
from model.layout import Layout
from model.linear import Linear
from model.lora import LoraLinear
from model.qwen2_config import Qwen2Config
from optimizer import adamw_
from qwen2_llm import MLP, Block, RMSNorm, RotaryEmbedding, apply_rope
from rollout.sampling import SamplingParams, filter_weights, inverse_cdf
from study.intervals import pass_at_k
from update import losses
from update.packing import Step

# --------------------------------------------- the code of the repository, with the signature of an exercise


def config(**sizes: int) -> Qwen2Config:
    plain = dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), 2
    )
    return Qwen2Config(**{**plain, "num_key_value_heads": 1, "head_dim": 2, **sizes})


def filled(module: torch.nn.Module, **weights: torch.Tensor) -> torch.nn.Module:
    for name, weight in weights.items():
        module.get_parameter(name.replace("__", ".")).data = weight
    return module.requires_grad_(False)


def rms_norm(x, weight, eps):
    return filled(RMSNorm(len(weight), eps), weight=weight)(x)


def rope_angles(positions, head_dim, theta):
    return RotaryEmbedding(config(head_dim=head_dim, rope_theta=theta))(positions)


def grouped_query_attention(q, k, v, mask):
    return EagerAttention(mask)(0, q, k, v)


def swiglu(x, gate, up, down):
    mlp = MLP(config(hidden_size=gate.shape[1], intermediate_size=gate.shape[0]))
    return filled(mlp, gate_proj__weight=gate, up_proj__weight=up, down_proj__weight=down)(x)


class Called(torch.nn.Module):
    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, x, *ignored):
        return self.function(x)


def block(x, first_norm, attention, second_norm, mlp):
    whole = Block(config(), 0)
    whole.input_layernorm, whole.self_attn = Called(first_norm), Called(attention)
    whole.post_attention_layernorm, whole.mlp = Called(second_norm), Called(mlp)
    return whole(x, None, None, None)


def attend_with_cache(cache_k, cache_v, length, q, k, v):
    S, G, K = cache_k.shape
    cache = KVCache(1, 1, S, G, K, cache_k.dtype)
    cache.k, cache.v = (x.transpose(0, 1)[None, None] for x in (cache_k, cache_v))  # views: written through
    cache.lengths = torch.tensor([length])
    return cache.attend(0, q, k, v)


def append_to_cache(cache, length, new):
    """KVCache stores the new keys while it attends."""
    attend_with_cache(cache, cache.clone(), length, new.repeat_interleave(2, 1), new, new)


def cache_mask(length, T):
    """The rows of a causal mask that belong to the new tokens."""
    return Layout.causal([length + T]).mask()[length:]


def statistics(logits, targets, temperature=1.0):
    """The LM head is the identity, so that the logits are the hidden states."""
    return token_logprobs(logits, torch.eye(logits.shape[1]), targets, temperature, chunk=2)


def group_advantages(rewards):
    episodes = [
        Episode(group, [1], [2], [0.0], "", "stop", reward=reward)
        for group, row in enumerate(rewards.double().tolist())
        for reward in row
    ]
    return torch.tensor([e.advantage for e in compute_advantages(episodes)]).view(rewards.shape)


def clipped_loss(logp, old_logp, advantages, low, high):
    one_token_each = torch.ones(len(logp), dtype=torch.long)
    return losses.policy_loss(logp, old_logp, advantages, one_token_each, epsilon_low=low, epsilon_high=high).loss


def adamw_step(weight, grad, first, second, step, **options):
    adamw_(weight, grad, first, second, None, step, **options)


def lora_linear(x, weight, A, B, alpha):
    base = filled(Linear(weight.shape[1], weight.shape[0], bias=False), weight=weight)
    layer = LoraLinear(base, len(A), alpha, 0.0, torch.Generator())
    return filled(layer, lora_A=A, lora_B=B)(x)


# The loop


def shift_by_one(logits, ids, prompt_length):
    """The rows that `Step` lists as predicting, for one response."""
    episode = Episode(0, ids[:prompt_length].tolist(), ids[prompt_length:].tolist(), [0.0] * (len(ids) - prompt_length),
                      "", "stop", advantage=1.0)  # fmt: skip
    (micro,) = Step([episode], torch.device("cpu")).micro_batches(1000)
    return logits[micro.predicting_rows], micro.targets


def decode(forward, prompt, max_new_tokens, stop_ids):
    response, new_ids, length = [], prompt, 0
    while len(response) < max_new_tokens:
        response.append(int(forward(new_ids, length)[-1].argmax()))
        if response[-1] in stop_ids:
            break
        new_ids, length = response[-1:], length + len(new_ids)
    return response


def accumulate(term, parameters, micro_batches):
    """With the weights of dapo, as an update does it."""
    for parameter in parameters:
        parameter.grad = None
    total = sum(len(m) for m in micro_batches)
    weights = losses.token_weights("dapo", torch.tensor([total]), total)
    for micro, part in zip(micro_batches, weights.split([len(m) for m in micro_batches])):
        losses.weighted_sum(term(micro), part).backward()


def train_with(
    advantages: Callable = lambda rewards: group_advantages(rewards),
    weights: Callable = lambda lengths: losses.token_weights("dapo", lengths, 1),
    sign: int = 1,
) -> Callable:
    """The loop of the exercise. The arguments are places for mistakes."""

    def train(logits, reward, steps, groups, group_size, lr):
        T, _V = logits.shape
        first, second, means = torch.zeros_like(logits), torch.zeros_like(logits), []
        for step in range(1, steps + 1):
            p = logits.softmax(-1).repeat(groups * group_size, 1)
            tokens = inverse_cdf(p, torch.rand(len(p)))
            rewards = reward(tokens.view(-1, T))
            A = advantages(rewards.view(groups, group_size)).flatten()
            leaf = logits.clone().requires_grad_()
            logp = statistics(leaf.repeat(groups * group_size, 1), tokens)[0]
            lengths = torch.full((len(A),), T)
            terms = losses.policy_loss(logp, logp.detach(), A, lengths, loss_type="dapo")
            (gradient,) = torch.autograd.grad(sign * losses.weighted_sum(terms.loss, weights(lengths)), leaf)
            adamw_(logits, gradient, first, second, None, step, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
            means.append(rewards.mean().item())
        return means

    return train


SOLUTIONS: dict[str, Callable] = {
    "rms_norm": rms_norm,
    "rope_angles": rope_angles,
    "apply_rope": apply_rope,
    "grouped_query_attention": grouped_query_attention,
    "swiglu": swiglu,
    "block": block,
    "append_to_cache": append_to_cache,
    "cache_mask": cache_mask,
    "attend_with_cache": attend_with_cache,
    "token_logprobs": lambda logits, targets, temperature: statistics(logits, targets, temperature)[0],
    "entropy": lambda logits: statistics(logits, torch.zeros(len(logits), dtype=torch.long))[1],
    "top_p": lambda probabilities, p: filter_weights(probabilities, SamplingParams(top_p=p)),
    "draw": inverse_cdf,
    "group_advantages": group_advantages,
    "clipped_loss": clipped_loss,
    "k3": lambda logp, ref_logp: losses.kl_penalty(logp, ref_logp, "k3"),
    "token_weights": lambda lengths, loss_type, cap: losses.token_weights(loss_type, lengths, cap),
    "adamw_step": adamw_step,
    "lora_linear": lora_linear,
    "shift_by_one": shift_by_one,
    "decode": decode,
    "accumulate": accumulate,
    "kl_loss": lambda logp, ref_logp: losses.kl_penalty(logp, ref_logp, "k2"),
    "pass_at_k": pass_at_k,
    "train": train_with(),
}


# ------------------------------------------------------------------------------------------- what is easily got wrong


def interleaved_angles(positions, head_dim, theta):
    angle = positions[:, None, None] * theta ** -(torch.arange(0, head_dim, 2) / head_dim)
    return angle.repeat_interleave(2, -1).cos(), angle.repeat_interleave(2, -1).sin()


def even_and_odd(x, cos, sin):
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


def attention_with(scale: bool = True, tiled: bool = False) -> Callable:
    def attend(q, k, v, mask):
        R = q.shape[1] // k.shape[1]
        k, v = (x.repeat(1, R, 1) if tiled else x.repeat_interleave(R, 1) for x in (k, v))
        scores = torch.einsum("ihk,jhk->hij", q, k) * (q.shape[-1] ** -0.5 if scale else 1)
        return torch.einsum("hij,jhk->ihk", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)

    return attend


def masked_after_softmax(q, k, v, mask):
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    weights = (torch.einsum("ihk,jhk->hij", q, k) * q.shape[-1] ** -0.5).softmax(-1) * mask
    return torch.einsum("hij,jhk->ihk", weights, v)


def cache_with_mask(mask: Callable[[int, int], torch.Tensor]) -> Callable:
    def attend(cache_k, cache_v, length, q, k, v):
        end = length + len(q)
        cache_k[length:end], cache_v[length:end] = k, v
        keys, values = (c[:end].transpose(0, 1) for c in (cache_k, cache_v))
        seen = mask(len(q), end)
        return F.scaled_dot_product_attention(
            q.transpose(0, 1), keys, values, attn_mask=seen, enable_gqa=True
        ).transpose(0, 1)

    return attend


def sorted_top_p(probabilities, p):
    ordered = probabilities.sort(-1, descending=True).values
    return ordered.masked_fill(ordered.cumsum(-1) - ordered >= p, 0.0)


def strict_top_p(probabilities, p):
    ordered, ids = probabilities.sort(-1, descending=True)
    return torch.zeros_like(ordered).scatter(-1, ids, ordered.masked_fill(ordered.cumsum(-1) > p, 0.0))


def surrogate(bound: Callable) -> Callable:
    def loss(logp, old, A, low, high):
        ratio = (logp - old).exp()
        return -bound(ratio * A, ratio.clamp(1 - low, 1 + high) * A)

    return loss


def adamw_with(corrected: bool = True, decoupled: bool = True, inside: bool = False) -> Callable:
    def step_(weight, grad, first, second, step, *, lr, betas, eps, weight_decay):
        if decoupled:
            weight.mul_(1 - lr * weight_decay)
        else:
            grad = grad + weight_decay * weight
        first.lerp_(grad, 1 - betas[0])
        second.lerp_(grad**2, 1 - betas[1])
        c1, c2 = (1 - betas[0] ** step, 1 - betas[1] ** step) if corrected else (1, 1)
        root = (second / c2 + eps).sqrt() if inside else (second / c2).sqrt() + eps
        weight.sub_(lr * first / c1 / root)

    return step_


def append_a_copy(cache, length, new):
    cache = torch.cat([cache[:length], new])
    return cache


def append_at_the_start(cache, length, new):
    cache[: len(new)] = new


def decode_with(again: bool = False, drop_stop: bool = False, one_more: bool = False) -> Callable:
    """again: the prompt goes through the model twice. drop_stop: without the stop token. one_more: a useless call."""

    def decode(forward, prompt, max_new_tokens, stop_ids):
        response, new_ids, length = [], prompt, 0
        if again:
            forward(prompt, 0)
            new_ids, length = prompt[-1:], len(prompt)
        while len(response) < max_new_tokens:
            token = int(forward(new_ids, length)[-1].argmax())
            if token in stop_ids and drop_stop:
                break
            response.append(token)
            if token in stop_ids:
                break
            new_ids, length = [token], length + len(new_ids)
        if one_more:
            forward(new_ids, length)
        return response

    return decode


def accumulate_with(mean: Callable, together: bool = False, keep: bool = False) -> Callable:
    """mean(terms, tokens of the step, number of pieces). together: one backward pass. keep: old gradients stay."""

    def accumulate(term, parameters, micro_batches):
        for parameter in parameters:
            parameter.grad = parameter.grad if keep else None
        total, losses_ = sum(len(m) for m in micro_batches), []
        for micro in micro_batches:
            losses_.append(mean(term(micro), total, len(micro_batches)))
            if not together:
                losses_.pop().backward()
        if together:
            sum(losses_).backward()

    return accumulate


def standardised(dim, correction: int) -> Callable:
    return lambda r: (r - r.mean(dim, keepdim=True)) / (r.std(dim, correction=correction, keepdim=True) + 1e-4)


WRONG: dict[str, list[Callable]] = {
    "rms_norm": [
        lambda x, w, eps: F.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * w,
        lambda x, w, eps: x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * w,  # squares in the dtype of x
        lambda x, w, eps: (x.float() / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + eps)).to(x.dtype) * w,
    ],
    "rope_angles": [interleaved_angles],
    "apply_rope": [even_and_odd, lambda x, cos, sin: apply_rope(x, cos, -sin)],
    "grouped_query_attention": [attention_with(scale=False), attention_with(tiled=True), masked_after_softmax],
    "swiglu": [
        lambda x, gate, up, down: ((x @ gate.T) * F.silu(x @ up.T)) @ down.T,
        lambda x, gate, up, down: (F.gelu(x @ gate.T) * (x @ up.T)) @ down.T,
    ],
    "block": [
        lambda x, n1, attention, n2, mlp: n2(n1(x + attention(x)) + mlp(n1(x + attention(x)))),  # post-norm
        lambda x, n1, attention, n2, mlp: x + attention(n1(x)) + mlp(n2(x)),  # both halves read the same stream
        lambda x, n1, attention, n2, mlp: n1(x) + attention(n1(x)) + mlp(n2(n1(x) + attention(n1(x)))),
    ],
    "append_to_cache": [append_a_copy, append_at_the_start],
    "cache_mask": [
        lambda length, T: torch.ones(T, length + T, dtype=torch.bool).tril(),  # aligned at the top left
        lambda length, T: torch.ones(T, length + T, dtype=torch.bool),
        lambda length, T: torch.ones(length + T, length + T, dtype=torch.bool).tril(),  # rows of the cached tokens, too
    ],
    "attend_with_cache": [
        cache_with_mask(lambda T, S: torch.ones(T, S, dtype=torch.bool)),  # new tokens see their successors
        cache_with_mask(lambda T, S: torch.ones(T, S, dtype=torch.bool).tril()),  # aligned at the top left
    ],
    "token_logprobs": [
        lambda z, y, t: (z / t).softmax(-1).log().gather(-1, y[:, None])[:, 0],
        lambda z, y, t: (z * t).log_softmax(-1).gather(-1, y[:, None])[:, 0],
        lambda z, y, t: z.log_softmax(-1).gather(-1, y[:, None])[:, 0] / t,
    ],
    "entropy": [
        lambda z: -(z.softmax(-1) * z.softmax(-1).log()).sum(-1),
        lambda z: (z.softmax(-1) * z.log_softmax(-1)).sum(-1),
        lambda z: -(z.softmax(-1) * z.log_softmax(-1)).mean(-1),
    ],
    "top_p": [sorted_top_p, strict_top_p, lambda x, p: x.masked_fill(x < 1 - p, 0.0)],
    "draw": [
        lambda w, u: w.argmax(-1),
        lambda w, u: torch.searchsorted(w.cumsum(-1) / w.sum(-1, keepdim=True), u[:, None])[:, 0],  # from the left
        lambda w, u: torch.searchsorted(w.cumsum(-1), u[:, None], right=True)[:, 0],  # not times the total
    ],
    "group_advantages": [standardised(-1, 1), standardised((0, 1), 0), standardised(-1, 0)],
    "clipped_loss": [surrogate(torch.max), surrogate(lambda free, clipped: clipped)],
    "k3": [
        lambda logp, ref: (logp - ref.detach()).exp() - (logp - ref.detach()) - 1,
        lambda logp, ref: logp - ref.detach(),
        lambda logp, ref: (ref - logp).exp() - (ref - logp) - 1,  # pulls at the reference
    ],
    "token_weights": [
        lambda lengths, kind, cap: torch.full((int(lengths.sum()),), 1 / int(lengths.sum())),
        lambda lengths, kind, cap: (1 / lengths / len(lengths)).repeat_interleave(lengths),
    ],
    "adamw_step": [adamw_with(corrected=False), adamw_with(decoupled=False), adamw_with(inside=True)],
    "lora_linear": [lambda x, W, A, B, alpha: x @ (W + alpha * B @ A).T, lambda x, W, A, B, alpha: x @ W.T],
    "shift_by_one": [
        lambda z, ids, n: (z[n:], ids[n:]),  # not shifted
        lambda z, ids, n: (z[n:-1], ids[n + 1 :]),  # the first response token is lost
        lambda z, ids, n: (z[:-1], ids[1:]),  # the prompt is trained, too
    ],
    "decode": [decode_with(again=True), decode_with(drop_stop=True), decode_with(one_more=True)],
    "accumulate": [
        accumulate_with(lambda terms, total, pieces: terms.mean() / pieces),
        accumulate_with(lambda terms, total, pieces: terms.mean()),
        accumulate_with(lambda terms, total, pieces: terms.sum() / total, together=True),
        accumulate_with(lambda terms, total, pieces: terms.sum() / total, keep=True),
    ],
    "kl_loss": [
        lambda logp, ref: logp - ref.detach(),  # k1
        lambda logp, ref: losses.kl_penalty(logp, ref, "k3"),
        lambda logp, ref: (ref - logp).square() / 2,  # pulls at the reference
    ],
    "pass_at_k": [
        lambda n, correct, k: 1 - (1 - correct / n) ** k,
        lambda n, correct, k: float(correct >= 1),
        lambda n, correct, k: min(1.0, k * correct / n),
    ],
    "train": [
        train_with(advantages=lambda r: r - r.mean()),  # one baseline for all groups
        train_with(advantages=lambda r: r - r.mean(-1, keepdim=True), weights=lambda n: torch.zeros(int(n.sum()))),
        train_with(sign=-1),
    ],
}
