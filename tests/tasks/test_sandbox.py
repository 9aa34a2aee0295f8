"""A user's task and reward: a failure never ends the run, and a mistake in the code ends it before the first step."""

import math
import re
import sys
import time
import warnings

import psutil
import pytest

from math_task import ArithmeticTask, make_task, task_from_config
from run.config import Config
from tasks.sandbox import FunctionReward, SandboxedTask
from tasks.worker import Worker, WorkerError

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
        return Reward(1.0, {f"part {i} " + "x" * 10_000: 0.0 for i in range(200)})  # 2 MB

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
        ("text", "refused"),
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


def test_every_process_that_a_reward_forked_ends_with_it(task, tmp_path):
    assert math.isnan(reward(task, f"forkhang {tmp_path / 'pids'}").total)
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    until = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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
    files = {
        "broken.py": "def f(:\n",
        "raises.py": "raise KeyError('x\\ny')\n",
        "leaves.py": "raise SystemExit(0)\n",
        "init.py": TASK + "    def __init__(self):\n        raise OSError('no disk')\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for name, message in {
        f"{file}:MyTaks": "no class MyTaks; did you mean MyTask?",
        f"{file}:NoTask": "is no subclass of task_base.Task",
        f"{file}": "expected path/to/file.py:MyTask",
        f"{tmp_path}/none.py:T": "no such file",
        "~nouser/x.py:T": "there is no user 'nouser'",
        f"{tmp_path}/broken.py:T": "importing it raised SyntaxError",
        f"{tmp_path}/raises.py:T": "importing it raised KeyError",
        f"{tmp_path}/leaves.py:T": "importing it raised SystemExit",
        f"{tmp_path}/init.py:T": "making the task raised OSError: no disk",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            make_task(name)
        assert message in str(error.value), name
        assert "\n" not in str(error.value)


TASK = """
from data_types import Problem, Reward
from tasks.task_base import Task

def ask(index):
    return Problem(f"p{index}", [{"role": "user", "content": "hi"}], index)

class Whole(Task):
    def train_problem(self, index):
        return ask(index)

    def test_problem(self, index):
        return ask(index)

    def is_correct(self, problem, answer):
        return True

class T(Whole):
"""
BARE = TASK.replace("class T(Whole)", "class T(Task)")
TRAIN = "    def train_problem(self, index):\n        return "
REWARD = "    def reward(self, problem, response):\n        return "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BARE + "    pass\n", "T has no method train_problem, test_problem, is_correct (or reward)"),
        (BARE + TRAIN + "ask(0)\n", "T has no method test_problem, is_correct (or reward)"),
        (TASK + TRAIN + "{}['x']\n", "train_problem(0) raised KeyError: 'x'"),
        (TASK + TRAIN + "[][0]\n", "train_problem(0) raised IndexError"),
        (TASK + TRAIN + "None\n", "train_problem(0) returned NoneType, expected Problem(id, messages, target)"),
        (TASK + TRAIN + "Problem('a', 'hi', 1)\n", "returned a Problem whose messages are no list"),
        (TASK + TRAIN + "Problem('a', [], 1)\n", "returned a Problem whose messages are no list"),
        (TASK + TRAIN + "Problem('a', [{'role': 'user'}], 1)\n", "returned a Problem whose messages are no list"),
        (
            TASK + TRAIN + "Problem(7, [{'role': 'user', 'content': 'x'}], 1)\n",
            "whose id or response_prefix is no text",
        ),
        (
            TASK + TRAIN + "Problem('a', [{'role': 'user', 'content': '\\ud800'}], 1)\n",
            "returned a Problem with half of a character",
        ),
        (TASK.replace("return True", "raise NotImplementedError('later')") + "    pass\n", "later"),
        (TASK.replace("return True", "pass") + "    pass\n", "is_correct returned NoneType, expected True or False"),
        (TASK.replace("return True", "return 'no'") + "    pass\n", "is_correct returned str, expected True or False"),
        (
            TASK + "    def reward(self, response):\n        pass\n",
            "T.reward has the arguments (self, response); expected (self, problem, response)",
        ),
        (
            TASK + "    def train_problem(self):\n        pass\n",
            "T.train_problem has the arguments (self); expected (self, index)",
        ),
        (TASK + "    diagnostics = 3\n", "T.diagnostics is int, expected a method"),
        (
            TASK.replace("index)\n\nclass Whole", "lambda: 1)\n\nclass Whole") + "    pass\n",
            "the problem cannot be sent to a worker",
        ),
        (TASK + REWARD + "1.0\n", "it returned float, expected Reward(total, parts)"),
        (TASK + REWARD + "Reward('good', {})\n", "total is str, expected a number"),
        (TASK + REWARD + "Reward(1, {'a': None})\n", "reward part a is NoneType, expected a number"),
        (TASK + REWARD + "Reward(1, [])\n", "reward parts are list, expected a dict of numbers"),
    ],
)
def test_an_incomplete_task_is_refused_before_the_first_step(tmp_path, text, message):
    """CHECKLIST 46."""
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        task_from_config(Config(task=f"{tmp_path / 'mine.py'}:T"))
    assert f"{tmp_path / 'mine.py'}:T" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_task_without_held_out_problems_may_say_so(tmp_path):
    (tmp_path / "mine.py").write_text(TASK + "    def test_problem(self, index):\n        raise IndexError(index)\n")
    assert make_task(f"{tmp_path / 'mine.py'}:T").test_problems(5) == []


