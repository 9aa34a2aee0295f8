"""Where memory runs out, the piece is halved and done again, with the result that it would have had."""

from __future__ import annotations

import pytest
import torch

import generation
import grpo
from data_types import MiniBatch
from generation import SamplingParams, generate, halve_when_out_of_memory, is_out_of_memory
from grpo import GRPO, compute_advantages, update_policy

CPU_ERROR = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
)


class KeepGradients(torch.optim.SGD):
    def step(self):
        self.kept = [p.grad.clone() for group in self.param_groups for p in group["params"]]


@pytest.fixture(scope="module")
def trainer() -> GRPO:
    return GRPO()


@pytest.fixture(scope="module")
def batch(trainer) -> MiniBatch:
    return MiniBatch.from_problems(trainer.task.problems("train", 4), trainer.tokenizer)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(CPU_ERROR)]
)
def test_every_kind_of_out_of_memory_is_known(error):
    assert is_out_of_memory(error)


def test_other_errors_are_not_tried_again():
    calls = []

    def work(size):
        calls.append(size)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        halve_when_out_of_memory(work, 8)
    assert calls == [8]


def test_gives_up_where_a_piece_of_one_does_not_fit():
    calls = []

    def work(size):
        calls.append(size)
        raise MemoryError

    with pytest.raises(MemoryError):
        halve_when_out_of_memory(work, 5)
    assert calls == [5, 2, 1]


def test_a_rollout_that_does_not_fit_gives_the_same_answers_in_pieces(trainer, batch, monkeypatch):
    params, real = SamplingParams(n=2, max_new_tokens=8), generation.decode
    whole = generate(trainer.model, batch.prompt_ids, params, tokenizer=trainer.tokenizer)
    sizes = []

    def small_machine(model, ids, uniforms, params, tokenizer, rows, capture):
        sizes.append(rows)
        if rows > 2:
            raise RuntimeError(CPU_ERROR)
        return real(model, ids, uniforms, params, tokenizer, rows, capture)

    monkeypatch.setattr(generation, "decode", small_machine)
    pieces = generate(trainer.model, batch.prompt_ids, params, tokenizer=trainer.tokenizer, max_rows=8)
    assert sizes == [8, 4, 2]
    assert [c.response_ids for c in pieces] == [c.response_ids for c in whole]
    assert [c.prompt_index for c in pieces] == [c.prompt_index for c in whole]


def test_an_update_that_does_not_fit_gives_the_same_gradient_in_pieces(trainer, batch, monkeypatch):
    """The first micro-batch may have left its gradient behind when the second runs out: nothing is counted twice."""
    episodes = grpo.rollout(
        trainer.model, trainer.tokenizer, trainer.task, batch, SamplingParams(n=2, max_new_tokens=12)
    )
    for i, episode in enumerate(episodes):
        episode.reward = float(i % 2)
    episodes = compute_advantages(episodes)
    whole, pieces = (KeepGradients(trainer.model.parameters(), lr=0.0) for _ in range(2))
    expected = update_policy(trainer.model, whole, episodes)
    real, rows = grpo.response_states, []

    def small_machine(model, micro):
        rows.append(len(micro.ids))
        if len(micro.ids) > 90 and sum(rows) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, micro)

    monkeypatch.setattr(grpo, "response_states", small_machine)
    metrics = update_policy(trainer.model, pieces, episodes, micro_batch_tokens=100)
    assert max(rows) > 90, "the machine was never too small"
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    for a, b in zip(whole.kept, pieces.kept):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
