"""Your own task or reward, whose code runs in a worker process (worker.py) while the run is safe from it.

    task = SandboxedTask("my_task.py:MyTask", {"seed": 0}, deadline_s=10.0)       # --task my_task.py:MyTask
    task = FunctionReward(Gsm8kTask(), "my_reward.py:length", deadline_s=10.0)    # --reward my_reward.py:length
    task.reward(problem, response)                 # -> Reward(nan, {}) if your code fails, counted in task.failures

docs/your-own.md shows both from the user's side.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from data_types import Message, Problem, Reward, Turn
from tasks.calculator import ERROR, result
from tasks.messages import first_line
from tasks.metric_names import TASK_DIAGNOSTICS, check_names
from tasks.rewards import answer_block, whole_text
from tasks.task_base import Split, Task, check_stop_strings
from tasks.user_files import load_user_task, reward_function
from tasks.worker import RefusedError, Worker, WorkerError

REMEMBERED = 50_000  # responses whose diagnostics wait to be asked for
OWN_PARTS = frozenset(["format", "answer", "language", "repetition", "arithmetic", "custom"])  # beside a function's
TRIAL = " trial </think>\n<answer> trial </answer>"

Judged = tuple[float, dict[str, float], dict[str, float]]  # total, parts, diagnostics


class JudgedInWorker(Task):
    """A task with the problems of `task`, whose reward comes from a worker.

    A reward that passes the deadline, raises, or ends its process is NaN. `failures` counts it by its kind, and the
    first of each kind is a warning.
    """

    def __init__(self, task: Task, source: str, worker: Worker):
        self.task, self.source, self._worker = task, source, worker
        self.failures: Counter[str] = Counter()
        for field in dataclasses.fields(Task):  # seed, weights, prompt style
            setattr(self, field.name, getattr(task, field.name))
        self.stop_strings = check_stop_strings(task.stop_strings)  # type: ignore[misc]  # a class variable of Task
        if not worker.memory_limited:
            warnings.warn(f"{source}: this system cannot limit the memory of a reward", RuntimeWarning, stacklevel=3)

    def train_problem(self, index: int) -> Problem:
        return self.task.train_problem(index)

    def test_problem(self, index: int) -> Problem:
        return self.task.test_problem(index)

    def problems(self, split: Split, n: int, start: int = 0) -> list[Problem]:
        return self.task.problems(split, n, start)

    def longest_problems(self, n: int) -> list[Problem]:
        return self.task.longest_problems(n)

    def levels(self) -> dict[str, Task]:
        return self.task.levels()

    def prompt(self, problem: Problem) -> list[Message]:
        return self.task.prompt(problem)

    def part_weights(self) -> dict[str, float]:
        return self.task.part_weights()

    def check_reward(self) -> None:
        """Ask for one reward before time is spent. Raises ValueError for a mistake that every call would repeat."""
        try:
            self._worker.call((self.problems("test", 1) or self.problems("train", 1))[0], TRIAL)
        except WorkerError as error:
            if error.kind == "refused":
                raise ValueError(f"reward of {self.source}: {error.detail}") from error
            line = f"reward of {self.source} for the trial response {TRIAL!r}: {error}; such a response has no reward"
            warnings.warn(line, RuntimeWarning, stacklevel=2)

    def _ask(self, problem: Problem, response: str | list[Turn]) -> Judged | None:
        try:
            total, parts, diagnostics = self._worker.call(problem, response)
        except WorkerError as error:
            self._failed("reward", problem, error, "counted as NaN")
            return None
        return total, parts, diagnostics

    def _failed(self, method: str, problem: Problem, error: WorkerError, consequence: str) -> None:
        kind = error.kind if method == "reward" else f"{method} {error.kind}"
        self.failures[kind] += 1
        if self.failures[kind] == 1:
            line = f"{method} of {self.source} for problem {problem.id}: {error}; {consequence}, the run goes on"
            warnings.warn(line, RuntimeWarning, stacklevel=4)


class SandboxedTask(JudgedInWorker):
    """A user's task, "path/to/file.py:Class". Its reward and diagnostics run in a worker, one call for each response.

    The problems are made in this process, and an error there ends the run with one line.
    Raises FileNotFoundError or ValueError, in one line, for a task that is not there or not complete.
    """

    def __init__(
        self, source: str, options: dict[str, Any] | None = None, deadline_s: float = 10.0, memory_gib: float = 4.0
    ):
        task = load_user_task(source, options or {})
        worker = Worker("tasks.sandbox:user_judge", (source, options or {}), deadline_s, memory_gib)
        super().__init__(task, source, worker)
        self._diagnostics: OrderedDict[tuple[str, str], dict[str, float]] = OrderedDict()
        self.problems("train", 1), self.problems("test", 1)  # an error there ends the program now

    def train_problem(self, index: int) -> Problem:
        return self._made("train_problem", index)

    def test_problem(self, index: int) -> Problem:
        return self._made("test_problem", index)

    def problems(self, split: Split, n: int, start: int = 0) -> list[Problem]:
        if type(self.task).problems is Task.problems:
            return Task.problems(self, split, n, start)  # an error names the user's own method
        return self._made("problems", split, n, start)

    def longest_problems(self, n: int) -> list[Problem]:
        return self._made("longest_problems", n)

    def _made(self, method: str, *arguments: Any) -> Any:
        """Problems of the user's task. Raises ValueError, in one line, for everything that is wrong with them."""
        call = f"{method}({', '.join(map(repr, arguments))})"
        try:
            made = getattr(self.task, method)(*arguments)
        except IndexError as error:
            if method == "test_problem":
                raise  # no more held-out problems
            raise ValueError(f"{self.source}: {call} raised IndexError: {first_line(error)}") from error
        except Exception as error:  # a user's method may raise anything
            raise ValueError(f"{self.source}: {call} raised {type(error).__name__}: {first_line(error)}") from error
        for problem in made if isinstance(made, list) else [made]:
            wrong = _wrong_problem(problem)
            if wrong:
                raise ValueError(f"{self.source}: {call} returned {wrong}")
        return made

    def check_reward(self) -> None:
        """Ask for one observation as well, if the task has a tool."""
        super().check_reward()
        if self.stop_strings:
            problem = (self.problems("test", 1) or self.problems("train", 1))[0]
            try:
                self._worker.call(problem, TRIAL + self.stop_strings[0], "respond")
            except WorkerError as error:
                if error.kind == "refused":
                    raise ValueError(f"respond of {self.source}: {error.detail}") from error
                line = f"respond of {self.source} for the trial response {TRIAL!r}: {error}; its result is an error"
                warnings.warn(line, RuntimeWarning, stacklevel=2)

    def respond(self, problem: Problem, text_so_far: str) -> str | None:
        """The observation of the user's task. If it fails, the observation is an error, and the response goes on."""
        try:
            return self._worker.call(problem, text_so_far, "respond")
        except WorkerError as error:
            self._failed("respond", problem, error, "the result is an error")
            late = error.kind == "deadline"
            return result(ERROR + (f"no result within {self._worker.deadline_s:g} s" if late else "the tool failed"))

    def reward(self, problem: Problem, response: str) -> Reward:
        """The user's reward, or Reward(nan, {}) if it fails."""
        return self._judge(problem, response, response)

    def reward_turns(self, problem: Problem, turns: Sequence[Turn]) -> Reward:
        """The user's reward of a response with a tool, or Reward(nan, {}) if it fails."""
        return self._judge(problem, list(turns), "".join(turn.text for turn in turns))

    def _judge(self, problem: Problem, judged: str | list[Turn], response: str) -> Reward:
        total, parts, diagnostics = self._ask(problem, judged) or (math.nan, {}, {})
        self._diagnostics[problem.id, response] = diagnostics
        if len(self._diagnostics) > REMEMBERED:
            self._diagnostics.popitem(last=False)
        return Reward(total, parts)

    def diagnostics(self, problem: Problem, response: str) -> dict[str, float]:
        """The user's diagnostics. They come with the reward, so the reward of a response is called once."""
        if (problem.id, response) not in self._diagnostics:
            self.reward(problem, response)
        return self._diagnostics[problem.id, response]


