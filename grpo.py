"""GRPO, top to bottom: rollout -> compute_advantages -> update_policy, and the class `GRPO` around them.

For every prompt, sample a group of answers, score each, and let the group be its own baseline (DeepSeekMath, Shao et
al. 2024, arXiv 2402.03300, section 4.1): answers better than their siblings become likelier, worse ones less likely.

    A_i    = (r_i - mean(r)) / std(r)                                        of the group       compute_advantages
    rho_t  = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)                       a token            losses.policy_loss
    loss   = sum_t w_t [ -min(rho_t A, clip(rho_t, 1 - eps, 1 + eps) A) + beta KL_t - alpha H_t ]   update_policy

Where this departs from the textbook, and why:

- pi_old is the sampler's own log-probability, stored when the token was drawn: the policy that really acted. Sampler
  and trainer share weights and code, so the two agree to rounding, and the difference is logged at every step.
- The weights w_t are made once for the whole optimizer step (losses.token_weights). Micro-batches only add up their
  part, so the gradient does not depend on how the step is cut.
- A group's prompt passes through the model once, and all its answers attend to it (attention.Layout.shared_prefix).
- alpha > 0 rewards entropy H, which keeps the policy random.

    trainer = GRPO()                                          # the bundled tiny model on the CPU
    loss = trainer.train_step("What is 12 + 7 * 3?", "33")    # one group, one update

Shape letters: N flat tokens of a micro-batch, M of them scored (response tokens), E episodes, D hidden, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from data_types import Episode, MiniBatch, Reward
from math_task import QuestionTask, Task, task_from_config
from model.linear import gradients_in_place
from model.lora import adapters_off, add_lora, has_lora, trainable
from optimizer import MemoryEfficientAdamW, learning_rate
from parallel import distributed
from parallel.sharding import ShardedAdamW, gradient_norm, is_sharded, reduce_gradients, shard, whole
from qwen2_llm import Qwen2ForCausalLM
from rollout.generation import SamplingParams, generate, halve_when_out_of_memory
from run.config import Config, load_config, preset_for
from run.pretrained import load_policy, locate_pretrained
from tokenizer import Tokenizer
from update import losses
from update.guards import Guard, name_culprit, not_finite_answer
from update.objective import Objective
from update.packing import MicroBatch, Scores, Step
from update.scoring import response_states, score, score_episodes, score_states, top_entropy_masks
from update.shaping import drop_zero_variance, penalise_divergence, penalise_length
from update.step_metrics import Metrics, StepTotals, reward_metrics

logger = logging.getLogger(__name__)
SPARE_PROBLEMS = 2**31  # number of the first training problem that replaces a dropped one: far from the run's own


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
    """Sample `sampling.n` answers to every prompt and score them; the answers to a prompt share a group id.

    The same (weights, batch, sampling, seed) gives the same episodes, with any number of ranks: each samples and
    scores its share of the prompts, and all of them get all episodes. Sampling at temperature 0 is for evaluation: its
    episodes are scored at temperature 1.

    must_be_finite: True raises ValueError where the model's logits are not finite. False ends such an answer there,
        with the finish reason "not_finite" and no reward; `update_policy` refuses a step that holds one.
    """
    if sampling.filtered:
        logger.warning("top-k, top-p or min-p is on: tokens are drawn from another distribution than is trained, "
                       "which biases the ratio")  # fmt: skip
    episodes, mine = [], distributed.share(len(batch))
    plain = whole(model)
    for completion in generate(
        plain, batch.prompt_ids, sampling, tokenizer=tokenizer, seed=seed, only=mine, must_be_finite=must_be_finite
    ):
        problem = batch.problems[completion.prompt_index]
        broken = completion.finish_reason == "not_finite"
        reward = Reward(math.nan, {}) if broken else task.reward(problem, completion.text)
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
                temperature=sampling.temperature or 1.0,
                vocab_size=tokenizer.vocab_size,
                problem=problem,
            )
        )
    return distributed.gather(episodes)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Advantages


def compute_advantages(
    episodes: Sequence[Episode],
    *,
    estimator: str = "group_mean",
    scale: str = "group",
    epsilon: float = 1e-4,
) -> list[Episode]:
    """Episodes with their `advantage` filled in: (reward - baseline) / (deviation + epsilon). Returns new episodes.

    estimator: the baseline.
        group_mean    mean reward of the group (GRPO)
        rloo          mean reward of the others of the group (Ahmadian et al. 2024, arXiv 2402.14740)
        reinforce_pp  mean reward of the batch (REINFORCE++, Hu 2025, arXiv 2501.03262)
    scale: the deviation, of the population (divisor n): `group`, `batch`, or `none` (Dr. GRPO, arXiv 2503.20783).

    Groups go by `group_id`, wherever their members stand. Where all rewards of a group are equal, its advantages
    under group_mean and rloo are exactly 0. An episode whose reward is NaN gets 0 and leaves the others alone.
    Raises ValueError for an unknown option.
    """
    if estimator not in ("group_mean", "rloo", "reinforce_pp") or scale not in ("group", "batch", "none"):
        raise ValueError(
            f"estimator {estimator!r}, scale {scale!r}: expected one of group_mean, rloo, reinforce_pp, "
            "and one of group, batch, none"
        )
    groups = defaultdict(list)
    for episode in episodes:
        if not math.isnan(episode.reward):
            groups[episode.group_id].append(episode.reward)
    everyone = [reward for rewards in groups.values() for reward in rewards]
    done = []
    for episode in episodes:
        rewards = everyone if estimator == "reinforce_pp" else groups[episode.group_id]
        if math.isnan(episode.reward) or min(rewards) == max(rewards):  # equal: exactly 0, whatever rounding says
            done.append(replace(episode, advantage=0.0))
            continue
        advantage = episode.reward - sum(rewards) / len(rewards)
        if estimator == "rloo":
            advantage *= len(rewards) / (len(rewards) - 1)  # r - mean of the others
        if scale != "none":
            advantage /= _deviation(groups[episode.group_id] if scale == "group" else everyone) + epsilon
        done.append(replace(episode, advantage=advantage))
    return done


def _deviation(rewards: Sequence[float]) -> float:
    mean = sum(rewards) / len(rewards)
    return math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))


# ---------------------------------------------------------------------------------------------------------------------
# 3. Update


def update_policy(
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    episodes: Sequence[Episode],
    *,
    reference: Qwen2ForCausalLM | None = None,
    before: Sequence[Scores] | None = None,
    max_new_tokens: int | None = None,
    max_grad_norm: float = 1.0,
    micro_batch_tokens: int = 16384,
    shared_prefix: bool = True,
    in_place_gradients: bool = True,
    refused: Callable[[str], None] | None = None,
    **objective: float | str | bool | None,
) -> Metrics:
    """One optimizer step on `episodes`, whose advantages are set. Returns the step's metrics.

    Args:
        objective: the fields of `objective.Objective`: loss_type="gspo", beta=0.04, kl="k3", entropy_coef=0.001, ...
        reference: the frozen policy that k1, k2 and k3 compare with, on the model's device; a model with adapters may
            be its own, and is asked with them off.
        before: `score_episodes` with the weights before the rollout's first update, for the updates after it.
        max_new_tokens: dr_grpo's constant denominator; None takes the longest answer.
        micro_batch_tokens: most tokens in one forward and backward pass. Memory, not mathematics: when memory runs out,
            the step's gradient is computed again with half as many.
        shared_prefix: False repeats the prompt for every answer (the slow twin).
        in_place_gradients: False lets autograd add the gradients of micro-batches (the slow twin).
        refused: is told why an update was refused; None: a warning.

    With several ranks all of them give the same episodes; each computes its groups' part of the gradient.
    Episodes without a gradient (advantage 0, beta 0, entropy_coef 0) count in the denominators and are not computed.
    A non-finite loss, gradient or log-probability of the sampler refuses the step: weights stay as they were,
    `update/skipped` and `update/not_finite` are 1 and a warning names tensor and episode. A step in which nothing is
    left to learn from is skipped, too.
    """
    o = Objective(**objective)
    if o.in_loss and o.compares_with_reference and reference is None:
        raise ValueError(f"beta is {o.beta}, but there is no reference policy to stay close to")
    step = Step(
        episodes, model.device, o.loss_type, mask_truncated=o.mask_truncated, max_new_tokens=max_new_tokens,
        everything=o.everything, shared_prefix=shared_prefix, before=before, groups=distributed.my_groups(episodes),
        lockstep=is_sharded(model),
    )  # fmt: skip

    def all_gradients(max_tokens: int) -> StepTotals:
        optimizer.zero_grad(set_to_none=True)
        micro_batches, totals = list(step.micro_batches(max_tokens)), StepTotals()
        masks = top_entropy_masks(model, micro_batches, o.top_entropy_share)
        with gradients_in_place(in_place_gradients and not is_sharded(model)):
            for micro, mask in zip(micro_batches, masks):
                micro_loss(o, model, reference, micro, mask, totals).backward()
        return totals.of_all_ranks()

    together = distributed.in_lockstep if is_sharded(model) else distributed.telling_the_others
    metrics = halve_when_out_of_memory(together(all_gradients), micro_batch_tokens).metrics()
    if step.trains:
        reduce_gradients(optimizer)
    metrics["grad_norm"] = grad_norm = _clip_gradients(optimizer, max_grad_norm)
    finite = math.isfinite(metrics["loss"]) and math.isfinite(grad_norm) and not_finite_answer(episodes) is None
    metrics["update/not_finite"] = float(not finite)
    metrics["update/skipped"] = float(not step.trains or metrics["update/not_finite"])
    if metrics["update/skipped"]:
        cause = "no episode has a gradient"
        if not finite:
            culprit = name_culprit(
                model, episodes, step, lambda micro: micro_loss(o, model, reference, micro, None, StepTotals())
            )
            cause = f"loss {metrics['loss']}, gradient norm {grad_norm}: {culprit}"
        (refused or Guard().refused)(cause)
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics


def micro_loss(
    o: Objective, model: Qwen2ForCausalLM, reference: Qwen2ForCausalLM | None, micro: MicroBatch, mask: Tensor | None,
    totals: StepTotals,
) -> Tensor:  # fmt: skip
    """A micro-batch's part of the step's loss, a scalar. `mask` [M]: tokens that the policy loss learns from."""
    hidden = response_states(model, micro)
    logp, entropy = score_states(model, micro, hidden)
    terms, importance = o.policy(micro, logp)
    loss = policy = losses.weighted_sum(terms.loss, micro.weights if mask is None else micro.weights * mask)
    if o.in_loss:
        ref_logp = None
        if o.compares_with_reference:
            with torch.no_grad(), adapters_off(reference):
                ref_logp, _ = score(reference, micro)
        divergence = o.divergence(micro, logp, hidden, ref_logp)
        loss = loss + o.beta * divergence.loss
        totals.add_terms(kl=divergence.terms)
    if o.entropy_coef:
        loss = loss - o.entropy_coef * losses.weighted_sum(entropy, micro.weights)
    if importance is not None:
        totals.add_terms(importance=importance)
    totals.add(loss=loss, policy_loss=policy)
    totals.add_terms(
        ratio=terms.ratio, entropy=entropy, clipped_low=terms.clipped_low, clipped_high=terms.clipped_high,
        difference=(logp.detach() - micro.old_logp).abs(),
    )  # fmt: skip
    return loss


def _clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """Scale all gradients down to a joint norm of `max_norm`; returns the norm they had."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not parameters:
        return 0.0
    norm = gradient_norm(optimizer, parameters)
    if norm.isfinite():  # else all gradients would become NaN, and who began it could not be told
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()


