"""Tasks with verifiable answers: what is asked, and what a response earns.

    task    = CountdownTask(numbers=(3, 4), max_number=99, seed=0)
    problem = task.problem([3, 5, 2], target=13)             # or task.train_problem(7), task.test_problems(512)
    reward  = task.reward(problem, " 3 + 5 * 2 = 13 </think>\n<answer> 3 + 5 * 2 </answer>")
    reward                                                   # Reward(total=1.1, parts={"format": 1.0, "answer": 1.0})

Countdown: reach the target with + - * / and parentheses, using every number exactly once. Reward, prompt and response
prefix are those of the GRPO-Zero / NanoGRPO lineage: 0.1 * format + answer. It departs in how an answer is judged:
parsed and computed in exact fractions, never by `eval` (expressions.py says which expressions count); and in where it
is looked for: behind the thought only (rewards.py says the rule). The prompt's own example, (1 + 2) / 3, is judged as
any other answer: right for the numbers 1, 2, 3 and target 1, and for nothing else. "3 + 5 * 2 = 13" is an equation, not
an expression, and earns no answer reward, as in the lineage.

    make_task("arithmetic", num_terms=(2,))                  # by name: see TASKS
    make_task("reasoning_gym:chain_sum")                     # pip install reasoning-gym
    make_task("path/to/file.py:MyTask")                      # your own; task_base.py shows what it needs

Its other files: task_base.py, what a task is; expressions.py, the parser; rewards.py, format and the answer's place;
dataset_tasks.py, GSM8K, MATH, JSONL, reasoning-gym; sandbox.py, the worker for your own reward; task_files.py, reading.

`python math_task.py math_tasks.jsonl` writes a file of arithmetic questions for `MathDataset("math_tasks.jsonl")`.
"""

from __future__ import annotations

import inspect
import itertools
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_types import Problem
from tasks.curriculum import arithmetic_levels, countdown_levels
from tasks.dataset_tasks import Gsm8kTask, MathDataset, MathTask, ReasoningGymTask
from tasks.expressions import ExpressionError, evaluate_expression, false_sums, plain_number
from tasks.rewards import REWARD_PRESETS, answer_block, format_reward, soft_overlong_penalty
from tasks.sandbox import SandboxedTask, user_task_class
from tasks.task_base import TAG_REQUEST, QuestionTask, Split, Task, draw_problem, nearest, shuffled_index
from tasks.task_files import Row, hold_out_last, read_rows

__all__ = [
    "REWARD_PRESETS",
    "TASKS",
    "ArithmeticTask",
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
    """Countdown problems from a seeded generator, or from the field's parquet data set (columns `nums`, `target`).

    Generated problems are solvable by construction, and one in ten is held out by a hash of (sorted numbers, target).
    Of a data set the last `n_test` rows are held out, and training rows that repeat one of them are left out.
    Raises ValueError or FileNotFoundError, in one line, for settings or data that cannot work.
    """

    numbers: tuple[int, ...] = (3, 4)  # how many numbers a problem may have
    min_number: int = 1
    max_number: int = 99
    target_range: tuple[int, int] = (1, 100)  # of generated targets, both ends included
    data: str | None = None  # parquet or JSONL, file or folder, instead of the generator
    n_test: int | None = None  # held-out rows of `data`; None: a tenth, at most 128

    def __post_init__(self):
        super().__post_init__()
        self.numbers = (self.numbers,) if isinstance(self.numbers, int) else tuple(self.numbers)
        if not self.numbers or min(self.numbers) < 1 or max(self.numbers) > 8:
            raise ValueError(f"numbers is {self.numbers}; expected how many numbers a problem has, each from 1 to 8")
        if not 0 <= self.min_number <= self.max_number:
            raise ValueError(f"min_number {self.min_number} and max_number {self.max_number}: expected 0 <= min <= max")
        self._train, self._test = self._read_data() if self.data else ([], [])
        if not self.data:
            self.train_problem(0), self.test_problem(0)  # settings that leave no problem are told now

    def problem(self, numbers: Sequence[int], target: int) -> Problem:
        """A problem of your own. `numbers`: any sequence or array of integers; the prompt reads [44, 19, 35]."""
        numbers, target = [_whole_number(n) for n in numbers], _whole_number(target)
        if not numbers:
            raise ValueError("a Countdown problem needs at least one number")
        shown = str(numbers)
        question = f"{shown} = {target}"
        if self.prompt_style != "short":
            question = COUNTDOWN_REQUEST.format(numbers=shown, target=target)
        checked_against = {"numbers": numbers, "target": target}
        return Problem(f"countdown {shown} = {target}", self.messages(question), checked_against, self.response_prefix)

    def train_problem(self, index: int) -> Problem:
        if self.data:
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

    def _read_data(self) -> tuple[list[tuple], list[tuple]]:
        rows = read_rows(self.data, ("nums", "target"))
        for number, row in enumerate(rows):
            if not _is_countdown_row(row):
                raise ValueError(
                    f"{self.data}, row {number}: expected whole numbers in nums and target, found {row}"[:300]
                )
        train, test = hold_out_last(rows, self.n_test, self.data)
        held_out = {_countdown_key(row["nums"], row["target"]) for row in test}
        kept = [row for row in train if _countdown_key(row["nums"], row["target"]) not in held_out]
        if not kept:
            raise ValueError(
                f"{self.data}: every training row repeats a held-out one; give more rows or a smaller n_test"
            )
        return [(row["nums"], row["target"]) for row in kept], [(row["nums"], row["target"]) for row in test]


def _whole_number(number: Any) -> int:
    """An int from whatever array type a number came in (CHECKLIST 41: `np.int64(44)` has no place in a prompt)."""
    if int(number) != number:
        raise ValueError(f"a Countdown problem has whole numbers; found {number}")
    return int(number)


def _is_countdown_row(row: Row) -> bool:
    nums, target = row["nums"], row["target"]
    numbers = [*nums, target] if isinstance(nums, list) and nums else [None]
    return all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)


