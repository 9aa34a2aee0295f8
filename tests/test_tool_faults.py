"""Responses that use the calculator wrongly, token by token through a whole step: each has an end, a mask and a reward.

The sampler is replaced by a script: the uniform numbers are the ids to sample, and each sampled token takes one.

CHECKLIST 77.
"""

from __future__ import annotations

import math
import time

import pytest
import torch
from conftest import make_config, make_model

from data_types import Episode, MiniBatch, Problem, Reward, Turn
from grpo import compute_advantages, rollout, update_policy
from math_task import CalculatorTask
from rollout import decoding, generation
from rollout.sampling import SamplingParams
from tasks.task_base import Task

EOS = "<|im_end|>"
TASK = CalculatorTask(prompt_style="short", max_turns=4)
ANSWER = " </think>\n<answer>2</answer>"


@pytest.fixture
def play(tokenizer, monkeypatch):
    """play(texts, cap): episodes of a rollout whose sampled tokens are those of the texts."""

    def run(texts: list[str], cap: int = 200, task: Task = TASK) -> list[Episode]:
        table = torch.full((len(texts), cap), float(tokenizer.eos_token_ids[-1]), dtype=torch.float64)
        for row, text in zip(table, texts):
            ids = torch.tensor(tokenizer.encode(text)[:cap])
            row[: len(ids)] = ids

        def scripted(logits, u, params, vocab_size):
            ids = u.long()
            return ids, logits[:, :vocab_size].log_softmax(-1).gather(1, ids[:, None])[:, 0]

        monkeypatch.setattr(decoding, "sample", scripted)
        monkeypatch.setattr(generation, "uniform_numbers", lambda *args: table)
        problem = CalculatorTask(prompt_style="short").problem_from("What is 1 + 1?", "2")
        batch = MiniBatch.from_problems([problem], tokenizer)
        model = make_model(make_config(max_position_embeddings=100_000))
        episodes = rollout(model, tokenizer, task, batch, SamplingParams(len(texts), cap))
        trained = compute_advantages(episodes)
        metrics = update_policy(model, torch.optim.SGD(model.parameters(), lr=0.0), trained, entropy_coef=0.1)
        assert metrics["update/not_finite"] == 0
        assert metrics["update/tokens"] == sum(e.n_sampled for e in episodes)
        assert metrics["sampling/sampling_logp_difference/max"] < 1e-3
        return episodes

    return run


def sampled_text(episode: Episode) -> str:
    return "".join(turn.text for turn in episode.turns if not turn.given)


def test_a_call_that_is_closed_gets_its_result(play, tokenizer):
    text = "<calc>1 + 1</calc>" + ANSWER + EOS
    (episode,) = play([text])
    assert episode.turns == [
        Turn("<calc>1 + 1</calc>", False), Turn("<result>2</result>\n", True), Turn(ANSWER, False)
    ]  # fmt: skip
    assert episode.finish_reason == "stop"
    assert episode.reward == 1.1
    assert episode.n_sampled == len(tokenizer.encode(text))


def test_a_call_that_never_closes_is_the_policys_own_text(play):
    ends, runs, limited = play(["<calc>1 + 1" + EOS, "<calc>" + "1 + " * 100, "<calc>1 + 1" + ANSWER + EOS])
    assert [e.finish_reason for e in (ends, runs, limited)] == ["stop", "length", "stop"]
    assert [len(e.turns) for e in (ends, runs, limited)] == [1, 1, 1]
    assert runs.n_sampled == 200
    assert ends.reward_parts["calls"] == 0
    assert limited.reward_parts["answer"] == 1.0


def test_a_turn_limit_ends_a_call_that_never_closes(play):
    task = CalculatorTask(prompt_style="short", max_turn_tokens=30)
    closed, open_ = play(["<calc>1 + 1</calc>" + ANSWER + EOS, "<calc>1 + " * 20], task=task)
    assert (closed.finish_reason, closed.reward) == ("stop", 1.1)
    assert (open_.finish_reason, open_.n_sampled) == ("length", 30)


