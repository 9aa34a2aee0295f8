"""The parts of one forward pass, as plain numbers: shapes, costs, norms, rotations, attention, next tokens.

    facts = look(model, tokenizer, ids)           # lists and numbers, ready for JSON, for explain.py
    moved = compare(model, other, tokenizer, ids)

Everything is read from `activations.record`, so from the model that trains. FLOPs count a multiplication and an
addition as two. Attention is a list of lists: row i is token i, column j the earlier token it looks at.

Shape letters: N tokens, D hidden, H query heads, G key-value heads, K head size, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.head_logprobs import scale_logits
from model.qwen2_config import Qwen2Config
from qwen2_llm import Qwen2ForCausalLM
from rollout.sampling import SamplingParams, filter_weights
from study.activations import Trace, record
from tokenizer import Tokenizer

LENS_TOKENS = 64
FILTERS = {  # how the next token's probabilities look under common sampling settings
    "T = 1": SamplingParams(),
    "T = 0.5": SamplingParams(temperature=0.5),
    "T = 1.5": SamplingParams(temperature=1.5),
    "top-k 3": SamplingParams(top_k=3),
    "top-p 0.9": SamplingParams(top_p=0.9),
    "min-p 0.1": SamplingParams(min_p=0.1),
}


def look(
    model: Qwen2ForCausalLM, tokenizer: Tokenizer, ids: Sequence[int], *, layers: Sequence[int] = (),
    heads: Sequence[int] = (), start: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Everything about one text. `layers` and `heads` whose attention is kept: none takes up to four of each.

    `lens` and `next` are by position, the last LENS_TOKENS of the text: a row of logits is a vocabulary wide. `shown`
    is the position, `start` or later, at which the model is least sure of the next token.
    Raises ValueError for a layer or head that the model does not have.
    """
    c = model.config
    layers = _chosen(layers, c.num_hidden_layers, "layer")
    heads = _chosen(heads, c.num_attention_heads, "head")
    trace = record(model, ids)
    logits = trace["logits"][-LENS_TOKENS:]
    first = len(ids) - len(logits)
    logp = scale_logits(logits, vocab_size=tokenizer.vocab_size).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    begin = max(start - first, 0)
    return {
        "tokens": token_row(tokenizer, ids),
        "parts": parts(c, len(ids), model.head_weight.element_size()),
        "norms": norms(model, trace),
        "rope": [turned for layer in layers for turned in rope(model, trace, layer, heads)],
        "attention": {f"{la}.{h}": attention_map(trace, la, h) for la in layers for h in heads},
        "cache": cache_growth(c, len(ids), model.head_weight.element_size()),
        "lens": logit_lens(model, tokenizer, trace),
        "next": next_tokens(logits, tokenizer),
        "shown": first + begin + int(entropy[begin:].argmax()),
    }


def _chosen(asked: Sequence[int], count: int, part: str) -> list[int]:
    if not asked:
        few = min(count, 4)
        return [round(i * (count - 1) / max(1, few - 1)) for i in range(few)]
    wrong = [i for i in asked if not 0 <= i < count]
    if wrong:
        raise ValueError(f"{part} {wrong[0]}: the model has {part}s 0 to {count - 1}")
    return list(dict.fromkeys(asked))


def token_row(tokenizer: Tokenizer, ids: Sequence[int]) -> list[dict[str, Any]]:
    return [{"id": int(i), "text": _text(tokenizer, i)} for i in ids]


