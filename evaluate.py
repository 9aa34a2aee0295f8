"""How good is a checkpoint? Greedy accuracy, pass@1 and unbiased pass@k on held-out problems, with 95% intervals.

    python evaluate.py --ckpt runs/NAME/checkpoints/step-000200 --config configs/countdown-tiny.yaml
    python evaluate.py --ckpt BEFORE --after AFTER --config FILE --samples 16 --eval-problems 512

The flags of train.py set the task and the sampling. Besides them:
    --samples N      responses per problem (default 8): pass@k is given for k = 1, 2, 4, ... N
    --after FOLDER   a second checkpoint on the same problems (repeatable), and the difference problem by problem
    --json FILE      write the numbers there, and print the same JSON as the last line

pass@k is the chance that one of k answers is right. Its estimate and the intervals are in study/intervals.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from data_types import Episode, MiniBatch
from grpo import rollout
from math_task import task_from_config
from rollout.sampling import SamplingParams
from run.config import Config, parse_args
from run.flags import help_text, one_line, take_flag
from run.options import TaskOptions
from run.pretrained import load_policy
from run.progress import plain
from run.run_folder import check_output
from run.terminal import complain, run_program, say
from study.intervals import difference_interval, pass_at_k, share_interval
from update.step_metrics import reward_metrics

MOST_SAMPLES = 2**16
HELP = {"ckpt", "seed", "device", "dtype", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "eval_problems"}
HELP |= {field.name for field in dataclasses.fields(TaskOptions)} - {
    "curriculum",
    "overlong_buffer",
    "random_reward",
}  # of the training


class Evaluation(NamedTuple):
    """Metric -> {"value", "low", "high"} (both ends None: no interval), and metric -> one value a problem."""

    results: dict[str, dict]
    by_problem: dict[str, list[float]]


def evaluate_checkpoint(config: Config, ckpt: str, samples: int) -> Evaluation:
    """Greedy accuracy, pass@k and the parts of the reward of one checkpoint.

    Raises ValueError if the task has no held-out problems, or no reward part `answer`.
    """
    model, tokenizer = load_policy(config, ckpt)
    task = task_from_config(config)
    problems = task.test_problems(config.eval_problems)
    if task.data_summary and ckpt == config.ckpt:  # once, also with several checkpoints
        say(f"data: {task.data_summary}")
    if not problems:
        raise ValueError(
            f"{config.task} gave no held-out problem, --eval-problems is {config.eval_problems}; ask for some"
        )
    batch = MiniBatch.from_problems(problems, tokenizer)

    def answers(n: int, temperature: float) -> list[Episode]:
        sampling = SamplingParams(n, config.max_new_tokens, temperature, config.top_k, config.top_p, config.min_p)
        return rollout(model, tokenizer, task, batch, sampling, seed=config.seed)

    by_problem = {"greedy": [float(is_right(episode)) for episode in answers(1, temperature=0.0)]}
    sampled = answers(samples, config.temperature)
    correct: dict[int, int] = defaultdict(int)
    for episode in sampled:
        correct[episode.group_id] += is_right(episode)
    for k in (2**i for i in range(samples.bit_length()) if 2**i <= samples):
        by_problem[f"pass@{k}"] = [pass_at_k(samples, c, k) for c in correct.values()]
    results = {
        name: with_interval(sum(values) / len(values), share_interval(values)) for name, values in by_problem.items()
    }
    for name, value in reward_metrics(sampled, task).items():
        if name not in ("reward_std", "frac_reward_zero_std") and not name.endswith("/std"):
            results[name] = with_interval(value, (None, None))
    return Evaluation(results, by_problem)


def is_right(episode: Episode) -> bool:
    if "answer" not in episode.reward_parts and not math.isnan(episode.reward):
        raise ValueError("the task's reward has no part 'answer' (1.0: the answer is right), which pass@k counts")
    return episode.reward_parts.get("answer") == 1.0


def with_interval(value: float, interval: tuple[float, float] | tuple[None, None]) -> dict:
    return {"value": value, "low": interval[0], "high": interval[1]}


def table(results: dict[str, dict[str, dict]], title: str) -> Table:
    """A row a metric, a column a checkpoint."""
    out = Table(title=title)
    out.add_column("metric")
    for ckpt in results:
        out.add_column(plain(ckpt), justify="right")
    for name in next(iter(results.values())):
        cells = []
        for numbers in (result[name] for result in results.values()):
            interval = "" if numbers["low"] is None else f" [{numbers['low']:.3f}, {numbers['high']:.3f}]"
            cells.append(f"{numbers['value']:.3f}{interval}")
        out.add_row(plain(name), *cells)
    return out


def differences(before: Evaluation, after: Evaluation) -> dict[str, dict]:
    """after - before, metric by metric, on the same problems."""
    pairs = {name: difference_interval(before.by_problem[name], after.by_problem[name]) for name in before.by_problem}
    return {name: with_interval(mean, (low, high)) for name, (mean, low, high) in pairs.items()}


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        say(f"{__doc__.strip()}\n\nTask and sampling, as in train.py:\n{help_text(Config, HELP)}")
        return 0
    try:
        samples, argv = take_flag(argv, "--samples")
        after, argv = take_flag(argv, "--after")
        file, argv = take_flag(argv, "--json")
        config = parse_args(argv)
        ckpts, n = [config.ckpt, *after], _samples(samples)
        if len(set(ckpts)) < len(ckpts):
            raise ValueError(f"a checkpoint is named twice: {', '.join(ckpts)}")
        if file:
            check_output(Path(file[-1]), "--json")
        found = {ckpt: evaluate_checkpoint(config, ckpt, n) for ckpt in ckpts}
    except (ValueError, OSError) as error:
        complain(f"evaluate.py: {one_line(error)}")
        return 2
    results = {ckpt: evaluation.results for ckpt, evaluation in found.items()}
    gains = {f"{ckpt} - {ckpts[0]}": differences(found[ckpts[0]], found[ckpt]) for ckpt in after}
    problems = len(found[ckpts[0]].by_problem["greedy"])
    Console().print(table(results, f"{problems} held-out problems"))
    if gains:
        Console().print(table(gains, "difference, problem by problem"))
    if not file:
        return 0
    report = {"task": config.task, "problems": problems, "samples": n, "results": results, "differences": gains}
    say(json.dumps(report))  # first, so that a full disk does not lose it
    try:
        Path(file[-1]).write_text(json.dumps(report) + "\n", encoding="utf-8")
    except OSError as error:
        complain(f"evaluate.py: --json {file[-1]} could not be written ({error.strerror or error}); it is above")
        return 2
    return 0


def _samples(given: list[str]) -> int:
    text = given[-1] if given else "8"
    if not (text.isdecimal() and len(text) < 10 and 1 <= int(text) <= MOST_SAMPLES):
        raise ValueError(f"--samples {text:.40}: expected a whole number from 1 to {MOST_SAMPLES}")
    return int(text)


if __name__ == "__main__":
    sys.exit(run_program("evaluate.py", main))
