"""Whoever reads standard output may go, as in `python train.py | head -1`: nothing is lost, and nobody complains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import SMALL, metrics_of, wait_for

from run.checkpoint import find_checkpoint, verify_checkpoint
from run.config import Config
from run.run_log import RunLog

ROOT = Path(__file__).resolve().parents[2]
TINY = [*SMALL, "--task", "arithmetic", "--entropy-coef", "0.01"]


def run_without_reader(*words: object, until: str | None = None) -> tuple[int, str]:
    """A program whose standard output is closed at once, or after a line with `until`. (exit code, standard error)"""
    command = [sys.executable, ROOT / words[0], *words[1:]]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        try:
            if until:
                wait_for(process, until)
            process.stdout.close()
            error = process.stderr.read()
            return process.wait(timeout=120), error
        finally:
            process.kill()


@pytest.mark.parametrize("until", [None, "a step takes"])
def test_a_run_goes_on_to_its_end_and_says_once_that_nobody_reads(checkpoint_folder, tmp_path, until):
    run_dir = tmp_path / "run"
    words = ["--ckpt", checkpoint_folder, "--run-dir", run_dir, "--steps", 30, "--save-every", 5, *TINY]
    code, error = run_without_reader("train.py", *words, until=until)
    assert code == 0, error
    assert "Traceback" not in error
    assert "Exception ignored" not in error
    told = [line for line in error.splitlines() if "standard output" in line]
    assert len(told) == 1 or (until and not told)  # a slow machine may close the pipe when all was said
    assert [row["step"] for row in metrics_of(run_dir)] == list(range(31))
    assert find_checkpoint("latest", run_dir).name == "step-000030"
    verify_checkpoint(find_checkpoint("latest", run_dir))

    code, error = run_without_reader("report.py", run_dir)
    assert (code, error) == (0, "")
    assert (run_dir / "report.html").stat().st_size > 100_000


def test_a_line_beside_the_display_may_be_the_first_that_nobody_reads(tmp_path, monkeypatch, capsys):
    """Of rich's, which would end the program."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout, RunLog(tmp_path / "run", Config(), total_steps=2) as log:
        monkeypatch.setattr(sys, "stdout", stdout)
        log.say("the run will last about a week")
        log.log_step(1, {"reward": 0.5})
        log.print_summary()
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1]
    assert capsys.readouterr().err.count("standard output not written: Broken pipe") == 1


def test_an_evaluation_is_written_to_its_file(checkpoint_folder, tmp_path):
    words = ["--ckpt", checkpoint_folder, *TINY, "--samples", 2, "--json", tmp_path / "found.json"]
    assert run_without_reader("evaluate.py", *words) == (0, "")
    assert "pass@2" in json.loads((tmp_path / "found.json").read_text())["results"][str(checkpoint_folder)]


@pytest.mark.parametrize("words", [["train.py", "--help"], ["explain.py", "--text"]])
def test_the_others_end_quietly(words):
    assert run_without_reader(*words) == (0, "")
