"""The coefficients that the microscope shows are the gradient of the step that was done, for every loss."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import make_model

from data_types import Episode, MiniBatch
from grpo import GRPO, update_policy
from run.config import Config, parse_args
from run.options import LossOptions
from run.run_log import RunLog
from study.microscope import UNITS, choose, microscope
from study.run_files import read_run
from update.losses import POLICY_LOSSES
from update.scoring import score_episodes
from update.token_traces import TokenTraces, first_groups, significant

PROMPTS = [[40, 41, 42], [50, 51, 52, 53]]
RESPONSES = [torch.randint(256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 2, 7, 4, 3, 6)]
ADVANTAGES = (1.0, -1.0, 0.5, -1.5, 0.0, 2.0)
SETTINGS = {
    "plain": {},
    "clip": {"epsilon_low": 0.05, "epsilon_high": 0.05, "cispo_epsilon_max": 1.02},
    "reference": {"beta": 0.3, "kl": "k3"},
    "k2 of the rollout": {"beta": 0.3, "kl": "k2", "kl_against": "rollout"},
    "kl": {"beta": 0.2, "kl": "kl", "kl_target": 0.1},
    "entropy": {"entropy_coef": 0.1},
    "transport": {"beta": 0.1, "kl": "ot"},
    "weights by token": {"importance_correction": "truncate_token", "importance_cap": 1.1},
    "weights by sequence": {"importance_correction": "mask_sequence", "importance_cap": 1.2},
    "second update": {"importance_correction": "mask_token", "importance_cap": 1.1, "before": True},
    "top entropy": {"top_entropy_share": 0.4},
    "cut": {"mask_truncated": True},
    "all": {"importance_correction": "truncate_token", "beta": 0.3, "kl": "k1", "entropy_coef": 0.1,
            "top_entropy_share": 0.5, "mask_truncated": True, "epsilon_low": 0.05, "epsilon_high": 0.05},
}  # fmt: skip


def other_model(seed: int):
    model = make_model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def models():
    """A policy, the one it was in the rollout, and a reference."""
    return make_model().eval(), other_model(1), other_model(2)


@pytest.fixture(scope="module")
def episodes(models):
    drawn = [
        Episode(i // 3, PROMPTS[i // 3], ids, [0.0] * len(ids), f"text {i}", "length" if i == 3 else "stop", float(i),
                {"answer": float(i % 2)}, advantage=advantage)
        for i, (ids, advantage) in enumerate(zip(RESPONSES, ADVANTAGES))
    ]  # fmt: skip
    scores = score_episodes(models[1], drawn)
    return [dataclasses.replace(e, logprobs=s.logp.tolist()) for e, s in zip(drawn, scores)]


def stepped(models, episodes, loss: LossOptions, before: bool = False):
    """The traced episodes of an update, and its gradient by parameter."""
    policy, sampler, reference = models
    gradients = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            gradients.append({n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})

    traces = TokenTraces(range(len(episodes)))
    episodes = [dataclasses.replace(e) for e in episodes]
    update_policy(
        policy, Watched(policy.parameters(), lr=0.0), episodes, loss=loss, reference=reference, traces=traces,
        before=score_episodes(sampler, episodes, keep_hidden=True) if before else None, max_new_tokens=9,
        max_grad_norm=1e9, micro_batch_tokens=12,
    )  # fmt: skip
    traces.attach(episodes)
    return episodes, gradients[0]


def written(folder: Path, loss: LossOptions, episodes):
    """The run that a log of these episodes is, as report.py reads it."""
    config = Config(run_dir=str(folder), **dataclasses.asdict(loss))
    with RunLog(folder, config, total_steps=1, live=False) as log:
        log.log_samples(1, episodes, lambda ids: f"<{ids[0]}>")
        log.log_step(1, {"grad_norm": 0.5})
    return read_run(folder)


def coefficients_of(response: dict, loss_type: str) -> torch.Tensor:
    unit = response["units"][UNITS[loss_type]]["unit"]
    return response["weights"][loss_type] * torch.tensor(unit, dtype=torch.float64)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_a_coefficient_is_autograds_gradient_of_the_steps_loss(tmp_path, models, episodes, loss_type, name):
    """CHECKLIST 73: for every loss, the numbers of the page are those that autograd had in the step itself."""
    given = dict(SETTINGS[name])
    before = given.pop("before", False) or name == "transport"
    loss = LossOptions(loss_type=loss_type, **given)
    done, _ = stepped(models, episodes, loss, before)
    run = written(tmp_path / "run", loss, done)
    assert not run.notes
    (step,) = microscope(run)["steps"]
    kept = [r for r in step["responses"] if "left_out" not in r]
    assert len(kept) >= 4
    for response in kept:
        own = torch.tensor(response["coefficient"], dtype=torch.float64)
        found = coefficients_of(response, loss_type)
        torch.testing.assert_close(found, own, rtol=1e-6, atol=1e-6 * max(own.abs().max().item(), 1e-3))
        assert response["difference"] < 2e-6
    for other in POLICY_LOSSES:  # what the page shows of another loss is that loss's own step
        theirs = dataclasses.replace(loss, loss_type=other)
        if other != loss_type and name in ("clip", "all", "cut"):
            done, _ = stepped(models, episodes, theirs, before)
            for response, episode in zip(step["responses"], done):
                if "left_out" not in response:
                    own = torch.tensor(episode.trace["coefficient"], dtype=torch.float64)
                    found = coefficients_of(response, other)
                    torch.testing.assert_close(found, own, rtol=2e-6, atol=2e-6 * max(own.abs().max().item(), 1e-3))


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_the_coefficients_are_the_whole_gradient_of_a_step_without_entropy(models, episodes, loss_type):
    """sum of coefficient * d log-probability / d weights, by a slow forward pass, is the update's gradient."""
    policy = models[0]
    loss = LossOptions(loss_type=loss_type, beta=0.3, epsilon_low=0.05, epsilon_high=0.05)
    done, gradient = stepped(models, episodes, loss)
    total = torch.zeros(())
    for e in done:
        logits = policy(torch.tensor([e.prompt_ids + e.response_ids]))[0, len(e.prompt_ids) - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, torch.tensor(e.response_ids)[:, None])[:, 0]
        total = total + (torch.tensor(e.trace["coefficient"]) * logp).sum()
    named = dict(policy.named_parameters())
    for name, expected in zip(named, torch.autograd.grad(total, list(named.values()))):
        torch.testing.assert_close(gradient[name], expected, rtol=1e-4, atol=1e-6)


