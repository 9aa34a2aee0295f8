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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import losses
from attention import Layout, PackedAttention
from config import Config, load_config, preset_for
from data_types import Episode, MiniBatch
from generation import SamplingParams, generate
from linear import gradients_in_place
from math_task import QuestionTask, Task, task_from_config
from optimizer import MemoryEfficientAdamW, learning_rate
from pretrained import load_pretrained, locate_pretrained
from qwen2_llm import Qwen2Config, Qwen2ForCausalLM
from tokenizer import Tokenizer

logger = logging.getLogger(__name__)
Metrics = dict[str, float]


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
) -> list[Episode]:
    """Sample `sampling.n` answers to every prompt and score them; the answers to a prompt share a group id.

    The same (weights, batch, sampling, seed) gives the same episodes. Sampling at temperature 0 is for evaluation: its
    episodes are scored at temperature 1.
    """
    if sampling.filtered:
        logger.warning("top-k, top-p or min-p is on: tokens are drawn from another distribution than is trained, "
                       "which biases the ratio")  # fmt: skip
    episodes = []
    for completion in generate(model, batch.prompt_ids, sampling, tokenizer=tokenizer, seed=seed):
        problem = batch.problems[completion.prompt_index]
        reward = task.reward(problem, completion.text)
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
    return episodes


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
    loss_type: str = "dapo",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    reference: Qwen2ForCausalLM | None = None,
    entropy_coef: float = 0.0,
    mask_truncated: bool = False,
    max_new_tokens: int | None = None,
    max_grad_norm: float = 1.0,
    micro_batch_tokens: int = 16384,
    shared_prefix: bool = True,
    in_place_gradients: bool = True,
    **loss_options: float,
) -> Metrics:
    """One optimizer step on `episodes`, whose advantages are set. Returns the step's metrics.

    Args:
        beta, kl, reference: weight and estimator of the divergence from the frozen `reference`, on the model's device.
        entropy_coef: alpha; positive values reward entropy.
        mask_truncated: leave answers that were cut at the cap out of the loss and its denominators.
        max_new_tokens: dr_grpo's constant denominator; None takes the longest answer.
        micro_batch_tokens: most tokens in one forward and backward pass. Memory, not mathematics.
        shared_prefix: False repeats the prompt for every answer (the slow twin).
        in_place_gradients: False lets autograd add the gradients of micro-batches (the slow twin).

    Episodes without a gradient (advantage 0, beta 0, entropy_coef 0) count in the denominators and are not computed.
    A non-finite loss or gradient refuses the step: weights stay as they were, `update/skipped` is 1 and a warning says
    why; so does a step in which nothing is left to learn from.
    """
    if beta and reference is None:
        raise ValueError(f"beta is {beta}, but there is no reference policy to stay close to")
    step = _Step(
        model, list(episodes), loss_type, mask_truncated, max_new_tokens,
        everything=bool(beta or entropy_coef), shared_prefix=shared_prefix,
    )  # fmt: skip
    options = {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high, "delta": delta, **loss_options}
    totals: dict[str, float] = defaultdict(float)
    optimizer.zero_grad(set_to_none=True)

    def backward(micro: MicroBatch) -> None:
        logp, entropy = score(model, micro)
        terms = losses.policy_loss(
            logp, micro.old_logp, micro.advantages, micro.lengths, loss_type=loss_type, **options
        )
        policy = losses.weighted_sum(terms.loss, micro.weights)
        loss = policy
        if beta:
            with torch.no_grad():
                ref_logp, _ = score(reference, micro)
            divergence = losses.kl_penalty(logp, ref_logp, kl)
            loss = loss + beta * losses.weighted_sum(divergence, micro.weights)
            totals["kl"] += divergence.detach().sum().item()
        if entropy_coef:
            loss = loss - entropy_coef * losses.weighted_sum(entropy, micro.weights)
        loss.backward()
        _add_up(totals, micro, loss, policy, logp, entropy, terms)

    with gradients_in_place(in_place_gradients):
        for micro in step.micro_batches(micro_batch_tokens):
            backward(micro)

    metrics = _means(totals, beta)
    metrics["grad_norm"] = grad_norm = _clip_gradients(optimizer, max_grad_norm)
    metrics["update/skipped"] = 0.0
    if not step.trained or not math.isfinite(metrics["loss"]) or not math.isfinite(grad_norm):
        cause = f"loss {metrics['loss']}, gradient norm {grad_norm}" if step.trained else "no episode has a gradient"
        logger.warning("the update was refused (%s); the weights stay as they were", cause)
        metrics["update/skipped"] = 1.0
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics


