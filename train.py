"""Train a model with GRPO, from a released checkpoint to a better policy.

    python train.py                                          # the bundled tiny model: minutes on two CPU cores
    python train.py --ckpt Qwen2.5-0.5B-Instruct             # the real job
    python train.py --config configs/cpu.yaml --steps 20     # a file, and flags over it
    python train.py --resume                                 # go on with the newest run
    torchrun --nproc-per-node 2 train.py                     # two processes, one run: distributed.py

Exit codes: 0 done; 2 a mistake, told in one line; 3 too many updates in a row were refused; 4 the last checkpoint could
not be written; 130 and 143 stopped by Ctrl-C or SIGTERM, after saving; 1 where one of several processes was lost.

Every problem is drawn by its number and every answer from a seed of its own (seed, step, prompt, sample), so there is
no random state to carry from step to step: a resumed run does what the uninterrupted one would have done.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from data_types import Episode, MiniBatch, Problem
from grpo import GRPO, Metrics, reward_metrics, rollout
from math_task import task_from_config
from model.lora import has_lora, load_adapters, save_adapters, trainable
from parallel import distributed
from parallel.sharding import is_sharded, whole, whole_optimizer
from rollout.generation import SamplingParams
from run.checkpoint import find_checkpoint, load_checkpoint, random_states, rewind, save_checkpoint, set_random_states
from run.closed_pipe import nobody_reads
from run.config import Config, config_files, new_run_dir, parse_args
from run.flags import one_line
from run.pretrained import load_policy, locate_pretrained
from run.progress import duration
from run.run_log import NoLog, RunLog, read_metrics
from update.guards import NUMBERS_ENDED_IT, Guard, not_finite_answer

logger = logging.getLogger("train")
SHOWN = 8  # held-out answers of each evaluation that are kept for people
SHOWN_MEANS = ("reward", "solved", "full_format", "false_sums", "completions/mean_length",
               "completions/clipped_ratio", "frac_reward_missing")  # fmt: skip
NOT_SAVED = 4  # exit code


def train(config: Config) -> int:
    """The whole job. Returns the exit code: 0; 128 + the signal that ended it early; NUMBERS_ENDED_IT where too many
    updates in a row were refused; NOT_SAVED where the disk took no checkpoint of the last step."""
    run_dir, resumed = distributed.from_main(lambda: where_to_begin(config))
    random.seed(config.seed)  # nothing here draws from the global generators, but a task of the user's may
    torch.manual_seed(config.seed)

    task = task_from_config(config)
    model, tokenizer = load_policy(
        config, locate_pretrained(config.ckpt) if config.lora_rank or not resumed else resumed
    )
    if resumed and config.lora_rank:  # the checkpoint's model.safetensors is merged; training goes on from its parts
        load_adapters(model, resumed / "adapter", config.lora_dropout)
    trainer = GRPO(config, model=model, tokenizer=tokenizer, task=task)
    held_out = task.test_problems(config.eval_problems)
    check_room(trainer, held_out)
    say(describe(trainer))
    if config.dry_run:
        return dry_run(trainer)

    first = step = 0
    saved = True
    if resumed:
        state = load_checkpoint(resumed, trainer.optimizer)
        set_random_states(state["random"])
        trainer.load_state_dict(state["trainer"])
        first = step = trainer.step_count = state["step"]
        distributed.on_main(lambda: rewind(run_dir, first, config.keep_checkpoints))

    stop = StopRequest()
    told = dataclasses.replace(config, eval_problems=len(held_out))  # a finite data set may have fewer than asked for
    with distributed.on_main(lambda: RunLog(run_dir, told, total_steps=config.steps)) or NoLog() as log:
        if config.resume:
            log.truncate_after(first if resumed else -1)
        if held_out and not resumed:
            log.phase("evaluating")
            log.log_step(0, evaluate(trainer, held_out, partial(log.log_held_out, 0, decode=tokenizer.decode)))

        for step in range(first + 1, config.steps + 1):
            log.phase("rollout and update")
            problems = task.problems("train", config.prompts_per_step, start=(step - 1) * config.prompts_per_step)
            episodes, metrics = trainer.step(MiniBatch.from_problems(problems, tokenizer))
            metrics["memory/peak_gib"] = max(distributed.gather_each(peak_gib(model.device)))
            if is_due(step, config.checksum_every) and not is_sharded(model):
                distributed.check_equal_weights(trainable(model), step)
            log.log_samples(step, episodes, tokenizer.decode)

            if held_out and (step == config.steps or is_due(step, config.eval_every)):
                log.phase("evaluating")
                metrics |= evaluate(trainer, held_out, partial(log.log_held_out, step, decode=tokenizer.decode))
            log.log_step(step, metrics)
            trainer.guard.watch(step, metrics)
            if step == first + 1:
                left = duration(metrics["step_time"] * (config.steps - first))
                log.say(f"a step takes {metrics['step_time']:.1f} s; the run will last about {left}, and evaluations")
            # asked once: a signal after this line ends the next step, saved as well
            stopping = stop.agreed() or trainer.guard.gave_up
            if stopping or step == config.steps or is_due(step, config.save_every):
                log.phase("saving")
                saved = save(run_dir, step, trainer, metrics)
            if stopping:
                break
        log.print_summary()
    say(f"checkpoints, metrics and samples are in {run_dir}")
    return how_it_ended(run_dir, step, saved, stop, trainer.guard)


def how_it_ended(run_dir: Path, step: int, saved: bool, stop: StopRequest, guard: Guard) -> int:
    """Say what ended a run and how to go on; the exit code."""
    ranks = distributed.world_size()
    python = "python" if ranks == 1 else f"torchrun --nproc-per-node {ranks}"
    go_on = f"go on with: {python} train.py --resume {run_dir}"
    if not saved:
        distributed.complain(f"train.py: step {step}, the last one, is on no disk; an earlier checkpoint is. {go_on}")
    if guard.gave_up:
        distributed.complain(
            f"train.py: ended after step {step}: {guard.refusals} updates in a row were refused, the last because of "
            f"{guard.diagnosis}. Look at that episode in samples.jsonl, try a lower --lr or --dtype fp32, then {go_on}"
        )
        return NUMBERS_ENDED_IT
    if stop.requested:
        say(f"stopped by {stop.requested.name} after step {step}; {go_on}")
        return 128 + stop.requested
    return 0 if saved else NOT_SAVED


def find_resumed(config: Config, run_dir: Path) -> Path | None:
    """The checkpoint to go on from; None: from the beginning. So is a run that was killed before its first checkpoint
    was due, for what it did is cheaper to do again than to have no command that goes on."""
    if not config.resume or (config.resume == "auto" and not (run_dir / "config.yaml").is_file()):
        return None
    where = "latest" if config.resume == "auto" else config.resume
    try:
        return find_checkpoint(where, run_dir)
    except FileNotFoundError:
        run = Path(where) if where != "latest" else run_dir
        done = len(read_metrics(run)) if (run / "metrics.jsonl").is_file() else 0
        began = (run / "config.yaml").is_file() and not list(run.glob("checkpoints/[sl]*"))  # no step-... or latest
        if not began or done > (config.save_every or config.steps) + 1:
            raise
    logger.warning("%s was ended before its first checkpoint: it begins again", run)
    return None


def where_to_begin(config: Config) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint it goes on from."""
    run_dir = new_run_dir(config)
    return run_dir, find_resumed(config, run_dir)


