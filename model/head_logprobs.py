"""From the last hidden states to log-probabilities and entropies, through a chunked LM head.

For 2,048 tokens and 151,936 ids the logits in fp32 are 1.16 GiB, and their gradient is as large: they would be the
largest tensors of a training step. `token_logprobs` computes a slice of the vocabulary at a time, keeps a few numbers
for each token, and computes the slice again in the backward pass. The reference implementation is in textbook.py:
log-probabilities from complete logits.

    logp, entropy = token_logprobs(hidden, model.lm_head.weight, targets, temperature)

Shape letters: M loss tokens, D hidden, V vocabulary, B slices of it. All in fp32 (fp64 stays fp64).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.compiled import compilable
from model.linear import gradient_in_place

REMOVED = -1e30  # logit of an id that was not to be sampled: probability 0, and finite, so that 0 times it is 0
LOGITS_AT_ONCE = 2**24  # size of a slice of logits: large enough for the matrix products, 64 MiB as fp32
LARGEST_SLICE = 2**28  # on a GPU
CPU_TILE = 2**18  # part of a slice on a CPU: 1 MiB of fp32 stays in a core's cache from pass to pass


def logits_at_once(device: torch.device) -> int:
    """Size of a slice of logits. On a GPU it grows with the memory, to about 3 % of it.

    A GPU needs large slices: each is some twenty kernels, and the weight's gradient is read and written once for each.
    """
    if device.type != "cuda":
        return LOGITS_AT_ONCE
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(max(memory // 512, LOGITS_AT_ONCE), LARGEST_SLICE)  # about 14 bytes for each logit


def scale_logits(logits: Tensor, temperature: float = 1.0, vocab_size: int | None = None) -> Tensor:
    """Turn a head's logits [..., V] into those of the distribution that is sampled from: [..., vocab_size] in fp32.

    Sampling and training both call this function, so they use the same logits. Ids from `vocab_size` on (rows of the
    head beyond the tokenizer's vocabulary) are cut off. May return a view of its input. Raises ValueError for a
    temperature that is not positive.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}, expected a positive number (greedy decoding: take the argmax)")
    logits = logits[..., :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1.0 else logits / temperature


def token_logprobs(
    hidden_MD: Tensor, head_weight_VD: Tensor, targets_M: Tensor, temperature: float = 1.0,
    vocab_size: int | None = None, chunk: int | None = None, kept_MK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probability of each target and entropy of each distribution, [M] and [M] fp32, both differentiable.

    `hidden_MD[i]` is the hidden state that predicts `targets_M[i]` (the caller shifts by one). No tensor is larger than
    [M, chunk]: `chunk` rows of the head are computed at a time. None: about `logits_at_once` logits, for any M. Tokens
    with an incoming gradient of 0 are skipped in the backward pass.

    The slices are slices of the vocabulary and not of the tokens. So each row of the weight's gradient is one product
    over all tokens, which is rounded to the weight's dtype once.

    kept_MK: the ids that top-k left to sample from, for each token; -1 fills up. The distribution is that over these
        ids then (keep sampling mask: DeepSeek-V3.2, arXiv 2512.02556). None: over the whole vocabulary.
    """
    _check_head_inputs(hidden_MD, head_weight_VD, targets_M, vocab_size)
    chunk = max(1, logits_at_once(hidden_MD.device) // max(1, len(hidden_MD))) if chunk is None else chunk
    return _TokenLogprobs.apply(hidden_MD, head_weight_VD, targets_M, temperature, vocab_size, chunk, kept_MK)


def _check_head_inputs(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int | None) -> None:
    shapes = [tuple(x.shape) for x in (hidden, weight, targets)]
    if list(map(len, shapes)) != [2, 2, 1] or shapes[0][1] != shapes[1][1] or shapes[0][0] != shapes[2][0]:
        raise ValueError(f"hidden, head weight and targets are {shapes}, expected [M, D], [V, D] and [M]")
    V = shapes[1][0] if vocab_size is None else vocab_size
    if not 0 < V <= shapes[1][0]:
        raise ValueError(f"vocab_size is {vocab_size}, expected 1 to {shapes[1][0]}, the rows of the head")
    if len(targets) and not (int(targets.min()) >= 0 and int(targets.max()) < V):
        raise ValueError(f"targets are {int(targets.min())} to {int(targets.max())}, expected ids from 0 to {V - 1}")


class _TokenLogprobs(torch.autograd.Function):
    """Statistics of softmax(h W^T / temperature), slice by slice.

    For a slice b of the vocabulary let lse_b be the logsumexp of its logits and mean_b their mean under its softmax.
    Then lse = logsumexp_b(lse_b), and entropy = lse - sum_b softmax(lse)_b mean_b. Backward, with logp = z - lse and
    incoming gradients g of the log-probability and e of the entropy,
        dL/dz_j = g [j == target] - p_j (g + e (logp_j + entropy)).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, *options: Any):  # type: ignore[override]
        temperature, vocab_size, chunk, kept = options
        slices = _logit_slices(hidden, weight, vocab_size, chunk)
        stats = [_slice_statistics(logits, targets, lo, temperature, kept) for lo, logits in slices]
        lse_BM, mean_BM, target_logit_BM = (torch.stack(column) for column in zip(*stats))
        lse = lse_BM.logsumexp(0)
        entropy = lse - ((lse_BM - lse).exp() * mean_BM).sum(0)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy, kept)
        ctx.options = (temperature, vocab_size, chunk)
        return target_logit_BM.sum(0) - lse, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor):  # type: ignore[override]
        hidden, weight, targets, lse, entropy, kept = ctx.saved_tensors
        temperature, vocab_size, chunk = ctx.options
        use_entropy = bool((grad_entropy != 0).any())
        # Tokens of groups without a signal, and masked tokens, have gradient 0. They are left out, so a NaN in their
        # hidden states does not spread.
        rows = ((grad_logp != 0) | (grad_entropy != 0)).nonzero().squeeze(-1)
        per_token = [x[rows] for x in (hidden, targets, lse, entropy, grad_logp, grad_entropy)]
        hidden_rows, targets, lse, entropy, grad_logp, grad_entropy = per_token
        kept = None if kept is None else kept[rows]
        grad_logp, grad_entropy = grad_logp / temperature, grad_entropy / temperature  # of the logits before scaling
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        d_rows = torch.zeros_like(hidden_rows, dtype=lse.dtype)  # sums over slices, in fp32
        in_place = gradient_in_place(weight) if want_weight else None
        d_weight = torch.zeros_like(weight) if want_weight and in_place is None else in_place
        for lo, logits in _logit_slices(hidden_rows, weight, vocab_size, chunk):
            hi = lo + logits.shape[1]
            for tile in _tiles(logits):
                grads = (grad_logp[tile], grad_entropy[tile] if use_entropy else None)
                numbers = targets[tile], lo, lse[tile], entropy[tile]
                some = None if kept is None else kept[tile]
                logits[tile] = _logit_gradient(logits[tile], *numbers, grads, temperature, some)
            if want_hidden:
                d_rows += logits @ weight[lo:hi]
            if d_weight is not None:
                d_weight[lo:hi].addmm_(logits.T, hidden_rows)
        d_hidden = torch.zeros_like(hidden).index_copy_(0, rows, d_rows.to(hidden.dtype)) if want_hidden else None
        return d_hidden, d_weight if in_place is None else None, None, None, None, None, None


