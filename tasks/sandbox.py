"""A function in a process of its own, with a deadline and a memory limit; and a user's task whose reward runs in one.

A reward that hangs, raises, forks or eats memory must not end the run. `signal.alarm` in the training process would not
stop a loop in C, and a thread cannot be killed at all; so the function lives in a child process which is killed, with
everything it started, when the deadline passes, and started again for the next call.

    worker = Worker("tasks.dataset_tasks:math_checker", deadline_s=3.0)
    worker.call("1/2", "0.5")                          # -> True, or raises WorkerError("deadline", ...)

    task = SandboxedTask("my_task.py:MyTask", {"seed": 0}, deadline_s=10.0)
    task.reward(problem, response)                     # -> Reward(nan, {}) where MyTask fails; task.failures counts

The child is started as a program of its own, not forked: a process with threads or a GPU must not be forked, and
multiprocessing's spawn would run the user's script a second time. It contains accidents, not attacks: the child has the
rights of the user who started it. Linux and macOS; the memory limit works on Linux.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from data_types import Message, Problem, Reward
from tasks.task_base import Task, nearest
from tasks.task_files import first_line

START_DEADLINE_S = 120.0  # for the imports of the child: a user's task may import torch from a cold disk
MAX_REPLY_BYTES = 1 << 20
POLL_S = 0.05  # how often a waiting parent looks whether the child still lives


class WorkerError(Exception):
    """A call that gave no value. `kind`: "deadline", "died", "raised", or "start" where there was no child to ask."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


class Worker:
    """Calls one function in a child process, which is started now, and again after it was killed.

    `target` is "module:maker"; the child calls maker(*arguments) once, and the function that gives for every call.
    Arguments of calls are pickled; what comes back is JSON. `deadline_s` is for a call, `memory_gib` for what the child
    may allocate beyond what it holds after its imports. Raises ValueError where the child cannot make its function.
    """

    def __init__(self, target: str, arguments: tuple = (), deadline_s: float = 10.0, memory_gib: float = 4.0):
        if deadline_s <= 0 or memory_gib <= 0:
            raise ValueError(f"deadline_s is {deadline_s} and memory_gib {memory_gib}; expected numbers above 0")
        self.deadline_s = deadline_s
        self._setup = {"target": target, "arguments": arguments, "memory_gib": memory_gib, "path": sys.path}
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._close: Callable[[], None] | None = None
        try:
            self._start()
        except WorkerError as error:
            raise ValueError(f"{target} in its worker: {error}") from error

    def call(self, *arguments: Any) -> Any:
        """The function's value. Raises WorkerError; at "deadline" and "died" the child is killed with its children."""
        if self._process is None:
            self._start()
        try:
            return self._exchange((arguments, math.ceil(self.deadline_s) + 1), self.deadline_s)
        except WorkerError as error:
            if error.kind != "raised":
                self.close()
            raise

    def close(self) -> None:
        """Kill the child and everything it started."""
        if self._close is not None:
            self._close()
        self._process = self._connection = self._close = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            root = Path(__file__).resolve().parent.parent
            code = "import sys; sys.path.insert(0, sys.argv[1]); from tasks.sandbox import main; main()"
            command = [sys.executable, "-c", code, str(root), str(theirs.fileno())]
            # A session of its own: Ctrl-C is the parent's to answer, and the whole group can be killed. What the
            # function prints goes to stderr.
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True, stdout=2)
        self._connection = Connection(ours.detach())
        self._close = weakref.finalize(self, _kill_group, self._process, self._connection)
        try:
            self._exchange(self._setup, START_DEADLINE_S)
        except WorkerError as error:
            self.close()
            raise WorkerError("start", str(error)) from error

    def _exchange(self, message: Any, deadline_s: float) -> Any:
        """Send a message and wait for its reply."""
        try:
            data = pickle.dumps(message)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise WorkerError("raised", f"the problem cannot be sent to a worker ({first_line(error)})") from error
        try:
            self._connection.send_bytes(data)
            self._wait(time.monotonic() + deadline_s, deadline_s)
            reply = json.loads(self._connection.recv_bytes(MAX_REPLY_BYTES))
        except (EOFError, OSError, ValueError) as error:
            raise WorkerError("died", f"the worker is gone ({type(error).__name__})") from error
        if "error" in reply:
            raise WorkerError("raised", reply["error"])
        return reply["value"]

    def _wait(self, until: float, deadline_s: float) -> None:
        # A forked grandchild may hold the connection open when the child is dead: the end of the file is not enough.
        while not self._connection.poll(max(0.0, min(POLL_S, until - time.monotonic()))):
            if self._process.poll() is not None and not self._connection.poll(0):
                raise WorkerError("died", f"the worker ended with exit status {self._process.returncode}")
            if time.monotonic() >= until:
                raise WorkerError("deadline", f"no value within {deadline_s:g} s")


def _kill_group(process: subprocess.Popen, connection: Connection) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: PermissionError where only zombies are left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()


# --- a user's task


