"""Who may look at whom: the one place where tokens meet.

The model runs on flat token rows [N, D] and is handed one of the strategies below, a callable

    attend(layer, q_NHK, k_NGK, v_NGK) -> o_NHK

so that one forward pass serves training, prefill and decoding. A `Layout` (layout.py) says which rows form a
sequence and which earlier rows (the shared prompt of a GRPO group) stand before it.

    EagerAttention     softmax(q k^T / sqrt(K) + mask) v, written out; can record its weights. The slow twin of the rest
    PackedAttention    training: causal sequences, each behind its (shared) prefix, without padding
    PrefillAttention   the same over prompts, and keeps their keys and values
    KVCache.attend     textbook decoding: every row owns its keys and values; chunks of any size
    GroupCache.attend  rollouts (group_cache.py): a group reads its prompt's keys once

Departure from the textbook: a response never meets a mask. Its attention over the prompt (everything visible) and over
itself (causal) are computed apart and merged by their log-sum-exp, which is exact (flash_cpu.py).

Shape letters: N flat tokens, B rows of a batch, T time, S keys, H query heads, G key-value heads, R = H / G,
K head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.flash_cpu import flash_attention, prefix_spans, rectangles
from model.layout import Layout

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class EagerAttention:
    """Attention as in the paper (Vaswani et al. 2017, eq. 1), fp32 softmax, quadratic memory.

    With `record=True` the weights of each layer are kept in `weights[layer]`, [H, N, N]. What stands in `on_weights`
    is applied to them first (trace.py).
    """

    def __init__(self, mask: Tensor, record: bool = False):
        self.mask, self.record = mask, record
        self.weights: dict[int, Tensor] = {}
        self.on_weights: list[Callable[[Tensor], Tensor]] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # [N, G, K] -> [N, H, K]
        scores = torch.einsum("ihk,jhk->hij", q.float(), k.float()) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~self.mask, -torch.inf).softmax(dim=-1)
        weights = weights.masked_fill(~self.mask.any(dim=-1, keepdim=True), 0.0)  # a row that sees nothing: 0, not NaN
        for look in self.on_weights:
            weights = look(weights)
        if self.record:
            self.weights[layer] = weights.detach()
        return torch.einsum("hij,jhk->ihk", weights, v.float()).to(q.dtype)


class PackedAttention:
    """Causal attention of a `Layout` through fused kernels; differentiable.

    On the CPU: torch's flash kernel, once for the causal part of sequences of similar length and once for what each
    group sees of its prompt. On CUDA in 16 bits: one variable-length call a layer. Elsewhere, and in fp32 on CUDA:
    scaled_dot_product_attention a run. On CUDA the kernel is named, and one that is not there is an error: torch's own
    choice would fall back to products that hold every score.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self.rectangles = rectangles([r for r in layout.runs if r.length])
        self.prefixes = prefix_spans(layout.runs)
        self._index: dict[torch.device, tuple] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type == "cpu" and q.dtype != torch.float64:
            return flash_attention(q, k, v, self.rectangles, self.prefixes)
        if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
            return self._varlen(q, k, v)
        return attend_each_run(self.layout, q, k, v)

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One call for all runs: keys are gathered as [prefix, own]; the causal mask is aligned at the bottom right."""
        from torch.nn.attention.varlen import varlen_attn

        if q.device not in self._index:
            check_varlen(q.shape[2], torch.cuda.get_device_capability(q.device))
            self._index[q.device] = _varlen_index(self.layout, q.device)
        rows, cu_q, cu_k, max_q, max_k = self._index[q.device]
        group = q.shape[1] // k.shape[1]
        k, v = (x[rows].repeat_interleave(group, dim=1) for x in (k, v))  # torch 2.11 has no enable_gqa there
        return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, 0))


def attend_each_run(layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The obvious way on any device: one scaled_dot_product_attention a run, with a mask. The slow twin."""
    out = []
    for run in layout.runs:
        mask = torch.ones(run.length, run.prefix_length + run.length, dtype=torch.bool, device=q.device)
        keys, values = (torch.cat([x[run.prefix_rows], x[run.rows]]) for x in (k, v))
        out.append(_sdpa(q[run.rows], keys, values, mask.tril(run.prefix_length)))
    return torch.cat(out)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """[T, H, K], [S, G, K], [S, G, K], [T, S] -> [T, H, K]"""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if q.device.type != "cuda" or q.dtype == torch.float64:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None], enable_gqa=True)[0].transpose(0, 1)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # that kernel knows no shared heads
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None])[0].transpose(0, 1)


