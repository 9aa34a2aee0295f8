"""Worked examples with a calculator for a warm start: calls, their results, and work without any call.

    turns = write_calls("76 - 65 * 95", draw_call_habits(random.Random(0)))

    <calc>65 * 95</calc>               sampled
    <result>6175</result>              given: it has no loss in the warm start either
    <calc>76 - 6175</calc>             sampled
    <result>-6099</result>             given
    </think>
    <answer>-6099</answer>             sampled

The habits are drawn for every trace and are not part of the text: some traces call for the whole question at once, some
for one operation after the other, some work without a call (sum_traces.py). Reinforcement learning finds out which of
them come out right, and with `--call-price` which of them are worth their calls.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from data_types import Turn
from tasks.calculator import CALL_CLOSE, CALL_OPEN, RESULT_CLOSE, RESULT_OPEN, calculate
from tasks.rewards import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE
from tasks.sum_traces import Habits, draw_habits, write_working


@dataclass(frozen=True)
class CallHabits:
    """How one question is worked out."""

    calls: str  # "whole": one call for the question; "steps": one call for each operation; "none"
    working: Habits  # without a call


def draw_call_habits(rng: random.Random) -> CallHabits:
    """Three in ten traces call once, three in ten for every operation, four in ten work without a call."""
    return CallHabits(rng.choices(("whole", "steps", "none"), (3, 3, 4))[0], draw_habits(rng))


def write_calls(expression: str, habits: CallHabits) -> list[Turn]:
    """The turns of a response to "What is `expression`?", with whole numbers and + - * set apart by spaces."""
    if habits.calls == "none":
        return [Turn(write_working(expression, habits.working), False)]
    turns: list[Turn] = []
    pieces = expression.split()
    while len(pieces) > 1:
        at = 0 if habits.calls == "whole" else 2 * (pieces[1::2].index("*") if "*" in pieces else 0)
        end = len(pieces) if habits.calls == "whole" else at + 3
        given = calculate(" ".join(pieces[at:end]))
        turns += [Turn(f"{CALL_OPEN}{' '.join(pieces[at:end])}{CALL_CLOSE}", False), Turn(given, True)]
        pieces[at:end] = [given.strip().removeprefix(RESULT_OPEN).removesuffix(RESULT_CLOSE)]
    return [*turns, Turn(f"{THINK_CLOSE}\n{ANSWER_OPEN}{pieces[0]}{ANSWER_CLOSE}", False)]
