"""One typed configuration: the dataclass `Config` is the YAML file is the command line.

Every field below is a flag of the same name (`prompts_per_step` -> `--prompts-per-step`), the string under it is its
help text, its type is its validation. YAML files are flags written down, see flags.py.

Later layers win:  dataclass defaults  <  file  <  flags.  The file is

* what `--config FILE` names (repeat it to lay several on top of each other);
* else, with `--resume`, the config.yaml of the run that is continued;
* else the preset in configs/ that fits `--ckpt` and the machine.

How to call it:

    config = parse_args(sys.argv[1:])       # ValueError or FileNotFoundError with one clear line
    config = Config(steps=3, task="gsm8k")  # in Python; validate(config) if in doubt
    save_yaml(config, "config.yaml"); config = load_config("config.yaml")
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from run.flags import flag_name, normalise, parse_flags, take_flag, yaml_flags

BUNDLED_CKPT = "countdown-tiny"
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RUNS = Path("runs")


@dataclass
class Config:
    """Train a language model with GRPO on rewards that can be checked.

    --config FILE reads the same options from YAML (repeatable); flags win over it. Without it a preset from configs/
    is taken: the bundled model's own, one for a 24 GB GPU, or one for a CPU.
    """

    # --- model and run
    ckpt: str = BUNDLED_CKPT
    """Checkpoint: a folder, the name of one under assets/ or models/, or a Hugging Face repo id."""
    run_dir: str | None = None
    """Where everything is written; None: runs/<ckpt>-<task>-<number>."""
    seed: int = 0
    """Seed of problems, sampling and initialisation."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model lives; auto takes the GPU where there is one."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the weights on the device; auto is fp32 for tiny models, bf16 for the others."""
    resume: str | None = None
    """Continue a run: its folder, one of its checkpoints, or (also when left bare) `latest`; `auto` continues what
    --run-dir holds, and starts anew where it holds no checkpoint."""
    dry_run: bool = False
    """Load everything, build the largest possible step, print its memory, write nothing."""

    # --- task and reward
    task: str = "countdown"
    """countdown, arithmetic, gsm8k, math, jsonl, reasoning_gym:NAME or path/to/file.py:MyTask."""
    data: str | None = None
    """Data file, folder or Hub id; None: the task's generator or its usual data set."""
    numbers: tuple[int, ...] = (3, 4)
    """Countdown: how many numbers a problem may have."""
    min_number: int = 1
    """Countdown: smallest number."""
    max_number: int = 99
    """Countdown: largest number."""
    num_terms: tuple[int, ...] = (2, 3)
    """Arithmetic: how many terms a question may have."""
    num_digits: tuple[int, ...] = (1, 2)
    """Arithmetic: how many digits a term may have."""
    operators: str = "+-*"
    """Arithmetic: the signs a question may have between its terms, some of + - * /."""
    prompt_style: Literal["full", "short"] = "full"
    """Wording of the prompt: full for instruction-tuned models, short for the bundled one."""
    format_weight: float = 0.1
    """Weight of the format reward."""
    answer_weight: float = 1.0
    """Weight of the answer reward."""
    language_weight: float = 0.0
    """Weight of the language reward: share of the thought's letters in the script --language; 0: not judged."""
    language: str = "latin"
    """Script that the thought is to keep to: latin, greek, cyrillic, hebrew, arabic, devanagari, thai, chinese, ..."""
    repetition_weight: float = 0.0
    """Weight of the repetition penalty on the thought; 0: not judged."""
    arithmetic_weight: float = 0.0
    """What a thought with a false sum in it, such as 3 + 5 = 9, costs; 0: not judged."""
    reward_preset: Literal["none", "lineage", "correct-format-language"] = "none"
    """A known set of weights, in place of the ones above: 1.0 + 0.1 format, or 1.0 + 0.25 format + 0.10 language."""
    overlong_buffer: int = 0
    """Soft overlong penalty: the last so many tokens before the cap cost up to 1 (DAPO); 0: off."""

    # --- rollout
    prompts_per_step: int = 32
    """Problems a step."""
    group_size: int = 8
    """Answers sampled for each problem; they are one another's baseline."""
    max_new_tokens: int = 1024
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; training scores at the same one."""
    top_k: int = 0
    """Sample from the k likeliest tokens only; 0: off. Biases the ratio, like the next two."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability; 1: off."""
    min_p: float = 0.0
    """Leave out tokens below this share of the likeliest one's probability; 0: off."""

    # --- loss
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo", "gspo", "cispo", "sapo"] = "dapo"
    """Policy loss and its denominator."""
    epsilon_low: float = 0.2
    """Clip the ratio below 1 - epsilon_low."""
    epsilon_high: float = 0.2
    """Clip the ratio above 1 + epsilon_high."""
    cispo_epsilon_max: float = 5.0
    """CISPO: largest weight of a token, instead of a clip."""
    delta: float | None = None
    """Dual clip: upper bound of the ratio where the advantage is negative; None: off."""
    sapo_temperature_pos: float = 1.0
    """SAPO: temperature of the soft gate where the advantage is positive."""
    sapo_temperature_neg: float = 1.05
    """SAPO: temperature of the soft gate where the advantage is negative."""
    advantage_estimator: Literal["group_mean", "rloo", "reinforce_pp"] = "group_mean"
    """Baseline: mean of the group, mean of the others, or REINFORCE++."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the group's deviation, the batch's, or nothing."""
    mask_truncated: bool = False
    """Leave answers that were cut at max_new_tokens out of the loss."""
    drop_zero_variance: bool = False
    """Leave groups whose rewards are all equal out of the update, divergence and entropy included."""
    refill_rounds: int = 0
    """drop_zero_variance: rollouts on further problems in place of dropped groups, at most so many a step."""
    importance_correction: Literal["none", "truncate_token", "mask_token", "truncate_sequence", "mask_sequence"] = (
        "none"
    )
    """Correct for the sampler's and the trainer's log-probabilities differing."""
    importance_cap: float = 2.0
    """Largest importance weight that correction lets through."""
    top_entropy_share: float = 1.0
    """Share of a step's tokens, those of highest entropy, that the policy loss learns from; 1: all."""

    # --- divergence and entropy
    beta: float = 0.0
    """Weight of the divergence; 0: none, and no reference model is loaded."""
    kl: Literal["k1", "k2", "k3", "kl", "approx_kl", "ot"] = "k3"
    """Estimator of the divergence; kl, approx_kl and ot always compare with the rollout policy."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the divergence goes: a term of the loss, or subtracted from the reward before the advantages."""
    kl_against: Literal["reference", "rollout"] = "reference"
    """Which policy k1, k2 and k3 compare with."""
    kl_target: float = 0.0
    """kl: divergence per token below this is free."""
    ot_target: float = 0.0
    """ot: transport cost of an answer below this is free."""
    ot_window: int = 8
    """ot: tokens may be moved this many positions."""
    ot_regularization: float = 0.1
    """ot: entropic regularisation of the Sinkhorn iteration."""
    ot_iterations: int = 5
    """ot: Sinkhorn iterations."""
    entropy_coef: float = 0.0
    """Weight of the entropy term; positive values keep the policy random."""
    entropy_target: float | None = None
    """Adaptive weight: it rises while entropy (nats) is at or below this, else it falls and rests; None: constant."""
    entropy_coef_step: float = 0.005
    """entropy_target: by how much the weight rises or falls a step."""

    # --- update
    updates_per_rollout: int = 1
    """Optimizer steps on one rollout, with the stored log-probabilities as the old policy."""
    micro_batch_tokens: int = 16384
    """Most tokens in one forward and backward pass; changes memory, not the gradient."""
    shared_prefix: bool = True
    """Compute a group's prompt once; off is the plain padded batch, its slow twin."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""

    # --- optimizer
    lr: float = 1e-6
    """Learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""
    min_lr_ratio: float = 0.0
    """Where cosine ends, as a share of lr."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW: decay of the first and the second moment."""
    eps: float = 1e-8
    """AdamW: added to the root of the second moment."""
    weight_decay: float = 0.0
    """AdamW: decoupled weight decay."""
    amsgrad: bool = False
    """AdamW: divide by the largest second moment so far."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    max_refusals: int = 10
    """End the run after so many steps in a row whose loss or gradient was not finite; 0: never."""
    cpu_optimizer: bool = True
    """Keep fp32 masters and moments on the CPU; off is plain AdamW on the device."""

    # --- low-rank adapters
    lora_rank: int = 0
    """Rank of the adapters; 0: train all weights."""
    lora_alpha: float = 32.0
    """The adapters' product is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout before the adapters."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the layers that get adapters."""

    # --- length of the run, evaluation, files
    steps: int = 100
    """Rollouts to train on."""
    eval_every: int = 20
    """Steps between evaluations, besides before step 1 and after the last; 0: only those two."""
    eval_problems: int = 128
    """Held-out problems of an evaluation; 0: no evaluation."""
    eval_samples: int = 1
    """Answers a problem at `temperature` in an evaluation, besides the greedy one; 0: greedy only."""
    save_every: int = 50
    """Steps between checkpoints, besides the last; 0: only the last."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept, besides the best."""
    log_samples: float = 1.0
    """Share of the rollouts written to samples.jsonl."""

    # --- several processes (torchrun)
    shard_weights: bool = False
    """Keep a slice of weights, gradients and optimizer state on each process (FSDP2); off: all of them on every one."""
    collective_timeout: float = 1800.0
    """Seconds a process waits for the others before it gives up; longer than the slowest rollout."""
    checksum_every: int = 10
    """Steps between two looks at whether all processes have the same weights; 0: never."""


