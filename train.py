"""Train a model with GRPO, from a released checkpoint to a better policy.

    python train.py                                          # the bundled tiny model: minutes on two CPU cores
    python train.py --ckpt Qwen2.5-0.5B-Instruct             # the real job
    python train.py --config configs/cpu.yaml --steps 20     # a file, and flags over it
    python train.py --resume                                 # go on with the newest run

Every problem is drawn by its number and every answer from a seed of its own (seed, step, prompt, sample), so there is
no random state to carry from step to step: a resumed run does what the uninterrupted one would have done.
"""

from __future__ import annotations

import logging
import resource
import signal
import sys
from pathlib import Path

import torch

from checkpoint import find_checkpoint, load_checkpoint, random_states, rewind, save_checkpoint, set_random_states
from config import Config, config_files, new_run_dir, parse_args
from data_types import MiniBatch, Problem
from generation import SamplingParams
from grpo import GRPO, Metrics, load_policy, reward_metrics, rollout
from lora import has_lora, load_adapters, save_adapters, trainable
from math_task import task_from_config
from pretrained import locate_pretrained
from progress import duration
from run_log import RunLog

logger = logging.getLogger("train")


def train(config: Config) -> int:
    """The whole job. Returns the exit code: 0, or 128 + the signal that ended it early."""
    run_dir = new_run_dir(config)
    resumed = (
        find_checkpoint("latest" if config.resume == "latest" else config.resume, run_dir) if config.resume else None
    )

    task = task_from_config(config)
    model, tokenizer = load_policy(
        config, locate_pretrained(config.ckpt) if config.lora_rank or not resumed else resumed
    )
    if resumed and config.lora_rank:  # the checkpoint's model.safetensors is merged; training goes on from its parts
        load_adapters(model, resumed / "adapter", config.lora_dropout)
    trainer = GRPO(config, model=model, tokenizer=tokenizer, task=task)
    held_out = task.test_problems(config.eval_problems)
    check_room(trainer, held_out)
    print(describe(trainer), flush=True)
    if config.dry_run:
        return dry_run(trainer)

    first = step = 0
    if resumed:
        state = load_checkpoint(resumed, trainer.optimizer)
        set_random_states(state["random"])
        trainer.load_state_dict(state["trainer"])
        first = step = trainer.step_count = state["step"]
        rewind(run_dir, first)

    stop = StopRequest()
    with RunLog(run_dir, config, total_steps=config.steps) as log:
        if resumed:
            log.truncate_after(first)
        elif held_out:
            log.phase("evaluating")
            log.log_step(0, evaluate(trainer, held_out))

        for step in range(first + 1, config.steps + 1):
            log.phase("rollout and update")
            problems = task.problems("train", config.prompts_per_step, start=(step - 1) * config.prompts_per_step)
            episodes, metrics = trainer.step(MiniBatch.from_problems(problems, tokenizer))
            metrics["memory/peak_gib"] = peak_gib(model.device)
            log.log_samples(step, episodes, tokenizer.decode)

            if held_out and (step == config.steps or is_due(step, config.eval_every)):
                log.phase("evaluating")
                metrics |= evaluate(trainer, held_out)
            log.log_step(step, metrics)
            if step == first + 1:
                left = duration(metrics["step_time"] * (config.steps - first))
                log.console.print(
                    f"a step takes {metrics['step_time']:.1f} s; the run will last about {left}, and evaluations"
                )
            stopping = bool(stop.requested)  # asked once: a signal after this line ends the next step, saved as well
            if stopping or step == config.steps or is_due(step, config.save_every):
                log.phase("saving")
                save(run_dir, step, trainer, metrics)
            if stopping:
                break
        log.print_summary()
    print(f"checkpoints, metrics and samples are in {run_dir}")
    if stop.requested:
        print(f"stopped by {stop.requested.name} after step {step}; go on with: python train.py --resume {run_dir}")
        return 128 + stop.requested
    return 0


def evaluate(trainer: GRPO, problems: list[Problem]) -> Metrics:
    """Held-out problems, greedy and sampled: `eval_greedy_*` and `eval_*`, means over problems and answers."""
    config, metrics = trainer.config, {}
    batch = MiniBatch.from_problems(problems, trainer.tokenizer)
    ways = {"eval_greedy_": SamplingParams(1, config.max_new_tokens, temperature=0.0)}
    if config.eval_samples:
        ways["eval_"] = SamplingParams(config.eval_samples, config.max_new_tokens, config.temperature)
    for prefix, sampling in reversed(ways.items()):
        episodes = rollout(trainer.model, trainer.tokenizer, trainer.task, batch, sampling, seed=config.seed)
        means = reward_metrics(episodes, trainer.task)
        for name in ("reward", "solved", "false_sums", "completions/mean_length", "completions/clipped_ratio"):
            if name in means:
                metrics[prefix + name.removeprefix("completions/")] = means[name]
        for part in episodes[0].reward_parts:
            metrics[f"{prefix}{part}"] = means[f"rewards/{part}/mean"]
    return metrics


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def save(run_dir: Path, step: int, trainer: GRPO, metrics: Metrics) -> None:
    """A checkpoint; where the disk refuses, the run goes on and says so."""
    state = {"random": random_states(), "trainer": trainer.state_dict()}
    base = trainer.config.ckpt

    def adapters(folder: Path) -> None:
        save_adapters(trainer.model, folder / "adapter", str(Path(base).resolve()) if Path(base).is_dir() else base)

    try:
        save_checkpoint(
            run_dir, step, trainer.model, trainer.tokenizer, trainer.optimizer, state,
            keep=trainer.config.keep_checkpoints, score=metrics.get("eval_reward"),
            extra=adapters if has_lora(trainer.model) else None,
        )  # fmt: skip
    except OSError as error:
        logger.error("no checkpoint at step %d: %s; the previous one is untouched, and training goes on", step, error)


