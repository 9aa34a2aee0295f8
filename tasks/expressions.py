"""Arithmetic that a model wrote: read by a small parser, never by Python.

A sampled answer is data, not code. The lineage of this project checks the characters of an answer and then calls
`eval`, which makes `9**9**9` the trainer's problem. Here a recursive-descent parser knows + - * / and parentheses over
plain ASCII integers, computes in exact fractions, and refuses anything long or deep.

    evaluate_expression("(3 + 5) * 2")     -> (Fraction(16), [3, 5, 2])
    plain_number(" 1,234 ")     -> Fraction(1234)
    false_sums("3 + 5 = 9")     -> (1, 1)

Grammar (white space may stand between any two tokens):

    sum     := product (("+" | "-") product)*
    product := factor (("*" | "/") factor)*
    factor  := ["-"] (integer | "(" sum ")")

One minus sign in front of a number or a parenthesis is arithmetic and allowed; `--3`, `+3`, `**`, `//`, `1_000`, `007`,
decimals, an equals sign, and digits or operators from elsewhere in Unicode are not.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_CHARS = 200  # an honest answer with six numbers has about 40
MAX_DEPTH = 20  # of parentheses
MAX_SUMS = 100  # `false_sums` looks at so many equals signs: bounded time, whatever the model wrote
SUM_WINDOW = 80  # ... and at so many characters on either side of each

_SPACES = " \t\r\n"
_TOKEN = re.compile(r"[ \t\r\n]*(?:([0-9]+)|([-+*/()]))")  # [0-9], not \d: \d takes the digits of every script
_NUMBER = re.compile(r"(-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)(?:\s*/\s*([0-9]+))?")
_LEADING_NUMBER = re.compile(r"-?[0-9]+(?:\.([0-9]+))?")
_TERM_START = re.compile(r"-?[0-9(]")
_ARITHMETIC = "0123456789+-*/(). \t"


class ExpressionError(ValueError):
    """The text is no arithmetic expression, has no value, or is too long or deep to be an honest one."""


def evaluate_expression(text: str) -> tuple[Fraction, list[int]]:
    """Exact value of an expression and the numbers it uses, in order of appearance.

    Raises ExpressionError for anything outside the grammar above, for a division by zero, for more than MAX_CHARS
    characters and for more than MAX_DEPTH open parentheses.
    """
    if len(text) > MAX_CHARS:
        raise ExpressionError(f"expression of {len(text)} characters, at most {MAX_CHARS} are read")
    parser = _Parser(_tokenize(text))
    value = parser.sum(depth=0)
    if parser.tokens:
        raise ExpressionError(f"unexpected {parser.tokens[-1]!r} after a complete expression")
    return value, parser.numbers


def _tokenize(text: str) -> list[str]:
    tokens, position, end = [], 0, len(text.rstrip(_SPACES))
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise ExpressionError(f"unexpected character {text[position:].lstrip(_SPACES)[0]!r}")
        token = match[1] or match[2]
        if len(token) > 1 and token[0] == "0":
            raise ExpressionError(f"leading zero in {token!r}")
        tokens.append(token)
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent, one method for each line of the grammar."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens[::-1]  # the next token is the last one, so that taking it is a pop
        self.numbers: list[int] = []

    def take(self, *wanted: str) -> str | None:
        return self.tokens.pop() if self.tokens and self.tokens[-1] in wanted else None

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while operator := self.take("+", "-"):
            term = self.product(depth)
            value = value + term if operator == "+" else value - term
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while operator := self.take("*", "/"):
            factor = self.factor(depth)
            if operator == "/" and factor == 0:
                raise ExpressionError("division by zero")
            value = value * factor if operator == "*" else value / factor
        return value

    def factor(self, depth: int) -> Fraction:
        sign = -1 if self.take("-") else 1
        if self.take("("):
            if depth == MAX_DEPTH:
                raise ExpressionError(f"parentheses nested deeper than {MAX_DEPTH}")
            value = self.sum(depth + 1)
            if not self.take(")"):
                raise ExpressionError("a parenthesis is not closed")
            return sign * value
        if not self.tokens or not self.tokens[-1].isdigit():
            raise ExpressionError(f"a number is missing before {self.tokens[-1] if self.tokens else 'the end'!r}")
        self.numbers.append(int(self.tokens.pop()))
        return Fraction(sign * self.numbers[-1])


def plain_number(text: str) -> Fraction | None:
    """The number that `text` is: `42`, `-7`, `1,234`, `3.5`, `7/2`, `$42`; None for anything else, also for `6 * 7`.

    A dollar sign in front and a full stop behind are dropped, because word problems are answered that way.
    """
    text = text.strip().removeprefix("$").removesuffix(".")
    match = _NUMBER.fullmatch(text) if len(text) <= 64 else None
    if match is None or (match[2] and int(match[2]) == 0):
        return None
    return Fraction(match[1].replace(",", "")) / int(match[2] or 1)


def false_sums(text: str) -> tuple[int, int]:
    """How many of the equalities written in `text` are wrong, and how many there are: (wrong, total).

    An equality is an expression with an operator, an equals sign and a number or a second expression, on one line:
    `3 + 5 = 8`, `(44 - 19) * 2 = 50`, `7 / 2 = 3.5`, `2 * 6 = 4 * 3`. A decimal is right when it is the left side
    rounded to the digits shown. Algebra (`2x + 3 = 7`), `!=`, `==` and decimals on the left are not counted. Only the
    first MAX_SUMS equals signs are looked at. Nothing is paid for this number, so it stays honest.
    """
    wrong = total = 0
    start, equals = 0, text.find("=")
    for _ in range(MAX_SUMS):
        if equals < 0:
            break
        left = _left_side(text, start, equals)
        correct = None if left is None else _right_side_equals(text, equals, left)
        total += correct is not None
        wrong += correct is False
        start, equals = equals + 1, text.find("=", equals + 1)
    return wrong, total


def _left_side(text: str, start: int, equals: int) -> Fraction | None:
    """Value of the longest expression that ends at the equals sign, or None where there is none."""
    window = text[max(start, equals - SUM_WINDOW) : equals]
    before = window.rstrip(_ARITHMETIC)
    run = window[len(before) :].rstrip()
    if not before and equals - start > SUM_WINDOW:
        return None  # longer than the window
    if before[-1:].isalnum() and run[:1] not in tuple(" \t.)"):
        return None  # the tail of a word, as in x2 + 3
    run = run.lstrip()
    if run[:2] in ("- ", "* ", "+ "):
        if before.rstrip(" \t")[-1:] not in ("", "\n"):
            return None  # x - 3 + 5: algebra; at the start of a line it is a bullet
        run = run[2:]
    run = run.removeprefix("**")  # bold
    for begin in [m.start() for m in _TERM_START.finditer(run) if _may_begin(run, m.start())][:4]:
        try:
            value, numbers = evaluate_expression(run[begin:])
        except ExpressionError:
            continue
        return value if len(numbers) > 1 else None
    return None


def _may_begin(run: str, position: int) -> bool:
    """Whether an expression may begin here. "1) 3 + 5" has one at 3; the 5 of "3.5 * 2" only begins a fragment."""
    before = run[:position]
    return not before[-1:].isdigit() and before[-1:] != "." and before.rstrip()[-1:] not in ("+", "-", "*", "/")


def _right_side_equals(text: str, equals: int, left: Fraction) -> bool | None:
    """Whether what stands right of the equals sign has the value `left`; None where no number stands there."""
    window = text[equals + 1 : equals + 1 + SUM_WINDOW]
    after = window.lstrip(_ARITHMETIC)
    run = window[: len(window) - len(after)].strip(" \t*")
    if window[: len(window) - len(after)].rstrip()[-1:] in ("+", "*", "/") and after[:1].isalpha():
        return None  # 4 * x: algebra
    for candidate in (run.rstrip(" .-("), run.rstrip(" .-()")):  # the second for "(3 + 5 = 8)"
        try:
            return evaluate_expression(candidate)[0] == left
        except ExpressionError:
            continue
    match = _LEADING_NUMBER.match(run)  # "3.5", and "8" of "8 3 5"
    if match is None or run[match.end() :].lstrip()[:1] in ("+", "-", "*", "/"):
        return None
    digits = len(match[1] or "")
    return abs(Fraction(match[0]) - left) * 2 * 10**digits <= (1 if digits else 0)
