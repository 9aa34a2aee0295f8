"""Flash attention of a `Layout` on the CPU, and attention that returns its log-sum-exp on every device.

A response has no mask. Its attention over the prompt (all of it is visible) and over itself (causal) are computed apart
by torch's flash kernel, and merged by their log-sum-exp. That is exact (Dao et al. 2022, "FlashAttention", section 3.1;
Juravsky et al. 2024, "Hydragen"), and the prompt's keys are read once for a whole group.

    o_NHK = flash_attention(q_NHK, k_NGK, v_NGK, rectangles(runs), prefix_spans(runs))

Shape letters: N flat tokens, M some of them, B rows of a rectangle, T its length, S keys, H query heads, G key-value
heads, R = H / G, K head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.layout import Run
from model.torch_private import efficient_attention, flash_cpu, flash_cpu_backward

Rectangle = tuple[Tensor, Tensor, Tensor]  # rows [B, T], positions of the real ones among B * T [M], their rows [M]
Span = tuple[slice, slice]  # rows of consecutive runs with the same prefix, rows of the prefix


def rectangles(runs: Sequence[Run], slack: float = 1.25) -> list[Rectangle]:
    """Runs of similar length as padded rectangles: one kernel call for each instead of one for each run.

    Padding stands at the end of a row. A causal row reads no later row, so real rows need no mask.
    """
    done: list[Rectangle] = []
    batch: list[Run] = []
    for run in sorted(runs, key=lambda r: r.length):
        # The shortest run of a rectangle is at least 1 / slack of the longest. 4 rows more or less do not matter.
        if batch and run.length > slack * batch[0].length + 4:
            done.append(_rectangle(batch))
            batch = []
        batch.append(run)
    return [*done, _rectangle(batch)] if batch else done


def _rectangle(runs: Sequence[Run]) -> Rectangle:
    offsets = torch.arange(max(r.length for r in runs))
    starts, lengths = torch.tensor([r.start for r in runs])[:, None], torch.tensor([r.length for r in runs])[:, None]
    rows = starts + offsets.clamp(max=lengths - 1)  # padding repeats the last row of its run: a row that exists
    real = offsets < lengths
    return rows, real.flatten().nonzero()[:, 0], rows[real]


def prefix_spans(runs: Sequence[Run]) -> list[Span]:
    """Consecutive runs that share a prefix, with that prefix: one kernel call for a whole group."""
    spans: list[Span] = []
    for run in runs:
        if not run.prefix_length or not run.length:
            continue
        if spans and spans[-1][1] == run.prefix_rows and spans[-1][0].stop == run.start:
            spans[-1] = (slice(spans[-1][0].start, run.rows.stop), run.prefix_rows)
        else:
            spans.append((run.rows, run.prefix_rows))
    return spans


def attend_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[B, H, T, K] x [B, H, S, K] -> output [B, H, T, K] and the log-sum-exp of the scores [B, H, T] (fp32).

    `mask` is added to the scores, [B, 1, 1, S]. On CUDA its lines start at multiples of 16 elements.
    """
    if q.device.type == "cpu" and q.dtype != torch.float64:
        return flash_cpu(q, k, v, causal=False, mask=None if mask is None else mask.expand(-1, -1, q.shape[2], -1))
    if q.device.type == "cuda" and q.dtype != torch.float64:
        return efficient_attention(q, k, v, None if mask is None else mask.expand(-1, q.shape[1], q.shape[2], -1))
    wide = torch.promote_types(q.dtype, torch.float32)  # scores in 16 bits would be off by a percent
    scores = q.to(wide) @ k.to(wide).mT * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask
    lse = scores.logsumexp(dim=-1)
    return ((scores - lse[..., None]).exp() @ v.to(wide)).to(v.dtype), lse


