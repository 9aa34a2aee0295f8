"""Methods side by side on the bundled model: one sweep is a few variants, the same budget for each, several seeds.

    python benchmarks/compare.py losses  # runs the missing ones, writes table and figure
    python benchmarks/compare.py group-size --seeds 0 --jobs 2 # two at a time, a thread each
    python benchmarks/compare.py losses --report               # table and figure of the runs that are there

A run is `python train.py` with the flags printed before it, in a folder under runs/compare that is named by them and
the seed. A finished run is not run again, and sweeps share the runs that they have in common. Writes
docs/results/SWEEP.png and docs/results/SWEEP.jsonl (every evaluation, and a few metrics of every step), and prints the
table: means over the seeds, and the range. Last line: JSON with the hardware.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from common import ROOT, hardware

RUNS = ROOT / "runs" / "compare"
RESULTS = ROOT / "docs" / "results"
# Two updates a rollout: with one, every ratio is 1, nothing is clipped, and most losses have one and the same gradient.
UNJUDGED = "--arithmetic-weight 0"  # false sums cost nothing, unless that is what is compared
TWICE = f"{UNJUDGED} --steps 40 --updates-per-rollout 2 --eval-every 10"
ONCE = f"{UNJUDGED} --steps 75 --eval-every 25"
FOUR = f"{UNJUDGED} --steps 25 --updates-per-rollout 4 --eval-every 5"
SWEEPS: dict[str, dict[str, str]] = {
    "losses": {
        "dapo": f"{TWICE} --loss-type dapo",
        "grpo": f"{TWICE} --loss-type grpo",
        "dr_grpo": f"{TWICE} --loss-type dr_grpo --advantage-scale none",
        "gspo": f"{TWICE} --loss-type gspo --epsilon-low 3e-4 --epsilon-high 4e-4",
        "cispo": f"{TWICE} --loss-type cispo",
        "sapo": f"{TWICE} --loss-type sapo",
    },
    # 256 answers a step in all of them
    "group-size": {
        "128 groups of 2": f"{ONCE} --prompts-per-step 128 --group-size 2",
        "64 groups of 4": f"{ONCE} --prompts-per-step 64 --group-size 4",
        "32 groups of 8": ONCE,
        "16 groups of 16": f"{ONCE} --prompts-per-step 16 --group-size 16",
    },
    "learning-rate": {
        "lr 6.7e-5": f"{ONCE} --lr 6.7e-5",
        "lr 2e-4": ONCE,
        "lr 6e-4": f"{ONCE} --lr 6e-4",
    },
    "scaling": {
        "advantage / group's deviation": ONCE,
        "advantage / batch's deviation": f"{ONCE} --advantage-scale batch",
        "advantage as it is": f"{ONCE} --advantage-scale none",
    },
    "honesty": {
        "false sums cost nothing": ONCE,
        "a thought with one costs 0.1": "--steps 75 --eval-every 25 --arithmetic-weight 0.1",
        "a thought with one costs 0.3": "--steps 75 --eval-every 25 --arithmetic-weight 0.3",
    },
    # every method that is offered under a name (docs/papers.md)
    "methods": {
        "grpo": TWICE,
        "rloo": f"{TWICE} --advantage-estimator rloo --advantage-scale none",
        "reinforce_pp": f"{TWICE} --advantage-estimator reinforce_pp --advantage-scale batch",
        "opo": f"{TWICE} --advantage-estimator opo --advantage-scale none",
        "maxrl": f"{TWICE} --advantage-estimator maxrl",
        "gdpo": f"{TWICE} --advantage-estimator gdpo",
        "pass@4": f"{TWICE} --advantage-estimator pass_at_k --pass-k 4",
        "groups of 2": f"{TWICE} --prompts-per-step 128 --group-size 2",
        "off-policy mask": f"{TWICE} --off-policy-threshold 0.1",
        "sampling mask": f"{TWICE} --top-k 50 --top-p 0.95 --keep-sampling-mask",
        "top-p, no mask": f"{TWICE} --top-k 50 --top-p 0.95",
        "truncated importance": f"{TWICE} --importance-correction truncate_token",
        "masked importance": f"{TWICE} --importance-correction mask_sequence",
        "top 20% entropy": f"{TWICE} --top-entropy-share 0.2",
    },
    # how much of the gain is due to the reward
    "controls": {
        "the task's reward": ONCE,
        "the form only": f"{ONCE} --answer-weight 0 --format-weight 1",
        "a random reward": f"{ONCE} --random-reward 0.5",
    },
    # how many numbers are trained; benchmarks/update_size.py has two more ways
    "update-size": {
        "all weights": ONCE,
        "LoRA, rank 32": f"{ONCE} --lora-rank 32 --lr 2e-3",
        "LoRA, rank 8": f"{ONCE} --lora-rank 8 --lr 2e-3",
        "LoRA, rank 1": f"{ONCE} --lora-rank 1 --lr 2e-3",
    },
    "clipping": {
        "4 updates, clipped": FOUR,
        "4 updates, not clipped": f"{FOUR} --epsilon-low 1 --epsilon-high 1e9",
    },
}
KEPT = [  # metrics of a training step that the raw file keeps
    "reward", "solved", "entropy", "completions/mean_length", "frac_reward_zero_std", "clip_ratio/low_mean",
    "clip_ratio/high_mean", "ratio/max", "grad_norm", "false_sums",
]  # fmt: skip
TABLE = {"eval_solved": "solved, sampled", "eval_greedy_solved": "solved, greedy", "eval_format": "format reward",
         "eval_false_sums": "false sums", "eval_mean_length": "tokens an answer"}  # fmt: skip


def run(variant: str, flags: str, seed: int, threads: int) -> None:
    folder = run_folder(flags, seed)
    if finished(flags, seed):
        return
    command = [sys.executable, "train.py", *flags.split(), "--seed", str(seed), "--run-dir", str(folder)]
    command += ["--save-every", "0", "--log-samples", "0"]
    print("running", " ".join(command[1:]), flush=True)
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{variant}, seed {seed}, ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")


def run_folder(flags: str, seed: int) -> Path:
    return RUNS / f"{flags.replace('--', '').replace(' ', '-')}-seed-{seed}"


def finished(flags: str, seed: int) -> bool:
    """Whether the run has its last evaluation. An unfinished run may end with an earlier one."""
    words = flags.split()
    steps = int(words[words.index("--steps") + 1])
    records = read(run_folder(flags, seed))
    return bool(records) and records[-1]["step"] == steps and "eval_solved" in records[-1]


def read(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def collect(sweep: str, seeds: list[int]) -> dict[str, dict[int, list[dict]]]:
    """variant -> seed -> the lines of the run, shortened to the numbers of the report."""
    found: dict[str, dict[int, list[dict]]] = {}
    for variant, flags in SWEEPS[sweep].items():
        for seed in seeds:
            records = read(run_folder(flags, seed))
            if finished(flags, seed):
                keep = [{k: short(v) for k, v in r.items() if k in ("step", *KEPT) or k in TABLE} for r in records]
                found.setdefault(variant, {})[seed] = keep
    return found


def short(value: float) -> float:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def evaluations(records: list[dict]) -> list[dict]:
    return [r for r in records if "eval_solved" in r]


def table(runs: dict[str, dict[int, list[dict]]]) -> str:
    lines = ["| | seeds | " + " | ".join(TABLE.values()) + " |", "|---" * (len(TABLE) + 2) + "|"]
    for variant, seeds in runs.items():
        cells = []
        for name in TABLE:
            first = mean(evaluations(r)[0][name] for r in seeds.values())
            last = [evaluations(r)[-1][name] for r in seeds.values()]
            form = ".0f" if name == "eval_mean_length" else ".3f"
            spread = f" ({min(last):{form}} to {max(last):{form}})" if len(last) > 1 else ""
            cells.append(f"{first:{form}} -> {mean(last):{form}}{spread}")
        lines.append(f"| {variant} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: dict[str, dict[int, list[dict]]], path: Path) -> None:
    """Means over the seeds, with the range as a band. Held-out panels show evaluations (512 problems, one response
    each), and training panels means over the last 5 steps. A panel that is 0 throughout is left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"held out: solved, sampled": "eval_solved", "held out: solved, greedy": "eval_greedy_solved",
              "held out: share of false sums": "eval_false_sums", "training: entropy, nats": "entropy",
              "training: tokens per response": "completions/mean_length",
              "training: share of tokens clipped": "clipped"}  # fmt: skip
    every = [list(seeds.values()) for seeds in runs.values()]
    panels = {t: n for t, n in panels.items() if any(any(map(any, curves(records, n)[1])) for records in every)}
    figure, axes = plt.subplots(2, 3, figsize=(11.5, 6.2), layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, name) in zip(axes.flat, panels.items()):
        for variant, seeds in runs.items():
            steps, rows = curves(list(seeds.values()), name)
            axis.plot(steps, [mean(values) for values in rows], label=variant)
            axis.fill_between(steps, [min(v) for v in rows], [max(v) for v in rows], alpha=0.15, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    seeds = sorted({seed for variant in runs.values() for seed in variant})
    text = f"seeds {', '.join(map(str, seeds))}: mean, and range as a band" if len(seeds) > 1 else f"seed {seeds[0]}"
    figure.suptitle(f"{text}; held out: one response per problem; training: mean of the last 5 steps", fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def curves(runs: list[list[dict]], name: str) -> tuple[list[int], list[list[float]]]:
    """Steps, and at each the value in every run."""
    columns = []
    for records in runs:
        if name == "clipped":
            records = [
                r | {name: r["clip_ratio/low_mean"] + r["clip_ratio/high_mean"]}
                for r in records
                if "clip_ratio/low_mean" in r
            ]
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        window = 1 if name.startswith("eval") else 5
        values = [v for _, v in points]
        columns.append([mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))])
        steps = [step for step, _ in points]
    return steps, [list(row) for row in zip(*columns)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads a run")
    parser.add_argument("--report", action="store_true", help="run nothing; report what is there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the figure and the raw file")
    asked = parser.parse_args()
    if not asked.report:
        with ThreadPoolExecutor(asked.jobs) as pool:
            jobs = [
                pool.submit(run, variant, flags, seed, asked.threads)
                for seed in asked.seeds
                for variant, flags in SWEEPS[asked.sweep].items()
            ]
            for job in jobs:
                job.result()
    runs = collect(asked.sweep, asked.seeds)
    if not runs:
        sys.exit(f"no finished run of {asked.sweep} in {RUNS}; leave --report out to make them")
    asked.out.mkdir(parents=True, exist_ok=True)
    flags = {variant: f"python train.py {SWEEPS[asked.sweep][variant]}" for variant in runs}
    lines = [json.dumps({"variant": v, "seed": s, "records": r}) for v, seeds in runs.items() for s, r in seeds.items()]
    (asked.out / f"{asked.sweep}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(runs, asked.out / f"{asked.sweep}.png")
    print(table(runs))
    print(json.dumps({"sweep": asked.sweep, "commands": flags, "hardware": hardware()}))


if __name__ == "__main__":
    main()
