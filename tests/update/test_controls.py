"""Control experiments: a random reward, and a reward for the form only."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from data_types import Episode, MiniBatch
from grpo import GRPO
from math_task import task_from_config
from run.config import parse_args
from run.resume_rules import APPLIED, RULES
from update.shaping import random_rewards

FORM_ONLY = ["--answer-weight", "0", "--format-weight", "1", "--arithmetic-weight", "0"]


def episodes_of(problems, n=8) -> list[Episode]:
    return [
        Episode(g, [1], [2], [-1.0], f"text {i}", "stop", 1.1, {"answer": 1.0}, unshaped_reward=2.0, problem=problem)
        for g, problem in enumerate(problems)
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def problems():
    return task_from_config(parse_args([])).problems("train", 200)


def test_the_random_reward_depends_on_seed_problem_and_index_only(problems):
    """CHECKLIST 66"""
    episodes = episodes_of(problems)
    values = [e.reward for e in random_rewards(episodes, 0.3, seed=0)]
    others = [dataclasses.replace(e, text="other", response_ids=[7, 8], group_id=e.group_id + 50) for e in episodes]
    assert [e.reward for e in random_rewards(others, 0.3, seed=0)] == values
    assert [e.reward for e in random_rewards(episodes[8:] + episodes[:8], 0.3, seed=0)] == values[8:] + values[:8]
    assert [e.reward for e in random_rewards(episodes, 0.3, seed=1)] != values
    assert set(values) == {0.0, 1.0}
    assert sum(values) / len(values) == pytest.approx(0.3, abs=0.04)  # three standard errors of 1,600 draws
    assert len({tuple(values[i : i + 8]) for i in range(0, len(values), 8)}) > 50
    assert all(e.reward == 1 for e in random_rewards(episodes, 1.0, seed=0))


def test_the_tasks_parts_stay_in_the_log_and_a_missing_reward_stays_missing(problems):
    episodes = episodes_of(problems[:1])
    episodes[0] = dataclasses.replace(episodes[0], reward=math.nan, reward_parts={})
    first, second, *_ = random_rewards(episodes, 1.0, seed=0)
    assert math.isnan(first.reward)
    assert second.reward_parts == {"answer": 1.0, "random": 1.0}
    assert second.task_reward == 1.0  # dynamic sampling sees the random reward, too


def test_a_step_trains_on_the_random_reward_and_an_evaluation_does_not():
    words = ["--random-reward", "0.5", "--prompts-per-step", "3", "--group-size", "4", "--max-new-tokens", "16"]
    trainer = GRPO(parse_args(words))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    batch = MiniBatch.from_problems(trainer.problems(3, start=0), trainer.tokenizer)
    episodes, metrics = trainer.step(batch)
    assert {e.reward for e in episodes} <= {0.0, 1.0}
    assert metrics["rewards/random/mean"] == metrics["reward"]
    assert "rewards/answer/mean" in metrics
    assert any(not torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before))
    reward = trainer.task.reward(batch.problems[0], "nothing")
    assert "random" not in reward.parts


def test_the_form_only_is_a_set_of_weights():
    task = task_from_config(parse_args(FORM_ONLY))
    problem = task.problem([3, 5, 2], target=13)
    right = task.reward(problem, "3 * 5 - 2 = 13</think>\n<answer>3 * 5 - 2</answer>")
    wrong = task.reward(problem, "3 * 5 = 99</think>\n<answer>1</answer>")
    assert right.total == wrong.total == 1.0
    assert (right.parts["answer"], wrong.parts["answer"]) == (1.0, 0.0)  # still measured
    assert task.reward(problem, "no tags").total < 1


def test_the_option_is_checked():
    with pytest.raises(ValueError, match=r"--random-reward 1\.5: expected a number from 0 to 1"):
        parse_args(["--random-reward", "1.5"])
    with pytest.raises(ValueError, match="--random-reward replaces the whole reward"):
        parse_args(["--random-reward", "0.5", "--advantage-estimator", "gdpo"])
    assert RULES["random_reward"] != APPLIED
