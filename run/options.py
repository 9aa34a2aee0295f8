"""Every option of a training run, declared once: name, type, range, default and help text, in small groups.

    temperature: Positive = 1.0            # `Positive` is the range; `validate` checks it
    '''Sampling temperature...'''          # the help text of --temperature

`Config` (config.py) inherits all groups, so an option is `config.lr`, the flag `--lr` and the YAML line `lr:`.
A function that needs one group takes the group: `update_policy` takes `LossOptions`, and a `Config` is one.

A rule about several options of a group stands in its method `conflicts`: sentences, each with whether it applies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

BUNDLED_CKPT = "countdown-tiny"
LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, 1e9  # of every number without a range of its own


def in_full(number: float) -> str:
    """A whole number with all its digits, any other one in short."""
    return str(int(number)) if number == int(number) else f"{number:g}"


class Range(NamedTuple):
    """The numbers that an option may have. `above`: `low` itself is not allowed."""

    low: float = -LARGEST_FLOAT
    high: float = LARGEST_FLOAT
    above: bool = False

    def holds(self, value: float) -> bool:
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        low = in_full(self.low)
        if self.high in (LARGEST_INT, LARGEST_FLOAT):
            return f"a number above {low}" if self.above else f"{low} or more"
        return f"a number {f'above {low} and up' if self.above else f'from {low}'} to {in_full(self.high)}"


Count = Annotated[int, Range(1, LARGEST_INT)]
NumberOrNone = Annotated[int, Range(0, LARGEST_INT)]  # a number of things, 0 for none
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Rank = Annotated[int, Range(0, 2**16)]

Conflicts = list[tuple[bool, str]]


@dataclass
class RunOptions:
    """Model and run"""

    ckpt: str = BUNDLED_CKPT
    """Checkpoint: a folder, the name of a folder under assets/ or models/, or a Hugging Face repo id."""
    run_dir: str | None = None
    """Folder of the run. None: runs/<ckpt>-<task>-<number>."""
    seed: Seed = 0
    """Seed of problems, sampling and initialization."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the model. auto: the GPU if there is one."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of the weights. auto: fp32 for tiny models, else bf16 if the device computes in it, else fp16 on a GPU and
    fp32 on a CPU."""
    resume: str | None = None
    """Continue a run: its folder, one of its checkpoints, or `latest` (also for --resume without a value). `auto`
    continues the run in --run-dir, and starts a new one if there is no checkpoint."""
    dry_run: bool = False
    """Load everything, run the largest possible step, print its memory, and write nothing."""

    def conflicts(self) -> Conflicts:
        return [
            (not self.ckpt.strip(), "--ckpt is empty: expected a folder, a name or a repo id"),
            (self.run_dir is not None and not self.run_dir.strip(), "--run-dir is empty: expected a folder"),
        ]


@dataclass
class TaskOptions:
    """Task and reward"""

    task: str = "countdown"
    """countdown, arithmetic, calculator, gsm8k, math, jsonl, reasoning_gym:NAME or path/to/file.py:MyTask."""
    data: str | None = None
    """Data file, folder or Hugging Face data set id. None: the task's generator or its usual data set."""
    question_column: str | None = None
    """Column of the question in --data (countdown: of the numbers). None: the task's usual name."""
    answer_column: str | None = None
    """Column of the answer in --data (countdown: of the target). None: the task's usual name."""
    reward: str | None = None
    """A function of your own as the reward: path/to/file.py:function. None: the task's own reward."""
    numbers: tuple[Count, ...] = (3, 4)
    """Countdown: how many numbers a problem may have."""
    min_number: NumberOrNone = 1
    """Countdown: smallest number."""
    max_number: NumberOrNone = 99
    """Countdown: largest number."""
    num_terms: tuple[Count, ...] = (2, 3)
    """Arithmetic: how many terms a question may have."""
    num_digits: tuple[Count, ...] = (1, 2)
    """Arithmetic: how many digits a term may have."""
    operators: str = "+-*"
    """Arithmetic: the operators between the terms, some of + - * /."""
    curriculum: bool = False
    """Countdown and arithmetic: draw training problems from the levels that the policy solves sometimes, easy ones
    first (tasks/curriculum.py). Evaluation stays at the task's own settings. The presets' curriculum is off for other
    tasks."""
    prompt_style: Literal["full", "short"] = "full"
    """Wording of the prompt: full for instruction-tuned models, short for the bundled model."""
    format_weight: float = 0.1
    """Weight of the format reward."""
    answer_weight: float = 1.0
    """Weight of the answer reward."""
    language_weight: float = 0.0
    """Weight of the language reward: share of the thought's letters in the script --language. 0: off."""
    language: str = "latin"
    """Script of the language reward: latin, greek, cyrillic, hebrew, arabic, devanagari, thai, chinese, ..."""
    repetition_weight: float = 0.0
    """Weight of the repetition penalty on the thought. 0: off."""
    arithmetic_weight: float = 0.0
    """Price of a thought that contains a false sum such as 3 + 5 = 9. 0: off."""
    reward_preset: Literal["none", "grpo-zero", "correct-format-language", "lineage"] = "none"
    """A known set of weights instead of the ones above: 1.0 + 0.1 format, or 1.0 + 0.25 format + 0.10 language.
    lineage is the older name of grpo-zero."""
    call_price: NotNegative = 0.0
    """Calculator: price of each call, taken from the reward. 0: calls are free."""
    max_turns: Count = 16
    """Tasks with a tool: calls of a response that are answered. One more call ends the response."""
    max_turn_tokens: NumberOrNone = 0
    """Tasks with a tool: most sampled tokens between two observations. A longer turn ends the response. 0: no limit."""
    random_reward: Share = 0.0
    """Control experiment: the reward is 1 with this probability and else 0, whatever the response is. 0: off."""
    overlong_buffer: NumberOrNone = 0
    """Soft overlong penalty (DAPO): the last so many tokens before the cap cost up to 1. 0: off."""

    @property
    def has_levels(self) -> bool:
        """True if --curriculum has levels of the task to draw from."""
        return self.task in ("arithmetic", "calculator") or (self.task == "countdown" and self.data is None)

    def conflicts(self) -> Conflicts:
        return [
            (
                self.curriculum and not self.has_levels,
                f"--curriculum needs a task with levels, countdown without --data, arithmetic or calculator; found "
                f"task {self.task}"
                f"{' with --data' if self.data else ''}. Take --no-curriculum",
            ),
            (not self.numbers, "--numbers is empty: expected how many numbers a problem has, such as --numbers 3 4"),
            (not (self.num_terms and self.num_digits), "--num-terms and --num-digits need at least one number each"),
            (
                self.max_number < self.min_number,
                f"--max-number {self.max_number} is below --min-number {self.min_number}",
            ),
        ]


