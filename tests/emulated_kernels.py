"""Attention kernels of CUDA for the emulated device: the conditions of their sources, and the textbook's numbers.

Every condition below stands in the sources of torch 2.13:

    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp                     scaled_dot_product_attention's choice
    aten/src/ATen/native/transformers/cuda/attention.cu                      both forward operators
    aten/src/ATen/native/transformers/cuda/attention_backward.cu             their backward
    aten/src/ATen/native/transformers/cuda/mem_eff_attention/*.h             alignment
    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp          variable-length flash attention

Stricter than CUDA in one point: a sequence of length 0 is refused everywhere. Some kernels accept it and some do not.

Shape letters: B batch, T queries, S keys, H heads, K head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from emulated_cuda import EmulatedCuda

CAUSAL_FROM_BOTTOM_RIGHT = 2


def require(condition: bool, kernel: str, message: Any) -> None:
    if not condition:
        raise RuntimeError(f"{kernel}: {message}")


# --- memory-efficient attention


def _check_memory_efficient(gpu: EmulatedCuda, kernel: str, q: Tensor, k: Tensor, v: Tensor) -> int:
    """Conditions on [B, T, H, K], [B, S, H, K] and [B, S, H, K]. Returns the elements that a bias is aligned to."""
    types = {torch.float16, torch.float32} | ({torch.bfloat16} if gpu.capability >= (8, 0) else set())
    require(q.dtype in types, kernel, f"{q.dtype} on a card of compute capability {gpu.capability}")
    require(q.dtype == k.dtype == v.dtype, kernel, f"dtypes {q.dtype}, {k.dtype}, {v.dtype}")
    require(q.shape[2] == k.shape[2] == v.shape[2], kernel, "the numbers of heads differ")
    require(q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1] == v.shape[1], kernel, "the shapes differ")
    require(q.shape[3] == k.shape[3], kernel, "the head sizes differ")
    require(0 not in (*q.shape, *k.shape), kernel, f"nothing to attend to: {tuple(q.shape)}, {tuple(k.shape)}")
    require(q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, kernel, "the last dimension is not contiguous")
    require(max(q.shape[0], q.shape[2]) < 65536, kernel, "the grid is too large")
    half = q.dtype.itemsize == 2
    least = 4 if gpu.capability >= (8, 0) or (half and gpu.capability >= (7, 5)) else 2 if half else 1
    for name, x in (("query", q), ("key", k), ("value", v)):
        require(x.data_ptr() % (least * x.itemsize) == 0, kernel, f"the pointer of {name} is not aligned")
        for dim in (1, 2):
            aligned = x.shape[dim] <= 1 or x.stride(dim) % least == 0
            require(aligned, kernel, f"{name} is not correctly aligned: strides {x.stride()}, expected {least}")
    tensor_cores = gpu.capability >= (8, 0) or half
    best = 16 // q.dtype.itemsize if tensor_cores else 4 if gpu.capability >= (8, 0) else 1
    return best if all(x.stride(2) % best == 0 for x in (q, k, v)) else least


def _softmax(scores: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.float()).to(dtype), lse


def scaled_dot_product_efficient(
    gpu: EmulatedCuda, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, compute_lse: bool, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """aten::_scaled_dot_product_efficient_attention, [B, H, T, K]. The log-sum-exp is padded to whole warps."""
    kernel = "_scaled_dot_product_efficient_attention"
    align = _check_memory_efficient(gpu, kernel, *(x.transpose(1, 2) for x in (q, k, v)))
    require(not is_causal and dropout_p == 0, kernel, "not emulated")
    scores = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        require(bias.dtype == q.dtype, kernel, f"invalid dtype for bias: {bias.dtype}")
        require(tuple(bias.shape) == tuple(scores.shape), kernel, f"attn_bias: wrong shape {tuple(bias.shape)}")
        require(bias.stride(-1) == 1, kernel, "attn_bias: the last dimension must be contiguous")
        require(bias.data_ptr() % (align * bias.itemsize) == 0, kernel, "attn_bias_ptr is not correctly aligned")
        for dim in range(3):
            aligned = bias.shape[dim] <= 1 or bias.stride(dim) % align == 0
            require(aligned, kernel, f"attn_bias is not correctly aligned: stride {bias.stride(dim)}, not {align} * n")
        scores = scores + bias.float()
    out, lse = _softmax(scores, v, q.dtype)
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("nan"))
    return out, lse, torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)


def _check_lengths(kernel: str, q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    """Conditions on cumulative lengths. Q and k are [tokens, H, K]."""
    for cu, x, longest in ((cu_q, q, max_q), (cu_k, k, max_k)):
        require(cu.dtype == torch.int32, kernel, f"cumulative lengths are {cu.dtype}, expected int32")
        require(cu.dim() == 1 and cu.is_contiguous(), kernel, "cumulative lengths are no contiguous vector")
        require(int(cu[0]) == 0 and int(cu[-1]) == len(x), kernel, f"cumulative lengths {cu.tolist()}, {len(x)} rows")
        require(bool((cu.diff() > 0).all()), kernel, "a sequence of length 0")
        require(longest == int(cu.diff().max()), kernel, f"the longest has {int(cu.diff().max())}, not {longest}")
    require(len(cu_q) == len(cu_k), kernel, "as many lengths of queries as of keys")


def _sequences(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    q, k = cu_q.tolist(), cu_k.tolist()
    return zip(itertools.starmap(slice, itertools.pairwise(q)), itertools.starmap(slice, itertools.pairwise(k)))


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[T, H, K] and [S, H, K] -> [H, T, S]. Causal masks are aligned at the bottom right."""
    scores = q.float().transpose(0, 1) @ k.float().permute(1, 2, 0) * scale
    seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
    return scores.masked_fill(~seen, -torch.inf) if causal else scores


