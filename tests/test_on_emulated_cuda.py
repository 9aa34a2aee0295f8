"""Whole runs on the emulated CUDA device: the metrics are the CPU's, for every dtype and generation of cards.

A run is `train.py` itself: evaluation, rollout with graphs, update, optimizer, checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from emulated_cuda import EmulatedCuda

import train

SMALL = [
    "--steps",
    "2",
    "--prompts-per-step",
    "2",
    "--group-size",
    "3",
    "--max-new-tokens",
    "20",
    "--eval-problems",
    "2",
]
SMALL += ["--eval-every", "0", "--save-every", "1", "--lr", "1e-3"]
CARDS = {"T4": (7, 5), "A100": (8, 0), "H100": (9, 0)}
# Sums over many tokens agree to the rounding of one product; a token's log-probability to that of one logit.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.01}
COMPARED = ("reward", "entropy", "grad_norm", "completions/mean_length", "eval_reward", "eval_mean_length", "kl")


def run(folder: Path, *flags: str) -> list[dict]:
    assert train.main([*SMALL, *flags, "--run-dir", str(folder)]) == 0
    return metrics_of(folder)


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cpu_run(tmp_path_factory):
    """The metrics of a run on the CPU, once for each set of flags."""
    known: dict[tuple[str, ...], list[dict]] = {}

    def metrics(*flags: str) -> list[dict]:
        if flags not in known:
            known[flags] = run(tmp_path_factory.mktemp("cpu") / "run", "--device", "cpu", *flags)
        return known[flags]

    return metrics


def assert_close(found: list[dict], expected: list[dict], dtype: str) -> None:
    assert len(found) == len(expected)
    for mine, reference in zip(found, expected, strict=True):
        for name in COMPARED:
            if name in reference:
                assert mine[name] == pytest.approx(reference[name], rel=TOLERANCE[dtype], abs=1e-4), name


RUNS = [(dtype, card) for dtype in ("fp32", "bf16") for card in CARDS if (dtype, card) != ("bf16", "T4")]


@pytest.mark.parametrize(("dtype", "card"), RUNS)
def test_a_run_has_the_metrics_of_the_cpu(dtype, card, cpu_run, tmp_path):
    flags = ["--dtype", dtype]
    with EmulatedCuda(CARDS[card]) as gpu:
        found = run(tmp_path / "run", "--device", "cuda", *flags)
    assert_close(found, cpu_run(*flags), dtype)
    assert gpu.replays > 0
