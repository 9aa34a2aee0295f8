"""Reference implementation of the decode loop: every row has its own copy of the prompt's keys and values.

Prompts are processed in chunks of `rows`, and a chunk runs until its longest response ends. No slots, no shared prompt,
no packed weights, no graphs. `rollout.decoding.decode` must give the same tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention import KVCache
from qwen2_llm import Qwen2ForCausalLM
from rollout.decoding import Responses, prefill_prompts, stop_string_end, stop_tail
from rollout.sampling import SamplingParams, sample, wide_dtype
from tokenizer import Tokenizer


@torch.inference_mode()
def decode_plainly(
    model: Qwen2ForCausalLM, prompts: Sequence[list[int]], uniforms: Tensor, params: SamplingParams,
    tokenizer: Tokenizer, rows: int, capture: None = None,
) -> Responses:  # fmt: skip
    """The tables of `decode`. `capture` is not used."""
    size = max(1, rows // params.n)
    pieces = []
    for start in range(0, len(prompts), size):
        u = uniforms[start * params.n : (start + size) * params.n]
        pieces.append(_decode_piece(model, prompts[start : start + size], u, params, tokenizer))
    return Responses(*(torch.cat(tables) for tables in zip(*pieces)))


def _decode_piece(model, prompts, uniforms: Tensor, params: SamplingParams, tokenizer: Tokenizer) -> Responses:
    hidden, prefill = prefill_prompts(model, prompts)
    hidden, cache = hidden.repeat_interleave(params.n, dim=0), KVCache.from_prefill(prefill, params.n, len(uniforms[0]))
    sampled, logprobs, lengths = [], [], torch.full((len(uniforms),), params.max_new_tokens)
    stopped = torch.zeros(len(uniforms), dtype=torch.bool)
    for t, u in enumerate(uniforms.T):
        token, logprob = sample(
            model.logits(hidden), u.to(hidden.device, wide_dtype(hidden.device)), params, tokenizer.vocab_size
        )
        sampled.append(token.cpu())
        logprobs.append(logprob.cpu())
        ends = torch.tensor([_ends(ids, params.stop, tokenizer) for ids in torch.stack(sampled, dim=1).tolist()])
        lengths = torch.where(ends & ~stopped, t + 1, lengths)
        stopped |= ends
        if stopped.all() or t + 1 == params.max_new_tokens:
            break
        hidden = model.hidden_states(token, cache.positions().flatten(), cache.attend)
        cache.advance()
    return Responses(_padded(sampled, uniforms), _padded(logprobs, uniforms), lengths, stopped)


def _ends(ids: list[int], stop: tuple[str, ...], tokenizer: Tokenizer) -> bool:
    if ids[-1] in tokenizer.eos_token_ids:
        return True
    return bool(stop) and stop_string_end(ids[-stop_tail(stop) :], 1, stop, tokenizer) is not None


def _padded(columns: list[Tensor], like: Tensor) -> Tensor:
    """Columns as a table of like's width."""
    table = torch.stack(columns, dim=1)
    return torch.nn.functional.pad(table, (0, like.shape[1] - len(columns)))