class SandboxedTask(Task):
    """A user's task, "path/to/file.py:Class", whose reward and diagnostics run in a worker.

    The problems are made in this process, where an error should end the run: it comes before a minute was spent. A
    reward that passes the deadline, raises, or dies is NaN, counted in `failures` by its kind, and warned about once.
    """

    def __init__(self, source: str, options: dict[str, Any] | None = None, deadline_s: float = 10.0, memory_gib=4.0):
        self.task = load_user_task(source, options or {})
        self.source = source
        self.failures: Counter[str] = Counter()
        self._worker = Worker("tasks.sandbox:user_judge", (source, options or {}), deadline_s, memory_gib)
        self._diagnostics: dict[tuple[str, str], dict[str, float]] = {}  # of responses whose reward was asked for
        for field in dataclasses.fields(Task):  # seed, weights, prompt style: those of the user's task
            setattr(self, field.name, getattr(self.task, field.name))

    def train_problem(self, index: int) -> Problem:
        return self.task.train_problem(index)

    def test_problem(self, index: int) -> Problem:
        return self.task.test_problem(index)

    def problems(self, split, n: int, start: int = 0) -> list[Problem]:
        return self.task.problems(split, n, start)

    def longest_problems(self, n: int) -> list[Problem]:
        return self.task.longest_problems(n)

    def prompt(self, problem: Problem) -> list[Message]:
        return self.task.prompt(problem)

    def reward(self, problem: Problem, response: str) -> Reward:
        """The user's reward, or Reward(nan, {}) where it gives none."""
        try:
            total, parts, diagnostics = self._worker.call(problem, response)
        except WorkerError as error:
            self.failures[error.kind] += 1
            if self.failures[error.kind] == 1:
                line = f"reward of {self.source} for problem {problem.id}: {error}; counted as NaN, the run goes on"
                warnings.warn(line, RuntimeWarning, stacklevel=2)
            total, parts, diagnostics = math.nan, {}, {}
        if len(self._diagnostics) > 10_000:
            self._diagnostics.clear()  # nobody asks for them
        self._diagnostics[problem.id, response] = diagnostics
        return Reward(total, parts)

    def diagnostics(self, problem: Problem, response: str) -> dict[str, float]:
        """The user's diagnostics: those that came with the reward, if it was asked for."""
        if (problem.id, response) not in self._diagnostics:
            self.reward(problem, response)
        return self._diagnostics.pop((problem.id, response))


def load_user_task(source: str, options: dict[str, Any]) -> Task:
    """Make the task "path/to/file.py:Class". Raises FileNotFoundError or ValueError, in one line."""
    cls = user_task_class(source)
    try:
        return cls(**options)
    except Exception as error:  # a stranger's constructor may raise anything; it becomes one line
        raise ValueError(f"{source}: making the task raised {type(error).__name__}: {first_line(error)}") from error


def user_task_class(source: str) -> type[Task]:
    """The class named by "path/to/file.py:Class"."""
    file, colon, name = source.rpartition(":")
    path = Path(file).expanduser()
    if not colon or path.suffix != ".py":
        raise ValueError(f"{source}: expected path/to/file.py:MyTask")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file (looked in {Path.cwd()}); a task of your own is path/to/file.py:MyTask"
        )
    found = {key: value for key, value in vars(_user_module(path.resolve())).items() if isinstance(value, type)}
    tasks = {key: cls for key, cls in found.items() if issubclass(cls, Task)}
    if name not in tasks:
        what = "is no subclass of task_base.Task" if name in found else f"no class {name}{nearest(name, tasks)}"
        raise ValueError(f"{source}: {what}")
    return tasks[name]


def _user_module(path: Path) -> Any:
    name = f"user_task_{path.stem}"
    if name in sys.modules and Path(sys.modules[name].__file__) == path:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # so that the file can import its neighbours
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a stranger's file may raise anything; it becomes one line
        del sys.modules[name]
        raise ValueError(f"{path}: importing it raised {type(error).__name__}: {first_line(error)}") from error
    return module


# --- inside the child


def user_judge(source: str, options: dict[str, Any]) -> Callable[[Problem, str], tuple]:
    """Runs in the worker: reward and diagnostics of a user's task, checked."""
    task = load_user_task(source, options)

    def judge(problem: Problem, response: str) -> tuple[float, dict[str, float], dict[str, float]]:
        reward = task.reward(problem, response)
        if not isinstance(reward, Reward):
            raise TypeError(f"reward returned {type(reward).__name__}, expected Reward(total, parts)")
        total, parts = float(reward.total), {str(name): float(value) for name, value in reward.parts.items()}
        if math.isinf(total):
            raise ValueError(f"reward returned a total of {total}")
        diagnostics = task.diagnostics(problem, response)
        return total, parts, {str(name): float(value) for name, value in diagnostics.items()}

    return judge


def serve(connection: Connection) -> None:
    """The child's life: make the function, then answer until the parent closes the connection."""
    setup = pickle.loads(connection.recv_bytes())
    sys.path[:] = setup["path"]
    module, _, maker = setup["target"].partition(":")
    try:
        function = getattr(importlib.import_module(module), maker)(*setup["arguments"])
    except Exception as error:  # whatever it raises, the parent is told
        return connection.send_bytes(_error(error))
    connection.send_bytes(b'{"value": null}')
    _limit_memory(setup["memory_gib"])
    own_pid = os.getpid()
    while True:
        arguments, alarm_s = pickle.loads(connection.recv_bytes())
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(alarm_s)  # ends this process where the parent was killed and nobody else will
        try:
            reply = json.dumps({"value": function(*arguments)}).encode()
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # whatever a stranger's function raises
            reply = _error(error)
        if os.getpid() != own_pid:
            os._exit(0)  # the function forked and both came back
        signal.alarm(0)
        connection.send_bytes(reply)


def _error(error: BaseException) -> bytes:
    return json.dumps({"error": f"{type(error).__name__}: {first_line(error)}"}).encode()


def _limit_memory(gib: float) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():  # Linux: the limit is of address space, of which the imports have taken a share already
        held = int(statm.read_text().split()[0]) * resource.getpagesize()
        limit = held + int(gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    """Runs in the child: serve the connection whose file number is the last argument."""
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        serve(Connection(int(sys.argv[-1])))