def _varlen_forward(q, k, v, cu_q, cu_k, causal: bool, scale: float) -> tuple[Tensor, list[Tensor]]:
    out, lses = torch.empty(q.shape, dtype=q.dtype), []
    for rows, keys in _sequences(cu_q, cu_k):
        o, lse = _softmax(_scores(q[rows], k[keys], causal, scale), v[keys].transpose(0, 1), q.dtype)
        out[rows] = o.transpose(0, 1)
        lses.append(lse)
    return out, lses


def _varlen_backward(do, q, k, v, out, lses: list[Tensor], cu_q, cu_k, causal: bool, scale: float) -> list[Tensor]:
    grads = [torch.zeros(x.shape) for x in (q, k, v)]
    for (rows, keys), lse in zip(_sequences(cu_q, cu_k), lses, strict=True):
        p = (_scores(q[rows], k[keys], causal, scale) - lse[..., None]).exp()  # [H, T, S]
        q_, do_, o_ = (x[rows].float().transpose(0, 1) for x in (q, do, out))
        k_, v_ = (x[keys].float().transpose(0, 1) for x in (k, v))
        ds = p * (do_ @ v_.mT - (do_ * o_).sum(-1, keepdim=True)) * scale
        for grad, at, value in zip(grads, (rows, keys, keys), (ds @ k_, ds.mT @ q_, p.mT @ do_), strict=True):
            grad[at] += value.transpose(0, 1)
    return [grad.to(q.dtype) for grad in grads]