@dataclass
class RolloutOptions:
    """Rollout"""

    prompts_per_step: Count = 32
    """Problems per step."""
    group_size: Count = 8
    """Responses sampled for each problem. Their mean reward is the baseline."""
    max_new_tokens: Count = 1024
    """Longest response, in tokens. For a task with a tool, observations count, too."""
    temperature: Positive = 1.0
    """Sampling temperature. Training scores the tokens at the same temperature."""
    top_k: NumberOrNone = 0
    """Sample from the k likeliest tokens only. 0: off. It biases the ratio, as do the next two, without
    keep_sampling_mask."""
    top_p: PositiveShare = 1.0
    """Sample from the smallest set of tokens with this probability. 1: off."""
    min_p: Share = 0.0
    """Leave out tokens below this share of the likeliest token's probability. 0: off."""
    keep_sampling_mask: bool = False
    """Train on the distribution over the ids that top_k, top_p and min_p left (DeepSeek-V3.2). Needs top_k."""

    def conflicts(self) -> Conflicts:
        return [
            (
                self.group_size == 1,
                "--group-size 1: a group of one has no baseline, its advantage is always 0; take 2 or more",
            ),
            (
                self.keep_sampling_mask and not self.top_k,
                "--keep-sampling-mask stores the ids that each token is sampled from: it needs --top-k, such as 50",
            ),
        ]


