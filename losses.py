"""Every loss of the field as pure functions on flat tensors: no model, no optimizer, no padding.

The response tokens of all episodes of a micro-batch lie end to end, [M]; `lengths` [E] says where one episode stops and
the next begins. No padding, hence no padding mask. Where a token must not count, `keep` [M] is False and its weight is
0, and whatever stands there (NaN, 1e9) reaches neither value nor gradient.

Two departures from the textbook:

- A loss here is a *term per token*. Denominators belong to the optimizer step: `token_weights` gives every token of
  the step its weight once, and each micro-batch adds up `weight * term`. The gradient is then the same however the step
  is cut into micro-batches, which a mean per micro-batch is not.
- Logits never exist whole. `token_logprobs` goes through the LM head a slice of the vocabulary at a time, keeps a few
  numbers a token, and computes the slice again in the backward pass. `token_logprobs_eager` is its slow, obvious twin.

    logp, entropy = token_logprobs(hidden, model.lm_head.weight, targets, temperature)
    weights = token_weights("dapo", lengths, max_new_tokens)                       # once a step
    terms = policy_loss(logp, old_logp, advantages, lengths, loss_type="dapo")
    loss = weighted_sum(terms.loss + beta * kl_penalty(logp, ref_logp, "k3"), weights)

Shape letters: M loss tokens, E episodes, D hidden, V vocabulary, T tokens of one answer. All in fp32 (fp64 stays fp64).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG_RATIO_LIMIT = 20.0  # exp is continued by its tangent from here on: e^20 = 5e8, while e^89 overflows fp32
CPU_TILE = 2**18  # logits worked on at a time on a CPU: 1 MiB of fp32 stays in the core's cache from pass to pass


# ---------------------------------------------------------------------------------------------------- log-probabilities


def scale_logits(logits: Tensor, temperature: float = 1.0, vocab_size: int | None = None) -> Tensor:
    """Turn a head's logits [..., V] into those of the distribution that is sampled from: [..., vocab_size] in fp32.

    The one place where this happens, in rollout and in training, so that what was sampled is what is scored. Ids from
    `vocab_size` on (rows of the head beyond the tokenizer's vocabulary) are cut off. May return a view of its input.
    Raises ValueError for a temperature that is not positive.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature is {temperature}, expected a positive number (for greedy decoding take the argmax)"
        )
    logits = logits[..., :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1.0 else logits / temperature


def token_logprobs(
    hidden_MD: Tensor,
    head_weight_VD: Tensor,
    targets_M: Tensor,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk: int = 8192,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, [M] and [M] fp32, both differentiable.

    `hidden_MD[i]` is the hidden state that predicts `targets_M[i]` (the shift by one is the caller's). No tensor larger
    than [M, chunk] is made: `chunk` rows of the head are walked at a time, forward and again backward. Walking the
    vocabulary and not the tokens makes each row of the weight's gradient one product over all tokens, rounded to the
    weight's dtype once, where chunks of tokens would add up in bf16. Tokens whose incoming gradient is 0 are skipped.
    """
    _check_head_inputs(hidden_MD, head_weight_VD, targets_M, vocab_size)
    return _TokenLogprobs.apply(hidden_MD, head_weight_VD, targets_M, temperature, vocab_size, chunk)


def token_logprobs_eager(
    hidden_MD: Tensor,
    head_weight_VD: Tensor,
    targets_M: Tensor,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The slow twin of `token_logprobs`: plain autograd through whole [M, V] logits."""
    _check_head_inputs(hidden_MD, head_weight_VD, targets_M, vocab_size)
    logp_MV = F.log_softmax(scale_logits(hidden_MD @ head_weight_VD.T, temperature, vocab_size), dim=-1)
    return logp_MV.gather(-1, targets_M[:, None]).squeeze(-1), -(logp_MV.exp() * logp_MV).sum(-1)


def _check_head_inputs(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int | None) -> None:
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or targets.shape != hidden.shape[:1]
    ):
        shapes = f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"hidden, head weight and targets are {shapes}, expected [M, D], [V, D] and [M]")
    if vocab_size is not None and not 0 < vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size is {vocab_size}, expected 1 to {weight.shape[0]}, the rows of the head")


class _TokenLogprobs(torch.autograd.Function):
    """Statistics of softmax(h W^T / temperature) slice by slice.

    For a slice b of the vocabulary let lse_b be the logsumexp of its logits and mean_b their mean under its softmax.
    Then lse = logsumexp_b(lse_b), and entropy = lse - sum_b softmax(lse)_b mean_b. Backward, with logp = z - lse and
    incoming gradients g of the log-probability and e of the entropy,
        dL/dz_j = g [j == target] - p_j (g + e (logp_j + entropy)).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, vocab_size, chunk):
        stats = [
            _slice_statistics(logits, targets, lo, temperature)
            for lo, logits in _logit_slices(hidden, weight, vocab_size, chunk)
        ]
        lse_BM, mean_BM, target_logit_BM = (torch.stack(column) for column in zip(*stats))
        lse = lse_BM.logsumexp(0)
        entropy = lse - ((lse_BM - lse).exp() * mean_BM).sum(0)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.set_materialize_grads(False)
        ctx.options = (temperature, vocab_size, chunk)
        return target_logit_BM.sum(0) - lse, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        temperature, vocab_size, chunk = ctx.options
        grad_logp = torch.zeros_like(lse) if grad_logp is None else grad_logp
        use_entropy = grad_entropy is not None and bool((grad_entropy != 0).any())
        grad_entropy = grad_entropy if use_entropy else torch.zeros_like(lse)
        # Tokens of groups without a signal, or masked: no gradient, no work, and a NaN there goes nowhere.
        rows = ((grad_logp != 0) | (grad_entropy != 0)).nonzero().squeeze(-1)
        per_token = [x[rows] for x in (hidden, targets, lse, entropy, grad_logp, grad_entropy)]
        hidden_rows, targets, lse, entropy, grad_logp, grad_entropy = per_token
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        d_rows = torch.zeros_like(hidden_rows, dtype=lse.dtype) if want_hidden else None
        d_weight = torch.zeros_like(weight) if want_weight else None
        for lo, logits in _logit_slices(hidden_rows, weight, vocab_size, chunk):
            hi = lo + logits.shape[1]
            for tile in _tiles(logits):
                grads = (grad_logp[tile], grad_entropy[tile] if use_entropy else None)
                logits[tile] = _logit_gradient(
                    logits[tile], targets[tile], lo, lse[tile], entropy[tile], grads, temperature
                )
            if want_hidden:
                d_rows += logits @ weight[lo:hi]
            if want_weight:
                torch.mm(logits.T, hidden_rows, out=d_weight[lo:hi])
        d_hidden = torch.zeros_like(hidden).index_copy_(0, rows, d_rows.to(hidden.dtype)) if want_hidden else None
        return d_hidden, d_weight, None, None, None, None


def _logit_slices(hidden: Tensor, weight: Tensor, vocab_size: int | None, chunk: int):
    """Yield (first id, logits [M, <= chunk]) for each slice of the vocabulary; the next slice overwrites the last."""
    V = weight.shape[0] if vocab_size is None else vocab_size
    chunk = math.ceil(V / math.ceil(V / chunk))  # slices of equal size
    buffer = hidden.new_empty(hidden.shape[0] * chunk)
    for lo in range(0, V, chunk):
        hi = min(lo + chunk, V)
        logits = buffer[: hidden.shape[0] * (hi - lo)].view(hidden.shape[0], hi - lo)
        yield lo, torch.mm(hidden, weight[lo:hi].T, out=logits)


def _tiles(logits: Tensor) -> list[slice]:
    """Rows to work on at a time: a few that fit a CPU's cache; elsewhere all of them."""
    M, width = logits.shape
    step = max(1, CPU_TILE // width) if logits.device.type == "cpu" else max(M, 1)
    return [slice(i, i + step) for i in range(0, M, step)]


def _slice_statistics(logits: Tensor, targets: Tensor, lo: int, temperature: float) -> Tensor:
    """[3, M]: logsumexp of the slice, mean logit under its softmax, the target's logit (0 where it is elsewhere)."""
    stats = logits.new_empty(3, logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))
    for tile in _tiles(logits):
        z = scale_logits(logits[tile], temperature)
        inside, column = _find_targets(targets[tile], lo, z.shape[1])
        stats[2, tile] = torch.where(inside, z.gather(1, column).squeeze(1), 0.0)
        top = z.amax(-1, keepdim=True)
        z = z - top
        e = z.exp()
        total = e.sum(-1)
        stats[0, tile] = total.log() + top.squeeze(1)
        stats[1, tile] = e.mul_(z).sum(-1) / total + top.squeeze(1)
    return stats


def _logit_gradient(logits, targets, lo, lse, entropy, grads, temperature) -> Tensor:
    grad_logp, grad_entropy = grads
    logp = scale_logits(logits, temperature) - lse[:, None]
    if grad_entropy is None:
        d = logp.exp_().mul_(-grad_logp[:, None])
    else:
        p = logp.exp()
        d = logp.add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(grad_logp[:, None]).mul_(p).neg_()
    inside, column = _find_targets(targets, lo, d.shape[1])
    d.scatter_add_(1, column, torch.where(inside, grad_logp, 0.0)[:, None])
    return d if temperature == 1.0 else d.div_(temperature)


def _find_targets(targets: Tensor, lo: int, width: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in the slice [M], and their column in it [M, 1] (0 for the others); no wait for the device."""
    inside = (targets >= lo) & (targets < lo + width)
    return inside, torch.where(inside, targets - lo, 0)[:, None]


# ------------------------------------------------------------------------------------------------ weights of the tokens


def token_weights(loss_type: str, lengths: Tensor, max_new_tokens: int, keep: Tensor | None = None) -> Tensor:
    """Weight [M] of every loss token of an optimizer step, fp32; the step's loss is sum(weight * term).

    `lengths` [E] are the episodes of the whole step, not of a micro-batch; `keep` [M] is False where a token must not
    count. With n_i kept tokens in episode i and N in all (as in TRL 1.16):
      dapo, cispo        1 / N                       (DAPO, arXiv 2503.14476, eq. 8)
      bnpo               1 / N; TRL's mean over the local batch is this mean where the local batch is the step
      grpo, gspo, sapo   1 / (E n_i)                 (DeepSeekMath, arXiv 2402.03300, eq. 3)
      dr_grpo            1 / (E max_new_tokens)      (Dr. GRPO, arXiv 2503.20783)
    E counts episodes without a kept token too. Nothing kept: zeros. Raises ValueError for an unknown loss.
    """
    _check_loss_type(loss_type)
    M, E = int(lengths.sum()), lengths.numel()
    keep = torch.ones(M, dtype=torch.bool, device=lengths.device) if keep is None else keep
    _check_flat(M, keep=keep)
    counted = keep.float()
    if loss_type in ("dapo", "bnpo", "cispo"):
        return counted / counted.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return counted / max(1, E * max_new_tokens)
    episode = _episode_of_token(lengths, M, keep.device)
    return counted / (E * _segment_sum(counted, episode, E).clamp(min=1))[episode]


def weighted_sum(terms: Tensor, weights: Tensor) -> Tensor:
    """sum(weights * terms), a scalar; a term of weight 0 counts nothing, whatever its value. Both [M]."""
    _check_flat(terms.numel(), terms=terms, weights=weights)
    return (torch.where(weights != 0, terms, 0.0) * weights).sum()


def _episode_of_token(lengths: Tensor, M: int, device: torch.device) -> Tensor:
    """[3, 1] -> [0, 0, 0, 1], on `device`. Raises where the lengths do not add up to M."""
    if lengths.dim() != 1 or int(lengths.sum()) != M:
        raise ValueError(
            f"lengths {tuple(lengths.shape)} add up to {int(lengths.sum())}, expected [E] adding up to {M} tokens"
        )
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths).to(device)


def _segment_sum(x: Tensor, episode: Tensor, E: int) -> Tensor:
    return x.new_zeros(E).index_add(0, episode, x)


def _check_flat(M: int, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != (M,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected [{M}]: one number per loss token")


# -------------------------------------------------------------------------------------------------------- policy losses


class PolicyTerms(NamedTuple):
    """All [M]. `loss` carries the gradient, the others are for metrics: detached ratio, and where the clip bites."""

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


class PolicyInputs(NamedTuple):
    """What a loss sees, all [M]: advantages are already spread over the tokens, tokens not kept hold zeros."""

    logp: Tensor
    log_ratio: Tensor
    advantage: Tensor
    keep: Tensor
    episode: Tensor  # index of the token's episode
    E: int


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    *,
    loss_type: str = "dapo",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    cispo_epsilon_max: float = 5.0,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    keep: Tensor | None = None,
) -> PolicyTerms:
    """The policy loss of every token, before weights: see `token_weights` and `weighted_sum`.

    logp and old_logp [M], advantages [E] (one an episode, spread over its tokens here), lengths [E] (whole episodes,
    end to end), keep [M] or None. DAPO's clip-higher is `epsilon_high` > `epsilon_low` (0.28 and 0.2); gspo wants both
    near 3e-4. Raises ValueError for an unknown loss, wrong shapes, and a `delta` inside the clip range.
    """
    _check_loss_type(loss_type)
    M, E = logp.numel(), lengths.numel()
    _check_flat(M, logp=logp, old_logp=old_logp, keep=keep)
    if advantages.shape != (E,):
        raise ValueError(f"advantages have shape {tuple(advantages.shape)}, expected [{E}]: one per episode")
    if delta is not None and delta <= 1 + epsilon_high:
        raise ValueError(f"delta is {delta}, expected more than 1 + epsilon_high = {1 + epsilon_high}, or None")
    keep = torch.ones_like(logp, dtype=torch.bool) if keep is None else keep
    episode = _episode_of_token(lengths, M, logp.device)
    logp, old_logp = torch.where(keep, logp, 0.0), torch.where(keep, old_logp, 0.0)
    inputs = PolicyInputs(logp, logp - old_logp, advantages.to(logp)[episode], keep, episode, E)
    options = {
        "clip": {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high, "delta": delta},
        "cispo": {"epsilon_max": cispo_epsilon_max},
        "sapo": {"temperature_pos": sapo_temperature_pos, "temperature_neg": sapo_temperature_neg},
    }
    loss, ratio, low, high = POLICY_LOSSES[loss_type](inputs, **options.get(loss_type, options["clip"]))
    return PolicyTerms(torch.where(keep, loss, 0.0), ratio.detach(), low & keep, high & keep)


def clipped_surrogate(x: PolicyInputs, epsilon_low: float, epsilon_high: float, delta: float | None) -> PolicyTerms:
    """-min(r A, clip(r, 1 - low, 1 + high) A): PPO (arXiv 1707.06347, eq. 7), clip-higher (DAPO, arXiv 2503.14476).

    `delta` bounds r itself, so that a token of negative advantage whose ratio has run away loses its pull: dual-clip
    PPO (arXiv 1912.09729), brought to GRPO by INTELLECT-2 (arXiv 2505.07291).
    """
    return _clip(safe_exp(x.log_ratio), x.advantage, epsilon_low, epsilon_high, delta)


def sequence_surrogate(x: PolicyInputs, epsilon_low: float, epsilon_high: float, delta: float | None) -> PolicyTerms:
    """The same with one ratio an episode, the geometric mean of its tokens': GSPO (arXiv 2507.18071, eqs. 5 and 7)."""
    count = _segment_sum(x.keep.to(x.logp), x.episode, x.E).clamp(min=1)
    ratio = safe_exp(_segment_sum(x.log_ratio, x.episode, x.E) / count)[x.episode]
    return _clip(ratio, x.advantage, epsilon_low, epsilon_high, delta)


def cispo(x: PolicyInputs, epsilon_max: float) -> PolicyTerms:
    """-sg(min(r, epsilon_max)) A log pi: the weight is clipped, and no token loses its gradient.

    MiniMax-M1 (arXiv 2506.13585, eq. 4) without the lower bound, as TRL and ScaleRL (arXiv 2510.13786) have it.
    """
    ratio = safe_exp(x.log_ratio)
    high = (ratio > epsilon_max) & (x.advantage > 0)
    return PolicyTerms(
        -ratio.clamp(max=epsilon_max).detach() * x.advantage * x.logp, ratio, torch.zeros_like(high), high
    )


def sapo(x: PolicyInputs, temperature_pos: float, temperature_neg: float) -> PolicyTerms:
    """-sigmoid(tau (r - 1)) 4 / tau A: a smooth gate of slope 1 at r = 1 replaces the clip (SAPO, arXiv 2511.20347)."""
    ratio = safe_exp(x.log_ratio)
    tau = torch.full_like(ratio, temperature_neg).masked_fill(x.advantage > 0, temperature_pos)
    never = torch.zeros_like(x.keep)
    return PolicyTerms(-torch.sigmoid(tau * (ratio - 1)) * 4 / tau * x.advantage, ratio, never, never)


POLICY_LOSSES: dict[str, Callable[..., PolicyTerms]] = {
    "grpo": clipped_surrogate,  # grpo, bnpo, dr_grpo and dapo differ in their weights alone
    "bnpo": clipped_surrogate,
    "dr_grpo": clipped_surrogate,
    "dapo": clipped_surrogate,
    "gspo": sequence_surrogate,
    "cispo": cispo,
    "sapo": sapo,
}


def _clip(
    ratio: Tensor, advantage: Tensor, epsilon_low: float, epsilon_high: float, delta: float | None
) -> PolicyTerms:
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    low = (ratio < 1 - epsilon_low) & (advantage < 0)
    high = (ratio > 1 + epsilon_high) & (advantage > 0)
    return PolicyTerms(-torch.min(bounded * advantage, clipped * advantage), ratio, low, high)


def safe_exp(x: Tensor) -> Tensor:
    """exp(x) up to x = 20, its tangent beyond: never infinite, and its gradient neither infinite nor lost."""
    return x.clamp(max=LOG_RATIO_LIMIT).exp() * (1 + F.relu(x - LOG_RATIO_LIMIT))


def _check_loss_type(loss_type: str) -> None:
    if loss_type not in POLICY_LOSSES:
        raise ValueError(f"loss_type is {loss_type!r}, expected one of {', '.join(POLICY_LOSSES)}")
