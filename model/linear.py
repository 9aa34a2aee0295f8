"""Matrix products with a weight, and rows of an embedding: fast paths around `F.linear` and `F.embedding`.

Training adds a weight's gradient in place: `with gradients_in_place():` around forward and backward. Autograd makes a
new tensor for each micro-batch and adds it, which for half a billion bf16 weights writes and reads gigabytes. Here the
product itself adds (`addmm_`: fp32 inside, one rounding). Without the context, autograd adds.

Decoding on a CPU multiplies by weights in the layout of its matrix unit: `with packed_weights(model, rows):`. Weights
are packed on entry and the packed copies are dropped on exit, so no update can be missed.

Shape letters: N flat tokens, D hidden.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.memory import return_free_memory
from model.torch_private import has_bf16_products, linear_packed, pack_weight

# On a CPU, tensors of megabytes are allocated and freed all through a step. In pages of 4 KiB the kernel hands out each
# gigabyte in a quarter of a million pieces. This asks for pages of 2 MiB (Linux, docs/performance.md). torch reads it
# when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

RETURN_EVERY = 4  # rollouts; not after each, because the update then has to ask for its memory again

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
    """The tensor to which a backward pass adds the gradient of `weight`, zeros at first. None: autograd adds it."""
    if not _in_place or not weight.is_leaf:
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


class Linear(nn.Linear):
    """y = x W^T + b. [N, in] -> [N, out]"""

    packed: Tensor | None = None

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # random numbers on the meta device import the compiler: seconds before every run
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.packed)


class Embedding(nn.Embedding):
    """ids [N] -> rows of the weight [N, D]"""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        if self.weight.requires_grad and torch.is_grad_enabled() and ids.ndim == 1:
            return _Embedding.apply(ids, self.weight)
        return F.embedding(ids, self.weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """x W^T + b, by the fast path that fits."""
    if packed is not None and x.ndim == 2:
        return linear_packed(x, packed, bias)
    if _in_place and weight.requires_grad and torch.is_grad_enabled() and x.ndim == 2:
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.weight, ctx.has_bias = weight, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        grad = gradient_in_place(ctx.weight)
        assert grad is not None, "backward outside of gradients_in_place(), which was on in the forward pass"
        grad.addmm_(dy.T, x)
        dx = dy @ ctx.weight if ctx.needs_input_grad[0] else None
        return dx, None, dy.sum(0) if ctx.has_bias else None


class _Embedding(torch.autograd.Function):
    """Rows of the weight, whose gradient sums the rows of equal ids in fp32.

    A common token stands in a batch thousands of times. Added up in bf16 one by one, its gradient is off by 2 to 17 %:
    late summands vanish beside the sum. torch's own backward on the CPU does the same.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        in_place = gradient_in_place(ctx.weight)
        grad = torch.zeros_like(ctx.weight) if in_place is None else in_place
        rows, sums = sum_of_equal_ids(ids, dy, len(grad))
        grad.index_add_(0, rows, sums.to(grad.dtype))
        return None, grad if in_place is None else None


def sum_of_equal_ids(ids: Tensor, values: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The values of equal ids, summed in fp32: ids [N], values [N, D] -> ids [N], sums [N, D].

    Each distinct id comes first, with its sum. The rest are arbitrary ids with sum 0. (`torch.unique` would return
    fewer rows, and wait for the device to learn how many.)
    """
    ordered, order = ids.sort()
    first = torch.ones_like(ordered)
    first[1:] = (ordered[1:] != ordered[:-1]).long()
    number = first.cumsum(0) - 1  # of each value's id among the distinct ones
    wide = torch.promote_types(values.dtype, torch.float32)
    sums = torch.zeros(values.shape, dtype=wide, device=values.device).index_add_(0, number, values[order].to(wide))
    # Different ids for the rest: a GPU would add thousands of zeros to one row, one after the other.
    rows = torch.arange(len(ids), device=ids.device) % vocab_size
    return rows.scatter_(0, number, ordered), sums


class ModelWithHead(Protocol):
    """The parts of a language model that are packed."""

    packed_head: Tensor | None

    @property
    def head_weight(self) -> Tensor: ...

    def modules(self) -> Iterator[nn.Module]: ...


@contextmanager
def packed_weights(model: ModelWithHead, rows: int) -> Iterator[None]:
    """Lay the weights of all `Linear` modules, and of the LM head, out for products with about `rows` rows.

    Only for bf16 weights on a CPU with bf16 products. Otherwise it does nothing.
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
            module.packed = pack_weight(module.weight, rows)
        model.packed_head = pack_weight(head, rows)
        yield
    finally:
        for module in linears:
            module.packed = None
        model.packed_head = None


def can_pack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and has_bf16_products()