# --- from the command line and from files


def parse_args(argv: list[str]) -> Config:
    """Read a command line (without the program's name) over the YAML files that lie under it.

    Raises ValueError (unknown or wrong option) or FileNotFoundError (a file that is not there), each with one line.
    `--help` prints and exits with code 0.
    """
    argv = normalise(argv, bare={"--resume": "latest"})
    files = config_files(argv)
    config = Config()
    for file in files:
        config = parse_flags(Config, yaml_flags(file, Config), default=config, source=str(file))
    named, argv = take_flag(argv, "--config")
    if not named and _last(argv, "--resume") not in (None, "auto"):
        config.run_dir = str(files[0].parent)  # not what the file says: the folder may have been moved since
    config = parse_flags(Config, argv, default=config)
    if config.resume == "auto" and config.run_dir is None:
        raise ValueError("--resume auto continues what --run-dir holds: name it")
    if config.resume == "latest" and config.run_dir is None:
        config.run_dir = str(resumed_run("latest"))
    validate(config)
    return config


def config_files(argv: list[str]) -> list[Path]:
    """The YAML files that lie under a command line's flags, lowest first; the rule is in the module docstring."""
    named, argv = take_flag(normalise(argv, bare={"--resume": "latest"}), "--config")
    if named:
        return [Path(file) for file in named]
    resume, run_dir = _last(argv, "--resume"), _last(argv, "--run-dir")
    if resume == "auto":
        resume = run_dir if run_dir and (Path(run_dir) / "config.yaml").is_file() else None
    if resume:
        return [resumed_run(resume, run_dir) / "config.yaml"]
    return [preset_for(_last(argv, "--ckpt") or Config.ckpt, _last(argv, "--device") or Config.device)]


