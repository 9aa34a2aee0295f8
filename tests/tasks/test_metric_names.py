"""Names of reward parts and diagnostics: none of them overwrites a number of the run."""

from __future__ import annotations

import json

import pytest

import train
from data_types import Episode, MiniBatch, Problem, Reward
from grpo import GRPO
from run.config import Config
from tasks.metric_names import TASK_DIAGNOSTICS, check_names, name_problem
from tasks.task_base import Task
from update.step_metrics import reward_metrics

OPTIONS = [
    "--steps",
    "2",
    "--prompts-per-step",
    "2",
    "--group-size",
    "2",
    "--max-new-tokens",
    "12",
    "--eval-every",
    "1",
]
OPTIONS += ["--eval-problems", "2", "--beta", "0.01", "--entropy-target", "0.5", "--overlong-buffer", "8"]


def test_every_metric_of_a_run_is_reserved(tmp_path):
    """CHECKLIST 62: a new metric cannot be overwritten either, as long as this test sees it."""
    assert train.main([*OPTIONS, "--run-dir", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line}
    assert len(names) > 40
    assert [name for name in names if name_problem(name) is None] == []


@pytest.mark.parametrize(
    "name", ["mine", "format", "answer", "length", "tags/open", "größe", "my part", "steps", "evaluation"]
)
def test_other_names_are_free(name):
    assert name_problem(name) is None


@pytest.mark.parametrize("name", ["", " ", " a", "a\tb", "\x1b[2J", "\ud800", 7, None])
def test_a_name_must_be_readable(name):
    with pytest.raises(ValueError, match=r"diagnostic: the name .* is not readable text; choose another name"):
        check_names("diagnostic", [name])


class Own(Task):
    """A task that runs in the program itself, not in a worker."""

    names: tuple[str, str] = ("mine", "own")

    def reward(self, problem, response):
        return Reward(1.0, {self.names[0]: 1.0})

    def diagnostics(self, problem, response):
        return super().diagnostics(problem, response) | {self.names[1]: 5.0}


def test_names_of_a_task_in_the_same_process_are_checked():
    task, problem = Own(), Problem("p", [], None)
    episode = Episode(0, [1], [2], [0.0], "x", "stop", 1.0, {"mine": 1.0}, problem=problem)
    assert reward_metrics([episode], task)["own"] == 5.0
    assert reward_metrics([episode], task).keys() > TASK_DIAGNOSTICS - {"full_format"}
    task.names = ("mine", "reward")
    with pytest.raises(ValueError, match="diagnostic: the name reward is one of the run's own metrics"):
        reward_metrics([episode], task)


class Counted(Own):
    calls = 0

    def reward(self, problem, response):
        self.calls += 1
        return Reward(float(self.calls), {"answer": 1.0})


def test_the_reward_of_a_task_in_the_same_process_is_called_once_for_each_response():
    """CHECKLIST 63: the default diagnostics take the reward that is known, and the metrics take these diagnostics."""
    task = Counted()
    trainer = GRPO(Config(prompts_per_step=2, group_size=3, max_new_tokens=8), task=task)
    batch = MiniBatch.from_problems([Problem(f"p{i}", [{"role": "user", "content": "?"}], i) for i in range(2)],
                                    trainer.tokenizer)  # fmt: skip
    metrics = trainer.step(batch)[1]
    assert task.calls == 6
    assert metrics["solved"] == 1.0
    assert metrics["own"] == 5.0
    assert task.diagnostics(batch.problems[0], "another response")["solved"] == 1.0
    assert task.calls == 7
