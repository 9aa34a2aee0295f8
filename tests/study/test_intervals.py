"""Pass rates and intervals against counting by hand, and against many experiments whose true value is known."""

from __future__ import annotations

import math
from itertools import combinations
from random import Random

import pytest

from study.intervals import difference_interval, pass_at_k, share_interval, wilson_interval


@pytest.mark.parametrize(("n", "correct", "k"), [(5, 2, 1), (5, 2, 2), (6, 0, 3), (6, 6, 3), (4, 3, 2), (8, 1, 8)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n, correct, k):
    answers = [i < correct for i in range(n)]
    subsets = list(combinations(answers, k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses_more_answers_than_there_are(k):
    with pytest.raises(ValueError, match="expected k from 1 to 4"):
        pass_at_k(4, 2, k)


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (7, 20), (20, 20)])
def test_wilson_interval_holds_the_proportions_that_a_score_test_does_not_reject(successes, n):
    """Its ends solve |p_hat - p| = 1.96 sqrt(p (1 - p) / n)."""
    for p in wilson_interval(successes, n):
        assert abs(successes / n - p) == pytest.approx(1.959964 * math.sqrt(max(p * (1 - p), 0) / n), abs=1e-9)


def test_the_interval_of_single_answers_is_wilsons():
    assert share_interval([1.0] * 3 + [0.0] * 5)[0] == pytest.approx(wilson_interval(3, 8)[0], abs=0.03)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_few_problems_that_came_out_alike_are_no_certainty(share):
    assert share_interval([share] * 4) == wilson_interval(4 * share, 4)


def test_many_answers_a_problem_narrow_the_interval_as_far_as_they_vary():
    """Shares of .4 to .6: the mean of 8 of them has a standard error of .0378, so as if from 175 answers."""
    values = [0.4, 0.6] * 4
    error = math.sqrt(8 * 0.01 / 7 / 8)
    low, high = share_interval(values)
    assert high - low == pytest.approx(2 * 1.959964 * error, rel=0.02)
    assert (low + high) / 2 == pytest.approx(0.5)


def test_a_gain_is_counted_problem_by_problem():
    before, after = [0.0, 0.0, 1.0, 0.5], [1.0, 1.0, 0.0, 1.0]
    error = math.sqrt((0.625**2 * 2 + 1.375**2 + 0.125**2) / 3 / 4)
    mean, low, high = difference_interval(before, after)
    assert (mean, low, high) == pytest.approx((0.375, 0.375 - 1.959964 * error, 0.375 + 1.959964 * error))


def test_a_few_problems_that_came_out_as_before_do_not_prove_that_nothing_changed():
    one_changed = math.sqrt(1 / 4 / 5)
    assert difference_interval([1.0] * 5, [1.0] * 5) == pytest.approx(
        (0, -1.959964 * one_changed, 1.959964 * one_changed)
    )


def test_nineteen_of_twenty_intervals_hold_the_true_value():
    """Problems of different difficulty, 4 answers each, and a gain of .1 each: many experiments of 40 problems."""
    random = Random(0)
    held, held_gain, runs = 0, 0, 2000
    for _ in range(runs):
        chances = [random.choice((0.05, 0.3, 0.8)) for _ in range(40)]
        before, after = (
            [sum(random.random() < p + gain for _ in range(4)) / 4 for p in chances] for gain in (0.0, 0.1)
        )
        low, high = share_interval(before)
        held += low <= (0.05 + 0.3 + 0.8) / 3 <= high
        _, low, high = difference_interval(before, after)
        held_gain += low <= 0.1 <= high
    assert 0.93 < held / runs < 0.97
    assert 0.93 < held_gain / runs < 0.97
