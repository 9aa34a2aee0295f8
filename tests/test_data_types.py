"""The records: prompts as batches, and episodes before they are scored."""

from __future__ import annotations

import dataclasses
import math

import pytest

from data_types import Episode, MiniBatch, Problem, Reward

PROBLEMS = [
    Problem("a", [{"role": "user", "content": "2 + 2?"}], "4", response_prefix="<think>\n"),
    Problem("b", [{"role": "user", "content": "2 + 2?"}, {"role": "system", "content": "é"}], "4"),
]


def episode(**changes) -> Episode:
    return Episode(**({"group_id": 0, "prompt_ids": [1], "response_ids": [2], "logprobs": [-1.0], "text": "x",
                       "finish_reason": "stop"} | changes))  # fmt: skip


def test_a_prompt_is_the_rendered_chat_and_then_the_words_put_into_the_mouth(tokenizer):
    batch = MiniBatch.from_problems(PROBLEMS, tokenizer)
    assert batch.prompts[0] == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert batch.prompts[1].endswith("<|im_start|>assistant\n")
    assert batch.problems == PROBLEMS
    assert len(batch) == 2


def test_a_prompt_is_encoded_once_and_its_special_tokens_are_single_ids(tokenizer):
    """CHECKLIST 12: ids and text are made together, and no beginning-of-text token is put before the template's own."""
    batch = MiniBatch.from_problems(PROBLEMS, tokenizer)
    im_start, im_end = 257, 258
    assert [ids.count(im_start) for ids in batch.prompt_ids] == [2, 3]
    assert [ids.count(im_end) for ids in batch.prompt_ids] == [1, 2]
    assert batch.prompt_ids[0][0] == im_start
    assert [tokenizer.encode(text) for text in batch.prompts] == batch.prompt_ids


def test_only_the_limit_truncates():
    assert episode(finish_reason="length").truncated
    assert not episode(finish_reason="stop").truncated


def test_an_episode_that_nobody_scored_has_no_reward_rather_than_a_bad_one():
    """CHECKLIST 16: missing is NaN, which advantages leave out. A 0 would lower the group's mean."""
    fresh = episode()
    assert math.isnan(fresh.reward)
    assert fresh.advantage == 0.0


def test_episodes_do_not_share_their_reward_parts():
    one, other = episode(), episode()
    one.reward_parts["format"] = 1.0
    assert other.reward_parts == {}


def test_a_problem_cannot_be_changed_by_who_reads_it():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROBLEMS[0].target = "5"


def test_a_reward_names_its_parts():
    total, parts = Reward(1.1, {"format": 1.0, "answer": 1.0})
    assert total == 1.1
    assert set(parts) == {"format", "answer"}
