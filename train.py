"""Train a model with GRPO, from a released checkpoint to a better policy.

    python train.py                                          # the bundled tiny model: minutes on two CPU cores
    python train.py --ckpt Qwen2.5-0.5B-Instruct             # the real job
    python train.py --config configs/cpu.yaml --steps 20     # a file, and flags over it
    python train.py --resume                                 # continue the newest run
    torchrun --nproc-per-node 2 train.py                     # two processes, one run: distributed.py

Exit codes: 0 done; 1 one of several processes was lost; 2 a mistake, told in one line; 3 too many updates in a row were
refused, or an update broke the weights; 4 the last step could not be saved; 129, 130 and 143 stopped by a closed
terminal, Ctrl-C or SIGTERM, after saving.

Every problem is drawn by its number, and every response from its own seed (seed, step, prompt, sample). No random state
passes from step to step, so a resumed run is equal to an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from data_types import Episode, MiniBatch, Problem
from grpo import GRPO, rollout
from math_task import task_from_config
from model.lora import has_lora, load_adapters, save_adapters, trainable
from parallel import distributed
from parallel.sharding import is_sharded, whole, whole_state
from rollout.sampling import SamplingParams
from run import snapshots
from run.checkpoint import DAMAGED, damaged_state, find_checkpoint, load_checkpoint, rewind, save_checkpoint
from run.config import Config, config_files, parse_args
from run.flags import one_line
from run.memory_plan import advice, check_machine, describe, dry_run, peak_gib, place_of
from run.pretrained import load_policy
from run.random_states import random_states, set_random_states
from run.run_folder import claim, where_to_begin
from run.run_lock import RunLock
from run.run_log import NoLog, RunLog
from run.stop_request import StopRequest
from run.terminal import log_to_standard_error, run_program
from run.terminal import say as say_here
from run.weight_checks import NotFiniteError, broken_weight, check_logits
from update.guards import NUMBERS_ENDED_IT, Guard, not_finite_answer
from update.step_metrics import Metrics, reward_metrics

logger = logging.getLogger("train")
SHOWN = 8  # held-out responses of each evaluation that are written to held_out.jsonl
SHOWN_MEANS = ("reward", "solved", "full_format", "false_sums", "completions/mean_length",
               "completions/clipped_ratio", "frac_reward_missing")  # fmt: skip
NOT_SAVED = 4  # exit code


def train(config: Config) -> int:
    """The whole job. Returns the exit code: 0; 128 + the signal that ended it early; NUMBERS_ENDED_IT if too many
    updates in a row were refused, or one broke the weights; NOT_SAVED if the last step is in no checkpoint."""
    with RunLock() as lock:
        return train_in(lock, config)


def train_in(lock: RunLock, config: Config) -> int:
    """`train`, with the lock of the run's folder, which is taken as soon as the folder is known to be there."""
    check_machine(config)  # before a download, and before the run's folder is made
    start = distributed.from_main(lambda: where_to_begin(config, lock))
    resumed = start.checkpoint
    if config.dtype == "auto" and start.dtype:  # another machine would choose another type, say
        config = dataclasses.replace(config, dtype=start.dtype)
    random.seed(config.seed)  # nothing here draws from the global generators, but a user's task may
    torch.manual_seed(config.seed)

    task = task_from_config(config)
    model, tokenizer = load_policy(config, config.ckpt if config.lora_rank or not resumed else resumed)
    if resumed and config.lora_rank:  # the checkpoint's model.safetensors is merged; training continues from its parts
        load_adapters(model, resumed / "adapter", config.lora_dropout)
    trainer = GRPO(config, model=model, tokenizer=tokenizer, task=task)
    held_out = task.test_problems(config.eval_problems)
    check_room(trainer, held_out)
    say(describe(trainer))
    if task.data_summary:
        say(f"data: {task.data_summary}")
    if config.dry_run:
        say(f"memory: {advice(model, config, place_of(trainer.optimizer))}")
        peak = max(distributed.gather_each(dry_run(trainer)))
        say(f"dry run: peak memory {peak:.2f} GiB for the largest possible step; nothing was written")
        return 0

    run_dir = distributed.from_main(lambda: claim(config, lock))
    first = step = 0
    saved, broken = True, None
    if resumed:
        first = step = restore(trainer, resumed)
        apply_settings(trainer, start.before)
        distributed.on_main(lambda: (rewind(run_dir, first, config.keep_checkpoints), snapshots.rewind(run_dir, first)))

    stop = StopRequest()
    told = dataclasses.replace(config, eval_problems=len(held_out))  # a data set may have fewer
    with distributed.on_main(lambda: RunLog(run_dir, told, total_steps=config.steps)) or NoLog() as log:
        if config.resume:
            log.truncate_after(first if resumed else -1)
        if held_out and not resumed:
            log.phase("evaluating")
            log.log_step(0, evaluate(trainer, held_out, partial(log.log_held_out, 0, decode=tokenizer.decode)))
        if not resumed:
            distributed.on_main(lambda: snapshots.rewind(run_dir, -1))
            snapshots.take(run_dir, 0, config.snapshots, config.steps, model)
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
            snapshots.take(run_dir, step, config.snapshots, config.steps, model)
            # asked once: a signal after this line ends the next step, which is saved, too
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


