"""Checks of a run's numbers: the cause of a refused update, the end of a run after many refusals, signs of a collapse.

    logger.warning(name_culprit(...))            # "gradient of model.norm.weight (and 14 more) is not finite; ..."
    guard = Guard(max_refusals=10)
    guard.watch(step, metrics)                   # after every step; it warns and never repairs
    if guard.gave_up: ...                        # `max_refusals` steps in a row were refused

A refused update does not change the weights, so one bad response costs one step. If every step is refused, the fault is
in the weights or the settings, and the run ends. A collapse (no entropy, only truncated responses, no group with a
signal) is only reported. The remedy is for the user to choose.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from data_types import Episode
from parallel import distributed
from parallel.sharding import is_sharded
from qwen2_llm import Qwen2ForCausalLM
from update.packing import MicroBatch, Step
from update.scoring import score

logger = logging.getLogger(__name__)

ENTROPY_FLOOR = 0.01  # nats per token: about nineteen tokens in twenty are certain
PATIENCE = 3  # steps in a row that show a sign before the first warning
SILENCE = 50  # steps between two warnings of the same kind
NUMBERS_ENDED_IT = 3  # the program's exit code if `Guard.gave_up`


# ---------------------------------------------------------------------------------------------------------------------
# The cause of a refused update: a tensor and an episode


def name_culprit(
    model: Qwen2ForCausalLM, episodes: Sequence[Episode], step: Step, loss_of: Callable[[MicroBatch], Tensor]
) -> str:
    """Name the tensor of a refused update that is not finite, and the first episode that causes it, on any rank.

    The search computes each episode alone. It costs about one more update, and runs only after a refusal.

    Args:
        model: has the refused step's gradients, not yet scaled or cleared. They are cleared here.
        loss_of: a micro-batch's part of the loss, with its graph.
    """
    if is_sharded(model):  # all ranks would have to go through the episodes together
        return "with sharded weights, the episode is not searched for"
    said = distributed.gather_each(_own_culprit(model, episodes, step, loss_of))
    return next((sentence for sentence in said if "such episode is" in sentence), said[0])


def _own_culprit(
    model: Qwen2ForCausalLM, episodes: Sequence[Episode], step: Step, loss_of: Callable[[MicroBatch], Tensor]
) -> str:
    """The cause on this rank. The order of the search: weights, sampler, each episode, the sum over all episodes."""
    weights = _not_finite((name, p.detach()) for name, p in model.named_parameters())
    gradients = _not_finite((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    if weights:
        return f"{_list('weight', weights)} is not finite, and was not before this step: load an earlier checkpoint"
    if (number := not_finite_answer(episodes)) is not None:
        token, episode = len(episodes[number].response_ids) - 1, describe(episodes[number], number)
        return f"the sampler's log-probability is not finite at token {token}; the first such episode is {episode}"
    for micro in step.micro_batches(1):
        if cause := _cause(model, micro, loss_of):
            return f"{cause}; the first such episode is {describe(episodes[micro.numbers[0]], micro.numbers[0])}"
    found = _list("gradient", gradients) + " is not finite" if gradients else "the loss is not finite"
    return f"{found}, but every episode alone gives finite numbers: their sum overflowed"


def not_finite_answer(episodes: Sequence[Episode]) -> int | None:
    """The number of the first episode that the sampler had to cut because its logits were not finite."""
    return next((i for i, e in enumerate(episodes) if e.finish_reason == "not_finite"), None)


def _cause(model: Qwen2ForCausalLM, micro: MicroBatch, loss_of: Callable[[MicroBatch], Tensor]) -> str | None:
    """The first number that is not finite in the update of one episode, from its inputs to its gradient, or None."""
    for name, values in {"advantage": micro.advantages, "the sampler's log-probability": micro.old_logp}.items():
        if not values.isfinite().all():
            return f"{name} is not finite{_position(values)}"
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, values in zip(("the policy's log-probability", "the entropy"), score(model, micro)):
            if not values.isfinite().all():
                return f"{name} is not finite{_position(values)}"
    loss = loss_of(micro)
    if not loss.isfinite():
        return "the loss is not finite"
    loss.backward()
    gradients = _not_finite((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)
    return f"{_list('gradient', gradients)} is not finite" if gradients else None


def _position(values: Tensor) -> str:
    return f" at token {int((~values.isfinite()).nonzero()[0])}" if values.numel() > 1 else ""


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of tensors, the last of the forward pass first. The backward pass begins there, so the fault does, too."""
    return [name for name, tensor in tensors if not tensor.isfinite().all()][::-1]


