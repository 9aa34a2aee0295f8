"""Batched sampling: prefill each prompt once, decode its whole group together, stop, let finished rows leave.

    completions = generate(model, prompts, SamplingParams(n=8, max_new_tokens=256), tokenizer=tokenizer, seed=0)

What is sampled is what training scores: both go through `losses.scale_logits` (temperature, and no ids beyond the
tokenizer's vocabulary). Nothing of a checkpoint's generation_config.json but its stop ids is used.

Departure from the textbook: a token is drawn by inverting the cumulative distribution at a number u that was drawn
before decoding began, from a generator of its own for every row. So a row's answer does not depend on the batch around
it, decoding needs no random state, and over a vocabulary of 151,936 the two-level search is several times faster than
`torch.multinomial`.

Shape letters: N rows that are decoding, V vocabulary, D hidden.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from attention import GroupCache, KVCache, PrefillAttention
from data_types import Completion
from linear import packed_weights
from losses import scale_logits
from qwen2_llm import Qwen2ForCausalLM
from tokenizer import Tokenizer

logger = logging.getLogger(__name__)
T = TypeVar("T")
CHECK_EVERY = 16  # tokens between two looks at how many rows still run, where a look waits for the device


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    n: answers a prompt. max_new_tokens: the cap, exact. temperature: 0 takes the likeliest token each time.
    top_k (0: off), top_p (1: off), min_p (0: off) hide unlikely tokens; log-probabilities stay those of the whole
    distribution, so in training they bias the ratio. stop: strings that end an answer, kept in its text.
    """

    n: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if self.n < 1 or self.max_new_tokens < 1:
            raise ValueError(f"n={self.n}, max_new_tokens={self.max_new_tokens}: expected at least 1 of each")
        sane = 0 <= self.temperature < math.inf and self.top_k >= 0  # False for NaN, too
        if not (sane and 0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise ValueError(
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p}: expected "
                "a finite temperature and top_k of at least 0, top_p above 0 and up to 1, min_p from 0 to 1"
            )

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def generate(
    model: Qwen2ForCausalLM,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    tokenizer: Tokenizer,
    seed: int = 0,
    max_rows: int = 512,
    share_prompt: bool = True,
    pack_weights: bool = True,
) -> list[Completion]:
    """Sample `params.n` answers to each prompt; those of prompt i stand at [i * n, (i + 1) * n).

    Args:
        prompts: texts, or token ids that are used as they are.
        max_rows: decode at most so many answers at a time, fewer where memory runs out; it does not change them.
        share_prompt: attend to a prompt's keys once a group; False gives every row its own copy (the slow twin).
        pack_weights: lay bf16 weights out for the CPU's matrix unit first; False multiplies by them as they are.

    Raises ValueError for an empty prompt, or one that leaves no room for max_new_tokens in the model's context.
    """
    ids = [tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
    _check_room(ids, params.max_new_tokens, model.config.max_position_embeddings)
    uniforms = _uniforms(ids, params, seed)
    was_training = model.training
    model.eval()

    def all_answers(rows: int) -> list[Completion]:
        completions, step = [], max(1, rows // params.n)
        with packed_weights(model, min(step, len(ids)) * params.n) if pack_weights else contextlib.nullcontext():
            for start in range(0, len(ids), step):
                part, u = slice(start, start + step), uniforms[start * params.n : (start + step) * params.n]
                completions += _generate_batch(model, ids[part], u, params, tokenizer, share_prompt, first_index=start)
        return completions

    completions = halve_when_out_of_memory(all_answers, max_rows)
    model.train(was_training)
    return completions


def halve_when_out_of_memory(work: Callable[[int], T], size: int) -> T:
    """work(size); where memory runs out, from the start with half the size, down to 1. `work` must not depend on it."""
    while True:
        try:
            return work(size)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size //= 2
            logger.warning("out of memory; again with pieces of at most %d", size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # outside the except clause: the error's traceback holds on to tensors


def is_out_of_memory(error: BaseException) -> bool:
    """torch's own error on a GPU; on a CPU its allocator raises a RuntimeError that only its text tells."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def _check_room(ids: list[list[int]], new_tokens: int, context: int) -> None:
    for i, prompt in enumerate(ids):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; expected at least one token")
        if len(prompt) + new_tokens > context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, and {new_tokens} new ones do not fit the model's context of "
                f"{context}; shorten the prompt or lower max_new_tokens"
            )


def _uniforms(ids: list[list[int]], params: SamplingParams, seed: int) -> Tensor:
    """[prompts * n, max_new_tokens] numbers in [0, 1), each row from a generator seeded by (seed, prompt, sample)."""
    seen: Counter[tuple[int, ...]] = Counter()
    rows = []
    for prompt in ids:
        for sample in range(params.n):
            key = f"{seed}/{prompt}/{seen[tuple(prompt)]}/{sample}".encode()
            row_seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
            generator = torch.Generator().manual_seed(row_seed)
            rows.append(torch.rand(params.max_new_tokens, generator=generator, dtype=torch.float64))
        seen[tuple(prompt)] += 1
    return torch.stack(rows) if rows else torch.empty(0, params.max_new_tokens)


@torch.inference_mode()
def _generate_batch(
    model: Qwen2ForCausalLM,
    ids: list[list[int]],
    uniforms: Tensor,
    params: SamplingParams,
    tokenizer: Tokenizer,
    share_prompt: bool,
    first_index: int,
) -> list[Completion]:
    hidden, cache = _prefill(model, ids, params, share_prompt)
    device, total, cap = model.device, len(ids) * params.n, params.max_new_tokens
    uniforms, stop_ids = uniforms.to(device), torch.tensor(sorted(tokenizer.eos_token_ids), device=device)
    sampled = torch.zeros(total, cap, dtype=torch.long, device=device)
    logprobs = torch.zeros(total, cap, device=device)
    lengths = torch.full((total,), cap, device=device)
    stopped = torch.zeros(total, dtype=torch.bool, device=device)
    rows = torch.arange(total, device=device)  # which answer each decoding row belongs to
    check_every = 1 if device.type == "cpu" else CHECK_EVERY
    for t in range(cap):
        token, logprob = sample(model.logits(hidden), uniforms[rows, t], params, tokenizer.vocab_size)
        sampled[rows, t], logprobs[rows, t] = token, logprob
        ends = torch.isin(token, stop_ids) | _ends_with_string(sampled[rows, : t + 1], params.stop, tokenizer)
        lengths[rows] = torch.where(ends & ~stopped[rows], t + 1, lengths[rows])
        stopped[rows] |= ends
        if t + 1 == cap:
            break
        if (t + 1) % check_every == 0:  # the only wait for the device
            running = ~stopped[rows]
            alive = int(running.sum())
            if alive == 0:
                break
            if alive <= 0.85 * len(rows):  # a copy of the cache: not for every row that ends
                keep = running.nonzero()[:, 0]
                rows, token = rows[keep], token[keep]
                cache.keep(keep)
        hidden = model.hidden_states(token, cache.positions().flatten(), cache.attend)
        cache.advance()
    sampled, logprobs, stopped = sampled.cpu(), logprobs.cpu(), stopped.tolist()
    return [
        _completion(i, first_index, ids[i // params.n], sampled[i, :n], logprobs[i, :n], stopped[i], params, tokenizer)
        for i, n in enumerate(lengths.tolist())
    ]


def _prefill(model: Qwen2ForCausalLM, ids: list[list[int]], params: SamplingParams, share_prompt: bool):
    """Run all prompts once: (hidden state of each answer's last prompt token [prompts * n, D], the filled cache)."""
    lengths = [len(prompt) for prompt in ids]
    prefill = PrefillAttention(lengths)
    flat = torch.tensor([i for prompt in ids for i in prompt], device=model.device)
    hidden = model.hidden_states(flat, prefill.layout.positions(model.device), prefill)
    last = torch.tensor(lengths, device=model.device).cumsum(0) - 1
    make_cache = GroupCache if share_prompt else KVCache.from_prefill
    return hidden[last].repeat_interleave(params.n, dim=0), make_cache(prefill, params.n, params.max_new_tokens)


def _ends_with_string(sampled: Tensor, stop: tuple[str, ...], tokenizer: Tokenizer) -> Tensor:
    """[N] bool: does the text so far hold a stop string that its last token completed?"""
    ends = torch.zeros(len(sampled), dtype=torch.bool, device=sampled.device)
    if not stop:
        return ends
    tail = max(len(s.encode()) for s in stop) + 1  # a token is at least a byte, so a stop string lies in so many tokens
    for row, ids in enumerate(sampled[:, -tail:].tolist()):
        text = tokenizer.decode(ids)
        ends[row] = any(s in text for s in stop)
    return ends


def _completion(
    row: int, first_index: int, prompt_ids: list[int], ids: Tensor, logprobs: Tensor, stopped: bool,
    params: SamplingParams, tokenizer: Tokenizer,
) -> Completion:  # fmt: skip
    response = ids.tolist()
    at_stop_id = bool(response) and response[-1] in tokenizer.eos_token_ids
    text = tokenizer.decode(response[:-1] if at_stop_id else response)
    finish = "stop" if stopped else "length"
    return Completion(first_index + row // params.n, prompt_ids, response, logprobs.tolist(), text, finish)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing one token


def sample(logits: Tensor, u: Tensor, params: SamplingParams, vocab_size: int | None) -> tuple[Tensor, Tensor]:
    """Draw a token a row: logits [N, V], u [N] uniform in [0, 1) -> ids [N], log-probabilities [N] (fp32).

    The log-probability is the one that training computes: at this temperature, over the whole vocabulary.
    """
    logits = scale_logits(logits, params.temperature or 1.0, vocab_size)  # [N, V] fp32
    highest = logits.amax(dim=-1, keepdim=True)
    weights = (logits - highest).exp_()  # unnormalised probabilities, at most 1
    if params.temperature == 0:
        ids = logits.argmax(dim=-1)
    else:
        ids = inverse_cdf(filter_weights(weights, params) if params.filtered else weights, u.to(weights.device))
    log_total = weights.sum(dim=-1).log() + highest[:, 0]
    return ids, logits.gather(-1, ids[:, None])[:, 0] - log_total


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """The first id whose cumulative weight exceeds u times the total: weights [N, V] >= 0, u [N] in [0, 1) -> [N].

    Two levels, so that only one block of a row is summed element by element. An id of weight 0 is never returned,
    because the cumulative sum does not rise there.
    """
    N, V = weights.shape
    size = max(1, int(V**0.5))
    whole = V // size * size
    blocks = weights[:, :whole].view(N, -1, size).sum(dim=-1)
    if whole < V:
        blocks = torch.cat([blocks, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=-1)
    block, remainder = _search(blocks, u)
    inside = block[:, None] * size + torch.arange(size, device=weights.device)  # [N, size] ids of the chosen block
    in_block = weights.gather(-1, inside.clamp(max=V - 1)).masked_fill(inside >= V, 0.0)
    position, _ = _search(in_block, remainder)
    return block * size + position


def _search(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF by cumulative sum; also where u falls inside the chosen element, again in [0, 1)."""
    wide = torch.float32 if weights.device.type == "mps" else torch.float64
    cumulative = weights.to(wide).cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = torch.minimum(u[:, None].to(wide) * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True)  # first element whose cumulative weight is above target
    width = weights.gather(-1, index).to(wide)
    remainder = (target - (cumulative.gather(-1, index) - width)) / width
    return index[:, 0], remainder[:, 0].clamp(0, 1)


def filter_weights(weights: Tensor, params: SamplingParams) -> Tensor:
    """Set to 0 what min-p, top-k and top-p hide. Weights [N, V] are relative to the largest, which is 1.

    min-p (Nguyen et al. 2024) keeps what is at least min_p times as likely as the likeliest; top-k the k likeliest;
    top-p (Holtzman et al. 2020) the smallest set of the likeliest that holds at least top_p of what is left.
    """
    if params.min_p > 0:
        weights = weights.masked_fill(weights < params.min_p, 0.0)
    if 0 < params.top_k < weights.shape[-1]:
        kth = weights.topk(params.top_k, dim=-1).values[:, -1:]
        weights = weights.masked_fill(weights < kth, 0.0)
    if params.top_p < 1:
        ordered, ids = weights.sort(dim=-1, descending=True)
        above = ordered.cumsum(dim=-1) - ordered  # weight of all that is likelier
        ordered = ordered.masked_fill(above >= params.top_p * ordered.sum(dim=-1, keepdim=True), 0.0)
        weights = torch.zeros_like(weights).scatter(-1, ids, ordered)
    return weights
