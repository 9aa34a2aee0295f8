"""Tensors of the emulated CUDA device, and the copies between it and the host (emulated_cuda.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated_kernels as kernels
import torch
import torch.nn.functional as F
from emulated_streams import Memory, Stream, active, unobserved
from torch.overrides import TorchFunctionMode


class CudaTensor(torch.Tensor):
    """A tensor of the emulated device: `host` holds the numbers, `memory` the accesses and the size."""

    host: torch.Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, inner: torch.Tensor, memory: Memory):
        with torch.inference_mode(False):  # else a view of a tensor from outside would be an inference tensor
            out = torch.Tensor._make_wrapper_subclass(
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                layout=inner.layout, device=inner.device, requires_grad=False,
            )  # fmt: skip
        out.host, out.memory = inner, memory
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: torch.device(self.memory.device.kind, 0))
    is_cuda = property(lambda self: self.device.type == "cuda")
    is_mps = property(lambda self: self.device.type == "mps")
    is_cpu = property(lambda self: False)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"

    @property
    def grad(self) -> torch.Tensor | None:
        return torch.Tensor.grad.__get__(self)  # type: ignore[union-attr]

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        if value is not None and not isinstance(value, CudaTensor):
            raise RuntimeError("assigned grad has data located on a different device")
        torch.Tensor.grad.__set__(self, value)  # type: ignore[union-attr]

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        self.memory.recorded.add(stream)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return active().run(func, args, kwargs or {})


def tree_map(function: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """Apply `function` to every tensor of nested lists, tuples and dictionaries (torch's own is 5 times slower)."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)([tree_map(function, x) for x in tree])
    return {key: tree_map(function, x) for key, x in tree.items()} if isinstance(tree, dict) else tree


def tensors_in(tree: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree_map(found.append, tree)
    return found


def unwrap(tree: Any) -> Any:
    return tree_map(lambda x: x.host if isinstance(x, CudaTensor) else x, tree)


# ---------------------------------------------------------------------------------------------------------------------
# From one device to the other


def is_emulated(device: Any) -> bool:
    return isinstance(device, (str, torch.device, int)) and torch.device(device).type == active().kind


def to_device(x: torch.Tensor) -> CudaTensor:
    """The host tensor itself, from now on a device tensor."""
    return CudaTensor(x, active().block(x))


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, there, non_blocking):
        ctx.back = not there
        device = active()
        with unobserved():
            out = torch.empty_like(unwrap(x))
        if there:
            out = to_device(out)
        device.run(torch.ops.aten.copy_.default, (out, x.detach()), {"non_blocking": non_blocking})
        return out

    @staticmethod
    def backward(ctx, grad):
        return _Move.apply(grad, ctx.back, False), None, None


def move(x: torch.Tensor, there: bool, non_blocking: bool = False) -> torch.Tensor:
    return x if isinstance(x, CudaTensor) == there else _Move.apply(x, there, non_blocking)


HANDLED = {
    "scaled_dot_product_attention", "tensor", "as_tensor", "asarray", "cpu", "cuda", "mps", "tolist", "numpy",
    "__array__", "pin_memory", "is_pinned", "to",
}  # fmt: skip


class Moves(TorchFunctionMode):
    """Copies between devices and calls that ask for a device. They would fail on the C++ side."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name not in HANDLED:  # shapes, properties and operators: most calls
            return func(*args, **(kwargs or {}))
        kwargs, first = dict(kwargs or {}), args[0] if args else None
        if func is F.scaled_dot_product_attention and isinstance(first, CudaTensor):
            return kernels.scaled_dot_product_attention(active(), *args, **kwargs)
        if name in ("tensor", "as_tensor", "asarray") and is_emulated(kwargs.get("device")):
            del kwargs["device"]
            return move(func(*args, **kwargs), True)
        if not isinstance(first, torch.Tensor):
            return func(*args, **kwargs)
        if name in ("cpu", "cuda", "mps"):
            return move(first, name != "cpu")
        if name == "tolist":
            return move(first, False).tolist()
        if name in ("numpy", "__array__") and isinstance(first, CudaTensor):
            raise TypeError(f"can't convert {first.device} device type tensor to numpy. Use Tensor.cpu() first")
        if name == "pin_memory":
            return active().pin(first.clone())
        if name == "is_pinned":
            return active().pinned_block(first) is not None
        if name == "to":
            return self._to(func, first, list(args[1:]), kwargs)
        return func(*args, **kwargs)

    def _to(self, func, x, rest, kwargs):
        """x.to(device, dtype, non_blocking, copy), x.to(dtype) and x.to(other)"""
        there = isinstance(x, CudaTensor)
        if rest and isinstance(rest[0], torch.Tensor):
            like = rest.pop(0)
            there, rest = isinstance(like, CudaTensor), [like.dtype, *rest]
        elif rest and isinstance(rest[0], (str, torch.device)):
            there = is_emulated(rest.pop(0))
        if (given := kwargs.pop("device", None)) is not None:
            there = is_emulated(given)
        dtypes = [kwargs.pop("dtype", None), *(r for r in rest if isinstance(r, torch.dtype))]
        dtype = next((d for d in dtypes if d is not None), x.dtype)
        moves = there != isinstance(x, CudaTensor)
        if kwargs.get("copy") and moves:
            del kwargs["copy"]  # the move is a copy
        y = func(x, dtype, **{key: value for key, value in kwargs.items() if key != "non_blocking"})
        return move(y, there, kwargs.get("non_blocking", False))
