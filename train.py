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
import os
import random
import shlex
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from data_types import Episode, MiniBatch, Problem
from grpo import GRPO, rollout
from math_task import task_from_config
from model.lora import has_lora, load_adapters, save_adapters, trainable
from parallel import distributed
from parallel.sharding import is_sharded, whole, whole_optimizer
from qwen2_llm import Qwen2ForCausalLM
from rollout.sampling import SamplingParams
from run.checkpoint import (
    NotFiniteError,
    find_checkpoint,
    first_not_finite,
    load_checkpoint,
    random_states,
    rewind,
    save_checkpoint,
    set_random_states,
)
from run.config import Config, config_files, new_run_dir, parse_args
from run.flags import one_line
from run.memory_plan import describe, dry_run, peak_gib
from run.pretrained import load_policy, locate_pretrained
from run.resume_rules import Start, check_resume
from run.run_lock import RunLock
from run.run_log import NoLog, RunLog, read_metrics
from run.terminal import log_to_standard_error, run_program, write_now
from run.terminal import say as say_here
from run.trackers import check_installed
from tokenizer import Tokenizer
from update.guards import NUMBERS_ENDED_IT, Guard, not_finite_answer
from update.step_metrics import Metrics, reward_metrics

logger = logging.getLogger("train")
SHOWN = 8  # held-out answers of each evaluation that are kept for people
SHOWN_MEANS = ("reward", "solved", "full_format", "false_sums", "completions/mean_length",
               "completions/clipped_ratio", "frac_reward_missing")  # fmt: skip
NOT_SAVED = 4  # exit code
PROBE = "Use the numbers 3, 5 and 2 to make 13."  # a model's logits for it are checked before the model is saved
HANG_UP = getattr(signal, "SIGHUP", None)  # Windows has none
STOPS = [number for number in (signal.SIGINT, signal.SIGTERM, HANG_UP) if number]


def train(config: Config) -> int:
    """The whole job. Returns the exit code: 0; 128 + the signal that ended it early; NUMBERS_ENDED_IT if too many
    updates in a row were refused, or one broke the weights; NOT_SAVED if the last step is in no checkpoint."""
    with RunLock() as lock:
        return train_in(lock, config)


def train_in(lock: RunLock, config: Config) -> int:
    """`train`, with the lock of the run's folder, which is taken as soon as the folder is known to be there."""
    start = distributed.from_main(lambda: where_to_begin(config, lock))
    resumed = start.checkpoint
    if config.dtype == "auto" and start.dtype:  # another machine would choose another type, say
        config = dataclasses.replace(config, dtype=start.dtype)
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
    if task.data_summary:
        say(f"data: {task.data_summary}")
    if config.dry_run:
        peak = max(distributed.gather_each(dry_run(trainer)))
        say(f"dry run: peak memory {peak:.2f} GiB for the largest possible step; nothing was written")
        return 0

    run_dir = distributed.from_main(lambda: claim(config, lock))
    first = step = 0
    saved, broken = True, None
    if resumed:
        state = load_checkpoint(resumed, trainer.optimizer)
        set_random_states(state["random"])
        trainer.load_state_dict(state["trainer"])
        apply_settings(trainer, start.before)
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
            problems = trainer.problems(config.prompts_per_step, start=(step - 1) * config.prompts_per_step)
            episodes, metrics = trainer.step(MiniBatch.from_problems(problems, tokenizer))
            broken = None if metrics["update/skipped"] else broken_weight(model)
            metrics["memory/peak_gib"] = max(distributed.gather_each(peak_gib(model.device)))
            if is_due(step, config.checksum_every) and not is_sharded(model):
                distributed.check_equal_weights(trainable(model), step)
            log.log_samples(step, episodes, tokenizer.decode)

            if held_out and not broken and (step == config.steps or is_due(step, config.eval_every)):
                log.phase("evaluating")
                metrics |= evaluate(trainer, held_out, partial(log.log_held_out, step, decode=tokenizer.decode))
            log.log_step(step, metrics)
            trainer.guard.watch(step, metrics)
            if step == first + 1:
                log.say_duration(metrics["step_time"])
            if broken:
                saved = False
                break
            # asked once: a signal after this line ends the next step, saved as well
            stopping = stop.agreed() or trainer.guard.gave_up
            if stopping or step == config.steps or is_due(step, config.save_every):
                log.phase("saving")
                saved = save(run_dir, step, trainer, metrics, start.base)
            if stopping:
                break
        log.print_summary()
    return how_it_ended(run_dir, step, saved, stop, trainer.guard, broken)


