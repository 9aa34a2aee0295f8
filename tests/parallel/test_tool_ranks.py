"""Several processes roll out a task with a tool as one process does, and compute the same gradient.

CHECKLIST 75.
"""

from __future__ import annotations

import pytest
import torch
from conftest import make_config, make_model, write_tokenizer
from ranks import run_ranks, values_of

from data_types import MiniBatch, Problem, Reward
from grpo import compute_advantages, rollout, update_policy
from rollout.sampling import SamplingParams
from tasks.task_base import Task
from tokenizer import Tokenizer


class Caller(Task):
    stop_strings = tuple("abcdefghijklmnopqrstuvwxyz")

    def train_problem(self, index: int) -> Problem:
        return Problem(str(index), [{"role": "user", "content": f"{index}"}], index)

    def respond(self, problem: Problem, text_so_far: str) -> str | None:
        return f"[{problem.target}:{len(text_so_far)}]"

    def reward_turns(self, problem: Problem, turns) -> Reward:
        return Reward(float(sum(turn.given for turn in turns)), {})

    def diagnostics(self, problem: Problem, response: str) -> dict[str, float]:
        return {}


class Keeper(torch.optim.SGD):
    def step(self, closure=None):
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def one_step(folder) -> tuple:
    model, tokenizer, task = (
        make_model(make_config(tie_word_embeddings=False)),
        Tokenizer.from_pretrained(folder),
        Caller(),
    )
    batch = MiniBatch.from_problems(task.problems("train", 3), tokenizer)
    episodes = compute_advantages(rollout(model, tokenizer, task, batch, SamplingParams(4, 40)))
    keeper = Keeper(model.parameters(), lr=1.0)
    metrics = update_policy(model, keeper, episodes, max_grad_norm=1e9, micro_batch_tokens=60)
    return episodes, keeper.gradients, metrics["update/tokens"]


@pytest.mark.parametrize("n", [2, 3])
def test_ranks_give_the_episodes_and_the_gradient_of_one_process(n, tmp_path):
    folder = write_tokenizer(tmp_path)
    episodes, gradients, tokens = one_step(folder)
    assert any(not all(e.sampled) for e in episodes)
    for found, theirs, count in values_of(run_ranks(n, one_step, folder)):
        assert [(e.response_ids, e.sampled, e.turns, e.reward) for e in found] == [
            (e.response_ids, e.sampled, e.turns, e.reward) for e in episodes
        ]
        assert count == tokens
        for a, b in zip(theirs, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()) + 1e-9)
