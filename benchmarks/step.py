"""One GRPO step, ours beside TRL's: the same checkpoint, prompts, lengths and dtype, in one run, taking turns.

    python benchmarks/step.py --ckpt models/Qwen2.5-0.5B-Instruct
    python benchmarks/step.py --random 0.5b --device cuda               # random weights: speed needs no others

Each side is a process of its own, so that its peak memory is its own. One works while the others wait. `generate` is
transformers' by itself. Nothing ends an answer early (no side has stop ids), the rewards alternate between 0 and 1, so
that every token has a gradient, and there is no KL term. Both hold bf16 weights and compute in them (TRL's autocast
is off, for it would only add casts), without gradient checkpointing. TRL steps with torch's fused AdamW on bf16
weights. Ours keeps fp32 masters and moments besides, and asks for large memory pages (linear.py), which the others get
with --large-pages. A rollout ends when its rewards are known. The update is the rest.
Tokens a second count response tokens. Medians over `--repeats` steps, after `--warmup` that are not counted.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import common
import torch

from data_types import MiniBatch, Reward
from grpo import compute_advantages, rollout, update_policy
from math_task import CountdownTask
from optimizer import MemoryEfficientAdamW
from rollout.sampling import SamplingParams
from run.pretrained import load_pretrained
from tokenizer import Tokenizer

LR = 1e-6
Timing = dict[str, float]


def prompt_texts(args: argparse.Namespace, folder: Path) -> Iterator[list[str]]:
    """The prompts of each step, the warm-up included: Countdown's, and for random weights cut to --prompt-tokens."""
    tokenizer, task = Tokenizer.from_pretrained(folder), CountdownTask(seed=args.seed)
    problems = task.problems("train", (args.warmup + args.repeats) * args.prompts)
    if args.ckpt:
        texts = [tokenizer.render_chat(p.messages) + p.response_prefix for p in problems]
    else:  # a token a byte; the end of a problem is what differs
        texts = ["".join(m["content"] for m in p.messages) for p in problems]
        texts = [(text * (1 + args.prompt_tokens // len(text)))[-args.prompt_tokens :] for text in texts]
    for start in range(0, len(texts), args.prompts):
        yield texts[start : start + args.prompts]


# ---------------------------------------------------------------------------------------------------------------------
# The sides: each sends "ready", then a timing for each step it is told to do, then its peak memory


class AlternatingReward:
    """A task that pays 0, 1, 0, 1, ... whatever the answer."""

    def __init__(self):
        self.rewards = itertools.cycle([0.0, 1.0])

    def reward(self, problem, response: str) -> Reward:
        return Reward(next(self.rewards), {})


def ours(pipe: Connection, args: argparse.Namespace, folder: Path) -> None:
    model, _ = load_pretrained(folder, common.DTYPES[args.dtype], args.device)
    tokenizer = common.endless_tokenizer(folder)
    optimizer = MemoryEfficientAdamW(model.parameters(), lr=LR)
    sampling = SamplingParams(n=args.group_size, max_new_tokens=args.new_tokens)
    task, batches = AlternatingReward(), list(prompt_texts(args, folder))
    pipe.send("ready")
    for number, texts in enumerate(batches):
        pipe.recv()
        batch = MiniBatch([None] * len(texts), texts, [tokenizer.encode(text) for text in texts])
        started = _now(args.device)
        episodes = rollout(model, tokenizer, task, batch, sampling, seed=number)
        sampled = _now(args.device)
        update_policy(
            model, optimizer, compute_advantages(episodes), max_new_tokens=args.new_tokens,
            micro_batch_tokens=args.micro_batch_tokens,
        )  # fmt: skip
        done = _now(args.device)
        tokens = sum(len(e.response_ids) for e in episodes)
        pipe.send(_timing(sampled - started, done - sampled, tokens, sum(map(len, batch.prompt_ids))))
    pipe.send(common.peak_gib(args.device))


def trl(pipe: Connection, args: argparse.Namespace, folder: Path) -> None:
    _set_pages(args)
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rows, spent = args.prompts * args.group_size, {}
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=args.device == "cpu", bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=args.trl_batch, gradient_accumulation_steps=rows // args.trl_batch,
        num_generations=args.group_size, max_completion_length=args.new_tokens, max_steps=args.warmup + args.repeats,
        learning_rate=LR, lr_scheduler_type="constant", beta=0.0, loss_type="dapo", temperature=1.0, top_k=0,
        top_p=1.0, max_grad_norm=1.0, optim="adamw_torch_fused", shuffle_dataset=False, use_vllm=False, seed=args.seed,
        report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=args.device != "cpu",
    )  # fmt: skip

    def alternating(completion_ids: list[list[int]], **_) -> list[float]:
        spent["tokens"] = sum(map(len, completion_ids))
        return [float(i % 2) for i in range(len(completion_ids))]

    class LockStep(TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            pipe.recv()
            spent["started"] = _now(args.device)

        def on_step_end(self, *_, **__) -> None:
            seconds = _now(args.device) - spent["started"]
            pipe.send(_timing(spent["rollout"], seconds - spent["rollout"], spent["tokens"], spent["prompt_tokens"]))

    texts = [text for step in prompt_texts(args, folder) for text in step]
    trainer = GRPOTrainer(
        model=_transformers_model(args, folder), reward_funcs=alternating, args=config, callbacks=[LockStep()],
        train_dataset=Dataset.from_dict({"prompt": texts}), processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    trainer.eos_token_ids = list(common.NO_STOP_ID)
    trainer.generation_config.eos_token_id = trainer.generation_kwargs["eos_token_id"] = None
    generate_and_score = trainer._generate_and_score_completions

    def timed(inputs):
        started = _now(args.device)
        batch = generate_and_score(inputs)
        spent["rollout"] = _now(args.device) - started
        spent["prompt_tokens"] = int(batch["prompt_mask"].sum()) // args.group_size
        return batch

    trainer._generate_and_score_completions = timed
    pipe.send("ready")
    trainer.train()
    pipe.send(common.peak_gib(args.device))


def generate(pipe: Connection, args: argparse.Namespace, folder: Path) -> None:
    _set_pages(args)
    from transformers import AutoTokenizer

    model = _transformers_model(args, folder).eval()
    tokenizer, batches = AutoTokenizer.from_pretrained(folder, padding_side="left"), list(prompt_texts(args, folder))
    pipe.send("ready")
    for texts in batches:
        pipe.recv()
        inputs = tokenizer([t for t in texts for _ in range(args.group_size)], return_tensors="pt", padding=True)
        inputs = inputs.to(args.device)
        started = _now(args.device)
        with torch.inference_mode():
            ids = model.generate(
                **inputs, max_new_tokens=args.new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                pad_token_id=tokenizer.pad_token_id, repetition_penalty=1.0,
            )  # fmt: skip
        elapsed = _now(args.device) - started
        tokens = ids[:, inputs["input_ids"].shape[1] :].numel()
        pipe.send(_timing(elapsed, 0.0, tokens, int(inputs["attention_mask"].sum()) // args.group_size))
    pipe.send(common.peak_gib(args.device))


def _set_pages(args: argparse.Namespace) -> None:
    """Undo or keep the settings that the import of our modules made in torch, before its first tensor."""
    os.environ["THP_MEM_ALLOC_ENABLE"] = str(int(args.large_pages))


def _transformers_model(args: argparse.Namespace, folder: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=common.DTYPES[args.dtype]).to(args.device)
    model.generation_config.eos_token_id = None  # nothing ends an answer
    return model


def _now(device: str) -> float:
    common.synchronize(device)
    return time.perf_counter()


def _timing(rollout_s: float, update_s: float, tokens: int, prompt_tokens: int) -> Timing:
    return {"rollout_s": rollout_s, "update_s": update_s, "tokens": tokens, "prompt_tokens": prompt_tokens}


# ---------------------------------------------------------------------------------------------------------------------
# Taking turns

SIDES = {"ours": ours, "trl": trl, "generate": generate}


def in_lock_step(args: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """The sides' counted steps, taking turns: name -> {"steps": [Timing], "peak_gib": x}."""
    sides = {name: SIDES[name] for name in args.sides}
    found = common.take_turns(sides, args.warmup + args.repeats, args, folder)
    return {name: {"steps": f["turns"][args.warmup :], "peak_gib": f["last"]} for name, f in found.items()}


def summarise(found: dict[str, dict], args: argparse.Namespace) -> dict[str, dict]:
    """Medians of each side. Raises ValueError where the sides did not do the same work."""
    work = {name: {(t["tokens"], t["prompt_tokens"]) for t in side["steps"]} for name, side in found.items()}
    expected = args.prompts * args.group_size * args.new_tokens
    orders = {tuple(t["prompt_tokens"] for t in side["steps"]) for side in found.values()}
    if len(orders) > 1 or any(tokens != expected for pairs in work.values() for tokens, _ in pairs):
        raise ValueError(f"the sides did different work, expected {expected} tokens a step of each: {work}")
    summary = {}
    for name, side in found.items():
        rollout_s, update_s = (statistics.median(t[key] for t in side["steps"]) for key in ("rollout_s", "update_s"))
        summary[name] = {
            "rollout_tok_s": expected / rollout_s,
            "update_tok_s": expected / update_s if update_s else None,
            "rollout_s": rollout_s,
            "update_s": update_s or None,
            "step_s": statistics.median(t["rollout_s"] + t["update_s"] for t in side["steps"]) if update_s else None,
            "peak_gib": side["peak_gib"],
        }
    return summary


def ratios(summary: dict[str, dict]) -> dict[str, dict[str, float]]:
    """How many times faster we are than each other side. For memory, our peak over theirs."""
    mine, found = summary.get("ours"), {}
    for name, theirs in summary.items():
        if mine is None or name == "ours":
            continue
        keys = [key for key in ("rollout_s", "update_s", "step_s") if theirs[key]]
        found[name] = {key.removesuffix("_s"): theirs[key] / mine[key] for key in keys}
        found[name]["peak_memory"] = mine["peak_gib"] / theirs["peak_gib"]
    return found


def main(argv: list[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument(
        "--prompt-tokens", type=int, default=134, help="of the random model; a checkpoint's are what Countdown gives"
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="steps of each side, after the warm-up")
    parser.add_argument(
        "--warmup", type=int, default=2, help="steps that are not counted (default: %(default)s); until then a process "
        "asks the system for fresh memory, which can take half the time of a step",
    )  # fmt: skip
    parser.add_argument("--micro-batch-tokens", type=int, default=16384, help="ours (default: %(default)s)")
    parser.add_argument("--trl-batch", type=int, default=8, help="answers in TRL's micro-batch (default: %(default)s)")
    parser.add_argument(
        "--large-pages", action="store_true", help="the other sides, too, run with THP_MEM_ALLOC_ENABLE=1"
    )
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    args = parser.parse_args(argv)
    if args.prompts * args.group_size % args.trl_batch or args.group_size % 2:
        parser.error("expected an even --group-size, and --trl-batch to divide the answers of a step")
    with common.checkpoint(args) as folder:
        found = in_lock_step(args, folder)
    summary = summarise(found, args)
    print(common.table(
        ("side", "rollout tok/s", "update tok/s", "rollout s", "update s", "step s", "peak GiB"),
        [(name, *("-" if value is None else value for value in row.values())) for name, row in summary.items()],
    ), "\n")  # fmt: skip
    for name, row in ratios(summary).items():
        print(f"ours against {name}: " + ", ".join(f"{key} {value:.2f}x" for key, value in row.items()))
    common.print_json(args, {"medians": summary, "ratios": ratios(summary), "steps": found})


if __name__ == "__main__":
    main()