def _countdown_key(numbers: Sequence[int], target: int) -> str:
    return f"{sorted(numbers)} = {target}"


def _random_result(numbers: Sequence[int], generator: random.Random) -> int | None:
    """Value of a random expression over all the numbers, or None where a division does not come out even."""
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
    """Questions such as "What is 12 + 7 * 3?" from a seeded generator; one question in ten is held out by its hash."""

    num_terms: tuple[int, ...] = (2, 3)  # how many terms a question may have
    num_digits: tuple[int, ...] = (1, 2)  # how many digits each of them has
    mix: tuple[tuple[int, int], ...] | None = None  # pairs (terms, digits) instead of every combination of the two
    operators: str = "+-*"  # "/" may be among them; answers are then fractions such as 7/2

    def __post_init__(self):
        super().__post_init__()
        combinations = itertools.product(self.num_terms, self.num_digits) if self.mix is None else self.mix
        self._mix = [tuple(pair) for pair in combinations]
        if not self._mix or any(len(pair) != 2 or min(pair) < 1 or max(pair) > 12 for pair in self._mix):
            raise ValueError(f"arithmetic has (terms, digits) {self._mix}; expected pairs, each number from 1 to 12")
        if not self.operators or set(self.operators) - set("+-*/"):
            raise ValueError(f"operators is {self.operators!r}; expected some of + - * /")
        self.train_problem(0), self.test_problem(0)  # settings that leave no problem are told now

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


TASKS: dict[str, type[Task]] = {
    "countdown": CountdownTask,
    "arithmetic": ArithmeticTask,
    "jsonl": MathDataset,
    "gsm8k": Gsm8kTask,
    "math": MathTask,
}
GYM = "reasoning_gym:"


def make_task(name: str, **options: Any) -> Task:
    """The task of a name in TASKS, of reasoning_gym:NAME, or of path/to/file.py:MyTask, with the options of its class.

    The reward of a task of your own runs in a worker process (sandbox.py). Raises ValueError or FileNotFoundError, in
    one line, for an unknown name or option, the nearest known one beside it.
    """
    known = task_options(name)
    for option in options:
        if option not in known:
            raise ValueError(f"task {name} has no option {option}{nearest(option, known)}")
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
        raise ValueError(f"task {name!r} is not known{nearest(name, names)}")
    return [option for option in inspect.signature(cls).parameters if option != "dataset"]


def task_from_config(config: Any) -> Task:
    """The task `config.task`, with those of its options that the config has under the same name and are not None.

    The weights of `config.reward_preset` take the place of the single ones.
    """
    known = task_options(config.task)
    options = {name: getattr(config, name, None) for name in known}
    preset = REWARD_PRESETS.get(getattr(config, "reward_preset", "none"), {})
    options |= {name: weight for name, weight in preset.items() if name in known}
    return make_task(config.task, **{name: value for name, value in options.items() if value is not None})


def write_math_tasks(path: str | Path, n: int = 1000, seed: int = 0) -> None:
    """Write `n` arithmetic questions as JSONL with the keys question, answer, num_terms, num_digits."""
    task = ArithmeticTask(seed=seed)
    Path(path).write_text("".join(json.dumps(task.row("train", i)) + "\n" for i in range(n)), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python math_task.py FILE.jsonl   writes 1,000 arithmetic questions for MathDataset(FILE)")
    write_math_tasks(sys.argv[1])