def restore(trainer: GRPO, checkpoint: Path) -> int:
    """Put back the state of a checkpoint: optimizer, random generators, trainer. Returns its step."""
    state = load_checkpoint(checkpoint, trainer.optimizer)
    try:
        set_random_states(state["random"])
        trainer.load_state_dict(state["trainer"])
    except DAMAGED:
        raise damaged_state(checkpoint) from None
    trainer.step_count = state["step"]
    return trainer.step_count


def apply_settings(trainer: GRPO, before: Config | None) -> None:
    """Let the options of a resumed run be those of its config, which the checkpoint's state does not know."""
    c = trainer.config
    for group in trainer.optimizer.param_groups:
        group |= {"betas": c.betas, "eps": c.eps, "weight_decay": c.weight_decay, "amsgrad": c.amsgrad}
    if before and (c.entropy_coef, c.entropy_target) != (before.entropy_coef, before.entropy_target):
        trainer.entropy_coef = trainer.applied_entropy_coef = c.entropy_coef  # an adaptive one begins anew


def say(text: str) -> None:
    """A line on standard output, by the first process."""
    if distributed.is_main():
        say_here(text)


def evaluate(
    trainer: GRPO, problems: list[Problem], show: Callable[[list[Episode], bool], None] | None = None
) -> Metrics:
    """Evaluate on held-out problems, greedy and sampled: `eval_greedy_*` and `eval_*`, means over all responses.

    show: gets a response to each of the first few problems, and whether they were sampled (else they are greedy).
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
            logger.warning("evaluation: logits that are not finite cut responses, which get no reward; the first is to "
                           "problem %s, at token %d", problem, token)  # fmt: skip
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
    model, optimizer_state = whole(trainer.model), whole_state(trainer.optimizer)  # every process takes part
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
                run_dir, step, model, trainer.tokenizer, optimizer_state, state, keep=trainer.config.keep_checkpoints,
                score=metrics.get("eval_reward", metrics.get("eval_greedy_reward")),
                sound=not metrics.get("update/not_finite"),
                extra=adapters if has_lora(model) else None,
            )  # fmt: skip
        except (OSError, NotFiniteError) as error:
            logger.error("no checkpoint at step %d: %s; the earlier ones are untouched", step, one_line(error))
            return False
        return True

    return distributed.from_main(written)


# ---------------------------------------------------------------------------------------------------------------------
# Checks before the first step


def check_room(trainer: GRPO, held_out: list[Problem]) -> None:
    """Raises ValueError if --max-new-tokens leaves no room for a prompt: the longest of a data set, the held-out and
    the first ones."""
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
        logging.disable(logging.WARNING)  # every process would log the same
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
