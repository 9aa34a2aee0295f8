"""The figure and the table of one recipe over several seeds, from the metrics of its runs.

    for s in 0 1 2; do python train.py --seed $s --run-dir runs/tiny-$s; done
    python docs/figures.py countdown-tiny runs/tiny-0 runs/tiny-1 runs/tiny-2 --problems 512
    python docs/figures.py countdown-tiny docs/results/countdown-tiny/seed-{0,1,2}.jsonl --problems 512   # draw again

Writes docs/results/<name>.png. From folders of runs, it also copies the raw metrics beside it (<name>/seed-N.jsonl) and
prints a table. The last line is JSON with the first and last evaluation of every run, minutes, hardware and commit.

Held-out panels have one point per evaluation, with its 95% Wilson interval for `--problems` problems of one response
each. Training panels have means over the last ten steps. A panel that is 0 everywhere is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from study.intervals import wilson_interval  # noqa: E402

RESULTS = ROOT / "docs" / "results"
HELD_OUT = {  # title -> metric of an evaluation
    "held out: solved, sampled": "eval_solved",
    "held out: solved, greedy": "eval_greedy_solved",
    "held out: whole format, sampled": "eval_full_format",
    "held out: share of false sums": "eval_false_sums",
}
TRAINING = {  # title -> metric of a training step
    "training: reward": "reward",
    "training: tokens per response": "completions/mean_length",
    "training: entropy, nats": "entropy",
    "training: groups without a gradient": "frac_reward_zero_std",
}
SHARES = ("eval_solved", "eval_greedy_solved", "eval_full_format")  # of problems: these have an interval
SMOOTH = 10  # steps averaged in the training curves
TABLE = [
    "eval_solved",
    "eval_greedy_solved",
    "eval_full_format",
    "eval_greedy_full_format",
    "eval_format",
    "eval_greedy_format",
    "eval_false_sums",
    "eval_mean_length",
]
Records = list[dict]


def read(run: Path) -> Records:
    """The lines of a run's folder, or of a raw file."""
    file = run / "metrics.jsonl" if run.is_dir() else run
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def series(records: Records, name: str, smooth: int = 1) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, each value the mean of the last `smooth` ones."""
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    values = [v for _, v in points]
    means = [sum(values[max(0, i - smooth + 1) : i + 1]) / min(i + 1, smooth) for i in range(len(values))]
    return [step for step, _ in points], means


def measured(runs: dict[str, Records], name: str) -> bool:
    """Whether every run has the metric (older runs lack newer ones), and it is not 0 throughout."""
    values = [[r[name] for r in records if r.get(name) is not None] for records in runs.values()]
    return all(values) and any(any(v) for v in values)


def draw(runs: dict[str, Records], path: Path, problems: int | None = None) -> None:
    """One panel per metric, one colour per run."""
    panels = {title: name for title, name in {**HELD_OUT, **TRAINING}.items() if measured(runs, name)}
    columns = (len(panels) + 1) // 2
    figure, axes = plt.subplots(2, columns, figsize=(3.6 * columns, 6.2), layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, name) in zip(axes.flat, panels.items()):
        for colour, (label, records) in enumerate(runs.items()):
            draw_run(axis, records, name, f"C{colour}", label, problems)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=9)
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8, loc="lower right")
    figure.suptitle(caption(runs, problems), fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def draw_run(axis, records: Records, name: str, colour: str, label: str, problems: int | None) -> None:
    """A line through smoothed training steps. Points for evaluations, joined only if there are more than two."""
    if not name.startswith("eval"):
        axis.plot(*series(records, name, SMOOTH), color=colour, label=label)
        return
    steps, values = series(records, name)
    style = {"color": colour, "linestyle": "-" if len(steps) > 2 else "none", "marker": "o", "markersize": 3}
    if problems is None or name not in SHARES:
        axis.plot(steps, values, label=label, **style)
        return
    pairs = [wilson_interval(value * problems, problems) for value in values]
    below, above = ([abs(pair[side] - value) for pair, value in zip(pairs, values)] for side in (0, 1))
    axis.errorbar(steps, values, yerr=[below, above], label=label, elinewidth=0.8, capsize=2, **style)


def caption(runs: dict[str, Records], problems: int | None) -> str:
    one = "one line per run (seed)" if len(runs) > 1 else "one run, one seed"
    bars = f", {problems} problems; bars: 95% Wilson interval" if problems else ""
    return f"{one}; held out: one response per problem{bars}; training: mean of the last {SMOOTH} steps"


def report(runs: dict[str, Records]) -> tuple[list[str], dict[str, dict]]:
    """Lines of a Markdown table from the first and the last evaluation of every run, and the same as numbers."""
    summary = {}
    names = [name for name in TABLE if measured(runs, name)]
    lines = ["| run | " + " | ".join(names) + " | minutes of steps |", "|---" * (len(names) + 2) + "|"]
    for label, records in runs.items():
        evaluations = [r for r in records if "eval_solved" in r]
        first, last = evaluations[0], evaluations[-1]
        minutes = sum(r.get("step_time") or 0 for r in records) / 60
        cells = [f"{first[key]:.3f} -> {last[key]:.3f}" for key in names]
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {minutes:.1f} |")
        summary[label] = {key: [first[key], last[key]] for key in names} | {"minutes": minutes, "steps": last["step"]}
    return lines, summary


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the figure in docs/results")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or raw files")
    parser.add_argument("--problems", type=int, help="held-out problems of an evaluation")
    asked = parser.parse_args(argv)
    for run in asked.runs:
        if not run.exists():
            parser.error(f"{run} does not exist; expected a run's folder, or a file of its metrics")
    runs = {run.stem: read(run) for run in asked.runs}
    for number, run in enumerate(asked.runs):
        if run.is_dir():
            (RESULTS / asked.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(run / "metrics.jsonl", RESULTS / asked.name / f"seed-{number}.jsonl")
    draw(runs, RESULTS / f"{asked.name}.png", asked.problems)
    lines, summary = report(runs)
    print("\n".join(lines))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    hardware = {"cpu": cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__, "commit": commit}
    print(json.dumps({"name": asked.name, "runs": summary, "hardware": hardware}))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
