"""Kill a run at random moments, resume it, and compare every bit with an undisturbed run.

    python benchmarks/kills.py                      # 50 kills without adapters and 50 with: about a minute
    python benchmarks/kills.py --kills 4 --lora-rank 2

A trial is a run that gets SIGKILL at a random moment, is resumed, gets another, and is resumed to its end. Then its
last checkpoint (weights, fp32 masters, moments, every random state, adapters), metrics.jsonl, samples.jsonl and the
TensorBoard events must be those of the undisturbed run, to the byte. Only times and memory may differ.
Every third kill waits for a save to begin and comes a moment later.

The processes are real, but importing torch for each would take most of the time: this one imports everything, starts no
thread, and forks a child for each run.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads must not be forked

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import common
import torch
import torch._dynamo
import torch.utils.tensorboard
from random_run import QUICK, EvenLetters, write_checkpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from run.checkpoint import verify_checkpoint

STEPS = 4
FLAGS = [*QUICK, "--steps", str(STEPS), "--save-every", "1", "--eval-every", "2", "--dtype", "bf16"]
FLAGS += ["--updates-per-rollout", "2", "--temperature", "0.8", "--entropy-coef", "0.01", "--weight-decay", "0.1"]
FLAGS += ["--amsgrad", "--lr-schedule", "cosine", "--warmup-steps", "1", "--entropy-target", "4"]
TIMED = ("step_time", "tokens_per_second", "memory/peak_gib")
clock = time.time
forks = 0


def start(words: list[object], log: Path) -> int:
    """`train.py WORDS` in a child. Returns its process id."""
    global forks
    forks += 1
    pid = os.fork()
    if pid:
        return pid
    # TensorBoard reads a folder's files in the order of the second in their names; real runs start seconds apart.
    time.time = lambda: clock() + 2 * forks
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 1
    try:
        code = train.main([str(word) for word in words])
    finally:
        sys.stdout.flush()
        os._exit(code)


def finish(pid: int) -> int:
    """Wait for a child. Returns its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int, run_dir: Path, moment: float, in_save: bool) -> tuple[int, str]:
    """Kill a child after `moment` seconds, with `in_save` counted from the next save's begin. (exit code, where)"""
    until = time.monotonic() + 60
    while in_save and not list(run_dir.glob("checkpoints/.unfinished-step*")) and time.monotonic() < until:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.0002)
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)
    code = finish(pid)
    if not (run_dir / "checkpoints/latest").exists():
        return code, "before the first checkpoint was whole"
    return code, "inside a save" if list(run_dir.glob("checkpoints/.unfinished-*")) else "between saves"


def resume_or_begin(base: list[object], run_dir: Path) -> list[object]:
    """The command of a person: --resume, or the first command again if not even the settings were written."""
    return ["--resume", run_dir] if (run_dir / "config.yaml").exists() else [*base, "--run-dir", run_dir]


def outcome(run_dir: Path) -> dict[str, object]:
    """Everything that must be equal, by name."""
    last = run_dir / f"checkpoints/step-{STEPS:06d}"
    verify_checkpoint(last)
    files = {str(path.relative_to(last)): path for path in sorted(last.rglob("*")) if path.is_file()}
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    found: dict[str, object] = {name: path.read_bytes() for name, path in files.items()} | {"kept": kept}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found["metrics.jsonl"] = [{k: v for k, v in line.items() if not k.endswith(TIMED)} for line in lines]
    found["samples.jsonl"] = (run_dir / "samples.jsonl").read_bytes()
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.endswith(TIMED)]
    found["TensorBoard"] = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    return found


def trials(folder: Path, kills: int, lora_rank: int, seed: int) -> dict[str, object]:
    """Kill until `kills` of them came before the end of a run. Raises AssertionError where a resumed run differs."""
    rng, where, resumed = random.Random(seed), Counter(), 0
    base = ["--ckpt", write_checkpoint(folder / "model"), *FLAGS, "--lora-rank", lora_rank]
    base += ["--lora-dropout", 0.2] if lora_rank else []
    began = time.monotonic()
    whole, log = folder / "whole", folder / "log"
    assert finish(start([*base, "--run-dir", whole], log)) == 0, log.read_text()
    duration, expected = time.monotonic() - began, outcome(whole)
    assert [line["step"] for line in expected["metrics.jsonl"]] == list(range(STEPS + 1))
    while sum(where.values()) < kills:
        run_dir = folder / f"run-{resumed}"
        for _ in range(2):
            in_save = sum(where.values()) % 3 == 2
            moment = rng.uniform(0, 0.02) if in_save else duration * rng.random() ** 0.5  # most after the start-up
            code, place = kill(start(resume_or_begin(base, run_dir), log), run_dir, moment, in_save)
            where[place] += code == -signal.SIGKILL
        code = finish(start(resume_or_begin(base, run_dir), log))
        assert code == 0, f"the resumed run ended with {code}:\n{log.read_text()[-2000:]}"
        found = outcome(run_dir)
        differing = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        assert not differing, f"{run_dir} differs from the undisturbed run in {differing}"
        resumed += 1
    return {"kills": sum(where.values()), "where": dict(where), "runs": resumed, "bitwise_equal": resumed,
            "compared": sorted(expected), "seconds_a_run": round(duration, 2)}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="for each of the ranks (default: %(default)s)")
    parser.add_argument("--lora-rank", type=int, nargs="+", default=[0, 2], help="0: all weights (default: 0 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="leave the runs in this folder")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    train.task_from_config = lambda config: EvenLetters(seed=config.seed)
    results, began = {}, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        for rank in args.lora_rank:
            folder = (args.keep or Path(temporary)) / f"lora-{rank}"
            folder.mkdir(parents=True)
            results[f"lora_rank {rank}"] = result = trials(folder, args.kills, rank, args.seed)
            print(f"lora_rank {rank}: {result['kills']} kills in {result['runs']} runs, {result['where']}: "
                  "every resumed run is the undisturbed one, bit for bit")  # fmt: skip
    results["seconds"] = round(time.monotonic() - began, 1)
    common.print_json(args, results)


if __name__ == "__main__":
    main()
