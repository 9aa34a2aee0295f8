"""Questions from files, from the Hub and from reasoning-gym.

    MathDataset("math_tasks.jsonl")                # question, answer: also any JSONL or parquet file of your own
    Gsm8kTask(data="openai/gsm8k")                 # question, answer with "#### 42" at its end
    MathTask(data="EleutherAI/hendrycks_math")     # problem, solution with \\boxed{...}; needs math-verify
    ReasoningGymTask(dataset="chain_sum")          # any data set of reasoning-gym; needs reasoning-gym

`data` is a file, a folder, or a Hub id, which is fetched with huggingface_hub. Files whose name begins with "test" are
held out; where there are none, the last `n_test` rows are.

Answers to MATH and reasoning-gym are judged by libraries, in a worker process with a deadline (sandbox.py), because a
model can write an answer that keeps a computer-algebra system busy for years: such an answer is wrong.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import heapq
import importlib.util
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from data_types import Problem
from tasks.expressions import plain_number
from tasks.sandbox import Worker, WorkerError
from tasks.task_base import TAG_REQUEST, QuestionTask, Split, Task, draw_problem, nearest, shuffled_index
from tasks.task_files import Row, data_files, find_data, hold_out_last, read_rows

Pair = tuple[str, str]  # question, answer
CHECK_DEADLINE_S = 3.0  # for one answer
POOL = 10_000  # items of a reasoning-gym data set; some generators build all of them at once


@dataclass(kw_only=True)
class RowTask(QuestionTask):
    """A task over (question, answer) rows: a subclass fills `_train` and `_test`."""

    _train: list[Pair] = field(default_factory=list, init=False, repr=False)
    _test: list[Pair] = field(default_factory=list, init=False, repr=False)

    def train_problem(self, index: int) -> Problem:
        if not self._train:
            raise ValueError(f"{self.data}: no training rows, only held-out ones")
        return self.problem_from(*self._train[shuffled_index(len(self._train), self.seed, index)])

    def test_problem(self, index: int) -> Problem:
        return self.problem_from(*self._test[index])

    def longest_problems(self, n: int) -> list[Problem]:
        return [self.problem_from(*pair) for pair in heapq.nlargest(n, self._train, key=lambda pair: len(pair[0]))]


@dataclass
class MathDataset(RowTask):
    """Rows with the keys question and answer, and num_terms and num_digits as in tiny-grpo's math_tasks.jsonl.

    Iterating gives every (question, answer) of the file in order. As a task, the last `n_test` rows are held out.
    Raises FileNotFoundError, or ValueError naming the row, for a file that does not hold such rows.
    """

    data: str | Path = "math_tasks.jsonl"
    n_test: int | None = None  # None: a tenth, at most 128
    max_terms: int | None = None  # only questions with at most so many terms ...
    max_digits: int | None = None  # ... and digits; rows that do not say how many are left out then

    def __post_init__(self):
        super().__post_init__()
        if not Path(self.data).exists():
            raise FileNotFoundError(f"{self.data}: no such file; `python math_task.py {self.data}` writes one")
        rows = read_rows(self.data, ("question", "answer"), optional=("num_terms", "num_digits"))
        for number, row in enumerate(rows, start=1):
            _check_question_row(f"{self.data}, row {number}", row)
        self.rows = [row for row in rows if self._wanted(row)]
        if not self.rows:
            raise ValueError(f"{self.data}: no question with max_terms {self.max_terms}, max_digits {self.max_digits}")
        self._train, self._test = hold_out_last(list(self), self.n_test, self.data)

    def __iter__(self) -> Iterator[Pair]:
        return ((row["question"], str(row["answer"])) for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def _wanted(self, row: Row) -> bool:
        limits = {"num_terms": self.max_terms, "num_digits": self.max_digits}
        return all(limit is None or row.get(key, limit + 1) <= limit for key, limit in limits.items())


def _check_question_row(where: str, row: Row) -> None:
    if not isinstance(row["question"], str) or not row["question"].strip():
        raise ValueError(f"{where}: question is {row['question']!r}, expected text"[:300])
    if isinstance(row["answer"], bool) or not isinstance(row["answer"], str | int | float):
        raise ValueError(f"{where}: answer is {row['answer']!r}, expected text or a number"[:300])
    for key in ("num_terms", "num_digits"):
        if key in row and (isinstance(row[key], bool) or not isinstance(row[key], int)):
            raise ValueError(f"{where}: {key} is {row[key]!r}, expected a whole number"[:300])


@dataclass(kw_only=True)
class ReleasedTask(RowTask):
    """A released data set: `columns` and `pair_of` say what a row holds, `data` and `subset` where the rows are."""

    columns: ClassVar[tuple[str, str]]
    data: str
    subset: str | None = None  # a folder inside `data`, where the release has several
    n_test: int | None = None  # held-out rows where no file is named "test..."; None: a tenth, at most 128

    def __post_init__(self):
        super().__post_init__()
        folder = find_data(self.data)
        if self.subset and (folder / self.subset).is_dir():
            folder = folder / self.subset
        files = data_files(folder)
        held_out = [file for file in files if file.name.startswith("test")]
        train = [pair for file in files if file not in held_out for pair in self._pairs(file)]
        test = [pair for file in held_out for pair in self._pairs(file)]
        self._train, self._test = (train, test) if test else hold_out_last(train, self.n_test, folder)

    def _pairs(self, file: Path) -> list[Pair]:
        pairs = []
        for number, row in enumerate(read_rows(file, self.columns), start=1):
            question, solution = (row[column] for column in self.columns)
            if not isinstance(question, str) or not isinstance(solution, str):
                raise ValueError(f"{file}, row {number}: expected text in {' and '.join(self.columns)}")
            answer = self.answer_of(solution)
            if not answer:
                raise ValueError(f"{file}, row {number}: no final answer in {self.columns[1]}: ...{solution[-60:]!r}")
            pairs.append((question, answer))
        return pairs

    def answer_of(self, solution: str) -> str | None:
        """The final answer of a worked solution, or None where there is none."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its answers stand")