@dataclass
class AdvantageOptions:
    """Advantages"""

    advantage_estimator: Literal["group_mean", "rloo", "reinforce_pp", "opo", "maxrl", "gdpo", "pass_at_k"] = (
        "group_mean"
    )
    """Baseline: mean of the group, of the other responses of the group, of the batch (REINFORCE++), or of the group
    weighted by lengths (OPO). maxrl, gdpo and pass_at_k have a division of their own (docs/grpo.md)."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the deviation of the group, by that of the batch, or not."""
    pass_k: Count = 4
    """pass_at_k: a group is judged by the best of so many of its responses. Less than group_size."""
    drop_zero_variance: bool = False
    """Leave groups with equal rewards out of the update, also out of divergence and entropy."""
    refill_rounds: NumberOrNone = 0
    """drop_zero_variance: at most so many further rollouts per step, on new problems in place of dropped groups."""

    def conflicts(self) -> Conflicts:
        return [
            (
                self.refill_rounds > 0 and not self.drop_zero_variance,
                f"--refill-rounds {self.refill_rounds} replaces dropped groups: it needs --drop-zero-variance",
            ),
            (
                self.advantage_estimator in ("maxrl", "gdpo") and self.advantage_scale != "group",
                f"--advantage-scale {self.advantage_scale} does not go with --advantage-estimator "
                f"{self.advantage_estimator}, which has a division of its own; take --advantage-scale group",
            ),
            (
                self.advantage_estimator == "pass_at_k" and self.advantage_scale == "batch",
                "--advantage-scale batch does not go with --advantage-estimator pass_at_k; take group or none",
            ),
        ]