def test_clipped_tokens_are_those_that_the_loss_does_not_move(tmp_path, models, episodes):
    loss = LossOptions(epsilon_low=0.05, epsilon_high=0.05)
    run = written(tmp_path / "run", loss, stepped(models, episodes, loss)[0])
    responses = [r for r in microscope(run)["steps"][0]["responses"] if "left_out" not in r]
    codes = "".join(r["units"]["clipped_surrogate"]["clipped"] for r in responses)
    assert set(codes) == {"0", "1", "2"}
    for r in responses:
        for code, coefficient, ratio in zip(
            r["units"]["clipped_surrogate"]["clipped"], r["coefficient"], r["ratio"], strict=True
        ):
            assert (coefficient == 0) == (code != "0")
            assert {"0": True, "1": ratio < 0.95, "2": ratio > 1.05}[code]


def test_a_response_that_the_step_leaves_out_moves_nothing_and_says_why(tmp_path, models, episodes):
    loss = LossOptions(mask_truncated=True)
    run = written(tmp_path / "run", loss, stepped(models, episodes, loss)[0])
    responses = microscope(run)["steps"][0]["responses"]
    assert "advantage is 0" in responses[4]["left_out"]
    assert "it was cut" in responses[3]["left_out"]
    assert set(responses[3]["weights"].values()) == {0.0}
    assert responses[4]["weights"]["dapo"] == pytest.approx(1 / (sum(map(len, RESPONSES)) - len(RESPONSES[3])))


def test_logging_changes_no_number_of_the_training(checkpoint_folder):
    """Weights after three steps of two updates each, bit for bit."""

    def trained(log_tokens: int):
        words = f"--ckpt {checkpoint_folder} --task arithmetic --prompt-style short --lr 1e-2 --max-new-tokens 6 " \
                "--group-size 3 --prompts-per-step 2 --device cpu --dtype fp32 --updates-per-rollout 2 --beta .1 " \
                f"--entropy-coef .01 --log-tokens {log_tokens}"  # fmt: skip
        trainer = GRPO(parse_args(words.split()))
        for step in range(3):
            problems = trainer.task.problems("train", 2, start=2 * step)
            episodes, metrics = trainer.step(MiniBatch.from_problems(problems, trainer.tokenizer))
        timed = [name for name in metrics if "second" in name or "time" in name]
        return trainer.model, episodes, {name: value for name, value in metrics.items() if name not in timed}

    (plain, untraced, metrics), (watched, traced, others) = trained(0), trained(1000)
    assert all(e.trace is None for e in untraced)
    assert all(e.trace for e in traced)
    assert any("coefficient" in e.trace for e in traced)
    assert metrics == others
    for (name, one), other in zip(plain.named_parameters(), watched.parameters()):
        assert torch.equal(one, other), name


def test_whole_groups_are_traced_as_many_as_fit_and_at_least_one(episodes):
    assert first_groups(episodes, 0) == set()
    assert first_groups(episodes, 1) == {0, 1, 2}
    assert first_groups(episodes, sum(map(len, RESPONSES)) - 1) == {0, 1, 2}
    assert first_groups(episodes, sum(map(len, RESPONSES))) == set(range(6))


