"""Worked examples with calls: right, with results that the calculator gives, and without a loss on them."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

import warm_start
from math_task import CalculatorTask
from qwen2_llm import Qwen2ForCausalLM
from tasks.call_traces import CallHabits, draw_call_habits, write_calls
from tasks.sum_traces import Habits
from tokenizer import Tokenizer
from warm_start import CALL_TAGS, TAGS, Options

TASK = CalculatorTask(num_terms=(3,), num_digits=(2,), prompt_style="short")
WORKING = Habits(in_one_go=True, splits=False)


def text_of(turns) -> str:
    return "".join(turn.text for turn in turns)


def test_every_trace_is_right_and_every_result_is_the_calculators():
    rng, kinds = random.Random(0), set()
    for index in range(200):
        problem = TASK.train_problem(index)
        habits = draw_call_habits(rng)
        turns = write_calls(problem.messages[-1]["content"].removeprefix("What is ").rstrip("?"), habits)
        kinds.add((habits.calls, sum(turn.given for turn in turns)))
        assert TASK.reward_turns(problem, turns).total == 1.1
        for i, turn in enumerate(turns):
            assert turn.given == (i % 2 == 1)
            if turn.given:
                assert turn.text == TASK.respond(problem, text_of(turns[:i]))
    assert kinds == {("whole", 1), ("steps", 2), ("none", 0)}


def test_products_are_called_first():
    found = text_of(write_calls("76 - 65 * 95", CallHabits("steps", WORKING)))
    assert found == (
        "<calc>65 * 95</calc><result>6175</result>\n<calc>76 - 6175</calc><result>-6099</result>\n"
        "</think>\n<answer>-6099</answer>"
    )
    negative = text_of(write_calls("2 - 9 * 1", CallHabits("steps", WORKING)))
    assert "<calc>2 - 9</calc><result>-7</result>" in negative


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("calls")
    warm_start.make_tokenizer(folder, warm_start.tokenizer_texts(TASK, seed=0, n=100), tags=TAGS + CALL_TAGS)
    return Tokenizer.from_pretrained(folder)


def test_a_tag_is_one_token(tokenizer):
    assert [len(tokenizer.encode(tag)) for tag in CALL_TAGS] == [1] * 4
    assert tokenizer.vocab_size <= 576


@pytest.mark.parametrize("traces_per_problem", [1, 3])
def test_results_have_no_loss(traces_per_problem, tokenizer):
    """The tokens without a loss are those of the results, encoded alone as in a rollout."""
    model = Qwen2ForCausalLM.from_config(warm_start.tiny_config(tokenizer), seed=1)
    options = Options(task="calculator", traces_per_problem=traces_per_problem)
    batch = list(itertools.islice(warm_start.examples(TASK, tokenizer, options), 8))
    assert any(example.given for example in batch)
    total, count = torch.zeros(()), 0
    for example in batch:
        for response, given in zip(example.responses, example.given or [set()] * traces_per_problem):
            text = tokenizer.decode([i for t, i in enumerate(response) if t in given])
            assert tokenizer.encode(text) == [i for t, i in enumerate(response) if t in given]
            assert text == "".join(f"<result>{x.split('</result>')[0]}</result>\n" for x in
                                   tokenizer.decode(response).split("<result>")[1:])  # fmt: skip
            logits = model(torch.tensor([example.prompt_ids + response]))[0, len(example.prompt_ids) - 1 : -1]
            for t, token in enumerate(response):
                if t not in given:
                    total = total + F.cross_entropy(logits[t], torch.tensor(token))
                    count += 1
    torch.testing.assert_close(warm_start.response_loss(model, batch), total / count)
