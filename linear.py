"""Matrix products with a weight: the two fast paths around `F.linear`, each with its slow twin.

Training adds a weight's gradient in place. Autograd's way makes a fresh tensor a micro-batch and adds it: for half a
billion bf16 weights that is gigabytes written and read for nothing. Here the product itself adds (`addmm_`: fp32
inside, one rounding) once a gradient is there. `Linear.accumulate_in_place = False` is the slow twin.

Decoding on a CPU multiplies by weights laid out for its matrix unit beforehand: `with packed_weights(model, rows):`.
Packing happens on entry and is forgotten on exit, so an update can never be missed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x W^T + b. [N, in] -> [N, out]"""

    accumulate_in_place = True
    packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.packed)


class Embedding(nn.Embedding):
    """ids [N] -> rows of the weight [N, D]"""

    def forward(self, ids: Tensor) -> Tensor:
        if Linear.accumulate_in_place and torch.is_grad_enabled() and self.weight.requires_grad:
            return _Embedding.apply(ids, self.weight)
        return F.embedding(ids, self.weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """x W^T + b, by the fast path that fits."""
    if packed is not None and x.ndim == 2:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    if Linear.accumulate_in_place and torch.is_grad_enabled() and weight.requires_grad and x.ndim == 2:
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def add_product(weight: Tensor, dy_NO: Tensor, x_NI: Tensor) -> Tensor | None:
    """The gradient dy^T x [O, I] of a weight: added to the gradient it has, or returned where it has none yet."""
    if weight.is_leaf and weight.grad is not None:
        weight.grad.addmm_(dy_NO.T, x_NI)
        return None
    return dy_NO.T @ x_NI


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x)
        ctx.weight, ctx.has_bias = weight, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = dy @ ctx.weight if ctx.needs_input_grad[0] else None
        d_bias = dy.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return dx, add_product(ctx.weight, dy, x), d_bias


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, dy):
        (ids,) = ctx.saved_tensors
        weight = ctx.weight
        if weight.is_leaf and weight.grad is not None:
            weight.grad.index_add_(0, ids, dy)
            return None, None
        return None, torch.zeros_like(weight).index_add_(0, ids, dy)


@contextmanager
def packed_weights(model: nn.Module, rows: int) -> Iterator[None]:
    """Lay the weights of all `Linear` modules, and of the LM head, out for products with about `rows` rows.

    Only for bf16 weights on a CPU whose oneDNN has bf16 products; elsewhere nothing happens.
    """
    linears = [m for m in model.modules() if type(m) is Linear and can_pack(m.weight)]
    try:
        for module in linears:
            module.packed = torch.ops.mkldnn._reorder_linear_weight(module.weight, rows)
        if can_pack(model.head_weight):
            model.packed_head = torch.ops.mkldnn._reorder_linear_weight(model.head_weight, rows)
        yield
    finally:
        for module in linears:
            module.packed = None
        model.packed_head = None


def can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
