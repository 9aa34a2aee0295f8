"""The contents of the page of a run, as plain data: headline, curves with intervals, first and last values, settings.

    shown = facts([read_run(folder) for folder in folders])     # ready for JSON

The band around a share of solved problems is its 95% interval. Answers to one problem resemble one another, so they are
not independent. If samples.jsonl holds a whole step, `share_interval` takes the spread from problem to problem.
Otherwise (evaluations, a share of the samples) the interval is Wilson's for as many answers as there are problems.
That is a little wide if each problem was answered several times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from run.config import Config
from study.intervals import share_interval, wilson_interval
from study.run_files import Record, Run

CHARTS = {  # title -> metrics; metrics that a run did not log are left out
    "Solved": ["solved", "eval_solved", "eval_greedy_solved"],
    "Reward": ["reward", "eval_reward", "eval_greedy_reward"],
    "Parts of the reward": ["rewards/*/mean"],
    "Groups without a signal": ["frac_reward_zero_std"],
    "Curriculum: mean level of the problems": ["curriculum/level"],
    "Curriculum: solved share of each level": ["curriculum/solved_*"],
    "Entropy (nats a token)": ["entropy"],
    "Divergence (nats a token)": ["kl"],
    "Length of a response (tokens)": ["completions/mean_length", "eval_mean_length", "eval_greedy_mean_length"],
    "Responses cut at the longest length": ["completions/clipped_ratio", "eval_clipped_ratio"],
    "False sums in the thoughts": ["false_sums", "eval_false_sums", "eval_greedy_false_sums"],
    "Tokens clipped by the loss": ["clip_ratio/low_mean", "clip_ratio/high_mean"],
    "Sampler against trainer (nats)": [
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
SUMMARY = ["eval_solved", "eval_greedy_solved", "eval_reward", "eval_format", "eval_mean_length", "eval_clipped_ratio",
           "eval_false_sums", "reward", "solved", "entropy", "completions/mean_length", "step_time"]  # fmt: skip
WORDS = {  # a metric's last part -> its name for readers
    "solved": "solved", "reward": "reward", "format": "format reward", "answer": "answer reward",
    "mean_length": "tokens a response", "clipped_ratio": "responses cut", "false_sums": "false sums",
    "entropy": "entropy (nats a token)", "kl": "divergence (nats a token)", "step_time": "seconds a step",
    "grad_norm": "norm of the gradient", "learning_rate": "learning rate", "reward_std": "spread of the rewards",
    "frac_reward_zero_std": "groups without a signal", "tokens_per_second": "tokens a second",
    "peak_gib": "peak memory (GiB)", "low_mean": "below the clip", "high_mean": "above the clip",
}  # fmt: skip
WAYS = ("sampled", "greedy")
SHARES = {"solved", "clipped_ratio", "false_sums"}  # shown as per cent


def facts(runs: list[Run]) -> dict[str, Any]:
    """Everything that the page shows of one run, or of several. Raises ValueError for a run that is named twice."""
    name_apart(runs)
    charts = [chart_of(title, runs) for title in CHARTS]
    return {
        "names": [run.name for run in runs],
        "headlines": [headline(run) for run in runs],
        "charts": [chart for chart in charts if chart["lines"]],
        "summary": summary(runs),
        "differences": differences(runs),
        "held_out": [held_out(run) for run in runs],
        "false_sum_costs": [run.config.arithmetic_weight for run in runs],
        "notes": [note if len(runs) == 1 else f"{run.name}: {note}" for run in runs for note in run.notes],
    }


def name_apart(runs: list[Run]) -> None:
    """Name runs in folders of the same name by as much of their path as tells them apart."""
    for run in runs:
        parts, same = run.folder.resolve().parts, [other.folder.resolve().parts for other in runs]
        if same.count(parts) > 1:
            raise ValueError(f"{run.folder} is named twice; a comparison takes each run once")
        length = next(n for n in range(1, len(parts) + 1) if sum(p[-n:] == parts[-n:] for p in same) == 1)
        run.name = "/".join(parts[-length:])


# ---------------------------------------------------------------------------------------------------------------------
# Headline


def headline(run: Run) -> dict[str, Any]:
    """The result in one line, and what was trained, on what, for how long, on which machine: [label, text] pairs."""
    c, done = run.config, int(run.metrics.index[-1])
    responses = c.prompts_per_step * c.group_size
    pairs = [
        ["model", Path(c.ckpt).name or c.ckpt],
        ["task", c.task],
        ["steps", f"{done} of {c.steps}, each {c.prompts_per_step} prompts x {c.group_size} responses = {responses}"],
        ["loss", f"{c.loss_type}, learning rate {c.lr:g}" + (f", KL weight {c.beta:g}" if c.beta else "")],
        ["duration", _duration(run)],
        ["machine", run.machine.get("machine", "not written down by this run")],
    ]
    return {"result": _result(run), "facts": pairs}


def _result(run: Run) -> str:
    """ "solved 24% -> 63% of 512 held-out problems (sampled)", from the first to the last evaluation."""
    of = f" of {run.config.eval_problems} held-out problems"
    for name, words in (("eval_solved", "sampled"), ("eval_greedy_solved", "greedy")):
        values = points(run, name)
        if len(values) > 1:
            return f"solved {values[0][1]:.0%} → {values[-1][1]:.0%}{of} ({words})"
    values = points(run, "reward")
    if len(values) > 1:
        return f"mean reward {values[0][1]:.3g} → {values[-1][1]:.3g} in training"
    return "no two values to compare yet"


def _duration(run: Run) -> str:
    seconds = sum(value for _, value in points(run, "step_time"))
    hours, minutes = int(seconds // 3600), int(seconds // 60) % 60
    text = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {int(seconds % 60):02d} s"
    return f"{text} of training steps (evaluations and saving not counted)"


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def points(run: Run, name: str) -> list[tuple[int, float]]:
    """(step, value) of every step that logged the metric."""
    if name not in run.metrics:
        return []
    values = run.metrics[name].dropna()
    return list(zip(values.index.tolist(), values.tolist()))


def chart_of(title: str, runs: Sequence[Run]) -> dict[str, Any]:
    lines = []
    for number, run in enumerate(runs):
        for name in _expand(CHARTS[title], list(run.metrics)):
            if found := points(run, name):
                x, y = zip(*found)
                line = {"run": number, "metric": name, "label": label(name), "x": x, "y": y}
                lines.append(line | (band(name, run, found) if name in BANDS else {}))
    return {"title": title, "lines": lines}


def _expand(names: list[str], known: list[str]) -> list[str]:
    """`rewards/*/mean` stands for all the parts there are."""
    found = []
    for name in names:
        head, star, tail = name.partition("*")
        found += [k for k in known if k.startswith(head) and k.endswith(tail)] if star else [name]
    return found


def label(name: str) -> str:
    """A metric's name for readers: `eval_greedy_solved` -> "held-out, greedy: solved"."""
    for prefix, words in (("eval_greedy_", "held-out, greedy: "), ("eval_", "held-out, sampled: ")):
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return words + WORDS.get(rest, rest.replace("_", " "))
    head, _, tail = name.rpartition("/")
    if head.startswith("rewards/"):
        return WORDS.get(head.removeprefix("rewards/"), head.removeprefix("rewards/")).removesuffix(" reward")
    if head == "curriculum":
        return tail.removeprefix("solved_").replace("_", " ") if tail.startswith("solved_") else "level (1: easiest)"
    if tail == "tokens_per_second":
        return head
    if head.endswith("sampling_logp_difference"):
        return f"{tail} |log-probability difference|"
    return "training: " + WORDS[tail] if tail in ("solved", "reward", "mean_length") else WORDS.get(tail, name)


