"""AdamW with fp32 master weights and moments, in host memory or on the device.

A bf16 weight of 0.02 has its neighbours 1e-4 away, so an update of 1e-6 added to it is lost. Every parameter that is
not fp32 therefore has an fp32 master. With `place="host"` masters and moments live in host memory: gradients go down,
rounded weights come up, and the accelerator is spared 12 bytes a parameter. With `place="device"` they live beside the
parameter. The numbers are equal.

    optimizer = MemoryEfficientAdamW(model.parameters(), lr=1e-6)
    loss.backward(); optimizer.step()

The numbers are those of `torch.optim.AdamW` run on the masters (Loshchilov & Hutter 2019, algorithm 2; AMSGrad:
Reddi et al. 2018).

Departure from the textbook: a step walks slices that fit the processor's cache, so that cast, update and rounding of a
slice read main memory once. Between a CUDA device and the host, slices travel through a ring of pinned memory while
earlier slices are computed (`_Ring`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from model.torch_private import fused_adamw_

SLICE = 2**20  # elements; master, two moments and gradient in fp32 are 16 MB: they stay in the caches of two cores
DEVICE_SLICE = 2**24  # on an accelerator a slice only bounds the fp32 copy of its gradient
SLOTS = 32  # of the ring; for 16-bit weights 64 MiB of pinned memory
STATE_NAMES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")
Place = Literal["host", "device"]


def adamw_(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor | None, step: float,
    *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """One AdamW update in place, written out. Epsilon comes after the bias correction (Kingma & Ba 2015, alg. 1)."""
    beta1, beta2 = betas
    weight.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
        second = max_exp_avg_sq
    denominator = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    weight.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


class MemoryEfficientAdamW(torch.optim.Optimizer):
    """AdamW for parameters of any dtype on any device, with fp32 state.

    Args:
        params: parameters, or groups of them as torch's optimizers take.
        place: "host" keeps the state in host memory, "device" beside each parameter.
        fused: compute a slice by torch's fused kernel instead of `adamw_`; equal up to rounding.

    State of a parameter: `step`, `exp_avg`, `exp_avg_sq`, with AMSGrad `max_exp_avg_sq`, and `master`. An fp32
    parameter at the state's place is its own master. Raises ValueError for settings out of range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        place: Place = "host",
        fused: bool = True,
    ):
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}: "
                "expected none below 0, and both betas below 1"
            )
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        )
        self.place, self.fused = place, fused
        self._rings: dict[tuple[torch.device, torch.dtype], _Ring] = {}
        self._scratch = torch.empty(0)

    @torch.no_grad()
    def step(self, closure=None, *, gradient_factor: float = 1.0):
        """Update every parameter that has a gradient.

        gradient_factor: every gradient is multiplied by it, in fp32. A loss scale is undone here and not in the
            gradient's own dtype, where small values would become 0.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        travelling = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                self._initialise(p, group["amsgrad"])
                self.state[p]["step"] += 1
                parts = _Parts.of(group, p, self.state[p])
                if p.device.type == "cuda" and self.place == "host":
                    travelling[p.device, p.dtype].append(parts)
                else:
                    self._update_beside(parts, gradient_factor)
        for (device, dtype), all_parts in travelling.items():
            self._update_through_ring(device, dtype, all_parts, gradient_factor)
        return loss

    def _state_device(self, p: Tensor) -> torch.device:
        return p.device if self.place == "device" else torch.device("cpu")

    def _is_own_master(self, p: Tensor) -> bool:
        return p.device == self._state_device(p) and p.dtype == torch.float32 and p.is_contiguous()

    def _initialise(self, p: Tensor, amsgrad: bool) -> None:
        state = self.state[p]
        if state:
            return
        place = self._state_device(p)
        state["step"] = torch.tensor(0.0)
        for name in STATE_NAMES[: 3 if amsgrad else 2]:
            state[name] = torch.zeros(p.shape, dtype=torch.float32, device=place)
        if not self._is_own_master(p):
            state["master"] = p.detach().to(place, torch.float32, copy=True).contiguous()

    def _update_beside(self, parts: _Parts, factor: float) -> None:
        """Update a parameter whose gradient needs no pinned memory on its way to the state."""
        place = self._state_device(parts.p)
        for part in parts.cut(SLICE if place.type == "cpu" else DEVICE_SLICE):
            self._update(parts, part, parts.grad[part].to(place), factor)
            if parts.rounded is not None:
                parts.rounded[part].copy_(parts.weight[part])
        parts.finish()

    def _update_through_ring(
        self, device: torch.device, dtype: torch.dtype, all_parts: list[_Parts], factor: float
    ) -> None:
        """Update parameters on a CUDA device whose state is on the host: gradients come down, weights go up."""
        trips = [(parts, part) for parts in all_parts for part in parts.cut(SLICE)]
        if not trips:
            return
        ring = self._ring(device, dtype, len(trips), max(len(parts.grad[part]) for parts, part in trips))
        ring.begin()
        for i, (parts, part) in enumerate(trips[: ring.size]):
            ring.fetch(i, parts.grad[part])
        for i, (parts, part) in enumerate(trips):
            slot = ring.wait(i)[: len(parts.grad[part])]
            self._update(parts, part, slot, factor)
            slot.copy_(parts.weight[part])
            ring.send(i, parts.flat_parameter()[part])
            if i + ring.size < len(trips):
                later, its_part = trips[i + ring.size]
                ring.fetch(i + ring.size, later.grad[its_part])
        ring.finish()
        for parts in all_parts:
            parts.finish()

    def _ring(self, device: torch.device, dtype: torch.dtype, trips: int, elements: int) -> _Ring:
        ring = self._rings.get((device, dtype))
        if ring is None or ring.slots.shape[1] < elements or ring.size < min(SLOTS, trips):
            ring = self._rings[device, dtype] = _Ring(device, dtype, min(SLOTS, trips), elements)
        return ring

    def _update(self, parts: _Parts, part: slice, grad: Tensor, factor: float) -> None:
        """AdamW on some elements of a parameter; their gradient is flat and at the state's place."""
        group, state = parts.group, parts.state
        first, second = (state[name].view(-1)[part] for name in STATE_NAMES[:2])
        largest = state["max_exp_avg_sq"].view(-1)[part] if group["amsgrad"] else None
        settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        weight, grad, step = parts.weight[part], self._as_fp32(grad, factor), state["step"]
        if not self.fused:
            adamw_(weight, grad, first, second, largest, step.item(), **settings)
            return
        if grad.device.type != "cpu":
            step = torch.full((), step.item(), device=grad.device)  # no copy from the host, which would wait
        fused_adamw_(weight, grad, first, second, largest, step, **settings)

    def _as_fp32(self, grad: Tensor, factor: float) -> Tensor:
        """The gradient in fp32, times `factor`. The parameter's own gradient is never written."""
        if grad.dtype == torch.float32 and factor == 1.0:
            return grad
        if grad.device.type != "cpu":
            return grad.float() * factor
        if self._scratch.numel() < len(grad):
            self._scratch = torch.empty(max(SLICE, len(grad)))
        return self._scratch[: len(grad)].copy_(grad).mul_(factor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a `state_dict()` back, in fp32 at this optimizer's place, whatever place it was saved from.

        torch's own would cast it to the parameter's dtype and device. Raises ValueError if groups or shapes do not
        match.
        """
        groups = state_dict["param_groups"]
        found, expected = [len(g["params"]) for g in groups], [len(g["params"]) for g in self.param_groups]
        if found != expected:
            raise ValueError(f"optimizer state has groups of {found} parameters, the model has {expected}")
        self.state.clear()
        for saved, group in zip(groups, self.param_groups):
            group.update({key: value for key, value in saved.items() if key != "params"})
            for index, p in zip(saved["params"], group["params"]):
                if index in state_dict["state"]:
                    self.state[p] = self._checked(state_dict["state"][index], p, index)

    @torch.no_grad()
    def _checked(self, saved: dict[str, Any], p: Tensor, index: int) -> dict[str, Any]:
        for name in STATE_NAMES:
            if name in saved and saved[name].shape != p.shape:
                raise ValueError(
                    f"optimizer state {index}.{name} has shape {tuple(saved[name].shape)}, expected {tuple(p.shape)}"
                )
        place = self._state_device(p)
        state = {name: saved[name].to(place, torch.float32, copy=True) for name in STATE_NAMES if name in saved}
        state["step"] = torch.as_tensor(saved["step"], dtype=torch.float32).clone()
        if self._is_own_master(p):
            if "master" in state:
                p.copy_(state.pop("master"))
        elif "master" not in state:
            state["master"] = p.detach().to(place, torch.float32, copy=True).contiguous()
        return state

    def state_bytes(self, device_type: str = "cpu") -> int:
        """Bytes of optimizer state on devices of this type; "cpu" is host memory."""
        tensors = [t for state in self.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in tensors if t.device.type == device_type)

    def pinned_bytes(self) -> int:
        """Bytes of pinned host memory in use, after the first step."""
        return sum(ring.slots.nbytes for ring in self._rings.values())


def pinned_bytes_of(params: Iterable[Tensor]) -> int:
    """Bytes of pinned host memory that a step takes if the state is on the host. torch rounds up to a power of two."""
    total, of_dtype = 0, defaultdict(list)
    for p in params:
        of_dtype[p.dtype].append(p.numel())
    for dtype, sizes in of_dtype.items():
        trips, elements = sum(-(-size // SLICE) for size in sizes), min(SLICE, max(sizes))
        needed = min(SLOTS, trips) * elements * dtype.itemsize
        total += 1 << max(0, needed - 1).bit_length()
    return total


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Joint norm of all gradients, in fp32: a norm in 16 bits has 3 digits, and overflows in fp16."""
    norms = [
        torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float32))
        for gradient in gradients
        for part in gradient.reshape(-1).split(DEVICE_SLICE)  # the CPU makes an fp32 copy of each part
    ]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def learning_rate(
    step: int,
    lr: float,
    schedule: str = "constant",
    warmup_steps: int = 0,
    total_steps: int = 1,
    min_ratio: float = 0.0,
) -> float:
    """Learning rate of step 1, 2, ...: rises linearly over `warmup_steps`, then stays, or falls along half a cosine
    (Loshchilov & Hutter 2017, eq. 5) to `min_ratio * lr`. The first
    step after the warm-up has the full rate, and the last one is one step before the end of the cosine: it still
    learns."""
    if step <= warmup_steps:
        return lr * step / warmup_steps
    if schedule == "constant":
        return lr
    progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    return lr * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)