@dataclass
class LossOptions:
    """Loss"""

    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo", "gspo", "cispo", "sapo"] = "dapo"
    """Policy loss and its denominator."""
    epsilon_low: Share = 0.2
    """Clip the ratio below 1 - epsilon_low."""
    epsilon_high: Positive = 0.2
    """Clip the ratio above 1 + epsilon_high."""
    cispo_epsilon_max: Positive = 5.0
    """CISPO: largest weight of a token, instead of a clip."""
    delta: float | None = None
    """Dual clip: upper bound of the ratio if the advantage is negative. None: off."""
    sapo_temperature_pos: Positive = 1.0
    """SAPO: temperature of the soft gate if the advantage is positive."""
    sapo_temperature_neg: Positive = 1.05
    """SAPO: temperature of the soft gate if the advantage is negative."""
    mask_truncated: bool = False
    """Leave responses that were cut at max_new_tokens out of the loss."""
    top_entropy_share: PositiveShare = 1.0
    """Share of a step's tokens, those of highest entropy, in the policy loss. 1: all."""
    importance_correction: Literal["none", "truncate_token", "mask_token", "truncate_sequence", "mask_sequence"] = (
        "none"
    )
    """Correct for the difference between the sampler's and the trainer's log-probabilities."""
    importance_cap: Positive = 2.0
    """Largest importance weight of the correction."""
    off_policy_threshold: NotNegative | None = None
    """Leave out responses of negative advantage whose log-probability fell by more than this per token since they were
    sampled (DeepSeek-V3.2). None: keep all."""
    beta: NotNegative = 0.0
    """Weight of the divergence. 0: none, and no reference model is loaded."""
    kl: Literal["k1", "k2", "k3", "kl", "approx_kl", "ot"] = "k3"
    """Estimator of the divergence. kl, approx_kl and ot always compare with the rollout policy."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Place of the divergence: a term of the loss, or subtracted from the reward before the advantages."""
    kl_against: Literal["reference", "rollout"] = "reference"
    """Policy that k1, k2 and k3 compare with."""
    kl_target: NotNegative = 0.0
    """kl: a divergence per token below this is free."""
    ot_target: NotNegative = 0.0
    """ot: a transport cost per response below this is free."""
    ot_window: NumberOrNone = 8
    """ot: tokens may be moved by this many positions."""
    ot_regularization: Positive = 0.1
    """ot: entropic regularization of the Sinkhorn iteration."""
    ot_iterations: Count = 5
    """ot: Sinkhorn iterations."""
    entropy_coef: float = 0.0
    """Weight of the entropy term. Positive values keep the policy random."""
    entropy_target: NotNegative | None = None
    """Adaptive weight: it rises while the entropy (nats) is at or below this, else it falls. None: constant."""
    entropy_coef_step: NotNegative = 0.005
    """entropy_target: change of the weight per step."""

    @property
    def divergence_in_loss(self) -> bool:
        """True if the loss has a divergence term."""
        return bool(self.beta) and self.kl_in == "loss"

    @property
    def needs_reference(self) -> bool:
        """True if a divergence compares with the reference policy. kl, approx_kl and ot never do (GRPO-Mini)."""
        return bool(self.beta) and self.kl in ("k1", "k2", "k3") and self.kl_against == "reference"

    @property
    def needs_equal_groups(self) -> bool:
        """True if episodes of advantage 0 have a gradient: from the divergence, or from an entropy term."""
        entropy = bool(self.entropy_coef) or self.entropy_target is not None or self.top_entropy_share < 1
        return self.divergence_in_loss or entropy

    @property
    def needs_rollout_scores(self) -> bool:
        """True if the second update of a rollout needs the scores of the rollout policy."""
        return self.importance_correction != "none" or (self.divergence_in_loss and self.kl == "ot")

    def conflicts(self) -> Conflicts:
        return [
            (
                self.delta is not None and self.loss_type in ("cispo", "sapo"),
                f"--delta does not go with --loss-type {self.loss_type}, which has no two-sided clip",
            ),
            (
                self.delta is not None and self.delta <= 1 + self.epsilon_high,
                f"--delta {self.delta}: the dual clip must be above 1 + epsilon_high, {1 + self.epsilon_high:g}",
            ),
            (
                self.kl_in == "reward" and self.kl in ("kl", "approx_kl", "ot"),
                f"--kl {self.kl} acts through its gradient: --kl-in reward takes k1, k2 or k3",
            ),
            (
                self.kl_in == "reward" and self.kl_against == "rollout",
                "--kl-in reward --kl-against rollout: the divergence of the rollout policy from itself is 0; take the "
                "reference",
            ),
        ]


@dataclass
class UpdateOptions:
    """Update"""

    updates_per_rollout: Count = 1
    """Optimizer steps per rollout. The stored log-probabilities are the old policy."""
    micro_batch_tokens: Count = 16384
    """Most tokens in one forward and backward pass. Changes memory, not the gradient."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the functions between the matrix products (torch.compile): one to two minutes once, then fewer kernels.
    Gradients agree to 1e-5 in fp32."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    max_refusals: NumberOrNone = 10
    """End the run after so many steps in a row with a non-finite loss or gradient. 0: never."""


@dataclass
class OptimizerOptions:
    """Optimizer"""

    lr: Positive = 1e-6
    """Learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: NumberOrNone = 0
    """Steps in which the learning rate rises from 0."""
    min_lr_ratio: Share = 0.0
    """cosine: last learning rate, as a share of lr."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW: decay of the first and the second moment."""
    eps: Positive = 1e-8
    """AdamW: added to the root of the second moment."""
    weight_decay: NotNegative = 0.0
    """AdamW: decoupled weight decay."""
    amsgrad: bool = False
    """AdamW: divide by the largest second moment so far."""
    optimizer_state: Literal["auto", "host", "device"] = "auto"
    """Place of the fp32 masters and moments. auto: the device if they fit beside the largest step, else the memory of
    the host."""

    def conflicts(self) -> Conflicts:
        return [
            (max(self.betas) == 1, f"--betas {self.betas[0]:g} {self.betas[1]:g}: expected both below 1"),
        ]


