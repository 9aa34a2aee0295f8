"""Charts outside of metrics.jsonl: they get every step, cannot end a run, and a missing package is one line."""

from __future__ import annotations

import math
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import SMALL, EvenLetters, metrics_of, refused, run

import train
from data_types import Episode, Problem
from run.config import Config, load_config
from run.run_log import RunLog


def episode(text: str, reward: float) -> Episode:
    problem = Problem("p", [{"role": "user", "content": "Make 5."}], target=5)
    return Episode(0, [1], [7], [-0.1], text, "stop", reward, problem=problem)


def events_of(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def texts_of(folder) -> dict[str, list[tuple[int, str]]]:
    events, found = events_of(folder), {}
    for tag in events.Tags()["tensors"]:
        found[tag] = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)]
    return found


def test_samples_are_texts_in_tensorboard(tmp_path):
    """Two of each step, and the same held-out problems every time. As code, so that no response is a picture."""
    decode = str
    with RunLog(tmp_path, Config(), total_steps=2) as log:
        log.log_held_out(0, [episode("before", 0.0)], False, decode)
        log.log_step(0, {"eval_reward": 0.0})
        log.log_samples(1, [episode("low", 0.0), episode("![x](http://y)\n# high", 1.0)], decode)
        log.log_step(1, {"reward": 0.5})
        log.log_samples(2, [episode("only \ud800\x1b", 0.5)], decode)
        log.log_held_out(2, [episode("after", 1.0)], False, decode)
        log.log_step(2, {"reward": 0.5, "eval_reward": 1.0})
    texts = texts_of(tmp_path)
    held_out = texts["held_out_greedy/0/text_summary"]
    assert [step for step, _ in held_out] == [0, 2]
    assert "Make 5." in held_out[0][1]
    assert held_out[1][1].endswith("    after")
    best, worst = texts["samples/best/text_summary"], texts["samples/worst/text_summary"]
    assert best[0][1].splitlines()[-2:] == ["    ![x](http://y)", "    # high"]
    assert all(line.startswith("    ") for _, text in best + worst for line in text.splitlines())
    assert [(step, text.splitlines()[-1]) for step, text in worst] == [(1, "    low")]
    assert best[1] == (2, "    reward 0.500, 1 tokens, stop\n    \n    Make 5.\n    \n    only \\ud800\\x1b")


def test_names_and_numbers_that_an_event_file_cannot_hold(tmp_path, capsys):
    """A part of a reward may have any name, and a diagnostic any number."""
    odd = {"a\ud800b": 1.0, "c\x1b/d": 2.0, "": 3.0, "x" * 5000: 4.0, "large": 10**30, "huge": 10**400, "wide": 1e300}
    with RunLog(tmp_path, Config(), total_steps=1) as log:
        log.log_step(1, {"reward": 0.5, **odd})
        log.log_step(2, {"reward": 0.25})
    assert "Traceback" not in capsys.readouterr().err
    events = events_of(tmp_path)
    assert {r"a\ud800b", r"c\x1b/d", "x" * 5000, "large", "wide"} <= set(events.Tags()["scalars"])
    assert "huge" not in events.Tags()["scalars"]
    assert [event.step for event in events.Scalars("reward")] == [1, 2]
    assert [row["step"] for row in metrics_of(tmp_path)] == [1, 2]
    assert metrics_of(tmp_path)[0]["huge"] is None


def test_no_name_writes_no_events(tmp_path):
    with RunLog(tmp_path, Config(log_to=()), total_steps=1) as log:
        log.log_step(1, {"reward": 0.5})
    assert not list(tmp_path.glob("events*"))
    assert load_config(tmp_path / "config.yaml").log_to == ()


# --- optional packages


class Service(types.ModuleType):
    """Stands in for wandb or trackio: keeps what it is given, or fails."""

    def __init__(self, name: str, fails: str = ""):
        super().__init__(name)
        self.fails, self.started, self.rows, self.finished = fails, [], [], 0
        self.__spec__ = types.SimpleNamespace(name=name)

    def Settings(self, **settings):
        return settings

    def init(self, **options):
        if self.fails == "init":
            raise RuntimeError("no\nkey \x1b[2J")
        self.started.append(options)
        return self

    def define_metric(self, *names, **options): ...

    def log(self, values, step=None):
        if self.fails == "log":
            raise RuntimeError("no network")
        self.rows.append({"step": step, **values})

    def finish(self):
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    made = Service(request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    return made


def test_a_service_gets_the_settings_and_every_step(tmp_path, service):
    config = Config(log_to=("tensorboard", service.__name__), lr=0.25)
    for resume in (None, "latest"):
        config.resume = resume
        with RunLog(tmp_path / "run", config, total_steps=2) as log:
            if resume:
                log.truncate_after(0)
            for step in (1, 2) if resume else (0, 1):
                log.log_step(step, {"reward": step / 4, "kl": math.nan})
    assert service.rows == [{"step": step, "reward": step / 4} for step in (0, 1, 1, 2)]
    assert service.finished == 2
    first, second = service.started
    assert first["config"]["lr"] == 0.25
    assert (first["name"], first["project"], first["resume"]) == ("run", "nanogrpo", "allow")
    assert first.get("id") == second.get("id")
    assert [event.step for event in events_of(tmp_path / "run").Scalars("reward")] == [0, 1, 2]


def test_a_service_that_fails_later_does_not_end_the_run(tmp_path, service, capsys):
    service.fails = "log"
    with RunLog(tmp_path, Config(log_to=(service.__name__, "tensorboard")), total_steps=2) as log:
        for step in (0, 1, 2):
            log.log_step(step, {"reward": step / 4})
    assert capsys.readouterr().err.count(f"WARNING: {service.__name__} failed (no network); the run goes on") == 1
    assert [event.step for event in events_of(tmp_path).Scalars("reward")] == [0, 1, 2]
    assert len(metrics_of(tmp_path)) == 3


def test_a_service_that_cannot_start_is_one_line(checkpoint_folder, tmp_path, monkeypatch, capsys, service):
    """And the settings of a run that is resumed with it stay as they were."""
    monkeypatch.setattr(train, "task_from_config", lambda config: EvenLetters(seed=config.seed))
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", 1, *SMALL]
    service.fails = "init"
    assert f"--log-to {service.__name__}: no key \\x1b[2J" in refused(capsys, *words, "--log-to", service.__name__)
    service.fails = ""
    assert run(*words) == 0
    service.fails = "init"
    before = (tmp_path / "run/config.yaml").read_bytes()
    refused(capsys, "--resume", tmp_path / "run", "--steps", 2, "--log-to", service.__name__)
    assert (tmp_path / "run/config.yaml").read_bytes() == before


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_one_line_before_anything_is_loaded(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(train, "load_policy", lambda *args: pytest.fail("loaded"))
    line = refused(capsys, "--run-dir", tmp_path / "run", "--log-to", "tensorboard", name)
    assert line.endswith(f"--log-to {name}: the package {name} is not installed; run: pip install {name}")
    assert not (tmp_path / "run").exists()


def test_an_unknown_place_is_refused(capsys):
    assert "comet" in refused(capsys, "--log-to", "comet")
