"""What an update minimises, term by term: the options, and how they turn a micro-batch's scores into a loss.

    loss = policy + beta * divergence - entropy_coef * entropy        each a sum of weight * term over the step's tokens

Every field of `Objective` is the field of the same name in config.py, where its help stands. The terms themselves are
pure functions in losses.py; here they are chosen, given their inputs and added up.

Three policies meet. The *sampler* drew the tokens, and its log-probabilities are stored in the episodes. The *rollout
policy* is the training code with the weights of that moment: the same policy up to rounding. The *reference* is the
checkpoint the run started from. In the first update after a rollout the rollout policy is the policy itself; later
updates get its scores as `MicroBatch.before`, computed before the first.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from update import losses
from update.packing import MicroBatch

POLICY_OPTIONS = (
    "epsilon_low", "epsilon_high", "delta", "cispo_epsilon_max", "sapo_temperature_pos", "sapo_temperature_neg"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The options of the loss. Raises TypeError for an unknown one."""

    loss_type: str = "dapo"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    cispo_epsilon_max: float = 5.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    mask_truncated: bool = False
    top_entropy_share: float = 1.0
    importance_correction: str = "none"
    importance_cap: float = 2.0
    beta: float = 0.0
    kl: str = "k3"
    kl_in: str = "loss"
    kl_against: str = "reference"
    kl_target: float = 0.0
    ot_target: float = 0.0
    ot_window: int = 8
    ot_regularization: float = 0.1
    ot_iterations: int = 5
    entropy_coef: float = 0.0
    entropy_target: float | None = None  # the update only measures; the coefficient is the trainer's to adapt

    @classmethod
    def from_config(cls, config: Any, **changes: Any) -> Objective:
        return cls(**({field.name: getattr(config, field.name) for field in fields(cls)} | changes))

    @property
    def in_loss(self) -> bool:
        """Whether there is a divergence term with a gradient."""
        return bool(self.beta) and self.kl_in == "loss"

    @property
    def compares_with_reference(self) -> bool:
        """kl, approx_kl and ot are defined against the rollout policy (GRPO-Mini)."""
        return bool(self.beta) and self.kl in ("k1", "k2", "k3") and self.kl_against == "reference"

    @property
    def everything(self) -> bool:
        """Whether episodes of advantage 0 matter."""
        entropy = bool(self.entropy_coef) or self.entropy_target is not None or self.top_entropy_share < 1
        return self.in_loss or entropy

    @property
    def asks_before(self) -> bool:
        """Whether the second update after a rollout needs the rollout policy's scores."""
        return self.importance_correction != "none" or (self.in_loss and self.kl == "ot")

    # The terms of one micro-batch

    def policy(self, micro: MicroBatch, logp: Tensor) -> tuple[losses.PolicyTerms, Tensor | None]:
        """Terms of the policy loss [M], and the importance weights [M] that are already in them, or None.

        With a correction the ratio is policy / rollout policy, both by the training code, and the gap between rollout
        policy and sampler is the weight; without one the ratio is policy / sampler and holds both.
        """
        old, weight = micro.old_logp, None
        if self.importance_correction != "none":
            old = logp.detach() if micro.before is None else _joined([s.logp for s in micro.before], logp)
            weight = losses.importance_weights(
                old, micro.old_logp, micro.lengths, self.importance_correction, self.importance_cap
            )
        options = {name: getattr(self, name) for name in POLICY_OPTIONS}
        terms = losses.policy_loss(logp, old, micro.advantages, micro.lengths, loss_type=self.loss_type, **options)
        return terms if weight is None else terms._replace(loss=terms.loss * weight), weight

    def divergence(self, micro: MicroBatch, logp: Tensor, hidden: Tensor, ref_logp: Tensor | None) -> Divergence:
        """The divergence of the micro-batch; `ref_logp` None: from the rollout policy."""
        if self.kl == "ot":
            old = hidden.detach() if micro.before is None else _joined([s.hidden for s in micro.before], hidden)
            cost_E = losses.transport_penalty(
                hidden, old, micro.lengths, ot_target=self.ot_target, window=self.ot_window,
                regularisation=self.ot_regularization, iterations=self.ot_iterations,
            )  # fmt: skip
            return Divergence(cost_E.sum() * micro.answer_weight, cost_E.detach())
        other = micro.old_logp if ref_logp is None else ref_logp
        terms_M = losses.kl_penalty(logp, other, self.kl, kl_target=self.kl_target)
        return Divergence(losses.weighted_sum(terms_M, micro.weights), terms_M.detach())


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts).to(like) if parts else like.detach()  # an idle micro-batch has none


class Divergence(NamedTuple):
    loss: Tensor  # scalar
    terms: Tensor  # [M], of ot [E]; for the metric
