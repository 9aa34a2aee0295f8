"""Between rollout and advantages: groups that say nothing, and what the trainer alone can add to a reward.

A task sees text. Lengths in tokens and log-probabilities are the trainer's, and so are the penalties made of them; each
becomes a part of the reward under its name, is logged like the others, and stays out of evaluations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch

from data_types import Episode
from model.lora import adapters_off
from parallel.distributed import gather, my_groups
from qwen2_llm import Qwen2ForCausalLM
from tasks.rewards import soft_overlong_penalty
from update import losses
from update.scoring import score_episodes
from update.step_metrics import has_signal


def drop_zero_variance(episodes: Sequence[Episode]) -> tuple[list[Episode], list[Episode]]:
    """(episodes of groups whose rewards differ, the other episodes): DAPO's dynamic sampling, section 3.2.

    The task's own rewards decide. Penalties of the trainer (length, divergence) would let a group of wrong responses
    train on its lengths. A group with a response whose logits were not finite stays, so that the update is refused."""
    groups = defaultdict(list)
    for episode in episodes:
        groups[episode.group_id].append(episode.task_reward)
    broken = {e.group_id for e in episodes if e.finish_reason == "not_finite"}
    tells = {group for group, rewards in groups.items() if has_signal(rewards)} | broken
    return [e for e in episodes if e.group_id in tells], [e for e in episodes if e.group_id not in tells]


def penalise_length(episodes: Sequence[Episode], max_new_tokens: int, buffer: int) -> list[Episode]:
    """Take up to 1 from the reward of answers that come within `buffer` tokens of the cap: DAPO's soft overlong
    punishment, eq. 13. The penalty is the reward part `overlong`."""
    penalties = [soft_overlong_penalty(len(e.response_ids), max_new_tokens, buffer) for e in episodes]
    return [_add_part(e, "overlong", penalty, 1.0) for e, penalty in zip(episodes, penalties)]


def penalise_divergence(
    reference: Qwen2ForCausalLM,
    episodes: Sequence[Episode],
    beta: float,
    kl: str = "k1",
    *,
    micro_batch_tokens: int = 16384,
) -> list[Episode]:
    """Take beta * KL(sampler || reference) from each reward, estimated on the answer's own tokens and summed over them
    (Ouyang et al. 2022, arXiv 2203.02155, eq. 2). The estimate is the reward part `kl`."""
    groups = my_groups(episodes)
    with adapters_off(reference):
        scores = score_episodes(reference, episodes, groups=groups, micro_batch_tokens=micro_batch_tokens)
    mine = {
        i: float(losses.kl_penalty(torch.tensor(e.logprobs), scores[i].logp, kl).sum())
        for i, e in enumerate(episodes)
        if e.group_id in groups
    }
    estimates = dict(sorted(gather(list(mine.items())))).values()
    return [_add_part(e, "kl", estimate, -beta) for e, estimate in zip(episodes, estimates)]


def _add_part(episode: Episode, name: str, value: float, weight: float) -> Episode:
    parts = {**episode.reward_parts, name: value}
    reward = episode.reward + weight * value
    return replace(episode, reward=reward, unshaped_reward=episode.task_reward, reward_parts=parts)