class StopRequest:
    """Ctrl-C and SIGTERM let the running step finish; a second one ends the program at once."""

    def __init__(self):
        self.requested: signal.Signals | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        self.requested = signal.Signals(number)
        print(f"\n{self.requested.name}: finishing this step, then saving; once more to leave at once", file=sys.stderr)
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_DFL)


# ---------------------------------------------------------------------------------------------------------------------
# What is said, and refused, before the first step


def check_room(trainer: GRPO, held_out: list[Problem]) -> None:
    """Refuse a cap that leaves the prompts no room. Training prompts are as long as held-out ones, near enough."""
    config, context = trainer.config, trainer.model.config.max_position_embeddings
    problems = held_out + trainer.task.problems("train", config.prompts_per_step)
    longest = max(len(ids) for ids in MiniBatch.from_problems(problems, trainer.tokenizer).prompt_ids)
    if longest + config.max_new_tokens > context:
        raise ValueError(
            f"--max-new-tokens {config.max_new_tokens} and prompts of up to {longest} tokens do not fit the model's "
            f"context of {context}: lower it to {context - longest} or less"
        )


def describe(trainer: GRPO) -> str:
    """What is about to run: model, precision, tokens a step, memory."""
    config, model = trainer.config, trainer.model
    parameters = sum(p.numel() for p in model.parameters())
    answers = config.prompts_per_step * config.group_size
    dtype = str(model.dtype).removeprefix("torch.")
    device, host = estimate_gib(trainer)
    return (
        f"{config.ckpt}: {parameters / 1e6:.1f} M parameters in {dtype} on {model.device}; "
        f"{config.task}, {config.loss_type}\n"
        f"a step: {config.prompts_per_step} prompts x {config.group_size} answers x up to "
        f"{config.max_new_tokens} tokens, "
        f"{answers * config.max_new_tokens:,} at most; {config.steps} steps\n"
        f"memory: about {device:.1f} GiB" + (f" on {model.device}, {host:.1f} GiB beside it" if host else "")
    )


def estimate_gib(trainer: GRPO) -> tuple[float, float]:
    """(on the model's device, in the memory of a host beside it): weights, gradients and the larger of activations of a
    micro-batch and the cache of a rollout; fp32 masters and moments are the host's."""
    model, c = trainer.model, trainer.config
    sizes = model.config
    element = model.dtype.itemsize
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in trainable(model))
    on_cpu = model.device.type == "cpu"
    state = trained * (8 + (0 if element == 4 and on_cpu else 4))
    weights = parameters * element * (1 if trainer.reference in (None, model) else 2)
    tokens = min(c.micro_batch_tokens, c.prompts_per_step * (128 + c.group_size * c.max_new_tokens))
    layer = 12 * sizes.hidden_size * element + 5 * sizes.intermediate_size * element + 8 * sizes.hidden_size
    activations = tokens * (layer * (1 if c.gradient_checkpointing else sizes.num_hidden_layers) + 2 * 8192 * element)
    activations += tokens * sizes.num_hidden_layers * sizes.hidden_size * element
    per_token = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim * element
    rows = min(512, c.prompts_per_step * c.group_size)
    cache = rows * (c.max_new_tokens * per_token + 3 * 4 * sizes.vocab_size)
    device = weights + trained * element + max(activations, cache)
    beside = state if c.cpu_optimizer and not on_cpu else 0
    return (device + state - beside) / 2**30, beside / 2**30


def dry_run(trainer: GRPO) -> int:
    """The largest possible step, with made-up answers, so that its memory is known; nothing is written."""
    c = trainer.config
    problems = trainer.task.problems("train", c.prompts_per_step)
    batch = MiniBatch.from_problems(problems, trainer.tokenizer)
    endless = _NeverStops(trainer.tokenizer)
    episodes = rollout(trainer.model, endless, trainer.task, batch, trainer.sampling)
    for i, episode in enumerate(episodes):
        episode.advantage = 1.0 if i % 2 else -1.0
    trainer.update(episodes)
    print(
        f"dry run: peak memory {peak_gib(trainer.model.device):.2f} GiB for the largest possible step; "
        "nothing was written"
    )
    return 0


class _NeverStops:
    """A tokenizer without stop ids."""

    def __init__(self, tokenizer):
        self.eos_token_ids, self.vocab_size, self.decode = (), tokenizer.vocab_size, tokenizer.decode


def peak_gib(device: torch.device) -> float:
    """Peak memory so far: of the GPU's allocator, or of the process (ru_maxrss is in KiB, on macOS in bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        config = parse_args(argv)
        print("settings: " + ", ".join(str(path) for path in config_files(argv)) + (" and flags" if argv else ""))
        return train(config)
    except (ValueError, FileNotFoundError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
