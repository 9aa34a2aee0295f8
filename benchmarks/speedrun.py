"""Check a speedrun and say its time: docs/speedrun.md has the rules, recipes/speedrun.sh makes the runs.

    python benchmarks/speedrun.py runs/speedrun-0 runs/speedrun-1 runs/speedrun-2

Reads config.yaml and metrics.jsonl of the three runs, refuses runs that break the rules, evaluates the last checkpoint
of each on the fixed held-out problems, and prints the table. The time of a run is the sum of its steps (rollout and
update). Evaluations and loading are not counted. An evaluation is kept beside its run and not repeated. The last line
is JSON with the hardware. Exit code 1: a rule is broken, or the goal is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import compare
from common import hardware

from evaluate import evaluate_checkpoint
from run.config import Config, load_config

GOAL, SEEDS, PROBLEMS, SAMPLES = 0.60, 3, 512, 8
START = "countdown-tiny"
# The problems and the sampling of the evaluation: pinned here, so that a change of the preset does not change them.
TEST = Config(
    ckpt=START, task="countdown", numbers=(3, 4), min_number=1, max_number=25, prompt_style="short", seed=0,
    max_new_tokens=192, temperature=1.0, eval_problems=PROBLEMS, dtype="fp32", device="cpu",
)  # fmt: skip


class Run(NamedTuple):
    folder: Path
    config: Config
    seconds: float  # sum of the steps

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / f"step-{self.config.steps:06d}"


def read_run(folder: Path) -> Run:
    """A finished run of the bundled model. Raises ValueError for one that breaks a rule."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is no run folder, it has no config.yaml")
    config = load_config(folder / "config.yaml")
    if config.ckpt != START:
        raise ValueError(f"{folder} starts from {config.ckpt}: a speedrun starts from {START}")
    times = [(r["step"], r.get("step_time")) for r in compare.read(folder) if r["step"] > 0]
    if [step for step, _ in times] != list(range(1, config.steps + 1)):
        raise ValueError(f"{folder}: metrics.jsonl has {len(times)} steps, expected 1 to {config.steps}, each once")
    bad = [step for step, time in times if not isinstance(time, float) or not 0 < time < math.inf]
    if bad:
        raise ValueError(f"{folder}: step {bad[0]} has no time")
    run = Run(folder, config, sum(time for _, time in times))
    if not run.checkpoint.is_dir():
        raise ValueError(f"{folder}: the checkpoint of its last step is missing: {run.checkpoint}")
    return run


def check_together(runs: Sequence[Run]) -> None:
    """Raises ValueError if these are not three seeds of one recipe."""
    seeds = sorted({run.config.seed for run in runs})
    if len(runs) != SEEDS or len(seeds) != SEEDS:
        raise ValueError(f"found {len(runs)} runs of the seeds {seeds}, expected {SEEDS} runs of different seeds")
    recipes = [dataclasses.replace(run.config, seed=0, run_dir=None, resume=None) for run in runs]
    for run, recipe in zip(runs, recipes):
        for field in dataclasses.fields(Config):
            mine, first = getattr(recipe, field.name), getattr(recipes[0], field.name)
            if mine != first:
                raise ValueError(
                    f"{run.folder} has {field.name} {mine}, and {runs[0].folder} has {first}: not one recipe"
                )


def evaluated(run: Run, evaluate: Callable[[Path], float]) -> float:
    """Solve rate of the last checkpoint, sampled. Kept in the run's folder."""
    kept = run.folder / "speedrun.json"
    if kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["checkpoint"] == run.checkpoint.name:
            return found["solved"]
    solved = evaluate(run.checkpoint)
    kept.write_text(json.dumps({"checkpoint": run.checkpoint.name, "solved": solved}) + "\n", encoding="utf-8")
    return solved


def solve_rate(checkpoint: Path) -> float:
    return evaluate_checkpoint(TEST, str(checkpoint), SAMPLES).results["pass@1"]["value"]


def main(argv: Sequence[str] | None = None, evaluate: Callable[[Path], float] = solve_rate) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    try:
        runs = [read_run(folder) for folder in parser.parse_args(argv).runs]
        check_together(runs)
    except ValueError as error:
        print(f"speedrun.py: {error}", file=sys.stderr)
        return 1
    solved = [evaluated(run, evaluate) for run in runs]
    for run, share in zip(runs, solved):
        print(f"seed {run.config.seed}: {run.config.steps} steps in {run.seconds:.1f} s, solved {share:.3f}")
    seconds, mean, passed = fmean(run.seconds for run in runs), fmean(solved), fmean(solved) >= GOAL
    print(f"mean: {seconds:.1f} s, solved {mean:.3f}; goal {GOAL:.2f}: {'reached' if passed else 'missed'}")
    result = {"seconds": round(seconds, 1), "solved": mean, "by_seed": solved, "passed": passed}
    print(json.dumps({"results": result, "hardware": hardware()}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
