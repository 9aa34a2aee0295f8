"""Thousands of steps of a random two-layer model: does anything grow?

    python benchmarks/soak.py --steps 2000          # about five minutes on one core
    LRU_CACHE_CAPACITY=64 ONEDNN_PRIMITIVE_CACHE_CAPACITY=64 python benchmarks/soak.py --steps 300

The whole job as `train.main` runs it: rollout, rewards, updates, metrics, samples, TensorBoard, an evaluation and a
checkpoint now and then. At every step the resident memory, the open file handles, the threads and the children of the
process are noted. The differences between the second tenth of the run and its last are printed.

Resident memory grows while oneDNN, the library of torch's matrix products on a CPU, meets new shapes: it generates
machine code for each and keeps that of the last 1,024 twice over. The two variables bound these caches.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from pathlib import Path

import common
import torch
from random_run import QUICK, EvenLetters, write_checkpoint

import train
from run.run_log import RunLog

KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "MALLOC_ARENA_MAX")


def state_of_the_process() -> dict[str, float]:
    """Now: resident MiB, and how many file handles, threads and child processes there are."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "resident MiB": int(status["VmRSS"].split()[0]) / 1024,
        "file handles": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "children": len(children),
    }


def soak(steps: int, folder: Path, updates_per_rollout: int) -> list[dict[str, float]]:
    """Run it. Returns a record for each step."""
    records, log_step = [], RunLog.log_step

    def noting(log: RunLog, step: int, metrics: dict) -> None:
        log_step(log, step, metrics)
        if step:
            took = {"step ms": metrics["step_time"] * 1000, "whole step ms": (time.perf_counter() - began[-1]) * 1000}
            records.append(state_of_the_process() | took)
        began.append(time.perf_counter())

    began = [time.perf_counter()]
    RunLog.log_step = noting
    words = ["--ckpt", write_checkpoint(folder / "model"), "--run-dir", folder / "run", "--steps", steps, *QUICK]
    words += ["--max-new-tokens", 32, "--updates-per-rollout", updates_per_rollout, "--lr", 1e-4]
    words += ["--save-every", max(5, steps // 100), "--eval-every", max(5, steps // 100)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            code = train.main([str(word) for word in words])
    finally:
        RunLog.log_step = log_step
    if code != 0:
        raise RuntimeError(f"the run ended with exit code {code}")
    return records


def growth(records: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Medians of the second tenth of the steps (the first warms up) and of the last one."""
    tenth = max(1, len(records) // 10)
    early, late = records[tenth : 2 * tenth], records[-tenth:]
    table = {}
    for name in records[0]:
        a, b = (statistics.median(record[name] for record in part) for part in (early, late))
        table[name] = {"early": round(a, 2), "late": round(b, 2), "growth": round(b - a, 2)}
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--updates-per-rollout", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    train.task_from_config = lambda config: EvenLetters(seed=config.seed)
    with tempfile.TemporaryDirectory() as folder:
        table = growth(soak(args.steps, Path(folder), args.updates_per_rollout))
    print(common.table(("a step", "early", "late", "growth"), [(name, *row.values()) for name, row in table.items()]))
    caches = {name: os.environ.get(name, "default") for name in KERNEL_CACHES}
    common.print_json(args, table | {"caches": caches})


if __name__ == "__main__":
    main()
