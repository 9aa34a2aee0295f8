"""Questions from files and from the Hub.

    MathDataset("math_tasks.jsonl")                # question, answer: also your own JSONL or parquet, file or folder
    Gsm8kTask(data="openai/gsm8k")                 # question, answer with "#### 42" at its end
    MathTask(data="EleutherAI/hendrycks_math")     # problem, solution with \\boxed{...}, with math-verify

`data` is a file, a folder, or a Hub id, which huggingface_hub fetches. task_files.py says which files are held out.
`question_column` and `answer_column` name other columns.

A library judges answers to MATH, in a worker process with a deadline (worker.py), because a model can write an answer
that keeps a computer-algebra system busy for years. Such an answer is wrong.
"""

from __future__ import annotations

import functools
import heapq
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from data_types import Problem
from tasks.expressions import plain_number
from tasks.messages import home_path
from tasks.notation import MINUS, unwrapped
from tasks.task_base import QuestionTask, answer_text, shuffled_index
from tasks.task_files import SUFFIXES, Row, path_exists, read_splits
from tasks.worker import Worker, WorkerError

Pair = tuple[str, str]  # question, answer
CHECK_DEADLINE_S = 3.0  # for one answer


@dataclass(kw_only=True)
class RowTask(QuestionTask):
    """A task with (question, answer) rows from files. `columns` are the names of the two columns."""

    columns: ClassVar[tuple[str, str]] = ("question", "answer")
    data: str | Path
    question_column: str | None = None  # None: the name in `columns`
    answer_column: str | None = None
    n_test: int | None = None  # held-out rows if no file is held out; None: a tenth, at most 128
    _train: list[Pair] = field(default_factory=list, init=False, repr=False)
    _test: list[Pair] = field(default_factory=list, init=False, repr=False)

    def train_problem(self, index: int) -> Problem:
        if not self._train:
            raise ValueError(
                f"{self.data}: no training rows, only held-out ones; give a file or folder without the word test, "
                "validation, valid, eval or dev in its name"
            )
        return self.problem_from(*self._train[shuffled_index(len(self._train), self.seed, index)])

    def test_problem(self, index: int) -> Problem:
        return self.problem_from(*self._test[index])

    def longest_problems(self, n: int) -> list[Problem]:
        return [self.problem_from(*pair) for pair in heapq.nlargest(n, self._train, key=lambda pair: len(pair[0]))]

    @property
    def _names(self) -> tuple[str, str]:
        return self.question_column or self.columns[0], self.answer_column or self.columns[1]


def _same_question(question: str) -> str:
    """Equal for questions that differ in white space or case only."""
    return " ".join(question.split()).casefold()


@dataclass
class MathDataset(RowTask):
    """Rows with the keys question and answer, and num_terms and num_digits as in tiny-grpo's math_tasks.jsonl.

    Iteration gives every (question, answer) of the files in order, for `GRPO.train_step`. If some files are held out,
    it gives the training rows. Raises FileNotFoundError, or ValueError with file and row, for data without such rows
    and for a row that no response or an empty response can match.
    """

    data: str | Path = "math_tasks.jsonl"
    n_test: int | None = None
    max_terms: int | None = None  # only questions with at most so many terms ...
    max_digits: int | None = None  # ... and digits; a row without these numbers is then left out

    def __post_init__(self) -> None:
        super().__post_init__()
        if not path_exists(home_path(self.data)) and home_path(self.data).suffix in SUFFIXES:
            raise FileNotFoundError(f"{self.data}: no such file; `python math_task.py {self.data}` writes one")
        limited = self.max_terms is not None or self.max_digits is not None
        splits = read_splits(
            self.data,
            self._names,
            self._parse,
            key=lambda row: _same_question(row["question"]),
            n_test=self.n_test,
            optional=("num_terms", "num_digits"),
            empty=f"no question with max_terms {self.max_terms}, max_digits {self.max_digits}"
            if limited
            else "no rows",
        )
        self.rows, self.data_summary = splits.rows, splits.summary
        self._train, self._test = ([_pair(row) for row in rows] for rows in (splits.train, splits.test))

    def __iter__(self) -> Iterator[Pair]:
        return (_pair(row) for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def _parse(self, row: Row) -> Row | None:
        question, answer = (row.pop(name) for name in self._names)
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"question is {question!r:.200}, expected text")
        if isinstance(answer, str) and (mark := re.search(r"####\s*\S+\s*$", answer)):
            raise ValueError(f"the answer is a solution that ends with {mark[0].strip()!r}; did you mean --task gsm8k?")
        if isinstance(answer, str) and plain_number(answer) is None and last_boxed(answer):
            raise ValueError("the answer is a solution with \\boxed{...}; did you mean --task math?")
        answer_text(answer)  # refuses an answer that cannot be matched
        limits = {"num_terms": self.max_terms, "num_digits": self.max_digits}
        for name in limits:
            if name in row and (isinstance(row[name], bool) or not isinstance(row[name], int)):
                raise ValueError(f"{name} is {row[name]!r:.200}, expected a whole number")
        wanted = all(limit is None or row.get(name, limit + 1) <= limit for name, limit in limits.items())
        return {"question": question, "answer": answer, **row} if wanted else None


def _pair(row: Row) -> Pair:
    return row["question"], str(row["answer"])


