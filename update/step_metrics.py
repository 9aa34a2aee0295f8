"""The metrics of a step: sums over its micro-batches, and the rewards of its rollout."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from data_types import Episode
from parallel.distributed import gather_each
from tasks.metric_names import TASK_DIAGNOSTICS, check_names
from tasks.task_base import Task
from update.advantages import deviation

Metrics = dict[str, float]


class StepTotals:
    """Adds up the numbers of a step's micro-batches. `metrics()` gives means over the step's tokens."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.lowest: dict[str, float] = defaultdict(lambda: math.inf)
        self.highest: dict[str, float] = defaultdict(lambda: -math.inf)

    def add(self, **scalars: Tensor) -> None:
        """Add parts of a sum over the step, such as losses."""
        for name, value in scalars.items():
            self.sums[name] += float(value.detach())

    def add_terms(self, **tensors: Tensor) -> None:
        """Add one number per token (or per response). Their mean, minimum and maximum are reported."""
        for name, values in tensors.items():
            values = values.detach().float()
            if not values.numel():  # an idle micro-batch
                continue
            self.sums[name] += float(values.sum())
            self.counts[name] += values.numel()
            self.lowest[name] = min(self.lowest[name], float(values.min()))
            self.highest[name] = max(self.highest[name], float(values.max()))

    def of_all_ranks(self) -> StepTotals:
        """The totals over all ranks, on every rank."""
        whole = StepTotals()
        for sums, counts, lowest, highest in gather_each(
            (dict(self.sums), dict(self.counts), dict(self.lowest), dict(self.highest))
        ):
            for name, value in sums.items():
                whole.sums[name] += value
            for name in counts:
                whole.counts[name] += counts[name]
                whole.lowest[name] = min(whole.lowest[name], lowest[name])
                whole.highest[name] = max(whole.highest[name], highest[name])
        return whole

    def metrics(self) -> Metrics:
        """The metrics by name. The names are TRL's if TRL has the metric."""
        metrics = {
            "loss": self.sums["loss"],
            "policy_loss": self.sums["policy_loss"],
            "entropy": self._mean("entropy"),
            "clip_ratio/low_mean": self._mean("clipped_low"),
            "clip_ratio/high_mean": self._mean("clipped_high"),
            **self._spread("ratio", "ratio"),
            "sampling/sampling_logp_difference/mean": self._mean("difference"),
            "sampling/sampling_logp_difference/max": self.highest.get("difference", 0.0),
            "update/tokens": float(self.counts["ratio"]),
        }
        if self.counts["kl"]:
            metrics["kl"] = self._mean("kl")
        if self.counts["off_policy"]:
            metrics["update/off_policy_masked"] = self._mean("off_policy")
        if self.counts["importance"]:
            metrics |= self._spread("importance", "sampling/importance_sampling_ratio")
        return metrics

    def _mean(self, name: str) -> float:
        return self.sums[name] / max(1, self.counts[name])

    def _spread(self, name: str, shown: str) -> Metrics:
        return {
            f"{shown}/mean": self._mean(name),
            f"{shown}/min": self.lowest.get(name, 0.0),
            f"{shown}/max": self.highest.get(name, 0.0),
        }


def reward_metrics(episodes: Sequence[Episode], task: Task) -> Metrics:
    """Metrics of the rollout's rewards: means and deviations over episodes, and the share of groups without a signal.

    A deviation is that of all episodes with the divisor n - 1, as in TRL. Advantages have another one (grpo.py).
    The task's own diagnostics (such as the share of false sums) are added. They are not part of any reward. Raises
    ValueError if one of them has the name of a metric of the run."""
    rewards = torch.tensor([e.reward for e in episodes], dtype=torch.float64)
    groups: dict[int, list[float]] = {e.group_id: [] for e in episodes}
    own: dict[int, list[float]] = {e.group_id: [] for e in episodes}  # without the trainer's penalties
    for e in episodes:
        if not math.isnan(e.reward):
            groups[e.group_id].append(e.reward)
            own[e.group_id].append(e.task_reward)
    metrics = {
        "reward": rewards.nanmean().item(),
        "reward_std": _deviation([r for group in groups.values() for r in group]),
        "frac_reward_zero_std": fmean(not has_signal(group) for group in own.values()),
        "completions/mean_length": fmean(e.n_sampled for e in episodes),
        "completions/clipped_ratio": fmean(e.truncated for e in episodes),
    }
    if any(e.turns is not None for e in episodes):
        metrics["tools/calls"] = fmean(sum(turn.given for turn in e.turns or []) for e in episodes)
        metrics["tools/given_tokens"] = fmean(len(e.response_ids) - e.n_sampled for e in episodes)
    missing = fmean(math.isnan(e.reward) for e in episodes)
    if missing:
        metrics["frac_reward_missing"] = missing
    for part in dict.fromkeys(name for e in episodes for name in e.reward_parts):  # a failed reward has no parts
        values = torch.tensor([e.reward_parts.get(part, math.nan) for e in episodes], dtype=torch.float64)
        values = values[~values.isnan()]
        metrics[f"rewards/{part}/mean"] = values.mean().item()
        metrics[f"rewards/{part}/std"] = _deviation(values.tolist())
    diagnostics = [e.diagnostics for e in episodes if e.diagnostics is not None]
    diagnostics += [
        task.diagnostics(e.problem, e.text) for e in episodes if e.diagnostics is None and e.problem is not None
    ]
    names = dict.fromkeys(name for d in diagnostics for name in d)
    check_names("diagnostic", names.keys() - TASK_DIAGNOSTICS)
    return metrics | {name: fmean(d[name] for d in diagnostics if name in d) for name in names}


def _deviation(values: list[float]) -> float:
    """Sample deviation (divisor n - 1) of the finite numbers among the values. 0 for fewer than two."""
    known = [value for value in values if math.isfinite(value)]
    return deviation(known, sample=True) if len(known) > 1 else 0.0


def has_signal(rewards: Sequence[float]) -> bool:
    """Whether the rewards of a group differ. NaN rewards are left out."""
    known = [reward for reward in rewards if not math.isnan(reward)]
    return bool(known) and min(known) != max(known)