# ---------------------------------------------------------------------------------------------------------------------
# All of it


class GRPO:
    """Model, tokenizer, task and optimizer of one training, and the step that ties them.

    What is not given is built from `config`; without a config, it is the bundled tiny model with its preset.

    step_count: optimizer-visible steps so far, one rollout each.
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
            model, tokenizer = load_policy(config, locate_pretrained(config.ckpt))
        self.model, self.tokenizer = model, tokenizer
        self.task = task or task_from_config(config)
        self.model.model.gradient_checkpointing = config.gradient_checkpointing
        if config.lora_rank and not has_lora(model):
            add_lora(
                model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets, config.seed
            )  # fmt: skip
        if config.shard_weights:
            shard(model)
        AdamW = ShardedAdamW if is_sharded(model) else MemoryEfficientAdamW
        self.optimizer = optimizer or AdamW(
            trainable(model), config.lr, config.betas, config.eps, config.weight_decay, config.amsgrad,
            enabled=config.cpu_optimizer,
        )  # fmt: skip
        self.objective = Objective.from_config(config)
        if reference is None and self.objective.compares_with_reference:
            # The checkpoint itself, also where the policy was resumed from a later one; with adapters it is in there.
            reference = model if has_lora(model) else load_policy(config, locate_pretrained(config.ckpt))[0]
            if is_sharded(model) and reference is not model:
                shard(reference)
        self.reference = reference
        self.step_count = 0
        self.guard = Guard(config.max_refusals)
        self.entropy_coef = config.entropy_coef  # where the adaptive one stands
        self.applied_entropy_coef = config.entropy_coef  # it rests while entropy is above the target

    @property
    def sampling(self) -> SamplingParams:
        c = self.config
        return SamplingParams(c.group_size, c.max_new_tokens, c.temperature, c.top_k, c.top_p, c.min_p)

    def step(self, batch: MiniBatch, refill: bool = True) -> tuple[list[Episode], Metrics]:
        """One GRPO step: roll out, score, update `updates_per_rollout` times. Returns the episodes and the metrics.

        refill: False draws no further problems for groups that were dropped.
        """
        c = self.config
        self.step_count += 1
        started = time.perf_counter()
        episodes, dropped = self.sample(batch, c.refill_rounds if refill else 0)
        sampled = time.perf_counter()
        episodes = compute_advantages(episodes, estimator=c.advantage_estimator, scale=c.advantage_scale)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step_count, c.lr, c.lr_schedule, c.warmup_steps, c.steps, c.min_lr_ratio)
        metrics = self._updates(episodes)
        updated = time.perf_counter()
        episodes = sorted(episodes + dropped, key=lambda e: e.group_id)
        response_tokens = sum(len(e.response_ids) for e in episodes)
        rates = {
            "rollout/tokens_per_second": response_tokens / (sampled - started),
            "update/tokens_per_second": c.updates_per_rollout * response_tokens / (updated - sampled),
        }
        return episodes, {
            **reward_metrics(episodes, self.task),
            **metrics,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "num_tokens": response_tokens + sum({e.group_id: len(e.prompt_ids) for e in episodes}.values()),
            **rates,
            **distributed.rank_metrics(**rates),
            "step_time": updated - started,
        }

    def sample(self, batch: MiniBatch, refill_rounds: int = 0) -> tuple[list[Episode], list[Episode]]:
        """Roll out; with drop_zero_variance sample further problems in place of groups that say nothing, in at most
        `refill_rounds` rounds. Returns the episodes to train on, and those that were dropped."""
        P, c = len(batch), self.config
        kept, dropped = self._rollout(batch, P), []
        if not c.drop_zero_variance:
            return kept, dropped
        kept, dropped = drop_zero_variance(kept)
        for number in range(1, refill_rounds + 1):
            missing = P - len({e.group_id for e in kept})
            if not missing:
                break
            round_of_the_run = (self.step_count - 1) * c.refill_rounds + number - 1
            problems = self.task.problems("train", missing, start=SPARE_PROBLEMS + round_of_the_run * P)
            more = self._rollout(MiniBatch.from_problems(problems, self.tokenizer), P, number)
            kept, dropped = (old + new for old, new in zip((kept, dropped), drop_zero_variance(more)))
        return kept, dropped

    def _rollout(self, batch: MiniBatch, P: int, number: int = 0) -> list[Episode]:
        """Sample and score, and shape the rewards by what only the trainer knows: lengths and log-probabilities."""
        c = self.config
        episodes = rollout(
            self.model, self.tokenizer, self.task, batch, self.sampling,
            seed=c.seed * 1_000_003 + self.step_count + (number << 48),
            first_group_id=(self.step_count * (1 + c.refill_rounds) + number) * P, must_be_finite=False,
        )  # fmt: skip
        if c.overlong_buffer:
            episodes = penalise_length(episodes, c.max_new_tokens, c.overlong_buffer)
        if c.beta and c.kl_in == "reward":
            episodes = penalise_divergence(self.reference, episodes, c.beta, c.kl, **self._packing)
        return episodes

    def _updates(self, episodes: list[Episode]) -> Metrics:
        """All updates of a rollout; the metrics are the last one's, of sampler against trainer the first one's."""
        c, before = self.config, None
        if c.updates_per_rollout > 1 and self.objective.asks_before:
            before = score_episodes(
                self.model, episodes, keep_hidden=c.kl == "ot", groups=distributed.my_groups(episodes), **self._packing
            )
        if c.lora_rank and c.lora_dropout:
            torch.manual_seed(c.seed * 1_000_003 + self.step_count)  # dropout: the same in a run that was resumed
        first = metrics = self.update(episodes, before)
        for _ in range(c.updates_per_rollout - 1):
            metrics = self.update(episodes, before)
        # How far sampler and trainer are apart is a question about equal weights.
        metrics |= {name: value for name, value in first.items() if name.startswith("sampling/")}
        if c.entropy_target is not None and not metrics["update/skipped"]:
            metrics["entropy_coef"] = self.applied_entropy_coef
            self.entropy_coef, self.applied_entropy_coef = losses.adapt_entropy_coef(
                self.entropy_coef, metrics["entropy"], c.entropy_target, c.entropy_coef_step
            )
        return metrics

    def update(self, episodes: Sequence[Episode], before: Sequence[Scores] | None = None) -> Metrics:
        """`update_policy` with this training's settings."""
        c = self.config
        objective = asdict(self.objective) | {"entropy_coef": self.applied_entropy_coef}
        return update_policy(
            self.model, self.optimizer, episodes, reference=self.reference, before=before,
            max_new_tokens=c.max_new_tokens, max_grad_norm=c.max_grad_norm, refused=self.guard.refused, **self._packing,
            **objective,
        )  # fmt: skip

    @property
    def _packing(self) -> dict[str, int | bool]:
        return {"micro_batch_tokens": self.config.micro_batch_tokens, "shared_prefix": self.config.shared_prefix}

    def state_dict(self) -> dict[str, float]:
        """What steps hand on to steps besides weights and optimizer state, for the checkpoint."""
        refusals = 0 if self.guard.gave_up else self.guard.refusals  # who goes on after the end wants another try
        return {
            "entropy_coef": self.entropy_coef,
            "applied_entropy_coef": self.applied_entropy_coef,
            "refusals": refusals,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.entropy_coef, self.applied_entropy_coef = state["entropy_coef"], state["applied_entropy_coef"]
        self.guard.refusals = state.get("refusals", 0)  # checkpoints of before it was kept have none

    def train_step(self, question: str, answer: str) -> float:
        """One step on a single question, whose answer is a number or a text. Returns the loss."""
        questions = self.task if isinstance(self.task, QuestionTask) else self._questions()
        problem = questions.problem_from(question, answer)
        task, self.task = self.task, questions
        _, metrics = self.step(MiniBatch.from_problems([problem], self.tokenizer), refill=False)
        self.task = task
        return metrics["loss"]

    def _questions(self) -> QuestionTask:
        c = self.config
        return QuestionTask(format_weight=c.format_weight, answer_weight=c.answer_weight, prompt_style=c.prompt_style)