def band(name: str, run: Run, shares: list[tuple[int, float]]) -> dict[str, list[float]]:
    """95% interval of each (step, share), as the module's docstring says. Shares outside 0 to 1 get none."""
    whole = shares_by_step(run) if name == "solved" else {}
    problems = run.config.prompts_per_step if name == "solved" else run.config.eval_problems
    intervals = [
        share_interval(whole[step])
        if step in whole
        else wilson_interval(share * problems, problems)
        if problems and 0 <= share <= 1
        else (share, share)
        for step, share in shares
    ]
    return {"low": [low for low, _ in intervals], "high": [high for _, high in intervals]}


def shares_by_step(run: Run) -> dict[int, list[float]]:
    """Step -> share of right answers, problem by problem, of the steps whose samples were all kept."""
    right: dict[int, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for sample in run.samples:
        right[sample["step"]][sample["group_id"]].append(is_right(sample))
    answers = run.config.prompts_per_step * run.config.group_size
    return {
        step: [sum(group) / len(group) for group in groups.values()]
        for step, groups in right.items()
        if sum(map(len, groups.values())) == answers
    }


def is_right(sample: Record) -> bool:
    return sample["reward_parts"].get("answer") == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def summary(runs: list[Run]) -> list[dict[str, Any]]:
    """A row a metric: its label, and for each run its first and last (step, text), or None."""
    rows = []
    for name in SUMMARY:
        found = [points(run, name) for run in runs]
        if any(found):
            ends = [{"first": _said(name, p[0]), "last": _said(name, p[-1])} if p else None for p in found]
            rows.append({"metric": name, "label": label(name), "runs": ends})
    return rows


def _said(name: str, point: tuple[int, float]) -> tuple[int, str]:
    step, value = point
    is_share = name.removeprefix("eval_").removeprefix("greedy_").rpartition("/")[2] in SHARES
    return step, f"{value:.1%}" if is_share else f"{value:.4g}"


def differences(runs: list[Run]) -> list[dict[str, Any]]:
    """Settings in which the runs differ; of a single run, those that are not the default."""
    configs = [vars(run.config) for run in runs]
    compared = configs if len(runs) > 1 else [vars(Config()), *configs]
    unequal = [key for key in configs[0] if any(c[key] != compared[0][key] for c in compared)]
    return [{"setting": key, "values": [_shown(c[key]) for c in compared]} for key in unequal if key != "run_dir"]


def _shown(value: object) -> str:
    return yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True).split("\n")[0]


