"""A refused update names tensor and episode; too many end the run; signs of a collapse are told now and then."""

from __future__ import annotations

import dataclasses
import logging
import math

import pytest
import torch
from test_train import SMALL, EvenLetters, metrics_of, run

import grpo
import train
from checkpoint import find_checkpoint, load_checkpoint, verify_checkpoint
from data_types import Episode
from grpo import GRPO, update_policy
from guards import PATIENCE, SILENCE, Guard, collapse_signs
from optimizer import MemoryEfficientAdamW
from qwen2_llm import Qwen2ForCausalLM


@pytest.fixture
def even_letters(monkeypatch):
    monkeypatch.setattr(train, "task_from_config", lambda config: EvenLetters(seed=config.seed))


def episodes() -> list[Episode]:
    """Two groups of two; the sampler said -5 of every token."""
    return [
        Episode(i // 2, [1, 2, 3 + i // 2], [10 + i, 20, 30], [-5.0] * 3, "", "stop", advantage=1.0 - 2 * (i % 2))
        for i in range(4)
    ]


def refuse(model: Qwen2ForCausalLM, batch: list[Episode]) -> str:
    """The diagnosis of a refused update, after which weights and moments are what they were."""
    optimizer = MemoryEfficientAdamW(model.parameters(), lr=0.01)
    before, told = [p.detach().clone() for p in model.parameters()], []
    metrics = update_policy(model, optimizer, batch, refused=told.append)
    assert (metrics["update/skipped"], metrics["update/not_finite"]) == (1.0, 1.0)
    torch.testing.assert_close([p.detach() for p in model.parameters()], before, rtol=0, atol=0, equal_nan=True)
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())
    (diagnosis,) = told
    assert "\n" not in diagnosis
    return diagnosis


def test_a_log_probability_of_the_sampler_is_named_with_its_episode(tiny_model):
    """CHECKLIST 44"""
    bad = episodes()
    bad[2] = dataclasses.replace(bad[2], logprobs=[-5.0, math.nan, -5.0])
    diagnosis = refuse(tiny_model, bad)
    assert "the sampler's log-probability is not finite at token 1" in diagnosis
    assert "number 2 of the step, group 1: 3 tokens, finish reason stop, advantage 1" in diagnosis


def test_an_advantage_is_named_with_its_episode(tiny_model):
    """CHECKLIST 44"""
    bad = episodes()
    bad[3] = dataclasses.replace(bad[3], advantage=math.inf, finish_reason="length")
    diagnosis = refuse(tiny_model, bad)
    assert "advantage is not finite" in diagnosis
    assert "number 3 of the step, group 1: 3 tokens, finish reason length, advantage inf" in diagnosis


def test_a_weight_is_named(tiny_model):
    """CHECKLIST 44: where the fault is older than the step, no episode is to blame."""
    tiny_model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    diagnosis = refuse(tiny_model, episodes())
    assert "the weight of model.layers.1.mlp.up_proj.weight is not finite" in diagnosis
    assert "earlier checkpoint" in diagnosis


def test_a_log_probability_of_the_policy_is_named_with_its_episode(tiny_model, monkeypatch):
    """CHECKLIST 44: the model says NaN of one token only, in every pass."""
    real = grpo.losses.token_logprobs

    def nan_for_token_12(hidden, weight, targets, *args):
        logp, entropy = real(hidden, weight, targets, *args)
        return torch.where(targets == 12, math.nan, logp), entropy

    monkeypatch.setattr(grpo.losses, "token_logprobs", nan_for_token_12)
    diagnosis = refuse(tiny_model, episodes())
    assert "the policy's log-probability is not finite at token 0" in diagnosis
    assert "number 2 of the step" in diagnosis


def test_a_gradient_is_named_where_the_backward_pass_broke(tiny_model):
    """CHECKLIST 44: the hidden state of token 20 behind token 13 has an infinite gradient after layer 0."""
    layer, seen = tiny_model.model.layers[0], []

    def hook(module, inputs, output):
        rows = seen[-1] == 13
        if rows.any() and output.requires_grad:
            output.register_hook(lambda grad: torch.where(rows[:, None], math.inf, grad))

    layer.register_forward_hook(hook)
    tiny_model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    diagnosis = refuse(tiny_model, episodes())
    assert "the gradient of model.layers.0." in diagnosis
    assert "number 3 of the step, group 1" in diagnosis


