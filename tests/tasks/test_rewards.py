"""Reward helpers: overlong, repetition, language, and the weights that put them together."""

import pytest

from math_task import CountdownTask
from tasks.rewards import REWARD_PRESETS, SCRIPTS, language_consistency, repetition_penalty, soft_overlong_penalty


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (10**6, -1.0)]
)
def test_soft_overlong_penalty_is_equation_13(length, penalty):
    assert soft_overlong_penalty(length, max_length=100, cache_length=20) == pytest.approx(penalty)


@pytest.mark.parametrize("cache_length", [0, -1, 101])
def test_soft_overlong_penalty_refuses_a_cache_that_does_not_fit(cache_length):
    with pytest.raises(ValueError, match="cache_length is"):
        soft_overlong_penalty(5, 100, cache_length)


@pytest.mark.parametrize(
    ("text", "penalty"),
    [
        ("", 0.0),
        ("a b", 0.0),  # too short for a phrase of three words
        ("a b c d e", 0.0),
        ("a b c A b C", -1 / 4),  # abc, bca, cab, abc: one of four is a repetition, whatever its case
        ("a a a a a", -2 / 3),
    ],
)
def test_repetition_penalty(text, penalty):
    assert repetition_penalty(text) == pytest.approx(penalty)


@pytest.mark.parametrize(
    ("text", "script", "share"),
    [
        ("so 3 + 5 = 8", "latin", 1.0),
        ("3 + 5 = 8", "latin", 1.0),  # no letters: nothing to hold against it
        ("", "chinese", 1.0),
        ("café naïve Łódź", "latin", 1.0),
        ("abcde абвгд", "latin", 0.5),
        ("abcde абвгд", "cyrillic", 0.5),
        ("先算三加五", "chinese", 1.0),
        ("先算三加五", "latin", 0.0),
        ("ひらがなカタカナ漢字", "japanese", 1.0),
        ("한국어", "korean", 1.0),
        ("a" * 999 + "б", "latin", 1.0),  # one stray letter is no difference
        ("a" * 900 + "б" * 100, "latin", 0.9),
    ],
)
def test_language_consistency(text, script, share):
    assert language_consistency(text, script) == share


def test_language_reward_is_in_steps():
    """CHECKLIST 25: shares that differ by a stray letter are equal rewards, not a group with a tiny deviation."""
    texts = ["a" * (200 + n) + "б" * (n % 3) for n in range(8)]
    assert len({language_consistency(text, "latin") for text in texts}) == 1


def test_every_script_is_a_pattern():
    for script in SCRIPTS:
        assert language_consistency("abc", script) in (0.0, 1.0)


def test_preset_pays_what_its_name_says():
    """Correct +1.0, format +0.25, language +0.10."""
    task = CountdownTask(**REWARD_PRESETS["correct-format-language"])
    problem = task.problem([3, 5, 2], 13)
    right, wrong = "</think><answer>3+5*2</answer>", "</think><answer>3+5+2</answer>"
    assert task.reward(problem, "hm" + right).total == pytest.approx(1.35)
    assert task.reward(problem, "хм" + right).total == pytest.approx(1.25)
    assert task.reward(problem, "hm" + wrong).total == pytest.approx(0.35)
    assert task.reward(problem, "hm" + wrong).parts == {"format": 1.0, "answer": 0.0, "language": 1.0}


def test_repetition_weight_costs_repeated_thoughts():
    task = CountdownTask(repetition_weight=0.5)
    problem = task.problem([3, 5, 2], 13)
    once = task.reward(problem, "no no</think><answer>3+5*2</answer>")
    again = task.reward(problem, "no " * 50 + "</think><answer>3+5*2</answer>")
    assert once.total == pytest.approx(1.1)
    assert again.total == pytest.approx(1.1 - 0.5 * 47 / 48)


@pytest.mark.parametrize(
    ("thought", "part"),
    [("3+5=8, 8+5=13", 0.0), ("", 0.0), ("3+5=9", -1.0), ("3+5=8 then 8+5=14", -1.0), ("1+1=3 " * 20, -1.0)],
)
def test_arithmetic_weight_costs_a_thought_with_a_false_sum_once(thought, part):
    task = CountdownTask(arithmetic_weight=0.2)
    reward = task.reward(task.problem([3, 5, 2], 13), thought + "</think><answer>3+5*2</answer>")
    assert reward.parts["arithmetic"] == part
    assert reward.total == pytest.approx(1.1 + 0.2 * part)


def test_a_false_sum_in_the_answer_is_not_the_thought():
    task = CountdownTask(arithmetic_weight=0.2)
    reward = task.reward(task.problem([3, 5, 2], 13), "3+5=8</think><answer>3+5=9</answer>")
    assert reward.parts["arithmetic"] == 0.0


def test_parts_without_weight_are_left_out():
    task = CountdownTask()
    assert set(task.reward(task.train_problem(0), "x").parts) == {"format", "answer"}


def test_unknown_language_is_one_line():
    with pytest.raises(ValueError, match="language is 'klingon'; expected one of latin"):
        CountdownTask(language="klingon")
