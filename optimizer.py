"""AdamW with its state on the CPU: fp32 master weights and moments never leave host memory.

A bf16 weight of 0.02 has its neighbours 1e-4 away: an update of 1e-6 added to it is lost whole. So every parameter
that is not fp32 has an fp32 master here; gradients go down, rounded weights come up, and on a 0.5B model the
accelerator is spared 6 GB of state. A parameter that is fp32 and lives on the CPU is its own master.

    optimizer = MemoryEfficientAdamW(model.parameters(), lr=1e-6)
    loss.backward(); optimizer.step()

The numbers are those of `torch.optim.AdamW` run on the masters (Loshchilov & Hutter 2019, algorithm 2; AMSGrad:
Reddi et al. 2018). `enabled=False` is the plain AdamW beside it: state next to the parameter, in its dtype.

Departure from the textbook: a step walks flat slices that fit the processor's cache, so that cast, update and rounding
of a slice read main memory once. On CUDA all gradient copies are queued on a side stream before the first is waited
for, and weights return on the same stream while the next slice is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

SLICE = (
    2**20
)  # elements: master, two moments and gradient in fp32 are 16 MB, and the arithmetic runs in both cores' caches
STATE_NAMES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")


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
    """AdamW for parameters of any dtype on any device, with fp32 state on the CPU.

    Args:
        params: parameters, or groups of them as torch's optimizers take.
        enabled: False keeps moments beside the parameter in its dtype, as `torch.optim.AdamW` does.
        fused: do the arithmetic of a slice by torch's fused CPU kernel instead of `adamw_`; the same to rounding.

    State of a parameter: `step`, `exp_avg`, `exp_avg_sq`, with AMSGrad `max_exp_avg_sq`, and `master` where the
    parameter is not its own. Raises ValueError for settings out of range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        enabled: bool = True,
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
        self.enabled, self.fused = enabled, fused
        self._transfers: dict[torch.device, _Transfer] = {}
        self._scratch = torch.empty(0)

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group, p in work:
            self._initialise(p, group["amsgrad"])
            self.state[p]["step"] += 1
        if self.enabled:
            self._step_on_cpu(work)
        else:
            for group, p in work:
                self._update(group, self.state[p], p, p.grad, slice(None), self.state[p]["step"], fused=False)
        return loss

    def _initialise(self, p: Tensor, amsgrad: bool) -> None:
        state = self.state[p]
        if state:
            return
        like = torch.empty(p.shape, dtype=torch.float32) if self.enabled else p
        state["step"] = torch.tensor(0.0)
        for name in STATE_NAMES[: 3 if amsgrad else 2]:
            state[name] = torch.zeros_like(like, memory_format=torch.contiguous_format)
        if self.enabled and not _is_own_master(p):
            state["master"] = p.detach().to("cpu", torch.float32, copy=True).contiguous()

    def _step_on_cpu(self, work: list[tuple[dict, Tensor]]) -> None:
        for _, p in work:
            if p.device.type == "cuda":
                self._transfer(p.device).fetch(p)
        for group, p in work:
            state = self.state[p]
            grad = self._transfer(p.device).wait(p) if p.device.type == "cuda" else p.grad.cpu()
            grad, weight = grad.reshape(-1), state.get("master", p).view(-1)
            rounded = self._rounded(p)
            for start in range(0, len(grad), SLICE):
                part = slice(start, start + SLICE)
                grad_part = self._as_fp32(grad[part])
                self._update(group, state, weight, grad_part, part, state["step"], self.fused)
                if rounded is not None:
                    rounded[part].copy_(weight[part])
            if p.device.type == "cuda":
                self._transfer(p.device).send(p)
            elif rounded is not None and rounded.data_ptr() != p.data_ptr():
                p.copy_(rounded.view_as(p))
        for transfer in self._transfers.values():
            transfer.finish()

    def _as_fp32(self, grad: Tensor) -> Tensor:
        if grad.dtype == torch.float32:
            return grad
        if self._scratch.numel() == 0:
            self._scratch = torch.empty(SLICE)
        return self._scratch[: len(grad)].copy_(grad)

    def _rounded(self, p: Tensor) -> Tensor | None:
        """Where the rounded weights of a slice go: the parameter, a buffer on its way up, or nowhere."""
        if _is_own_master(p):
            return None
        if p.device.type == "cuda":
            return self._transfer(p.device).outgoing(p)
        if p.device.type == "cpu" and p.is_contiguous():
            return p.view(-1)
        return torch.empty(p.numel(), dtype=p.dtype)

    def _update(self, group: dict, state: dict, weight: Tensor, grad: Tensor, part: slice, step: Tensor, fused: bool):
        names = STATE_NAMES[: 3 if group["amsgrad"] else 2]
        flat = part != slice(None)
        tensors = [weight[part] if flat else weight, grad]
        tensors += [state[name].view(-1)[part] if flat else state[name] for name in names]
        settings = {key: group[key] for key in ("lr", "eps", "weight_decay")}
        if not fused:
            adamw_(*tensors, *([] if group["amsgrad"] else [None]), step.item(), betas=group["betas"], **settings)
            return
        lists = [[t] for t in tensors] + ([] if group["amsgrad"] else [[]])
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            *lists, [step], beta1=beta1, beta2=beta2, amsgrad=group["amsgrad"], maximize=False, **settings
        )

    def _transfer(self, device: torch.device) -> _Transfer:
        if device not in self._transfers:
            self._transfers[device] = _Transfer(device)
        return self._transfers[device]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a `state_dict()` back. State stays fp32 on the CPU; torch's default would cast it to the parameter's
        dtype and device. Raises ValueError where groups or shapes do not match."""
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
        dtype, device = (torch.float32, "cpu") if self.enabled else (p.dtype, p.device)
        state = {name: saved[name].to(device, dtype, copy=True) for name in STATE_NAMES if name in saved}
        state["step"] = torch.as_tensor(saved["step"], dtype=torch.float32).clone()
        if not self.enabled or _is_own_master(p):
            if "master" in state:
                p.copy_(state.pop("master"))
        elif "master" not in state:
            state["master"] = p.detach().to("cpu", torch.float32, copy=True).contiguous()
        return state

    def state_bytes(self) -> int:
        """Bytes of optimizer state held in host memory."""
        tensors = [t for state in self.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in tensors if t.device.type == "cpu")


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


def _is_own_master(p: Tensor) -> bool:
    return p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous()


class _Transfer:
    """Copies between a CUDA device and pinned host memory on a side stream.

    A buffer is read or overwritten only after the event of the copy that uses it has passed.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.grads: dict[Tensor, Tensor] = {}
        self.weights: dict[Tensor, Tensor] = {}
        self.fetched: dict[Tensor, torch.cuda.Event] = {}
        self.sent: dict[Tensor, torch.cuda.Event] = {}

    def fetch(self, p: Tensor) -> None:
        """Queue the copy of p's gradient to the host, behind the backward pass that is writing it."""
        if p not in self.grads:
            self.grads[p] = torch.empty(p.numel(), dtype=p.grad.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.grads[p].copy_(p.grad.reshape(-1), non_blocking=True)
            p.grad.record_stream(self.stream)
            self.fetched[p] = self.stream.record_event()

    def wait(self, p: Tensor) -> Tensor:
        self.fetched[p].synchronize()
        return self.grads[p]

    def outgoing(self, p: Tensor) -> Tensor:
        if p in self.sent:
            self.sent[p].synchronize()
        if p not in self.weights:
            self.weights[p] = torch.empty(p.numel(), dtype=p.dtype, pin_memory=True)
        return self.weights[p]

    def send(self, p: Tensor) -> None:
        with torch.cuda.stream(self.stream):
            p.copy_(self.outgoing(p).view(p.shape), non_blocking=True)
            self.sent[p] = self.stream.record_event()

    def finish(self) -> None:
        """Whatever the device does next sees the new weights."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
