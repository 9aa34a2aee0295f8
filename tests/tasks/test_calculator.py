"""The calculator as an environment: exact results, errors that are results, calls in wrong places, prices.

CHECKLIST 77.
"""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_types import Turn
from math_task import CalculatorTask, make_task, task_from_config
from run.config import Config, parse_args
from tasks.calculator import CALL_REQUEST, MAX_ERROR_CHARS, calculate
from tasks.task_base import Task

TASK = CalculatorTask(num_terms=(3,), num_digits=(2,))
PROBLEM = TASK.problem_from("What is 76 - 65 * 95?", "-6099")


def respond(text: str) -> str | None:
    return TASK.respond(PROBLEM, text)


@pytest.mark.parametrize(
    ("call", "value"),
    [
        ("76 - 65 * 95", "-6099"), (" (1 + 2) / 6 ", "1/2"), ("99999999999 * 99999999999", "9999999999800000000001"),
        ("-3", "-3"), ("2 / 4 * 2", "1"),
    ],
)  # fmt: skip
def test_a_call_has_its_exact_value_as_result(call, value):
    assert respond(f"first\n<calc>{call}</calc>") == f"<result>{value}</result>\n"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("1 / (2 - 2)", "division by zero"),
        ("9 ** 9", "a number is missing before '*'"),
        ("__import__('os')", "unexpected character '_'"),
        ("", "a number is missing before 'the end'"),
        ("3 + 4 = 7", "unexpected character '='"),
        ("(1", "a parenthesis is not closed"),
        ("1 +" * 100 + "1", "expression of 301 characters, at most 200 are read"),
        ("(" * 30 + "1" + ")" * 30, "parentheses nested deeper than 20"),
    ],
)
def test_an_error_is_a_result(call, error):
    assert respond(f"<calc>{call}</calc>") == f"<result>error: {error}</result>\n"


@given(st.text(max_size=300))
def test_any_text_has_a_short_result_of_one_line(call):
    found = calculate(call)
    assert found.startswith("<result>")
    assert found.endswith("</result>\n")
    assert found.count("\n") == 1
    assert len(found) <= len("<result></result>\n") + max(MAX_ERROR_CHARS, 2 * 200 + 2)


def test_the_last_call_counts_and_text_behind_it_in_the_same_token_does_not():
    text = "<calc>1 + 1</calc><result>2</result>\n<calc>2 * 3</calc>"
    assert respond(text) == respond(text + ">\n") == "<result>6</result>\n"


@pytest.mark.parametrize("text", ["</calc>", "1 + 1</calc>", "<calc>1</calc> 2</calc>", "<result>3</result></calc>"])
def test_a_closing_tag_without_an_opening_one_is_an_error(text):
    assert respond(text) == "<result>error: no <calc> before </calc></result>\n"


def test_a_call_inside_the_answer_tags_ends_the_response():
    assert respond("</think>\n<answer><calc>1 + 1</calc>") is None
    assert respond("<answer>") is None
    assert respond("I write <answer> 3 </answer> later. <calc>1 + 1</calc>") == "<result>2</result>\n"


def test_a_response_of_10000_calls_is_answered_fast():
    text = "<calc>1 + 1</calc><result>2</result>\n" * 10_000 + "<calc>2 + 2</calc>"
    start = time.perf_counter()
    assert respond(text) == "<result>4</result>\n"
    assert respond("<calc>" + "1+" * 10_000 + "1</calc>").startswith("<result>error: expression of 20001 characters")
    assert time.perf_counter() - start < 0.5


# --- rewards


def turns(*texts: str) -> list[Turn]:
    """Sampled and given text in turn."""
    return [Turn(text, given=i % 2 == 1) for i, text in enumerate(texts)]


RIGHT = turns("<calc>76 - 65 * 95</calc>", "<result>-6099</result>\n", "</think>\n<answer>-6099</answer>")


