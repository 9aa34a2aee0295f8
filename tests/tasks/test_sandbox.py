"""A user's reward may hang, raise, fork, crash or eat memory: the run goes on, and the failure is counted."""

import math
import os
import sys
import time
import warnings
from pathlib import Path

import pytest

from math_task import make_task
from tasks.sandbox import SandboxedTask, Worker, WorkerError

USER_TASK = """
import ctypes, os, time
from dataclasses import dataclass
from data_types import Problem, Reward
from tasks.task_base import Task
import neighbour

@dataclass(kw_only=True)
class MyTask(Task):
    bonus: float = 0.0

    def train_problem(self, index):
        return Problem(f"p{index}", [{"role": "user", "content": "hi"}], index)

    test_problem = train_problem

    def reward(self, problem, response):
        name, _, argument = response.partition(" ")
        return getattr(self, "do_" + name)(argument)

    def do_pay(self, argument):
        return Reward(float(argument) + self.bonus, {"mine": neighbour.ONE})

    def do_hang(self, argument):
        time.sleep(100)

    def do_compute(self, argument):
        return 9**9**9  # in C, holding the interpreter's lock: no signal handler and no thread would get a turn

    def do_raise(self, argument):
        raise RuntimeError("first line\\nsecond line")

    def do_exit(self, argument):
        raise SystemExit(3)

    def do_vanish(self, argument):
        os._exit(3)

    def do_crash(self, argument):
        ctypes.string_at(0)

    def do_eat(self, argument):
        return Reward(float(len(bytearray(8 << 30))), {})

    def do_fork(self, argument):
        open(argument, "a").write(f"{os.getpid()}\\n")
        os.fork()
        os.fork()
        return Reward(2.0, {})

    def do_forkhang(self, argument):
        os.fork()
        with open(argument, "a") as file:
            file.write(f"{os.getpid()}\\n")
        time.sleep(100)

    def do_print(self, argument):
        print("a user prints")
        return Reward(1.0, {})

    def do_text(self, argument):
        return "1.0"

    def do_infinite(self, argument):
        return Reward(float("inf"), {})

    def do_flood(self, argument):
        return Reward(1.0, {f"part {i}": 0.0 for i in range(100_000)})

class NoTask:
    pass
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "neighbour.py").write_text("ONE = 1.0\n")
    (folder / "mine.py").write_text(USER_TASK)
    return f"{folder / 'mine.py'}:MyTask"


@pytest.fixture(scope="module")
def task(source):
    return SandboxedTask(source, {"bonus": 0.5}, deadline_s=1.0, memory_gib=1.0)


def reward(task, response):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return task.reward(task.train_problem(0), response)


def test_a_good_reward_comes_through(task):
    assert reward(task, "pay 1.5") == (2.0, {"mine": 1.0})
    assert task.train_problem(7).target == 7
    assert [p.id for p in task.test_problems(2)] == ["p0", "p1"]
    assert reward(task, "print") == (1.0, {})  # what it prints does not disturb the replies


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        ("hang", "deadline"),
        ("compute", "deadline"),
        ("raise", "raised"),
        ("exit", "raised"),
        ("unknown", "raised"),
        ("text", "raised"),
        ("infinite", "raised"),
        ("vanish", "died"),
        ("crash", "died"),
        ("flood", "died"),
        pytest.param("eat", "raised", marks=pytest.mark.skipif(sys.platform != "linux", reason="limit works on Linux")),
    ],
)
def test_a_failing_reward_is_nan_and_counted_and_the_next_one_works(task, response, kind):
    before, start = task.failures[kind], time.monotonic()
    total, parts = reward(task, response)
    assert math.isnan(total)
    assert parts == {}
    assert task.failures[kind] == before + 1
    assert task.diagnostics(task.train_problem(0), response) == {}
    assert reward(task, "pay 1") == (1.5, {"mine": 1.0})
    assert time.monotonic() - start < 10


def test_each_kind_of_failure_is_told_once_in_one_line(source):
    task = SandboxedTask(source)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            task.reward(task.train_problem(0), "raise")
    lines = [str(warning.message) for warning in told]
    assert len(lines) == 1
    assert lines[0].startswith(f"reward of {source} for problem p0: raised: RuntimeError: first line;")
    assert "\n" not in lines[0]
    assert task.failures == {"raised": 3}


def test_a_fork_that_comes_back_answers_once(task, tmp_path):
    assert reward(task, f"fork {tmp_path / 'a'}") == (2.0, {})
    for value in range(5):  # a second reply would be taken for the next one's
        assert reward(task, f"pay {value}") == (value + 0.5, {"mine": 1.0})


def test_what_a_reward_started_is_killed_with_it(task, tmp_path):
    assert math.isnan(reward(task, f"forkhang {tmp_path / 'pids'}").total)
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    until = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"  # a zombie only waits


def test_the_worker_goes_when_its_owner_does(source):
    task = SandboxedTask(source)
    pid = task._worker._process.pid
    assert alive(pid)
    del task
    assert not alive(pid)


def test_diagnostics_come_with_the_reward(task):
    problem = task.train_problem(0)
    task.reward(problem, "pay 3")
    assert task.diagnostics(problem, "pay 3") == {"solved": 0.0, "sums": 0.0, "false_sums": 0.0}
    assert task.diagnostics(problem, "pay 4")["solved"] == 0.0  # also where the reward was never asked for


def test_make_task_puts_a_user_task_in_a_sandbox(source):
    task = make_task(source, bonus=1.0, format_weight=0.5, seed=3)
    assert type(task) is SandboxedTask
    assert reward(task, "pay 1").total == 2.0
    assert (task.seed, task.format_weight, task.answer_weight) == (3, 0.5, 1.0)
    with pytest.raises(ValueError, match=r"has no option bonuss; did you mean bonus\?"):
        make_task(source, bonuss=1.0)


def test_mistakes_in_a_user_file_are_one_line(source, tmp_path):
    """CHECKLIST 46."""
    file = source.removesuffix(":MyTask")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("raise KeyError('x\\ny')\n")
    (tmp_path / "init.py").write_text(
        "from tasks.task_base import Task\nclass T(Task):\n    def __init__(self):\n        raise OSError('no disk')\n"
    )
    for name, message in {
        f"{file}:MyTaks": "no class MyTaks; did you mean MyTask?",
        f"{file}:NoTask": "is no subclass of task_base.Task",
        f"{file}": "expected path/to/file.py:MyTask",
        f"{tmp_path}/none.py:T": "no such file",
        f"{tmp_path}/broken.py:T": "importing it raised SyntaxError",
        f"{tmp_path}/raises.py:T": "importing it raised KeyError",
        f"{tmp_path}/init.py:T": "making the task raised OSError: no disk",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            make_task(name)
        assert message in str(error.value), name
        assert "\n" not in str(error.value)


def test_a_worker_that_cannot_start_says_so():
    with pytest.raises(ValueError, match="no_such_module:f in its worker: start: raised: ModuleNotFoundError"):
        Worker("no_such_module:f")


def test_an_argument_that_cannot_be_pickled_is_a_raised_call(task):
    with pytest.raises(WorkerError, match="cannot be sent"):
        task._worker.call(lambda: None, "x")
