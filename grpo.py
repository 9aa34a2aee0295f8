"""GRPO, top to bottom: rollout -> compute_advantages -> update_policy, and the class `GRPO` that runs them.

For every prompt, sample a group of responses and compute the reward of each (DeepSeekMath, Shao et al. 2024, arXiv
2402.03300, section 4.1). The mean reward of the group is the baseline. Responses above it become more likely, those
below less likely. q is the prompt, o_t token t of the response, pi the policy, KL_t the divergence from a reference
policy, and H the mean entropy of the step's tokens.

    A_i    = (r_i - mean(r)) / (std(r) + 1e-4)                     per group     compute_advantages
    rho_t  = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)             per token     losses.policy_loss
    loss   = sum_t w_t [ -min(rho_t A, clip(rho_t, 1 - eps, 1 + eps) A) + beta KL_t ] - alpha H      update_policy

textbook.py has the same algorithm on one page without any fast path. Four choices of the implementation:

- log pi_old is stored by the sampler when it draws the token. In the first update after a rollout,
  sampler and trainer have the same weights and agree up to rounding. The difference is logged at every step.
- The weights w_t are computed once for the whole optimizer step (losses.token_weights). By default, w_t is 1 divided by
  the number of tokens of the step. The gradients of the micro-batches are summed, so their size does not matter.
- In a micro-batch, the prompt of a group passes through the model once. All its responses attend to it
  (layout.Layout.shared_prefix).
- alpha > 0 rewards entropy, so that the policy stays random. By default alpha and beta are 0.

    trainer = GRPO()                                          # the bundled tiny model on the CPU
    loss = trainer.train_step("What is 12 + 7 * 3?", "33")    # one group, one update

Shape letters: N flat tokens of a micro-batch, M of them scored (sampled tokens), E episodes, D hidden, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from data_types import Completion, Episode, MiniBatch, Problem, Reward
from math_task import task_from_config
from model.compiled import compiled_functions
from model.linear import gradients_in_place
from model.lora import add_lora, has_lora, trainable
from model.memory import halve_when_out_of_memory
from optimizer import MemoryEfficientAdamW, gradient_norm, learning_rate
from parallel import distributed
from parallel.sharding import ShardedAdamW, gradients_of_all_ranks, is_sharded, shard, whole
from qwen2_llm import Qwen2ForCausalLM
from rollout.generation import generate
from rollout.sampling import SamplingParams
from rollout.tool_turns import Environment
from run.config import Config, load_config, preset_for
from run.memory_plan import choose_place
from run.options import LossOptions
from run.pretrained import load_policy
from tasks.curriculum import Curriculum
from tasks.metric_names import check_names
from tasks.task_base import QuestionTask, Task
from tokenizer import Tokenizer
from update.advantages import NAMED, deviation, length_weighted_mean, named_advantages, unknown_choice
from update.guards import Guard, name_culprit, not_finite_answer
from update.loss_scale import LossScale
from update.losses import adapt_entropy_coef
from update.objective import micro_batch_loss
from update.packing import Scores, Step
from update.scoring import score_episodes, top_entropy_masks
from update.shaping import PENALTY_WEIGHTS, drop_zero_variance, penalise_divergence, penalise_length, random_rewards
from update.step_metrics import Metrics, StepTotals, reward_metrics
from update.token_traces import TokenTraces, first_groups

logger = logging.getLogger(__name__)
SPARE_PROBLEMS = 2**31  # number of the first replacement problem, far above the numbers of ordinary problems


# ---------------------------------------------------------------------------------------------------------------------
# 1. Rollout


def rollout(
    model: Qwen2ForCausalLM,
    tokenizer: Tokenizer,
    task: Task,
    batch: MiniBatch,
    sampling: SamplingParams,
    *,
    seed: int = 0,
    first_group_id: int = 0,
    must_be_finite: bool = True,
) -> list[Episode]:
    """Sample `sampling.n` responses to every prompt and score them. The responses to a prompt share a group id.

    The same (weights, batch, sampling, seed) gives the same episodes, for any number of processes. Each process samples
    and scores its share of the prompts. Then every process gets all episodes. Temperature 0 is for evaluation. The
    log-probabilities of its responses are those of temperature 1.

    must_be_finite: True raises ValueError if the model's logits are not finite. False ends such a response early. Its
        finish reason is "not_finite" and its reward is NaN. `update_policy` refuses a step with such a response.
    """
    if sampling.filtered and not sampling.keep_mask:
        logger.warning("top-k, top-p or min-p is on: the sampled distribution differs from the trained one, "
                       "which biases the ratio")  # fmt: skip
    alone = distributed.world_size() == 1
    completions = generate(
        model if alone else whole(model), batch.prompt_ids, sampling, tokenizer=tokenizer, seed=seed,
        only=None if alone else distributed.share(len(batch)), must_be_finite=must_be_finite,
        environment=None if sampling.ignore_eos else Environment.of(task, batch.problems),
    )  # fmt: skip
    episodes = []
    for completion in completions:
        problem = batch.problems[completion.prompt_index]
        reward, diagnostics = _judged(task, problem, completion)
        check_names("reward part", reward.parts)
        episodes.append(
            Episode(
                group_id=first_group_id + completion.prompt_index,
                prompt_ids=completion.prompt_ids,
                response_ids=completion.response_ids,
                logprobs=completion.logprobs,
                text=completion.text,
                finish_reason=completion.finish_reason,
                reward=reward.total,
                reward_parts={**reward.parts},
                diagnostics=diagnostics,
                temperature=sampling.temperature or 1.0,
                vocab_size=tokenizer.vocab_size,
                problem=problem,
                sampled=completion.sampled,
                turns=completion.turns,
                kept=completion.kept,
            )
        )
    return episodes if alone else distributed.gather(episodes)


def _judged(task: Any, problem: Problem | None, completion: Completion) -> tuple[Reward, dict[str, float] | None]:
    """Reward and diagnostics of a response. Diagnostics are None without a reward, a problem or a `Task`."""
    if completion.finish_reason == "not_finite":
        return Reward(math.nan, {}), None
    if problem is None or not isinstance(task, Task):  # no problem, or an object that only has `reward`
        return task.reward(problem, completion.text), None
    if completion.turns is not None:
        return task.judge_turns(problem, completion.turns)
    return task.judge(problem, completion.text)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Advantages


def compute_advantages(
    episodes: Sequence[Episode],
    *,
    estimator: str = "group_mean",
    scale: str = "group",
    epsilon: float = 1e-4,
    k: int = 4,
    part_weights: Mapping[str, float] | None = None,
) -> list[Episode]:
    """Episodes with their `advantage` filled in: (reward - baseline) / (deviation + epsilon). Returns new episodes.

    estimator: the baseline.
        group_mean    mean reward of the group (GRPO)
        rloo          mean reward of the others of the group (Ahmadian et al. 2024, arXiv 2402.14740)
        reinforce_pp  mean reward of the batch (REINFORCE++, Hu 2025, arXiv 2501.03262)
        opo           mean reward of the group, weighted by the lengths (OPO, arXiv 2505.23585)
      Three more use other formulas than the one above (update/advantages.py):
        maxrl         (reward - mean) / mean of the group (MaxRL, arXiv 2602.02710)
        gdpo          normalizes each reward part in its group, then their sum in the batch (arXiv 2601.05242)
        pass_at_k     a group is judged by the best of `k` of its responses (arXiv 2508.10751)
    scale: the rewards whose standard deviation (divisor n) is the divisor: `group` or `batch`. `none` does not divide
        (Dr. GRPO, arXiv 2503.20783). With reinforce_pp, `group` means the batch, too. A group of equal rewards has
        deviation 0, and a small difference from the mean of the batch would become a huge advantage.
    part_weights: only for gdpo, the weight of each reward part. The default is 1.

    Episodes with the same `group_id` are a group, in any order. If all rewards of a group are equal, its advantages are
    exactly 0, except with reinforce_pp and gdpo. An episode whose reward is not finite gets advantage 0. It does not
    count in any mean or deviation.
    Raises ValueError for an unknown option, and for a scale that the estimator does not have.
    """
    if wrong := unknown_choice(estimator, scale):
        raise ValueError(wrong)
    members = defaultdict(list)  # group id -> episodes
    for episode in episodes:
        if math.isfinite(episode.reward):
            members[episode.group_id].append(episode)
    groups = list(members.values())
    if estimator in NAMED:
        found = named_advantages(groups, estimator, k=k, divide=scale == "group", epsilon=epsilon, weights=part_weights)
    else:
        batch = [episode.reward for group in groups for episode in group]
        found = [_relative_rewards(group, batch, estimator, scale, epsilon) for group in groups]
    advantage = {id(e): a for group, values in zip(groups, found) for e, a in zip(group, values)}
    return [replace(episode, advantage=advantage.get(id(episode), 0.0)) for episode in episodes]


def _relative_rewards(
    group: list[Episode], batch: list[float], estimator: str, scale: str, epsilon: float
) -> list[float]:
    """(reward - baseline) / (deviation + epsilon) of a group's episodes. `batch`: all rewards of the step."""
    own = [episode.reward for episode in group]
    rewards = batch if estimator == "reinforce_pp" else own  # the baseline is their mean
    if min(rewards) == max(rewards):  # all equal: exactly 0, without a rounding error
        return [0.0] * len(own)
    baseline = length_weighted_mean(own, [e.n_sampled for e in group]) if estimator == "opo" else fmean(rewards)
    advantages = [reward - baseline for reward in own]
    if estimator == "rloo":
        advantages = [a * len(rewards) / (len(rewards) - 1) for a in advantages]  # r - mean of the others
    if scale == "none":
        return advantages
    divisor = deviation(batch if scale == "batch" else rewards) + epsilon
    return [a / divisor for a in advantages]