def test_a_call_inside_the_answer_tags_ends_the_response_without_a_result(play):
    (episode,) = play(["</think>\n<answer><calc>1 + 1</calc> 2</answer>" + EOS])
    assert episode.text == "</think>\n<answer><calc>1 + 1</calc>"
    assert episode.finish_reason == "stop"
    assert all(episode.sampled)
    assert (episode.reward_parts["answer"], episode.reward_parts["calls"]) == (0.0, 0.0)


def test_an_observation_longer_than_the_room_ends_the_response(play):
    """The call is complete at token 18. The result and one token behind it need 20 more."""
    text = "<calc>1 + 1</calc>" + ANSWER + EOS
    for cap, turns, finish in ((18, 1, "length"), (19, 1, "length"), (37, 1, "length"), (38, 3, "length")):
        (episode,) = play([text], cap)
        assert (len(episode.turns), episode.finish_reason) == (turns, finish), cap
        assert len(episode.response_ids) == (18 if turns == 1 else cap)
        assert episode.sampled[-1]


def test_a_result_that_the_policy_wrote_is_trained_on_and_told_apart(play):
    forged = "<calc>1 + 1<result>2</result>\n" + ANSWER + EOS
    honest = "<calc>1 + 1</calc>" + ANSWER + EOS
    both = "<calc>1 + 1</calc>" + "<result>3</result>" + ANSWER + EOS
    for episode, is_forged in zip(play([forged, honest, both]), (1.0, 0.0, 1.0)):
        assert episode.reward_parts["forged"] == is_forged
        assert ("<result>" in sampled_text(episode)) == bool(is_forged)
    assert all(play([forged])[0].sampled)


def test_an_error_is_a_result_and_the_response_continues(play):
    (episode,) = play(["<calc>1 / 0</calc><calc>1 + 1</calc>" + ANSWER + EOS])
    given = [turn.text for turn in episode.turns if turn.given]
    assert given == ["<result>error: division by zero</result>\n", "<result>2</result>\n"]
    assert episode.reward == 1.1
    assert episode.reward_parts["call_errors"] == 1.0


def test_calls_without_end_stop_at_max_turns(play):
    (episode,) = play(["<calc>1</calc>" * 200], cap=400)
    assert sum(turn.given for turn in episode.turns) == 4
    assert episode.finish_reason == "length"
    assert episode.n_sampled == 5 * len("<calc>1</calc>")


class Short(Task):
    """A stop string and an observation of one token each."""

    stop_strings = ("a",)

    def respond(self, problem: Problem, text_so_far: str) -> str | None:
        return "b"

    def reward(self, problem: Problem, response: str) -> Reward:
        return Reward(float(len(response)), {})

    def diagnostics(self, problem: Problem, response: str) -> dict[str, float]:
        return {}


def test_the_time_of_many_calls_grows_with_their_number(play):
    """10 to 320 calls: each costs one token and one observation. 10,000 calls of a text are in test_calculator.py."""
    times = {}
    for calls in (10, 320):
        start = time.perf_counter()
        (episode,) = play(["a" * calls + EOS], 3 * calls, Short(max_turns=10_000))
        times[calls] = time.perf_counter() - start
        assert episode.sampled == [True, False] * calls + [True]
        assert episode.text == "ab" * calls
        assert not math.isnan(episode.reward)
    assert times[320] < 32 * 5 * times[10]


def test_calls_of_neighbours_at_the_same_token_are_answered_each(play):
    texts = [f"<calc>{i} + 1</calc> {'x' * i}" + ANSWER + EOS for i in range(9)]
    for i, episode in enumerate(play(texts)):
        assert episode.turns[1] == Turn(f"<result>{i + 1}</result>\n", True)
        assert sampled_text(episode) + EOS == texts[i]
