"""Attention strategies: eager, packed, prefill, cached.

Attention is the only layer in which tokens read other tokens. The model runs on flat token rows [N, D] and takes one of
the strategies below, a callable

    attend(layer, q_NHK, k_NGK, v_NGK) -> o_NHK

so that training, prefill and decoding share one forward pass. A `Layout` (layout.py) lists the sequences in the rows,
and the earlier rows before each of them (the shared prompt of a GRPO group).

    EagerAttention     softmax(q k^T / sqrt(K) + mask) v, written out; the reference implementation; records weights
    PackedAttention    training: causal sequences, each behind its (shared) prefix, without padding
    PrefillAttention   the same over prompts, and keeps their keys and values
    KVCache.attend     textbook decoding: every row owns its keys and values; chunks of any size
    GroupCache.attend  rollouts (group_cache.py): a group reads its prompt's keys once

Departure from the textbook: a response has no mask on the CPU. Its attention over the prompt (all of it is visible) and
over itself (causal) are computed apart and merged by their log-sum-exp, which is exact (flash_cpu.py).

Shape letters: N flat tokens, B rows of a batch, T time, S keys, H query heads, G key-value heads, R = H / G,
K head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.flash_cpu import flash_attention, prefix_spans, rectangles
from model.layout import Layout
from model.torch_private import efficient_varlen

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class EagerAttention:
    """Attention as in the paper (Vaswani et al. 2017, eq. 1), fp32 softmax, quadratic memory.

    With `record=True` the weights of each layer are kept in `weights[layer]`, [H, N, N]. The functions in `on_weights`
    change them first (study/activations.py).
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
        for change in self.on_weights:
            weights = change(weights)
        if self.record:
            self.weights[layer] = weights.detach()
        return torch.einsum("hij,jhk->ihk", weights, v.float()).to(q.dtype)


class PackedAttention:
    """Causal attention of a `Layout` through fused kernels; differentiable.

    On the CPU: torch's flash kernel, once for the causal part of sequences of similar length and once for the prompts
    that groups see. On CUDA: one call for all sequences, by flash attention if the card and the dtype have it, else by
    the memory-efficient kernel. Elsewhere, and in fp64: one call of scaled_dot_product_attention for each sequence.

    On CUDA the kernel is named, and a missing one is an error. torch's own choice would fall back to products that
    hold every score.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self._packed: dict[torch.device, _Packed] = {}

    @cached_property
    def _parts(self) -> tuple[list, list]:
        return rectangles([run for run in self.layout.runs if run.length]), prefix_spans(self.layout.runs)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type == "cpu" and q.dtype != torch.float64:
            return flash_attention(q, k, v, *self._parts)
        if q.device.type == "cuda" and q.dtype != torch.float64 and len(q):
            return self._variable_lengths(q, k, v)
        return attend_each_run(self.layout, q, k, v)

    def _variable_lengths(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keys are gathered as [prefix, own], so a causal mask that is aligned at the bottom right is the right one."""
        if q.device not in self._packed:
            self._packed[q.device] = _pack(self.layout, q.device)
        rows, cu_q, cu_k, max_q, max_k = self._packed[q.device]
        group = q.shape[1] // k.shape[1]
        k, v = (x[rows].repeat_interleave(group, dim=1) for x in (k, v))  # torch 2.11 has no enable_gqa there
        if has_flash(q.dtype, q.shape[2], torch.cuda.get_device_capability(q.device)):
            from torch.nn.attention.varlen import varlen_attn  # imports the compiler: 3 s that only this path needs

            out = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, 0))
            assert isinstance(out, Tensor)  # a pair only if auxiliary results are asked for
            return out
        return efficient_varlen(q, k, v, cu_q, cu_k, max_q, max_k)


def attend_each_run(layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The reference implementation on any device: one scaled_dot_product_attention with a mask for each sequence."""
    out = [q[:0]]
    for run in layout.runs:
        if not run.length:  # a response of one token: it predicts nothing, and fused kernels refuse it
            continue
        mask = torch.ones(run.length, run.prefix_length + run.length, dtype=torch.bool, device=q.device)
        keys, values = (torch.cat([x[run.prefix_rows], x[run.rows]]) for x in (k, v))
        qs, ks, vs = (x.transpose(0, 1)[None] for x in (q[run.rows], keys, values))  # [T, H, K] -> [1, H, T, K]
        o = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask.tril(run.prefix_length), enable_gqa=True)
        out.append(o[0].transpose(0, 1))
    return torch.cat(out)


def has_flash(dtype: torch.dtype, head_size: int, capability: tuple[int, int]) -> bool:
    """True if variable-length flash attention runs on a CUDA card (flash_api.cpp, mha_varlen_fwd)."""
    sixteen_bits = dtype in (torch.float16, torch.bfloat16)
    return sixteen_bits and capability >= (8, 0) and head_size % 8 == 0 and head_size <= 256


def check_cuda_attention(dtype: torch.dtype, head_size: int, capability: tuple[int, int]) -> None:
    """Raise ValueError if no attention kernel of a CUDA card takes this dtype or head size, with the remedy."""
    card = f"this GPU has compute capability {capability[0]}.{capability[1]}"
    if dtype == torch.bfloat16 and capability < (8, 0):
        raise ValueError(f"{card}, and bf16 attention begins with 8.0 (A100, RTX 30); use --dtype fp16 or fp32")
    # kernel_forward.h, kMinimumAlignment: elements that a head's start is a multiple of.
    multiple = 1 if dtype == torch.float32 and capability < (8, 0) else 4
    if head_size % multiple:
        raise ValueError(
            f"attention heads of size {head_size}, but {card}, where kernels take multiples of {multiple}; use "
            "--device cpu"
        )


class _Packed(NamedTuple):
    """A layout as the kernels of variable lengths read it."""

    rows: Tensor  # of the gathered keys and values
    cu_q: Tensor  # int32 cumulative lengths of the queries
    cu_k: Tensor
    max_q: int
    max_k: int


def _pack(layout: Layout, device: torch.device) -> _Packed:
    runs = [run for run in layout.runs if run.length]  # no kernel takes a sequence of length 0
    rows = [torch.arange(span.start, span.stop) for run in runs for span in (run.prefix_rows, run.rows)]
    len_q, len_k = [run.length for run in runs], [run.prefix_length + run.length for run in runs]
    cu_q, cu_k = (F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32) for lengths in (len_q, len_k))
    return _Packed(torch.cat(rows).to(device), cu_q, cu_k, max(len_q), max(len_k))


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

    Contract: the first `lengths[b]` tokens of row b are valid. Later ones are masked and never read.
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