def test_an_error_in_a_later_problem_is_one_line(tmp_path):
    (tmp_path / "mine.py").write_text(TASK + TRAIN + "ask(index) if index < 5 else 1 / 0\n")
    task = make_task(f"{tmp_path / 'mine.py'}:T")
    assert len(task.problems("train", 5)) == 5
    with pytest.raises(ValueError, match=r"mine\.py:T: train_problem\(5\) raised ZeroDivisionError"):
        task.problems("train", 5, 5)


# One call, and names of the run ---------------------------------------------------------------------------------------

COUNTING = (
    TASK
    + """
    def reward(self, problem, response):
        import time
        with open(COUNTED, "a") as file:
            file.write("reward\\n")
        time.sleep(0.6)
        return Reward(1.0, {"answer": 1.0})

    def diagnostics(self, problem, response):
        return super().diagnostics(problem, response) | {"own": self.reward(problem, response).total}
"""
)


def test_a_reward_is_called_once_for_each_response(tmp_path):
    """CHECKLIST 63: a reward of 0.6 s has time in a deadline of 1 s, also if its diagnostics need the reward."""
    counted = tmp_path / "counted"
    (tmp_path / "mine.py").write_text(COUNTING.replace("COUNTED", repr(str(counted))))
    task = SandboxedTask(f"{tmp_path / 'mine.py'}:T", deadline_s=1.0)
    problem = task.train_problem(0)
    for response in ("same", "same", "other"):  # responses of a group may be equal
        assert task.reward(problem, response) == (1.0, {"answer": 1.0})
    for response in ("same", "same", "other"):
        assert task.diagnostics(problem, response) == {"solved": 1.0, "sums": 0.0, "false_sums": 0.0, "own": 1.0}
    assert counted.read_text().count("reward") == 3


@pytest.mark.parametrize(
    "name",
    ["step", "reward", "solved", "loss", "kl", "eval_reward", "greedy_reward", "rewards/a/mean", "", "a\nb", "\ud800"],
)
def test_a_reward_part_with_a_name_of_the_run_is_refused(tmp_path, name):
    (tmp_path / "mine.py").write_text(TASK + REWARD + f"Reward(7.0, {{{name!r}: 7.0}})\n")
    source = f"{tmp_path / 'mine.py'}:T"
    with pytest.raises(ValueError, match=r"reward part: the name .*choose another name") as error:
        task_from_config(Config(task=source))
    assert "\n" not in str(error.value)
    task = SandboxedTask(source)  # in a run, where a name may come late, the response has no reward
    assert math.isnan(reward(task, "x").total)
    assert task.failures == {"refused": 1}


@pytest.mark.parametrize(("name", "refused"), [("step", True), ("reward", True), ("solved", True), ("entropy", True),
                                               ("frac_reward_missing", True), ("has_answer", False)])  # fmt: skip
def test_a_diagnostic_with_a_name_of_the_run_is_refused(tmp_path, name, refused):
    text = f"    def diagnostics(self, problem, response):\n        return {{{name!r}: 0.7}}\n"
    (tmp_path / "mine.py").write_text(TASK + text)
    config = Config(task=f"{tmp_path / 'mine.py'}:T")
    if not refused:
        task = task_from_config(config)
        assert task.diagnostics(task.train_problem(0), "x") == {name: 0.7}
        return
    with pytest.raises(ValueError, match=f"{name} is .*the run's own.*choose another name"):
        task_from_config(config)


def test_a_reward_that_fails_for_the_trial_response_is_a_warning(source):
    with pytest.warns(RuntimeWarning, match="for the trial response .*: raised: AttributeError.*has no reward"):
        task_from_config(Config(task=source))


