"""Matrix products with a weight: the two fast paths around `F.linear`, each with its slow twin.

Training adds a weight's gradient in place: `with gradients_in_place():` around forward and backward. Autograd's way
makes a fresh tensor a micro-batch and adds it, which for half a billion bf16 weights is gigabytes written and read for
nothing; here the product itself adds (`addmm_`: fp32 inside, one rounding). Without the context, autograd does it.

Decoding on a CPU multiplies by weights laid out for its matrix unit beforehand: `with packed_weights(model, rows):`.
Packing happens on entry and is forgotten on exit, so an update can never be missed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.memory import return_free_memory

# On a CPU, tensors of megabytes come and go all through a step, and in pages of 4 KiB the kernel hands each of them out
# a quarter of a million times a gigabyte. This asks for pages of 2 MiB (Linux, docs/performance.md); torch looks at it
# when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

RETURN_EVERY = 4  # rollouts; not each, because what follows has to ask for its memory again

_in_place = False
_packings = itertools.count()


@contextmanager
def gradients_in_place(enabled: bool = True) -> Iterator[None]:
    """Backward passes add the gradients of large weights to `.grad` themselves; autograd sees none for them."""
    global _in_place
    before, _in_place = _in_place, enabled
    try:
        yield
    finally:
        _in_place = before


def gradient_in_place(weight: Tensor) -> Tensor | None:
    """Where a backward pass shall add the gradient of `weight`, zeros at first; None: it is autograd's business."""
    if not _in_place or not weight.is_leaf:
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


class Linear(nn.Linear):
    """y = x W^T + b. [N, in] -> [N, out]"""

    packed: Tensor | None = None

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # there, drawing means nothing, and imports the compiler: seconds before every run
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.packed)


class Embedding(nn.Embedding):
    """ids [N] -> rows of the weight [N, D]"""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        if _in_place and self.weight.requires_grad and torch.is_grad_enabled():
            return _Embedding.apply(ids, self.weight)
        return F.embedding(ids, self.weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """x W^T + b, by the fast path that fits."""
    if packed is not None and x.ndim == 2:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    if _in_place and weight.requires_grad and torch.is_grad_enabled() and x.ndim == 2:
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x)
        ctx.weight, ctx.has_bias = weight, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        gradient_in_place(ctx.weight).addmm_(dy.T, x)
        dx = dy @ ctx.weight if ctx.needs_input_grad[0] else None
        return dx, None, dy.sum(0) if ctx.has_bias else None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, dy):
        gradient_in_place(ctx.weight).index_add_(0, ctx.saved_tensors[0], dy)
        return None, None


@contextmanager
def packed_weights(model: nn.Module, rows: int) -> Iterator[None]:
    """Lay the weights of all `Linear` modules, and of the LM head, out for products with about `rows` rows.

    Only for bf16 weights on a CPU whose oneDNN has bf16 products; elsewhere nothing happens.
    """
    if not can_pack(model.head_weight):
        yield
        return
    if next(_packings) % RETURN_EVERY == 0:
        return_free_memory()
    head = model.head_weight  # an untied one is a Linear too, and is packed once
    linears = [m for m in model.modules() if isinstance(m, Linear) and m.weight is not head and can_pack(m.weight)]
    try:
        for module in linears:
            module.packed = torch.ops.mkldnn._reorder_linear_weight(module.weight, rows)
        model.packed_head = torch.ops.mkldnn._reorder_linear_weight(head, rows)
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
