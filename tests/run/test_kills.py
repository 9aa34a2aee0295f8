"""Runs that are killed at random moments and resumed are the undisturbed run, bit for bit. Long ones do not grow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name: str, *words: object) -> dict:
    """Run a script of benchmarks/ in a process of its own. The results in its last line."""
    command = [sys.executable, BENCHMARKS / name, *words]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])["results"]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.long)])
def test_runs_killed_at_random_moments_resume_bit_for_bit(kills):
    """CHECKLIST 42, 43: SIGKILL in the start-up, in a step, inside a save, and again in the resumed run. Weights,
    masters, moments, random states, metrics, samples and TensorBoard events, with several updates a rollout, with
    and without adapters."""
    results = script("kills.py", "--kills", kills)
    for rank in (0, 2):
        result = results[f"lora_rank {rank}"]
        assert kills <= result["kills"] <= kills + 1
        assert result["bitwise_equal"] == result["runs"] >= kills // 2
        compared = {"model.safetensors", "optimizer.safetensors", "trainer_state.json", "metrics.jsonl", "TensorBoard"}
        assert compared <= set(result["compared"])
        assert rank == 0 or "adapter/adapter_model.safetensors" in result["compared"]
    if kills == 50:
        assert results["lora_rank 0"]["where"]["inside a save"] > 3


@pytest.mark.slow
def test_sixty_steps_leave_no_handles_threads_or_children_behind():
    results = script("soak.py", "--steps", 60)
    for what in ("file handles", "threads", "children"):
        assert results[what]["growth"] == 0, what