def score(model: Qwen2ForCausalLM, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """Log-probability of every response token and entropy where it was drawn: [M] and [M], fp32."""
    hidden_ND = model.hidden_states(micro.ids, micro.positions, PackedAttention(micro.layout))
    hidden_MD = hidden_ND[micro.predicting_rows]
    return losses.token_logprobs(hidden_MD, model.head_weight, micro.targets, micro.temperature, micro.vocab_size)


@dataclass
class MicroBatch:
    """Whole groups as flat rows: each prompt once, then its answers. The last token of an answer predicts nothing and
    is left out of the rows.
    """

    ids: Tensor  # [N]
    positions: Tensor  # [N]
    layout: Layout
    predicting_rows: Tensor  # [M] row whose hidden state predicts the token: the one before it
    targets: Tensor  # [M]
    old_logp: Tensor  # [M]
    weights: Tensor  # [M] the token's share in the step's loss
    advantages: Tensor  # [E]
    lengths: Tensor  # [E]
    temperature: float
    vocab_size: int | None


class _Step:
    """The episodes of one optimizer step: their token weights, and their cut into micro-batches."""

    def __init__(
        self, model, episodes: list[Episode], loss_type: str, mask_truncated: bool, max_new_tokens: int | None,
        everything: bool, shared_prefix: bool,
    ):  # fmt: skip
        if len({(e.temperature, e.vocab_size) for e in episodes}) > 1:
            raise ValueError("the episodes of one update were sampled at different temperatures or vocabularies")
        self.device, self.shared_prefix = model.device, shared_prefix
        kept = [bool(e.response_ids) and not (mask_truncated and e.truncated) for e in episodes]
        lengths = torch.tensor([len(e.response_ids) for e in episodes], dtype=torch.long)
        longest = max_new_tokens or max([1, *lengths.tolist()])
        keep_M = torch.tensor(kept, dtype=torch.bool).repeat_interleave(lengths)
        weights = losses.token_weights(loss_type, lengths, longest, keep_M).split(lengths.tolist())
        # A reward that was NaN has advantage 0; with beta or an entropy term its tokens still count.
        self.trained = [(e, w) for e, w, k in zip(episodes, weights, kept) if k and (everything or e.advantage != 0)]

    def micro_batches(self, max_tokens: int) -> Iterator[MicroBatch]:
        """Groups packed in order until the next would not fit; a group that is too large alone is cut, and its prompt
        computed once a piece."""
        pieces: list[list[tuple[Episode, Tensor]]] = []
        size = 0
        for piece in self._pieces(max_tokens):
            tokens = self._tokens(piece)
            if pieces and size + tokens <= max_tokens:
                pieces[-1].append(piece)
                size += tokens
            else:
                pieces.append([piece])
                size = tokens
        for groups in pieces:
            yield self._micro_batch(groups)

    def _pieces(self, max_tokens: int) -> list[list[tuple[Episode, Tensor]]]:
        """Episodes that share a prompt's computation: of one group, and with the same prompt ids."""
        groups = defaultdict(list)
        for number, (episode, weight) in enumerate(self.trained):
            key = (episode.group_id, tuple(episode.prompt_ids)) if self.shared_prefix else number
            groups[key].append((episode, weight))
        pieces = []
        for group in groups.values():
            pieces.append([])
            for member in group:
                if pieces[-1] and self._tokens([*pieces[-1], member]) > max_tokens:
                    pieces.append([])
                pieces[-1].append(member)
        return pieces

    @staticmethod
    def _tokens(piece: list[tuple[Episode, Tensor]]) -> int:
        return len(piece[0][0].prompt_ids) + sum(len(e.response_ids) - 1 for e, _ in piece)

    def _micro_batch(self, groups: list[list[tuple[Episode, Tensor]]]) -> MicroBatch:
        members = [member for group in groups for member in group]
        episodes = [e for e, _ in members]
        ids, rows = [], []
        for group in groups:
            prompt = group[0][0].prompt_ids
            last_prompt_row = len(ids) + len(prompt) - 1
            ids += prompt
            for e, _ in group:
                rows += [last_prompt_row, *range(len(ids), len(ids) + len(e.response_ids) - 1)]
                ids += e.response_ids[:-1]
        layout = Layout.shared_prefix(
            [len(group[0][0].prompt_ids) for group in groups],
            [[len(e.response_ids) - 1 for e, _ in group] for group in groups],
        )

        def on_device(numbers: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(numbers, dtype=dtype, device=self.device)

        return MicroBatch(
            ids=on_device(ids, torch.long),
            positions=layout.positions(self.device),
            layout=layout,
            predicting_rows=on_device(rows, torch.long),
            targets=on_device([i for e in episodes for i in e.response_ids], torch.long),
            old_logp=on_device([x for e in episodes for x in e.logprobs], torch.float32),
            weights=torch.cat([w for _, w in members]).to(self.device),
            advantages=on_device([e.advantage for e in episodes], torch.float32),
            lengths=on_device([len(e.response_ids) for e in episodes], torch.long),
            temperature=episodes[0].temperature,
            vocab_size=episodes[0].vocab_size,
        )


def _add_up(totals, micro: MicroBatch, loss: Tensor, policy: Tensor, logp: Tensor, entropy: Tensor, terms) -> None:
    """Sums over the step's tokens, for the means that are reported; the losses are sums of weighted terms already."""
    with torch.no_grad():
        difference = (logp - micro.old_logp).abs()
        sums = {
            "tokens": float(len(logp)),
            "loss": loss,
            "policy_loss": policy,
            "entropy": entropy.sum(),
            "clip_low": terms.clipped_low.sum(),
            "clip_high": terms.clipped_high.sum(),
            "ratio": terms.ratio.sum(),
            "difference": difference.sum(),
        }
        for name, value in sums.items():
            totals[name] += float(value)
        totals["max_difference"] = max(totals["max_difference"], float(difference.max()))


def _means(totals: dict[str, float], beta: float) -> Metrics:
    tokens = max(totals["tokens"], 1.0)
    metrics = {
        "loss": totals["loss"],
        "policy_loss": totals["policy_loss"],
        "entropy": totals["entropy"] / tokens,
        "clip_ratio/low_mean": totals["clip_low"] / tokens,
        "clip_ratio/high_mean": totals["clip_high"] / tokens,
        "ratio/mean": totals["ratio"] / tokens,
        "sampling/sampling_logp_difference/mean": totals["difference"] / tokens,
        "sampling/sampling_logp_difference/max": totals["max_difference"],
        "update/tokens": totals["tokens"],
    }
    return metrics | ({"kl": totals["kl"] / tokens} if beta else {})


def _clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """Scale all gradients down to a joint norm of `max_norm`; returns the norm they had."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not parameters:
        return 0.0
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()


def reward_metrics(episodes: Sequence[Episode], task: Task) -> Metrics:
    """What the rollout earned: means and deviations over episodes, how many groups say nothing, and the task's own
    diagnostics (the share of false sums, say), which are never paid for."""
    rewards = torch.tensor([e.reward for e in episodes], dtype=torch.float64)
    groups = defaultdict(list)
    for e in episodes:
        groups[e.group_id].append(e.reward)
    dead = [min(group) == max(group) for group in groups.values()]
    lengths = [len(e.response_ids) for e in episodes]
    metrics = {
        "reward": rewards.nanmean().item(),
        "reward_std": sum(_deviation(group) for group in groups.values()) / len(groups),
        "frac_reward_zero_std": sum(dead) / len(dead),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/clipped_ratio": sum(e.truncated for e in episodes) / len(episodes),
    }
    for part in episodes[0].reward_parts:
        values = torch.tensor([e.reward_parts.get(part, math.nan) for e in episodes], dtype=torch.float64)
        values = values[~values.isnan()]
        metrics[f"rewards/{part}/mean"] = values.mean().item()
        metrics[f"rewards/{part}/std"] = values.std(correction=0).item()
    diagnostics = [task.diagnostics(e.problem, e.text) for e in episodes]
    return metrics | {name: sum(d[name] for d in diagnostics) / len(diagnostics) for name in diagnostics[0]}


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
        self.optimizer = optimizer or MemoryEfficientAdamW(
            model.parameters(), config.lr, config.betas, config.eps, config.weight_decay, config.amsgrad,
            enabled=config.cpu_optimizer,
        )  # fmt: skip
        if (
            reference is None and config.beta
        ):  # the checkpoint itself, also where the policy was resumed from a later one
            reference, _ = load_policy(config, locate_pretrained(config.ckpt))
        self.reference = reference
        self.step_count = 0

    @property
    def sampling(self) -> SamplingParams:
        c = self.config
        return SamplingParams(c.group_size, c.max_new_tokens, c.temperature, c.top_k, c.top_p, c.min_p)

    def step(self, batch: MiniBatch) -> tuple[list[Episode], Metrics]:
        """One GRPO step: roll out, score, update `updates_per_rollout` times. Returns the episodes and the metrics."""
        c = self.config
        self.step_count += 1
        started = time.perf_counter()
        episodes = rollout(
            self.model, self.tokenizer, self.task, batch, self.sampling,
            seed=c.seed * 1_000_003 + self.step_count, first_group_id=self.step_count * len(batch),
        )  # fmt: skip
        sampled = time.perf_counter()
        episodes = compute_advantages(episodes, estimator=c.advantage_estimator, scale=c.advantage_scale)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step_count, c.lr, c.lr_schedule, c.warmup_steps, c.steps, c.min_lr_ratio)
        for _ in range(c.updates_per_rollout):
            metrics = self.update(episodes)
        updated = time.perf_counter()
        response_tokens = sum(len(e.response_ids) for e in episodes)
        return episodes, {
            **reward_metrics(episodes, self.task),
            **metrics,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "num_tokens": response_tokens + sum(map(len, batch.prompt_ids)),
            "rollout/tokens_per_second": response_tokens / (sampled - started),
            "update/tokens_per_second": c.updates_per_rollout * response_tokens / (updated - sampled),
            "step_time": updated - started,
        }

    def update(self, episodes: Sequence[Episode]) -> Metrics:
        """`update_policy` with this training's settings."""
        c = self.config
        return update_policy(
            self.model, self.optimizer, episodes, loss_type=c.loss_type, epsilon_low=c.epsilon_low,
            epsilon_high=c.epsilon_high, delta=c.delta, beta=c.beta, kl=c.kl, reference=self.reference,
            entropy_coef=c.entropy_coef, mask_truncated=c.mask_truncated, max_new_tokens=c.max_new_tokens,
            max_grad_norm=c.max_grad_norm, micro_batch_tokens=c.micro_batch_tokens, shared_prefix=c.shared_prefix,
            sapo_temperature_pos=c.sapo_temperature_pos, sapo_temperature_neg=c.sapo_temperature_neg,
        )  # fmt: skip

    def train_step(self, question: str, answer: str) -> float:
        """One step on a single question, whose answer is a number or a text. Returns the loss."""
        questions = self.task if isinstance(self.task, QuestionTask) else self._questions()
        problem = questions.problem_from(question, answer)
        task, self.task = self.task, questions
        _, metrics = self.step(MiniBatch.from_problems([problem], self.tokenizer))
        self.task = task
        return metrics["loss"]

    def _questions(self) -> QuestionTask:
        c = self.config
        return QuestionTask(format_weight=c.format_weight, answer_weight=c.answer_weight, prompt_style=c.prompt_style)


def load_policy(config: Config, folder: str | Path) -> tuple[Qwen2ForCausalLM, Tokenizer]:
    """Model and tokenizer of `folder`, on the device and in the dtype that the config asks for."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(config.dtype)
    if dtype is None:
        sizes = Qwen2Config.from_pretrained(folder)
        dtype = torch.float32 if sizes.num_hidden_layers * sizes.hidden_size**2 < 1e6 else torch.bfloat16
    return load_pretrained(folder, dtype, device)
