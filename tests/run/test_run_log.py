"""The run's files and its display: whole lines, no gap, no double, nothing that a response can do to the terminal."""

import io
import json
import math
import os
import pty
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from data_types import Episode, Problem
from run import progress
from run.config import Config, load_config
from run.progress import History, LiveProgress, duration, result_lines, sparkline, summary_table
from run.run_log import RunLog, read_metrics

ROOT = Path(__file__).resolve().parents[2]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]")
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m[bold]text[/bold] [/nope] \u202eevil\u2028\r\n\x00end"


def episode(group_id: int = 0, reward: float = 1.0, text: str = "2 + 3", **more) -> Episode:
    problem = Problem(f"p{group_id}", [{"role": "user", "content": "Make [bold] 5."}], target=5)
    return Episode(group_id, [1, group_id], [7, 8], [-0.1, -0.2], text, "stop", reward, problem=problem, **more)


def samples_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def decode(ids: list[int]) -> str:
    return f"prompt {ids}"


# --- files


def test_a_step_is_one_json_line_on_disk_at_once(tmp_path):
    with RunLog(tmp_path, Config(), total_steps=2) as log:
        log.log_step(0, {"eval_reward": 0.25})
        log.log_step(1, {"reward": torch.tensor(0.5), "kl": math.nan, "grad_norm": math.inf, "num_tokens": 2**60})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before the log is closed
        assert json.loads(lines[0]) == {"step": 0, "eval_reward": 0.25}
        assert scalars(tmp_path)["reward"] == [(1, 0.5)]
        assert json.loads(lines[1]) == {"step": 1, "reward": 0.5, "kl": None, "grad_norm": None, "num_tokens": 2**60}
    assert read_metrics(tmp_path)[1]["step"] == 1


def test_a_sample_keeps_everything_and_stays_one_ascii_line(tmp_path):
    with RunLog(tmp_path, Config(), total_steps=1) as log:
        episodes = [episode(text=HOSTILE, advantage=0.5, reward_parts={"answer": 1.0, "format": math.nan})]
        log.log_samples(1, [*episodes, episode(1, math.nan)], decode)
    first, second = samples_of(tmp_path)
    assert (tmp_path / "samples.jsonl").read_bytes().isascii()
    assert first == {
        "step": 1,
        "group_id": 0,
        "problem": "p0",
        "prompt": "prompt [1, 0]",
        "response": HOSTILE,
        "reward": 1.0,
        "reward_parts": {"answer": 1.0, "format": None},
        "advantage": 0.5,
        "finish_reason": "stop",
        "response_tokens": 2,
        # of the first group only, for the report
        "prompt_ids": [1, 0],
        "token_ids": [7, 8],
        "tokens": ["prompt [7]", "prompt [8]"],
        "token_logprobs": [-0.1, -0.2],
    }
    assert "tokens" not in second
    assert (second["reward"], second["prompt"]) == (None, "prompt [1, 1]")


@pytest.mark.parametrize(("share", "expected"), [(1.0, 60), (0.25, 15), (0.01, 0), (0.05, 3), (0.0, 0)])
def test_the_share_of_samples_is_that_of_the_run(tmp_path, share, expected):
    with RunLog(tmp_path, Config(log_samples=share), total_steps=9) as log:
        for step in range(10):  # six episodes a step: less than one of them is chosen at 0.05
            log.log_samples(step, [episode(i) for i in range(6)], decode)
    assert len(samples_of(tmp_path)) == expected


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_resume_from_an_older_checkpoint_leaves_no_gap_and_no_double(tmp_path):
    """CHECKLIST 42: metrics. A run with broken last lines is continued from step 3."""
    with RunLog(tmp_path, Config(), total_steps=7) as log:
        for step in range(6):
            log.log_samples(step, [episode(), episode()], decode)
            log.log_step(step, {"reward": step / 8})
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write('{"step": 3, "rew\n{"step": 3, "reward": 1.0}\n{"step": 6, "rew')
    with RunLog(tmp_path, Config(resume="latest"), total_steps=7) as log:
        log.truncate_after(3)
        assert log.history.step == 3
        assert log.history.seconds_left() is None  # reading the old lines took no step's time
        for step in range(4, 8):
            log.log_samples(step, [episode(), episode()], decode)
            log.log_step(step, {"reward": step / 4})
    assert [(line["step"], line["reward"]) for line in read_metrics(tmp_path)] == [
        (step, step / 8 if step <= 3 else step / 4) for step in range(8)
    ]
    assert [sample["step"] for sample in samples_of(tmp_path)] == [step for step in range(8) for _ in "ab"]
    assert scalars(tmp_path) == {"reward": [(step, step / 8 if step <= 3 else step / 4) for step in range(8)]}


