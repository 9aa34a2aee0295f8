"""Any data set of reasoning-gym as a task, judged by its own scorer in a worker process with a deadline.

make_task("reasoning_gym:chain_sum", config={"max_terms": 4})      # pip install reasoning-gym
"""

from __future__ import annotations

import ast
import contextlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from data_types import Problem
from tasks.dataset_tasks import CHECK_DEADLINE_S, need_library, verdict
from tasks.messages import did_you_mean
from tasks.task_base import TAG_REQUEST, Split, Task, draw_problem
from tasks.worker import Worker

POOL = 10_000  # items of a data set; some generators build all of them at once


@dataclass(kw_only=True)
class ReasoningGymTask(Task):
    """Any data set of reasoning-gym, judged by its own scorer from 0 to 1.

    Problems are drawn from POOL items. One question in ten is held out by its hash. Some scorers (EVALUATING) pass the
    answer to `eval`. They only get answers that cannot be a program.
    """

    dataset: str
    config: dict[str, Any] = field(default_factory=dict)  # options of the data set: {"max_terms": 4}

    def __post_init__(self) -> None:
        super().__post_init__()
        need_library("reasoning_gym", "reasoning-gym")
        self._items = _reasoning_gym_items(self.dataset, self.config)
        self._worker = Worker("tasks.gym_task:reasoning_gym_scorer", (self.dataset, self.config), CHECK_DEADLINE_S)
        self.train_problem(0), self.test_problem(0)  # a data set with too few questions is an error now

    def train_problem(self, index: int) -> Problem:
        return self._problem("train", index)

    def test_problem(self, index: int) -> Problem:
        return self._problem("test", index)

    def _problem(self, split: Split, index: int) -> Problem:
        number, item = draw_problem(f"reasoning_gym {self.dataset}", self.seed, split, index, self._draw)
        request = "" if self.prompt_style == "short" else "\n" + TAG_REQUEST.format(example="your answer")
        messages = self.messages(item["question"] + request)
        return Problem(f"{self.dataset} {number}", messages, item, self.response_prefix)

    def _draw(self, generator: random.Random) -> tuple[str, tuple[int, dict]]:
        number = generator.randrange(POOL)
        item = self._items[number]
        return item["question"], (number, item)

    def score(self, problem: Problem, answer: str) -> float:
        answer = answer.strip()
        if self.dataset in EVALUATING and not is_harmless(answer):
            return 0.0
        return min(1.0, max(0.0, verdict(self._worker, answer, problem.target) or 0.0))


def _reasoning_gym_items(dataset: str, config: dict[str, Any]) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if dataset not in DATASETS:
        raise ValueError(f"reasoning_gym:{dataset}: no such data set{did_you_mean(dataset, DATASETS)}")
    try:
        return reasoning_gym.create_dataset(dataset, seed=0, size=POOL, **config)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"reasoning_gym:{dataset}: {config} do not fit ({error})".replace("\n", " ")) from error


def reasoning_gym_scorer(dataset: str, config: dict[str, Any]) -> Callable[[str, dict], float]:
    """Runs in the worker: the data set's own scorer."""
    items = _reasoning_gym_items(dataset, config)
    return lambda answer, item: float(items.score_answer(answer, item))


# Data sets of reasoning-gym 0.1.25 whose scorer evaluates the answer, by `eval` or by sympy's parser, which uses it.
EVALUATING = {"binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication"}
EVALUATING |= {"puzzle24", "simple_integration", "spiral_matrix", "string_insertion"}
_MATHEMATICAL = re.compile(r"[A-Za-z0-9_\s+*/^().,|-]{0,2000}")
_CALL_OR_ATTRIBUTE = re.compile(r"[A-Za-z0-9_)]\s*\(|\.\s*[A-Za-z_]|\w_|_\w")  # a lone _ is an empty square
_FUNCTION = re.compile(r"\b(?:a?(?:sin|cos|tan)h?|sec|csc|cot|exp|log|ln|sqrt|Abs)\s*\(")


def is_harmless(answer: str) -> bool:
    """Whether evaluating the answer cannot run anything: a Python literal, or a formula of known functions."""
    if len(answer) <= 2000:
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            ast.literal_eval(answer)
            return True
    return _MATHEMATICAL.fullmatch(answer) is not None and not _CALL_OR_ATTRIBUTE.search(_FUNCTION.sub("(", answer))
