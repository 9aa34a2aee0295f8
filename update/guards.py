"""What watches a run's numbers: why an update was refused, when refusals end the run, and signs of a collapse.

    logger.warning(name_culprit(...))            # "gradient of model.norm.weight (and 14 more) is not finite; ..."
    guard = Guard(max_refusals=10)
    guard.watch(step, metrics)                   # after every step; a warning now and then, never a repair
    if guard.gave_up: ...                        # so many steps in a row were refused

A refused update leaves the weights as they were, so one bad answer costs a step and nothing else. Where every step is
refused, the run is ended rather than burnt: what is wrong then is in the weights or the settings. A collapse (no
entropy, only truncated answers, no group with a signal) is reported and not mended, because the mend is a choice.
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
from update.packing import MicroBatch, Step
from update.scoring import score

logger = logging.getLogger(__name__)

ENTROPY_FLOOR = 0.01  # nats a token: nineteen tokens in twenty are certain
PATIENCE = 3  # steps in a row before a collapse is told
SILENCE = 50  # steps between two warnings of the same kind
NUMBERS_ENDED_IT = 3  # the program's exit code where `Guard.gave_up`


# ---------------------------------------------------------------------------------------------------------------------
# Which tensor, which episode


def name_culprit(
    model: torch.nn.Module, episodes: Sequence[Episode], step: Step, loss_of: Callable[[MicroBatch], Tensor]
) -> str:
    """Say which tensor of a refused update is not finite, and which episode made it so, whichever rank had them.

    Args:
        model: with the refused step's gradients, not yet scaled or cleared. They are cleared here.
        loss_of: a micro-batch's part of the loss, with its graph; each episode is gone through alone, so that this
            costs about one more update, and nothing where no update is refused.
    """
    if is_sharded(model):  # episodes would have to be gone through by all ranks together
        return "where weights are sharded, the episode is not looked for"
    said = distributed.gather_each(_own_culprit(model, episodes, step, loss_of))
    return next((sentence for sentence in said if "such episode is" in sentence), said[0])


def _own_culprit(
    model: torch.nn.Module, episodes: Sequence[Episode], step: Step, loss_of: Callable[[MicroBatch], Tensor]
) -> str:
    """What this rank can say of it: from the weights, which come first, to the sum over all episodes."""
    weights = _not_finite((name, p.detach()) for name, p in model.named_parameters())
    gradients = _not_finite((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    if weights:
        return f"{_list('weight', weights)} is not finite: it was so before this step, load an earlier checkpoint"
    if (number := not_finite_answer(episodes)) is not None:
        token, episode = len(episodes[number].response_ids) - 1, describe(episodes[number], number)
        return f"the sampler's log-probability is not finite at token {token}; the first such episode is {episode}"
    for micro in step.micro_batches(1):
        if cause := _cause(model, micro, loss_of):
            return f"{cause}; the first such episode is {describe(episodes[micro.numbers[0]], micro.numbers[0])}"
    where = _list("gradient", gradients) + " is not finite" if gradients else "the loss is not finite"
    return f"{where}, though no episode alone makes it so: what overflowed is their sum"


def not_finite_answer(episodes: Sequence[Episode]) -> int | None:
    """The number of the first episode that the sampler had to cut because its logits were not finite."""
    return next((i for i, e in enumerate(episodes) if e.finish_reason == "not_finite"), None)


def _cause(model: torch.nn.Module, micro: MicroBatch, loss_of: Callable[[MicroBatch], Tensor]) -> str | None:
    """What is not finite in the update of one episode, from the inputs to the gradient; None: nothing."""
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
    """Names, the last in the forward pass first: there a backward pass begins, so that is where it broke."""
    return [name for name, tensor in tensors if not tensor.isfinite().all()][::-1]


def _list(kind: str, names: list[str]) -> str:
    return f"the {kind} of {names[0]}" + (f" (and of {len(names) - 1} more)" if len(names) > 1 else "")


def describe(episode: Episode, number: int) -> str:
    """An episode as people find it again in samples.jsonl."""
    problem = f", problem {episode.problem.id}" if episode.problem else ""
    return (
        f"number {number} of the step, group {episode.group_id}{problem}: {len(episode.response_ids)} tokens, "
        f"finish reason {episode.finish_reason}, advantage {episode.advantage:.4g}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Over the steps of a run


class Guard:
    """Counts refused steps in a row and steps in a row that look like a collapse.

    Args:
        max_refusals: so many refusals in a row and `gave_up` is true; 0: never.
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
        """Warn why an update was refused, and keep the reason for the end of the run."""
        self.diagnosis = diagnosis
        logger.warning("the update was refused (%s); the weights stay as they were", diagnosis)

    def skipped(self, reason: str) -> None:
        """Warn that an update had nothing to do, at the first of every SILENCE such updates."""
        if self._skipped % SILENCE == 0:
            logger.warning("no update: %s; the weights stay as they were", reason)
        self._skipped += 1

    def watch(self, step: int, metrics: dict[str, float]) -> None:
        """Look at a step's metrics; warn where a sign of collapse has stood for PATIENCE steps, then be silent for
        SILENCE steps."""
        self.refusals = self.refusals + 1 if metrics.get("update/not_finite") else 0
        for sign, advice in collapse_signs(metrics).items():
            self._streaks[sign] += 1
            if self._streaks[sign] >= PATIENCE and step >= self._silent_until[sign]:
                self._silent_until[sign] = step + SILENCE
                logger.warning("step %d, for %d steps now: %s. %s", step, self._streaks[sign], sign, advice)
        for sign in self._streaks.keys() - collapse_signs(metrics).keys():
            self._streaks[sign] = 0


def collapse_signs(metrics: dict[str, float]) -> dict[str, str]:
    """Each sign of a collapse that a step's metrics show, with what to try."""
    reward = metrics.get("reward", math.nan)
    signs = {
        "no answer could be scored": (
            math.isnan(reward),
            "The reward of every answer is missing: look at what the task says of its failures",
        ),
        "all rewards of every group are equal, so nothing is learnt": (
            metrics.get("frac_reward_zero_std") == 1 and not math.isnan(reward),
            f"The mean reward is {reward:.3g}: take easier problems where it is low and harder ones where it is high, "
            "or a larger --group-size",
        ),
        "every answer was cut at --max-new-tokens": (
            metrics.get("completions/clipped_ratio") == 1,
            "Raise it, or check that the model's stop token is the tokenizer's",
        ),
        "the entropy is near 0, so that the answers of a group hardly differ": (
            metrics.get("update/tokens", 0) > 0 and metrics.get("entropy", math.inf) < ENTROPY_FLOOR,
            "Try --entropy-coef 0.001 or --entropy-target, a higher --temperature, or a lower --lr",
        ),
    }
    return {sign: advice for sign, (shown, advice) in signs.items() if shown}
