"""The loss of a micro-batch, term by term: how the options of the loss turn scores into a number.

    loss = policy + beta * divergence - entropy_coef * entropy

The first two are sums of weight * term over the step's tokens, with the weights of the loss type. If kl is "ot", the
divergence is a mean over the step's responses. The entropy is the mean over the step's tokens for every loss type.

The options are `LossOptions` (run/options.py). The terms are pure functions in losses.py. This file chooses them, gives
them their inputs and adds them up.

There are three policies. The *sampler* drew the tokens, and its log-probabilities are stored in the episodes. The
*rollout policy* is the training code with the sampler's weights, so the two differ by rounding only. The
*reference* is the checkpoint that the run started from. In the first update after a rollout the rollout policy is the
policy itself. `MicroBatch.before` has its scores for later updates. They are computed before the first update.

Shape letters: M sampled tokens of a micro-batch, D hidden, E episodes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.lora import adapters_off
from qwen2_llm import Qwen2ForCausalLM
from run.options import LossOptions
from update import losses
from update.off_policy import sequence_mask
from update.packing import MicroBatch, Scores
from update.scoring import response_states, score, score_states
from update.step_metrics import StepTotals
from update.token_traces import TokenTraces

POLICY_OPTIONS = (
    "loss_type", "epsilon_low", "epsilon_high", "delta", "cispo_epsilon_max", "sapo_temperature_pos",
    "sapo_temperature_neg",
)  # fmt: skip


def micro_batch_loss(
    o: LossOptions, model: Qwen2ForCausalLM, reference: Qwen2ForCausalLM | None, micro: MicroBatch, mask: Tensor | None,
    totals: StepTotals, traces: TokenTraces | None = None,
) -> Tensor:  # fmt: skip
    """A micro-batch's part of the step's loss, a scalar. `mask` [M]: tokens of the policy loss; None: all.

    Sums for the step's metrics are added to `totals`. `traces` keeps the numbers of some responses, token by token.
    """
    hidden = response_states(model, micro)
    logp, entropy = score_states(model, micro, hidden)
    ref_logp = None
    if o.divergence_in_loss and o.needs_reference:
        if reference is None:
            raise ValueError(f"kl {o.kl!r} compares with a reference policy, and none was given")
        with torch.no_grad(), adapters_off(reference):
            ref_logp, _ = score(reference, micro)
    parts = loss_of_scores(o, micro, logp, entropy, hidden, ref_logp, mask)
    if parts.divergence is not None:
        totals.add_terms(kl=parts.divergence)
    if parts.importance is not None:
        totals.add_terms(importance=parts.importance)
    if parts.off_policy is not None:
        totals.add_terms(off_policy=parts.off_policy)
    totals.add(loss=parts.loss, policy_loss=parts.policy)
    totals.add_terms(
        ratio=parts.terms.ratio, entropy=entropy, clipped_low=parts.terms.clipped_low,
        clipped_high=parts.terms.clipped_high, difference=(logp.detach() - micro.old_logp).abs(),
    )  # fmt: skip
    if traces is not None:
        traces.watch(micro, logp, entropy, mask, ref_logp)
    return parts.loss


class LossParts(NamedTuple):
    loss: Tensor  # scalar, and so is `policy`, a part of it
    policy: Tensor
    terms: losses.PolicyTerms
    importance: Tensor | None  # [M]
    divergence: Tensor | None  # [M], of ot [E]; for the metric
    off_policy: Tensor | None  # [M]: 1 if the off-policy sequence mask left the token out


def loss_of_scores(
    o: LossOptions, micro: MicroBatch, logp: Tensor, entropy: Tensor, hidden: Tensor, ref_logp: Tensor | None,
    mask: Tensor | None,
) -> LossParts:  # fmt: skip
    """The loss from scores that are already computed. `logp`, `entropy`, `ref_logp` and `mask` are [M]."""
    terms, importance = policy_terms(o, micro, logp)
    off_policy = None
    if o.off_policy_threshold is not None:
        kept = sequence_mask(logp, micro.old_logp, micro.advantages, micro.lengths, o.off_policy_threshold)
        terms, off_policy = terms._replace(loss=terms.loss * kept), 1 - kept
    loss = policy = losses.weighted_sum(terms.loss, micro.weights if mask is None else micro.weights * mask)
    divergence = None
    if o.divergence_in_loss:
        added, divergence = divergence_terms(o, micro, logp, hidden, ref_logp)
        loss = loss + o.beta * added
    if o.entropy_coef:
        loss = loss + losses.entropy_bonus(entropy, micro.mean_weights, o.entropy_coef)
    return LossParts(loss, policy, terms, importance, divergence, off_policy)


def policy_terms(o: LossOptions, micro: MicroBatch, logp: Tensor) -> tuple[losses.PolicyTerms, Tensor | None]:
    """Terms of the policy loss [M], and the importance weights [M] that they contain, or None.

    Without a correction the ratio is policy / sampler. With one the ratio is policy / rollout policy, both by the
    training code, and the importance weight is rollout policy / sampler.
    """
    old, weight = micro.old_logp, None
    if o.importance_correction != "none":
        old = logp.detach() if micro.before is None else _joined([s.logp for s in micro.before], logp)
        weight = losses.importance_weights(
            old, micro.old_logp, micro.lengths, o.importance_correction, o.importance_cap
        )
    options = {name: getattr(o, name) for name in POLICY_OPTIONS}
    terms = losses.policy_loss(logp, old, micro.advantages, micro.lengths, **options)
    return terms if weight is None else terms._replace(loss=terms.loss * weight), weight


class Divergence(NamedTuple):
    loss: Tensor  # scalar
    terms: Tensor  # [M], of ot [E]; for the metric


def divergence_terms(
    o: LossOptions, micro: MicroBatch, logp: Tensor, hidden: Tensor, ref_logp: Tensor | None
) -> Divergence:
    """The divergence of a micro-batch from the reference. `ref_logp` None: the sampler (ot: the rollout policy)."""
    if o.kl == "ot":
        old = hidden.detach() if micro.before is None else _joined(_hidden_states(micro.before), hidden)
        cost_E = losses.transport_penalty(
            hidden, old, micro.lengths, ot_target=o.ot_target, window=o.ot_window,
            regularisation=o.ot_regularization, iterations=o.ot_iterations,
        )  # fmt: skip
        return Divergence(cost_E.sum() * micro.answer_weight, cost_E.detach())
    other = micro.old_logp if ref_logp is None else ref_logp
    terms_M = losses.kl_penalty(logp, other, o.kl, kl_target=o.kl_target)
    return Divergence(losses.weighted_sum(terms_M, micro.weights), terms_M.detach())


def _hidden_states(scores: list[Scores]) -> list[Tensor]:
    return [s.hidden for s in scores if s.hidden is not None]


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts).to(like) if parts else like.detach()  # an idle micro-batch has none