def test_seven_digits_are_kept_of_every_coefficient():
    assert significant(torch.tensor([1.23456789e-5, -9.87654321, 0.0, 1.0], dtype=torch.float64)).tolist() == [
        1.234568e-5, -9.876543, 0.0, 1.0
    ]  # fmt: skip


def test_what_is_not_finite_is_null_and_the_response_is_left_out(tmp_path, models, episodes):
    broken = [dataclasses.replace(episodes[0], logprobs=[float("nan")] * 5), *episodes[1:]]
    traces = TokenTraces(range(6))
    update_policy(models[0], torch.optim.SGD(models[0].parameters(), lr=0.0), broken, traces=traces)
    traces.attach(broken)
    run = written(tmp_path / "run", LossOptions(), broken)
    step = microscope(run)["steps"][0]
    assert step["facts"]["refused"] is True
    assert "not finite" in step["responses"][0]["left_out"]
    json.dumps(step, allow_nan=False)


def test_steps_are_whole_at_the_ends_and_thinned_in_between(tmp_path):
    records = {s: [{"group_id": g, "tokens": ["x"] * 10} for g in (1, 2)] for s in range(1, 12)}
    shown = choose(records, {1, 11}, most_tokens=40 + 90)
    assert {step: len(found) for step, found in shown.items()} == {1: 2, 11: 2} | dict.fromkeys(range(2, 11), 1)
    shown = choose(records, {1, 11}, most_tokens=40 + 30)
    assert list(shown) == [1, 4, 7, 10, 11]
    assert list(choose(records, {1, 11}, most_tokens=0)) == [1, 11]


WRONG = [None, 3, "x", [], {}, {"step": None}, {"step": {}}, {"weight": "x"}]
FIELDS = {
    "weight": ["x", None, [1]], "logp": [None, "x", [1], [None] * 2, ["x"] * 2], "coefficient": [[1e400] * 2, {}],
    "ref_logp": [[1]], "mask": ["ab"], "surprise": [1],
}  # fmt: skip
FACTS = {
    "loss_type": ["no", None, 3, ["dapo"]], "tokens": [-1, 0, 2**40, "x", 1.5], "responses": [0, 2**50],
    "beta": ["x", -1], "delta": [0.5, "x", True], "no_such": [1], "longest": [None], "mask_truncated": [1, "yes"],
    "kl": ["k9"],
    "importance_cap": [10**400, 0], "epsilon_low": [True, None],
}  # fmt: skip


def test_a_file_with_anything_in_the_update_is_read_and_shown(tmp_path):
    from report_fixtures import sample, write_run

    good = {"step": {"loss_type": "dapo", "tokens": 9, "responses": 2, "longest": 8}, "weight": 0.1,
            "logp": [-1.0, -2.0], "entropy": [0.1, 0.2], "coefficient": [0.1, 0.2]}  # fmt: skip
    updates = [
        *WRONG,
        *({**good, name: value} for name, values in FIELDS.items() for value in values),
        *({k: v for k, v in good.items() if k != name} for name in good),
        *({**good, "step": {**good["step"], name: value}} for name, values in FACTS.items() for value in values),
    ]
    for number, update in enumerate(updates):
        pair = [sample(1, 1, 0, update=good), sample(1, 1, 1, update=update)]
        for i, samples in enumerate((pair, pair[::-1])):
            folder = write_run(tmp_path / f"run-{number}-{i}", samples=samples)
            found = microscope(read_run(folder))
            assert 1 <= len(found["steps"][0]["responses"]) <= 2, update


def test_a_run_without_these_numbers_says_so_in_one_line(tmp_path):
    from report_fixtures import write_run

    found = microscope(read_run(write_run(tmp_path / "old")))
    assert found["steps"] == []
    assert "older than the microscope" in found["note"]
    with pytest.raises(ValueError, match="step 1 has no numbers"):
        microscope(read_run(write_run(tmp_path / "other")), asked=[1])


def test_losses_of_one_unit_differ_only_in_their_weights(tmp_path, models, episodes):
    run = written(tmp_path / "run", LossOptions(), stepped(models, episodes, LossOptions())[0])
    weights = microscope(run)["steps"][0]["responses"][0]["weights"]
    tokens, longest = sum(map(len, RESPONSES)), 9
    assert weights == pytest.approx(
        dict.fromkeys(("dapo", "bnpo", "cispo"), 1 / tokens)
        | dict.fromkeys(("grpo", "gspo", "sapo"), 1 / (6 * len(RESPONSES[0])))
        | {"dr_grpo": 1 / (6 * longest)}
    )
    assert len(set(itertools.chain(UNITS.values()))) == 4
