"""The figure and the table of one recipe over several seeds, from the runs' metrics.jsonl.

    for s in 0 1 2; do python train.py --seed $s --run-dir runs/tiny-$s; done
    python docs/figures.py countdown-tiny runs/tiny-0 runs/tiny-1 runs/tiny-2

Writes docs/results/<name>.png and the raw metrics beside it (<name>/seed-N.jsonl), prints a table, and ends with a line
of JSON: the first and last evaluation of every run, wall-clock minutes, hardware and commit.
"""

from __future__ import annotations

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

RESULTS = Path(__file__).resolve().parent / "results"
PANELS = {  # title -> (metric of an evaluation, metric of a training step)
    "held-out problems solved, sampled": ("eval_solved", None),
    "held-out problems solved, greedy": ("eval_greedy_solved", None),
    "held-out answers in the whole format, sampled": ("eval_full_format", None),
    "reward": (None, "reward"),
    "tokens an answer": (None, "completions/mean_length"),
    "entropy": (None, "entropy"),
    "share of false sums": ("eval_false_sums", None),
    "share of groups without a gradient": (None, "frac_reward_zero_std"),
}
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


def read(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def series(records: list[dict], name: str, smooth: int = 1) -> tuple[list[int], list[float]]:
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    values = [v for _, v in points]
    means = [sum(values[max(0, i - smooth + 1) : i + 1]) / min(i + 1, smooth) for i in range(len(values))]
    return [step for step, _ in points], means


def measured(runs: dict[str, list[dict]], name: str) -> bool:
    """Whether every run has it: older ones lack the metrics that came later."""
    return all(any(r.get(name) is not None for r in records) for records in runs.values())


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    panels = {title: names for title, names in PANELS.items() if measured(runs, names[0] or names[1])}
    columns = (len(panels) + 1) // 2
    figure, axes = plt.subplots(2, columns, figsize=(3.6 * columns, 5.6), constrained_layout=True)
    axes.flat[-1].set_visible(len(panels) == 2 * columns)
    for axis, (title, (evaluation, training)) in zip(axes.flat, panels.items()):
        for label, records in runs.items():
            steps, values = series(records, evaluation or training, 1 if evaluation else SMOOTH)
            axis.plot(steps, values, marker="o" if evaluation else None, markersize=3, label=label)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=9)
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


def main(name: str, folders: list[Path]) -> None:
    runs = {folder.name: read(folder) for folder in folders}
    raw = RESULTS / name
    raw.mkdir(parents=True, exist_ok=True)
    for number, folder in enumerate(folders):
        shutil.copy(folder / "metrics.jsonl", raw / f"seed-{number}.jsonl")
    draw(runs, RESULTS / f"{name}.png")

    summary = {}
    names = [name for name in TABLE if measured(runs, name)]
    print("| run | " + " | ".join(names) + " | minutes of steps |")
    print("|---" * (len(names) + 2) + "|")
    for label, records in runs.items():
        evaluations = [r for r in records if "eval_solved" in r]
        first, last = evaluations[0], evaluations[-1]
        minutes = sum(r.get("step_time") or 0 for r in records) / 60
        cells = [f"{first[key]:.3f} -> {last[key]:.3f}" for key in names]
        print(f"| {label} | " + " | ".join(cells) + f" | {minutes:.1f} |")
        summary[label] = {key: [first[key], last[key]] for key in names} | {"minutes": minutes, "steps": last["step"]}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    hardware = {"cpu": cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__, "commit": commit}
    print(json.dumps({"name": name, "runs": summary, "hardware": hardware}))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], [Path(folder) for folder in sys.argv[2:]])
