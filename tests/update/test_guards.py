"""A refused update names tensor and episode. Too many end the run. Signs of a collapse are told now and then."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math

import pytest
import torch
from test_train import SMALL, EvenLetters, metrics_of, run

import evaluate
import train
from data_types import Episode
from grpo import GRPO, update_policy
from optimizer import MemoryEfficientAdamW
from qwen2_llm import Qwen2ForCausalLM
from rollout import decoding
from run.checkpoint import find_checkpoint, load_checkpoint, verify_checkpoint
from update import guards, scoring
from update.guards import PATIENCE, SILENCE, Guard, collapse_signs
from update.shaping import drop_zero_variance


@pytest.fixture
def even_letters(monkeypatch):
    monkeypatch.setattr(train, "task_from_config", lambda config: EvenLetters(seed=config.seed))


def episodes() -> list[Episode]:
    """Two groups of two. The sampler said -5 of every token."""
    return [
        Episode(i // 2, [1, 2, 3 + i // 2], [10 + i, 20, 30], [-5.0] * 3, "", "stop", advantage=1.0 - 2 * (i % 2))
        for i in range(4)
    ]


def refuse(model: Qwen2ForCausalLM, batch: list[Episode]) -> str:
    """The diagnosis of a refused update, after which weights and moments are unchanged."""
    optimizer = MemoryEfficientAdamW(model.parameters(), lr=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    guard = Guard()
    metrics = update_policy(model, optimizer, batch, guard=guard)
    assert (metrics["update/skipped"], metrics["update/not_finite"]) == (1.0, 1.0)
    torch.testing.assert_close([p.detach() for p in model.parameters()], before, rtol=0, atol=0, equal_nan=True)
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())
    diagnosis = guard.diagnosis
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
    real = scoring.token_logprobs

    def nan_for_token_12(hidden, weight, targets, *args, **kept):
        logp, entropy = real(hidden, weight, targets, *args, **kept)
        return torch.where(targets == 12, math.nan, logp), entropy

    monkeypatch.setattr(scoring, "token_logprobs", nan_for_token_12)
    diagnosis = refuse(tiny_model, episodes())
    assert "the policy's log-probability is not finite at token 0" in diagnosis
    assert "number 2 of the step" in diagnosis


def test_whichever_rank_had_the_episode_it_is_named(tiny_model, monkeypatch):
    """CHECKLIST 44: a rank whose episodes are all finite still says something. The other one knows better."""
    own = dataclasses.replace(episodes()[1], advantage=math.inf)
    elsewhere = "the entropy is not finite; the first such episode is number 7"
    monkeypatch.setattr(guards.distributed, "gather_each", lambda said: ["the loss is not finite", elsewhere])
    step = guards.Step([own], tiny_model.device)
    assert guards.name_culprit(tiny_model, [own], step, loss_of=None) == elsewhere


def test_sharded_weights_are_not_gone_through_episode_by_episode(tiny_model, monkeypatch):
    """CHECKLIST 44: each pass needs all ranks, and they do not hold the same episodes."""
    monkeypatch.setattr(guards, "is_sharded", lambda model: True)
    said = guards.name_culprit(tiny_model, [], guards.Step([], tiny_model.device), loss_of=None)
    assert said == "with sharded weights, the episode is not searched for"


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
    assert "the gradient of model.norm.weight is not finite, but every episode alone gives finite numbers" in diagnosis


def poison(monkeypatch, steps: range) -> None:
    """The first rollout answer of these steps has a log-probability that is not a number."""
    real = GRPO.rollout

    def rollout(trainer, *args, **options):
        kept, dropped = real(trainer, *args, **options)
        if trainer.step_count in steps:
            kept[0] = dataclasses.replace(kept[0], logprobs=[math.nan] * len(kept[0].logprobs))
        return kept, dropped

    monkeypatch.setattr(GRPO, "rollout", rollout)


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


def overflow(monkeypatch, steps) -> None:
    """In the rollouts of these steps the logits of the second row are not finite at its third token."""
    real_step, real_sample, calls = GRPO.step, decoding.sample, []

    def step(trainer, *args):
        calls.clear()
        if trainer.step_count + 1 in steps:
            calls.append(0)
        return real_step(trainer, *args)

    def sample(logits, *args):
        if calls:
            calls.append(1)
            if len(calls) == 4:
                logits = logits.index_fill(0, torch.tensor([1]), math.inf)
        return real_sample(logits, *args)

    monkeypatch.setattr(GRPO, "step", step)
    monkeypatch.setattr(decoding, "sample", sample)


@pytest.mark.parametrize("settings", [[], ["--drop-zero-variance", "--updates-per-rollout", 2, "--beta", 0.1]])
def test_a_step_is_refused_where_its_rollout_met_logits_that_are_not_finite(
    checkpoint_folder, tmp_path, even_letters, monkeypatch, caplog, settings
):
    """CHECKLIST 44: the run goes on, the weights of before stay, problem and token are named, the answer is kept."""
    overflow(monkeypatch, steps={2, 3, 5})
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", 5, "--max-refusals", 3]
    assert run(*words, "--save-every", 1, "--keep-checkpoints", 9, *SMALL, *settings) == 0
    rows = metrics_of(tmp_path / "run")[1:]
    assert [row["update/not_finite"] for row in rows] == [row["update/skipped"] for row in rows] == [0, 1, 1, 0, 1]
    assert rows[1]["frac_reward_missing"] == 1 / 8
    assert "the sampler's log-probability is not finite at token 2; the first such episode is number 1" in caplog.text
    assert "problem train 2: 3 tokens, finish reason not_finite, advantage 0" in caplog.text
    weights = [
        Qwen2ForCausalLM.from_pretrained(tmp_path / f"run/checkpoints/step-00000{i}").state_dict() for i in range(1, 6)
    ]
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(weights)]
    assert same == [True, True, False, True]
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples if s["finish_reason"] == "not_finite" and s["reward"] is None] == [2, 3, 5]


def test_a_group_is_not_dropped_before_its_broken_answer_was_told():
    """CHECKLIST 44: the others of the group say nothing, the broken answer does."""
    batch = [dataclasses.replace(e, reward=1.0, finish_reason="stop") for e in episodes()]
    batch[1] = dataclasses.replace(batch[1], reward=math.nan, finish_reason="not_finite")
    assert drop_zero_variance(batch) == (batch[:2], batch[2:])


def test_a_resumed_run_counts_on_and_one_that_was_ended_begins_to_count_anew(
    checkpoint_folder, tmp_path, even_letters, monkeypatch
):
    """CHECKLIST 42, 44: killed or not, the run ends after the same step."""
    overflow(monkeypatch, steps=range(2, 99))
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--max-refusals", 4, *SMALL]
    assert run(*words, "--steps", 3) == 0
    for last in (5, 9):
        assert run("--resume", tmp_path / "run", "--steps", 20) == 3
        assert metrics_of(tmp_path / "run")[-1]["step"] == last


def test_weights_that_are_not_finite_end_the_run_though_no_answer_can_be_sampled(
    checkpoint_folder, tmp_path, even_letters, monkeypatch, capsys, caplog
):
    """CHECKLIST 44: broken after step 1. Evaluations go on without their answers, and the diagnosis is the weight."""
    real = GRPO.step

    def step(trainer, *args):
        if trainer.step_count == 1:
            trainer.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
        return real(trainer, *args)

    monkeypatch.setattr(GRPO, "step", step)
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", 9, "--max-refusals", 2]
    assert run(*words, "--eval-every", 1, "--save-every", 1, *SMALL) == 3
    assert "the weight of model.layers.0.mlp.up_proj.weight is not finite" in capsys.readouterr().err
    assert "the first is to problem test 0, at token 0" in caplog.text
    rows = metrics_of(tmp_path / "run")
    assert [row.get("eval_frac_reward_missing", 0) for row in rows] == [0, 0, 1, 1]
    assert rows[-1]["eval_reward"] is None
    assert rows[-1]["update/not_finite"] == 1


def test_the_other_doors_end_in_one_line(checkpoint_folder, tmp_path, monkeypatch, capsys):
    """CHECKLIST 46: finite weights whose logits overflow. An evaluation of such a model would mean nothing."""
    model = Qwen2ForCausalLM.from_pretrained(checkpoint_folder)
    model.model.norm.weight.data *= 1e30
    model.model.embed_tokens.weight.data *= 1e10
    model.save_pretrained(checkpoint_folder)
    words = ["--ckpt", str(checkpoint_folder), *SMALL, "--samples", "2"]
    monkeypatch.setattr(evaluate, "task_from_config", lambda config: EvenLetters(seed=config.seed))
    assert evaluate.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evaluate.py: the model's logits are not finite at token 0 of a response to prompt 0")


# --- collapse

HEALTHY = {"reward": 0.5, "frac_reward_zero_std": 0.2, "completions/clipped_ratio": 0.9, "entropy": 0.5}
HEALTHY |= {"update/tokens": 100.0}
SIGNS = {
    "entropy is near 0": {"entropy": 0.001},
    "every response was cut": {"completions/clipped_ratio": 1.0},
    "all rewards of every group are equal": {"frac_reward_zero_std": 1.0},
    "no response could be scored": {"reward": math.nan, "frac_reward_zero_std": 1.0},
}


@pytest.mark.parametrize("sign", SIGNS)
def test_a_sign_of_collapse_is_told_with_advice(sign):
    assert collapse_signs(HEALTHY) == {}
    (found, advice), *others = collapse_signs(HEALTHY | SIGNS[sign]).items()
    assert sign in found
    assert not others
    assert any(word in advice for word in ("--entropy-coef", "Raise it", "--group-size", "the task's warnings"))


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
