"""Where a response writes a false sum, such as 3 + 5 = 9, so that a page can mark it.

    false_spans("3 + 5 = 9, 9 * 2 = 18")     # [(0, 9)]

The judgement is `false_sums` of tasks/expressions.py, the one that the reward uses. It counts. The place of a false sum
is found by counting again in every beginning of the line that ends before an equals sign.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tasks.expressions import false_sums
from tasks.rewards import THINK_CLOSE

LONGEST = 20_000  # characters of a thought that are looked at
SUM = "0123456789+-*/().,×÷·−\t "  # of one side of an equality
NUMBER = r"[-+−(]*\d+(?:,\d{3})*(?:\.\d+)?\)*"
RIGHT = re.compile(rf"[ \t]*{NUMBER}(?:[ \t]*[-+*/×÷·−][ \t]*{NUMBER})*")  # a number, or a second expression


def false_spans(response: str) -> list[tuple[int, int]]:
    """(start, end) of every false sum in the thought of a response, in characters."""
    thought = response.partition(THINK_CLOSE)[0][:LONGEST]
    spans: list[tuple[int, int]] = []
    start = 0
    for line in thought.splitlines(keepends=True):
        if "=" in line and false_sums(line)[0]:
            spans += [(start + a, start + b) for a, b in _in_line(line)]
        start += len(line)
    return spans


def _in_line(line: str) -> Iterator[tuple[int, int]]:
    """The equals signs at which the number of false sums in the line's beginning rises, with both sides."""
    signs = [match.start() for match in re.finditer("=", line)]
    counts = [0, *(false_sums(line[:end])[0] for end in [*signs[1:], len(line)])]
    previous_sign, previous_end = -1, 0
    for sign, before, after in zip(signs, counts, counts[1:]):
        number = RIGHT.match(line, sign + 1)
        end = number.end() if number else sign + 1
        if after > before:
            left = line[previous_end:sign] if line[previous_end:sign].strip() else line[previous_sign + 1 : sign]
            run = left[len(left.rstrip(SUM)) :].lstrip(" \t,.)")
            yield sign - len(run), end
        previous_sign, previous_end = sign, end


def marked(response: str) -> list[tuple[str, bool]]:
    """The response in pieces, each with whether it is a false sum."""
    pieces, at = [], 0
    for start, end in false_spans(response):
        pieces += [(response[at:start], False), (response[start:end], True)]
        at = end
    return [piece for piece in [*pieces, (response[at:], False)] if piece[0]]


def marked_tokens(tokens: Sequence[str], response: str) -> list[int]:
    """Numbers of the tokens that touch a false sum; none if the tokens do not spell the response."""
    spans = false_spans(response)
    if not spans or not "".join(tokens).startswith(response):
        return []
    found, at = [], 0
    for i, token in enumerate(tokens):
        if any(at < end and at + len(token) > start for start, end in spans):
            found.append(i)
        at += len(token)
    return found