def how_it_ended(
    run_dir: Path, step: int, saved: bool, stop: StopRequest, guard: Guard, broken: str | None = None
) -> int:
    """Say how a run ended and how it can be continued; the exit code.

    Args:
        saved: whether the last step is in a checkpoint.
        broken: the weight that the last update made NaN or infinite.
    """
    go_on = distributed.from_main(lambda: way_to_go_on(run_dir, step))
    if broken:
        distributed.complain(
            f"train.py: ended after step {step}: its update made {broken} NaN or infinite, so it was not saved. Try a "
            f"lower --lr; {go_on}"
        )
        return NUMBERS_ENDED_IT
    if not saved:
        distributed.complain(f"train.py: step {step}, the last one, is on no disk; {go_on}")
    if guard.gave_up:
        distributed.complain(
            f"train.py: ended after step {step}: {guard.refusals} updates in a row were refused, the last because of "
            f"{guard.diagnosis}. Look at that episode in samples.jsonl, try a lower --lr or --dtype fp32, then {go_on}"
        )
        return NUMBERS_ENDED_IT
    if stop.requested:
        say(f"stopped by {stop.requested.name} after step {step}; {go_on}")
        return 128 + stop.requested if saved else NOT_SAVED
    if saved:
        here = shlex.quote(str(run_dir))
        say(f"all metrics are in {run_dir / 'summary.txt'}; look at the run with: python report.py {here}")
        say(f"talk to the model with: python chat.py --ckpt {here}/checkpoints/step-{step:06d}")
    return 0 if saved else NOT_SAVED


def way_to_go_on(run_dir: Path, step: int) -> str:
    """How a run that ended after `step` can be continued, which takes a checkpoint that is really there."""
    ranks = distributed.world_size()
    python = "python" if ranks == 1 else f"torchrun --nproc-per-node {ranks}"
    try:
        newest = find_checkpoint("latest", run_dir).name
    except OSError:
        return f"there is no checkpoint in {run_dir}, so that it cannot be continued: start a new run"
    where = "" if newest.startswith(f"step-{step:06d}") else f" from {newest}"
    return f"go on{where} with: {python} train.py --resume {shlex.quote(str(run_dir))}"


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


def where_to_begin(config: Config, lock: RunLock) -> Start:
    """The checkpoint to continue from, if any. Refuses a run folder that is in use, holds another run, or cannot be
    written, and options that a resume cannot apply. This comes before the model is loaded."""
    if config.dry_run:
        return check_resume(config, find_resumed(config, new_run_dir(config)))
    run_dir = new_run_dir(config)
    check_installed(config.log_to)
    check_writable(run_dir)
    if run_dir.is_dir():
        lock.take(run_dir)
    resumed = find_resumed(config, run_dir)
    if holds_a_run(run_dir) and resumed is not None and resumed.resolve().parent.parent != run_dir.resolve():
        raise ValueError(
            f"--run-dir {run_dir} holds another run than {resumed}, which would overwrite it: leave --run-dir out, or "
            "name a new folder"
        )
    if holds_a_run(run_dir) and config.resume is None:
        raise ValueError(f"{run_dir} already holds a run: continue it with --resume, or name another --run-dir")
    return check_resume(config, resumed)


def apply_settings(trainer: GRPO, before: Config | None) -> None:
    """Let the options of a resumed run be those of its config, which the checkpoint's state does not know."""
    c = trainer.config
    for group in trainer.optimizer.param_groups:
        group |= {"betas": c.betas, "eps": c.eps, "weight_decay": c.weight_decay}
    if before and (c.entropy_coef, c.entropy_target) != (before.entropy_coef, before.entropy_target):
        trainer.entropy_coef = trainer.applied_entropy_coef = c.entropy_coef  # an adaptive one begins anew


def holds_a_run(run_dir: Path) -> bool:
    """Whether a folder has metrics or checkpoints."""
    metrics = run_dir / "metrics.jsonl"
    return (metrics.is_file() and metrics.stat().st_size > 0) or any(run_dir.glob("checkpoints/step-*"))


def check_writable(run_dir: Path) -> None:
    """Raises ValueError if the run's folder cannot be made or written."""
    there = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"--run-dir {run_dir}: {there} is a file, expected a folder")
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ValueError(f"{there} cannot be written: name a folder for the run with --run-dir")


