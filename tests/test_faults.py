"""A run outlives its disk and its rewards."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import resource
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from test_train import SMALL, EvenLetters, metrics_of, run

import train
from qwen2_llm import Qwen2ForCausalLM
from run.checkpoint import find_checkpoint, load_checkpoint, verify_checkpoint

# --- disks


@contextlib.contextmanager
def full_disk(run_dir: Path):
    """Real: no file may grow beyond the present size of metrics.jsonl."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((run_dir / "metrics.jsonl").stat().st_size + 10, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def read_only_folder(run_dir: Path):
    """Root may write anywhere. For root this is somebody else's folder for a while."""
    root = os.geteuid() == 0
    for folder in (run_dir, run_dir / "checkpoints"):
        folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)
    for folder in (run_dir, run_dir / "checkpoints"):
        folder.chmod(0o755)


@contextlib.contextmanager
def vanished_folder(run_dir: Path):
    run_dir.rename(run_dir.with_name("elsewhere"))
    yield
    run_dir.with_name("elsewhere").rename(run_dir)


@pytest.mark.parametrize("fault", [full_disk, read_only_folder, vanished_folder])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer thread
def test_a_disk_that_fails_for_two_steps_costs_their_files_and_nothing_else(
    checkpoint_folder, monkeypatch, caplog, capsys, fault
):
    """CHECKLIST 43: in steps 3 and 4 of 6 the disk takes nothing. The checkpoint of step 2 stays whole, each fault is
    told, and from step 5 on everything is written again."""
    step, seen, stack = train.GRPO.step, {}, contextlib.ExitStack()
    with tempfile.TemporaryDirectory() as folder:  # where others may look, too, unlike in pytest's
        Path(folder).chmod(0o755)
        run_dir = Path(folder) / "run"

        def faulty(trainer, *args):
            if trainer.step_count == 2:
                stack.enter_context(fault(run_dir))
            if trainer.step_count == 4:
                stack.close()
                seen["latest"] = find_checkpoint("latest", run_dir).name
                verify_checkpoint(find_checkpoint("latest", run_dir))
            return step(trainer, *args)

        monkeypatch.setattr(train, "task_from_config", lambda config: EvenLetters(seed=config.seed))
        monkeypatch.setattr(train.GRPO, "step", faulty)
        words = ["--ckpt", checkpoint_folder, "--run-dir", run_dir, "--steps", 6, "--save-every", 1, "--eval-every", 0]
        with stack:
            assert run(*words, *SMALL) == 0
        assert seen["latest"] == "step-000002"
        assert "no checkpoint at step 3" in caplog.text
        assert "no checkpoint at step 4" in caplog.text
        assert "no checkpoint at step 5" not in caplog.text
        steps = [row["step"] for row in metrics_of(run_dir)]
        if fault is not read_only_folder:  # an open file of such a folder may still be written
            assert steps == [0, 1, 2, 5, 6]
            assert capsys.readouterr().err.count("metrics.jsonl not written") == 1
        else:
            assert steps == [0, 1, 2, 3, 4, 5, 6]
        assert load_checkpoint(find_checkpoint("latest", run_dir))["step"] == 6


def test_where_the_last_checkpoint_is_on_no_disk_the_exit_code_says_so(
    checkpoint_folder, tmp_path, monkeypatch, capsys
):
    """CHECKLIST 43: not 0, because a script that started the run would delete its inputs."""
    monkeypatch.setattr(train, "task_from_config", lambda config: EvenLetters(seed=config.seed))

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "save_checkpoint", full)
    assert run("--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", 1, *SMALL) == train.NOT_SAVED == 4
    error = capsys.readouterr().err
    assert "step 1, the last one, is on no disk; there is no checkpoint" in error
    assert "--resume" not in error, "nothing is there to go on from"