def test_what_only_the_sum_overflows_is_told_so(tiny_model):
    """CHECKLIST 44: each episode's gradient is finite, and the step's is not."""
    calls = []
    tiny_model.model.norm.weight.register_hook(
        lambda grad: calls.append(1) or grad * (math.inf if len(calls) == 1 else 1)
    )
    diagnosis = refuse(tiny_model, episodes())
    assert "the gradient of model.norm.weight is not finite, though no episode alone makes it so" in diagnosis


def poison(monkeypatch, steps: range) -> None:
    """The first rollout answer of these steps has a log-probability that is not a number."""
    real = GRPO.sample

    def sample(trainer, *args):
        kept, dropped = real(trainer, *args)
        if trainer.step_count in steps:
            kept[0] = dataclasses.replace(kept[0], logprobs=[math.nan] * len(kept[0].logprobs))
        return kept, dropped

    monkeypatch.setattr(GRPO, "sample", sample)


def test_a_run_goes_on_after_refused_steps(checkpoint_folder, tmp_path, even_letters, monkeypatch, caplog):
    """CHECKLIST 44: two refused, one good, two refused: never three in a row."""
    poison(monkeypatch, steps={2, 3, 5, 6})
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", 6, "--max-refusals", 3, *SMALL]
    assert run(*words) == 0
    assert [row["update/skipped"] for row in metrics_of(tmp_path / "run")[1:]] == [0, 1, 1, 0, 1, 1]
    assert caplog.text.count("the update was refused (loss nan") == 4
    assert "the sampler's log-probability is not finite at token 0" in caplog.text
    assert "problem train 2: " in caplog.text


def test_too_many_refusals_in_a_row_end_the_run_with_the_diagnosis(
    checkpoint_folder, tmp_path, even_letters, monkeypatch, capsys
):
    """CHECKLIST 44: exit code 3, weights of before the first refusal saved, and the way to go on works."""
    poison(monkeypatch, steps=range(3, 99))
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", 9, "--max-refusals", 4]
    assert run(*words, "--save-every", 2, "--keep-checkpoints", 9, *SMALL) == 3
    error = capsys.readouterr().err
    assert "ended after step 6: 4 updates in a row were refused" in error
    assert "the sampler's log-probability is not finite at token 0" in error
    assert f"go on with: python train.py --resume {tmp_path / 'run'}" in error
    last = find_checkpoint("latest", tmp_path / "run")
    assert last.name == "step-000006"
    verify_checkpoint(last)
    good, ended = (
        Qwen2ForCausalLM.from_pretrained(last.with_name(name)).state_dict() for name in ("step-000002", last.name)
    )
    assert all(torch.equal(good[name], ended[name]) for name in good)
    monkeypatch.undo()
    monkeypatch.setattr(train, "task_from_config", lambda config: EvenLetters(seed=config.seed))
    assert run("--resume", tmp_path / "run") == 0
    assert load_checkpoint(find_checkpoint("latest", tmp_path / "run"))["step"] == 9


# --- collapse

HEALTHY = {"reward": 0.5, "frac_reward_zero_std": 0.2, "completions/clipped_ratio": 0.9, "entropy": 0.5}
HEALTHY |= {"update/tokens": 100.0}
SIGNS = {
    "entropy is near 0": {"entropy": 0.001},
    "every answer was cut": {"completions/clipped_ratio": 1.0},
    "all rewards of every group are equal": {"frac_reward_zero_std": 1.0},
    "no answer could be scored": {"reward": math.nan, "frac_reward_zero_std": 1.0},
}


@pytest.mark.parametrize("sign", SIGNS)
def test_a_sign_of_collapse_is_told_with_advice(sign):
    assert collapse_signs(HEALTHY) == {}
    (found, advice), *others = collapse_signs(HEALTHY | SIGNS[sign]).items()
    assert sign in found
    assert not others
    assert any(word in advice for word in ("--entropy-coef", "Raise it", "--group-size", "the task says"))


def test_no_entropy_was_measured_where_no_token_was_trained():
    assert collapse_signs(HEALTHY | {"entropy": 0.0, "update/tokens": 0.0}) == {}


def test_a_collapse_is_told_once_in_a_while(caplog):
    """Not before it has stood PATIENCE steps, not again within SILENCE, and anew after it had gone."""
    guard, dead = Guard(), HEALTHY | {"frac_reward_zero_std": 1.0}
    told = []
    for step in range(1, 200):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            guard.watch(step, HEALTHY if step == 2 else dead)
        told += [step] * len(caplog.records)
    assert told == [2 + PATIENCE + SILENCE * i for i in range(4)]
