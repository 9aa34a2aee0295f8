"""How one token is drawn: temperature, filters, and the inverse of the cumulative distribution.

    ids, logprobs = sample(logits, u, SamplingParams(temperature=1.0), vocab_size)

What is sampled is what training scores: both call `head_logprobs.scale_logits` (temperature, and no ids
beyond the tokenizer's vocabulary).

Departure from the textbook: a token is drawn by inverting the cumulative distribution at a number u that was drawn
before decoding began. So drawing needs no random state, and over a vocabulary of 151,936 the two-level search is
several times faster than `torch.multinomial`. Nothing here waits for the device: CUDA graphs may record it.

Shape letters: N rows that are decoding, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.head_logprobs import scale_logits

ROWS_AT_A_TIME = 8  # on a CPU: 5 MB of probabilities for 151,936 ids. From 8 MiB on, malloc maps fresh pages each time


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    n: answers a prompt. max_new_tokens: the cap, exact. temperature: 0 takes the likeliest token each time.
    top_k (0: off), top_p (1: off), min_p (0: off) hide unlikely tokens; log-probabilities stay those of the whole
    distribution, so in training they bias the ratio. stop: strings that end an answer, kept in it; they are looked for
    in the text with its special tokens written out, so that one of those may be (part of) a stop string.
    ignore_eos: stop ids end no answer, so every answer has max_new_tokens tokens (`train.py --dry-run`).
    """

    n: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

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


def sample(logits: Tensor, u: Tensor, params: SamplingParams, vocab_size: int | None) -> tuple[Tensor, Tensor]:
    """Draw a token a row: logits [N, V], u [N] uniform in [0, 1) -> ids [N], log-probabilities [N] (fp32).

    The log-probability is the one that training computes: at this temperature, over the whole vocabulary. It is NaN
    where a row's logits hold NaN or +inf, or nothing but -inf; the id is then any that exists, and for the caller to
    refuse (a look at the numbers here would wait for the device).
    """
    if logits.device.type == "cpu" and len(logits) > ROWS_AT_A_TIME:
        pieces = zip(logits.split(ROWS_AT_A_TIME), u.split(ROWS_AT_A_TIME))
        ids, logprobs = zip(*(sample(*piece, params, vocab_size) for piece in pieces))
        return torch.cat(ids), torch.cat(logprobs)
    logits = scale_logits(logits, params.temperature or 1.0, vocab_size)  # [N, V] fp32
    probabilities = logits.softmax(dim=-1)
    if params.temperature == 0:
        ids = logits.argmax(dim=-1)
    else:
        ids = inverse_cdf(filter_weights(probabilities, params) if params.filtered else probabilities, u)
    return ids, probabilities.gather(-1, ids[:, None])[:, 0].log()


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """The first id whose cumulative weight exceeds u times the total: weights [N, V] >= 0, u [N] in [0, 1) -> [N].

    Two levels, so that only one block of a row is summed element by element. An id of weight 0 is never returned,
    because the cumulative sum does not rise there. NaN among the weights gives an id that exists, and no error.
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
    return (block * size + position).clamp(max=V - 1)


def _search(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF by cumulative sum; also where u falls inside the chosen element, again in [0, 1)."""
    wide = torch.float32 if weights.device.type == "mps" else torch.float64
    cumulative = weights.to(wide).cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = torch.minimum(u[:, None].to(wide) * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True)  # first element whose cumulative weight is above target
    index = index.clamp(max=weights.shape[-1] - 1)  # NaN is above everything: on a GPU the gather would end the process
    width = weights.gather(-1, index).to(wide)
    remainder = (target - (cumulative.gather(-1, index) - width)) / width
    return index[:, 0], remainder[:, 0].clamp(0, 1)


def filter_weights(weights: Tensor, params: SamplingParams) -> Tensor:
    """Set to 0 what min-p, top-k and top-p hide, of probabilities [N, V] or anything in proportion to them.

    min-p (Nguyen et al. 2024) keeps what is at least min_p times as likely as the likeliest; top-k the k likeliest;
    top-p (Holtzman et al. 2020) the smallest set of the likeliest that holds at least top_p of what is left.
    """
    if params.min_p > 0:
        weights = weights.masked_fill(weights < params.min_p * weights.amax(dim=-1, keepdim=True), 0.0)
    if 0 < params.top_k < weights.shape[-1]:
        kth = weights.topk(params.top_k, dim=-1).values[:, -1:]
        weights = weights.masked_fill(weights < kth, 0.0)
    if params.top_p < 1:
        ordered, ids = weights.sort(dim=-1, descending=True)
        above = ordered.cumsum(dim=-1) - ordered  # weight of all that is likelier
        ordered = ordered.masked_fill(above >= params.top_p * ordered.sum(dim=-1, keepdim=True), 0.0)
        weights = torch.zeros_like(weights).scatter(-1, ids, ordered)
    return weights