def preset_for(ckpt: str, device: str = "auto") -> Path:
    """The preset in configs/ that fits a checkpoint and a device."""
    if Path(ckpt).name == BUNDLED_CKPT:
        return CONFIGS / "countdown-tiny.yaml"
    if device == "auto":
        import torch  # only here: --help and the bundled model need not wait for it

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return CONFIGS / ("qwen2.5-0.5b.yaml" if device == "cuda" else "cpu.yaml")


def resumed_run(resume: str, run_dir: str | None = None) -> Path:
    """The run that `--resume` means: the folder named, the one that holds the checkpoint named, or the newest run."""
    if resume != "latest":
        run = Path(resume)
        if run.absolute().parent.name == "checkpoints":
            run = run.absolute().parent.parent
    elif run_dir:
        run = Path(run_dir)
    else:
        found = sorted(RUNS.glob("*/checkpoints/latest"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise FileNotFoundError(f"--resume: no run with a checkpoint under {RUNS}/; name one: --resume RUN_FOLDER")
        run = found[-1].parent.parent
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"--resume: {run} is no run folder, it has no config.yaml")
    return run


def load_config(path: str | Path) -> Config:
    """Read one YAML file over the dataclass defaults. Raises like `parse_args`."""
    config = parse_flags(Config, yaml_flags(path, Config), source=str(path))
    validate(config)
    return config


def save_yaml(config: Config, path: str | Path) -> None:
    """Write every field, so that `load_config` gives an equal Config, floats to the last bit."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    # ASCII: what lies beyond is escaped, for YAML would fold a line separator inside a text into a blank.
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def new_run_dir(config: Config) -> Path:
    """The folder this run writes to: the one named, or the first free runs/<ckpt>-<task>-<number>."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    name = re.sub(r"[^\w.-]+", "-", f"{Path(config.ckpt).name}-{config.task}-")
    numbers = [path.name.removeprefix(name) for path in RUNS.glob(f"{name}*")]
    return RUNS / f"{name}{max((int(n) for n in numbers if n.isdecimal()), default=0) + 1:03d}"


def _last(argv: list[str], flag: str) -> str | None:
    return next(reversed(take_flag(argv, flag)[0]), None)


# --- what cannot work


def validate(config: Config) -> None:
    """Refuse what cannot work before a minute is spent: ValueError with one line."""
    for field in dataclasses.fields(config):
        values = getattr(config, field.name)
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, (int, float)):
                _check_range(field.name, value)
    for wrong, message in _conflicts(config):
        if wrong:
            raise ValueError(message)