@dataclass(kw_only=True)
class ReleasedTask(RowTask):
    """A released data set with worked solutions: `answer_of` takes the final answer out of a solution."""

    data: str
    subset: str | None = None  # a folder inside `data`, if the release has several

    def __post_init__(self) -> None:
        super().__post_init__()
        splits = read_splits(
            self.data,
            self._names,
            self._parse,
            key=lambda pair: _same_question(pair[0]),
            n_test=self.n_test,
            subset=self.subset,
        )
        self._train, self._test, self.data_summary = splits.train, splits.test, splits.summary

    def _parse(self, row: Row) -> Pair:
        question, solution = (row[name] for name in self._names)
        if not isinstance(question, str) or not isinstance(solution, str) or not question.strip():
            found = next(value for value in (solution, question) if not isinstance(value, str) or not value.strip())
            raise ValueError(
                f"expected text in {' and '.join(self._names)}, found {found!r:.200}; plain answers need --task jsonl"
            )
        answer = self.answer_of(solution)
        if not answer:
            hint = "if this is the answer itself, take --task jsonl"
            raise ValueError(f"no final answer in {self._names[1]}: ...{solution[-60:]!r}; {hint}")
        return question, answer_text(answer)

    def answer_of(self, solution: str) -> str | None:
        """The final answer of a worked solution, or None if there is none."""
        raise NotImplementedError(f"{type(self).__name__} has no method answer_of")


@dataclass(kw_only=True)
class Gsm8kTask(ReleasedTask):
    """Grade-school word problems (Cobbe et al. 2021, arXiv 2110.14168). The answer is the number behind "####"."""

    data: str = "openai/gsm8k"
    subset: str | None = "main"

    def answer_of(self, solution: str) -> str | None:
        answer = solution.rpartition("####")[2].strip() if "####" in solution else ""
        return answer if plain_number(answer) is not None else None


@dataclass(kw_only=True)
class MathTask(ReleasedTask):
    """Competition problems (Hendrycks et al. 2021, arXiv 2103.03874). The answer is the last \\boxed{...}.

    math-verify compares answers, so 0.5, 1/2 and \\frac{1}{2} are equal.
    """

    columns: ClassVar[tuple[str, str]] = ("problem", "solution")
    example_answer: ClassVar[str] = r"\frac{1}{2}"
    data: str = "EleutherAI/hendrycks_math"

    def __post_init__(self) -> None:
        need_library("math_verify", "math-verify")
        super().__post_init__()
        self._worker = Worker("tasks.dataset_tasks:math_checker", deadline_s=CHECK_DEADLINE_S)
        self._check = functools.lru_cache(maxsize=4096)(self._ask)  # a group often gives one answer many times

    def answer_of(self, solution: str) -> str | None:
        return last_boxed(solution)

    def is_correct(self, problem: Problem, answer: str) -> bool:
        """Whether math-verify finds the answer equal to the reference. An answer that takes too long is wrong."""
        answer = answer.strip()
        return answer == problem.target.strip() or (len(answer) <= 500 and self._check(problem.target, answer))

    def _ask(self, reference: str, answer: str) -> bool:
        return verdict(self._worker, reference, answer) is True


def math_checker() -> Callable[[str, str], bool]:
    """Runs in the worker: the comparison by math-verify, whose own timeouts are off because the worker has one."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off

    def equal(reference: str, answer: str) -> bool:
        wanted = parse(f"\\boxed{{{plain_formula(reference)}}}", parsing_timeout=None)
        given = parse(formula_in_dollars(answer), parsing_timeout=None)
        return bool(verify(wanted, given, timeout_seconds=None))

    return equal


def formula_in_dollars(answer: str) -> str:
    """An answer as math-verify reads it: `\\[5\\]`, `**5**` and `\\$5` become `$5$`. Prose keeps its own formulas."""
    answer = plain_formula(answer)
    if "$" in answer or "\\boxed" in answer:
        return answer
    marked = re.sub(r"(?<!\\)\\[()\[\]]", "$", answer)  # not \\[2pt], a line break of a matrix
    return marked if marked != answer else f"${answer}$"


_PLAINER = [(re.compile(pattern), plain) for pattern, plain in (
    (r"^([-+])\s*\$([^$]+)\$$", r"\1\2"),  # -$5$
    (r"^([-+]?)\s*\\?\$\s*(?=[-+.0-9][^$]*$)", r"\1"),  # -\$5
    (r"(?<=[0-9])(?:\\[,!]|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))", ""),  # 1\,234
    (r"(?<=[0-9])\s*(?:dollars?|\\text\{\s*dollars?\})$", ""),
    (r"(?<=[0-9])\.$", ""),
    (r"^([-+]?[0-9]+)\s+([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}"),  # 10 1/2
    (r"(?<=[\w)])\*\*(?=[\w({])", "^"),  # x**2
)]  # fmt: skip


def plain_formula(text: str) -> str:
    """A formula without Markdown, delimiters and currency signs, which math-verify does not read everywhere."""
    text = unwrapped(text.translate(MINUS))
    for pattern, plain in _PLAINER:
        text = pattern.sub(plain, text)
    return text


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...}, with matched braces. Also reads \\boxed 5 and \\fbox{...}."""
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


def verdict(worker: Worker, *arguments: Any) -> Any:
    """The worker's value for an answer, or None if the answer made it fail or kept it busy too long."""
    try:
        return worker.call(*arguments)
    except WorkerError as error:
        if error.kind == "start":
            raise  # not the answer's fault
        return None


def need_library(module: str, package: str) -> None:
    """Raise ValueError, in one line, if an optional library is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"this task needs {package}, which is not installed: pip install {package}")
