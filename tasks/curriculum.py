"""Difficulty control: training problems come from the levels that the policy solves sometimes.

    python train.py --ckpt Qwen2.5-Coder-0.5B-Instruct --task countdown --numbers 3 --max-number 20 --curriculum

A group has a learning signal only if some of its responses are right and some are wrong. A small model solves almost no
problem of a hard task, so almost every group is without signal. `--curriculum` (off: `--no-curriculum`) draws problems
of easier levels until the policy can solve the task itself.

Levels, easiest first. Countdown: 2 numbers, 3 numbers, ... up to the largest of `numbers`, each of them up to 10, up to
25 and up to `max_number`. Arithmetic: all (terms, digits) up to those of the task, in the order of terms * digits.
Countdown from a file (`data`) and all other tasks have no levels, and `--curriculum` is refused.

Share of a level: solved responses / responses, over about the last WINDOW responses of that level. A response is solved
if its reward part `answer` is 1. The counts of all levels are halved every HALF_LIFE steps, and the estimate adds one
solved response and one that is not solved:

    estimate = (solved + 1) / (responses + 2)

An untried level has the estimate 1/2. So the first steps try all levels, and later a level that was not drawn for some
steps is tried again. Problems come in equal numbers from every level with LOW <= estimate <= HIGH. Two exceptions: a
level waits while an easier level has a share under LOW, and a level is finished while a harder level has a share over
HIGH. If no level is left, problems come from the hardest level with an estimate over HIGH and from the one above it.
If there is no such level, they come from the easiest. The level falls by the same rule if shares fall.

Evaluation does not use levels: held-out problems are those of the task itself. The levels draw training problems only,
and the split is a hash of the problem, so no level shows a held-out problem. If every level is solved, problems come
from the hardest one. For a task with several `numbers` it has the largest of them.

Metrics of a step: `curriculum/level`, mean level of its problems (1: easiest), and `curriculum/solved_<level>`, the
share of each level that was tried. The state is in the checkpoint. A problem depends on (seed, index, state) only, and
the state on all episodes of a step, so a resumed run and a run with several processes draw the same problems.

Sources: problems of intermediate difficulty, PCL (arXiv 2510.01135); difficulty that follows the success rate, AdaRFT
(arXiv 2504.05520). Both rate the problems of a data set. Generated tasks have levels instead, so nothing is rated
before the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from data_types import Episode, Problem
from tasks.task_base import Task

LOW, HIGH = 0.2, 0.8  # estimates of the levels that problems come from
HALF_LIFE = 2  # steps after which a response counts half
WINDOW = 64  # largest count of responses of a level: more evidence would delay the next try of a level
SIZES = (10, 25)  # Countdown: largest numbers of the easier levels
SMALLEST_SPAN = 5  # Countdown: fewer different numbers leave too few problems


class Curriculum:
    """Draws the training problems of a task from its levels, and tracks the share of solved responses of each.

    names: the levels, easiest first. Raises ValueError, in one line, if the task has no levels.
    """

    def __init__(self, task: Task):
        levels = task.levels()
        if not levels:
            raise ValueError(
                f"--curriculum: {type(task).__name__} has no levels; expected generated Countdown or arithmetic "
                "problems. Take --no-curriculum"
            )
        self.names, self.tasks = list(levels), list(levels.values())
        self.solved = [0.0] * len(levels)  # decayed counts
        self.responses = [0.0] * len(levels)
        self._level_of: dict[str, int] = {}  # problem id -> level, of the problems drawn since the last record
        self._recorded: list[int] = []  # levels of the problems of the last recorded step

    def problems(self, split: str, n: int, start: int = 0) -> list[Problem]:
        """Training problems `start` to `start + n`. The same (seed, start, state) gives the same problems.

        Raises ValueError for another split than "train": held-out problems are those of the task itself.
        """
        if split != "train":
            raise ValueError(f"a curriculum has training problems only; found split {split!r}")
        levels = self.levels()
        drawn = []
        for index in range(start, start + n):
            level = levels[index % len(levels)]  # in turn: even a step of few problems sees all levels
            problem = self.tasks[level].train_problem(index)
            self._level_of[problem.id] = level
            drawn.append(problem)
        return drawn

    def levels(self) -> list[int]:
        """Numbers of the levels that problems come from now, easiest first."""
        p, shares, last = self.estimates(), self.shares(), len(self.names) - 1
        between = [
            level
            for level in range(last + 1)
            if LOW <= p[level] <= HIGH
            # The share, not the estimate: a level that is tried again for its age opens no harder one by that.
            and min(shares[:level], default=1.0) >= LOW  # else too early: an easier level is not solved yet
            and max(shares[level + 1 :], default=0.0) <= HIGH  # else finished: a harder level is solved
        ]
        if between:
            return between
        hardest = max((level for level in range(last + 1) if p[level] > HIGH), default=None)
        if hardest is None:
            return [0]
        return [hardest] if hardest == last else [hardest, hardest + 1]

    def estimates(self) -> list[float]:
        """(solved + 1) / (responses + 2) of every level."""
        return [(solved + 1) / (n + 2) for solved, n in zip(self.solved, self.responses)]

    def shares(self) -> list[float]:
        """solved / responses of every level; 1/2 if it is untried."""
        return [solved / n if n else 0.5 for solved, n in zip(self.solved, self.responses)]

    def record(self, episodes: Iterable[Episode]) -> None:
        """Count the responses of a step. Episodes without an `answer` part, and of other problems, do not count."""
        new_solved, new_responses = [0] * len(self.names), [0] * len(self.names)
        groups: dict[int, int] = {}
        for episode in episodes:
            level = self._level_of.get(episode.problem.id) if episode.problem else None
            if level is None or "answer" not in episode.reward_parts:
                continue
            new_solved[level] += episode.reward_parts["answer"] == 1.0
            new_responses[level] += 1
            groups[episode.group_id] = level
        self._level_of.clear()
        if not groups:
            return
        self._recorded = list(groups.values())
        kept = 0.5 ** (1 / HALF_LIFE)
        for level, (solved, n) in enumerate(zip(new_solved, new_responses)):
            solved, n = kept * self.solved[level] + solved, kept * self.responses[level] + n
            scale = min(1.0, WINDOW / n) if n else 1.0
            self.solved[level], self.responses[level] = scale * solved, scale * n

    def metrics(self) -> dict[str, float]:
        """`curriculum/level` of the last recorded step, and `curriculum/solved_<level>` of the levels tried so far."""
        found = {"curriculum/level": 1 + fmean(self._recorded)} if self._recorded else {}
        for name, solved, n in zip(self.names, self.solved, self.responses):
            if n:
                found[f"curriculum/solved_{name}"] = solved / n
        return found

    def state_dict(self) -> dict[str, list[float]]:
        """Level name -> [solved, responses], for the checkpoint (JSON keeps floats to the last bit)."""
        return {name: [solved, n] for name, solved, n in zip(self.names, self.solved, self.responses)}

    def load_state_dict(self, state: dict[str, Sequence[float]]) -> None:
        """Put the counts back. A level that the state does not have is untried (the task's settings were changed)."""
        counts = [state.get(name, (0.0, 0.0)) for name in self.names]
        self.solved, self.responses = [float(c[0]) for c in counts], [float(c[1]) for c in counts]
        self._level_of.clear()
        self._recorded = []


def countdown_levels(task: Any) -> dict[str, Any]:
    """Levels of a generated CountdownTask, easiest first: how many numbers, then how large."""
    largest = max(task.numbers)
    sizes = [size for size in SIZES if task.min_number + SMALLEST_SPAN <= size < task.max_number]
    levels = {}
    for count in range(min(2, largest), largest + 1):
        for size in [*sizes, task.max_number]:
            easier = _level(task, numbers=(count,), max_number=size)
            if easier:
                levels[f"{count}_numbers_to_{size}"] = easier
    return levels


def arithmetic_levels(task: Any, mix: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """Levels of an ArithmeticTask with these (terms, digits): all pairs up to them, in the order of terms * digits."""
    pairs = {
        (terms, digits)
        for most_terms, most_digits in mix
        for terms in range(min(2, most_terms), most_terms + 1)
        for digits in range(1, most_digits + 1)
    }
    levels = {}
    for terms, digits in sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[1])):
        easier = _level(task, mix=((terms, digits),))
        if easier:
            levels[f"{terms}_terms_{digits}_digits"] = easier
    return levels


def _level(task: Any, **settings: Any) -> Any | None:
    """The task with these settings. None: they leave too few problems, for example two equal numbers up to 1."""
    try:
        return replace(task, **settings)
    except ValueError:
        return None