# A function as the reward ---------------------------------------------------------------------------------------------

FUNCTIONS = """
import functools, math, time
from data_types import Reward

def both(problem, response):
    return len(response) + 0.5 if problem.id else None

def other_names(p, text):
    return len(text)

def alone(text):
    return len(text)

def close(target, answer):
    return 1 / (1 + abs(float(answer) - float(target)))

def everything(**values):
    return len(values)

def variable(*values):
    return len(values)

def with_default(response, scale=2):
    return scale * len(response)

def parts(response):
    return Reward(3.0, {"mine": 1.0})

def slow(response):
    time.sleep(100)

def text(response):
    return "good"

def lists(response):
    return [1.0]

def taken(response):
    return Reward(1.0, {"reward": 1.0})

def own(response):
    return Reward(1.0, {"answer": 1.0})

def three(a, b, c):
    return 1

def none():
    return 1

partial = functools.partial(other_names, p=None)
NUMBER = 7
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    file = tmp_path_factory.mktemp("reward") / "mine.py"
    file.write_text(FUNCTIONS)
    return file


RESPONSE = " 3 + 4 = 8 </think>\n<answer>8</answer>"


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("both", len(RESPONSE) + 0.5),
        ("other_names", len(RESPONSE)),
        ("alone", len(RESPONSE)),
        ("close", 0.5),
        ("everything", 4),
        ("variable", 2),
        ("with_default", 2 * len(RESPONSE)),
    ],
)
def test_the_value_of_a_function_is_the_reward(functions, name, total):
    task = task_from_config(Config(task="arithmetic", arithmetic_weight=0.5, reward=f"{functions}:{name}"))
    problem = ArithmeticTask().problem_from("What is 3 + 4?", 7)
    found = task.reward(problem, RESPONSE)
    assert found.total == total
    assert found.parts == {"format": 1.0, "answer": 0.0, "arithmetic": -1.0, "custom": total}
    assert task.diagnostics(problem, RESPONSE) == {"solved": 0.0, "full_format": 1.0, "sums": 1.0, "false_sums": 1.0}


def test_a_function_may_name_parts(functions):
    task = FunctionReward(ArithmeticTask(), f"{functions}:parts")
    problem = task.train_problem(0)
    assert task.reward(problem, "x") == (3.0, {"format": 0.0, "answer": 0.0, "mine": 1.0, "custom": 3.0})
    assert problem == ArithmeticTask().train_problem(0)
    assert task.test_problems(3) == ArithmeticTask().test_problems(3)
    assert list(task.levels()) == list(ArithmeticTask().levels())
    assert task.is_correct(ArithmeticTask().problem_from("3?", 3), "3.0")


def test_a_function_that_fails_is_nan(functions):
    task = FunctionReward(ArithmeticTask(), f"{functions}:slow", deadline_s=0.5)
    with pytest.warns(RuntimeWarning, match=r"mine\.py:slow .*deadline"):
        total, parts = task.reward(task.train_problem(0), "x")
    assert math.isnan(total)
    assert parts == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bofh", "no function bofh; did you mean both?"),
        ("NUMBER", "no function NUMBER"),
        ("Reward", "no function Reward"),
        ("three", "the arguments are (a, b, c); expected some of problem, response, answer, target"),
        ("none", "the arguments are ()"),
        ("text", "reward is str, expected a number"),
        ("lists", "reward is list, expected a number"),
        ("own", "the reward part answer is the task's own; choose another name"),
        ("taken", "the name reward is one of the run's own metrics"),
    ],
)
def test_mistakes_in_a_function_are_refused_before_the_first_step(functions, name, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        task_from_config(Config(task="arithmetic", reward=f"{functions}:{name}"))
    assert f"{functions}:{name}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.py:f", "nowhere.py: no such file"),
        ("mine", "expected path/to/file.py:my_reward"),
        ("~nouser/a.py:f", "no user"),
    ],
)
def test_a_function_that_is_not_there_is_one_line(source, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        task_from_config(Config(task="arithmetic", reward=source))


# The worker -----------------------------------------------------------------------------------------------------------


def test_a_worker_that_cannot_start_says_so():
    with pytest.raises(ValueError, match="no_such_module:f in its worker: start: raised: ModuleNotFoundError"):
        Worker("no_such_module:f")


def test_an_argument_that_cannot_be_pickled_is_a_raised_call(task):
    with pytest.raises(WorkerError, match="cannot be sent"):
        task._worker.call(lambda: None, "x")
