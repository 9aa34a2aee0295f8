"""A resume applies an option or refuses it, with a remedy that works. The file config.yaml has the options that ran."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import SMALL, EvenLetters, metrics_of, refused, run

import train
from run.checkpoint import find_checkpoint
from run.config import Config, load_config
from run.resume_rules import APPLIED, RULES, check_resume

LORA = ["--lora-rank", 2, "--lora-targets", "q_proj", "v_proj"]


@pytest.fixture(autouse=True)
def _even_letters(monkeypatch):
    monkeypatch.setattr(train, "task_from_config", lambda config: EvenLetters(seed=config.seed))


@pytest.fixture
def finished(checkpoint_folder, tmp_path):
    """A function that makes a run of two steps, each of them saved. Its folder."""

    def finish(*words: object):
        options = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", 2, "--save-every", 1]
        assert run(*options, "--eval-every", 0, *SMALL, *words) == 0
        return tmp_path / "run"

    return finish


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def test_the_table_has_every_option():
    assert list(RULES) == [field.name for field in dataclasses.fields(Config)]


REFUSED = [
    (["--seed", 1], "--seed 1", "--seed 0"),
    (["--task", "countdown"], "--task countdown", "--task arithmetic"),
    (["--data", "rows.jsonl"], "--data rows.jsonl", "--data None"),
    (["--numbers", 3], "--numbers 3", "--numbers 3 4"),
    (["--max-number", 7], "--max-number 7", "--max-number 99"),
    (["--prompt-style", "full"], "--prompt-style full", "--prompt-style short"),
    (["--answer-weight", 2], "--answer-weight 2.0", "--answer-weight 1.0"),
    (["--reward-preset", "lineage"], "--reward-preset lineage", "--reward-preset none"),
    (["--prompts-per-step", 3], "--prompts-per-step 3", "--prompts-per-step 2"),
    (["--amsgrad"], "--amsgrad", "--no-amsgrad"),
    (["--lora-rank", 2], "--lora-rank 2", "--lora-rank 0"),
    (["--lora-alpha", 8], "--lora-alpha 8.0", "--lora-alpha 32.0"),
    (["--lora-targets", "q_proj"], "--lora-targets q_proj", "--lora-targets q_proj k_proj"),
    (["--dtype", "bf16"], "--dtype bf16", "--dtype fp32"),
    (["--lr", 0.5, "--seed", 3], "--seed 3", "--seed 0"),
]


def test_what_would_not_belong_together_is_refused_and_nothing_is_changed(finished, capsys):
    run_dir = finished()
    before = files_of(run_dir)
    for words, new, old in REFUSED:
        line = refused(capsys, "--resume", run_dir, "--steps", 4, *words)
        assert f"{new}: the run has {old}" in line
        assert f"--ckpt {run_dir / 'checkpoints/step-000002'} --run-dir NEW_FOLDER {new}" in line
        assert files_of(run_dir) == before
    assert "is already at step 2" in refused(capsys, "--resume", run_dir, "--steps", 1)
    assert files_of(run_dir) == before


def test_the_remedy_is_a_command_that_works(finished, tmp_path, capsys):
    line = refused(capsys, "--resume", finished(), "--lora-rank", 2, "--seed", 4)
    words = shlex.split(line[line.index("python train.py") :])
    new = [str(tmp_path / "new") if word == "NEW_FOLDER" else word for word in words[2:]]
    assert run(*new) == 0
    config = load_config(tmp_path / "new/config.yaml")
    assert (config.lora_rank, config.seed, config.steps) == (2, 4, 2)
    assert [row["step"] for row in metrics_of(tmp_path / "new")] == [0, 1, 2]


def optimizer_settings(run_dir) -> dict:
    record = json.loads((find_checkpoint("latest", run_dir) / "trainer_state.json").read_text())
    return record["optimizer"]["param_groups"][0]


APPLIES = [
    (["--weight-decay", 0.5], "weight_decay", 0.5),
    (["--betas", 0.5, 0.6], "betas", [0.5, 0.6]),
    (["--eps", 0.1], "eps", 0.1),
    (["--lr", 0.001], "lr", 0.001),
    (["--entropy-coef", 3.0], None, None),
    (["--entropy-target", 99.0, "--entropy-coef", 3.0], None, None),
    (["--beta", 5.0, "--kl", "kl", "--updates-per-rollout", 2], None, None),
    (["--max-grad-norm", 0.001, "--eps", 0.01], "eps", 0.01),
    (["--group-size", 6], None, None),
    (["--temperature", 0.5], None, None),
]


@pytest.mark.parametrize(("words", "setting", "value"), APPLIES, ids=lambda x: x[0] if isinstance(x, list) else "")
def test_an_applied_option_changes_the_next_step_and_is_in_config_yaml(finished, tmp_path, words, setting, value):
    """The step after the resume gives other weights than without the option."""
    run_dir = finished()
    shutil.copytree(run_dir, tmp_path / "plain")
    assert run("--resume", tmp_path / "plain", "--steps", 3) == 0
    assert run("--resume", run_dir, "--steps", 3, *words) == 0
    one, other = (load_file(find_checkpoint("latest", d) / "model.safetensors") for d in (run_dir, tmp_path / "plain"))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    name = words[0][2:].replace("-", "_")
    assert getattr(load_config(run_dir / "config.yaml"), name) != getattr(Config(), name)
    assert setting is None or optimizer_settings(run_dir)[setting] == value


def test_an_entropy_coefficient_that_adapts_goes_on_if_nobody_changes_it(finished):
    run_dir = finished("--entropy-target", 99.0, "--entropy-coef", 0.125, "--entropy-coef-step", 0.125)
    assert run("--resume", run_dir, "--steps", 4) == 0
    assert [row["entropy_coef"] for row in metrics_of(run_dir)[1:]] == [0.125, 0.25, 0.375, 0.5]
    assert run("--resume", run_dir, "--steps", 6, "--entropy-coef", 0.0625) == 0
    assert [row["entropy_coef"] for row in metrics_of(run_dir)[5:]] == [0.0625, 0.1875]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_type_of_the_weights_is_the_runs_whatever_this_machine_would_choose(finished, dtype):
    """`auto` is fp32 for this tiny model."""
    run_dir = finished("--dtype", dtype)
    assert run("--resume", run_dir, "--steps", 3, "--dtype", "auto") == 0
    assert load_config(run_dir / "config.yaml").dtype == dtype
    kinds = {tensor.dtype for tensor in load_file(find_checkpoint("latest", run_dir) / "model.safetensors").values()}
    assert kinds == {torch.bfloat16 if dtype == "bf16" else torch.float32}


# --- the original checkpoint


def change_a_weight(folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("options", [LORA, ["--beta", 0.1]], ids=["adapters", "a reference policy"])
def test_other_base_weights_at_the_same_path_are_noticed(finished, checkpoint_folder, tmp_path, capsys, options):
    run_dir = finished(*options)
    shutil.copytree(checkpoint_folder, tmp_path / "moved")
    assert run("--resume", run_dir, "--steps", 3, "--ckpt", tmp_path / "moved") == 0  # the same weights elsewhere
    change_a_weight(tmp_path / "moved")
    before = files_of(run_dir)
    line = refused(capsys, "--resume", run_dir, "--steps", 4)
    assert "these are not the base weights of" in line
    assert f"--ckpt {run_dir}/checkpoints/step-000003" in line
    assert files_of(run_dir) == before
    assert run("--resume", run_dir, "--steps", 4, "--ckpt", checkpoint_folder) == 0


def test_a_run_that_trains_all_weights_needs_no_other_checkpoint(finished, checkpoint_folder, tmp_path, capsys):
    run_dir = finished()
    shutil.copytree(checkpoint_folder, tmp_path / "other")
    line = refused(capsys, "--resume", run_dir, "--steps", 3, "--ckpt", tmp_path / "other")
    assert f"--ckpt {tmp_path / 'other'}: a resumed run has the weights of its own checkpoint" in line
    shutil.rmtree(checkpoint_folder)
    assert run("--resume", run_dir, "--steps", 3) == 0


def test_a_checkpoint_without_its_run_is_continued_with_the_settings_that_are_given(finished, tmp_path):
    run_dir = finished()
    shutil.copytree(run_dir / "checkpoints/step-000002", tmp_path / "copy")
    config = dataclasses.replace(load_config(run_dir / "config.yaml"), seed=9, resume=str(tmp_path / "copy"))
    start = check_resume(config, tmp_path / "copy")
    assert (start.before, start.dtype, start.base) == (None, "fp32", None)


def test_every_rule_is_applied_or_gives_its_reason():
    assert all(rule == APPLIED or len(rule.split()) > 3 for rule in RULES.values())
