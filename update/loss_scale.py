"""The dynamic loss scale of fp16 training (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).

The smallest fp16 number is 6e-8, and most gradients of a language model's step are below it. The loss is therefore
multiplied by a scale before the backward pass, and gradients are divided by it in fp32, inside the optimizer.

A scale that is too large makes gradients infinite. Then it is halved and the gradient is computed again, so no step is
lost. After GROW_AFTER steps without an overflow it is doubled: gradients shrink in the course of a training.
"""

from __future__ import annotations

import torch

FIRST = 2.0**16
SMALLEST, LARGEST = 1.0, 2.0**24  # below 1 the scale is not the cause; above, fp16's own range is spent
GROW_AFTER = 100  # updates; a try that fails costs one more gradient


class LossScale:
    """The scale, and the number of updates since it changed. bf16 and fp32 need none: `value` stays 1."""

    def __init__(self, dtype: torch.dtype):
        self.active = dtype == torch.float16
        self.value = FIRST if self.active else 1.0
        self.updates = 0

    def lower(self) -> bool:
        """After an overflow. False: the scale is not its cause, or cannot be lowered any more."""
        self.updates = 0
        if not self.active or self.value <= SMALLEST:
            return False
        self.value /= 2
        return True

    def note_update(self) -> None:
        """After an update with finite gradients."""
        self.updates += 1
        if self.active and self.updates >= GROW_AFTER and self.value < LARGEST:
            self.value, self.updates = self.value * 2, 0

    def state_dict(self) -> dict[str, float]:
        return {"loss_scale": self.value, "updates_at_loss_scale": self.updates}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue with a saved scale. A checkpoint of a run in another type has none to take over."""
        if self.active and "loss_scale" in state:
            self.value, self.updates = state["loss_scale"], int(state["updates_at_loss_scale"])
