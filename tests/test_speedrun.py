"""benchmarks/speedrun.py refuses runs that break the rules of docs/speedrun.md, and counts only steps."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from test_benchmarks import load

from run.config import parse_args, save_yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    return load("speedrun")


@pytest.fixture
def runs(tmp_path):
    """Three finished runs of two steps. A function that changes the configuration of the last one."""

    def write(seed: int, times=(1.5, 2.5), number=None, **changes) -> Path:
        folder = tmp_path / f"run-{seed}"
        (folder / "checkpoints/step-000002").mkdir(parents=True, exist_ok=True)
        config = parse_args(
            ["--steps", "2", "--seed", str(seed if number is None else number), "--run-dir", str(folder)]
        )
        save_yaml(dataclasses.replace(config, **changes), folder / "config.yaml")
        records = [{"step": 0, "eval_solved": 0.2}]
        records += [{"step": i + 1, "step_time": time + seed} for i, time in enumerate(times) if time]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return folder

    return write


def check(script, folders, capsys, rates=(0.6, 0.7, 0.5)) -> tuple[int, str, str]:
    given = iter(rates)
    code = script.main([str(folder) for folder in folders], evaluate=lambda checkpoint: next(given))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_time_is_the_sum_of_the_steps_and_the_goal_is_the_mean(script, runs, capsys):
    folders = [runs(seed) for seed in range(3)]
    code, out, _ = check(script, folders, capsys)
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert result["results"]["seconds"] == 6.0  # 4, 6 and 8
    assert result["results"]["solved"] == pytest.approx(0.6)
    assert "reached" in out
    assert {"cpu", "commit"} <= result["hardware"].keys()
    code, out, _ = check(script, folders, capsys, rates=())  # kept beside the runs: not evaluated again
    assert code == 0


def test_a_missed_goal_is_exit_code_1(script, runs, capsys):
    code, out, _ = check(script, [runs(seed) for seed in range(3)], capsys, rates=(0.6, 0.6, 0.59))
    assert code == 1
    assert "missed" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ckpt": "elsewhere"}, "starts from elsewhere"),
        ({"lr": 1.0}, "has lr 1.0, and .* not one recipe"),
        ({"number": 1}, r"seeds \[0, 1\], expected 3 runs of different seeds"),
        ({"steps": 3}, "metrics.jsonl has 2 steps, expected 1 to 3"),
        ({"times": (1.5, None)}, "metrics.jsonl has 1 steps, expected 1 to 2"),
        ({"times": (1.5, -4.0)}, "step 2 has no time"),
    ],
)
def test_a_broken_rule_is_refused(script, runs, capsys, changes, message):
    folders = [runs(0), runs(1), runs(2, **changes)]
    code, _, err = check(script, folders, capsys)
    assert code == 1
    assert re.search(message, err)
    assert not (folders[0] / "speedrun.json").exists()  # refused before time is spent


def test_two_runs_or_no_run_are_refused(script, runs, tmp_path, capsys):
    assert check(script, [runs(0), runs(1)], capsys)[0] == 1
    assert "no run folder" in check(script, [tmp_path / "none"], capsys)[2]
    folder = runs(2)
    (folder / "checkpoints/step-000002").rmdir()
    assert "the checkpoint of its last step is missing" in check(script, [runs(0), runs(1), folder], capsys)[2]


def test_the_test_is_that_of_the_rules(script):
    rules = (ROOT / "docs/speedrun.md").read_text(encoding="utf-8")
    assert f"at least .{script.GOAL * 100:.0f}" in rules
    assert (script.SEEDS, script.PROBLEMS, script.SAMPLES) == (3, 512, 8)
    preset = parse_args([])
    for name in (
        "ckpt",
        "task",
        "numbers",
        "min_number",
        "max_number",
        "prompt_style",
        "max_new_tokens",
        "temperature",
    ):
        assert getattr(script.TEST, name) == getattr(preset, name)


def test_the_board_has_measured_entries_only(script):
    """Each has its raw file in docs/results, with the same numbers."""
    board = (ROOT / "docs/speedrun.md").read_text(encoding="utf-8").split("## Board")[1].split("## ")[0]
    rows = [line.strip("| ").split(" | ") for line in board.splitlines() if re.match(r"\| \d", line)]
    raw = [json.loads(path.read_text().splitlines()[-1]) for path in (ROOT / "docs/results").glob("speedrun-*.json")]
    for row in rows:
        found = [r for r in raw if f"{r['results']['seconds']}" == row[0]]
        assert found, row
        assert found[0]["results"]["passed"]
        assert f"{found[0]['results']['solved']:.3f}" == row[1]


def test_a_checkpoint_is_evaluated_by_the_rules(script, monkeypatch):
    seen = []
    real = script.evaluate_checkpoint

    def small(config, ckpt, samples):
        seen.append((config, samples))
        return real(dataclasses.replace(config, eval_problems=2, max_new_tokens=8), ckpt, 1)

    monkeypatch.setattr(script, "evaluate_checkpoint", small)
    assert 0 <= script.solve_rate(ROOT / "assets/countdown-tiny") <= 1
    assert seen == [(script.TEST, 8)]