def test_a_stop_whose_save_fails_promises_only_what_is_there(checkpoint_folder, tmp_path, monkeypatch, capsys):
    """CHECKLIST 43, 45: Ctrl-C in step 3 of a run with a checkpoint of step 2, and a disk that is full by then."""
    monkeypatch.setattr(train, "task_from_config", lambda config: EvenLetters(seed=config.seed))
    real, step = train.save_checkpoint, train.GRPO.step

    def full(run_dir, number, *args, **options):
        if number > 2:
            raise OSError(28, "No space left on device")
        return real(run_dir, number, *args, **options)

    def interrupted(trainer, *args):
        if trainer.step_count == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, *args)

    monkeypatch.setattr(train, "save_checkpoint", full)
    monkeypatch.setattr(train.GRPO, "step", interrupted)
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", 9, "--save-every", 2, *SMALL]
    assert run(*words) == train.NOT_SAVED
    said = capsys.readouterr()
    assert "step 3, the last one, is on no disk; go on from step-000002 with: python train.py --resume" in said.err
    assert "stopped by SIGINT after step 3" in said.out
    assert find_checkpoint("latest", tmp_path / "run").name == "step-000002"


# --- weights that nobody can use


def good_checkpoints(run_dir: Path) -> list[str]:
    """Names of the checkpoints whose weights give finite logits."""
    found = []
    for folder in sorted(run_dir.glob("checkpoints/step-*")):
        verify_checkpoint(folder)
        model = Qwen2ForCausalLM.from_pretrained(folder)
        assert all(p.isfinite().all() for p in model.parameters())
        with torch.no_grad():
            if model(torch.tensor([[1, 2, 3]])).isfinite().all():
                found.append(folder.name)
    return found


def damaged_by(monkeypatch, damage, steps) -> None:
    """In these steps the update ends with weights on which `damage` was done."""
    step = train.GRPO.step

    def damaging(trainer, *args):
        done = step(trainer, *args)
        if trainer.step_count in steps:
            damage(trainer.model)
        return done

    monkeypatch.setattr(train.GRPO, "step", damaging)


def to_nan(model) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = math.nan


def to_infinity(model) -> None:
    model.model.embed_tokens.weight.data[-1, -1] = -math.inf  # a row that no token uses


def to_huge_numbers(model) -> None:
    model.model.norm.weight.data *= 1e30
    model.model.embed_tokens.weight.data *= 1e10


@pytest.mark.parametrize("damage", [to_nan, to_infinity])
@pytest.mark.parametrize("steps", [1, 2])
def test_an_update_that_breaks_the_weights_ends_the_run_and_is_not_saved(
    checkpoint_folder, tmp_path, monkeypatch, capsys, damage, steps
):
    """CHECKLIST 44: after step 1 a weight is infinite or NaN."""
    monkeypatch.setattr(train, "task_from_config", lambda config: EvenLetters(seed=config.seed))
    damaged_by(monkeypatch, damage, {1})
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", steps, *SMALL, "--save-every", 1]
    assert run(*words) == train.NUMBERS_ENDED_IT
    error = capsys.readouterr().err
    assert "ended after step 1: its update made model." in error
    assert "weight NaN or infinite, so it was not saved" in error
    assert "there is no checkpoint" in error
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


@pytest.mark.parametrize("damage", [to_nan, to_infinity, to_huge_numbers])
def test_the_last_good_checkpoint_survives_an_update_that_destroys_the_model(
    checkpoint_folder, tmp_path, monkeypatch, capsys, caplog, damage
):
    """CHECKLIST 44: one checkpoint is kept, and every step saved. Finite weights may be too large for finite logits."""
    monkeypatch.setattr(train, "task_from_config", lambda config: EvenLetters(seed=config.seed))
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", 2, "--keep-checkpoints", 1]
    assert run(*words, "--save-every", 1, *SMALL) == 0
    assert good_checkpoints(tmp_path / "run") == ["step-000002"]
    more = ["--resume", tmp_path / "run", "--steps", 8, "--max-refusals", 3]
    with monkeypatch.context() as patch:
        damaged_by(patch, damage, {3})
        assert run(*more) == train.NUMBERS_ENDED_IT
    assert "go on from step-000002 with: python train.py --resume" in capsys.readouterr().err
    assert damage is not to_huge_numbers or "no checkpoint at step 3: the model's logits are NaN" in caplog.text
    assert good_checkpoints(tmp_path / "run") == ["step-000002"]
    assert run(*more) == 0