def parts(c: Qwen2Config, N: int, element_size: int) -> list[dict[str, Any]]:
    """Each part of the model on N tokens: shapes, how many of it there are, parameters, FLOPs and bytes of all of them.

    `activations` are the numbers that the part hands on.
    """
    D, F, V, K, L = c.hidden_size, c.intermediate_size, c.vocab_size, c.head_dim, c.num_hidden_layers
    H, G = c.num_attention_heads, c.num_key_value_heads
    bias = int(c.attention_bias)
    o_bias = int(c.attention_bias and c.model_type != "qwen2")
    pairs = N * (N + 1) // 2  # token i looks at i + 1 tokens
    rows = [
        ("embed_tokens", f"[{V}, {D}]", f"[{N}] -> [{N}, {D}]", 1, V * D, 0, N * D),
        ("input_layernorm", f"[{D}]", f"[{N}, {D}]", L, D, 4 * N * D, N * D),
        ("q_proj", f"[{H * K}, {D}]", f"[{N}, {D}] -> [{N}, {H}, {K}]", L, H * K * (D + bias), 2 * N * D * H * K,
         N * H * K),
        ("k_proj, v_proj", f"2 x [{G * K}, {D}]", f"[{N}, {D}] -> 2 x [{N}, {G}, {K}]", L, 2 * G * K * (D + bias),
         4 * N * D * G * K, 2 * N * G * K),
        ("attention", "", f"[{H}, {N}, {N}] -> [{N}, {H}, {K}]", L, 0, 4 * pairs * H * K, N * H * K),
        ("o_proj", f"[{D}, {H * K}]", f"[{N}, {H * K}] -> [{N}, {D}]", L,
         D * (H * K + o_bias), 2 * N * D * H * K, N * D),
        ("post_attention_layernorm", f"[{D}]", f"[{N}, {D}]", L, D, 4 * N * D, N * D),
        ("gate_proj, up_proj", f"2 x [{F}, {D}]", f"[{N}, {D}] -> 2 x [{N}, {F}]", L, 2 * F * D, 4 * N * D * F,
         2 * N * F),
        ("down_proj", f"[{D}, {F}]", f"[{N}, {F}] -> [{N}, {D}]", L, D * F, 2 * N * D * F, N * D),
        ("norm", f"[{D}]", f"[{N}, {D}]", 1, D, 4 * N * D, N * D),
        ("lm_head" + " (the embedding)" * c.tie_word_embeddings, f"[{V}, {D}]", f"[{N}, {D}] -> [{N}, {V}]", 1,
         0 if c.tie_word_embeddings else V * D, 2 * N * D * V, N * V),
    ]  # fmt: skip
    keys = ("name", "weight", "shape", "count", "parameters", "flops", "activations")
    found: list[dict[str, Any]] = [dict(zip(keys, row)) for row in rows]
    for row in found:
        for key in ("parameters", "flops", "activations"):
            row[key] *= row["count"]
        row["bytes"] = row["parameters"] * element_size
    if c.qk_norm:
        found.insert(4, {"name": "q_norm, k_norm", "weight": f"2 x [{K}]", "shape": f"[{N}, {H} + {G}, {K}]",
                         "count": L, "parameters": 2 * K * L, "flops": 4 * N * (H + G) * K * L,
                         "activations": N * (H + G) * K * L, "bytes": 2 * K * L * element_size})  # fmt: skip
    return found


def residual(trace: Trace, layer: int) -> Tensor:
    """[N, D] the residual stream before block `layer`."""
    return trace["model.embed_tokens"] if layer == 0 else trace[f"model.layers.{layer - 1}"]


def norms(model: Qwen2ForCausalLM, trace: Trace) -> list[dict[str, Any]]:
    """By layer, the root mean square that each RMSNorm divides by: mean over the tokens, and at the last one."""
    found = []
    for layer in range(model.config.num_hidden_layers):
        before = residual(trace, layer)
        for name, x in (
            ("input_layernorm", before),
            ("post_attention_layernorm", before + trace[f"model.layers.{layer}.self_attn"]),
        ):
            rms = x.float().pow(2).mean(-1).sqrt()
            found.append(
                {"layer": layer, "norm": name, "mean": _r(rms.mean()), "last": _r(rms[-1]), "by_token": _rs(rms)}
            )
    return found