class FunctionReward(JudgedInWorker):
    """A task with a function of the user as reward, "path/to/file.py:function".

    The function's value is the reward and its part `custom`. The parts of the task itself, `format` and `answer`, are
    logged and not rewarded, so `solved` and pass@k keep their meaning.
    """

    def __init__(self, task: Task, source: str, deadline_s: float = 10.0, memory_gib: float = 4.0):
        reward_function(source)  # a mistake is an error of one line here
        super().__init__(task, source, Worker("tasks.sandbox:function_judge", (source,), deadline_s, memory_gib))

    def is_correct(self, problem: Problem, answer: str) -> bool:
        return self.task.is_correct(problem, answer)

    def score(self, problem: Problem, answer: str) -> float:
        return self.task.score(problem, answer)

    def reward(self, problem: Problem, response: str) -> Reward:
        """The function's reward, or Reward(nan, {}) if it fails."""
        judged = self._ask(problem, response)
        if judged is None:
            return Reward(math.nan, {})
        own = self.task.reward(problem, response).parts
        return Reward(judged[0], own | judged[1] | own)  # the task's parts come first, and stay

    def respond(self, problem: Problem, text_so_far: str) -> str | None:
        return self.task.respond(problem, text_so_far)

    def reward_turns(self, problem: Problem, turns: Sequence[Turn]) -> Reward:
        """The function's reward of the whole text, with the parts of the task's reward of the turns."""
        judged = self._ask(problem, "".join(turn.text for turn in turns))
        if judged is None:
            return Reward(math.nan, {})
        own = self.task.reward_turns(problem, turns).parts
        return Reward(judged[0], own | judged[1] | own)

    def diagnostics(self, problem: Problem, response: str) -> dict[str, float]:
        return self.task.diagnostics(problem, response)