def say(text: str) -> None:
    if not distributed.is_main():
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        nobody_reads()
        logger.warning("nobody reads standard output any more; the run goes on")


def evaluate(
    trainer: GRPO, problems: list[Problem], show: Callable[[list[Episode], bool], None] | None = None
) -> Metrics:
    """Held-out problems, greedy and sampled: `eval_greedy_*` and `eval_*`, means over problems and answers.

    show: gets an answer to each of the first few problems, and whether it was sampled (else it is greedy).
    """
    config, metrics = trainer.config, {}
    batch = MiniBatch.from_problems(problems, trainer.tokenizer)
    ways = {"eval_greedy_": SamplingParams(1, config.max_new_tokens, temperature=0.0)}
    if config.eval_samples:
        ways["eval_"] = SamplingParams(config.eval_samples, config.max_new_tokens, config.temperature)
    for prefix, sampling in reversed(ways.items()):
        episodes = rollout(
            trainer.model, trainer.tokenizer, trainer.task, batch, sampling, seed=config.seed, must_be_finite=False
        )
        if (number := not_finite_answer(episodes)) is not None:
            problem, token = episodes[number].problem.id, len(episodes[number].response_ids) - 1
            logger.warning("evaluation: not finite logits cut answers, which get no reward; the first is to problem "
                           "%s, at token %d", problem, token)  # fmt: skip
        if show:
            show(episodes[:: sampling.n][:SHOWN], sampling.temperature > 0)
        means = reward_metrics(episodes, trainer.task)
        for name in SHOWN_MEANS:
            if name in means:
                metrics[prefix + name.removeprefix("completions/")] = means[name]
        for part in dict.fromkeys(part for e in episodes for part in e.reward_parts):
            metrics[f"{prefix}{part}"] = means[f"rewards/{part}/mean"]
    return metrics


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def save(run_dir: Path, step: int, trainer: GRPO, metrics: Metrics) -> bool:
    """A checkpoint, by the first process; where the disk refuses, the run goes on and says so. Whether it is there."""
    model, optimizer = whole(trainer.model), whole_optimizer(trainer.optimizer)  # every process takes part
    state = {"random": random_states(), "trainer": trainer.state_dict()}
    base = trainer.config.ckpt

    def adapters(folder: Path) -> None:
        save_adapters(model, folder / "adapter", str(Path(base).resolve()) if Path(base).is_dir() else base)

    def written() -> bool:
        try:
            save_checkpoint(
                run_dir, step, model, trainer.tokenizer, optimizer, state, keep=trainer.config.keep_checkpoints,
                score=metrics.get("eval_reward"), extra=adapters if has_lora(model) else None,
            )  # fmt: skip
        except OSError as error:
            logger.error(
                "no checkpoint at step %d: %s; the previous one is untouched, and training goes on", step, error
            )
            return False
        return True

    return distributed.from_main(written)