def rope(model: Qwen2ForCausalLM, trace: Trace, layer: int, heads: Sequence[int]) -> list[dict[str, Any]]:
    """The rotation of a layer's queries: by head and pair (i, i + K/2) before and after, at the last token and at all.

    The angle at a position is position x frequency, in radians; `turn` is the number of tokens of a whole turn.
    """
    K, position = model.config.head_dim, len(trace.ids) - 1
    name = f"model.layers.{layer}.self_attn"
    before = trace[f"{name}.q_norm" if model.config.qk_norm else f"{name}.q_proj"].reshape(position + 1, -1, K)
    after, frequencies = trace[f"{name}.q"], model.model.rope.compute_frequencies()
    found = []
    for head in heads:
        for i in sorted({0, K // 8, K // 4, K // 2 - 1}):
            pair = torch.tensor([i, i + K // 2])
            first, turned = ([_rs(row) for row in x[:, head, pair]] for x in (before, after))
            frequency = float(frequencies[i])
            found.append({
                "layer": layer, "head": head, "pair": i, "position": position, "frequency": frequency,
                "angle": _r(position * frequency), "turn": _r(2 * torch.pi / frequency), "before": first[-1],
                "after": turned[-1], "before_by_token": first, "after_by_token": turned,
            })  # fmt: skip
    return found


def attention_map(trace: Trace, layer: int, head: int) -> list[list[float]]:
    """Row i: how much token i looks at tokens 0 to i."""
    weights = trace[f"model.layers.{layer}.self_attn.weights"][head].float().cpu()
    return [[round(x, 3) for x in row[: i + 1]] for i, row in enumerate(weights.tolist())]


def cache_growth(c: Qwen2Config, N: int, element_size: int) -> dict[str, Any]:
    """Bytes of keys and values: a token, now, and later."""
    token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * element_size
    return {"bytes_per_token": token, "at": [{"tokens": n, "bytes": n * token} for n in (N, 2 * N, 4 * N, 16 * N)],
            "without_sharing": token * c.num_attention_heads // c.num_key_value_heads}  # fmt: skip


@torch.no_grad()
def logit_lens(model: Qwen2ForCausalLM, tokenizer: Tokenizer, trace: Trace, top: int = 3) -> list[dict[str, Any]]:
    """The head's predictions from the residual stream before each block, and behind the last (nostalgebraist 2020).

    `last`: the likeliest tokens at the last position. `best`: the likeliest at each of the last positions (LENS_TOKENS
    at most: a row of logits is a vocabulary wide), with its probability.
    """
    found = []
    for layer in range(model.config.num_hidden_layers + 1):
        logits = model.logits(model.model.norm(residual(trace, layer)[-LENS_TOKENS:]))
        p = scale_logits(logits, vocab_size=tokenizer.vocab_size).softmax(-1)
        values, ids = p[-1].topk(top)
        best, best_ids = p.max(-1)
        found.append({
            "layer": layer,
            "last": [[_text(tokenizer, i), _r(v)] for i, v in zip(ids.tolist(), values)],
            "best": [[_text(tokenizer, i), _r(v)] for i, v in zip(best_ids.tolist(), best)],
        })  # fmt: skip
    return found


def next_tokens(logits: Tensor, tokenizer: Tokenizer, top: int = 12) -> list[list[dict[str, Any]]]:
    """By position, the likeliest next tokens and the probability of each under every setting of FILTERS: [N, V]."""
    ids = logits[:, : tokenizer.vocab_size].topk(min(top, tokenizer.vocab_size)).indices
    columns = {
        name: probabilities(logits, params, tokenizer.vocab_size).gather(-1, ids) for name, params in FILTERS.items()
    }
    return [
        [
            {"id": i, "text": _text(tokenizer, i), "logit": _r(logits[n, i]),
             "p": {name: _r(p[n, rank]) for name, p in columns.items()}}
            for rank, i in enumerate(row)
        ]
        for n, row in enumerate(ids.tolist())
    ]  # fmt: skip


def probabilities(logits: Tensor, params: SamplingParams, vocab_size: int) -> Tensor:
    """[N, V] the distribution that the sampler draws from: temperature, then min-p, top-k and top-p, then a sum of
    1."""
    scaled = scale_logits(logits.float(), params.temperature, vocab_size)
    weights = filter_weights((scaled - scaled.amax(-1, keepdim=True)).exp(), params)
    return weights / weights.sum(-1, keepdim=True)


@torch.no_grad()
def compare(
    before: Qwen2ForCausalLM, after: Qwen2ForCausalLM, tokenizer: Tokenizer, ids: Sequence[int], start: int = 0
) -> dict[str, Any]:
    """Two checkpoints of one model on the same text: KL a token, which tokens became likelier, which weights moved.

    `mean_kl` is over the choices made behind tokens `start` and later: a policy answers for its answer, not the prompt.
    `next` is by position, the last LENS_TOKENS of the text; `shown` is the one of largest KL, `start` or later.
    Raises ValueError where the two are not of one shape.
    """
    a, b = dict(before.named_parameters()), dict(after.named_parameters())
    if {n: p.shape for n, p in a.items()} != {n: p.shape for n, p in b.items()}:
        raise ValueError("the two checkpoints have different weights; expected two of the same model")
    old, new = (
        scale_logits(record(m, ids)["logits"], vocab_size=tokenizer.vocab_size).log_softmax(-1) for m in (before, after)
    )
    kl = (new.exp() * (new - old)).sum(-1)  # KL(after || before), nats, at each token read last
    rise = (new - old)[:-1].gather(-1, torch.as_tensor(ids, device=old.device)[1:, None])[:, 0]  # of the next token
    first = max(len(ids) - LENS_TOKENS, 0)
    begin = max(start, first)
    return {
        "kl": [_r(x) for x in kl],
        "mean_kl": _r(kl[start:].mean()),
        "rise": [0.0, *(_r(x) for x in rise)],
        "next": [_changed(old[i].exp(), new[i].exp(), tokenizer) for i in range(first, len(ids))],
        "shown": begin + int(kl[begin:].argmax()),
        "weights": [{"name": name, "relative": _moved(w, b[name])} for name, w in a.items()],
    }


def _changed(old: Tensor, new: Tensor, tokenizer: Tokenizer, top: int = 4) -> list[dict[str, Any]]:
    """The tokens that became likelier by most, and those that became less likely: probabilities [V]."""
    change = new - old
    likelier, less = (change * sign for sign in (1, -1))
    ids = [
        *likelier.topk(min(top, len(old))).indices.tolist(),
        *reversed(less.topk(min(top, len(old))).indices.tolist()),
    ]
    return [
        {"text": _text(tokenizer, i), "before": _r(old[i]), "after": _r(new[i])}
        for i in dict.fromkeys(ids)
        if old[i] != new[i]
    ]


def _moved(before: Tensor, after: Tensor) -> float:
    return _r((after.float() - before.float()).norm() / before.float().norm().clamp(min=1e-12))


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.decode([int(token_id)], skip_special_tokens=False)


def _r(x: Tensor | float) -> float:
    return float(f"{float(x):.4g}")


def _rs(x: Tensor) -> list[float]:
    return [_r(v) for v in x]