def _logit_slices(hidden: Tensor, weight: Tensor, vocab_size: int | None, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first id, logits [M, <= chunk]) for each slice of the vocabulary. The next slice overwrites the last."""
    V = weight.shape[0] if vocab_size is None else vocab_size
    chunk = math.ceil(V / math.ceil(V / chunk))  # slices of equal size
    buffer = hidden.new_empty(hidden.shape[0] * chunk)
    for lo in range(0, V, chunk):
        hi = min(lo + chunk, V)
        logits = buffer[: hidden.shape[0] * (hi - lo)].view(hidden.shape[0], hi - lo)
        yield lo, torch.mm(hidden, weight[lo:hi].T, out=logits)


def _tiles(logits: Tensor) -> list[slice]:
    """Rows to compute at a time: on a CPU a few that fit its cache, elsewhere all of them."""
    M, width = logits.shape
    step = max(1, CPU_TILE // width) if logits.device.type == "cpu" else max(M, 1)
    return [slice(i, i + step) for i in range(0, M, step)]


def _only_kept(logits: Tensor, lo: int, kept_MK: Tensor | None) -> Tensor:
    """Logits of a slice that starts at id `lo`, with those of ids that are not kept replaced by REMOVED."""
    if kept_MK is None:
        return logits
    M, width = logits.shape
    inside = (kept_MK >= lo) & (kept_MK < lo + width)
    removed = torch.ones(M, width + 1, dtype=torch.bool, device=logits.device)  # the last column: ids elsewhere
    removed.scatter_(1, torch.where(inside, kept_MK - lo, width), False)
    return logits.masked_fill_(removed[:, :width], REMOVED)


def _slice_statistics(
    logits: Tensor, targets: Tensor, lo: int, temperature: float, kept: Tensor | None = None
) -> Tensor:
    """[3, M]: logsumexp of the slice, mean logit under its softmax, the target's logit (0 if in another slice)."""
    stats = logits.new_empty(3, logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))
    for tile in _tiles(logits):
        kept_here = None if kept is None else kept[tile]
        stats[:, tile] = _tile_statistics(logits[tile], targets[tile], lo, temperature, kept_here)
    return stats


@compilable
def _tile_statistics(
    logits: Tensor, targets: Tensor, lo: int, temperature: float, kept: Tensor | None = None
) -> Tensor:
    z = _only_kept(scale_logits(logits, temperature), lo, kept)
    inside, column = _find_targets(targets, lo, z.shape[1])
    target_logit = torch.where(inside, z.gather(1, column).squeeze(1), 0.0)
    top = z.amax(-1, keepdim=True)
    e = z.sub_(top).exp()  # in place: z may be a view of the slice, which the next slice overwrites anyway
    total = e.sum(-1)
    mean = e.mul_(z).sum(-1) / total + top.squeeze(1)
    return torch.stack([total.log() + top.squeeze(1), mean, target_logit])


@compilable
def _logit_gradient(
    logits: Tensor, targets: Tensor, lo: int, lse: Tensor, entropy: Tensor, grads: tuple[Tensor, Tensor | None],
    temperature: float, kept: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formula of `_TokenLogprobs`, for some rows of a slice. It reuses the memory of the logits where it can."""
    grad_logp, grad_entropy = grads
    logp = _only_kept(scale_logits(logits, temperature), lo, kept).sub_(lse[:, None])
    if grad_entropy is None:
        d = logp.exp_().mul_(-grad_logp[:, None])
    else:
        p = logp.exp()
        d = logp.mul_(-grad_entropy[:, None]).sub_((grad_logp + grad_entropy * entropy)[:, None]).mul_(p)
    inside, column = _find_targets(targets, lo, d.shape[1])
    return d.scatter_add_(1, column, torch.where(inside, grad_logp, 0.0)[:, None])


def _find_targets(targets: Tensor, lo: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether each target is in the slice [M], and its column there [M, 1] (0 for the others). It does not wait for the
    device."""
    inside = (targets >= lo) & (targets < lo + width)
    return inside, torch.where(inside, targets - lo, 0)[:, None]
