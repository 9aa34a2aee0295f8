"""Every operator of torch that its documentation does not list, in one place.

These calls may change with any release of torch. Each has a test (tests/model/test_torch_private.py) that compares it
with public operators, so a release that changes one fails there and not in a user's run.

    fused_adamw_            one AdamW update of flat tensors in one pass over memory
"""

from __future__ import annotations

from torch import Tensor, _fused_adamw_


def fused_adamw_(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor | None, step: Tensor,
    *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """`optimizer.adamw_` in one kernel. All tensors are fp32 on one device, `step` too."""
    maxima = [] if max_exp_avg_sq is None else [max_exp_avg_sq]
    _fused_adamw_(
        [weight], [grad], [exp_avg], [exp_avg_sq], maxima, [step], lr=lr, beta1=betas[0], beta2=betas[1],
        weight_decay=weight_decay, eps=eps, amsgrad=max_exp_avg_sq is not None, maximize=False,
    )  # fmt: skip