@dataclass(kw_only=True)
class Gsm8kTask(ReleasedTask):
    """Grade-school word problems (Cobbe et al. 2021, arXiv 2110.14168): the answer is the number behind "####"."""

    columns: ClassVar[tuple[str, str]] = ("question", "answer")
    data: str = "openai/gsm8k"
    subset: str | None = "main"

    def answer_of(self, solution: str) -> str | None:
        answer = solution.rpartition("####")[2].strip() if "####" in solution else ""
        return answer if plain_number(answer) is not None else None


@dataclass(kw_only=True)
class MathTask(ReleasedTask):
    """Competition problems (Hendrycks et al. 2021, arXiv 2103.03874): the answer is the last \\boxed{...}.

    Answers are compared by math-verify, so that 0.5, 1/2 and \\frac{1}{2} are equal.
    """

    columns: ClassVar[tuple[str, str]] = ("problem", "solution")
    example_answer: ClassVar[str] = r"\frac{1}{2}"
    data: str = "EleutherAI/hendrycks_math"

    def __post_init__(self):
        need_library("math_verify", "math-verify")
        super().__post_init__()
        self._worker = Worker("tasks.dataset_tasks:math_checker", deadline_s=CHECK_DEADLINE_S)
        self._check = functools.lru_cache(maxsize=4096)(self._ask)  # a group often gives one answer many times

    def answer_of(self, solution: str) -> str | None:
        return last_boxed(solution)

    def is_correct(self, problem: Problem, answer: str) -> bool:
        """Whether math-verify finds the answer equal to the reference; an answer it cannot judge in time is wrong."""
        answer = answer.strip()
        return answer == problem.target.strip() or (len(answer) <= 500 and self._check(problem.target, answer))

    def _ask(self, reference: str, answer: str) -> bool:
        return _verdict(self._worker, reference, answer) is True


def math_checker() -> Callable[[str, str], bool]:
    """Runs in the worker: the comparison by math-verify, whose own timeouts are off because the worker has one."""
    from math_verify import parse, verify

    def equal(reference: str, answer: str) -> bool:
        wanted = parse(f"\\boxed{{{reference}}}", parsing_timeout=None)
        given = parse(answer if "\\boxed" in answer or "$" in answer else f"${answer}$", parsing_timeout=None)
        return bool(verify(wanted, given, timeout_seconds=None))

    return equal


def _verdict(worker: Worker, *arguments: Any) -> Any:
    """What the worker says of an answer, or None where the answer made it fail or kept it busy too long."""
    try:
        return worker.call(*arguments)
    except WorkerError as error:
        if error.kind == "start":
            raise  # not the answer's fault
        return None


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...}, braces matched; \\boxed 5 and \\fbox{...} of old solutions are read too."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    rest = text[start:].partition("box")[2].removeprefix("ed") if start >= 0 else ""
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() or None
    depth = 0
    for position, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:position].strip() or None
    return None


@dataclass(kw_only=True)
class ReasoningGymTask(Task):
    """Any data set of reasoning-gym, judged by its own scorer, 0 to 1.

    Problems are drawn from POOL items, the same for the same seed; one question in ten is held out by its hash. Some
    scorers (see EVALUATING) hand the answer to `eval`; they are given only what cannot be a program.
    """

    dataset: str
    config: dict[str, Any] = field(default_factory=dict)  # options of the data set: {"max_terms": 4}

    def __post_init__(self):
        super().__post_init__()
        need_library("reasoning_gym", "reasoning-gym")
        self._items = _reasoning_gym_items(self.dataset, self.config)
        self._worker = Worker("tasks.dataset_tasks:reasoning_gym_scorer", (self.dataset, self.config), CHECK_DEADLINE_S)
        self.train_problem(0), self.test_problem(0)  # a data set with too few questions is told now

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
        return min(1.0, max(0.0, _verdict(self._worker, answer, problem.target) or 0.0))


def _reasoning_gym_items(dataset: str, config: dict[str, Any]) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if dataset not in DATASETS:
        raise ValueError(f"reasoning_gym:{dataset}: no such data set{nearest(dataset, DATASETS)}")
    try:
        return reasoning_gym.create_dataset(dataset, seed=0, size=POOL, **config)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"reasoning_gym:{dataset}: {config} do not fit ({error})".replace("\n", " ")) from error


def reasoning_gym_scorer(dataset: str, config: dict[str, Any]) -> Callable[[str, dict], float]:
    """Runs in the worker."""
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


def need_library(module: str, package: str) -> None:
    """Raise ValueError, in one line, where an optional library is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"this task needs {package}, which is not installed: pip install {package}")
