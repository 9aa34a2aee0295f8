"""Tasks with verifiable answers, and the reward of a response.

    task    = CountdownTask(numbers=(3, 4), max_number=99, seed=0)
    problem = task.problem([3, 5, 2], target=13)             # or task.train_problem(7), task.test_problems(512)
    reward  = task.reward(problem, " 3 + 5 * 2 = 13 </think>\n<answer> 3 + 5 * 2 </answer>")
    reward                                                   # Reward(total=1.1, parts={"format": 1.0, "answer": 1.0})

Countdown: reach the target with + - * / and parentheses, with every number exactly once. Reward, prompt and response
prefix are those of GRPO-Zero and NanoGRPO: 0.1 * format + answer. Two things differ. An answer is parsed and computed
in exact fractions, never by `eval` (expressions.py). And an answer counts only behind the thought (rewards.py). The
example in the prompt, (1 + 2) / 3, is an answer like any other. "3 + 5 * 2 = 13" is an equation, not an expression, and
earns no answer reward, as in GRPO-Zero.

    make_task("arithmetic", num_terms=(2,))                  # by name: see TASKS
    make_task("reasoning_gym:chain_sum")                     # pip install reasoning-gym
    make_task("path/to/file.py:MyTask")                      # your own: see docs/your-own.md

`python math_task.py math_tasks.jsonl` writes a file of arithmetic questions for `MathDataset("math_tasks.jsonl")`.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from data_types import Problem
from tasks.calculator import Calculator
from tasks.curriculum import arithmetic_levels, countdown_levels
from tasks.dataset_tasks import Gsm8kTask, MathDataset, MathTask
from tasks.expressions import MAX_CHARS, ExpressionError, evaluate_expression, false_sums, plain_number
from tasks.gym_task import ReasoningGymTask
from tasks.messages import did_you_mean, first_line, home_path
from tasks.rewards import REWARD_PRESETS, answer_block, format_reward, soft_overlong_penalty
from tasks.sandbox import FunctionReward, JudgedInWorker, SandboxedTask
from tasks.task_base import TAG_REQUEST, QuestionTask, Split, Task, draw_problem, shuffled_index
from tasks.task_files import Row, path_exists, read_splits
from tasks.user_files import user_task_class

__all__ = [
    "REWARD_PRESETS",
    "TASKS",
    "ArithmeticTask",
    "CalculatorTask",
    "CountdownTask",
    "Gsm8kTask",
    "MathDataset",
    "MathTask",
    "QuestionTask",
    "ReasoningGymTask",
    "SandboxedTask",
    "Task",
    "answer_block",
    "evaluate_expression",
    "false_sums",
    "format_reward",
    "make_task",
    "plain_number",
    "soft_overlong_penalty",
    "task_from_config",
]

COUNTDOWN_REQUEST = (
    "Using the numbers {numbers}, create an equation that equals {target}. "
    "You can use basic arithmetic operations (+, -, *, /) and each number can only be used once. "
    + TAG_REQUEST.format(example="(1 + 2) / 3")
)


@dataclass(kw_only=True)
class CountdownTask(Task):
    """Countdown problems from a seeded generator, or from a parquet or JSONL data set with columns `nums` and `target`.

    Generated problems are solvable by construction, and one in ten is held out by a hash of (sorted numbers, target).
    task_files.py says which rows of a data set are held out. Training rows that repeat one of them are left out.
    Raises ValueError or FileNotFoundError, in one line, for settings or data that cannot work.
    """

    numbers: tuple[int, ...] = (3, 4)  # how many numbers a problem may have
    min_number: int = 1
    max_number: int = 99
    target_range: tuple[int, int] = (1, 100)  # of generated targets, both ends included
    data: str | None = None  # parquet or JSONL, file or folder, instead of the generator
    question_column: str | None = None  # column of the numbers in `data`; None: nums
    answer_column: str | None = None  # column of the target in `data`; None: target
    n_test: int | None = None  # held-out rows if no file of `data` is held out; None: a tenth, at most 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.numbers = (self.numbers,) if isinstance(self.numbers, int) else tuple(self.numbers)
        if not self.numbers or min(self.numbers) < 1 or max(self.numbers) > 8:
            raise ValueError(f"numbers is {self.numbers}; expected how many numbers a problem has, each from 1 to 8")
        if not 0 <= self.min_number <= self.max_number:
            raise ValueError(f"min_number {self.min_number} and max_number {self.max_number}: expected 0 <= min <= max")
        self._train: list[CountdownRow] = []
        self._test: list[CountdownRow] = []
        if not self.data and (self.question_column or self.answer_column):
            raise ValueError("the columns of a data file are named, but there is none; give data, or leave them out")
        if self.data:
            self._read_data(self.data)
        else:
            self.train_problem(0), self.test_problem(0)  # settings that allow no problem are an error now

    def problem(self, numbers: Sequence[int], target: int) -> Problem:
        """A problem of your own. `numbers`: any sequence or array of integers. The prompt shows [44, 19, 35].

        Raises ValueError for numbers that no expression of the parser can use.
        """
        numbers, target = [_whole_number(n) for n in numbers], _whole_number(target)
        _check_countdown(numbers, target)
        shown = str(numbers)
        question = f"{shown} = {target}"
        if self.prompt_style != "short":
            question = COUNTDOWN_REQUEST.format(numbers=shown, target=target)
        checked_against = {"numbers": numbers, "target": target}
        return Problem(f"countdown {shown} = {target}", self.messages(question), checked_against, self.response_prefix)

    def train_problem(self, index: int) -> Problem:
        if self.data:
            if not self._train:
                raise ValueError(f"{self.data}: no training rows, only held-out ones; rename the file or folder")
            return self.problem(*self._train[shuffled_index(len(self._train), self.seed, index)])
        return self._generate("train", index)

    def test_problem(self, index: int) -> Problem:
        return self.problem(*self._test[index]) if self.data else self._generate("test", index)

    def levels(self) -> dict[str, Task]:
        return {} if self.data else countdown_levels(self)

    def is_correct(self, problem: Problem, answer: str) -> bool:
        """Whether the expression uses each number exactly once and equals the target exactly."""
        try:
            value, used = evaluate_expression(answer)
        except ExpressionError:
            return False
        return sorted(used) == sorted(problem.target["numbers"]) and value == problem.target["target"]

    def _generate(self, split: Split, index: int) -> Problem:
        # The settings are part of no seed: the same seed with another max_number is simply another sequence.
        return self.problem(*draw_problem("countdown", self.seed, split, index, self._draw))

    def _draw(self, generator: random.Random) -> tuple[str, tuple[list[int], int]] | None:
        count = generator.choice(self.numbers)
        numbers = [generator.randint(self.min_number, self.max_number) for _ in range(count)]
        target = _random_result(numbers, generator)
        low, high = self.target_range
        if target is None or not low <= target <= high:
            return None
        return _countdown_key(numbers, target), (numbers, target)

    def _read_data(self, data: str) -> None:
        names = (self.question_column or "nums", self.answer_column or "target")

        def parse(row: Row) -> CountdownRow:
            numbers, target = (row[name] for name in names)
            whole = [*numbers, target] if isinstance(numbers, list) and numbers else [None]
            if not all(isinstance(number, int) and not isinstance(number, bool) for number in whole):
                raise ValueError(f"expected whole numbers in {names[0]} and {names[1]}, found {row!r:.200}")
            _check_countdown(numbers, target)
            return numbers, target

        splits = read_splits(data, names, parse, key=lambda row: _countdown_key(*row), n_test=self.n_test)
        self._train, self._test, self.data_summary = splits.train, splits.test, splits.summary


CountdownRow = tuple[list[int], int]  # numbers, target


def _whole_number(number: Any) -> int:
    """An int from the number type of any array: `np.int64(44)` must not appear in a prompt."""
    if not math.isfinite(number) or int(number) != number:
        raise ValueError(f"a Countdown problem has whole numbers; found {number}")
    return int(number)


def _check_countdown(numbers: list[int], target: int) -> None:
    """Raise ValueError for a problem that no answer can solve because of the parser's rules."""
    if not numbers:
        raise ValueError("a Countdown problem needs at least one number")
    if min(numbers) < 0:
        raise ValueError(f"found the number {min(numbers)}; an answer can only use numbers from 0 up")
    if len(numbers) == 1 and abs(target) != numbers[0]:
        raise ValueError(f"the number {numbers[0]} alone cannot reach the target {target}")
    length = len("+".join(map(str, numbers)))
    if length > MAX_CHARS:
        raise ValueError(f"the numbers need {length} characters; an answer has at most {MAX_CHARS}")


