"""Difficulty control: the levels of a task, the levels that problems come from, and a run that resumes with them."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter

import pytest
from conftest import make_model, message_of

import train
from data_types import Episode, MiniBatch, Problem
from grpo import GRPO
from math_task import ArithmeticTask, CountdownTask, make_task
from run.config import CONFIGS, Config, parse_args
from tasks.curriculum import HIGH, LOW, WINDOW, Curriculum
from tasks.task_base import is_held_out

TARGET = {"numbers": (3,), "max_number": 20, "prompt_style": "short"}
NAMES = ["2_numbers_to_10", "2_numbers_to_20", "3_numbers_to_10", "3_numbers_to_20"]


def curriculum() -> Curriculum:
    return Curriculum(CountdownTask(**TARGET))


def episodes_of(problems: list[Problem], shares: list[float], n: int = 10) -> list[Episode]:
    """`n` responses to each problem. Of those to problem i, the share `shares[i]` is solved."""
    return [
        Episode(group, [1], [2], [0.0], "", "stop", 0.0, {"answer": float(i < round(share * n))}, problem=problem)
        for group, (problem, share) in enumerate(zip(problems, shares))
        for i in range(n)
    ]


def level_of(problem: Problem) -> int:
    """Level of a problem of TARGET by its numbers alone: the easiest level that has it."""
    numbers = problem.target["numbers"]
    return 2 * (len(numbers) - 2) + (max(numbers) > 10)


def steps(c: Curriculum, solved: dict[str, float], n: int, start: int = 0) -> list[set[str]]:
    """`n` steps of 8 problems of a policy that solves these shares of each level. Returns the levels of each step."""
    drawn = []
    for step in range(start, start + n):
        problems = c.problems("train", 8, start=8 * step)
        names = [c.names[c._level_of[p.id]] for p in problems]
        c.record(episodes_of(problems, [solved[name] for name in names]))
        drawn.append(set(names))
    return drawn


# --- levels


def test_countdown_levels_rise_in_count_then_size_and_end_at_the_task():
    levels = CountdownTask(**TARGET).levels()
    assert list(levels) == ["2_numbers_to_10", "2_numbers_to_20", "3_numbers_to_10", "3_numbers_to_20"]
    assert [(t.numbers, t.max_number) for t in levels.values()] == [((2,), 10), ((2,), 20), ((3,), 10), ((3,), 20)]
    assert list(levels.values())[-1] == CountdownTask(**TARGET)
    wide = list(CountdownTask(numbers=(3, 4), max_number=99).levels())
    assert wide == [f"{count}_numbers_to_{size}" for count in (2, 3, 4) for size in (10, 25, 99)]


def test_arithmetic_levels_never_rise_above_a_harder_one():
    levels = ArithmeticTask(num_terms=(2, 3), num_digits=(1, 2)).levels()
    assert list(levels) == ["2_terms_1_digits", "3_terms_1_digits", "2_terms_2_digits", "3_terms_2_digits"]
    pairs = [t.mix[0] for t in ArithmeticTask(mix=((2, 4), (4, 2))).levels().values()]
    assert set(pairs) == {(t, d) for t in (2,) for d in (1, 2, 3, 4)} | {(t, d) for t in (3, 4) for d in (1, 2)}
    for i, (terms, digits) in enumerate(pairs):
        assert not any(terms >= t and digits >= d for t, d in pairs[i + 1 :])


@pytest.mark.parametrize("settings", [{}, {"numbers": (1,)}, {"numbers": 5}, {"min_number": 20}, {"max_number": 3}])
def test_every_level_has_problems_inside_the_task_and_no_held_out_one(settings):
    task = CountdownTask(**settings)
    levels = task.levels()
    assert levels
    for level in levels.values():
        for problem in level.problems("train", 20):
            numbers = problem.target["numbers"]
            assert task.min_number <= min(numbers) <= max(numbers) <= level.max_number <= task.max_number
            assert len(numbers) <= max(task.numbers)
            assert not is_held_out(f"{sorted(numbers)} = {problem.target['target']}")


def test_a_level_without_problems_is_left_out():
    """Two numbers from 60 to 62: the only targets up to 100 are 1 and 2, so there are too few problems."""
    task = CountdownTask(numbers=(4,), min_number=60, max_number=62)
    assert list(task.levels())[-1] == "4_numbers_to_62"


@pytest.mark.parametrize(
    "options",
    [
        {"name": "reasoning_gym:chain_sum"},
        {"name": "jsonl"},
        {"name": "countdown"},
    ],
    ids=lambda o: o["name"],
)
def test_a_task_without_levels_is_refused_in_one_line(options, tmp_path):
    rows = {
        "jsonl": [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(20)],
        "countdown": [{"nums": [i, 2], "target": i + 2} for i in range(1, 21)],
    }
    if options["name"] in rows:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[options["name"]]))
        options = options | {"data": str(file)}
    else:
        pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="has no levels") as error:
        Curriculum(make_task(**options))
    assert "--no-curriculum" in message_of(error)


# --- draws


def test_untried_levels_are_all_tried():
    assert curriculum().levels() == [0, 1, 2, 3]
    assert steps(curriculum(), dict.fromkeys(NAMES, 0.5), 1) == [set(NAMES)]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((0.5, 0.5, 0.5, 0.5), [0, 1, 2, 3]),
        ((1.0, 0.5, 0.3, 0.0), [1, 2]),  # the band
        ((1.0, 0.5, 0.0, 0.5), [1]),  # level 3 waits: level 2 is not solved
        ((0.5, 1.0, 0.5, 0.0), [2]),  # level 0 is finished: level 1 is solved
        ((1.0, 1.0, 0.0, 0.0), [1, 2]),  # none in the band: the border
        ((1.0, 1.0, 1.0, 1.0), [3]),  # all solved: the task itself
        ((0.0, 0.0, 0.0, 0.0), [0]),  # none solved: the easiest
    ],
)
def test_problems_come_from_the_levels_in_the_band(shares, expected):
    c = curriculum()
    c.load_state_dict({name: [share * 60, 60] for name, share in zip(NAMES, shares)})
    assert c.levels() == expected
    drawn = Counter(c._level_of[p.id] for p in c.problems("train", 12))
    assert drawn == {level: 12 // len(expected) for level in expected}


def test_the_bounds_of_the_band_belong_to_it():
    c = curriculum()
    c.solved, c.responses = [7.0, 1.0, 0.0, 0.0], [8.0, 8.0, 60.0, 60.0]  # estimates .8 and .2
    assert c.estimates()[:2] == [HIGH, LOW]
    assert c.levels() == [0, 1]
    c.solved[0], c.responses[2] = 7.01, 0.0
    assert c.levels() == [1]


def test_a_problem_is_of_its_level():
    c = curriculum()
    for problem in c.problems("train", 40):
        assert level_of(problem) <= c._level_of[problem.id]
        assert len(problem.target["numbers"]) == 2 + (c._level_of[problem.id] >= 2)


def test_the_level_rises_as_the_policy_learns_and_falls_if_it_forgets():
    c = curriculum()
    weak = dict(zip(NAMES, (0.5, 0.1, 0.0, 0.0)))
    drawn = steps(c, weak, 30)
    assert Counter(name for names in drawn for name in names).most_common(1)[0][0] == NAMES[0]
    low = c.metrics()["curriculum/level"]
    strong = dict(zip(NAMES, (1.0, 1.0, 1.0, 0.5)))
    drawn = steps(c, strong, 30, start=30)
    high = c.metrics()["curriculum/level"]
    assert high == 4 > low
    assert sum(NAMES[3] in names for names in drawn) > 15
    steps(c, weak, 30, start=60)
    assert c.metrics()["curriculum/level"] < 3


def test_a_level_that_was_not_solved_is_tried_again():
    c = curriculum()
    drawn = steps(c, dict(zip(NAMES, (0.5, 0.0, 0.0, 0.0))), 40)
    tried = sum(NAMES[1] in names for names in drawn[1:])
    assert 2 <= tried <= 20  # now and then: the level below is drawn at every step
    assert all(NAMES[0] in names for names in drawn)
    assert not any(NAMES[3] in names for names in drawn[1:])  # waits, whatever its age: level 2 is under the band


def test_counts_are_the_solved_responses_with_a_half_life_and_a_window():
    c = curriculum()
    problems = c.problems("train", 4)
    c.record(episodes_of(problems, [0.5, 1.0, 0.0, 0.3]))
    assert list(zip(c.solved, c.responses)) == [(5, 10), (10, 10), (0, 10), (3, 10)]
    assert c.estimates() == pytest.approx([6 / 12, 11 / 12, 1 / 12, 4 / 12])
    for _ in range(2):  # a half-life: two steps, in which the last level is not drawn
        c._level_of = {problems[0].id: 0}
        c.record(episodes_of(problems[:1], [0.5]))
    assert c.responses[3] == pytest.approx(5)
    assert c.solved[3] == pytest.approx(1.5)
    c._level_of = {problems[0].id: 0}
    c.record(episodes_of(problems[:1], [0.25], n=1000))
    assert c.responses[0] == pytest.approx(WINDOW)
    assert c.solved[0] / c.responses[0] == pytest.approx(0.25, abs=0.01)


def test_only_the_answer_of_drawn_problems_counts():
    c = curriculum()
    problem = c.problems("train", 1)[0]
    own, form, broken = episodes_of([problem], [1.0], n=3)
    form.reward_parts, form.reward = {"answer": 0.0, "format": 1.0}, 9.0
    broken.reward_parts = {}
    (other,) = episodes_of([Problem("other", [], None)], [1.0], n=1)
    other.group_id = 7
    c.record([own, form, broken, other])
    assert (c.solved[0], sum(c.solved)) == (1, 1)
    assert (c.responses[0], sum(c.responses)) == (2, 2)
    assert c.metrics() == {"curriculum/level": 1.0, "curriculum/solved_2_numbers_to_10": 0.5}
    before = c.state_dict()
    c.record([own])  # counted once
    assert c.state_dict() == before
    c.record([other])  # a step on another task: nothing is counted, and nothing ages
    assert c.state_dict() == before


def test_held_out_problems_are_not_drawn_by_level():
    with pytest.raises(ValueError, match="training problems only"):
        curriculum().problems("test", 1)


# --- state


def test_a_curriculum_resumes_bit_for_bit():
    solved = dict(zip(NAMES, (0.9, 0.7, 0.3, 0.1)))
    straight, first, second = curriculum(), curriculum(), curriculum()
    steps(straight, solved, 20)
    steps(first, solved, 11)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    steps(second, solved, 9, start=11)
    assert second.state_dict() == straight.state_dict()
    assert second.metrics() == straight.metrics()
    assert second.problems("train", 8, start=160) == straight.problems("train", 8, start=160)


def test_levels_that_the_state_does_not_have_are_untried():
    c = Curriculum(CountdownTask(numbers=(3,), max_number=15, prompt_style="short"))
    c.load_state_dict({"2_numbers_to_10": [3, 4], "3_numbers_to_20": [5, 6]})
    assert c.state_dict() == {
        "2_numbers_to_10": [3, 4], "2_numbers_to_15": [0, 0], "3_numbers_to_10": [0, 0], "3_numbers_to_15": [0, 0],
    }  # fmt: skip


class Lettered(CountdownTask):
    """Countdown, of which a random model solves some: an answer is right if the text has an even number of bytes."""

    def reward(self, problem, response):
        return (
            super()
            .reward(problem, response)
            ._replace(total=(right := float(len(response) % 2)), parts={"answer": right})
        )


def trainer_of(tokenizer, seed: int = 0, task=None, **changes) -> GRPO:
    settings = {
        "task": "countdown", "curriculum": True, "prompts_per_step": 4, "group_size": 4, "max_new_tokens": 8,
        "lr": 1e-3, "dtype": "fp32", "steps": 6,
    }  # fmt: skip
    task = task or Lettered(**TARGET)
    return GRPO(Config(**(settings | changes)), model=make_model(seed=seed), tokenizer=tokenizer, task=task)


def take_steps(trainer: GRPO, first: int, last: int) -> list[tuple[list[str], dict]]:
    told = []
    for step in range(first, last + 1):
        problems = trainer.problems(4, start=(step - 1) * 4)
        episodes, metrics = trainer.step(MiniBatch.from_problems(problems, trainer.tokenizer))
        kept = {k: v for k, v in metrics.items() if "per_second" not in k and k != "step_time"}
        told.append(([e.problem.id for e in episodes], kept))
    return told


@pytest.mark.parametrize("changes", [{}, {"drop_zero_variance": True, "refill_rounds": 2, "group_size": 2}])
def test_a_trainer_resumes_bit_for_bit(tokenizer, changes):
    straight = trainer_of(tokenizer, **changes)
    told = take_steps(straight, 1, 6)
    first, second = trainer_of(tokenizer, **changes), trainer_of(tokenizer, seed=5, **changes)
    take_steps(first, 1, 3)
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.step_count = first.step_count
    assert take_steps(second, 4, 6) == told[3:]
    assert len({m["curriculum/level"] for _, m in told}) > 1  # it did something
    assert all("curriculum/solved_2_numbers_to_10" in m for _, m in told)


def test_dropped_groups_count_and_replacements_come_from_the_levels(tokenizer):
    """All groups are flat: without the dropped ones no share would be known."""

    class Flat(Lettered):
        def reward(self, problem, response):
            return super().reward(problem, response)._replace(total=1.0, parts={"answer": 1.0})

    trainer = trainer_of(tokenizer, task=Flat(**TARGET), drop_zero_variance=True, refill_rounds=1)
    problems = trainer.problems(4, start=0)
    episodes, _ = trainer.step(MiniBatch.from_problems(problems, tokenizer))
    assert len(episodes) == 2 * 4 * 4
    assert sum(trainer.curriculum.responses) == len(episodes)
    assert trainer.curriculum.solved == trainer.curriculum.responses


def test_a_step_on_another_task_leaves_the_curriculum_alone(tokenizer):
    trainer = trainer_of(tokenizer, group_size=2)
    trainer.train_step("What is 1 + 1?", "2")
    assert sum(trainer.curriculum.responses) == 0
    assert trainer.problems(2, 0, task=ArithmeticTask())[0].id.startswith("question")


def test_a_task_given_in_python_without_levels_ends_a_presets_curriculum(tokenizer, caplog):
    class Own(Lettered):
        def levels(self):
            return {}

    trainer = trainer_of(tokenizer, task=Own(**TARGET))
    assert trainer.curriculum is None
    assert "--curriculum is off: Own has no levels" in caplog.text


def test_without_the_option_problems_are_those_of_the_task(tokenizer):
    trainer = trainer_of(tokenizer, curriculum=False)
    assert trainer.problems(8, 4) == trainer.task.problems("train", 8, 4)
    assert "curriculum" not in trainer.state_dict()
    assert not any(name.startswith("curriculum") for name in take_steps(trainer, 1, 1)[0][1])


# --- the command


RUN = [
    "--task", "countdown", "--numbers", "3", "--max-number", "20", "--prompt-style", "short", "--prompts-per-step", "4",
    "--group-size", "2", "--max-new-tokens", "4", "--eval-problems", "6", "--eval-every", "0", "--save-every", "1",
    "--eval-samples", "0", "--device", "cpu", "--dtype", "fp32",
]  # fmt: skip


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_draws_by_level_evaluates_the_task_and_resumes(checkpoint_folder, tmp_path):
    flags = [*RUN, "--ckpt", str(checkpoint_folder)]
    for name, more in {"on": ["--curriculum"], "off": ["--no-curriculum"], "cut": ["--curriculum"]}.items():
        n = "2" if name == "cut" else "5"
        assert train.main([*flags, *more, "--steps", n, "--run-dir", str(tmp_path / name)]) == 0
    assert train.main(["--resume", str(tmp_path / "cut"), "--steps", "5"]) == 0
    told = lines(tmp_path / "on/metrics.jsonl")
    assert [m["step"] for m in told if "curriculum/level" in m] == [1, 2, 3, 4, 5]
    assert told[1]["curriculum/level"] == 2.5  # all four levels
    assert told[5]["curriculum/level"] < 2.5  # a random model solves none
    samples = {name: lines(tmp_path / name / "samples.jsonl") for name in ("on", "off", "cut")}
    assert samples["on"] == samples["cut"]
    counts = {name: {s["prompt"].count(",") + 1 for s in samples[name]} for name in samples}
    assert (counts["on"], counts["off"]) == ({2, 3}, {3})
    held_out = {name: [s["prompt"] for s in lines(tmp_path / name / "held_out.jsonl")] for name in ("on", "off")}
    assert held_out["on"] == held_out["off"]
    assert all(prompt.count(",") == 2 for prompt in held_out["on"])


@pytest.mark.parametrize(
    "flags", [["--task", "gsm8k"], ["--task", "my.py:Task"], ["--task", "countdown", "--data", "problems.parquet"]]
)
def test_the_command_refuses_a_task_without_levels(flags, capsys, tmp_path):
    assert train.main([*flags, "--curriculum", "--run-dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--curriculum needs a task with levels" in line
    assert flags[1] in line
    assert not (tmp_path / "run").exists()


def test_presets_for_released_checkpoints_have_it_on_and_another_task_ends_it(tmp_path):
    for preset in sorted(CONFIGS.glob("*.yaml")):
        config = parse_args(["--config", str(preset)])
        assert config.curriculum == bool(re.match(r"cpu|qwen2\.5-", preset.stem)), preset
    preset = ["--config", str(CONFIGS / "cpu.yaml")]
    assert parse_args([*preset, "--task", "countdown"]).curriculum
    assert not parse_args([*preset, "--task", "gsm8k"]).curriculum
    assert not parse_args([*preset, "--task", "countdown", "--data", "rows.jsonl"]).curriculum
    assert not parse_args([*preset, "--config", str(CONFIGS / "gsm8k.yaml")]).curriculum
    with pytest.raises(ValueError, match="needs a task with levels"):  # asked for beside the task
        parse_args([*preset, "--task", "gsm8k", "--curriculum"])
    file = tmp_path / "wrong.yaml"
    file.write_text("task: gsm8k\ncurriculum: true\n")
    with pytest.raises(ValueError, match="needs a task with levels"):
        parse_args(["--config", str(file)])