def test_refused_steps_do_not_push_a_sound_checkpoint_out(checkpoint_folder, tmp_path, monkeypatch):
    """CHECKLIST 44: the steps after 2 are refused, each is saved, and 2 stays with the newest of them."""
    monkeypatch.setattr(train, "task_from_config", lambda config: EvenLetters(seed=config.seed))
    real = train.GRPO.rollout

    def sample(trainer, *args, **options):
        kept, dropped = real(trainer, *args, **options)
        if trainer.step_count > 2:
            kept[0] = dataclasses.replace(kept[0], logprobs=[math.nan] * len(kept[0].logprobs))
        return kept, dropped

    monkeypatch.setattr(train.GRPO, "rollout", sample)
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", 6, "--keep-checkpoints", 1]
    assert run(*words, "--save-every", 1, "--max-refusals", 0, "--eval-problems", 0, *SMALL) == 0
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").glob("step*"))] == ["step-000002", "step-000006"]


def test_a_run_ended_before_its_first_checkpoint_begins_again(checkpoint_folder, tmp_path, monkeypatch, capsys):
    """CHECKLIST 42: --resume is the command that goes on, whenever the kill came. Not where checkpoints were lost."""
    monkeypatch.setattr(train, "task_from_config", lambda config: EvenLetters(seed=config.seed))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run_dir in (whole, cut):
        words = ["--ckpt", checkpoint_folder, "--run-dir", run_dir, "--steps", 3, "--save-every", 0, *SMALL]
        assert run(*words) == 0
    for path in (cut / "checkpoints").rglob("*"):
        if path.is_file():
            path.unlink()
    for path in (*(cut / "checkpoints").iterdir(), cut / "checkpoints"):
        path.rmdir()
    assert run("--resume", cut) == 0
    assert metrics_of(cut) == metrics_of(whole)
    assert (cut / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()

    (cut / "checkpoints/step-000003/trainer_state.json").unlink()
    log = (cut / "metrics.jsonl").read_bytes()
    assert run("--resume", cut) == 2
    assert "not a checkpoint" in capsys.readouterr().err
    assert (cut / "metrics.jsonl").read_bytes() == log


# --- rewards of users

USER = """
import os, time
from dataclasses import dataclass
from data_types import Problem, Reward
from tasks.task_base import Task

@dataclass(kw_only=True)
class Mine(Task):
    def train_problem(self, index):
        return Problem(f"p{index}", [{"role": "user", "content": f"number {index}"}], index)

    test_problem = train_problem

    def reward(self, problem, response):
        kind = sum(map(ord, response)) % 5
        if kind == 0:
            raise RuntimeError("no")
        if kind == 1:
            os._exit(1)
        if kind == 2:
            os.fork()
        return Reward(float(kind), {"mine": float(kind)})
"""


def test_a_run_on_a_reward_that_often_fails_goes_on_and_counts(checkpoint_folder, tmp_path):
    """CHECKLIST 16: part of each group has no reward. The others are trained on, and the share is in the metrics."""
    (tmp_path / "mine.py").write_text(USER)
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", 2, *SMALL, "--group-size", 6]
    with pytest.warns(RuntimeWarning, match="counted as NaN, the run goes on"):
        assert run(*words, "--task", f"{tmp_path / 'mine.py'}:Mine") == 0
    rows = metrics_of(tmp_path / "run")[1:]
    assert any(row["rewards/mine/mean"] is not None for row in rows)
    shares = [row.get("frac_reward_missing", 0) for row in rows]
    assert 0 < sum(shares) < 2
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert sum(sample["reward"] is None for sample in samples) == round(12 * sum(shares))
    assert any(row["grad_norm"] > 0 for row in rows)