def _wrong_problem(problem: Any) -> str | None:
    """The fault of a value that a user's method returned as a problem. None: it is a problem."""
    if not isinstance(problem, Problem):
        return f"{type(problem).__name__}, expected Problem(id, messages, target)"
    if not isinstance(problem.id, str) or not isinstance(problem.response_prefix, str):
        return "a Problem whose id or response_prefix is no text"
    messages = problem.messages if isinstance(problem.messages, list) else []
    texts = [
        message.get(key) if isinstance(message, dict) else None for message in messages for key in ("role", "content")
    ]
    if not messages or not all(isinstance(text, str) for text in texts):
        return 'a Problem whose messages are no list of {"role": "user", "content": text}'
    try:
        "".join([problem.id, problem.response_prefix, *map(str, texts)]).encode()
    except UnicodeEncodeError:
        return "a Problem with half of a character (a lone surrogate) in its text"
    return None


# --- inside the child


def user_judge(source: str, options: dict[str, Any]) -> Callable[..., Judged | str | None]:
    """Runs in the worker: the methods of a user's task, checked. (problem, response or turns) gives reward and
    diagnostics, (problem, text_so_far, "respond") gives an observation."""
    task = load_user_task(source, options)
    task.reward = _once(task.reward)  # type: ignore[assignment, method-assign]
    task.is_correct = _yes_or_no(task.is_correct)  # type: ignore[assignment, method-assign]

    def respond(problem: Problem, text_so_far: str) -> str | None:
        text = task.respond(problem, text_so_far)
        if text is not None and not isinstance(text, str):
            raise RefusedError(f"it returned {type(text).__name__}, expected text or None")
        (text or "").encode()  # a lone surrogate raises here
        return text

    def judge(problem: Problem, response: str | list[Turn], method: str = "reward") -> Judged | str | None:
        try:
            if method == "respond":
                return respond(problem, str(response))
            if isinstance(response, str):
                reward = task.reward(problem, response)
            else:
                reward = task.reward_turns(problem, response)
                response = "".join(turn.text for turn in response)
                task._judged = problem, response, reward  # type: ignore[misc]  # for its diagnostics
            if not isinstance(reward, Reward):
                raise RefusedError(f"it returned {type(reward).__name__}, expected Reward(total, parts)")
            total, parts = _checked(reward)
            diagnostics = _numbers("diagnostic", task.diagnostics(problem, response), allowed=TASK_DIAGNOSTICS)
            for name, value in Task.diagnostics(task, problem, response).items():
                if diagnostics.get(name, value) != value:
                    raise RefusedError(
                        f"the diagnostic {name} is the run's own; choose another name, or return the reward part "
                        "answer, 1.0 for a solved problem"
                    )
        except NotImplementedError as error:
            raise RefusedError(first_line(error)) from error
        return total, parts, diagnostics

    return judge


def function_judge(source: str) -> Callable[[Problem, str], Judged]:
    """Runs in the worker: the value of a user's reward function, checked."""
    function = reward_function(source)

    def judge(problem: Problem, response: str) -> Judged:
        answer = answer_block(whole_text(problem, response))
        value = function({"problem": problem, "response": response, "answer": answer, "target": problem.target})
        if not isinstance(value, Reward):
            value = Reward(_number("reward", value), {})
        total, parts = _checked(value)
        for name in OWN_PARTS & parts.keys():
            raise RefusedError(f"the reward part {name} is the task's own; choose another name")
        return total, {**parts, "custom": total}, {}

    return judge


def _once(reward: Callable[[Problem, str], Reward]) -> Callable[[Problem, str], Reward]:
    """The same function, which is not called a second time for the same problem and response: diagnostics ask again."""
    last: list[Any] = [None, None, None]

    def once(problem: Problem, response: str) -> Reward:
        if last[0] is not problem or last[1] != response:
            last[:] = problem, response, reward(problem, response)
        return last[2]

    return once


def _yes_or_no(is_correct: Callable[[Problem, str], Any]) -> Callable[[Problem, str], Any]:
    """The same function, which refuses None and text: a forgotten `return` would else fail for every answer."""

    def checked(problem: Problem, answer: str) -> Any:
        value = is_correct(problem, answer)
        if value is None or isinstance(value, str | bytes):
            raise RefusedError(f"is_correct returned {type(value).__name__}, expected True or False")
        return value

    return checked


def _checked(reward: Reward) -> tuple[float, dict[str, float]]:
    total = _number("total", reward.total)
    if math.isinf(total):
        raise ValueError(f"reward returned a total of {total}")
    return total, _numbers("reward part", reward.parts)


def _numbers(kind: str, values: Any, allowed: frozenset[str] = frozenset()) -> dict[str, float]:
    if not isinstance(values, dict):
        raise RefusedError(f"{kind}s are {type(values).__name__}, expected a dict of numbers")
    try:
        check_names(kind, [name for name in values if name not in allowed])
    except ValueError as error:
        raise RefusedError(str(error)) from error
    return {name: _number(f"{kind} {name}", value) for name, value in values.items()}


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise RefusedError(f"{name} is {type(value).__name__}, expected a number") from error
