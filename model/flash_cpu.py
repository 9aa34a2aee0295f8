"""Flash attention of a `Layout` on the CPU: causal rectangles plus shared prefixes, merged by their log-sum-exp.

A response is never given a mask. Its attention over the prompt (everything visible) and over itself (causal) are
computed apart by torch's flash kernel and merged, which is exact (Dao et al. 2022, "FlashAttention", section 3.1;
Juravsky et al. 2024, "Hydragen"). The backward of each part needs only the merged output and log-sum-exp.

    o_NHK = flash_attention(q_NHK, k_NGK, v_NGK, rectangles(runs), prefix_spans(runs))

Shape letters: N flat tokens, B rows of a rectangle, T its length, S keys, H query heads, G key-value heads,
K head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.layout import Run


def rectangles(runs: Sequence[Run], slack: float = 1.25) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Runs of similar length as padded rectangles [B, T].

    Padding stands at the end, where causal attention never looks back from a real row, so no mask is needed.
    Each rectangle is (row index [B, T], flat positions inside it that are real [M], the rows they belong to [M]).
    """
    done, batch = [], []
    for run in sorted(runs, key=lambda r: r.length):
        if batch and run.length > slack * batch[0].length + 4:
            done.append(_rectangle(batch))
            batch = []
        batch.append(run)
    return [*done, _rectangle(batch)] if batch else done


def _rectangle(runs: Sequence[Run]) -> tuple[Tensor, Tensor, Tensor]:
    offsets = torch.arange(max(r.length for r in runs))
    starts, lengths = torch.tensor([r.start for r in runs])[:, None], torch.tensor([r.length for r in runs])[:, None]
    rows, real = starts + offsets.clamp(max=lengths - 1), offsets < lengths
    return rows, real.flatten().nonzero()[:, 0], rows[real]


def prefix_spans(runs: Sequence[Run]) -> list[tuple[slice, slice]]:
    """(rows of consecutive runs that share a prefix, rows of that prefix)."""
    spans: list[tuple[slice, slice]] = []
    for run in runs:
        if not run.prefix_length or not run.length:
            continue
        if spans and spans[-1][1] == run.prefix_rows and spans[-1][0].stop == run.start:
            spans[-1] = (slice(spans[-1][0].start, run.rows.stop), run.prefix_rows)
        else:
            spans.append((run.rows, run.prefix_rows))
    return spans


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)


def attend_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[B, H, T, K] x [B, H, S, K] -> output [B, H, T, K] and the log-sum-exp of the scores [B, H, T] (fp32).

    `mask` is additive, [B, 1, 1, S]; on CUDA its lines start at multiples of 16 elements. There the memory-efficient
    kernel is called by its name, the one that takes a mask and gives the log-sum-exp (torch's context parallelism
    merges by the same): products written out would round the scores to bf16.
    """
    if q.device.type == "cpu" and q.dtype != torch.float64:
        return _flash(q, k, v, causal=False, mask=None if mask is None else mask.expand(-1, -1, q.shape[2], -1))
    if q.device.type == "cuda" and q.dtype != torch.float64:
        mask = None if mask is None else mask.expand(-1, q.shape[1], q.shape[2], -1)
        o, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)[:2]
        return o, lse[..., : q.shape[2]]  # the kernel pads it to whole warps
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


def _flash_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, lse, 0.0, causal)


def merge_attention(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint key sets from the attention over each: [..., K] and [...] -> the same, fp32."""
    lse = torch.logaddexp(lse1, lse2)
    w1, w2 = (lse1 - lse).exp()[..., None], (lse2 - lse).exp()[..., None]
    return w1 * o1.float() + w2 * o2.float(), lse


def flash_attention(q: Tensor, k: Tensor, v: Tensor, rectangles: list, prefixes: list) -> Tensor:
    """[N, H, K], [N, G, K], [N, G, K] -> [N, H, K]; differentiable."""
    return _FlashAttention.apply(q, k, v, rectangles, prefixes)


