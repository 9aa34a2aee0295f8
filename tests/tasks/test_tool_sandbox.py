"""A user's own tool: it works in its worker, and a failure of any kind is a result, not the end of the run.

CHECKLIST 77.
"""

from __future__ import annotations

import math
import time
import warnings

import pytest
from conftest import make_config, make_model, message_of

import grpo
from data_types import MiniBatch, Turn
from math_task import make_task, task_from_config
from rollout.sampling import SamplingParams
from run.config import Config
from tasks.sandbox import FunctionReward, SandboxedTask

USER_TASK = """
import os, time
from dataclasses import dataclass
from data_types import Problem, Reward
from tasks.task_base import Task

@dataclass(kw_only=True)
class MyTask(Task):
    stop_strings = ("</ask>",)
    limit: int = 3

    def train_problem(self, index):
        return Problem(f"p{index}", [{"role": "user", "content": "hi"}], index)

    test_problem = train_problem

    def respond(self, problem, text_so_far):
        call = text_so_far.rpartition("<ask>")[2].removesuffix("</ask>")
        return getattr(self, "do_" + call, self.do_echo)(call)

    def do_echo(self, call):
        return f"<got>{call}</got>"

    def do_end(self, call):
        return None

    def do_hang(self, call):
        time.sleep(100)

    def do_compute(self, call):
        return str(9**9**9)

    def do_raise(self, call):
        raise RuntimeError("first line\\nsecond line")

    def do_vanish(self, call):
        os._exit(3)

    def do_half(self, call):
        return "\\ud800"

    def do_long(self, call):
        return "x" * 3_000_000

    def do_number(self, call):
        return 3

    def reward(self, problem, response):
        return Reward(1.0, {"length": float(len(response))})

class Turns(MyTask):
    def reward_turns(self, problem, turns):
        return Reward(float(sum(turn.given for turn in turns)), {"sampled": float(sum(not t.given for t in turns))})
"""
FAULTS = {"hang": "deadline", "compute": "deadline", "raise": "raised", "vanish": "died", "half": "raised",
          "long": "died", "number": "refused"}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_task.py"
    path.write_text(USER_TASK)
    return path


@pytest.fixture
def task(file):
    return SandboxedTask(f"{file}:MyTask", deadline_s=1.0)


def ask(task, call: str) -> str | None:
    return task.respond(task.train_problem(0), f"text <ask>{call}</ask>")


def test_the_users_text_is_the_observation(task):
    assert task.stop_strings == ("</ask>",)
    assert ask(task, "seven") == "<got>seven</got>"
    assert ask(task, "end") is None


@pytest.mark.parametrize(("call", "kind"), FAULTS.items())
def test_a_tool_that_fails_has_an_error_as_result_and_works_again(task, call, kind):
    start = time.perf_counter()
    with pytest.warns(RuntimeWarning, match=f"respond of .* for problem p0: {kind}.* the run goes on"):
        found = ask(task, call)
    assert found == f"<result>error: {'no result within 1 s' if kind == 'deadline' else 'the tool failed'}</result>\n"
    assert time.perf_counter() - start < 20
    assert ask(task, "again") == "<got>again</got>"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning of each kind
        assert ask(task, call) == found
    assert task.failures == {f"respond {kind}": 2}


def test_the_reward_of_the_user_gets_the_turns(file):
    turns = [Turn("a", False), Turn("b", True), Turn("c", False)]
    task = SandboxedTask(f"{file}:Turns")
    assert task.reward_turns(task.train_problem(0), turns) == (1.0, {"sampled": 2.0})
    plain = SandboxedTask(f"{file}:MyTask")
    assert plain.reward_turns(plain.train_problem(0), turns) == (1.0, {"length": 3.0})
    assert plain.diagnostics(plain.train_problem(0), "abc")["solved"] == 0.0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('stop_strings = ("</ask>",)', 'stop_strings = "</ask>"', "stop_strings is '</ask>'; expected a tuple"),
        ('stop_strings = ("</ask>",)', 'stop_strings = ("",)', "expected a tuple of texts, none empty"),
        ("def respond(self, problem, text_so_far):", "def answer(self, problem, text_so_far):", "no method respond"),
        ("def respond(self, problem, text_so_far):", "def respond(self, text_so_far):", r"expected \(self, problem, t"),
        ("def reward_turns(self, problem, turns):", "def reward_turns(self, turns):", r"expected \(self, problem, tu"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_code_is_an_error_of_one_line(file, old, new, message):
    file.write_text(USER_TASK.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        task_from_config(Config(task=f"{file}:Turns"))
    message_of(error)


def test_an_observation_that_is_no_text_ends_the_program_before_the_first_step(file):
    file.write_text(USER_TASK.replace('return f"<got>{call}</got>"', "return 3"))
    with pytest.raises(ValueError, match=r"respond of .*: it returned int, expected text or None") as error:
        task_from_config(Config(task=f"{file}:MyTask"))
    message_of(error)


def test_options_reach_the_users_tool(file):
    task = task_from_config(Config(task=f"{file}:MyTask", max_turns=2, max_turn_tokens=9))
    assert (task.max_turns, task.max_turn_tokens) == (2, 9)


def test_a_reward_function_keeps_the_tool_of_its_task(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text("def short(response):\n    return -len(response)\n")
    plain = make_task("calculator")
    task, problem = FunctionReward(plain, f"{path}:short"), plain.train_problem(0)
    assert task.stop_strings == ("</calc>",)
    assert task.respond(problem, "<calc>1 + 1</calc>") == "<result>2</result>\n"
    total, parts = task.reward_turns(problem, [Turn("<calc>1</calc>", False), Turn("<result>1</result>\n", True)])
    assert total == -len("<calc>1</calc><result>1</result>\n")
    assert parts["calls"] == 1.0
    assert parts["custom"] == total


def test_a_rollout_with_a_tool_that_hangs_has_all_its_responses(file, tokenizer):
    """Every call of this model hangs for its deadline, and the responses continue with the error."""
    file.write_text(USER_TASK.replace('("</ask>",)', 'tuple("abcdefghijklmnopqrstuvwxyz")').replace(
        "call = text_so_far", "time.sleep(100)\n        call = text_so_far"))  # fmt: skip
    task = SandboxedTask(f"{file}:MyTask", {"max_turns": 1}, deadline_s=0.2)
    batch = MiniBatch.from_problems(task.problems("train", 1), tokenizer)
    model = make_model(make_config(tie_word_embeddings=False))
    with pytest.warns(RuntimeWarning, match="respond of .*deadline"):
        episodes = grpo.rollout(model, tokenizer, task, batch, SamplingParams(4, 64))
    called = [e for e in episodes if len(e.turns) > 1]
    assert called
    assert {e.turns[1] for e in called} == {Turn("<result>error: no result within 0.2 s</result>\n", True)}
    assert all(not math.isnan(e.reward) for e in episodes)
