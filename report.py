"""A run, or several side by side, as one page that needs no network.

    python report.py runs/NAME                       # writes runs/NAME/report.html
    python report.py runs/A runs/B --out compare.html
    python report.py runs/NAME --ratio               # also how much likelier the last checkpoint makes the samples
    python report.py runs/NAME --png FOLDER          # also a picture of every chart, drawn by matplotlib

Reads what a run leaves behind (config.yaml, metrics.jsonl, samples.jsonl, held_out.jsonl), also of a run that is still
going on or was killed in the middle of a line. The charts are plotly's, whose camera button saves a picture; its script
is in the page, and nearly all of its 4.9 MB.

The band around a share of solved problems is its 95% interval. Answers to one problem resemble one another, so they are
not independent. If samples.jsonl holds a whole step, `share_interval` of study/intervals.py takes the spread from
problem to problem. Otherwise (evaluations, a share of the samples) the interval is Wilson's for as many answers as
there are problems, which is a little wide if each problem was answered several times.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import jinja2
import plotly.offline
import torch
import yaml

from data_types import Episode
from run.checkpoint import find_checkpoint
from run.closed_pipe import reader_may_go
from run.config import Config, load_config
from run.pretrained import load_policy
from run.run_log import read_lines
from study.intervals import share_interval, wilson_interval
from tokenizer import Tokenizer
from update.scoring import score_episodes

PAGES = Path(__file__).resolve().parent / "study" / "pages"
GROUPS = 3  # sampled groups that are shown of the first step and of the last
CHARTS = {  # title -> metrics; what a run did not log is left out
    "Reward": ["reward", "eval_reward", "eval_greedy_reward"],
    "Solved": ["solved", "eval_solved", "eval_greedy_solved"],
    "Parts of the reward": ["rewards/*/mean"],
    "Groups without a signal": ["frac_reward_zero_std"],
    "Entropy (nats)": ["entropy"],
    "Divergence (nats)": ["kl"],
    "Tokens an answer": ["completions/mean_length", "eval_mean_length", "eval_greedy_mean_length"],
    "Answers that were cut": ["completions/clipped_ratio", "eval_clipped_ratio"],
    "False sums": ["false_sums", "eval_false_sums", "eval_greedy_false_sums"],
    "Tokens clipped": ["clip_ratio/low_mean", "clip_ratio/high_mean"],
    "Sampler against trainer": [
        "sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/max",
    ],
    "Norm of the gradient": ["grad_norm"],
    "Seconds a step": ["step_time"],
    "Tokens a second": ["rollout/tokens_per_second", "update/tokens_per_second"],
    "Learning rate": ["learning_rate"],
    "Peak memory (GiB)": ["memory/peak_gib"],
}
BANDS = ("solved", "eval_solved", "eval_greedy_solved")  # shares of answers that are right
SAMPLE_KEYS = {"step", "group_id", "problem", "prompt", "response", "reward", "reward_parts", "advantage",
               "finish_reason", "response_tokens"}  # fmt: skip
SUMMARY = ["eval_solved", "eval_greedy_solved", "eval_reward", "eval_format", "eval_mean_length", "eval_clipped_ratio",
           "eval_false_sums", "reward", "solved", "entropy", "completions/mean_length", "step_time"]  # fmt: skip


def read_run(folder: Path) -> dict:
    """Config, metrics and samples of a run. Raises FileNotFoundError or ValueError with one line."""
    if not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{folder} holds no metrics.jsonl; expected the folder of a run, such as runs/NAME")
    metrics = read_lines(folder / "metrics.jsonl")
    if not metrics:
        raise ValueError(f"{folder}/metrics.jsonl holds no step yet; wait for the first, or take another run")
    config = load_config(folder / "config.yaml") if (folder / "config.yaml").is_file() else Config()
    samples, held_out = read_samples(folder / "samples.jsonl"), read_samples(folder / "held_out.jsonl")
    return {"folder": folder, "name": folder.name, "config": config, "metrics": metrics, "samples": samples,
            "held_out": held_out}  # fmt: skip


def read_samples(path: Path) -> list[dict]:
    """The answers in a file, none where it is not there. Raises ValueError where one lacks what a run writes."""
    samples = read_lines(path) if path.is_file() else []
    for sample in samples:
        if missing := SAMPLE_KEYS - sample.keys():
            raise ValueError(f"{path}: an answer of step {sample['step']} has no {min(missing)!r}; train.py writes it")
    return samples


def name_apart(runs: list[dict]) -> None:
    """Runs in folders of the same name are called by as much of their path as tells them apart."""
    for run in runs:
        parts, same = run["folder"].resolve().parts, [other["folder"].resolve().parts for other in runs]
        if same.count(parts) > 1:
            raise ValueError(f"{run['folder']} is named twice; a comparison takes each run once")
        length = next(n for n in range(1, len(parts) + 1) if sum(p[-n:] == parts[-n:] for p in same) == 1)
        run["name"] = "/".join(parts[-length:])


def facts(runs: list[dict]) -> dict:
    """Everything that the page shows, ready for JSON."""
    name_apart(runs)
    return {
        "names": [run["name"] for run in runs],
        "charts": [chart for title in CHARTS if (chart := chart_of(title, runs))["lines"]],
        "summary": summary(runs),
        "steps": [(run["metrics"][0]["step"], run["metrics"][-1]["step"]) for run in runs],
        "differences": differences(runs),
        "held_out": {run["name"]: held_out(run) for run in runs},
        "groups": {run["name"]: groups(run) for run in runs},
    }


def chart_of(title: str, runs: list[dict]) -> dict:
    lines = []
    for number, run in enumerate(runs):
        for name in _expand(CHARTS[title], run["metrics"]):
            points = [(r["step"], r[name]) for r in run["metrics"] if is_number(r.get(name))]
            if points:
                line = {"run": number, "metric": name, "x": [x for x, _ in points], "y": [y for _, y in points]}
                lines.append(line | (band(name, run, points) if name in BANDS else {}))
    return {"title": title, "lines": lines}


def _expand(names: list[str], metrics: list[dict]) -> list[str]:
    """`rewards/*/mean` stands for all the parts there are."""
    known = dict.fromkeys(key for record in metrics for key in record)
    found = []
    for name in names:
        head, star, tail = name.partition("*")
        found += [k for k in known if k.startswith(head) and k.endswith(tail)] if star else [name]
    return found


def band(name: str, run: dict, points: list[tuple[int, float]]) -> dict:
    """95% interval of each (step, share); see the module's docstring."""
    config, shares = run["config"], shares_by_step(run) if name == "solved" else {}
    problems = config.prompts_per_step if name == "solved" else config.eval_problems
    intervals = [
        share_interval(shares[step]) if step in shares else wilson_interval(share * problems, problems)
        for step, share in points
    ]
    return {"low": [low for low, _ in intervals], "high": [high for _, high in intervals]}