class _FlashAttention(torch.autograd.Function):
    """Flash attention of causal rectangles plus the shared prefixes, merged.

    The backward of each part needs only the merged output and log-sum-exp: dS_ij = P_ij (dP_ij - dO_i . O_i) with
    P_ij = exp(S_ij - lse_i), so the kernel's own backward is called part by part and the gradients add up.
    """

    @staticmethod
    def forward(ctx, q_NHK, k_NGK, v_NGK, rectangles, prefixed):
        o = torch.empty_like(q_NHK)
        lse = torch.empty(q_NHK.shape[:2], dtype=torch.float32)  # [N, H]
        for rows, real, flat in rectangles:
            o_BHTK, lse_BHT = _flash(*_gather(q_NHK, k_NGK, v_NGK, rows), causal=True)
            o[flat] = o_BHTK.transpose(1, 2).flatten(0, 1)[real]
            lse[flat] = lse_BHT.transpose(1, 2).flatten(0, 1)[real]
        for span, prefix in prefixed:
            q, k, v = (
                _stack_heads(q_NHK[span], k_NGK.shape[1]),
                _heads_first(k_NGK[prefix]),
                _heads_first(v_NGK[prefix]),
            )
            o_prefix, lse_prefix = _flash(q, k, v, causal=False)
            o_prefix, lse_prefix = (
                _unstack_heads(o_prefix, q_NHK[span]),
                _unstack_heads(lse_prefix[..., None], lse[span][..., None]),
            )
            merged, lse[span] = merge_attention(o[span], lse[span], o_prefix, lse_prefix[..., 0])
            o[span] = merged.to(o.dtype)
        ctx.save_for_backward(q_NHK, k_NGK, v_NGK, o, lse)
        ctx.rectangles, ctx.prefixed = rectangles, prefixed
        return o

    @staticmethod
    def backward(ctx, do):
        q_NHK, k_NGK, v_NGK, o, lse = ctx.saved_tensors
        n_kv, group = k_NGK.shape[1], q_NHK.shape[1] // k_NGK.shape[1]
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q_NHK, k_NGK, v_NGK))
        for rows, real, flat in ctx.rectangles:
            do_rect = torch.zeros(rows.numel(), *do.shape[1:], dtype=do.dtype)  # padding rows send no gradient back
            do_rect[real] = do[flat]
            do_rect = do_rect.view(*rows.shape, *do.shape[1:]).transpose(1, 2)
            o_rect, lse_rect = o[rows].transpose(1, 2), lse[rows].transpose(1, 2).contiguous()
            grads = _flash_backward(do_rect, *_gather(q_NHK, k_NGK, v_NGK, rows), o_rect, lse_rect, True)
            gq, gk, gv = (g.transpose(1, 2).flatten(0, 1)[real] for g in grads)  # [M, H, K]
            dq[flat] = gq.float()
            dk[flat] = gk.float().unflatten(1, (n_kv, group)).sum(2)
            dv[flat] = gv.float().unflatten(1, (n_kv, group)).sum(2)
        for span, prefix in ctx.prefixed:
            q, do_, o_ = (_stack_heads(x[span], n_kv) for x in (q_NHK, do, o))
            lse_ = _stack_heads(lse[span][..., None], n_kv)[..., 0]
            gq, gk, gv = _flash_backward(
                do_, q, _heads_first(k_NGK[prefix]), _heads_first(v_NGK[prefix]), o_, lse_, False
            )
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
    """The query heads that share a key head become more queries of it: [M, H, K] -> [1, G, M * R, K]."""
    return x_MHK.unflatten(1, (n_kv, -1)).transpose(0, 1).flatten(1, 2)[None]


def _unstack_heads(x: Tensor, like_MHK: Tensor) -> Tensor:
    return x[0].unflatten(1, (like_MHK.shape[0], -1)).transpose(0, 1).reshape(like_MHK.shape)
