"""How good is a checkpoint? Greedy accuracy, pass@1 and unbiased pass@k on held-out problems, with 95% intervals.

    python evaluate.py --ckpt runs/NAME/checkpoints/step-000200 --config configs/countdown-tiny.yaml
    python evaluate.py --ckpt BEFORE --compare AFTER --config FILE --samples 16 --eval-problems 512

Takes train.py's flags for the task and the sampling, and besides them
    --samples N       answers a problem (default 8): pass@k is given for k = 1, 2, 4, ... N
    --compare FOLDER  another checkpoint on the same problems, and the difference problem by problem
    --json FILE       write the numbers there as well; the last line printed is the same JSON

pass@k is the chance that one of k answers is right, estimated from n >= k of them without bias as
1 - C(n - c, k) / C(n, k) with c right ones (Chen et al. 2021, arXiv 2107.03374, eq. 1).

Intervals: of a share, Wilson's (1927) with problems as what is independent, not answers (`share_interval`); of a
difference, the normal one of the paired differences (`difference_interval`).
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from data_types import Episode, MiniBatch
from grpo import rollout
from math_task import task_from_config
from rollout.sampling import SamplingParams
from run.config import Config, parse_args
from run.flags import one_line, take_flag
from run.pretrained import load_policy, locate_pretrained
from run.progress import plain
from run.terminal import complain, run_program, say
from update.step_metrics import reward_metrics

Z95 = 1.959964  # of a normal distribution, two-sided 95%


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of `k` answers is right, from `correct` right ones of `n`.

    Raises ValueError where k is not from 1 to n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} from {n} answers a problem: expected k from 1 to {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927), sound also near 0 and 1."""
    p, z2 = successes / n, Z95**2
    centre, spread = p + z2 / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (centre - spread) / (1 + z2 / n), (centre + spread) / (1 + z2 / n)


def share_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of shares in [0, 1], one a problem, whose answers are not independent of one another.

    Wilson's, of as many independent answers as would have a mean with this variance, and no fewer than there are
    problems: where all of a few problems came out alike, their own spread would claim certainty.
    """
    n, mean = len(values), sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(n - 1, 1) / n  # of the mean
    independent = max(n, mean * (1 - mean) / variance) if variance else n
    return wilson_interval(mean * independent, independent)


def difference_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Mean of after - before, problem by problem, and its 95% interval (normal, of paired differences).

    Narrower than two intervals side by side: the same hard problems are hard for both. But no narrower than if one
    problem had gone from wrong to right: a few that all came out as before do not prove that nothing changed.
    """
    gains = [b - a for a, b in zip(before, after, strict=True)]
    n, mean = len(gains), sum(gains) / len(gains)
    squares = max(1.0, sum((g - mean) ** 2 for g in gains))
    spread = Z95 * math.sqrt(squares / max(n - 1, 1) / n)
    return mean, mean - spread, mean + spread


class Evaluation(NamedTuple):
    """Metric -> {"value", "low", "high"} (None where there is no interval), and metric -> a value each problem."""

    results: dict[str, dict]
    by_problem: dict[str, list[float]]


def evaluate_checkpoint(config: Config, ckpt: str, samples: int) -> Evaluation:
    """Greedy accuracy, pass@k and the parts of the reward of one checkpoint.

    Raises ValueError where the task has no held-out problems, or pays for no `answer`.
    """
    model, tokenizer = load_policy(config, locate_pretrained(ckpt))
    task = task_from_config(config)
    problems = task.test_problems(config.eval_problems)
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
    correct = defaultdict(int)
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
        raise ValueError("the task's reward has no part 'answer' (1.0 where an answer is right), which pass@k counts")
    return episode.reward_parts.get("answer") == 1.0


def with_interval(value: float, interval: tuple) -> dict:
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
    return {name: with_interval(mean, interval) for name, (mean, *interval) in pairs.items()}


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(__doc__)
    try:
        samples, argv = take_flag(argv, "--samples")
        compare, argv = take_flag(argv, "--compare")
        file, argv = take_flag(argv, "--json")
        config = parse_args(argv)
        ckpts, n = [config.ckpt, *compare], _samples(samples)
        if len(set(ckpts)) < len(ckpts):
            raise ValueError(f"a checkpoint is named twice: {', '.join(ckpts)}")
        if file and not Path(file[-1]).resolve().parent.is_dir():
            raise ValueError(f"--json {file[-1]}: there is no such folder; make it first")
        found = {ckpt: evaluate_checkpoint(config, ckpt, n) for ckpt in ckpts}
    except (ValueError, OSError) as error:
        complain(f"evaluate.py: {one_line(error)}")
        return 2
    results = {ckpt: evaluation.results for ckpt, evaluation in found.items()}
    gains = {f"{ckpt} - {ckpts[0]}": differences(found[ckpts[0]], found[ckpt]) for ckpt in compare}
    problems = len(found[ckpts[0]].by_problem["greedy"])
    report = {"task": config.task, "problems": problems, "samples": n, "results": results, "differences": gains}
    if file:
        Path(file[-1]).write_text(json.dumps(report) + "\n", encoding="utf-8")
    Console().print(table(results, "held-out problems"))
    if gains:
        Console().print(table(gains, "difference, problem by problem"))
    say(json.dumps(report))
    return 0


def _samples(given: list[str]) -> int:
    text = given[-1] if given else "8"
    if not (text.isdecimal() and int(text) > 0):
        raise ValueError(f"--samples {text}: expected a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(run_program("evaluate.py", main))
