"""Every operator of torch that its documentation does not list, in one place.

These calls may change with any release of torch. Each has a test (tests/model/test_torch_private.py) that compares it
with public operators, so a change fails there and not in a user's run. The public operators would do: they are slower,
need more memory, or do not return the log-sum-exp.

    flash_cpu, flash_cpu_backward   attention on the CPU that returns its log-sum-exp
    efficient_attention             the same on CUDA: scaled_dot_product_attention returns the output only
    efficient_varlen                attention over sequences of different lengths on CUDA, for every dtype and card
    fused_adamw_                    one AdamW update of flat tensors in one pass over memory
    pack_weight, linear_packed      products with a bf16 weight in the layout of the CPU's matrix unit
    has_bf16_products               whether the CPU has instructions for such products

Shape letters: N flat tokens, B batch, T queries, S keys, H heads, K head size.
"""

from __future__ import annotations

import os
import platform

import torch
from torch import Tensor, _fused_adamw_

CAUSAL_FROM_BOTTOM_RIGHT = 2  # kernel_forward.h: the last query sees the last key


def flash_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[B, H, T, K], [B, H, S, K] -> output [B, H, T, K] and log-sum-exp of the scores [B, H, T], fp32.

    `mask` is added to the scores. A causal mask is aligned at the top left.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)


def flash_cpu_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the output's, by the output and log-sum-exp of all keys (also of other calls)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, lse, 0.0, causal)


def efficient_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`flash_cpu` without a causal mask on CUDA, by the memory-efficient kernel.

    The lines of `mask` start at multiples of 16 bytes, and its shape is [B, H, T, S].
    """
    o, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)[:2]
    return o, lse[..., : q.shape[2]]  # the kernel pads it to whole warps


def efficient_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> Tensor:  # fmt: skip
    """Causal attention of sequences end to end, [N, H, K] -> [N, H, K], differentiable. q, k and v have as many heads.

    cu_q, cu_k: int32 cumulative lengths of queries and keys, from 0. The last query of a sequence sees its last key.
    """
    batch_of_one = (x[None] for x in (q, k, v))
    return torch.ops.aten._efficient_attention_forward(
        *batch_of_one, None, cu_q, cu_k, max_q, max_k, 0.0, CAUSAL_FROM_BOTTOM_RIGHT, True
    )[0][0]


def fused_adamw_(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor | None, step: Tensor,
    *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """`optimizer.adamw_` in one kernel. All tensors are fp32 and on one device, `step` too."""
    maxima = [] if max_exp_avg_sq is None else [max_exp_avg_sq]
    _fused_adamw_(
        [weight], [grad], [exp_avg], [exp_avg_sq], maxima, [step], lr=lr, beta1=betas[0], beta2=betas[1],
        weight_decay=weight_decay, eps=eps, amsgrad=max_exp_avg_sq is not None, maximize=False,
    )  # fmt: skip


def pack_weight(weight: Tensor, rows: int) -> Tensor:
    """A bf16 weight [out, in] in oneDNN's layout for products with about `rows` rows. Opaque: only `linear_packed`
    reads it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def linear_packed(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, [rows, in] -> [rows, out]."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def has_bf16_products() -> bool:
    """True if oneDNN is there and the CPU has instructions for bf16 products (AVX-512 BF16, AMX, Arm's BF16).

    oneDNN itself also says yes for AVX-512 without them. There it converts to fp32 and back, and a product takes four
    times as long as in fp32. ONEDNN_MAX_CPU_ISA hides instructions from oneDNN.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # on Arm, oneDNN looks for the instructions
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    hidden = cap.startswith(("SSE", "AVX2")) or cap in ("AVX", "AVX512_CORE", "AVX512_CORE_VNNI")
    return not hidden and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