def _list(kind: str, names: list[str]) -> str:
    return f"the {kind} of {names[0]}" + (f" (and of {len(names) - 1} more)" if len(names) > 1 else "")


def describe(episode: Episode, number: int) -> str:
    """Describe an episode by the fields that identify it in samples.jsonl."""
    problem = f", problem {episode.problem.id}" if episode.problem else ""
    return (
        f"number {number} of the step, group {episode.group_id}{problem}: {episode.n_sampled} tokens, "
        f"finish reason {episode.finish_reason}, advantage {episode.advantage:.4g}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Over the steps of a run


class Guard:
    """Counts refused steps in a row and steps in a row that look like a collapse.

    Args:
        max_refusals: `gave_up` is true after this many refusals in a row. 0: never.
    """

    def __init__(self, max_refusals: int = 10):
        self.max_refusals = max_refusals
        self.refusals = 0
        self.diagnosis = ""  # of the last refusal
        self._skipped = 0
        self._streaks: Counter[str] = Counter()
        self._silent_until: Counter[str] = Counter()

    @property
    def gave_up(self) -> bool:
        return 0 < self.max_refusals <= self.refusals

    def refused(self, diagnosis: str) -> None:
        """Warn that an update was refused. The reason is kept for the message at the end of the run."""
        self.diagnosis = diagnosis
        logger.warning("the update was refused (%s); the weights stay as they were", diagnosis)

    def skipped(self, reason: str) -> None:
        """Warn that an update had nothing to do, at the first of every SILENCE such updates."""
        if self._skipped % SILENCE == 0:
            logger.warning("no update: %s; the weights stay as they were", reason)
        self._skipped += 1

    def watch(self, step: int, metrics: dict[str, float]) -> None:
        """Check the metrics of a step. A sign of collapse that lasts PATIENCE steps gives one warning per SILENCE
        steps."""
        self.refusals = self.refusals + 1 if metrics.get("update/not_finite") else 0
        for sign, advice in collapse_signs(metrics).items():
            self._streaks[sign] += 1
            if self._streaks[sign] >= PATIENCE and step >= self._silent_until[sign]:
                self._silent_until[sign] = step + SILENCE
                logger.warning("step %d, for %d steps now: %s. %s", step, self._streaks[sign], sign, advice)
        for sign in self._streaks.keys() - collapse_signs(metrics).keys():
            self._streaks[sign] = 0


def collapse_signs(metrics: dict[str, float]) -> dict[str, str]:
    """Each sign of a collapse in the metrics of a step, with advice."""
    reward = metrics.get("reward", math.nan)
    signs = {
        "no response could be scored": (
            math.isnan(reward),
            "The reward of every response is missing: read the task's warnings about failed rewards",
        ),
        "all rewards of every group are equal, so nothing is learned": (
            metrics.get("frac_reward_zero_std") == 1 and not math.isnan(reward),
            f"The mean reward is {reward:.3g}: take easier problems if it is low, harder ones if it is high, "
            "or a larger --group-size",
        ),
        "every response was cut at --max-new-tokens": (
            metrics.get("completions/clipped_ratio") == 1,
            "Raise it, or check that the model and the tokenizer have the same stop token",
        ),
        "the entropy is near 0, so the responses of a group hardly differ": (
            metrics.get("update/tokens", 0) > 0 and metrics.get("entropy", math.inf) < ENTROPY_FLOOR,
            "Try --entropy-coef 0.001 or --entropy-target, a higher --temperature, or a lower --lr",
        ),
    }
    return {sign: advice for sign, (shown, advice) in signs.items() if shown}