# ---------------------------------------------------------------------------------------------------------------------
# 3. Update


def update_policy(
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    episodes: Sequence[Episode],
    *,
    loss: LossOptions | None = None,
    reference: Qwen2ForCausalLM | None = None,
    before: Sequence[Scores] | None = None,
    max_new_tokens: int | None = None,
    max_grad_norm: float = 1.0,
    micro_batch_tokens: int = 16384,
    guard: Guard | None = None,
    loss_scale: LossScale | None = None,
    traces: TokenTraces | None = None,
    **options: Any,
) -> Metrics:
    """One optimizer step on `episodes`. Their advantages must be set. Returns the step's metrics.

    Args:
        loss: the options of the loss. Options may also be given by name: loss_type="gspo", beta=0.04, kl="k3".
        reference: the frozen policy that the KL estimates k1, k2 and k3 compare with, on the model's device. A model
            with LoRA adapters may be its own reference, and is then run without them.
        before: results of `score_episodes` from before the first update of this rollout. Some losses need them in the
            second and later updates.
        max_new_tokens: length by which dr_grpo divides. None: that of the longest response.
        max_grad_norm: if the joint norm of all gradients is larger, the gradients are scaled down to it.
        micro_batch_tokens: largest number of tokens in one forward and backward pass. It changes memory, not the
            gradient. If memory runs out, the gradient is computed again with half as many.
        guard: keeps the cause of a refused update. None: the cause is only in the warning.
        loss_scale: the scale of the loss for fp16 weights, kept from update to update. None: a new one.
        traces: records the numbers of some episodes, token by token. It does not change the update.

    With several processes, each of them must pass the same episodes. Each computes its groups' part of the gradient.
    An episode has no gradient if its advantage, beta and entropy_coef are 0. It is not computed, but its tokens count
    in the denominators. If the loss, a gradient or a log-probability of the sampler is not finite, the step is refused.
    The weights then do not change, `update/skipped` and `update/not_finite` are 1, and a warning names tensor and
    episode. With fp16 weights, an infinite gradient first lowers the loss scale, and the gradient is computed again. A
    step without any gradient is skipped. Raises ValueError if the loss needs a reference and there is none, and
    TypeError for an unknown option.
    """
    loss = replace(loss or LossOptions(), **options) if options else loss or LossOptions()
    guard, scale = guard or Guard(), loss_scale or LossScale(model.dtype)
    if loss.divergence_in_loss and loss.needs_reference and reference is None:
        raise ValueError(f"beta is {loss.beta}, but there is no reference policy to compare with")
    step = Step(episodes, model.device, loss, max_new_tokens=max_new_tokens, before=before)

    def gradient(max_tokens: int) -> StepTotals:
        """Add the gradient of every micro-batch to `.grad`."""
        optimizer.zero_grad(set_to_none=True)
        if traces is not None:
            traces.clear(scale.value)
        micro_batches, totals = list(step.micro_batches(max_tokens)), StepTotals()
        masks = top_entropy_masks(model, micro_batches, loss.top_entropy_share)
        with gradients_in_place(not is_sharded(model)):
            for micro, mask in zip(micro_batches, masks):
                (micro_batch_loss(loss, model, reference, micro, mask, totals, traces) * scale.value).backward()
        return totals

    while True:
        if distributed.world_size() == 1:
            metrics = halve_when_out_of_memory(gradient, micro_batch_tokens).metrics()
            norm = gradient_norm(_gradients(optimizer))
        else:
            totals, norm = gradients_of_all_ranks(gradient, step, model, optimizer, micro_batch_tokens)
            metrics = totals.metrics()
        metrics["grad_norm"] = grad_norm = norm.item() / scale.value
        overflow = math.isfinite(metrics["loss"]) and not math.isfinite(grad_norm)
        if not (overflow and scale.lower()):
            break
    finite = math.isfinite(metrics["loss"]) and math.isfinite(grad_norm) and not_finite_answer(episodes) is None
    metrics["update/not_finite"] = float(not finite)
    metrics["update/skipped"] = float(not (step.trains and finite))
    if not finite:
        culprit = name_culprit(
            model, episodes, step, lambda micro: micro_batch_loss(loss, model, reference, micro, None, StepTotals())
        )
        guard.refused(f"loss {metrics['loss']}, gradient norm {grad_norm}: {culprit}")
    elif not step.trains:
        guard.skipped("no episode has a gradient")
    else:
        _clipped_step(optimizer, norm, max_grad_norm, scale)
    if scale.active:
        metrics["loss_scale"] = scale.value
    optimizer.zero_grad(set_to_none=True)
    if traces is not None:
        traces.finish(step, loss, refused=not finite)
    return metrics


