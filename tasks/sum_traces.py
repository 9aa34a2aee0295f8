"""Worked examples for a warm start: an arithmetic question, products before sums, one operation a line.

    65 * 95 = 65 * 90 + 65 * 5
    65 * 90 = 60 * 90 + 5 * 90 = 5400 + 450 = 5850
    65 * 5 = 60 * 5 + 5 * 5 = 300 + 25 = 325
    65 * 95 = 5850 + 325 = 6175
    76 - 6175 = -6099
    </think>
    <answer>-6099</answer>

Every equality is true. As in search_traces.py, the habits are drawn again for every trace and are not in the text. Most
traces build a product of large numbers from products of digits as above, some write it in one step, and some write only
the question and its result. A model that imitates the mix has all of these habits. Reinforcement learning finds the
habits that its arithmetic can carry out.

    rng = random.Random(0)
    text = write_working("76 - 65 * 95", draw_habits(rng))
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Habits:
    """How one question is worked out."""

    in_one_go: bool  # the question and its result, nothing between
    splits: bool  # a product of two numbers above 9 is built from products of their digits


def draw_habits(rng: random.Random) -> Habits:
    """One trace in ten guesses at once. Three in four of the others split products."""
    return Habits(in_one_go=rng.random() < 0.1, splits=rng.random() < 0.75)


def write_working(expression: str, habits: Habits) -> str:
    """The response to "What is `expression`?", from its first sum to `</answer>`.

    `expression` has whole numbers from 0 up with + - * between them, separated by spaces. Raises ValueError for another
    sign.
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
        splits = sign == "*" and habits.splits and min(a, b) > 9
        lines += _multiply(a, b) if splits else [f"{a} {sign} {b} = {result}"]
        numbers[at : at + 2] = [result]
    (result,) = numbers
    if habits.in_one_go:
        lines = [f"{expression} = {result}"]
    return "".join(f"{line}\n" for line in lines) + f"</think>\n<answer>{result}</answer>"


def _multiply(a: int, b: int) -> list[str]:
    """Lines from `a * b` to its value: b is split into its digits, and each of these products by the digits of a."""
    places = _places(b)
    rows = [_multiply_by_digit(a, place) for place in places]
    if len(places) == 1:
        return rows
    parts, values = _sums((a, place) for place in places)
    return [f"{a} * {b} = {parts}", *rows, f"{a} * {b} = {values} = {a * b}"]


def _multiply_by_digit(a: int, b: int) -> str:
    """65, 90 -> "65 * 90 = 60 * 90 + 5 * 90 = 5400 + 450 = 5850". Numbers above 99 stay whole: lines would be long."""
    places = _places(a)
    if a > 99 or len(places) == 1:
        return f"{a} * {b} = {a * b}"
    parts, values = _sums((place, b) for place in places)
    return f"{a} * {b} = {parts} = {values} = {a * b}"


def _sums(products: Iterable[tuple[int, int]]) -> tuple[str, str]:
    """(60, 90), (5, 90) -> "60 * 90 + 5 * 90" and "5400 + 450"."""
    pairs = list(products)
    return " + ".join(f"{x} * {y}" for x, y in pairs), " + ".join(str(x * y) for x, y in pairs)


def _places(number: int) -> list[int]:
    """305 -> [300, 5]."""
    digits = str(number)
    return [int(digit) * 10 ** (len(digits) - 1 - i) for i, digit in enumerate(digits) if digit != "0"]
