"""Changes between rollout and advantages: groups without a signal are dropped, and penalties are added to rewards.

A reward function sees text. It does not see lengths in tokens or log-probabilities, so the trainer applies the
penalties that need them. Each penalty is a named part of the reward and is logged as the other parts are. Evaluations
leave it out. A control experiment replaces the reward by a random one.
"""

from __future__ import annotations

import math
import random
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

PENALTY_WEIGHTS = {"overlong": 1.0}  # of the reward parts that are added here; that of `kl` is -beta


def drop_zero_variance(episodes: Sequence[Episode]) -> tuple[list[Episode], list[Episode]]:
    """(episodes of groups whose rewards differ, the other episodes): DAPO's dynamic sampling, section 3.2.

    Only the task's own rewards count here. With the trainer's penalties (length, divergence), a group of wrong
    responses would train on its lengths. A group with a response whose logits were not finite is kept, so that the
    update is refused."""
    groups = defaultdict(list)
    for episode in episodes:
        groups[episode.group_id].append(episode.task_reward)
    broken = {e.group_id for e in episodes if e.finish_reason == "not_finite"}
    kept = {group for group, rewards in groups.items() if has_signal(rewards)} | broken
    return [e for e in episodes if e.group_id in kept], [e for e in episodes if e.group_id not in kept]


def random_rewards(episodes: Sequence[Episode], probability: float, seed: int) -> list[Episode]:
    """Replace each reward by 1 with this probability, else by 0: a control experiment (arXiv 2506.10947).

    The reward depends on (seed, problem, index of the response in its group) and not on the text. It is the reward part
    `random`. The task's own parts stay in the log, and do not train. A missing reward stays missing.
    """
    seen: dict[int, int] = defaultdict(int)
    done = []
    for episode in episodes:
        index = seen[episode.group_id]
        seen[episode.group_id] += 1
        if math.isnan(episode.reward):
            done.append(episode)
            continue
        name = episode.problem.id if episode.problem else str(episode.prompt_ids)
        value = float(random.Random(f"random reward {seed} {name} {index}").random() < probability)
        parts = {**episode.reward_parts, "random": value}
        done.append(replace(episode, reward=value, unshaped_reward=None, reward_parts=parts))
    return done


def penalise_length(episodes: Sequence[Episode], max_new_tokens: int, buffer: int) -> list[Episode]:
    """Take up to 1 from the reward of responses that come within `buffer` tokens of the limit `max_new_tokens`.

    This is DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13). The penalty is the reward part `overlong`."""
    penalties = [soft_overlong_penalty(e.n_sampled, max_new_tokens, buffer) for e in episodes]
    return [_add_part(e, "overlong", penalty, PENALTY_WEIGHTS["overlong"]) for e, penalty in zip(episodes, penalties)]


def penalise_divergence(
    reference: Qwen2ForCausalLM,
    episodes: Sequence[Episode],
    beta: float,
    kl: str = "k1",
    *,
    micro_batch_tokens: int = 16384,
) -> list[Episode]:
    """Take beta * KL(sampler || reference) from each reward (Ouyang et al. 2022, arXiv 2203.02155, eq. 2).

    The divergence is estimated at each token of the response and summed. The estimate is the reward part `kl`."""
    groups = my_groups(episodes)
    with adapters_off(reference):
        scores = score_episodes(reference, episodes, groups=groups, micro_batch_tokens=micro_batch_tokens)
    mine = {
        i: float(losses.kl_penalty(torch.tensor(e.sampled_logprobs), scores[i].logp, kl).sum())
        for i, e in enumerate(episodes)
        if e.group_id in groups
    }
    estimates = dict(sorted(gather(list(mine.items())))).values()
    return [_add_part(e, "kl", estimate, -beta) for e, estimate in zip(episodes, estimates)]


def _add_part(episode: Episode, name: str, value: float, weight: float) -> Episode:
    parts = {**episode.reward_parts, name: value}
    reward = episode.reward + weight * value
    return replace(episode, reward=reward, unshaped_reward=episode.task_reward, reward_parts=parts)
