"""Pass rates and intervals against counting by hand, and the program from the command line."""

from __future__ import annotations

import json
import math
from itertools import combinations

import pytest

from evaluate import main, mean_interval, pass_at_k, wilson_interval


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


def test_mean_interval_is_the_standard_error_around_the_mean():
    low, high = mean_interval([0.0, 0.5, 0.5, 1.0])
    spread = 1.959964 * math.sqrt((0.25 + 0.25) / 3 / 4)
    assert (low, high) == pytest.approx((0.5 - spread, 0.5 + spread))


def test_evaluates_and_compares_two_checkpoints_and_prints_json_last(capsys, tmp_path):
    flags = ["--eval-problems", "6", "--samples", "2", "--max-new-tokens", "24", "--json", str(tmp_path / "out.json")]
    assert main(["--ckpt", "countdown-tiny", "--compare", "assets/countdown-tiny", *flags]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads((tmp_path / "out.json").read_text())
    before, after = last["results"]["countdown-tiny"], last["results"]["assets/countdown-tiny"]
    assert before == after  # the same weights, problems and seed
    assert {"greedy", "pass@1", "pass@2"} <= set(before)
    assert before["pass@2"]["value"] >= before["pass@1"]["value"] == before["rewards/answer/mean"]["value"]


def test_a_wrong_flag_is_one_line_and_exit_code_2(capsys):
    assert main(["--ckpt", "no/such", "--eval-problems", "2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
