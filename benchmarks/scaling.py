"""How a step scales over processes, measured: the same work for each, on one and on several (weak scaling).

    python benchmarks/scaling.py --ckpt countdown-tiny                   # 1 and 2 processes, a thread each
    python benchmarks/scaling.py --ckpt models/SmolLM2-135M-Instruct --shard-weights --ranks 2

Every process brings --prompts prompts of --prompt-tokens and --group-size answers of --new-tokens each. Nothing ends
an answer early. Medians over --repeats steps, after one that warms up. All times are wall time of the whole step.
`wait` is idle time behind the slowest process (mean over processes), `transfer` the time to exchange episodes and sum
gradients. Efficiency: the time of one process alone as a share of its time beside others.

With --shard-weights transfer inside the layers is part of `update`, and a rollout is measured in both ways: on a whole
copy of the weights, and gathering them a block at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import torch

from data_types import MiniBatch, Reward
from grpo import GRPO
from model import linear
from parallel import distributed
from parallel.sharding import whole
from rollout.generation import generate
from run.config import Config
from run.pretrained import load_pretrained
from tasks.task_base import Task


class Alternating(Task):
    """Pays 0, 1, 0, 1, ... for every answer, so that every token has a gradient."""

    def __init__(self):
        super().__init__(seed=0)
        self.rewards = itertools.cycle([0.0, 1.0])

    def train_problem(self, index: int):
        raise NotImplementedError

    test_problem = train_problem

    def reward(self, problem, response: str) -> Reward:
        return Reward(next(self.rewards), {})

    def diagnostics(self, problem, response: str) -> dict[str, float]:
        return {}


def worker(args: argparse.Namespace) -> dict[str, float] | None:
    """One process of the measurement. Returns the numbers, in seconds, on rank 0."""
    torch.set_num_threads(1)
    trainer = make_trainer(args)
    prompts = args.prompts * distributed.world_size()
    steps = []
    for number in range(args.repeats + 1):
        ids = common.random_prompts(prompts, args.prompt_tokens, 256, seed=number)
        _, metrics = trainer.step(MiniBatch([None] * prompts, [""] * prompts, ids))
        tokens = prompts * args.group_size * args.new_tokens
        steps.append(
            {
                "step": metrics["step_time"],
                "rollout": tokens / metrics["rollout/tokens_per_second"],
                "update": tokens / metrics["update/tokens_per_second"],
                "wait": metrics.get("distributed/wait_time", 0.0),
                "transfer": metrics.get("distributed/transfer_time", 0.0),
            }
        )
    result = {name: statistics.median(step[name] for step in steps[1:]) for name in steps[0]}
    if distributed.world_size() > 1:
        result |= link(args)
    if args.shard_weights:
        result |= both_rollouts(args, trainer)
    return result if distributed.is_main() else None


def make_trainer(args: argparse.Namespace) -> GRPO:
    model, tokenizer = load_pretrained(args.ckpt, common.DTYPES[args.dtype], args.device)
    tokenizer.eos_token_ids = common.NO_STOP_ID
    config = Config(
        group_size=args.group_size, max_new_tokens=args.new_tokens, micro_batch_tokens=args.micro_batch_tokens,
        shard_weights=args.shard_weights,
    )  # fmt: skip
    return GRPO(config, model=model, tokenizer=tokenizer, task=Alternating())


def link(args: argparse.Namespace) -> dict[str, float]:
    """Cost of a sum over all processes: seconds of an empty one, and 10^9 bytes a second of a large one."""
    results = {}
    for name, elements in (("latency_s", 1), ("sum_gb_per_s", 2**24)):
        x = torch.ones(elements, device=args.device)
        took = common.median_seconds(lambda x=x: torch.distributed.all_reduce(x), 5, args.device)
        results[name] = took if elements == 1 else x.nbytes / took / 1e9
    return results


def both_rollouts(args: argparse.Namespace, trainer: GRPO) -> dict[str, float]:
    """Seconds of a rollout of equal answers on a whole copy, its gathering included, and block by block.

    Only because all answers have one length do the processes gather equally often.
    """
    ids = common.random_prompts(args.prompts, args.prompt_tokens, 256)
    options = {"tokenizer": trainer.tokenizer}
    linear.can_pack = lambda weight: False  # a sharded weight cannot be packed
    ways = {
        "rollout on a whole copy": lambda: generate(whole(trainer.model), ids, trainer.sampling, **options),
        "rollout block by block": lambda: generate(trainer.model, ids, trainer.sampling, **options),
        "gathering the copy": lambda: whole(trainer.model),
    }
    return {name: common.median_seconds(way, args.repeats, args.device) for name, way in ways.items()}


def launch(args: argparse.Namespace, ranks: int, folder: Path) -> dict[str, float]:
    """Start the processes. Returns the numbers of rank 0."""
    with tempfile.TemporaryDirectory() as place:
        result = Path(place) / "result.json"
        words = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            __file__,
        ]
        for name, value in (vars(args) | {"ckpt": folder, "result": result}).items():
            if name != "ranks" and value not in (None, False):
                words += [f"--{name.replace('_', '-')}"] + ([str(value)] if value is not True else [])
        subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=sys.stderr)
        return json.loads(result.read_text())


def main(argv: list[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes (default: 1 2)")
    parser.add_argument("--prompts", type=int, default=4, help="of each process (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shard-weights", action="store_true")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.result:
        with distributed.process_group(600, args.device):
            found = worker(args)
        if found:
            Path(args.result).write_text(json.dumps(found))
        return
    with common.checkpoint(args) as folder:
        results = {ranks: launch(args, ranks, folder) for ranks in args.ranks}
    names = list(results[max(results)])
    rows = [[name, *(result.get(name, 0.0) for result in results.values())] for name in names]
    if 1 in results:
        rows.append(["efficiency", *(results[1]["step"] / result["step"] for result in results.values())])
    print(common.table(["seconds", *(f"{ranks} process{'es' * (ranks > 1)}" for ranks in results)], rows))
    common.print_json(args, results)


if __name__ == "__main__":
    main()