def test_a_folder_with_another_run_is_refused(tmp_path):
    """CHECKLIST 46."""
    with RunLog(tmp_path, Config(), total_steps=1) as log:
        log.log_step(0, {"eval_reward": 0.0})
    with pytest.raises(ValueError, match="already holds a run: continue it with --resume") as caught:
        RunLog(tmp_path, Config(), total_steps=1)
    assert "\n" not in str(caught.value)
    assert len(read_metrics(tmp_path)) == 1


def test_config_yaml_starts_the_same_run(tmp_path):
    RunLog(tmp_path, Config(lr=1 / 3, resume="latest"), total_steps=1).close()
    assert load_config(tmp_path / "config.yaml") == Config(lr=1 / 3, run_dir=str(tmp_path))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer thread
def test_a_full_disk_loses_lines_and_not_the_run(tmp_path, capsys, monkeypatch):
    """No file may grow beyond 4096 bytes for a while: the file ends with a whole line, the fault is told once."""

    def full(*records):
        raise OSError(28, "No space left on device")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunLog(tmp_path, Config(), total_steps=90) as log:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            for step in range(90):
                log.log_step(step, {"reward": 0.123456789, "reward_std": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        written = (tmp_path / "metrics.jsonl").read_bytes()
        assert 4000 < len(written) <= 4096
        assert written.endswith(b"}\n")
        log.log_step(90, {"reward": 0.5})  # there is room again
        log._trackers.clear()
        monkeypatch.setattr(log._metrics, "append", full)
        log.log_step(91, {"reward": 0.5})
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert steps == [*range(len(steps) - 1), 90]
    assert len(steps) < 90
    errors = capsys.readouterr().err
    assert errors.count("metrics.jsonl not written") == 2  # once each time the disk fills
    assert errors.count("TensorBoard events not written") <= 2
    assert (90, 0.5) in scalars(tmp_path)["reward"]


# --- what is shown


def test_piped_output_is_a_line_a_step(tmp_path, capsys):
    with RunLog(tmp_path, Config(), total_steps=2) as log:
        log.phase("sampling")
        log.log_samples(1, [episode(text=HOSTILE)], decode)
        log.log_step(1, {"reward": 0.5, "rewards/answer/mean": 0.25, "entropy": math.nan, "step_time": 2.0})
    line = capsys.readouterr().out
    assert line.startswith("step 1/2 | reward 0.500 | solved 25.0% | 2.00 s | left ")
    assert line.count("\n") == 1


def screen(width: int, height: int, text: str = HOSTILE) -> list[str]:
    history = History(total_steps=300)
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True)
    display = LiveProgress(history, console, "title [bold] " * 9)
    history.add(0, {"eval_reward": 0.1, "eval_solve_rate": 0.2})
    for step in range(1, 200):
        history.add(step, {"reward": step / 200, "step_time": 1.0, **dict.fromkeys(progress.SHOWN, 0.5)})
    display.samples([episode(reward=1.0, text=text), episode(reward=0.0, text=text * 50), episode(reward=math.nan)])
    display.step(199, {"reward": 0.75, "rewards/[red]/mean": 0.5, **dict.fromkeys(progress.SHOWN, 0.5)})
    display.close()
    lines = console.render_lines(display, console.options, pad=False)
    return ["".join(segment.text for segment in line if not segment.control) for line in lines]


@pytest.mark.parametrize(("width", "height"), [(100, 30), (60, 24), (60, 14), (250, 60), (100, 12)])
def test_the_live_display_fits_the_terminal(width, height):
    lines = screen(width, height)
    assert all(len(line) <= width for line in lines)
    assert "step 199/300" in lines[1]
    assert any("reward 0.5" in line for line in lines)
    if (width, height) != (60, 14):  # not even the numbers have room there: rich cuts what is below
        assert len(lines) < height


def test_a_response_cannot_reach_the_terminal_or_the_markup():
    shown = "\n".join(screen(100, 40))
    assert r"\x1b[2J\x1b]0;owned\x07\x9b31m[bold]text[/bold]" in shown
    assert "[/nope]" in shown
    assert "Make [bold] 5." in shown
    assert not CONTROL.search(shown)


def test_names_cannot_reach_the_terminal_or_the_markup_either(tmp_path, capsys):
    """Names of metrics come from a task, the title from a checkpoint's name: line, table, result and live display."""
    name, history = f"rewards/{HOSTILE}/mean", History(total_steps=2)
    with RunLog(tmp_path / "run", Config(), total_steps=2) as log:
        log.log_step(1, {name: 0.5, f"eval_{HOSTILE}": 0.5})
        log.say(f"settings of {HOSTILE}")
        log.print_summary()
    for step in (0, 1):
        history.add(step, {name: 0.5, f"eval_{HOSTILE}": 0.25})
    console = Console(file=io.StringIO(), width=300, height=40, force_terminal=True, color_system=None)
    console.print(summary_table(history))
    display = LiveProgress(history, console, HOSTILE)
    display.step(1, {name: 0.5})
    display.close()
    written = console.file.getvalue().replace("\x1b[?25l", "").replace("\x1b[?25h", "")
    written = re.sub(r"\x1b\[(\d?[A-K]|\dm)|\r", "", written)  # rich's own: up, clear a line, dim
    for shown in (capsys.readouterr().out, (tmp_path / "run/summary.txt").read_text(), written):
        assert all(piece in shown for piece in (r"\x1b[2J", r"\x9b31m[bold]text[/bold]", "[/nope]", r"\u202eevil"))
        assert not CONTROL.search(shown)


def test_on_a_terminal_prints_of_others_stay_and_the_summary_comes_last(tmp_path):
    code = f"""
import sys, warnings
from run.config import Config
from run.run_log import RunLog
with RunLog({str(tmp_path / "run")!r}, Config(), total_steps=2) as log:
    log.log_step(0, {{"eval_reward": 0.1}})
    print("an ordinary [bold]print[/bold]")
    print("to standard error", file=sys.stderr)
    log.log_step(1, {{"reward": 0.5}})
    log.print_summary()
"""
    terminal, child_end = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=child_end, stderr=child_end, env=environment)
    os.close(child_end)
    output = b""
    while True:
        try:
            output += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    os.close(terminal)
    assert child.wait() == 0
    text = output.decode()
    last = "reward, sampled: 0.100 (step 0)"
    positions = [text.index(words) for words in ("an ordinary [bold]print[/bold]", "to standard error", last)]
    assert positions == sorted(positions)
    assert "Summary" in (tmp_path / "run/summary.txt").read_text()
    assert b"\x1b[?25h" in output  # the cursor is back