def check_varlen(head_size: int, capability: tuple[int, int]) -> None:
    """Raise ValueError where torch's variable-length attention cannot run, with what to do instead."""
    if capability < (8, 0):
        raise ValueError(
            f"this GPU has compute capability {capability[0]}.{capability[1]}, and training in 16 bits needs flash "
            "attention, which begins with 8.0 (A100, RTX 30); train with --dtype fp32"
        )
    if head_size % 8 or head_size > 256:
        raise ValueError(
            f"attention heads of size {head_size}, and flash attention takes multiples of 8 up to 256; train with "
            "--dtype fp32"
        )


def _varlen_index(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Rows of the gathered keys, cumulative lengths of queries and keys, and the longest of each."""
    runs = layout.runs
    rows = [torch.arange(s.start, s.stop) for r in runs for s in (r.prefix_rows, r.rows)]
    len_q, len_k = [r.length for r in runs], [r.prefix_length + r.length for r in runs]
    cu_q, cu_k = (F.pad(torch.tensor(n).cumsum(0), (1, 0)).to(torch.int32) for n in (len_q, len_k))
    return torch.cat(rows).to(device), cu_q.to(device), cu_k.to(device), max(len_q), max(len_k)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding with a cache


class PrefillAttention:
    """Causal attention over packed prompts that keeps every layer's keys and values, [N, G, K], for a cache."""

    def __init__(self, lengths: Sequence[int]):
        self.lengths = list(lengths)
        self.layout = Layout.causal(lengths)
        self.attend = PackedAttention(self.layout)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.append(k)
        self.values.append(v)
        return self.attend(layer, q, k, v)

    def padded(self, flat: list[Tensor], size: int) -> Tensor:
        """Keys or values of all layers as [L, B, G, size, K], zeros behind each prompt."""
        offsets = torch.arange(size)
        lengths = torch.tensor(self.lengths)[:, None]
        starts = lengths.cumsum(0) - lengths
        real = (offsets < lengths).to(flat[0].device)
        rows = (starts + offsets.clamp(max=lengths - 1)).to(flat[0].device)  # [B, size]
        layers = [(x[rows] * real[:, :, None, None]).transpose(1, 2) for x in flat]
        return torch.stack(layers)


class KVCache:
    """Static keys and values of B rows: room for S tokens each, filled from the left.

    Contract: the first `lengths[b]` tokens of row b are valid; what stands behind them is masked, never read.
    Attention writes the new tokens of every layer at `lengths`; the caller moves on once all layers ran (`advance`).
    """

    def __init__(
        self, layers: int, rows: int, size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device="cpu"
    ):
        shape = (layers, rows, kv_heads, size, head_dim)
        self.k, self.v = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)

    @classmethod
    def from_prefill(cls, prefill: PrefillAttention, copies: int, room: int) -> KVCache:
        """A cache whose rows are `copies` of each prompt, one after the other, with room for `room` more tokens."""
        k = prefill.keys[0]
        size = max(prefill.lengths) + room
        cache = cls(len(prefill.keys), 0, size, k.shape[1], k.shape[2], k.dtype, k.device)
        cache.k = prefill.padded(prefill.keys, size).repeat_interleave(copies, dim=1)
        cache.v = prefill.padded(prefill.values, size).repeat_interleave(copies, dim=1)
        cache.lengths = torch.tensor(prefill.lengths, device=k.device).repeat_interleave(copies)
        return cache

    @property
    def size(self) -> int:
        return self.k.shape[3]

    def positions(self, new_tokens: int = 1) -> Tensor:
        """[B, T] positions of the next tokens."""
        return self.lengths[:, None] + torch.arange(new_tokens, device=self.lengths.device)

    def advance(self, new_tokens: int = 1) -> None:
        self.lengths = self.lengths + new_tokens

    def keep(self, rows: Tensor) -> None:
        """Let finished rows leave the batch."""
        self.k, self.v, self.lengths = self.k[:, rows], self.v[:, rows], self.lengths[rows]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each of B rows brings T tokens, flat [B * T], which see the row's cache and, causally, themselves."""
        q, k, v = (x.unflatten(0, (len(self.lengths), -1)).transpose(1, 2) for x in (q, k, v))  # -> [B, H, T, K]
        at = self.positions(q.shape[2])  # [B, T]
        index = at[:, None, :, None].expand_as(k)
        keys, values = self.k[layer].scatter_(2, index, k), self.v[layer].scatter_(2, index, v)
        # scaled_dot_product_attention's is_causal is aligned top-left and would hide the cache: the mask is made here.
        mask = torch.arange(self.size, device=q.device) <= at[:, None, :, None]  # [B, 1, T, S]
        o = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        return o.transpose(1, 2).flatten(0, 1)  # [B, H, T, K] -> [B * T, H, K]