_COUNTS = ["prompts_per_step", "group_size", "max_new_tokens", "updates_per_rollout", "micro_batch_tokens", "steps"]
_COUNTS += ["keep_checkpoints", "numbers", "num_terms", "num_digits", "ot_iterations"]
_NOT_NEGATIVE = ["seed", "eval_every", "eval_problems", "eval_samples", "save_every", "warmup_steps", "lora_rank"]
_NOT_NEGATIVE += [
    "max_refusals",
    "checksum_every",
    "refill_rounds",
    "overlong_buffer",
    "entropy_coef_step",
    "entropy_target",
    "top_k",
    "beta",
    "kl_target",
    "ot_target",
    "ot_window",
    "weight_decay",
    "min_number",
]
_SHARES = ["top_entropy_share", "top_p", "min_p", "epsilon_low", "min_lr_ratio", "log_samples", "betas", "lora_dropout"]
_POSITIVE = [
    "temperature",
    "top_p",
    "top_entropy_share",
    "cispo_epsilon_max",
    "epsilon_high",
    "lr",
    "eps",
    "max_grad_norm",
    "importance_cap",
    "lora_alpha",
]
_POSITIVE += ["collective_timeout", "ot_regularization", "sapo_temperature_pos", "sapo_temperature_neg"]


def _check_range(name: str, value: float) -> None:
    allowed = {
        "a number from 0 to 1": name not in _SHARES or 0 <= value <= 1,
        "a number above 0": name not in _POSITIVE or value > 0,
        "1 or more": name not in _COUNTS or value >= 1,
        "0 or more": name not in _NOT_NEGATIVE or value >= 0,
        "a finite number": math.isfinite(value),
    }
    for expected, good in allowed.items():
        if not good:
            raise ValueError(f"{flag_name(name)} {value:g}: expected {expected}")


def _conflicts(c: Config) -> list[tuple[bool, str]]:
    """Sentences, each with whether it applies."""
    lora, dual_clip = c.lora_rank > 0, c.delta is not None
    return [
        (not c.ckpt.strip(), "--ckpt is empty: expected a folder, a name or a repo id"),
        (
            c.group_size == 1,
            "--group-size 1: a group of one has no baseline, its advantage is always 0; take 2 or more",
        ),
        (not c.numbers, "--numbers is empty: expected how many numbers a problem has, such as --numbers 3 4"),
        (not (c.num_terms and c.num_digits), "--num-terms and --num-digits need at least one number each"),
        (c.max_number < c.min_number, f"--max-number {c.max_number} is below --min-number {c.min_number}"),
        (max(c.betas) == 1, f"--betas {c.betas[0]:g} {c.betas[1]:g}: expected both below 1"),
        (c.warmup_steps > c.steps, f"--warmup-steps {c.warmup_steps} is longer than the run, --steps {c.steps}"),
        (lora and c.lora_dropout == 1, "--lora-dropout 1 drops everything: expected less than 1"),
        (lora and not c.lora_targets, "--lora-targets is empty: name the layers that get adapters"),
        (
            dual_clip and c.loss_type in ("cispo", "sapo"),
            f"--delta does not go with --loss-type {c.loss_type}, which has no two-sided clip to add it to",
        ),
        (
            dual_clip and c.delta <= 1 + c.epsilon_high,
            f"--delta {c.delta}: the dual clip must lie above 1 + epsilon_high, {1 + c.epsilon_high:g}",
        ),
        (
            c.kl_in == "reward" and c.kl in ("kl", "approx_kl", "ot"),
            f"--kl {c.kl} acts through its gradient: --kl-in reward takes k1, k2 or k3",
        ),
        (
            c.kl_in == "reward" and c.kl_against == "rollout",
            "--kl-in reward --kl-against rollout: the rollout policy's divergence from itself is 0; take the reference",
        ),
        (
            c.overlong_buffer > c.max_new_tokens,
            f"--overlong-buffer {c.overlong_buffer} is longer than an answer, --max-new-tokens {c.max_new_tokens}",
        ),
        (
            c.refill_rounds > 0 and not c.drop_zero_variance,
            f"--refill-rounds {c.refill_rounds} replaces dropped groups: it needs --drop-zero-variance",
        ),
    ]
