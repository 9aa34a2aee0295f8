"""The main job end to end on a random two-layer model: steps, resume, signals, and every mistake that is refused."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import grpo
import train
from data_types import Problem, Reward
from qwen2_llm import Qwen2ForCausalLM
from run import stop_request
from run.checkpoint import find_checkpoint, verify_checkpoint
from tasks.task_base import Task

ROOT = Path(train.__file__).resolve().parent
SMALL = ["--prompt-style", "short", "--max-new-tokens", "8", "--group-size", "4", "--prompts-per-step", "2"]
SMALL += ["--eval-problems", "2", "--device", "cpu", "--dtype", "fp32", "--lr", "1e-2"]
TIMING = ("step_time", "tokens_per_second", "memory/peak_gib")


class EvenLetters(Task):
    """A task in which a random model's answers differ, so that every step has a gradient."""

    def train_problem(self, index: int) -> Problem:
        return Problem(f"train {index}", [{"role": "user", "content": f"number {index}"}], None)

    def test_problem(self, index: int) -> Problem:
        return Problem(f"test {index}", [{"role": "user", "content": f"question {index}"}], None)

    def reward(self, problem, response) -> Reward:
        share = sum(ord(c) % 2 == 0 for c in response) / max(1, len(response))
        return Reward(share, {"answer": share})


@pytest.fixture
def even_letters(monkeypatch):
    monkeypatch.setattr(train, "task_from_config", lambda config: EvenLetters(seed=config.seed))


def run(*words: object) -> int:
    return train.main([str(word) for word in words])


def metrics_of(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without times and memory."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith(TIMING)} for row in rows]


def assert_same_files(one: Path, other: Path, *names: str) -> None:
    for name in names:
        left, right = load_file(one / name), load_file(other / name)
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), (name, key)


# --- end to end


def test_an_evaluation_tells_the_whole_format_from_its_reward(checkpoint_folder, tmp_path):
    assert run("--ckpt", checkpoint_folder, "--run-dir", tmp_path, "--steps", 1, *SMALL, "--task", "arithmetic") == 0
    assert {"eval_solved", "eval_full_format", "eval_greedy_full_format"} <= metrics_of(tmp_path)[0].keys()


def test_three_steps_and_a_resume(checkpoint_folder, tmp_path, even_letters, capsys):
    """CHECKLIST 47: its messages, its files, and that a resume goes on from there."""
    run_dir = tmp_path / "run"
    assert run("--ckpt", checkpoint_folder, "--run-dir", run_dir, "--steps", 3, *SMALL) == 0
    said = capsys.readouterr().out
    assert "a step: 2 prompts x 4 responses x up to 8 tokens, 64 at most; 3 steps" in said
    assert "memory: about" in said
    assert "the run will last about" in said
    rows = metrics_of(run_dir)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert {"eval_reward", "eval_greedy_reward"} <= rows[0].keys() & rows[3].keys()
    expected = {"reward", "reward_std", "rewards/answer/mean", "rewards/answer/std", "frac_reward_zero_std",
                "policy_loss", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "completions/mean_length",
                "completions/clipped_ratio", "grad_norm", "learning_rate", "num_tokens",
                "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"}  # fmt: skip
    for row in rows[1:]:
        assert expected <= row.keys()
        assert row["grad_norm"] > 0
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
    assert len((run_dir / "samples.jsonl").read_text().splitlines()) == 3 * 2 * 4
    shown = [json.loads(line)["step"] for line in (run_dir / "held_out.jsonl").read_text().splitlines()]
    assert sorted(set(shown)) == sorted({row["step"] for row in rows if "eval_greedy_reward" in row})
    assert list(run_dir.glob("events.out.tfevents*"))
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["steps"] == 3

    last = find_checkpoint("latest", run_dir)
    assert last.name == "step-000003"
    verify_checkpoint(last)
    trained, start = (Qwen2ForCausalLM.from_pretrained(folder) for folder in (last, checkpoint_folder))
    assert all(not torch.equal(p, q) for p, q in zip(trained.parameters(), start.parameters()))

    assert run("--resume", run_dir, "--steps", 4) == 0
    assert [row["step"] for row in metrics_of(run_dir)] == [0, 1, 2, 3, 4]
    assert find_checkpoint("latest", run_dir).name == "step-000004"


class Killed(BaseException):
    """Events that a process does not survive."""


