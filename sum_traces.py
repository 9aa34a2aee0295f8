"""Worked examples for a warm start: an arithmetic question, products before sums, one operation a line.

    65 * 95 = 65 * 90 + 65 * 5 = 5850 + 325 = 6175
    76 - 6175 = -6099
    </think>
    <answer>-6099</answer>

Every equality is true. As with the searches of search_traces.py the habits are drawn anew for every trace and stand
nowhere in the text: some split a product of large numbers as above, some know it by heart, some write down the whole
question and its result. A model that imitates the mix has all of these habits; which of them come out right with its
own arithmetic is what reinforcement learning finds out.

    rng = random.Random(0)
    text = write_working("76 - 65 * 95", draw_habits(rng))
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Habits:
    """How one question is worked out."""

    in_one_go: bool  # the question and its result, nothing between
    splits: bool  # a product of two numbers above 9 becomes a sum of easier ones


def draw_habits(rng: random.Random) -> Habits:
    """One in five guesses at once; of the others half split products."""
    return Habits(in_one_go=rng.random() < 0.2, splits=rng.random() < 0.5)


def write_working(expression: str, habits: Habits) -> str:
    """The response to "What is `expression`?", from its first sum to `</answer>`.

    `expression` is whole numbers of at least 0 with + - * between them, all set apart by spaces. Raises ValueError for
    any other sign.
    """
    first, *rest = expression.split()
    numbers, signs = [int(n) for n in (first, *rest[1::2])], rest[::2]
    if set(signs) - set("+-*"):
        raise ValueError(f"{expression!r}: worked examples are written for + - * only")
    lines = []
    while signs:
        at = signs.index("*") if "*" in signs else 0
        a, b, sign = numbers[at], numbers[at + 1], signs.pop(at)
        result = {"+": a + b, "-": a - b, "*": a * b}[sign]
        steps = _split(a, b) if sign == "*" and habits.splits else []
        lines.append(" = ".join([f"{a} {sign} {b}", *steps, str(result)]))
        numbers[at : at + 2] = [result]
    (result,) = numbers
    if habits.in_one_go:
        lines = [f"{expression} = {result}"]
    return "".join(f"{line}\n" for line in lines) + f"</think>\n<answer>{result}</answer>"


def _split(a: int, b: int) -> list[str]:
    """12, 345 -> ["12 * 300 + 12 * 40 + 12 * 5", "3600 + 480 + 60"]; nothing where there is nothing to split."""
    parts = [int(digit) * 10**place for place, digit in reversed(list(enumerate(reversed(str(b))))) if digit != "0"]
    if a < 10 or len(parts) < 2:
        return []
    return [" + ".join(f"{a} * {part}" for part in parts), " + ".join(str(a * part) for part in parts)]
