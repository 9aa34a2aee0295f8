"""Every content of a run's files is read, left out with a note, or refused in one line. Never a traceback."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_fixtures import EVIL, sample, write_run

import report
from study.run_files import is_number, read_run

VALUES: list[Any] = [
    None, True, False, 0, -1, 1.5, 10**18, 2**53, 10**400, 1e308, -1e308, math.nan, math.inf, "", "x", "1", EVIL,
    "\x00", "\ud800", "a" * 10_000, [], [1], ["x"], [[]], [None] * 3, [1e999], {}, {"a": 1},
    {"answer": "x"}, {"answer": {}}, {"": None},
]  # fmt: skip
KEYS = ["extra", EVIL, "__proto__", "eval_solved", "rewards/x/mean"]
FILES = ["metrics.jsonl", "samples.jsonl", "samples.jsonl", "held_out.jsonl", "machine.json", "config.yaml"]


def changes_of(record: Any, rng: random.Random) -> Any:
    """The record with one value, at any depth, replaced, left out, or with a new neighbour."""
    if isinstance(record, dict) and record and rng.random() < 0.9:
        key = rng.choice(list(record))
        kind = rng.random()
        if kind < 0.1:
            return {k: v for k, v in record.items() if k != key}
        if kind < 0.2:
            return record | {
                rng.choice(["extra", EVIL, "__proto__", "eval_solved", "rewards/x/mean"]): rng.choice(VALUES)
            }
        return record | {key: changes_of(record[key], rng)}
    if isinstance(record, list) and record and rng.random() < 0.7:
        i = rng.randrange(len(record))
        return [*record[:i], changes_of(record[i], rng), *record[i + 1 :]]
    return rng.choice(VALUES)


def change_one(folder: Path, rng: random.Random) -> str:
    """Change one value in one file of the run. Which file."""
    name = rng.choice(
        ["metrics.jsonl", "samples.jsonl", "samples.jsonl", "held_out.jsonl", "machine.json", "config.yaml"]
    )
    path = folder / name
    if name == "config.yaml":
        changed = changes_of(yaml.safe_load(path.read_text()), rng)
        path.write_text(json.dumps(changed) if rng.random() < 0.5 else yaml.safe_dump(changed))
        return name
    lines = path.read_text().splitlines()
    i = rng.randrange(len(lines))
    lines[i] = json.dumps(changes_of(json.loads(lines[i]), rng))
    if rng.random() < 0.1:
        lines[i] = lines[i][: rng.randrange(len(lines[i]) + 1)]
    path.write_text("\n".join(lines) + "\n" * (rng.random() < 0.9))
    return name


@pytest.mark.parametrize("seed", range(20))
def test_one_changed_value_never_ends_in_a_traceback(tmp_path, capsys, seed, monkeypatch):
    """1,000 changes: exit code 0 and a page of valid JSON, or exit code 2. On standard error only single lines."""
    monkeypatch.setattr(report.plotly.offline, "get_plotlyjs", lambda: "")  # 4.8 MB that this test does not need
    rng = random.Random(seed)
    for i in range(50):
        folder = write_run(tmp_path / f"run-{i}")
        file = change_one(folder, rng)
        code = report.main([str(folder)])
        said = capsys.readouterr().err
        assert code in (0, 2), file
        assert said.count("\n") == 1 if code == 2 else not said or said.count("\n") == len(said.splitlines())
        assert all(line.startswith("report.py: ") for line in said.splitlines()), said
        assert "\x1b" not in said
        if code == 0:
            page = (folder / "report.html").read_text(encoding="utf-8")
            start = page.index('id="data" type="application/json">') + len('id="data" type="application/json">')
            json.loads(page[start : page.index("</script>", start)], parse_constant=pytest.fail)


def test_a_setting_beyond_floating_point_is_refused_in_one_line(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    (folder / "config.yaml").write_text(f"prompts_per_step: {10**400}\n")
    assert report.main([str(folder)]) == 2
    assert "expected 1 or more, at most 2147483647\n" in capsys.readouterr().err


@pytest.mark.parametrize("value", [True, None, "1", [], math.nan, math.inf, 10**400, -(10**400)])
def test_what_is_no_number(value):
    assert not is_number(value)


def test_lines_and_values_of_a_wrong_type_are_left_out_and_counted(tmp_path):
    metrics = [{"step": 1, "reward": "x", "entropy": 1.0}, {"step": 2, "reward": 0.5}, {"step": "3"}]
    metrics.append({"step": 4, "reward": []})
    samples = [sample(1, 1, 0), sample(1, 1, 1) | {"reward": "x"}, sample(1, 1, 1) | {"tokens": ["one"]}]
    run = read_run(write_run(tmp_path / "a", metrics=metrics, samples=samples))
    assert run.metrics["reward"].dropna().to_dict() == {2: 0.5}
    assert run.metrics["entropy"].dropna().to_dict() == {1: 1.0}
    assert ["tokens" in s for s in run.samples] == [True, False]
    assert run.notes == [
        "metrics.jsonl: 1 line was left out (line 3: step is '3', expected a whole number of 0 or more)",
        "metrics.jsonl: 2 values were left out (line 1: reward is 'x', expected a number or null)",
        "samples.jsonl: 1 line was left out (line 2: reward is 'x', expected a number or null)",
        "samples.jsonl: 1 value was left out (line 3: the lists by token have lengths {'tokens': 1, 'token_ids': 2, "
        "'token_logprobs': 2}, expected equal ones)",
    ]


def test_a_broken_line_in_the_middle_does_not_hide_the_lines_after_it(tmp_path):
    folder = write_run(tmp_path / "a")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:20], lines[2]]) + "\n")
    run = read_run(folder)
    assert run.metrics.index.tolist() == [0, 2]
    assert run.notes == ["metrics.jsonl: 1 line was left out (line 2: it is not JSON)"]


def test_the_steps_come_in_their_order_and_each_once(tmp_path):
    metrics = [{"step": 2, "reward": 0.2}, {"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.3}]
    run = read_run(write_run(tmp_path / "a", metrics=metrics))
    assert run.metrics["reward"].to_dict() == {1: 0.1, 2: 0.3}
    assert run.metrics.index.tolist() == [1, 2]


def test_a_run_that_is_killed_in_the_middle_of_a_line(tmp_path):
    folder = write_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    run = read_run(folder)
    assert run.metrics.index.tolist() == [0, 1, 2]
    assert not run.notes