@dataclass
class LoraOptions:
    """LoRA"""

    lora_rank: Rank = 0
    """Rank of the adapters. 0: train all weights."""
    lora_alpha: Positive = 32.0
    """The product of the adapters is scaled by lora_alpha / lora_rank."""
    lora_dropout: Share = 0.0
    """Dropout before the adapters."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the layers that get adapters."""

    def conflicts(self) -> Conflicts:
        return [
            (
                self.lora_rank > 0 and self.lora_dropout == 1,
                "--lora-dropout 1 drops everything: expected less than 1",
            ),
            (
                self.lora_rank > 0 and not self.lora_targets,
                "--lora-targets is empty: name the layers that get adapters",
            ),
        ]


@dataclass
class ScheduleOptions:
    """Length of the run, evaluation, files"""

    steps: Count = 100
    """Rollouts to train on."""
    eval_every: NumberOrNone = 20
    """Steps between evaluations. There is always one before step 1 and one after the last step. 0: only these."""
    eval_problems: NumberOrNone = 128
    """Held-out problems of an evaluation. 0: no evaluation."""
    eval_samples: NumberOrNone = 1
    """Responses per problem at `temperature` in an evaluation, besides the greedy one. 0: greedy only."""
    save_every: NumberOrNone = 50
    """Steps between checkpoints. The last step is always saved. 0: only the last."""
    keep_checkpoints: Count = 3
    """Number of newest checkpoints to keep. The best one is kept, too."""
    snapshots: Annotated[int, Range(0, 1000)] = 0
    """Small snapshots of the weights, spread evenly from step 0 to the last step, for the slider of explain.py. Each
    takes 2 bytes a weight. 0: none."""
    log_samples: Share = 1.0
    """Share of the responses written to samples.jsonl."""
    log_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Charts besides metrics.jsonl: tensorboard, and the optional packages wandb and trackio. No name: none."""
    log_tokens: NumberOrNone = 16384
    """Response tokens of a step that samples.jsonl holds one by one, with what the update did to each, for report.py:
    whole groups, at least one. 0: none."""

    def conflicts(self) -> Conflicts:
        return [(self.snapshots == 1, "--snapshots 1 would keep the model before training only: take 2 or more, or 0")]


@dataclass
class ProcessOptions:
    """Several processes (torchrun)"""

    shard_weights: bool = False
    """Keep a slice of weights, gradients and optimizer state in each process (FSDP2). Off: all of them in every one."""
    collective_timeout: Positive = 1800.0
    """Seconds that a process waits for the others. Must be longer than the slowest rollout."""
    checksum_every: NumberOrNone = 10
    """Steps between comparisons of the weights of all processes. 0: never."""


def ranges(options: type) -> dict[str, Range]:
    """Field -> range of its number, or of each number if the field is a tuple."""
    found = {}
    for name, hint in get_type_hints(options, include_extras=True).items():
        limits = [r for r in _metadata(hint) if isinstance(r, Range)]
        kinds = [kind for kind in _metadata(hint) if kind in (int, float)]
        if limits or kinds:
            whole = Range(-LARGEST_INT, LARGEST_INT) if kinds == [int] else Range()
            found[name] = limits[0] if limits else whole
    return found


def _metadata(hint: Any) -> Iterator[Any]:
    """The parts of a type: `tuple[Annotated[int, Range(1)], ...]` gives int and Range(1)."""
    yield hint
    for part in (*get_args(hint), *getattr(hint, "__metadata__", ())):
        if part is not hint:
            yield from _metadata(part) if get_args(part) or hasattr(part, "__metadata__") else [part]


def check_ranges(options: Any) -> None:
    """Raises ValueError, in one line, for a number outside its range."""
    limits = ranges(type(options))
    for field in fields(options):
        values = getattr(options, field.name)
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            limit, flag = limits[field.name], "--" + field.name.replace("_", "-")
            shown = f"{value:g}" if isinstance(value, float) else str(value)[:40]
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{flag} {shown}: expected a finite number")
            if not limit.holds(value):
                high = in_full(limit.high)
                most = f", at most {high}" if value > limit.high and high not in str(limit) else ""
                raise ValueError(f"{flag} {shown}: expected {limit}{most}")
