"""Advantages by the estimators that have a division of their own: MaxRL, GDPO and pass@k.

    maxrl([1.0, 0.0, 0.0, 0.0])                 # [3, -1, -1, -1]: (r - mean) / mean
    best_of_k([1.0, 0.0, 0.0, 0.0], k=2)        # [1, -1/3, -1/3, -1/3]: the group is judged by its best of two
    decoupled([[{"format": 1, "answer": 0}, ...], ...], {"format": 0.1})    # GDPO, for all groups of a step

The functions take numbers and return numbers. Rewards that are equal give exactly 0, without rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev, stdev

from data_types import Episode

NAMED = {"maxrl": ("group",), "gdpo": ("group",), "pass_at_k": ("group", "none")}  # with a division of their own
ESTIMATORS = ("group_mean", "rloo", "reinforce_pp", "opo", *NAMED)
HUGE = 1e150  # its square is close to the largest number of a float
SCALES = ("group", "batch", "none")


def unknown_choice(estimator: str, scale: str) -> str | None:
    """The fault in an estimator and a scale, in one sentence. None: there is none."""
    if estimator not in ESTIMATORS or scale not in SCALES:
        return (
            f"estimator {estimator!r}, scale {scale!r}: expected one of {', '.join(ESTIMATORS)}, "
            f"and one of {', '.join(SCALES)}"
        )
    allowed = NAMED.get(estimator, SCALES)
    if scale not in allowed:
        return (
            f"scale {scale} does not go with estimator {estimator}, which has a division of its own: take "
            f"{' or '.join(allowed)}"
        )
    return None


def named_advantages(
    groups: Sequence[Sequence[Episode]], estimator: str, *,
    k: int, divide: bool, epsilon: float, weights: Mapping[str, float] | None,
) -> list[list[float]]:  # fmt: skip
    """Advantages of the episodes of each group by an estimator in NAMED. Rewards must be finite."""
    if estimator == "gdpo":
        return decoupled([[e.reward_parts for e in group] for group in groups], weights or {}, epsilon)
    rewards = [[e.reward for e in group] for group in groups]
    if estimator == "maxrl":
        return [maxrl(values, epsilon) for values in rewards]
    return [best_of_k(values, k, divide=divide, epsilon=epsilon) for values in rewards]


def deviation(values: Sequence[float], sample: bool = False) -> float:
    """Standard deviation, with divisor n or, of a sample, n - 1. It is finite if twice the largest value is.

    Python 3.10 squares the values in floating point, so large ones are scaled before.
    """
    compute = stdev if sample else pstdev
    unit = max(map(abs, values))
    return compute(values) if unit < HUGE else unit * compute([value / unit for value in values])


def length_weighted_mean(rewards: Sequence[float], lengths: Sequence[int]) -> float:
    """Baseline of OPO (arXiv 2505.23585): sum(length * reward) / sum(length). All lengths 0: the plain mean."""
    total = sum(lengths)
    return sum(r * n for r, n in zip(rewards, lengths)) / total if total else fmean(rewards)


def maxrl(rewards: Sequence[float], epsilon: float = 0.0) -> list[float]:
    """(r - mean) / (mean + epsilon): MaxRL (Tajwar et al. 2026, arXiv 2602.02710).

    The paper has rewards 0 and 1. With K right responses of N, the right ones get N / K - 1 and the others -1.
    A reward below 0 could make the mean 0 or negative. The lowest reward of the group counts as 0 then, which leaves
    r - mean as it is. So every advantage lies between -1 and N - 1, for any rewards.
    """
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean, lowest = fmean(rewards), min(0.0, *rewards)
    return [(r - mean) / (mean - lowest + epsilon) for r in rewards]


def best_of_k(rewards: Sequence[float], k: int, *, divide: bool = True, epsilon: float = 0.0) -> list[float]:
    """Pass@k advantages: (E[best | i is in the k] - E[best]) / (std(best) + epsilon).

    `best` is the highest reward of k different responses that are drawn from the group at random. With rewards 0 and 1
    this is the closed form of pass@k training (Chen et al. 2025, arXiv 2508.10751): with W wrong responses of N and
    p = C(W, k) / C(N, k), the probability that all k are wrong,

        right   p / sqrt(p (1 - p))              wrong   (p - C(W - 1, k - 1) / C(N - 1, k - 1)) / sqrt(p (1 - p))

    Other rewards need no threshold: the expectation of the maximum has a closed form, too. k = 1 is the advantage of
    GRPO. If k is N or more, the best response is the same in every draw, and all advantages are 0. They add up to 0.

    divide: False leaves the division out.
    """
    N = len(rewards)
    if k < 1:
        raise ValueError(f"pass@k with k {k}: expected 1 or more")
    lowest, span = min(rewards), max(rewards) - min(rewards)
    if not span or k >= N:
        return [0.0] * N
    order = sorted(range(N), key=lambda i: rewards[i])
    ranked = [(rewards[i] - lowest) / span for i in order]  # 0 to 1, ascending: an offset must not cost digits
    chance = [math.comb(j, k - 1) / math.comb(N, k) for j in range(N)]  # that the response of rank j is the best
    mean = sum(c * r for c, r in zip(chance, ranked))
    variance = sum(c * (r - mean) ** 2 for c, r in zip(chance, ranked))
    divisor = math.sqrt(variance) + epsilon / span if divide else 1 / span
    advantages = [0.0] * N
    for i, place in enumerate(order):
        ways = math.comb(i, k - 1) * ranked[i]  # the others of its k are below it
        if k > 1:
            ways += sum(math.comb(j - 1, k - 2) * ranked[j] for j in range(i + 1, N))  # rank j is the best
        if variance:
            advantages[place] = (ways / math.comb(N - 1, k - 1) - mean) / divisor
    return advantages


def decoupled(
    groups: Sequence[Sequence[Mapping[str, float]]], weights: Mapping[str, float], epsilon: float = 1e-4
) -> list[list[float]]:
    """GDPO (arXiv 2601.05242): each reward part is normalized in its group, then they are added up, and the sums are
    divided by their deviation over the batch.

        a_ij = sum over parts p of weight_p (r_pij - mean_pi) / (std_pi + epsilon)
        A_ij = a_ij / (std(a) + epsilon)

    groups: the parts of each response, one list per group. A part that a response lacks adds 0 to it, and the others
        are normalized without it.
    weights: of the parts by name; 1 for a name that is not in it.

    The mean of `a` over the batch is 0, because every part has mean 0 in every group. So it is not subtracted, and a
    group without a signal has advantages of exactly 0. Deviations have the divisor n, as everywhere in this project.
    """
    sums = [[0.0] * len(group) for group in groups]
    for parts, total in zip(groups, sums):
        for name in dict.fromkeys(name for part in parts for name in part):
            known = [i for i, part in enumerate(parts) if math.isfinite(part.get(name, math.nan))]
            values = [parts[i][name] for i in known]
            if not values or min(values) == max(values):
                continue
            mean, spread = fmean(values), deviation(values)
            for i, value in zip(known, values):
                total[i] += weights.get(name, 1.0) * (value - mean) / (spread + epsilon)
    flat = [a for total in sums for a in total]
    if not flat or min(flat) == max(flat):
        return [[0.0] * len(total) for total in sums]
    divisor = deviation(flat) + epsilon
    return [[a / divisor for a in total] for total in sums]