def efficient_forward(
    gpu: EmulatedCuda, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cu_q: Tensor, cu_k: Tensor, max_q: int,
    max_k: int, dropout_p: float, mask_type: int, compute_lse: bool = False, *, scale: float | None = None,
    seqlen_k: Tensor | None = None, window_size: int | None = None,
) -> tuple:  # fmt: skip
    """aten::_efficient_attention_forward with cumulative lengths, [1, tokens, H, K]."""
    kernel = "_efficient_attention_forward"
    _check_memory_efficient(gpu, kernel, q, k, v)
    require(cu_q is not None and cu_k is not None, kernel, "emulated with cumulative lengths only")
    require(bias is None, kernel, "cu seqlen + bias not supported")
    require(len(q) == 1, kernel, "cu_seqlen only supports batch_size=1")
    require(mask_type in (0, CAUSAL_FROM_BOTTOM_RIGHT) and dropout_p == 0, kernel, "not emulated")
    _check_lengths(kernel, q[0], k[0], cu_q, cu_k, max_q, max_k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lses = _varlen_forward(q[0], k[0], v[0], cu_q, cu_k, mask_type == CAUSAL_FROM_BOTTOM_RIGHT, scale)
    padded = torch.full((len(lses), q.shape[2], -(-max_q // 32) * 32 if compute_lse else 0), float("nan"))
    for i, lse in enumerate(lses if compute_lse else []):
        padded[i, :, : lse.shape[1]] = lse
    return out[None], padded, torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long), max_q, max_k


def efficient_backward(
    gpu: EmulatedCuda, do: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, cu_q: Tensor,
    cu_k: Tensor, max_q: int, max_k: int, lse: Tensor, dropout_p: float, seed: Tensor, offset: Tensor, mask_type: int,
    bias_requires_grad: bool, *, scale: float | None = None, num_splits_key: int | None = None,
    window_size: int | None = None, shared_storage_dqdkdv: bool = False,
) -> tuple:  # fmt: skip
    kernel = "_efficient_attention_backward"
    _check_memory_efficient(gpu, kernel, q, k, v)
    require(do.dtype == q.dtype, kernel, f"the gradient is {do.dtype}, the query {q.dtype}")
    require(lse.shape[2] > 0, kernel, "the forward pass kept no log-sum-exp")
    _check_lengths(kernel, q[0], k[0], cu_q, cu_k, max_q, max_k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lses = [lse[i, :, : rows.stop - rows.start] for i, (rows, _) in enumerate(_sequences(cu_q, cu_k))]
    causal = mask_type == CAUSAL_FROM_BOTTOM_RIGHT
    grads = _varlen_backward(do[0], q[0], k[0], v[0], out[0], lses, cu_q, cu_k, causal, scale)
    return (*(grad[None] for grad in grads), torch.empty(0))


# --- flash attention with cumulative lengths


def _check_flash(gpu: EmulatedCuda, q: Tensor, k: Tensor, v: Tensor) -> None:
    kernel = "varlen_attn"
    require(gpu.capability >= (8, 0), kernel, "FlashAttention only supports Ampere GPUs or newer.")
    require(q.dtype in (torch.float16, torch.bfloat16), kernel, "FlashAttention only supports fp16 and bf16 data type")
    require(q.dtype == k.dtype == v.dtype, kernel, "query and key must have the same dtype")
    require(q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, kernel, "the last dimension is not contiguous")
    require(q.shape[-1] % 8 == 0, kernel, "head_size should be a multiple of 8")
    require(q.shape[-1] <= 256, kernel, "FlashAttention forward only supports head dimension at most 256")
    require(q.shape[1] % k.shape[1] == 0, kernel, "heads of keys must divide heads of queries")


def varlen(
    gpu: EmulatedCuda, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, scale: float | None = None, window_size: list[int] | None = None, *more: Any,
) -> tuple:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn, [tokens, H, K]."""
    _check_flash(gpu, q, k, v)
    _check_lengths("varlen_attn", q, k, cu_q, cu_k, max_q, max_k)
    require(q.shape[1] == k.shape[1] and is_causal and not any(more), "varlen_attn", "not emulated")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lses = _varlen_forward(q, k, v, cu_q, cu_k, is_causal, scale)
    return out, torch.cat(lses, dim=1), torch.zeros(2, dtype=torch.uint64)


def varlen_backward(
    gpu: EmulatedCuda, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor,
    cu_k: Tensor, max_q: int, max_k: int, is_causal: bool, rng_state: Tensor, scale: float | None = None, *more: Any,
) -> tuple:  # fmt: skip
    _check_flash(gpu, q, k, v)
    require(do.dtype == q.dtype, "varlen_attn", f"the gradient is {do.dtype}, the query {q.dtype}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lses = [lse[:, rows] for rows, _ in _sequences(cu_q, cu_k)]
    return tuple(_varlen_backward(do, q, k, v, out, lses, cu_q, cu_k, is_causal, scale))


# --- the public function


def scaled_dot_product_attention(
    gpu: EmulatedCuda, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.scaled_dot_product_attention on device tensors, differentiable."""
    kernel = "scaled_dot_product_attention"
    require(q.device == k.device == v.device, kernel, f"devices {q.device}, {k.device}, {v.device}")
    require(attn_mask is None or attn_mask.device == q.device, kernel, "the mask is on another device")
    require(not is_causal and dropout_p == 0, kernel, "not emulated")
    only_efficient = torch.backends.cuda.mem_efficient_sdp_enabled() and not torch.backends.cuda.math_sdp_enabled()
    if only_efficient:
        no_kernel = "No available kernel. Aborting execution."
        require(not enable_gqa, kernel, f"{no_kernel} Memory efficient attention knows no enable_gqa")
        empty = 0 in (q.shape[-2], k.shape[-2])
        require(not empty, kernel, f"{no_kernel} All sequences must have a length: {tuple(q.shape)} at {gpu.where()}")
        require(q.dtype != torch.bfloat16 or gpu.capability >= (8, 0), kernel, f"{no_kernel} bf16 needs sm80")
        align = 16 // q.dtype.itemsize if q.dtype.itemsize == 2 or gpu.capability >= (8, 0) else 1
        require(q.shape[-1] % align == 0, kernel, f"{no_kernel} The head size {q.shape[-1]} is no multiple of {align}")
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3) for x in (k, v))
    scores = (q.float() @ k.float().mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if boolean else scores + attn_mask
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


KERNELS = {
    "aten._scaled_dot_product_efficient_attention.default": scaled_dot_product_efficient,
    "aten._efficient_attention_forward.default": efficient_forward,
    "aten._efficient_attention_backward.default": efficient_backward,
    "torch_attn._varlen_attn.default": varlen,
    "torch_attn._varlen_attn_backward.default": varlen_backward,
}