FANCY = ["--updates-per-rollout", 2, "--beta", 0.05, "--entropy-coef", 0.01, "--weight-decay", 0.1, "--amsgrad"]
FANCY += ["--lr-schedule", "cosine", "--warmup-steps", 2, "--temperature", 0.8]


class NoisyLetters(EvenLetters):
    """A task of a user's that draws from the global generators."""

    def reward(self, problem, response) -> Reward:
        share = super().reward(problem, response).total + random.random() / 10 + float(torch.rand(())) / 10
        return Reward(share, {"answer": share})


@pytest.mark.parametrize("settings", [[], ["--dtype", "bf16", *FANCY]], ids=["fp32", "bf16, fancy"])
def test_six_steps_equal_three_a_kill_a_resume_and_three(checkpoint_folder, tmp_path, monkeypatch, settings):
    """CHECKLIST 42: weights, masters, moments, random states, schedule, metrics and samples, bit for bit. Killed in
    step 5, so that a line of the log has to be taken back."""
    monkeypatch.setattr(train, "task_from_config", lambda config: NoisyLetters(seed=config.seed))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    common = ["--ckpt", checkpoint_folder, "--steps", 6, "--save-every", 3, "--eval-every", 2, *SMALL, *settings]
    assert run(*common, "--run-dir", whole) == 0

    step = train.GRPO.step

    def dies_in_step_5(trainer, *args, **options):
        if trainer.step_count == 4:
            raise Killed
        return step(trainer, *args, **options)

    monkeypatch.setattr(train.GRPO, "step", dies_in_step_5)
    with pytest.raises(Killed):
        run(*common, "--run-dir", cut)
    monkeypatch.setattr(train.GRPO, "step", step)
    assert find_checkpoint("latest", cut).name == "step-000003"
    assert [row["step"] for row in metrics_of(cut)] == [0, 1, 2, 3, 4]
    torch.manual_seed(12345)  # a new process does not begin where the old one ended
    assert run("--resume", cut) == 0

    assert metrics_of(cut) == metrics_of(whole)
    assert (cut / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    ends = [folder / "checkpoints/step-000006" for folder in (whole, cut)]
    assert_same_files(*ends, "model.safetensors", "optimizer.safetensors")
    states = [json.loads((end / "trainer_state.json").read_text()) for end in ends]
    assert states[0]["optimizer"] == states[1]["optimizer"]
    moved = [row["grad_norm"] > 0 and not row["update/skipped"] for row in metrics_of(whole)[1:]]
    assert all(moved)  # else equality would be cheap


def test_the_runs_settings_say_how_many_held_out_problems_there_were(tmp_path, monkeypatch, checkpoint_folder):
    class OneHeldOut(EvenLetters):
        def test_problem(self, index: int) -> Problem:
            if index > 0:
                raise IndexError
            return super().test_problem(index)

    monkeypatch.setattr(train, "task_from_config", lambda config: OneHeldOut(seed=config.seed))
    assert run("--ckpt", checkpoint_folder, *SMALL, "--steps", 1, "--save-every", 0, "--run-dir", tmp_path / "run") == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["eval_problems"] == 1


def test_the_same_seed_gives_the_same_run_and_another_seed_another(checkpoint_folder, tmp_path, even_letters):
    """CHECKLIST 38, of the whole job."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run("--ckpt", checkpoint_folder, "--run-dir", tmp_path / name, "--steps", 2, "--seed", seed, *SMALL) == 0
    a, b, c = (metrics_of(tmp_path / name) for name in "abc")
    assert a == b
    assert a[1]["reward"] != c[1]["reward"]


def test_a_dry_run_writes_nothing(checkpoint_folder, tmp_path, even_letters, capsys):
    run_dir = tmp_path / "run"
    assert run("--ckpt", checkpoint_folder, "--run-dir", run_dir, "--steps", 3, *SMALL, "--dry-run") == 0
    assert "dry run: peak memory" in capsys.readouterr().out
    assert not run_dir.exists()


def test_a_full_disk_does_not_end_the_run(checkpoint_folder, tmp_path, even_letters, monkeypatch, caplog):
    """CHECKLIST 43: the run goes on, and says what was lost."""
    real, calls = train.save_checkpoint, []

    def full_once(*args, **options):
        calls.append(args[1])
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return real(*args, **options)

    monkeypatch.setattr(train, "save_checkpoint", full_once)
    run_dir = tmp_path / "run"
    words = ["--ckpt", checkpoint_folder, "--run-dir", run_dir, "--steps", 2, "--save-every", 1, *SMALL]
    assert run(*words) == 0
    assert calls == [1, 2]
    assert "no checkpoint at step 1" in caplog.text
    assert find_checkpoint("latest", run_dir).name == "step-000002"


# --- being stopped


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(checkpoint_folder, tmp_path, number, code):
    """CHECKLIST 45: in a process of its own."""
    run_dir = tmp_path / "run"
    words = [sys.executable, ROOT / "train.py", "--ckpt", checkpoint_folder, "--run-dir", run_dir, "--steps", "100000"]
    words += [*SMALL, "--task", "arithmetic", "--entropy-coef", "0.01", "--save-every", "0", "--eval-every", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        list(map(str, words)), cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_for(process, "a step takes")
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code, err
    assert "finishing this step, then saving" in err
    assert "Traceback" not in err
    last = metrics_of(run_dir)[-1]["step"]
    assert find_checkpoint("latest", run_dir).name == f"step-{last:06d}"
    verify_checkpoint(find_checkpoint("latest", run_dir))
    assert f"stopped by {number.name} after step {last}; go on with: python train.py --resume {run_dir}" in out


def wait_for(process: subprocess.Popen, text: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 1.0)[0]:
            line = process.stdout.readline()
            if text in line:
                return
            if not line:
                break
    process.kill()
    pytest.fail(f"no line with {text!r}: {process.stderr.read()}")


@pytest.mark.parametrize("moment", ["evaluate", "save", "rollout"])
def test_whenever_the_signal_comes_what_was_done_is_saved(
    checkpoint_folder, tmp_path, even_letters, monkeypatch, moment
):
    """CHECKLIST 45: also while the step is evaluated or saved, when it is too late to be asked before."""
    run_dir, module = tmp_path / "run", grpo if moment == "rollout" else train
    real, calls = getattr(module, moment), []

    def interrupted(*args, **options):
        calls.append(moment)
        if len(calls) == 2:  # of evaluate: after step 1, the first is before it
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(module, moment, interrupted)
    words = ["--ckpt", checkpoint_folder, "--run-dir", run_dir, "--steps", 8, "--eval-every", 1, *SMALL]
    assert run(*words, "--save-every", 1 if moment == "save" else 0) == 130
    steps = [row["step"] for row in metrics_of(run_dir)]
    assert steps == list(range(len(steps)))
    assert len(steps) <= 4
    assert find_checkpoint("latest", run_dir).name == f"step-{steps[-1]:06d}"


def test_a_second_signal_leaves_at_once(capfd):
    """CHECKLIST 45: after the first, both signals do again what the system does with them."""
    stop = train.StopRequest()
    assert stop.requested is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert "SIGTERM: finishing this step, then saving; once more to leave at once" in capfd.readouterr().err


@pytest.mark.parametrize(("there", "action"), [(False, signal.SIG_IGN), (True, signal.SIG_DFL)])
def test_a_closed_terminal_is_no_second_signal(monkeypatch, there, action):
    """CHECKLIST 45: the shell repeats the kernel's SIGHUP. One that is sent by hand is a second signal."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    monkeypatch.setattr(stop_request, "_has_terminal", lambda: True)
    stop = train.StopRequest()
    monkeypatch.setattr(stop_request, "_has_terminal", lambda: there)
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.requested == signal.SIGHUP
    assert signal.getsignal(signal.SIGHUP) == action
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_nohup_stays_in_force():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = train.StopRequest()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.requested is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_real_process_in_the_middle_of_a_step(tmp_path, number):
    """CHECKLIST 45: a step of 2,048 long answers takes far longer than this test waits for the end."""
    words = ["--prompts-per-step", "256", "--eval-problems", "0", "--run-dir", str(tmp_path / "run")]
    with subprocess.Popen(
        [sys.executable, "train.py", *words], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        try:
            while not (tmp_path / "run" / "metrics.jsonl").exists():  # from here on signals are the run's
                assert process.poll() is None
                time.sleep(0.1)
            process.send_signal(number)
            assert any("once more to leave at once" in line for line in process.stderr)
            process.send_signal(number)
            assert process.wait(timeout=20) == -number  # what a shell calls 128 + number
        finally:
            process.kill()
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


# --- mistakes


def refused(capsys, *words: object) -> str:
    """The one line on standard error with which the program ends."""
    capsys.readouterr()
    assert run(*words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("train.py: ")
    return lines[0]


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)


BROKEN = {
    "half-downloaded weights": (lambda f: half(f / "model.safetensors"), ["model.safetensors", "download it again"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors", "no weights of any kind"]),
    "a missing tensor": (lambda f: drop_tensor(f / "model.safetensors"), ["model.norm.weight"]),
    "wrong shapes": (
        lambda f: edit_json(f / "config.json", intermediate_size=64),
        ["mlp", "has shape (", "config.json asks for ("],
    ),
    "unknown model_type": (lambda f: edit_json(f / "config.json", model_type="mamba"), ["'mamba'", "qwen2"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "does not exist"]),
    "half a config": (lambda f: half(f / "config.json"), ["config.json", "JSON"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "half a tokenizer": (lambda f: half(f / "tokenizer.json"), ["tokenizer.json"]),
    "a short context": (
        lambda f: edit_json(f / "config.json", max_position_embeddings=12),
        ["--max-new-tokens 8", "context of 12"],
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_checkpoint_that_cannot_work_is_refused_in_one_line(checkpoint_folder, tmp_path, capsys, broken):
    """CHECKLIST 46: exit code 2 and the remedy, before anything is written."""
    spoil, words = BROKEN[broken]
    spoil(checkpoint_folder)
    line = refused(capsys, "--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", *SMALL)
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


MISTAKES = {
    "a missing checkpoint": (["--ckpt", "{tmp}/nowhere/at/all"], ["nowhere/at/all", "no such folder"]),
    "a group of one": (["--group-size", 1], ["--group-size 1", "2 or more"]),
    "an unknown flag": (["--group-sise", 4], ["--group-sise", "group-size"]),
    "an unknown key": (["--config", "{tmp}/typo.yaml"], ["typo.yaml", "temprature", "temperature"]),
    "no such file of settings": (["--config", "{tmp}/none.yaml"], ["none.yaml"]),
    "an unknown task": (["--task", "countdwon"], ["countdwon", "countdown"]),
    "data without the columns": (["--task", "jsonl", "--data", "{tmp}/data.jsonl"], ["data.jsonl", "question"]),
    "missing data": (["--task", "jsonl", "--data", "{tmp}/gone.jsonl"], ["gone.jsonl", "no such"]),
    "nothing to resume": (["--resume", "{tmp}/gone"], ["--resume", "gone"]),
    "a temperature of 0": (["--temperature", 0], ["--temperature 0", "above 0"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(checkpoint_folder, tmp_path, capsys, mistake):
    """CHECKLIST 46"""
    (tmp_path / "typo.yaml").write_text("temprature: 0.5\n")
    (tmp_path / "data.jsonl").write_text('{"text": "2 + 2", "label": 4}\n')
    flags, words = MISTAKES[mistake]
    flags = [str(flag).format(tmp=tmp_path) for flag in flags]
    line = refused(capsys, "--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", *SMALL, *flags)
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_written_over(checkpoint_folder, tmp_path, even_letters, capsys):
    """CHECKLIST 46: existing files stay, to the byte."""
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", 1, *SMALL]
    assert run(*words) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert "already holds a run" in refused(capsys, *words)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_damaged_checkpoint_is_not_resumed_from(checkpoint_folder, tmp_path, even_letters, capsys):
    """CHECKLIST 46: and the log is not cut before that is known."""
    run_dir = tmp_path / "run"
    assert run("--ckpt", checkpoint_folder, "--run-dir", run_dir, "--steps", 2, "--save-every", 1, *SMALL) == 0
    path = find_checkpoint("latest", run_dir) / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    log = (run_dir / "metrics.jsonl").read_bytes()
    assert "is not what was saved" in refused(capsys, "--resume", run_dir, "--steps", 3)
    assert (run_dir / "metrics.jsonl").read_bytes() == log
    assert run("--resume", run_dir / "checkpoints/step-000001", "--steps", 3) == 0  # the one before it is whole
    assert [row["step"] for row in metrics_of(run_dir)] == [0, 1, 2, 3]


def test_the_program_ends_with_code_2_and_no_traceback(tmp_path):
    """CHECKLIST 46: from a shell."""
    words = [sys.executable, ROOT / "train.py", "--ckpt", tmp_path / "gone" / "model" / "x"]
    done = subprocess.run(list(map(str, words)), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: --ckpt")
    assert len(done.stderr.splitlines()) == 1