# --- arithmetic


def test_summary_has_the_first_evaluation_beside_the_last_and_means_of_both_ends():
    history = History(total_steps=30)
    for step in range(31):
        history.add(step, {"eval_reward": step / 100} if step % 15 == 0 else {"reward": float(step), "kl": None})
    console = Console(file=io.StringIO(), width=100)
    console.print(summary_table(history))
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["eval_reward", "0", "0.3", "+0.3"] in rows
    assert ["step", "1-10", "step", "20-29"] in rows
    assert ["reward", "5.5", "24.5", "+19"] in rows  # steps 15 and 30 only evaluated
    assert not any("kl" in row for row in rows)


def test_the_ends_of_a_short_run_do_not_overlap():
    history = History(total_steps=3)
    for step in (1, 2, 3):
        history.add(step, {"reward": float(step)})
    console = Console(file=io.StringIO(), width=100)
    console.print(summary_table(history))
    assert ["reward", "1", "3", "+2"] in [line.split() for line in console.file.getvalue().splitlines()]


def test_time_left_counts_evaluations_too_and_not_the_time_before_a_resume(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    history = History(total_steps=11)
    assert history.seconds_left() is None
    history.add(0, {"eval_reward": 0.1})
    assert history.seconds_left() is None
    now[0] = 103.0
    history.add(1, {"reward": 0.1, "step_time": 2.0})  # and a second for an evaluation
    assert history.seconds_left() == 3 * 10
    history.restart_clock()
    now[0] = 1000.0
    history.add(2, {"reward": 0.1, "step_time": 4.0})
    assert history.seconds_left() == 4 * 9


def test_time_left_has_the_evaluations_that_are_to_come(monkeypatch):
    """A step takes 2 s, an evaluation 7 s: after steps 4, 8 and 10 of 10."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    history, expected = History(total_steps=10, eval_every=4), []
    history.evaluated(7.0)
    history.add(0, {"eval_reward": 0.1})
    for step in range(1, 11):
        now[0] += 2.0
        values = {"reward": 0.1, "step_time": 2.0}
        if step in (4, 8, 10):
            now[0] += 7.0
            history.evaluated(7.0)
            values["eval_reward"] = 0.1
        history.add(step, values)
        expected.append(2 * (10 - step) + 7 * sum(s > step for s in (4, 8, 10)))
        assert history.seconds_left() == pytest.approx(expected[-1])
    assert expected[0] == 39


@pytest.mark.parametrize(
    ("every", "step", "left"), [(None, 0, 0), (0, 0, 1), (0, 9, 0), (3, 0, 3), (3, 3, 2), (4, 8, 1)]
)
def test_evaluations_that_are_to_come(every, step, left):
    history = History(total_steps=9, eval_every=every)
    history.step = step
    assert history.evaluations_left() == left


def test_the_log_measures_evaluations(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with RunLog(tmp_path, Config(eval_every=1), total_steps=3) as log:
        for step, seconds in ((0, 5.0), (1, 8.0)):
            log.phase("rollout")
            now[0] += 2.0
            log.phase("evaluating")
            now[0] += seconds
            log.log_step(step, {"eval_reward": 0.5, "step_time": 2.0})
        log.phase("saving")
        assert log.history.evaluation_seconds == 8.0
        assert log.history.seconds_left() == 2 * (2 + 8)


def test_the_result_is_told_in_a_line_each():
    history = History(total_steps=30)
    assert result_lines(history) == []
    evaluation = {"eval_reward": 0.3, "eval_answer": 0.2, "eval_solved": 0.24, "eval_greedy_answer": 0.2}
    history.add(0, evaluation | {"eval_greedy_solved": 0.5})
    assert result_lines(history) == ["solved, sampled: 24 % (step 0)", "solved, greedy: 50 % (step 0)"]
    for step in (1, 2):
        history.add(step, {"reward": step / 4, "rewards/answer/mean": 0.5, "solved": step / 10})
    assert result_lines(history)[2:] == ["solved, in training: 10 % -> 20 % (step 1 -> step 2)"]
    history.add(30, evaluation | {"eval_solved": 0.63, "eval_greedy_solved": None})
    assert result_lines(history) == ["solved, sampled: 24 % -> 63 % (step 0 -> step 30)"]
    unclear = History(total_steps=9)
    unclear.add(0, {"eval_reward": 0.1, "eval_solved": 0.0})  # no part says what is right
    unclear.add(9, {"eval_reward": 0.35, "eval_solved": 0.0})
    assert result_lines(unclear) == ["reward, sampled: 0.100 -> 0.350 (step 0 -> step 9)"]


def test_a_single_evaluation_has_one_column():
    history = History(total_steps=30)
    history.add(0, {"eval_reward": 0.25})
    console = Console(file=io.StringIO(), width=100)
    console.print(summary_table(history))
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["metric", "value"] in rows
    assert ["eval_reward", "0.25"] in rows
    for step in (1, 2, 3):
        history.add(step, {"reward": float(step)})
    console.print(summary_table(history))
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert rows.count(["eval_reward", "0.25"]) == 2
    assert ["reward", "1", "3", "+2"] in rows


def test_the_history_does_not_grow_with_the_run():
    history = History(total_steps=5000)
    for step in range(5000):
        history.add(step, {"reward": 0.5, "eval_reward": 0.5})
    assert (len(history.first), len(history.last), len(history.evaluations)) == (10, 10, 2)
    assert history.evaluations[0][0] == 0
    assert history.evaluations[-1][0] == 4999


def test_sparkline_and_duration():
    assert sparkline([0.0, 1.0, 2.0, 3.5, 7.0], 10) == "▁▂▃▄█"
    assert sparkline([0.0, 0.0, 7.0, 7.0], 2) == "▁█"
    assert sparkline([5.0] * 3, 9) == "▁▁▁"
    assert [duration(seconds) for seconds in (None, 7.9, 185, 3725)] == ["?", "7s", "3m05s", "1h02m"]