class _Parts(NamedTuple):
    """A parameter seen as flat tensors, which a step walks in parts."""

    group: dict[str, Any]
    p: Tensor
    state: dict[str, Any]
    weight: Tensor  # the fp32 master
    grad: Tensor
    rounded: Tensor | None  # takes the rounded weights; None: the parameter is its own master

    @classmethod
    def of(cls, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> _Parts:
        rounded = None
        if "master" in state:
            # A flat view of a transposed parameter does not exist: its weights are collected, and copied at the end.
            rounded = p.view(-1) if p.is_contiguous() else torch.empty(p.numel(), dtype=p.dtype, device=p.device)
        assert p.grad is not None
        return cls(group, p, state, state.get("master", p).view(-1), p.grad.reshape(-1), rounded)

    def flat_parameter(self) -> Tensor:
        return self.weight if self.rounded is None else self.rounded

    def cut(self, size: int) -> Iterator[slice]:
        return (slice(start, start + size) for start in range(0, len(self.grad), size))

    def finish(self) -> None:
        if self.rounded is not None and not self.p.is_contiguous():
            self.p.copy_(self.rounded.view(self.p.shape))


class _Ring:
    """Slots of pinned memory in which gradients come to the host and rounded weights go back to a CUDA device.

    Trip i uses slot i modulo the number of slots. All copies run on one side stream in the order in which they were
    queued, and trip i + size is fetched after the weights of trip i were sent. So a slot is never overwritten while a
    copy reads it, and the event of a gradient's arrival also says that the slot's earlier weights have left.

    One slot serves gradient and weights in turn, and the number of slots does not grow with the model. (A buffer for
    each parameter costs 3.5 GiB at 0.5B parameters, because torch rounds each up to a power of two.)
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int, elements: int):
        self.device, self.size, self.stream = device, size, torch.cuda.Stream(device)
        self.slots = torch.empty(size, elements, dtype=dtype, pin_memory=True)
        self.arrivals = [torch.cuda.Event() for _ in range(size)]

    def begin(self) -> None:
        """The copies of this step come after the backward pass, which the current stream may still be running."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def fetch(self, trip: int, grad: Tensor) -> None:
        """Queue the copy of a gradient to the host."""
        slot = trip % self.size
        with torch.cuda.stream(self.stream):
            self.slots[slot, : len(grad)].copy_(grad, non_blocking=True)
            self.arrivals[slot].record(self.stream)

    def wait(self, trip: int) -> Tensor:
        """The slot of a trip, after its gradient has arrived."""
        slot = trip % self.size
        self.arrivals[slot].synchronize()
        return self.slots[slot]

    def send(self, trip: int, weight: Tensor) -> None:
        """Queue the copy of a slot's rounded weights to the device."""
        with torch.cuda.stream(self.stream):
            weight.copy_(self.slots[trip % self.size, : len(weight)], non_blocking=True)

    def finish(self) -> None:
        """The next work of the current stream sees the new weights, and may free the gradients."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