def test_a_call_costs_its_price():
    task = CalculatorTask(call_price=0.2)
    free, priced = TASK.reward_turns(PROBLEM, RIGHT), task.reward_turns(PROBLEM, RIGHT)
    assert free.total == 1.1
    assert priced.total == pytest.approx(0.9)
    assert priced.parts == {"format": 1.0, "answer": 1.0, "calls": 1.0, "call_errors": 0.0, "forged": 0.0}
    assert task.reward_turns(PROBLEM, turns("</think>\n<answer>-6099</answer>")).total == 1.1


def test_errors_are_counted():
    found = TASK.reward_turns(PROBLEM, turns("<calc>1/0</calc>", calculate("1/0"), "<calc>2", "<result>2</result>\n"))
    assert (found.parts["calls"], found.parts["call_errors"]) == (2.0, 1.0)


def test_a_result_that_the_policy_wrote_itself_is_told_apart_from_a_given_one():
    """The whole text is the same."""
    forged = turns("".join(turn.text for turn in RIGHT))
    assert TASK.reward_turns(PROBLEM, forged).parts["forged"] == 1.0
    assert TASK.reward_turns(PROBLEM, RIGHT).parts["forged"] == 0.0
    assert TASK.reward_turns(PROBLEM, forged).total == 1.1
    assert CalculatorTask(forged_price=1.0).reward_turns(PROBLEM, forged).total == pytest.approx(0.1)


def test_a_call_inside_the_answer_is_not_an_answer():
    text = "</think>\n<answer><calc>76 - 65 * 95</calc><result>-6099</result>\n-6099</answer>"
    assert TASK.reward(PROBLEM, text).parts["answer"] == 0.0


# --- the task


def test_the_questions_are_those_of_the_task_without_a_calculator():
    options = {"num_terms": (3,), "num_digits": (2,), "seed": 5}
    for split in ("train", "test"):
        found = make_task("calculator", **options).problems(split, 20)
        plain = make_task("arithmetic", **options).problems(split, 20)
        assert [(p.id, p.target) for p in found] == [(p.id, p.target) for p in plain]
        assert all(f.messages[-1]["content"] == p.messages[-1]["content"] + CALL_REQUEST for f, p in zip(found, plain))


def test_the_short_style_does_not_explain_the_calculator():
    problem = make_task("calculator", prompt_style="short").train_problem(0)
    assert "calc" not in problem.messages[-1]["content"]


def test_options_reach_the_task():
    flags = "--task calculator --call-price 0.05 --max-turns 3 --max-turn-tokens 40 --num-terms 3 --num-digits 2"
    task = task_from_config(parse_args(flags.split()))
    assert isinstance(task, CalculatorTask)
    assert (task.call_price, task.max_turns, task.max_turn_tokens, task.num_terms) == (0.05, 3, 40, (3,))
    assert task_from_config(Config(task="calculator")).call_price == 0.0


@pytest.mark.parametrize("flag", ["--call-price -1", "--max-turns 0", "--max-turn-tokens -1", "--max-turns 1.5"])
def test_options_out_of_range_are_refused(flag):
    with pytest.raises(ValueError, match=flag.split()[0]):
        parse_args(["--task", "calculator", *flag.split()])


def test_the_curriculum_has_levels_of_the_task_with_its_calculator():
    levels = CalculatorTask(num_terms=(3,), num_digits=(2,), call_price=0.1).levels()
    assert list(levels) == ["2_terms_1_digits", "3_terms_1_digits", "2_terms_2_digits", "3_terms_2_digits"]
    assert all(isinstance(task, CalculatorTask) and task.call_price == 0.1 for task in levels.values())


def test_a_task_without_a_tool_has_no_stop_strings():
    assert Task.stop_strings == ()
    with pytest.raises(NotImplementedError, match="has stop_strings and no method respond"):
        Task().respond(PROBLEM, "")
    assert Fraction(calculate("7 / 2").removeprefix("<result>").removesuffix("</result>\n")) == Fraction(7, 2)
