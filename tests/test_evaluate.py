"""The program evaluate.py from the command line."""

from __future__ import annotations

import json

import pytest

from evaluate import main


def test_evaluates_and_compares_two_checkpoints_and_prints_json_last(capsys, tmp_path):
    flags = ["--eval-problems", "6", "--samples", "2", "--max-new-tokens", "24", "--json", str(tmp_path / "out.json")]
    assert main(["--ckpt", "countdown-tiny", "--after", "assets/countdown-tiny", *flags]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads((tmp_path / "out.json").read_text())
    before, after = last["results"]["countdown-tiny"], last["results"]["assets/countdown-tiny"]
    assert before == after  # the same weights, problems and seed
    assert {"greedy", "pass@1", "pass@2"} <= set(before)
    gain = last["differences"]["assets/countdown-tiny - countdown-tiny"]
    assert gain["pass@1"]["value"] == 0.0
    assert gain["pass@1"]["low"] == -gain["pass@1"]["high"]
    assert before["pass@2"]["value"] >= before["pass@1"]["value"] == before["rewards/answer/mean"]["value"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ckpt", "no/such", "--eval-problems", "2"], "no/such"),
        (["--eval-problems", "0"], "gave no held-out problem"),
        (["--samples", "x"], "--samples x: expected a whole number"),
        (["--samples", "0"], "--samples 0: expected"),
        (["--after", "countdown-tiny"], "named twice"),
        (["--json", "no/such/folder/out.json"], "make it first"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_before_any_work(flags, said, capsys):
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_reward_without_an_answer_is_refused(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from data_types import Reward\nfrom math_task import ArithmeticTask\n\n\nclass Mine(ArithmeticTask):\n"
        "    def reward(self, problem, response):\n        return Reward(1.0, {'style': 1.0})\n"
    )
    flags = ["--task", f"{tmp_path}/mine.py:Mine", "--eval-problems", "2", "--samples", "1", "--max-new-tokens", "2"]
    assert main(flags) == 2
    assert "has no part 'answer'" in capsys.readouterr().err
