"""Sampling of one token per row: temperature, filters, and the inverse of the cumulative distribution.

    ids, logprobs = sample(logits, u, SamplingParams(temperature=1.0), vocab_size)

Sampling and training use the same logits: both call `head_logprobs.scale_logits` (same temperature, same vocabulary
cut).

Departure from the textbook: a token is sampled by inverting the cumulative distribution at a random number u that was
drawn before decoding began. Decoding then needs no random state. For a vocabulary of 151,936 ids the two-level search
is several times faster than `torch.multinomial`. No operation here waits for the device, so CUDA graphs can record it.

Shape letters: N rows that are decoding, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.head_logprobs import scale_logits

LOGITS_AT_A_TIME = 1_250_000  # on a CPU: 5 MB in fp32, 8 rows of 151,936 ids. malloc maps new pages from 8 MiB on


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    n: responses per prompt.
    max_new_tokens: most tokens of a response, the stop token included.
    temperature: 0 takes the most likely token each time.
    top_k, top_p, min_p: remove unlikely tokens (off: 0, 1, 0). Log-probabilities stay those of the whole distribution,
        so in training these filters bias the ratio.
    keep_mask: store the ids that were left to sample from, at most top_k per token. Log-probabilities are those over
        these ids, and training uses the same ids (DeepSeek-V3.2, arXiv 2512.02556). It needs top_k and a temperature.
    stop: strings that end a response and stay in it. The text is searched with its special tokens written out, so a
        stop string may contain special tokens.
    ignore_eos: stop ids do not end a response. Every response has max_new_tokens tokens (`train.py --dry-run`).
    """

    n: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    keep_mask: bool = False

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_new_tokens < 1:
            raise ValueError(f"n={self.n}, max_new_tokens={self.max_new_tokens}: expected at least 1 of each")
        sane = 0 <= self.temperature < math.inf and self.top_k >= 0  # False for NaN, too
        if not (sane and 0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise ValueError(
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p}: expected "
                "a finite temperature and top_k of at least 0, top_p above 0 and up to 1, min_p from 0 to 1"
            )

        if self.keep_mask and not (self.top_k > 0 and self.temperature > 0):
            raise ValueError(
                f"keep_mask with top_k={self.top_k}, temperature={self.temperature}: expected both above 0, because "
                "the ids of every token are stored"
            )

    @property
    def filtered(self) -> bool:
        """Whether top_k, top_p or min_p is on."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def sample(logits: Tensor, u: Tensor, params: SamplingParams, vocab_size: int | None) -> tuple[Tensor, Tensor]:
    """Sample a token per row: logits [N, V], u [N] uniform in [0, 1) -> ids [N], log-probabilities [N] (fp32).

    Training computes the same log-probability: at this temperature, over the whole vocabulary. It is NaN if the logits
    of a row contain NaN or +inf, or are all -inf. The id is then an arbitrary valid one, and the caller must reject it.
    A check here would wait for the device.
    """
    if pieces := _pieces(logits, u):
        sampled = [sample(*piece, params, vocab_size) for piece in pieces]
        return torch.cat([ids for ids, _ in sampled]), torch.cat([logprobs for _, logprobs in sampled])
    logits = scale_logits(logits, params.temperature or 1.0, vocab_size)  # [N, V] fp32
    probabilities = logits.softmax(dim=-1)
    if params.temperature == 0:
        ids = logits.argmax(dim=-1)
    else:
        ids = inverse_cdf(filter_weights(probabilities, params) if params.filtered else probabilities, u)
    return ids, probabilities.gather(-1, ids[:, None])[:, 0].log()


def _pieces(logits: Tensor, u: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Some rows at a time, if these are too many for a CPU at once. Otherwise an empty list."""
    rows = max(1, LOGITS_AT_A_TIME // logits.shape[-1])
    too_many = logits.device.type == "cpu" and len(logits) > rows
    return list(zip(logits.split(rows), u.split(rows))) if too_many else []


def sample_kept(
    logits: Tensor, u: Tensor, params: SamplingParams, vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sample`, with the ids that were left to sample from: [N, K], K = top_k or the whole vocabulary; -1 fills up.

    Log-probabilities are those over these ids. If several ids share the lowest logit of the top k, only k are kept.
    """
    if pieces := _pieces(logits, u):
        columns = zip(*(sample_kept(*piece, params, vocab_size) for piece in pieces))
        ids, logprobs, kept = (torch.cat(column) for column in columns)
        return ids, logprobs, kept
    probabilities = scale_logits(logits, params.temperature, vocab_size).softmax(dim=-1)
    weights, kept = filter_weights(probabilities, params).topk(min(params.top_k, probabilities.shape[-1]), dim=-1)
    column = inverse_cdf(weights, u)[:, None]
    logprobs = (weights.gather(-1, column)[:, 0] / weights.sum(dim=-1)).log()
    return kept.gather(-1, column)[:, 0], logprobs, kept.masked_fill(weights == 0, -1)


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """The first id whose cumulative weight exceeds u times the total: weights [N, V] >= 0, u [N] in [0, 1) -> [N].

    The search has two levels, so that only one block of a row is summed element by element. An id of weight 0 is never
    returned, because the cumulative sum does not rise at it. NaN weights give an arbitrary valid id and no error.
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


def wide_dtype(device: torch.device) -> torch.dtype:
    """The type of the random numbers and of cumulative sums: fp64, but fp32 on MPS, which has no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _search(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF by cumulative sum: (index, position of u inside the chosen element, in [0, 1))."""
    wide = wide_dtype(weights.device)
    cumulative = weights.to(wide).cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = torch.minimum(u[:, None].to(wide) * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True)  # first element whose cumulative weight is above target
    # NaN gives an index past the end. On a GPU the gather would then end the process.
    index = index.clamp(max=weights.shape[-1] - 1)
    width = weights.gather(-1, index).to(wide)
    remainder = (target - (cumulative.gather(-1, index) - width)) / width
    return index[:, 0], remainder[:, 0].clamp(0, 1)


def filter_weights(weights: Tensor, params: SamplingParams) -> Tensor:
    """Set the weights of tokens outside min-p, top-k and top-p to 0. weights [N, V]: in proportion to probabilities.

    min-p (Nguyen et al. 2024) keeps tokens at least min_p times as likely as the most likely one. top-k keeps the k
    most likely ones. top-p (Holtzman et al. 2020) keeps the smallest set of the most likely ones that has at least
    top_p of the remaining weight.
    """
    if params.min_p > 0:
        weights = weights.masked_fill(weights < params.min_p * weights.amax(dim=-1, keepdim=True), 0.0)
    if 0 < params.top_k < weights.shape[-1]:
        kth = weights.topk(params.top_k, dim=-1).values[:, -1:]
        weights = weights.masked_fill(weights < kth, 0.0)
    if params.top_p < 1:
        ordered, ids = weights.sort(dim=-1, descending=True)
        above = ordered.cumsum(dim=-1) - ordered  # total weight of the more likely tokens
        ordered = ordered.masked_fill(above >= params.top_p * ordered.sum(dim=-1, keepdim=True), 0.0)
        weights = torch.zeros_like(weights).scatter(-1, ids, ordered)
    return weights
