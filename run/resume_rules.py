"""`--resume` and every option: one table, and the checks that follow from it.

A resumed run continues the run that its checkpoint belongs to. An option is either applied from the next step on, as
the learning rate, or refused, because the steps before and after would not belong together. Nothing is ignored, so
config.yaml always says what ran. The remedy for a refused option is a new run that starts from the checkpoint.

    start = check_resume(config, checkpoint)     # ValueError with one line, before the model is loaded
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from run.checkpoint import read_state, weights_checksum
from run.config import Config, load_config
from run.flags import flag_name
from run.pretrained import locate_pretrained

APPLIED = "applied"
DRAWS = "it decides which problems and responses each step draws"
REWARDS = "rewards and evaluations before and after would not be comparable"
SHAPE = "the checkpoint's adapters have this form"
STATE = "the checkpoint's optimizer state has this form"
WEIGHTS = "the checkpoint's weights have this type"
CHECKED = "allowed if the weights are the same: `check_resume` looks at them"

RULES = {
    # Model and run
    "ckpt": CHECKED,
    "run_dir": APPLIED,
    "seed": DRAWS,
    "device": APPLIED,
    "dtype": WEIGHTS,
    "resume": APPLIED,
    "dry_run": APPLIED,
    # Task and reward
    "task": DRAWS,
    "data": DRAWS,
    "question_column": DRAWS,
    "answer_column": DRAWS,
    "reward": REWARDS,
    "numbers": DRAWS,
    "min_number": DRAWS,
    "max_number": DRAWS,
    "num_terms": DRAWS,
    "num_digits": DRAWS,
    "operators": DRAWS,
    "curriculum": DRAWS,
    "prompt_style": DRAWS,
    "format_weight": REWARDS,
    "answer_weight": REWARDS,
    "language_weight": REWARDS,
    "language": REWARDS,
    "repetition_weight": REWARDS,
    "arithmetic_weight": REWARDS,
    "reward_preset": REWARDS,
    "call_price": REWARDS,
    "max_turns": APPLIED,
    "max_turn_tokens": APPLIED,
    "random_reward": REWARDS,
    "overlong_buffer": REWARDS,
    # Rollout
    "prompts_per_step": DRAWS,
    "group_size": APPLIED,
    "max_new_tokens": APPLIED,
    "temperature": APPLIED,
    "top_k": APPLIED,
    "top_p": APPLIED,
    "min_p": APPLIED,
    "keep_sampling_mask": APPLIED,
    # Advantages
    "advantage_estimator": APPLIED,
    "advantage_scale": APPLIED,
    "pass_k": APPLIED,
    "drop_zero_variance": APPLIED,
    "refill_rounds": APPLIED,
    # Loss
    "loss_type": APPLIED,
    "epsilon_low": APPLIED,
    "epsilon_high": APPLIED,
    "cispo_epsilon_max": APPLIED,
    "delta": APPLIED,
    "sapo_temperature_pos": APPLIED,
    "sapo_temperature_neg": APPLIED,
    "mask_truncated": APPLIED,
    "top_entropy_share": APPLIED,
    "importance_correction": APPLIED,
    "importance_cap": APPLIED,
    "off_policy_threshold": APPLIED,
    "beta": APPLIED,
    "kl": APPLIED,
    "kl_in": APPLIED,
    "kl_against": APPLIED,
    "kl_target": APPLIED,
    "ot_target": APPLIED,
    "ot_window": APPLIED,
    "ot_regularization": APPLIED,
    "ot_iterations": APPLIED,
    "entropy_coef": APPLIED,
    "entropy_target": APPLIED,
    "entropy_coef_step": APPLIED,
    # Update
    "updates_per_rollout": APPLIED,
    "micro_batch_tokens": APPLIED,
    "gradient_checkpointing": APPLIED,
    "compile": APPLIED,
    "max_grad_norm": APPLIED,
    "max_refusals": APPLIED,
    # Optimizer
    "lr": APPLIED,
    "lr_schedule": APPLIED,
    "warmup_steps": APPLIED,
    "min_lr_ratio": APPLIED,
    "betas": APPLIED,
    "eps": APPLIED,
    "weight_decay": APPLIED,
    "amsgrad": STATE,
    "optimizer_state": APPLIED,
    # LoRA
    "lora_rank": SHAPE,
    "lora_alpha": SHAPE,
    "lora_dropout": APPLIED,
    "lora_targets": SHAPE,
    # Length of the run, evaluation, files
    "steps": APPLIED,
    "eval_every": APPLIED,
    "eval_problems": APPLIED,
    "eval_samples": APPLIED,
    "save_every": APPLIED,
    "keep_checkpoints": APPLIED,
    "snapshots": APPLIED,
    "log_samples": APPLIED,
    "log_to": APPLIED,
    "log_tokens": APPLIED,
    # Several processes
    "shard_weights": APPLIED,
    "collective_timeout": APPLIED,
    "checksum_every": APPLIED,
}
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Start(NamedTuple):
    """Where a run begins.

    checkpoint: to continue from; None: the run begins with step 1.
    before: the settings of the run so far, if they are known.
    dtype: type of the checkpoint's weights, as in `--dtype`.
    base: checksum of the checkpoint that LoRA or the reference policy needs besides; None: not needed.
    """

    checkpoint: Path | None = None
    before: Config | None = None
    dtype: str | None = None
    base: str | None = None


def check_resume(config: Config, checkpoint: Path | None) -> Start:
    """Refuse options that a resume cannot apply, and other base weights than before. Reads files, and no weights but
    for their checksum. Raises ValueError or FileNotFoundError with one line."""
    base = weights_checksum(locate_pretrained(config.ckpt)) if needs_base(config) else None
    if checkpoint is None:
        return Start(base=base)
    state = read_state(checkpoint)
    before = settings_of(checkpoint)
    dtype = TYPES.get(str(state["dtype"]))
    if config.steps < state["step"]:
        raise ValueError(
            f"--steps {config.steps}: {checkpoint} is already at step {state['step']}; name more steps, or an earlier "
            "checkpoint"
        )
    if before is not None:
        _check_ckpt(before, config, checkpoint)
        _check_options(dataclasses.replace(before, dtype=dtype or before.dtype), config, checkpoint)
    if base is not None and base != state.get("base", base):
        raise ValueError(
            f"--ckpt {config.ckpt}: these are not the base weights of {checkpoint} (their SHA-256 differs), which LoRA "
            f"and the reference policy need: bring them back, or start a new run: --ckpt {checkpoint}"
        )
    return Start(checkpoint, before, dtype, base)


def needs_base(config: Config) -> bool:
    """Whether a run needs the original checkpoint all the time: under adapters, or as the reference policy."""
    return config.lora_rank > 0 or config.needs_reference


def settings_of(checkpoint: Path) -> Config | None:
    """The config.yaml of the run that a checkpoint belongs to; None for a checkpoint that was copied out of its run."""
    file = checkpoint.absolute().parent.parent / "config.yaml"
    return load_config(file) if checkpoint.absolute().parent.name == "checkpoints" and file.is_file() else None


def _check_ckpt(before: Config, config: Config, checkpoint: Path) -> None:
    moved = Path(before.ckpt).resolve() != Path(config.ckpt).resolve()
    if before.ckpt != config.ckpt and moved and not needs_base(config):
        raise ValueError(
            f"--ckpt {config.ckpt}: a resumed run has the weights of its own checkpoint, {checkpoint}; leave --ckpt "
            "out, or leave --resume out to start a new run"
        )


def _check_options(before: Config, config: Config, checkpoint: Path) -> None:
    refused = []
    for field in dataclasses.fields(config):
        old, new = getattr(before, field.name), getattr(config, field.name)
        reason = RULES.get(field.name, "no rule says how to apply it")
        if old != new and reason not in (APPLIED, CHECKED) and (field.name, new) != ("dtype", "auto"):
            refused.append((field.name, old, new, reason))
    if refused:
        name, old, new, reason = refused[0]
        flags = " ".join(_as_flag(name, new) for name, _, new, _ in refused)
        run = checkpoint.parent.parent
        raise ValueError(
            f"{_as_flag(name, new)}: the run has {_as_flag(name, old)}, and --resume cannot change that: {reason}. "
            f"Start a new run from that checkpoint: python train.py --config {shlex.quote(str(run / 'config.yaml'))} "
            f"--ckpt {shlex.quote(str(checkpoint))} --run-dir NEW_FOLDER {flags}"
        )


def _as_flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag_name(name) if value else "--no-" + flag_name(name)[2:]
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([flag_name(name), *(shlex.quote(str(v)) for v in values)])
