"""Peak memory of a rollout and of an update, over the length of the answers and the size of the group.

    python benchmarks/memory.py --lengths 128 512 2048 --groups 4 8 16
    python benchmarks/memory.py --device cuda --random 1.5b --gradient-checkpointing

Every point is a process of its own. On a CPU the peak is the resident memory, interpreter and weights included. On
CUDA it is the memory that torch's allocator handed out. `loaded` is the memory before the measured part, `update` holds
the optimizer's state as well. Answers of the update are random ids of the full length, so no point depends on a text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import common

from data_types import Episode
from grpo import update_policy
from optimizer import MemoryEfficientAdamW
from rollout.generation import generate
from rollout.sampling import SamplingParams
from run.pretrained import load_pretrained


def point(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Run one phase at one length and group size in this process: {"loaded": GiB, "peak": GiB, "seconds": s}."""
    (length,), (group,) = args.lengths, args.groups
    model, _ = load_pretrained(folder, common.DTYPES[args.dtype], args.device)
    tokenizer = common.endless_tokenizer(folder)
    prompts = common.random_prompts(args.prompts, args.prompt_tokens, tokenizer.vocab_size, args.seed)
    if args.phase == "rollout":
        params = SamplingParams(n=group, max_new_tokens=length)

        def work() -> None:
            generate(model, prompts, params, tokenizer=tokenizer, seed=args.seed)
    else:
        model.model.gradient_checkpointing = args.gradient_checkpointing
        optimizer = MemoryEfficientAdamW(model.parameters(), lr=1e-6)
        episodes = random_episodes(prompts, group, length, tokenizer.vocab_size)

        def work() -> None:
            update_policy(model, optimizer, episodes, micro_batch_tokens=args.micro_batch_tokens)

    loaded = common.peak_gib(args.device)
    elapsed = common.seconds(work, args.device)
    return {"loaded": loaded, "peak": common.peak_gib(args.device), "seconds": elapsed}


def random_episodes(prompts: list[list[int]], group: int, length: int, vocab_size: int) -> list[Episode]:
    """Full-length answers of random ids, every second one good."""
    answers = common.random_prompts(len(prompts) * group, length, vocab_size, seed=1)
    return [
        Episode(
            group_id=i // group, prompt_ids=prompts[i // group], response_ids=ids, logprobs=[-10.0] * length, text="",
            finish_reason="length", advantage=1.0 if i % 2 else -1.0, vocab_size=vocab_size,
        )
        for i, ids in enumerate(answers)
    ]  # fmt: skip


def in_a_process(args: argparse.Namespace, folder: Path, phase: str, length: int, group: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--ckpt", str(folder), "--phase", phase]
    command += ["--lengths", str(length), "--groups", str(group)]
    for name in ("device", "dtype", "seed", "prompts", "prompt_tokens", "micro_batch_tokens"):
        command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    command += ["--gradient-checkpointing"] * args.gradient_checkpointing
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:  # a killed process has nothing to say, and one out of memory a last line
        reason = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        return {"failed": reason}
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048], help="tokens of an answer")
    parser.add_argument("--groups", type=int, nargs="+", default=[8], help="answers a prompt")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=134)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in the update")
    parser.add_argument(
        "--phase", choices=("rollout", "update"), help="measure one point in this process, print its JSON"
    )
    args = parser.parse_args(argv)
    if args.phase:
        print(json.dumps(point(args, Path(args.ckpt))))
        return
    results = []
    with common.checkpoint(args) as folder:
        for group in args.groups:
            for length in args.lengths:
                both = {phase: in_a_process(args, folder, phase, length, group) for phase in ("rollout", "update")}
                results.append({"group": group, "length": length, **both})
    rows = []
    for r in results:
        tokens = args.prompts * r["group"] * r["length"]
        figures = [r[phase].get(key, "failed") for phase in ("rollout", "update") for key in ("loaded", "peak")]
        costs = [r[p]["seconds"] / tokens * 1e3 if "seconds" in r[p] else "failed" for p in ("rollout", "update")]
        rows.append((f"{r['group']} x {r['length']}", tokens, *figures, *costs))
    header = ("group x length", "tokens", "rollout: loaded", "peak GiB", "update: loaded", "peak GiB")
    print(common.table((*header, "rollout ms a token", "update ms a token"), rows), "\n")
    common.print_json(args, results)


if __name__ == "__main__":
    main()
