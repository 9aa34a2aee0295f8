"""The program evaluate.py from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

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
        (["--samples", "x"], "--samples x: expected a whole number from 1"),
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


SHORT = ["--eval-problems", "2", "--samples", "1", "--max-new-tokens", "4"]


def test_json_is_printed_only_if_it_is_asked_for(capsys, tmp_path):
    assert main(["--ckpt", "countdown-tiny", *SHORT]) == 0
    assert "{" not in capsys.readouterr().out


def test_a_full_disk_does_not_lose_the_numbers(capsys, tmp_path):
    """CHECKLIST 43: they are printed before the file is written, and the exit code says that it is not there."""
    assert main(["--ckpt", "countdown-tiny", *SHORT, "--json", "/dev/full"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["problems"] == 2
    assert said.err == "evaluate.py: --json /dev/full could not be written (No space left on device); it is above\n"


def test_help_has_the_flags_of_an_evaluation_and_not_those_of_a_training(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    words = set(said.replace("=", " ").replace(",", " ").split())
    shown = {
        "--ckpt",
        "--after",
        "--samples",
        "--json",
        "--task",
        "--temperature",
        "--eval-problems",
        "--max-new-tokens",
    }
    assert shown <= words
    assert not {"--lr", "--save-every", "--lora-rank", "--resume", "--steps", "--run-dir", "--beta"} & words
    assert "Longest response" in said
    assert "Task and reward" in said


def test_names_with_brackets_and_escapes_are_shown_as_they_are(capsys, tmp_path, monkeypatch):
    """A checkpoint's folder may be called anything, and a table is no markup."""
    folder = tmp_path / "[bold]\x1b[2J[/nope]"
    shutil.copytree(Path(__file__).resolve().parent.parent / "assets/countdown-tiny", folder)
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["--ckpt", str(folder), "--task", "countdown", "--prompt-style", "short", *SHORT]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert r"[bold]\x1b[2J[/nope]" in said