def shares_by_step(run: dict) -> dict[int, list[float]]:
    """Step -> share of right answers, problem by problem, for steps whose samples were all kept."""
    right = defaultdict(lambda: defaultdict(list))
    for sample in run["samples"]:
        right[sample["step"]][sample["group_id"]].append(sample["reward_parts"].get("answer") == 1.0)
    answers = run["config"].prompts_per_step * run["config"].group_size
    return {
        step: [sum(group) / len(group) for group in groups.values()]
        for step, groups in right.items()
        if sum(map(len, groups.values())) == answers
    }


def summary(runs: list[dict]) -> list[dict]:
    """A row a metric, and for each run its first and last (step, value), or None."""
    rows = []
    for name in SUMMARY:
        points = [[(r["step"], r[name]) for r in run["metrics"] if is_number(r.get(name))] for run in runs]
        if any(points):
            rows.append({"metric": name, "runs": [{"first": p[0], "last": p[-1]} if p else None for p in points]})
    return rows


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def differences(runs: list[dict]) -> list[dict]:
    """Settings in which the runs differ; of a single run, those that are not the default."""
    configs = [vars(run["config"]) for run in runs]
    compared = configs if len(runs) > 1 else [vars(Config()), *configs]
    unequal = [key for key in configs[0] if any(c[key] != compared[0][key] for c in compared)]
    return [{"setting": key, "values": [_shown(c[key]) for c in compared]} for key in unequal if key != "run_dir"]


def _shown(value: object) -> str:
    return yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True).split("\n")[0]


def held_out(run: dict) -> list[dict]:
    """Held-out problems that were shown at the first evaluation and at the last: both answers."""
    shown = run["held_out"]
    if not shown:
        return []
    first, last = min(s["step"] for s in shown), max(s["step"] for s in shown)
    before, after = ({s["problem"]: s for s in shown if s["step"] == step} for step in (first, last))
    return [{"problem": p, "before": before[p], "after": after[p]} for p in before if p in after and first < last]


