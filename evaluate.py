"""How good is a checkpoint? Greedy accuracy, pass@1 and unbiased pass@k on held-out problems, with 95% intervals.

    python evaluate.py --ckpt runs/NAME/checkpoints/step-000200 --config configs/countdown-tiny.yaml
    python evaluate.py --ckpt BEFORE --compare AFTER --config FILE --samples 16 --eval-problems 512

Takes train.py's flags for the task and the sampling, and besides them
    --samples N       answers a problem (default 8): pass@k is given for k = 1, 2, 4, ... N
    --compare FOLDER  a second checkpoint on the same problems
    --json FILE       write the numbers there as well; the last line printed is the same JSON

pass@k is the chance that one of k answers is right, estimated from n >= k of them without bias as
1 - C(n - c, k) / C(n, k) with c right ones (Chen et al. 2021, arXiv 2107.03374, eq. 1).
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from config import Config, parse_args
from data_types import Episode, MiniBatch
from flags import take_flag
from generation import SamplingParams
from grpo import load_policy, reward_metrics, rollout
from math_task import task_from_config
from pretrained import locate_pretrained

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


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of a mean over problems (normal approximation), cut at 0 and 1."""
    n, mean = len(values), sum(values) / len(values)
    spread = Z95 * math.sqrt(sum((v - mean) ** 2 for v in values) / max(n - 1, 1) / n)
    return max(0.0, mean - spread), min(1.0, mean + spread)


def evaluate_checkpoint(config: Config, ckpt: str, samples: int) -> dict[str, dict]:
    """Metric -> {"value", "low", "high"} of one checkpoint; metrics without an interval have None there."""
    model, tokenizer = load_policy(config, locate_pretrained(ckpt))
    task = task_from_config(config)
    problems = task.test_problems(config.eval_problems)
    batch = MiniBatch.from_problems(problems, tokenizer)

    def answers(n: int, temperature: float) -> list[Episode]:
        sampling = SamplingParams(n, config.max_new_tokens, temperature, config.top_k, config.top_p, config.min_p)
        return rollout(model, tokenizer, task, batch, sampling, seed=config.seed)

    results = {}
    greedy = answers(1, temperature=0.0)
    right = sum(map(is_right, greedy))
    results["greedy"] = with_interval(right / len(greedy), wilson_interval(right, len(greedy)))
    sampled = answers(samples, config.temperature)
    correct = defaultdict(int)
    for episode in sampled:
        correct[episode.group_id] += is_right(episode)
    for k in (2**i for i in range(samples.bit_length()) if 2**i <= samples):
        values = [pass_at_k(samples, c, k) for c in correct.values()]
        results[f"pass@{k}"] = with_interval(sum(values) / len(values), mean_interval(values))
    for name, value in reward_metrics(sampled, task).items():
        if name not in ("reward_std", "frac_reward_zero_std") and not name.endswith("/std"):
            results[name] = with_interval(value, (None, None))
    return results


def is_right(episode: Episode) -> bool:
    return episode.reward_parts.get("answer", 0.0) == 1.0


def with_interval(value: float, interval: tuple) -> dict:
    return {"value": value, "low": interval[0], "high": interval[1]}


def table(results: dict[str, dict[str, dict]]) -> Table:
    """A row a metric, a column a checkpoint."""
    out = Table(title="held-out problems")
    out.add_column("metric")
    for ckpt in results:
        out.add_column(ckpt, justify="right")
    for name in next(iter(results.values())):
        cells = []
        for numbers in (result[name] for result in results.values()):
            interval = "" if numbers["low"] is None else f" [{numbers['low']:.3f}, {numbers['high']:.3f}]"
            cells.append(f"{numbers['value']:.3f}{interval}")
        out.add_row(name, *cells)
    return out


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(__doc__)
    try:
        samples, argv = take_flag(argv, "--samples")
        compare, argv = take_flag(argv, "--compare")
        file, argv = take_flag(argv, "--json")
        config = parse_args(argv)
        n = int(samples[-1]) if samples else 8
        results = {ckpt: evaluate_checkpoint(config, ckpt, n) for ckpt in [config.ckpt, *compare]}
    except (ValueError, FileNotFoundError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    Console().print(table(results))
    line = json.dumps({"task": config.task, "problems": config.eval_problems, "samples": n, "results": results})
    if file:
        Path(file[-1]).write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