def _countdown_key(numbers: Sequence[int], target: int) -> str:
    return f"{sorted(numbers)} = {target}"


def _random_result(numbers: Sequence[int], generator: random.Random) -> int | None:
    """Value of a random expression over all the numbers, or None if a division has a remainder."""
    values = list(numbers)
    while len(values) > 1:
        a, b = values.pop(generator.randrange(len(values))), values.pop(generator.randrange(len(values)))
        operator = generator.choice("+-*/")
        if operator == "/" and (b == 0 or a % b):
            return None
        values.append(a + b if operator == "+" else a - b if operator == "-" else a * b if operator == "*" else a // b)
    return values[0]


@dataclass(kw_only=True)
class ArithmeticTask(QuestionTask):
    """Questions such as "What is 12 + 7 * 3?" from a seeded generator. One question in ten is held out by its hash."""

    num_terms: tuple[int, ...] = (2, 3)  # how many terms a question may have
    num_digits: tuple[int, ...] = (1, 2)  # how many digits each term has
    mix: tuple[tuple[int, int], ...] | None = None  # pairs (terms, digits) instead of every combination of the two
    operators: str = "+-*"  # with "/", answers are fractions such as 7/2

    def __post_init__(self) -> None:
        super().__post_init__()
        combinations = itertools.product(self.num_terms, self.num_digits) if self.mix is None else self.mix
        self._mix = [cast(tuple[int, int], tuple(pair)) for pair in combinations]
        if not self._mix or any(len(pair) != 2 or min(pair) < 1 or max(pair) > 12 for pair in self._mix):
            raise ValueError(f"arithmetic has (terms, digits) {self._mix}; expected pairs, each number from 1 to 12")
        if not self.operators or set(self.operators) - set("+-*/"):
            raise ValueError(f"operators is {self.operators!r}; expected some of + - * /")
        self.train_problem(0), self.test_problem(0)  # settings that allow no problem are an error now

    def train_problem(self, index: int) -> Problem:
        return self._generate("train", index)

    def test_problem(self, index: int) -> Problem:
        return self._generate("test", index)

    def _generate(self, split: Split, index: int) -> Problem:
        row = self.row(split, index)
        return self.problem_from(row["question"], row["answer"])

    def levels(self) -> dict[str, Task]:
        return arithmetic_levels(self, self._mix)

    def row(self, split: Split, index: int) -> Row:
        """Question number `index` with the keys of a math_tasks.jsonl: question, answer, num_terms, num_digits."""
        return draw_problem("arithmetic", self.seed, split, index, self._draw)

    def _draw(self, generator: random.Random) -> tuple[str, Row]:
        terms, digits = generator.choice(self._mix)
        numbers = [generator.randrange(10 ** (digits - 1), 10**digits) for _ in range(terms)]
        expression = str(numbers[0])
        for number in numbers[1:]:
            expression += f" {generator.choice(self.operators)} {number}"
        question = f"What is {expression}?"
        answer = str(evaluate_expression(expression)[0])
        return question, {"question": question, "answer": answer, "num_terms": terms, "num_digits": digits}


@dataclass(kw_only=True)
class CalculatorTask(Calculator, ArithmeticTask):
    """The questions of ArithmeticTask, with a calculator that a response may call (tasks/calculator.py)."""


TASKS: dict[str, type[Task]] = {
    "countdown": CountdownTask,
    "arithmetic": ArithmeticTask,
    "calculator": CalculatorTask,
    "jsonl": MathDataset,
    "gsm8k": Gsm8kTask,
    "math": MathTask,
}
GYM = "reasoning_gym:"


def make_task(name: str, **options: Any) -> Task:
    """The task of a name in TASKS, of reasoning_gym:NAME, or of path/to/file.py:MyTask, with the options of its class.

    The reward of your own task runs in a worker process (sandbox.py). Raises ValueError or FileNotFoundError, in one
    line, for an unknown name or option, with the nearest known one.
    """
    known = task_options(name)
    for option in options:
        if option not in known:
            raise ValueError(f"task {name} has no option {option}{did_you_mean(option, known)}")
    if name in TASKS:
        return TASKS[name](**options)
    if name.startswith(GYM):
        return ReasoningGymTask(dataset=name.removeprefix(GYM), **options)
    return SandboxedTask(name, options)


def task_options(name: str) -> list[str]:
    """Names of the options that `make_task(name, ...)` takes."""
    if name in TASKS:
        cls = TASKS[name]
    elif name.startswith(GYM):
        cls = ReasoningGymTask
    elif ":" in name or name.endswith(".py"):
        cls = user_task_class(name)
    else:
        names = [*TASKS, GYM + "NAME", "path/to/file.py:MyTask"]
        raise ValueError(f"task {name!r} is not known{did_you_mean(name, names)}")
    return [option for option in inspect.signature(cls).parameters if option != "dataset"]


def task_from_config(config: Any) -> Task:
    """The task `config.task`, with the config's options of the same names that are not None.

    The weights of `config.reward_preset` replace the single ones. `config.reward`, "path/to/file.py:function", replaces
    the task's reward. Your own code is called once, so that its mistakes are errors of one line now.
    """
    known = task_options(config.task)
    _check_data_options(config, known)
    options = {name: getattr(config, name, None) for name in known}
    preset = REWARD_PRESETS.get(getattr(config, "reward_preset", "none"), {})
    options |= {name: weight for name, weight in preset.items() if name in known}
    task = make_task(config.task, **{name: value for name, value in options.items() if value is not None})
    if source := getattr(config, "reward", None):
        task = FunctionReward(task, source)
    if isinstance(task, JudgedInWorker):
        task.check_reward()
    return task


def _check_data_options(config: Any, known: list[str]) -> None:
    """Raise ValueError for data and columns that the task would not read, and for empty names."""
    for name in ("data", "question_column", "answer_column", "reward"):
        value, flag = getattr(config, name, None), "--" + name.replace("_", "-")
        if value is None:
            continue
        if not value.strip():
            raise ValueError(f"{flag} is empty; give a name, or leave {flag} out")
        if name not in known and name != "reward":
            raise ValueError(
                f"task {config.task} reads no file, so {flag} {value} has no effect; take --task jsonl for a file of "
                f"questions and answers, or leave {flag} out"
            )


def write_math_tasks(path: str | Path, n: int = 1000, seed: int = 0) -> None:
    """Write `n` arithmetic questions as JSONL with the keys question, answer, num_terms, num_digits."""
    task = ArithmeticTask(seed=seed)
    Path(path).write_text("".join(json.dumps(task.row("train", i)) + "\n" for i in range(n)), encoding="utf-8")


USAGE = "usage: python math_task.py FILE.jsonl   writes 1,000 arithmetic questions for MathDataset(FILE)"


def main(arguments: list[str]) -> int:
    """Write a file of questions. Returns the exit code: 2 for a mistake, with one line on standard error."""
    if arguments in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    try:
        if len(arguments) != 1 or arguments[0].startswith("-"):
            raise ValueError(USAGE)
        path = home_path(arguments[0])
        if path_exists(path):
            raise ValueError(f"{path} is there already and stays; give the name of a new file")
        write_math_tasks(path)
    except (OSError, ValueError) as error:
        print("math_task.py:", first_line(error), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
