"""Worked examples for a warm start: a guess-and-check search for a Countdown problem, written out.

    7*3=21,21+5=26 no
    7/3 no
    7-3=4,5*4=20 ok
    </think>
    <answer>5*(7-3)</answer>

Every sum is true, and no attempt is made twice. A search without a solution says `give up` and answers with its closest
attempt: a model with an honest way to end does not need a false sum. The searcher is lazy and careless on purpose. Its
habits (`Searcher`) are drawn again for every trace and are not in the text. A model that imitates the mix has all of
these habits, and reinforcement learning chooses among them.

Attempts are drawn at random. With `orderly`, only the first one is drawn, and each of the others is the next in a fixed
order that starts again at its end. A model that draws must remember its attempts, and in greedy decoding it cannot
leave a failed one. In a fixed order, the last line determines the next.

    rng = random.Random(0)
    text = write_trace([7, 3, 5], 20, draw_searcher(rng), rng, room=184, count_tokens=len)

The arithmetic is small enough for a tiny model: the larger number is on the left, and results are whole numbers from 1
to `LARGEST_RESULT`. 99% of the generator's problems with numbers up to 25 stay solvable. Some attempts end at an
operation without such a result, as 7/3 above. Without these dead ends, a model that came to such an operation had no
true text to continue with: most false sums of an earlier version were of that kind.
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
MAX_DRAWS = 60  # of attempts: repeated attempts and attempts without a result in range are drawn again


class Value(NamedTuple):
    """A number of the problem or a result, and its expression."""

    number: int
    text: str


class Step(NamedTuple):
    """One operation: its text in the trace, and its result. None: a dead end."""

    shown: str
    value: Value | None

    @property
    def result(self) -> Value:
        """The value of a step that is no dead end."""
        assert self.value is not None
        return self.value


@dataclass(frozen=True)
class Searcher:
    """The habits of one search."""

    patience: int  # attempts before giving up
    notice: float  # chance to choose the closest operation when two numbers are left
    thoughts: int  # attempts of which only the closest is written; 1: a blind guess
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

    A search without room for another attempt gives up, like an impatient one. Raises ValueError if `room` is too small
    for the first attempt and its answer.
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
    """Every attempt once: the closest of some random ones, then the next ones in order, around the end."""
    attempts = list(_all_attempts([Value(n, str(n)) for n in numbers], target, searcher.notice, rng))
    drawn = [rng.randrange(len(attempts)) for _ in range(searcher.thoughts)]
    first = min(drawn, key=lambda at: _distance(attempts[at][-1].value, target))
    yield from attempts[first:] + attempts[:first]


def _all_attempts(values: list[Value], target: int, notice: float, rng: random.Random) -> Iterator[list[Step]]:
    """Depth first: pairs in the order of the values, operations in the order + - * /, and some dead ends."""
    for i, j in itertools.combinations(range(len(values)), 2):
        others = [value for at, value in enumerate(values) if at not in (i, j)]
        sums, dead_ends = _sums(*sorted((values[i], values[j]), key=lambda value: -value.number))
        if not sums or (dead_ends and rng.random() < DEAD_ENDS):
            yield [rng.choice(dead_ends)]
        if sums and not others and rng.random() < notice:
            sums = [min(sums, key=lambda step: _distance(step.value, target))]
        for step in sums:
            if others:
                yield from ([step, *rest] for rest in _all_attempts([*others, step.result], target, notice, rng))
            else:
                yield [step]


def _attempt(numbers: Sequence[int], target: int, notice: float, rng: random.Random) -> list[Step]:
    """Combine two random numbers by a random operation until one is left, or until a dead end."""
    values = [Value(n, str(n)) for n in numbers]
    steps: list[Step] = []
    while len(values) > 1:
        pair = [values.pop(rng.randrange(len(values))) for _ in range(2)]
        sums, dead_ends = _sums(*sorted(pair, key=lambda value: -value.number))
        if not sums or (dead_ends and rng.random() < DEAD_ENDS):
            return [*steps, rng.choice(dead_ends)]
        if not values and rng.random() < notice:
            steps.append(min(sums, key=lambda step: _distance(step.value, target)))
        else:
            steps.append(rng.choice(sums))
        values.append(steps[-1].result)
    return steps


def _sums(a: Value, b: Value) -> tuple[list[Step], list[Step]]:
    """Operations on a >= b: those with a whole result from 1 to LARGEST_RESULT, and the others."""
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