def merge_attention(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from the attention over each: [..., K] and [...] -> the same, fp32."""
    lse = torch.logaddexp(lse1, lse2)
    w1, w2 = (lse1 - lse).exp()[..., None], (lse2 - lse).exp()[..., None]  # each set's share of the softmax's sum
    return w1 * o1.float() + w2 * o2.float(), lse


def flash_attention(q: Tensor, k: Tensor, v: Tensor, rectangles: list[Rectangle], prefixes: list[Span]) -> Tensor:
    """[N, H, K], [N, G, K], [N, G, K] -> [N, H, K]; differentiable."""
    return _FlashAttention.apply(q, k, v, rectangles, prefixes)


class _FlashAttention(torch.autograd.Function):
    """Flash attention of causal rectangles plus the shared prefixes, merged.

    With the merged output o_i and log-sum-exp lse_i of row i, the gradient of a score is
        dS_ij = P_ij (dP_ij - dO_i . o_i),    P_ij = exp(S_ij - lse_i),
    a formula that holds key by key. So the kernel's own backward runs on each part with the merged o and lse, and the
    gradients of the parts add up.
    """

    @staticmethod
    def forward(ctx: Any, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, *parts: Any) -> Tensor:  # type: ignore[override]
        rectangles, prefixes = parts
        n_kv = k_NGK.shape[1]
        o = torch.empty_like(q_NHK)
        lse = torch.empty(q_NHK.shape[:2], dtype=torch.float32)  # [N, H]
        # 1. Every run over itself. A rectangle's results go back to the flat rows; those of padding are dropped.
        for rows, real, flat in rectangles:
            o_BHTK, lse_BHT = flash_cpu(*_gather(q_NHK, k_NGK, v_NGK, rows), causal=True)
            o[flat] = o_BHTK.transpose(1, 2).flatten(0, 1)[real]
            lse[flat] = lse_BHT.transpose(1, 2).flatten(0, 1)[real]
        # 2. Every response over its prompt, merged into the result of 1.
        for span, prefix in prefixes:
            q = _stack_heads(q_NHK[span], n_kv)
            o_prompt, lse_prompt = flash_cpu(q, _heads_first(k_NGK[prefix]), _heads_first(v_NGK[prefix]), causal=False)
            o_prompt = _unstack_heads(o_prompt, q_NHK[span])
            lse_prompt = _unstack_heads(lse_prompt[..., None], lse[span][..., None])[..., 0]
            merged, lse[span] = merge_attention(o[span], lse[span], o_prompt, lse_prompt)
            o[span] = merged.to(o.dtype)
        ctx.save_for_backward(q_NHK, k_NGK, v_NGK, o, lse)
        ctx.rectangles, ctx.prefixes = rectangles, prefixes
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor):  # type: ignore[override]
        q_NHK, k_NGK, v_NGK, o, lse = ctx.saved_tensors
        n_kv, group = k_NGK.shape[1], q_NHK.shape[1] // k_NGK.shape[1]
        # In fp32, because a prompt's keys get a gradient from every response of their group.
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q_NHK, k_NGK, v_NGK))
        for rows, real, flat in ctx.rectangles:
            do_rect = torch.zeros(rows.numel(), *do.shape[1:], dtype=do.dtype)  # padding rows send no gradient back
            do_rect[real] = do[flat]
            do_rect = do_rect.view(*rows.shape, *do.shape[1:]).transpose(1, 2)
            o_rect, lse_rect = o[rows].transpose(1, 2), lse[rows].transpose(1, 2).contiguous()
            grads = flash_cpu_backward(do_rect, *_gather(q_NHK, k_NGK, v_NGK, rows), o_rect, lse_rect, True)
            gq, gk, gv = (g.transpose(1, 2).flatten(0, 1)[real] for g in grads)  # [M, H, K]
            dq[flat] = gq.float()
            dk[flat] = gk.float().unflatten(1, (n_kv, group)).sum(2)  # the heads that share a key head add up
            dv[flat] = gv.float().unflatten(1, (n_kv, group)).sum(2)
        for span, prefix in ctx.prefixes:
            q, do_, o_ = (_stack_heads(x[span], n_kv) for x in (q_NHK, do, o))
            lse_ = _stack_heads(lse[span][..., None], n_kv)[..., 0]
            k, v = _heads_first(k_NGK[prefix]), _heads_first(v_NGK[prefix])
            gq, gk, gv = flash_cpu_backward(do_, q, k, v, o_, lse_, False)
            dq[span] += _unstack_heads(gq, q_NHK[span])
            dk[prefix] += gk[0].transpose(0, 1)
            dv[prefix] += gv[0].transpose(0, 1)
        return dq.to(q_NHK.dtype), dk.to(k_NGK.dtype), dv.to(v_NGK.dtype), None, None


def _gather(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B, T] of q, k, v as [B, H, T, K]; each key head is repeated for the query heads that share it."""
    group = q.shape[1] // k.shape[1]
    k, v = (x[rows].repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
    return q[rows].transpose(1, 2), k, v


def _heads_first(x_SGK: Tensor) -> Tensor:
    return x_SGK.transpose(0, 1)[None]  # [S, G, K] -> [1, G, S, K]


def _stack_heads(x_MHK: Tensor, n_kv: int) -> Tensor:
    """The query heads that share a key head become more queries of it: [M, H, K] -> [1, G, M * R, K].

    Without a mask, attention treats every query alike, so no key is repeated.
    """
    return x_MHK.unflatten(1, (n_kv, -1)).transpose(0, 1).flatten(1, 2)[None]


def _unstack_heads(x: Tensor, like_MHK: Tensor) -> Tensor:
    """The way back: [1, G, M * R, K] -> [M, H, K]."""
    return x[0].unflatten(1, (like_MHK.shape[0], -1)).transpose(0, 1).reshape(like_MHK.shape)