def held_out(run: Run) -> dict[str, Any]:
    """Responses to the same held-out problems at the first and at the last evaluation, sampled and greedy.

    `ways`: for each way of sampling its share of solved problems, of all and of those shown. `pairs`: a problem and
    its responses, {way: [before, after]}.
    """
    steps = [s["step"] for s in run.held_out]
    ends = (min(steps), max(steps)) if steps and min(steps) < max(steps) else ()
    shown: dict[str | None, dict[str, list[Record | None]]] = {}
    for sample in run.held_out:
        if sample["step"] in ends:
            pair = shown.setdefault(sample["problem"], {}).setdefault(_way_of(sample), [None, None])
            pair[ends.index(sample["step"])] = sample
    pairs: list[dict[str, Any]] = []
    for problem, ways in shown.items():
        whole = {way: ways[way] for way in WAYS if way in ways and None not in ways[way]}
        if whole:
            pairs.append({"problem": problem, "ways": whole})
    return {"pairs": pairs, "ways": [_way(run, way, pairs) for way in WAYS]}


def _way_of(sample: Record) -> str:
    return "sampled" if sample.get("sampled") is True else "greedy"


def _way(run: Run, way: str, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    found = [pair["ways"][way] for pair in pairs if way in pair["ways"]]
    name = "eval_solved" if way == "sampled" else "eval_greedy_solved"
    values = [value for _, value in points(run, name)]
    return {
        "way": way, "shown": len(found), "right": [sum(is_right(pair[i]) for pair in found) for i in (0, 1)],
        "all": [values[0], values[-1]] if len(values) > 1 else None, "problems": run.config.eval_problems,
    }  # fmt: skip