class StopRequest:
    """Ctrl-C and SIGTERM let the running step finish; a second one ends the program at once."""

    def __init__(self):
        self.requested: signal.Signals | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def agreed(self) -> bool:
        """Whether any process was asked; then all know it, and stop after the same step."""
        number = max(distributed.gather_each(int(self.requested or 0)))
        if number:
            self.requested = signal.Signals(number)
        return bool(number)

    def _handle(self, number: int, frame) -> None:
        for again in (signal.SIGINT, signal.SIGTERM):  # before anything is said: who answers that at once is heard
            signal.signal(again, signal.SIG_DFL)
        self.requested = signal.Signals(number)
        if distributed.is_main():
            name = self.requested.name
            print(f"\n{name}: finishing this step, then saving; once more to leave at once", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# What is said, and refused, before the first step


def check_room(trainer: GRPO, held_out: list[Problem]) -> None:
    """Refuse a cap that leaves the prompts no room: of a data set the longest ones, else held-out and first ones."""
    config, context = trainer.config, trainer.model.config.max_position_embeddings
    problems = held_out + trainer.task.problems("train", config.prompts_per_step) + trainer.task.longest_problems(4)
    lengths = [len(ids) for ids in MiniBatch.from_problems(problems, trainer.tokenizer).prompt_ids]
    longest = max(lengths)
    if longest + config.max_new_tokens > context:
        room = context - longest
        mend = (
            f"lower it to {room} or less"
            if room > 0
            else f"leave out problem {problems[lengths.index(longest)].id!r:.60}"
        )
        raise ValueError(
            f"--max-new-tokens {config.max_new_tokens} and prompts of up to {longest} tokens do not fit the model's "
            f"context of {context}: {mend}"
        )


def describe(trainer: GRPO) -> str:
    """What is about to run: model, precision, tokens a step, memory."""
    config, model = trainer.config, trainer.model
    parameters = sum(p.numel() for p in model.parameters())
    answers = config.prompts_per_step * config.group_size
    dtype = str(model.dtype).removeprefix("torch.")
    device, host = estimate_gib(trainer)
    processes, n = "", distributed.world_size()
    if n > 1:
        processes = f", by {n} processes with {'a slice' if is_sharded(model) else 'all'} of the weights each"
    return (
        f"{config.ckpt}: {parameters / 1e6:.1f} M parameters in {dtype} on {model.device}; "
        f"{config.task}, {config.loss_type}\n"
        f"a step: {config.prompts_per_step} prompts x {config.group_size} answers x up to "
        f"{config.max_new_tokens} tokens, "
        f"{answers * config.max_new_tokens:,} at most{processes}; {config.steps} steps\n"
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
    peak = max(distributed.gather_each(peak_gib(trainer.model.device)))
    say(f"dry run: peak memory {peak:.2f} GiB for the largest possible step; nothing was written")
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
    if not distributed.is_main():
        logging.disable(logging.WARNING)  # all processes would say the same
    try:
        config = parse_args(argv)
        say("settings: " + ", ".join(str(path) for path in config_files(argv)) + (" and flags" if argv else ""))
        with distributed.process_group(config.collective_timeout, config.device):
            return train(config)
    except (ValueError, OSError) as error:
        distributed.complain(f"train.py: {one_line(error)}")
        return 2
    except distributed.RankError as error:
        distributed.complain(f"train.py: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
