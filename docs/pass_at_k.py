"""The figure of docs/sharpening.md: pass@k of the bundled model before and after training, k from 1 to 128.

    for s in 0 1 2; do python train.py --seed $s --run-dir runs/tiny-$s; done
    python evaluate.py --config configs/countdown-tiny.yaml --samples 128 --eval-problems 256 --ckpt countdown-tiny \\
        --after runs/tiny-0/checkpoints/step-000075 --json docs/results/pass-at-128/seed-0.json
    python docs/pass_at_k.py            # writes docs/results/pass-at-128.png and prints its table

Every file in docs/results/pass-at-128 is one output of evaluate.py. All checkpoints are evaluated on the same problems.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
BEFORE = "countdown-tiny"
Interval = dict[str, float]  # value, low, high


def read(folder: Path = RESULTS / "pass-at-128") -> tuple[dict[str, Interval], dict[str, dict[str, Interval]]]:
    """pass@k of the model before, and of every run `tiny-N`: the differences to it, with paired 95% intervals.

    Both map a metric such as `pass@8` to its interval. Raises ValueError if two files disagree about the model before.
    """
    before: dict[str, Interval] = {}
    gains: dict[str, dict[str, Interval]] = {}
    for file in sorted(folder.glob("*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        found = {k: v for k, v in report["results"][BEFORE].items() if k.startswith("pass@")}
        if before and found != before:
            raise ValueError(f"{file} has other numbers for {BEFORE} than the files before it")
        before = found
        for pair, differences in report["differences"].items():
            gains[pair.split("/")[1]] = {k: differences[k] for k in found}
    return before, gains


def draw(before: dict[str, Interval], gains: dict[str, dict[str, Interval]], path: Path) -> None:
    """Left: pass@k. Right: the difference to the model before, with its interval."""
    ks = [int(name.removeprefix("pass@")) for name in before]
    figure, (level, gain) = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    level.plot(ks, [before[f"pass@{k}"]["value"] for k in ks], "o-", color="black", markersize=3, label="before")
    for i, (run, differences) in enumerate(gains.items()):
        values, lows, highs = ([differences[f"pass@{k}"][x] for k in ks] for x in ("value", "low", "high"))
        after = [before[f"pass@{k}"]["value"] + value for k, value in zip(ks, values)]
        label = f"after, seed {run.removeprefix('tiny-')}"
        level.plot(ks, after, "o-", color=f"C{i}", markersize=3, label=label)
        gain.plot(ks, values, "o-", color=f"C{i}", markersize=3)
        gain.fill_between(ks, lows, highs, color=f"C{i}", alpha=0.15, linewidth=0)
    gain.axhline(0, color="black", linewidth=0.8)
    level.set(title="pass@k", ylim=(0, 1))
    gain.set(title="after - before, paired 95% interval")
    level.legend(fontsize=8, loc="lower right")
    for axis in (level, gain):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, ks)
        axis.set_xlabel("k")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def table(before: dict[str, Interval], gains: dict[str, dict[str, Interval]]) -> list[str]:
    """Lines of a Markdown table: a row per k, a column per run with the difference and its interval."""
    lines = ["| k | before | " + " | ".join(gains) + " |", "|---" * (len(gains) + 2) + "|"]
    for name, level in before.items():
        cells = [f"{g[name]['value']:+.3f} [{g[name]['low']:+.3f}, {g[name]['high']:+.3f}]" for g in gains.values()]
        lines.append(f"| {name.removeprefix('pass@')} | {level['value']:.3f} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    model_before, runs = read()
    draw(model_before, runs, RESULTS / "pass-at-128.png")
    print("\n".join(table(model_before, runs)))