def claim(config: Config, lock: RunLock) -> Path:
    """Make the run's folder and lock it. Of two programs that were started together, each gets its own new folder."""
    while True:
        run_dir = new_run_dir(config)
        try:
            run_dir.mkdir(parents=True, exist_ok=config.run_dir is not None)
            lock.take(run_dir)
            return run_dir
        except OSError as error:
            if isinstance(error, FileExistsError) and config.run_dir is None:
                continue  # the other program was faster; the next number is free
            reason = error.strerror or error
            raise ValueError(f"{run_dir} cannot be written ({reason}): name a folder with --run-dir") from None


def say(text: str) -> None:
    """A line on standard output, by the first process."""
    if distributed.is_main():
        say_here(text)


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


def save(run_dir: Path, step: int, trainer: GRPO, metrics: Metrics, base_sum: str | None = None) -> bool:
    """Write a checkpoint, by the first process. Returns whether it is there; if not, the log says why, and all earlier
    checkpoints are untouched.

    base_sum: checksum of the base weights that the run needs besides, so that a resume can tell others from them.
    """
    model, optimizer = whole(trainer.model), whole_optimizer(trainer.optimizer)  # every process takes part
    state = {"random": random_states(), "trainer": trainer.state_dict()}
    if base_sum is not None:
        state["base"] = base_sum
    base = trainer.config.ckpt

    def adapters(folder: Path) -> None:
        save_adapters(model, folder / "adapter", str(Path(base).resolve()) if Path(base).is_dir() else base)

    def written() -> bool:
        try:
            check_logits(model, trainer.tokenizer)
            save_checkpoint(
                run_dir, step, model, trainer.tokenizer, optimizer, state, keep=trainer.config.keep_checkpoints,
                score=metrics.get("eval_reward", metrics.get("eval_greedy_reward")),
                sound=not metrics.get("update/not_finite"),
                extra=adapters if has_lora(model) else None,
            )  # fmt: skip
        except (OSError, NotFiniteError) as error:
            logger.error("no checkpoint at step %d: %s; the earlier ones are untouched", step, one_line(error))
            return False
        return True

    return distributed.from_main(written)


@torch.no_grad()
def check_logits(model: Qwen2ForCausalLM, tokenizer: Tokenizer) -> None:
    """Raises NotFiniteError if the model's logits for a short text are not finite, as those of finite but huge weights.
    Such a checkpoint could not be trained from, and would take the place of one that can."""
    ids = tokenizer.encode(PROBE) or list(tokenizer.eos_token_ids)  # not a problem of the task, which may draw numbers
    training = model.training
    model.eval()
    finite = model(torch.tensor([ids], device=model.device)).isfinite().all().item()
    model.train(training)
    if not finite:
        raise NotFiniteError("the model's logits are NaN or infinite; try a lower --lr")


def broken_weight(model: Qwen2ForCausalLM) -> str | None:
    """The name of a trained weight that holds NaN or infinity, on whichever rank; None: all are finite."""
    named = ((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad)
    mine = first_not_finite((name, p.to_local() if isinstance(p, DTensor) else p) for name, p in named)
    return next((name for name in distributed.gather_each(mine) if name), None)


class StopRequest:
    """Ctrl-C, SIGTERM and SIGHUP let the running step finish and be saved. A second signal ends the program at once.

    A closed terminal sends SIGHUP more than once (the kernel, then the shell), and nobody could mean the second one.
    It is ignored then, and after another signal. A program that was started with `nohup` ignores SIGHUP from the start.
    """

    def __init__(self):
        self.requested: signal.Signals | None = None
        self._on_terminal = _has_terminal()
        for number in STOPS:
            if number != HANG_UP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def agreed(self) -> bool:
        """Whether any process received a signal. All processes then know it, and stop after the same step."""
        number = max(distributed.gather_each(int(self.requested or 0)))
        if number:
            self.requested = signal.Signals(number)
        return bool(number)

    def _handle(self, number: int, frame) -> None:
        closed = number != HANG_UP or (self._on_terminal and not _has_terminal())
        for again in STOPS:  # before the message, so that a second signal is obeyed as soon as the message is there
            signal.signal(again, signal.SIG_IGN if again == HANG_UP and closed else signal.SIG_DFL)
        self.requested = signal.Signals(number)
        if distributed.is_main():
            write_now(f"\n{self.requested.name}: finishing this step, then saving; once more to leave at once\n")


def _has_terminal() -> bool:
    """Whether this process has a terminal that controls it, and that is still there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK))
    except (OSError, AttributeError):  # Windows has neither the file nor the flags
        return False
    return True


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


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    log_to_standard_error()
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
        distributed.complain(f"train.py: {one_line(error)}")
        return 1


if __name__ == "__main__":
    sys.exit(run_program("train.py", main))