def groups(run: dict) -> list[dict]:
    """Whole groups of the first logged step and of the last, those with tokens first."""
    training = run["samples"]
    if not training:
        return []
    found = []
    for step in sorted({training[0]["step"], training[-1]["step"]}):
        members = defaultdict(list)
        for sample in training:
            if sample["step"] == step:
                members[sample["group_id"]].append(sample)
        ordered = sorted(members.values(), key=lambda group: "tokens" not in group[0])
        found += [
            {"step": step, "problem": g[0]["problem"], "prompt": g[0]["prompt"], "answers": g} for g in ordered[:GROUPS]
        ]
    return found


def add_ratios(run: dict, shown: list[dict]) -> None:
    """Each token's ratio: its probability under the run's last checkpoint over that under the policy that drew it.

    Raises FileNotFoundError where the run has no checkpoint.
    """
    model, tokenizer = load_policy(run["config"], find_checkpoint(run["folder"]))
    answers = [a for group in shown for a in group["answers"] if "token_ids" in a]
    episodes = [_episode(a, tokenizer, run["config"].temperature) for a in answers]
    for answer, scores in zip(answers, score_episodes(model, episodes)):
        drawn = torch.tensor(answer["token_logprobs"])
        answer["ratios"] = [round(x, 4) for x in (scores.logp.float() - drawn).exp().tolist()]


def _episode(answer: dict, tokenizer: Tokenizer, temperature: float) -> Episode:
    return Episode(
        group_id=answer["group_id"], prompt_ids=answer["prompt_ids"], response_ids=answer["token_ids"],
        logprobs=answer["token_logprobs"], text=answer["response"], finish_reason=answer["finish_reason"],
        temperature=temperature, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip


def page(shown: dict) -> str:
    """One HTML file with everything in it. What a model wrote is data: it never becomes markup."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGES), autoescape=True)
    return environment.get_template("report.html").render(
        facts=shown,
        style=(PAGES / "report.css").read_text(encoding="utf-8"),
        plotly=plotly.offline.get_plotlyjs(),
        script=(PAGES / "report.js").read_text(encoding="utf-8"),
        data=json.dumps(_finite(shown), allow_nan=False).replace("<", "\\u003c"),
    )


def _finite(value: object) -> object:
    """The same with None for numbers that JSON cannot write."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_pictures(charts: list[dict], names: list[str], folder: Path) -> None:
    """Each chart as FOLDER/<title>.png. Raises ValueError where matplotlib is not installed."""
    try:
        import matplotlib.figure  # here: the page does without
    except ImportError:
        raise ValueError("--png draws with matplotlib, which is not installed: pip install matplotlib") from None
    folder.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        rows = -(-len(chart["lines"]) // 2)  # of the legend below
        figure = matplotlib.figure.Figure(figsize=(6, 3.5 + 0.16 * rows), constrained_layout=True)
        axis = figure.subplots()
        draw_chart(axis, chart, names)
        figure.legend(loc="outside lower center", ncols=2, fontsize=7)
        figure.savefig(folder / (re.sub(r"\W+", "-", chart["title"].lower()).strip("-") + ".png"), dpi=150)


def draw_chart(axis, chart: dict, names: list[str]) -> None:
    """The lines and bands of one chart on matplotlib's axes: of several runs a colour each, and a dash a metric."""
    metrics = list(dict.fromkeys(line["metric"] for line in chart["lines"]))
    for line in chart["lines"]:
        kind, many = metrics.index(line["metric"]), len(names) > 1
        colour, label = f"C{(line['run'] if many else kind) % 10}", line["metric"]
        axis.plot(
            line["x"], line["y"], color=colour, linestyle=("-", ":", "--", "-.")[kind % 4 if many else 0],
            linewidth=1.3, marker="." if label.startswith("eval") else None,
            label=(f"{names[line['run']]}: {label}" if many else label).replace("$", r"\$"),
        )  # fmt: skip
        if "low" in line and (label.startswith("eval") or not many):
            axis.fill_between(line["x"], line["low"], line["high"], color=colour, alpha=0.15, linewidth=0)
    axis.set(title=chart["title"], xlabel="step")
    axis.grid(alpha=0.3)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first run)")
    parser.add_argument("--ratio", action="store_true", help="score the shown samples with the last checkpoint")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="also write every chart as a picture there")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "report.html"
    try:
        runs = [read_run(folder) for folder in args.runs]
        shown = facts(runs)
        if args.ratio:
            for run in runs:
                add_ratios(run, shown["groups"][run["name"]])
        if args.png:
            save_pictures(shown["charts"], shown["names"], args.png)
        out.write_text(page(shown), encoding="utf-8", errors="replace")  # a lone surrogate has no UTF-8
    except (ValueError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    with reader_may_go():
        print(f"{out} ({out.stat().st_size / 1e6:.1f} MB, needs no network)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
