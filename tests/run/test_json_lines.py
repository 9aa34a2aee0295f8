"""A broken line costs itself and no other, wherever it is. A resume finds the order of the steps again."""

from __future__ import annotations

import itertools
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_train import SMALL, EvenLetters, metrics_of, run

import train
from run.json_lines import JsonLines, is_metrics, read_lines, rising
from run.run_log import read_metrics

BROKEN = [
    b'{"step": 2, "rew',
    b"",
    b"\x00" * 40,
    b"\xff\xfe",
    b"null",
    b"[2]",
    b'{"reward": 0.5}',
    b'{"step": "2"}',
    b'{"step": 2.5}',
    b'{"step": true}',
    b'{"step": null}',
    b'{"step": -1}',
    b'{"step": NaN}',
    b'{"step": 1' + b"0" * 5000 + b"}",
    b'{"step": 1000000}',
    b'{"step": 0, "reward": 9}',
    b"[" * 100_000,
    b'{"step": 2, "reward": "high"}',
    b'{"step": 2, "reward": [1]}',
    b'{"step": 2, "reward": 1' + b"0" * 400 + b"}",
]


def write(path, *lines: bytes, end: bytes = b"\n") -> None:
    path.write_bytes(b"\n".join(lines) + end)


def line(step: int) -> bytes:
    return json.dumps({"step": step, "reward": step / 4}).encode()


@pytest.mark.parametrize("broken", BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("at", [0, 3, 6], ids=["first", "inside", "last"])
@pytest.mark.parametrize("end", [b"\n", b""], ids=["", "cut"])
def test_the_valid_lines_around_a_broken_one_are_kept(tmp_path, broken, at, end):
    path, good = tmp_path / "metrics.jsonl", [line(step) for step in range(6)]
    write(path, *good[:at], broken, *good[at:], end=end)
    if broken not in (b'{"step": 1000000}', b'{"step": 0, "reward": 9}'):  # alone, such a line is whole
        assert read_lines(path, is_metrics) == [json.loads(text) for text in good]
    file = JsonLines(path, is_metrics, once=True)
    moved = (at == 6 and broken == b'{"step": 1000000}') or (at == 0 and broken == b'{"step": 0, "reward": 9}')
    assert file.truncate_after(4) == (0 if not broken or (moved and at) else 1)
    file.append({"step": 5, "reward": 0.0})
    file.close()
    steps = [json.loads(text)["step"] for text in path.read_bytes().splitlines()]
    assert steps == [0, 1, 2, 3, 4, 5]
    if broken and not moved:
        assert (tmp_path / "metrics.jsonl.broken").read_bytes() == broken + b"\n"
        assert path.read_bytes().splitlines()[:5] == good[:5]
    assert not list(tmp_path.glob(".*"))


def test_what_was_set_aside_before_stays(tmp_path):
    path = tmp_path / "samples.jsonl"
    for text in (b"one", b"two"):
        write(path, line(0), line(0), text, line(1), line(1), line(2))
        file = JsonLines(path)
        assert file.truncate_after(1) == 1
        file.close()
        assert path.read_bytes().splitlines() == [line(0), line(0), line(1), line(1)]
    assert (tmp_path / "samples.jsonl.broken").read_bytes() == b"one\ntwo\n"


def test_a_disk_that_fails_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write(path, line(0), b"broken", line(1), line(2))
    before = path.read_bytes()
    file = JsonLines(path)

    def fails(*args):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails)
            with pytest.raises(OSError, match="No space left"):
                file.truncate_after(1)
        assert path.read_bytes() == before
    file.append({"step": 3, "reward": 0.75})
    assert path.read_bytes() == before + line(3) + b"\n"


@given(st.lists(st.integers(0, 5), max_size=8), st.booleans())
def test_the_longest_rising_subsequence_by_trying_all(steps, once):
    def rises(indices) -> bool:
        chosen = [steps[i] for i in indices]
        return all(a < b or (a == b and not once) for a, b in itertools.pairwise(chosen))

    longest = max(
        size
        for size in range(len(steps) + 1)
        if any(rises(indices) for indices in itertools.combinations(range(len(steps)), size))
    )
    found = rising(steps, once)
    assert len(found) == longest
    assert rises(found)
    assert found == sorted(found)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "held_out.jsonl"])
def test_a_resume_keeps_the_lines_after_a_broken_one(checkpoint_folder, tmp_path, monkeypatch, capsys, name):
    """CHECKLIST 42: the run of six steps that was resumed after three has every line of the undisturbed run."""
    monkeypatch.setattr(train, "task_from_config", lambda config: EvenLetters(seed=config.seed))
    whole, mended = tmp_path / "whole", tmp_path / "mended"
    words = ["--ckpt", checkpoint_folder, "--steps", 4, "--save-every", 1, "--eval-every", 1, *SMALL]
    for run_dir in (whole, mended):
        assert run(*words, "--run-dir", run_dir) == 0
    content = (mended / name).read_bytes().splitlines(keepends=True)
    (mended / name).write_bytes(b"".join([content[0], b'{"step": 1, "re\n', *content[1:]]))
    assert run("--resume", mended / "checkpoints/step-000003") == 0
    assert "1 broken line" in capsys.readouterr().err
    assert metrics_of(mended) == metrics_of(whole)
    assert [record["step"] for record in read_metrics(mended)] == [0, 1, 2, 3, 4]
    for file in ("samples.jsonl", "held_out.jsonl"):
        assert (mended / file).read_bytes() == (whole / file).read_bytes()
