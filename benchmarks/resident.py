"""Resident memory step by step: rollouts and updates of a large model on a CPU, with malloc as it is and as we set it.

    python benchmarks/resident.py --ckpt models/Qwen2.5-0.5B-Instruct --steps 7

`as it is`: pages of 4 KiB, and glibc keeps freed memory. `ours`: large pages, and freed memory goes back to the system
(`return_free_memory` of model/memory.py). Each in a process of its own, taking turns. There is no optimizer state,
which never moves. Prompts differ in length, as in a run. No answer ends early. Peak: the largest resident memory so
far, with the pages of the checkpoint's file. Resident: anonymous memory after the update.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import time
from multiprocessing.connection import Connection
from pathlib import Path

import common
import torch
from step import AlternatingReward

from data_types import MiniBatch
from grpo import compute_advantages, rollout, update_policy
from model import linear
from rollout.sampling import SamplingParams
from run.pretrained import load_pretrained


class NoStep(torch.optim.SGD):
    def step(self) -> None:
        pass


def as_it_is(pipe: Connection, args: argparse.Namespace, folder: Path) -> None:
    os.environ["THP_MEM_ALLOC_ENABLE"] = "0"
    linear.return_free_memory = lambda: None
    ours(pipe, args, folder)


def ours(pipe: Connection, args: argparse.Namespace, folder: Path) -> None:
    model, _ = load_pretrained(folder, common.DTYPES[args.dtype], "cpu")
    tokenizer, generator = common.endless_tokenizer(folder), random.Random(args.seed)
    optimizer, reward = NoStep(model.parameters(), lr=0.0), AlternatingReward()
    sampling = SamplingParams(n=args.group_size, max_new_tokens=args.new_tokens)
    pipe.send("ready")
    for step in range(args.steps):
        pipe.recv()
        lengths = [generator.randint(args.prompt_tokens - 20, args.prompt_tokens + 20) for _ in range(args.prompts)]
        ids = [common.random_prompts(1, n, tokenizer.vocab_size, seed=step)[0] for n in lengths]
        batch = MiniBatch([None] * len(ids), [""] * len(ids), ids)
        faults, started = _faults(), time.perf_counter()
        episodes = rollout(model, tokenizer, reward, batch, sampling, seed=step)
        sampled = time.perf_counter()
        update_policy(model, optimizer, compute_advantages(episodes), micro_batch_tokens=args.micro_batch_tokens)
        done = time.perf_counter()
        pipe.send({
            "rollout_s": sampled - started, "update_s": done - sampled, "page_faults": _faults() - faults,
            "resident_gib": _anonymous_gib(), "peak_gib": common.peak_gib("cpu"),
        })  # fmt: skip
    pipe.send("done")


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _anonymous_gib() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20


def main(argv: list[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=134, help="give or take 20 (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--micro-batch-tokens", type=int, default=700)
    args = parser.parse_args(argv)
    with common.checkpoint(args) as folder:
        found = common.take_turns({"as it is": as_it_is, "ours": ours}, args.steps, args, folder)
    keys = list(found["ours"]["turns"][0])
    rows = [(f"{name}, step {n}", *(turn[key] for key in keys)) for name, side in found.items()
            for n, turn in enumerate(side["turns"], start=1)]  # fmt: skip
    print(common.table(("", *keys), rows), "\n")
    common.print_json(args, {name: side["turns"] for name, side in found.items()})


if __name__ == "__main__":
    main()
