"""The effect of one update on each token of a few responses, as the update itself computed it.

    traces = TokenTraces({0, 1, 2})                       # the numbers of the episodes in the step
    update_policy(model, optimizer, episodes, traces=traces)
    traces.attach(episodes)                               # episodes[0].trace, which run_log.py writes

The coefficient of a token is the derivative of the step's loss with respect to the token's log-probability. Autograd
computes it in every backward pass, on its way from the loss to the weights. A hook on the log-probabilities copies it.
The hook changes no number of the update. study/microscope.py computes the same coefficients for the other losses.

Shape letters: M response tokens of a micro-batch, T tokens of one response.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from data_types import Episode
from parallel.distributed import gather_each
from run.options import LossOptions
from update.packing import MicroBatch, Step

Trace = dict[str, Any]


def first_groups(episodes: Sequence[Episode], most_tokens: int) -> set[int]:
    """Numbers of the episodes of the first whole groups that have at most `most_tokens` response tokens together.

    There is always one group, if `most_tokens` is not 0.
    """
    if not most_tokens:
        return set()
    groups: dict[int, list[int]] = {}
    for number, episode in enumerate(episodes):
        groups.setdefault(episode.group_id, []).append(number)
    chosen: set[int] = set()
    tokens = 0
    for numbers in groups.values():
        tokens += sum(len(episodes[number].response_ids) for number in numbers)
        if chosen and tokens > most_tokens:
            break
        chosen |= set(numbers)
    return chosen


class TokenTraces:
    """Keeps the numbers of some episodes of one update.

    numbers: which ones, by their position in the step.
    facts: denominators and options of the step's loss. They are set by `finish`.
    """

    def __init__(self, numbers: Collection[int]):
        self.numbers = set(numbers)
        self.facts: dict[str, Any] = {}
        self._weights: dict[int, float] = {}
        self._parts: list[tuple[MicroBatch, dict[str, Tensor]]] = []
        self._loss_scale = 1.0

    def clear(self, loss_scale: float = 1.0) -> None:
        """Forget all micro-batches: the gradient is computed again if memory ran out or an fp16 gradient overflowed.

        loss_scale: the loss is multiplied by it before the backward pass. Coefficients are those without it.
        """
        self._parts.clear()
        self._loss_scale = loss_scale

    def watch(
        self, micro: MicroBatch, logp: Tensor, entropy: Tensor, mask: Tensor | None, ref_logp: Tensor | None
    ) -> None:
        """Keep a micro-batch's numbers, all [M]. The coefficients come with its backward pass."""
        if not self.numbers & set(micro.numbers) or not logp.requires_grad:
            return
        kept = {"logp": logp.detach(), "entropy": entropy.detach(), "mask": mask, "ref_logp": ref_logp}
        part = {name: values for name, values in kept.items() if values is not None}
        scale = self._loss_scale

        def keep_coefficient(gradient: Tensor) -> None:
            part["coefficient"] = gradient.detach() / scale

        logp.register_hook(keep_coefficient)
        self._parts.append((micro, part))

    def finish(self, step: Step, loss: LossOptions, refused: bool) -> None:
        """Keep the numbers that all tokens of the step share: denominators, the options that are not the default, and
        whether the update was refused."""
        defaults = LossOptions()
        changed = {
            f.name: getattr(loss, f.name)
            for f in fields(LossOptions)
            if getattr(loss, f.name) != getattr(defaults, f.name)
        }
        self.facts = {"loss_type": loss.loss_type, **changed, **step.denominators}
        if refused:
            self.facts["refused"] = True
        self._weights = {n: float(step.weights[n][0]) if len(step.weights[n]) else 0.0 for n in self.numbers}

    def attach(self, episodes: Sequence[Episode]) -> None:
        """Set `trace` of every episode that was followed. With several processes all of them call this.

        A trace has `step` (the facts) and `weight` (of each token of the response). If the response took part in the
        update, it has lists [T], too: logp, entropy and coefficient, and mask, ref_logp and rollout_logp if the loss
        has them.
        """
        lists: dict[int, Trace] = {}
        for mine in gather_each(self._lists()):
            lists |= mine
        for number in self.numbers:
            own = {name: _spread(values, episodes[number]) for name, values in lists.get(number, {}).items()}
            episodes[number].trace = {"step": self.facts, "weight": self._weights.get(number, 0.0), **own}

    def _lists(self) -> dict[int, Trace]:
        found: dict[int, Trace] = {}
        for micro, part in self._parts:
            sizes = micro.lengths.tolist()
            if micro.before is not None:
                part["rollout_logp"] = torch.cat([scores.logp for scores in micro.before])
            numbers = {name: _numbers(_rounded(name, values)) for name, values in part.items()}
            start = 0
            for number, size in zip(micro.numbers, sizes):
                if number in self.numbers:
                    found[number] = {name: values[start : start + size] for name, values in numbers.items()}
                start += size
        return found


def _spread(values: list[Any], episode: Episode) -> list[Any]:
    """One number for each token of the response: None for a token that an environment gave."""
    if episode.sampled is None:
        return values
    own = iter(values)
    return [next(own) if sampled else None for sampled in episode.sampled]


def _rounded(name: str, values: Tensor) -> Tensor:
    """As many digits as single precision has: 7 after the point, of a coefficient 7 significant ones."""
    values = values.detach().cpu().double()  # MPS has no fp64
    return significant(values) if name == "coefficient" else values.round(decimals=4 if name == "entropy" else 7)


def significant(values: Tensor) -> Tensor:
    """Values in fp64, rounded to 7 significant digits, which single precision holds and JSON writes shortly."""
    scale = 10.0 ** (6 - values.abs().clamp(min=1e-30).log10().floor())
    return (values * scale).round() / scale


def _numbers(values: Tensor) -> list[float | None]:
    """None: not finite, which JSON cannot write."""
    numbers = values.tolist()
    return numbers if values.isfinite().all() else [x if math.isfinite(x) else None for x in numbers]