def _clipped_step(optimizer: torch.optim.Optimizer, norm: torch.Tensor, max_norm: float, scale: LossScale) -> None:
    """Scale the gradients down to the joint norm `max_norm`, and step. `norm` still contains the loss scale."""
    if scale.active and isinstance(optimizer, MemoryEfficientAdamW):
        grad_norm = norm.item() / scale.value
        optimizer.step(gradient_factor=min(1.0, max_norm / (grad_norm + 1e-6)) / scale.value)  # computed in fp32
    else:
        torch.nn.utils.clip_grads_with_norm_(_parameters(optimizer), max_norm * scale.value, norm)
        for gradient in _gradients(optimizer) if scale.active else []:
            gradient /= scale.value
        optimizer.step()
    scale.note_update()


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _gradients(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p.grad for p in _parameters(optimizer) if p.grad is not None]


# ---------------------------------------------------------------------------------------------------------------------
# The trainer: model, task, optimizer and the step


class GRPO:
    """The trainer: model, tokenizer, task and optimizer of a run, and the training step.

    Arguments that are not given are built from `config`. The default config is the preset of the bundled tiny model.

    step_count: number of steps so far.
    num_tokens: tokens of all responses so far. Each response counts with its prompt, as in TRL.
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        model: Qwen2ForCausalLM | None = None,
        tokenizer: Tokenizer | None = None,
        task: Task | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        reference: Qwen2ForCausalLM | None = None,
    ):
        self.config = config = config or load_config(preset_for(Config.ckpt))
        if model is None or tokenizer is None:
            model, tokenizer = load_policy(config, config.ckpt)
        self.model, self.tokenizer = model, tokenizer
        self.task = task or task_from_config(config)
        levels = config.curriculum
        if levels and task is not None and not task.levels():  # the preset's own task has levels, this one has none
            logger.warning("--curriculum is off: %s has no levels", type(task).__name__)
            levels = False
        self.curriculum = Curriculum(self.task) if levels else None
        self.model.model.gradient_checkpointing = config.gradient_checkpointing
        if config.lora_rank and not has_lora(model):
            add_lora(
                model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets, config.seed
            )  # fmt: skip
        if config.shard_weights:
            shard(model)
        if reference is None and config.needs_reference:
            # The reference is the original checkpoint, even if training resumes from a later one. With LoRA, the base
            # weights of the policy are that checkpoint.
            reference = model if has_lora(model) else load_policy(config, config.ckpt)[0]
            if is_sharded(model) and reference is not model:
                shard(reference)
        self.reference = reference
        AdamW = ShardedAdamW if is_sharded(model) else MemoryEfficientAdamW
        self.optimizer = optimizer or AdamW(
            trainable(model), config.lr, config.betas, config.eps, config.weight_decay, config.amsgrad,
            place=choose_place(model, config),
        )  # fmt: skip
        self.step_count = 0
        self.num_tokens = 0
        self.guard = Guard(config.max_refusals)
        self.loss_scale = LossScale(model.dtype)
        self.entropy_coef = config.entropy_coef  # with an entropy target, it is adapted after every step
        self.applied_entropy_coef = config.entropy_coef  # 0 while the entropy is above its target

    @property
    def sampling(self) -> SamplingParams:
        c = self.config
        return SamplingParams(
            c.group_size, c.max_new_tokens, c.temperature, c.top_k, c.top_p, c.min_p, keep_mask=c.keep_sampling_mask
        )  # fmt: skip

    def problems(self, n: int, start: int, task: Task | None = None) -> list[Problem]:
        """`n` training problems from number `start` on. With a curriculum, they come from its levels.

        task: None: the trainer's own task. For another task, the curriculum is not used.
        """
        if self.curriculum and (task is None or task is self.task):
            return self.curriculum.problems("train", n, start)
        return (task or self.task).problems("train", n, start)

    def step(self, batch: MiniBatch, *, task: Task | None = None, refill: bool = True) -> tuple[list[Episode], Metrics]:
        """One GRPO step: rollout, advantages, `updates_per_rollout` updates. Returns the episodes and the metrics.

        task: gives the rewards. None: the trainer's own task.
        refill: False: dropped groups are not replaced by groups of further problems.
        """
        c, task = self.config, task or self.task
        self.step_count += 1
        started = time.perf_counter()
        episodes, dropped = self.rollout(batch, task=task, refill_rounds=c.refill_rounds if refill else 0)
        sampled = time.perf_counter()
        if self.curriculum:
            self.curriculum.record(episodes + dropped)  # episodes of all processes, so all have equal levels
        episodes = compute_advantages(
            episodes, estimator=c.advantage_estimator, scale=c.advantage_scale, k=c.pass_k,
            part_weights={**task.part_weights(), **PENALTY_WEIGHTS, "kl": -c.beta},
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step_count, c.lr, c.lr_schedule, c.warmup_steps, c.steps, c.min_lr_ratio)
        metrics = self.update(episodes)
        updated = time.perf_counter()
        episodes = sorted(episodes + dropped, key=lambda e: e.group_id)
        response_tokens = sum(e.n_sampled for e in episodes)
        # The prompt counts once for each response. Tokens that an environment gave count, too.
        self.num_tokens += sum(len(e.prompt_ids) + len(e.response_ids) for e in episodes)
        rates = {
            "rollout/tokens_per_second": response_tokens / (sampled - started),
            "update/tokens_per_second": c.updates_per_rollout * response_tokens / (updated - sampled),
        }
        if distributed.world_size() > 1:
            rates |= distributed.rank_metrics(**rates)
        return episodes, {
            **reward_metrics(episodes, task),
            **metrics,
            **(self.curriculum.metrics() if self.curriculum else {}),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "num_tokens": self.num_tokens,
            **rates,
            "step_time": updated - started,
        }

    def rollout(
        self,
        batch: MiniBatch,
        sampling: SamplingParams | None = None,
        *,
        task: Task | None = None,
        refill_rounds: int = 0,
    ) -> tuple[list[Episode], list[Episode]]:
        """Sample and score. Returns the episodes to train on, and those of dropped groups.

        With drop_zero_variance, groups of equal rewards are dropped. Further problems replace them, in at most
        `refill_rounds` rounds. The options of the config may add penalties for length and divergence to the rewards, or
        replace the rewards by random ones.
        """
        P, c, task = len(batch), self.config, task or self.task
        kept: list[Episode] = []
        dropped: list[Episode] = []
        for number in range(refill_rounds + 1):
            if number:
                missing = P - len({e.group_id for e in kept})
                if not missing:
                    break
                start = SPARE_PROBLEMS + ((self.step_count - 1) * c.refill_rounds + number - 1) * P
                batch = MiniBatch.from_problems(self.problems(missing, start, task), self.tokenizer)
            episodes = rollout(
                self.model, self.tokenizer, task, batch, sampling or self.sampling,
                seed=c.seed * 1_000_003 + self.step_count + (number << 48),
                first_group_id=(self.step_count * (1 + c.refill_rounds) + number) * P, must_be_finite=False,
            )  # fmt: skip
            if c.random_reward:
                episodes = random_rewards(episodes, c.random_reward, c.seed)
            if c.overlong_buffer:
                episodes = penalise_length(episodes, c.max_new_tokens, c.overlong_buffer)
            if c.beta and c.kl_in == "reward":
                if self.reference is None:
                    raise ValueError(f"beta is {c.beta}, but there is no reference policy to compare with")
                episodes = penalise_divergence(
                    self.reference, episodes, c.beta, c.kl, micro_batch_tokens=c.micro_batch_tokens
                )
            if c.drop_zero_variance:
                episodes, flat = drop_zero_variance(episodes)
                dropped += flat
            kept += episodes
        return kept, dropped

    def update(self, episodes: list[Episode]) -> Metrics:
        """All updates of a rollout. Returns the metrics of the last update, but `sampling/...` of the first update.

        Those compare sampler and trainer. Only before the first update do both have the same weights."""
        with compiled_functions(self.config.compile):
            return self._update(episodes)

    def _update(self, episodes: list[Episode]) -> Metrics:
        c, before = self.config, None
        loss = c if c.entropy_target is None else replace(c, entropy_coef=self.applied_entropy_coef)
        if c.updates_per_rollout > 1 and c.needs_rollout_scores:
            before = score_episodes(
                self.model, episodes, keep_hidden=c.kl == "ot", groups=distributed.my_groups(episodes),
                micro_batch_tokens=c.micro_batch_tokens,
            )  # fmt: skip
        if c.lora_rank and c.lora_dropout:
            torch.manual_seed(c.seed * 1_000_003 + self.step_count)  # a resumed run draws the same dropout masks
        first: Metrics = {}
        traces = TokenTraces(first_groups(episodes, c.log_tokens))
        for number in range(1, c.updates_per_rollout + 1):
            metrics = update_policy(
                self.model, self.optimizer, episodes, loss=loss, reference=self.reference, before=before,
                max_new_tokens=c.max_new_tokens, max_grad_norm=c.max_grad_norm,
                micro_batch_tokens=c.micro_batch_tokens, guard=self.guard, loss_scale=self.loss_scale,
                traces=traces if number == c.updates_per_rollout else None,
            )  # fmt: skip
            first = first or metrics
        metrics |= {name: value for name, value in first.items() if name.startswith("sampling/")}
        traces.attach(episodes)
        if c.entropy_target is not None and not metrics["update/skipped"]:
            metrics["entropy_coef"] = self.applied_entropy_coef
            self.entropy_coef, self.applied_entropy_coef = adapt_entropy_coef(
                self.entropy_coef, metrics["entropy"], c.entropy_target, c.entropy_coef_step
            )
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint besides weights, optimizer state and step count, which train.py saves."""
        refusals = 0 if self.guard.gave_up else self.guard.refusals  # after giving up, a resumed run starts at 0
        return {
            "entropy_coef": self.entropy_coef,
            "applied_entropy_coef": self.applied_entropy_coef,
            "refusals": refusals,
            **(self.loss_scale.state_dict() if self.loss_scale.active else {}),
            "num_tokens": self.num_tokens,
            **({"curriculum": self.curriculum.state_dict()} if self.curriculum else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.entropy_coef = float(state["entropy_coef"])
        self.applied_entropy_coef = float(state["applied_entropy_coef"])
        self.guard.refusals = int(state.get("refusals", 0))  # older checkpoints lack it
        self.loss_scale.load_state_dict(state)
        self.num_tokens = int(state.get("num_tokens", 0))  # older checkpoints lack it: count from the resume on
        if self.curriculum:
            self.curriculum.load_state_dict(state.get("curriculum", {}))

    def train_step(self, question: str, answer: str) -> float:
        """One step on one question. `answer`: the right answer, a number or a text. Returns the loss."""
        questions = self.task if isinstance(self.task, QuestionTask) else self._questions()
        problem = questions.problem_from(question, answer)
        _, metrics = self.step(MiniBatch.from_problems([problem], self.tokenizer), task=questions, refill=False)
        return metrics["loss"]

    def _questions(self) -> QuestionTask:
        c = self.config
        return QuestionTask(format_weight=c.format_weight, answer_weight=c.answer_weight, prompt_style=c.prompt_style)
