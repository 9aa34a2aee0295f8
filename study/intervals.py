"""95% intervals of pass rates: of a share, of shares that belong to problems, and of a paired difference.

    low, high = wilson_interval(7, 20)                       # 7 right answers of 20 independent ones
    low, high = share_interval([0.5, 0.0, 1.0])              # the share of right answers, problem by problem
    mean, low, high = difference_interval(before, after)     # two checkpoints on the same problems

Answers to one problem resemble one another, so the problems are the independent units, not the answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959964  # of a normal distribution, two-sided 95%


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of `k` answers is right, from `correct` right ones of `n`.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1). Raises ValueError if k is not from 1 to n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} from {n} answers a problem: expected k from 1 to {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def wilson_interval(successes: float, n: float) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927), sound also near 0 and 1. `n` > 0 may be an effective number."""
    p, z2 = successes / n, Z95**2
    centre, spread = p + z2 / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (centre - spread) / (1 + z2 / n), (centre + spread) / (1 + z2 / n)


def share_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of shares in [0, 1], one value a problem.

    It is Wilson's interval of the number of independent answers whose mean would have the same variance. That number is
    at least the number of problems: if all of a few problems came out alike, their own spread would claim certainty.
    """
    n, mean = len(values), sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(n - 1, 1) / n  # of the mean
    independent = max(n, mean * (1 - mean) / variance) if variance else n
    return wilson_interval(mean * independent, independent)


def difference_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Mean of after - before, problem by problem, and its 95% interval (normal, of paired differences).

    It is narrower than two intervals side by side, because the same problems are hard for both. It is no narrower than
    if one problem had gone from wrong to right: a few problems that all came out as before do not prove that nothing
    changed.
    """
    gains = [b - a for a, b in zip(before, after, strict=True)]
    n, mean = len(gains), sum(gains) / len(gains)
    squares = max(1.0, sum((g - mean) ** 2 for g in gains))
    spread = Z95 * math.sqrt(squares / max(n - 1, 1) / n)
    return mean, mean - spread, mean + spread
