"""Worked examples for a warm start: an honest guess-and-check search for a Countdown problem, written out.

    7*3=21,21+5=26 no
    7/3 no
    7-3=4,5*4=20 ok
    </think>
    <answer>5*(7-3)</answer>

Every sum is true, no attempt is made twice, and a search that finds nothing says `give up` and answers with its
closest attempt: a model that has an honest way to end needs no dishonest one. The searcher is lazy and careless on
purpose. How lazy and how careless is drawn anew for every trace (`Searcher`) and stands nowhere in the text, so a model
that imitates the mix has all of these habits, and reinforcement learning has something to choose from.

Attempts are drawn, or (`orderly`) only the first one is, and each of the others is the next in a fixed order, going
round. A model that draws must remember what it tried, and greedily, where nothing is drawn, it cannot leave an attempt
that failed; in order, the last line says what comes now.

    rng = random.Random(0)
    text = write_trace([7, 3, 5], 20, draw_searcher(rng), rng, room=184, count_tokens=len)

To keep the arithmetic small enough for a tiny model, the larger number stands left, results are whole, above 0 and at
most `LARGEST_RESULT`. Of the generator's problems with numbers up to 25 this leaves 99% solvable. Now and then an
attempt runs into an operation without such a result and stops there, as 7/3 above. Without these dead ends a model that
slipped into one had nothing true left to write: most of the false sums of an earlier version were of that kind.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

LARGEST_RESULT = 100
DEAD_ENDS = 0.08  # chance that a step runs into one
MAX_DRAWS = 60  # of attempts: those made before and those without a result in range are drawn again


class Value(NamedTuple):
    """A number of the problem, or a result, and the expression that makes it."""

    number: int
    text: str


class Step(NamedTuple):
    """One sum: `shown` is what stands in the trace, `value` what there is afterwards; None at a dead end."""

    shown: str
    value: Value | None


@dataclass(frozen=True)
class Searcher:
    """The habits of one search."""

    patience: int  # attempts before giving up
    notice: float  # chance to see, when two numbers are left, which operation comes closest to the target
    thoughts: int  # attempts in mind of which the closest is written down; 1: a blind guess
    orderly: bool = False  # only the first attempt is drawn; each of the others is the next one in order


def draw_searcher(rng: random.Random, orderly: bool = False) -> Searcher:
    """Mostly lazy and blind, sometimes stubborn, sometimes attentive."""
    patience = rng.choice((1, 1, 1, 1, 1, 2, 3, 99))
    notice = rng.choice((0.0, 0.0, 0.0, 0.5, 1.0))
    return Searcher(patience, notice, rng.choice((1, 1, 1, 3)), orderly)


def write_trace(
    numbers: Sequence[int],
    target: int,
    searcher: Searcher,
    rng: random.Random,
    room: int,
    count_tokens: Callable[[str], int],
) -> str:
    """The response to a problem, from its first attempt to `</answer>`, in at most `room` tokens.

    A search that has no room for another attempt gives up as an impatient one does. Raises ValueError where `room` does
    not hold the first attempt and its answer.
    """
    text, closest, seen = "", None, set()
    for steps in (_in_order if searcher.orderly else _at_random)(searcher, numbers, target, rng):
        line = ",".join(step.shown for step in steps)
        if line in seen:
            continue
        last = steps[-1].value
        best = last if _distance(last, target) < _distance(closest, target) else closest
        longer = text + line + (" ok\n" if last and last.number == target else " no\n")
        if best and count_tokens(longer + _ending(best, target)) > room:
            break
        text, closest = longer, best
        seen.add(line)
        if closest and (len(seen) >= searcher.patience or closest.number == target):
            break
    if closest is None:
        raise ValueError(f"{room} tokens do not hold one attempt at {list(numbers)} = {target}; give more room")
    return text + _ending(closest, target)


def _distance(value: Value | None, target: int) -> float:
    return math.inf if value is None else abs(value.number - target)


def _ending(closest: Value, target: int) -> str:
    gives_up = "" if closest.number == target else "give up\n"
    return f"{gives_up}</think>\n<answer>{closest.text.removeprefix('(').removesuffix(')')}</answer>"


def _at_random(searcher: Searcher, numbers: Sequence[int], target: int, rng: random.Random) -> Iterator[list[Step]]:
    """Each attempt is the closest of some random ones."""
    for _ in range(MAX_DRAWS):
        attempts = [_attempt(numbers, target, searcher.notice, rng) for _ in range(searcher.thoughts)]
        yield min(attempts, key=lambda steps: _distance(steps[-1].value, target))


def _in_order(searcher: Searcher, numbers: Sequence[int], target: int, rng: random.Random) -> Iterator[list[Step]]:
    """Every attempt once: the closest of some random ones, then those behind it, and from the first one on."""
    attempts = list(_all_attempts([Value(n, str(n)) for n in numbers], target, searcher.notice, rng))
    drawn = [rng.randrange(len(attempts)) for _ in range(searcher.thoughts)]
    first = min(drawn, key=lambda at: _distance(attempts[at][-1].value, target))
    yield from attempts[first:] + attempts[:first]


def _all_attempts(values: list[Value], target: int, notice: float, rng: random.Random) -> Iterator[list[Step]]:
    """Depth first: pairs as the values stand, operations in the order + - * /, dead ends now and then."""
    for i, j in itertools.combinations(range(len(values)), 2):
        others = [value for at, value in enumerate(values) if at not in (i, j)]
        sums, dead_ends = _sums(*sorted((values[i], values[j]), key=lambda value: -value.number))
        if not sums or (dead_ends and rng.random() < DEAD_ENDS):
            yield [rng.choice(dead_ends)]
        if sums and not others and rng.random() < notice:
            sums = [min(sums, key=lambda step: _distance(step.value, target))]
        for step in sums:
            if others:
                yield from ([step, *rest] for rest in _all_attempts([*others, step.value], target, notice, rng))
            else:
                yield [step]


def _attempt(numbers: Sequence[int], target: int, notice: float, rng: random.Random) -> list[Step]:
    """Combine two random numbers by a random operation until one is left, or until a dead end."""
    values, steps = [Value(n, str(n)) for n in numbers], []
    while len(values) > 1:
        pair = [values.pop(rng.randrange(len(values))) for _ in range(2)]
        sums, dead_ends = _sums(*sorted(pair, key=lambda value: -value.number))
        if not sums or (dead_ends and rng.random() < DEAD_ENDS):
            return [*steps, rng.choice(dead_ends)]
        if not values and rng.random() < notice:
            steps.append(min(sums, key=lambda step: _distance(step.value, target)))
        else:
            steps.append(rng.choice(sums))
        values.append(steps[-1].value)
    return steps


def _sums(a: Value, b: Value) -> tuple[list[Step], list[Step]]:
    """What can be made of a >= b: the operations with a whole result from 1 to LARGEST_RESULT, and the others."""
    quotient = a.number // b.number if b.number and a.number % b.number == 0 else 0
    results = {"+": a.number + b.number, "-": a.number - b.number, "*": a.number * b.number, "/": quotient}
    sums, dead_ends = [], []
    for operator, result in results.items():
        shown = f"{a.number}{operator}{b.number}"
        if 1 <= result <= LARGEST_RESULT:
            sums.append(Step(f"{shown}={result}", Value(result, f"({a.text}{operator}{b.text})")))
        else:
            dead_ends.append(Step(shown, None))
    return sums, dead_ends
