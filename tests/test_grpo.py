"""GRPO against a slow, written-out twin: plain padded batches, plain log_softmax, loops over episodes and tokens."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import random
import statistics
from contextlib import nullcontext

import pytest
import torch
from conftest import make_config, make_model

import grpo
from data_types import Episode, MiniBatch, Problem, Reward
from grpo import GRPO, compute_advantages, rollout, update_policy
from math_task import CountdownTask
from model.qwen2_config import Qwen2Config
from optimizer import MemoryEfficientAdamW
from qwen2_llm import Qwen2ForCausalLM
from rollout.generation import generate
from rollout.sampling import SamplingParams
from run.config import Config
from run.pretrained import locate_pretrained
from tasks.task_base import Task
from tokenizer import Tokenizer
from update import losses
from update.packing import Step
from update.scoring import score_episodes

VOCAB, PAD, STOP = 259, 256, 258
TEMPERATURE = 0.8


# --- the reference implementation, and its inputs


def make_episodes(seed: int = 0, groups: int = 3, n: int = 4, lengths=range(1, 9)) -> list[Episode]:
    """Ragged prompts and answers of random ids, the pad id among them, in groups that stand interleaved.

    The sampler's log-probabilities are made up, around a uniform policy's: ratios far from 1, so that clipping shows.
    """
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCAB) for _ in range(3 + 4 * g)] for g in range(groups)]
    episodes = []
    for _ in range(n):
        for g, prompt in enumerate(prompts):
            answer = [rng.choice([PAD, rng.randrange(VOCAB)]) for _ in range(rng.choice(lengths))]
            episodes.append(
                Episode(
                    group_id=g,
                    prompt_ids=prompt,
                    response_ids=answer,
                    logprobs=[-6.0 + rng.gauss(0, 1) for _ in answer],
                    text="",
                    finish_reason="stop",
                    reward=rng.choice([0.0, 0.1, 1.0, 1.1]),
                    temperature=TEMPERATURE,
                    vocab_size=VOCAB,
                )
            )
    return compute_advantages(episodes)


def near(model, episodes: list[Episode], noise: float = 0.3) -> list[Episode]:
    """The same with the model's own log-probabilities, moved a little: ratios on both sides of the clip range."""
    rng = random.Random(7)
    logp, _ = slow_scores(model, episodes)
    return [
        dataclasses.replace(e, logprobs=[x + rng.gauss(0, noise) for x in row.tolist()])
        for e, row in zip(episodes, logp)
    ]


def slow_scores(model, episodes: list[Episode]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-probabilities and entropies of each answer's tokens, from whole logits of a padded batch."""
    rows = [e.prompt_ids + e.response_ids for e in episodes]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits = model(input_ids, attention_mask=mask)[..., :VOCAB] / episodes[0].temperature
    logp_BTV = logits.log_softmax(-1)
    entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1)
    logps, entropies = [], []
    for b, e in enumerate(episodes):
        places = range(len(e.prompt_ids), len(e.prompt_ids) + len(e.response_ids))
        logps.append(torch.stack([logp_BTV[b, t - 1, rows[b][t]] for t in places]))  # token t: the logits at t - 1
        entropies.append(torch.stack([entropy_BT[b, t - 1] for t in places]))
    return logps, entropies


def slow_loss(model, episodes, reference=None, beta=0.0, entropy_coef=0.0, epsilon=0.2) -> torch.Tensor:
    """The whole loss of one step, with the mean over all its response tokens."""
    logps, entropies = slow_scores(model, episodes)
    with torch.no_grad():
        references, _ = slow_scores(reference or model, episodes)
    total, count = torch.zeros(()), 0
    for e, logp, entropy, ref in zip(episodes, logps, entropies, references):
        for t in range(len(e.response_ids)):
            ratio = torch.exp(logp[t] - e.logprobs[t])
            clipped = torch.clamp(ratio, 1 - epsilon, 1 + epsilon)
            policy = -torch.minimum(ratio * e.advantage, clipped * e.advantage)
            k3 = torch.exp(ref[t] - logp[t]) - (ref[t] - logp[t]) - 1
            total = total + policy + beta * k3 - entropy_coef * entropy[t]
            count += 1
    return total / count


def slow_gradients(model, episodes, **options) -> dict[str, torch.Tensor]:
    model.zero_grad()
    slow_loss(model, episodes, **options).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return gradients


class Recorder(torch.optim.SGD):
    """Keeps the gradients it is given and moves nothing."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=1.0)
        self.names, self.seen = {p: name for name, p in model.named_parameters()}, None

    def step(self, closure=None):
        self.seen = {name: p.grad.clone() for p, name in self.names.items()}


def gradients_of(model, episodes, **options) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    recorder = Recorder(model)
    metrics = update_policy(model, recorder, episodes, max_grad_norm=1e9, **options)
    return recorder.seen, metrics


def assert_same(gradients, expected, rtol=2e-4):
    """Every parameter, to a part of its own largest entry."""
    assert gradients.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.abs().max() > 0, f"{name} has no gradient: the comparison would be empty"
        torch.testing.assert_close(gradients[name], grad, rtol=0, atol=rtol * grad.abs().max().item(), msg=name)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_untouched(model, before):
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


class EvenLetters(Task):
    """A task that a random model can be better or worse at: the share of letters with an even code."""

    def train_problem(self, index: int) -> Problem:
        return Problem(f"train {index}", [{"role": "user", "content": "x" * (1 + index % 5)}], None)

    def test_problem(self, index: int) -> Problem:
        return Problem(f"test {index}", [{"role": "user", "content": "y" * (1 + index % 5)}], None)

    def reward(self, problem, response) -> Reward:
        share = sum(ord(c) % 2 == 0 for c in response) / max(1, len(response))
        return Reward(share, {"answer": share})


def sampled(model, tokenizer, n=6, cap=12, temperature=TEMPERATURE, problems=3, seed=0) -> list[Episode]:
    task = EvenLetters()
    batch = MiniBatch.from_problems(task.problems("train", problems), tokenizer)
    return rollout(model, tokenizer, task, batch, SamplingParams(n, cap, temperature), seed=seed)


# --- rollout and scores


def test_a_tokens_score_comes_from_the_logits_before_it(tiny_model):
    """CHECKLIST 1: log-probability and entropy of token t from the logits at t - 1, for ragged episodes."""
    episodes = make_episodes()
    logps, entropies = slow_scores(tiny_model, episodes)
    for scores, logp in zip(score_episodes(tiny_model, episodes), logps):
        torch.testing.assert_close(scores.logp, logp.detach(), rtol=0, atol=1e-5)
    _, metrics = gradients_of(tiny_model, episodes, entropy_coef=0.01)
    assert metrics["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_log_probabilities_are_the_trainers(tiny_model, tokenizer, temperature):
    """CHECKLIST 2, 3: ragged prompts, fp32 within 1e-4, and the difference is a metric. The temperature divides on
    both sides."""
    episodes = sampled(tiny_model, tokenizer, temperature=temperature)
    assert len({len(e.prompt_ids) for e in episodes}) > 1
    worst = 0.0
    for e, scores in zip(episodes, score_episodes(tiny_model, episodes)):
        worst = max(worst, (torch.tensor(e.logprobs) - scores.logp).abs().max().item())
    assert worst < 1e-4
    logps, _ = slow_scores(tiny_model, episodes)
    for e, logp in zip(episodes, logps):
        torch.testing.assert_close(torch.tensor(e.logprobs), logp.detach(), rtol=0, atol=1e-4)
    metrics = update_policy(tiny_model, Recorder(tiny_model), compute_advantages(episodes))
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
    assert 0 < metrics["sampling/sampling_logp_difference/mean"] <= metrics["sampling/sampling_logp_difference/max"]


def test_the_difference_metric_shows_a_sampler_that_disagrees(tiny_model, tokenizer):
    """CHECKLIST 2: one token that is off by 0.5 is the maximum, and its share the mean."""
    episodes = compute_advantages(sampled(tiny_model, tokenizer))
    tokens = sum(len(e.logprobs) for e in episodes)
    episodes[0].logprobs[0] += 0.5
    metrics = update_policy(tiny_model, Recorder(tiny_model), episodes)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(0.5, abs=1e-3)
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.5 / tokens, abs=1e-4)


def test_a_rollout_keeps_problems_rewards_and_groups_together(tiny_model, tokenizer):
    task, n = EvenLetters(), 3
    batch = MiniBatch.from_problems(task.problems("train", 4), tokenizer)
    episodes = rollout(tiny_model, tokenizer, task, batch, SamplingParams(n, 8), first_group_id=40)
    assert [e.group_id for e in episodes] == [40 + i // n for i in range(4 * n)]
    for i, e in enumerate(episodes):
        assert e.problem is batch.problems[i // n]
        assert e.prompt_ids == batch.prompt_ids[i // n]
        assert e.reward == task.reward(e.problem, e.text).total == e.reward_parts["answer"]
        assert (e.temperature, e.vocab_size) == (1.0, VOCAB)


def test_any_object_with_a_reward_is_a_task(tiny_model, tokenizer):
    class OnlyReward:
        def reward(self, problem, response):
            return Reward(0.25, {"half": 0.5})

    batch = MiniBatch.from_problems(EvenLetters().problems("train", 2), tokenizer)
    episodes = rollout(tiny_model, tokenizer, OnlyReward(), batch, SamplingParams(2, 4))
    assert [(e.reward, e.reward_parts) for e in episodes] == [(0.25, {"half": 0.5})] * 4


def test_a_rollout_that_biases_the_ratio_says_so(tiny_model, tokenizer, caplog):
    """CHECKLIST 4"""
    batch = MiniBatch.from_problems(EvenLetters().problems("train", 1), tokenizer)
    for sampling, warns in ((SamplingParams(2, 4), False), (SamplingParams(2, 4, top_p=0.9), True)):
        caplog.clear()
        rollout(tiny_model, tokenizer, EvenLetters(), batch, sampling)
        assert ("biases the ratio" in caplog.text) == warns


def test_the_first_stop_token_is_trained_and_nothing_comes_after_it(tokenizer):
    """CHECKLIST 8: also where the stop id is the pad id (256 is both here)."""
    model = make_model()
    episodes = compute_advantages(sampled(model, tokenizer, n=64, cap=48))
    stopped = [e for e in episodes if e.finish_reason == "stop"]
    assert {e.response_ids[-1] for e in stopped} == {PAD, STOP}
    for e in episodes:
        assert not {PAD, STOP} & set(e.response_ids[:-1])
        assert len(e.logprobs) == len(e.response_ids)
        assert (e.finish_reason == "stop") == (e.response_ids[-1] in (PAD, STOP))
    _, metrics = gradients_of(model, episodes, entropy_coef=1e-9)
    assert metrics["update/tokens"] == sum(len(e.response_ids) for e in episodes)
    only_stop = dataclasses.replace(stopped[0], response_ids=[PAD], logprobs=[-5.0], advantage=1.0)
    before = score_episodes(model, [only_stop])[0].logp
    update_policy(model, torch.optim.SGD(model.parameters(), lr=0.1), [only_stop])
    assert score_episodes(model, [only_stop])[0].logp > before


def test_a_real_token_that_equals_the_pad_id_is_attended_and_trained(tiny_model):
    """CHECKLIST 7: in the prompt it changes the gradient, in the answer it is counted."""
    plain = [dataclasses.replace(make_episodes()[0], prompt_ids=[5, 6, 7], response_ids=[1, 2, 3], logprobs=[-5.0] * 3,
                                 advantage=1.0)]  # fmt: skip
    in_prompt = [dataclasses.replace(plain[0], prompt_ids=[5, PAD, PAD])]
    in_answer = [dataclasses.replace(plain[0], response_ids=[1, PAD, PAD])]
    for episodes in (in_prompt, in_answer):
        gradients, metrics = gradients_of(tiny_model, episodes)
        assert metrics["update/tokens"] == 3
        assert_same(gradients, slow_gradients(tiny_model, episodes))
    assert not torch.allclose(score_episodes(tiny_model, plain)[0].logp, score_episodes(tiny_model, in_prompt)[0].logp)


# --- advantages


def with_rewards(rewards: list[float], groups: list[int]) -> list[Episode]:
    return [
        Episode(g, [1, 2], [3], [-1.0], "", "stop", reward=r) for r, g in zip(rewards, groups)
    ]  # one prompt for all


def advantages(rewards, groups, **options) -> list[float]:
    return [e.advantage for e in compute_advantages(with_rewards(rewards, groups), **options)]


def test_groups_go_by_id_in_any_order_and_identical_prompts_do_not_merge():
    """CHECKLIST 13"""
    rewards, groups = [0.0, 10.0, 1.0, 20.0, 0.5, 60.0], [7, 3, 7, 3, 7, 3]
    sorted_rewards = [0.0, 1.0, 0.5, 10.0, 20.0, 60.0]
    together = advantages(sorted_rewards, [7, 7, 7, 3, 3, 3])
    interleaved = advantages(rewards, groups)
    assert interleaved == [together[sorted_rewards.index(r)] for r in rewards]
    alone = advantages([0.0, 1.0, 0.5], [7, 7, 7])
    assert together[:3] == alone  # same prompt ids in both groups, and yet the other group changes nothing
    mean, deviation = 0.5, math.sqrt(1 / 6)
    assert alone == pytest.approx([(r - mean) / (deviation + 1e-4) for r in (0.0, 1.0, 0.5)])


@pytest.mark.parametrize("estimator", ["group_mean", "rloo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [0.1, 0.0, 1 / 3, 1e6 + 0.1])
def test_equal_rewards_have_advantage_exactly_zero(estimator, scale, reward):
    """CHECKLIST 14, 25: twelve times 0.1 has a mean that is not 0.1 in floating point. Beside a group that differs."""
    values = advantages([reward] * 12 + [0.0, 1.0], [0] * 12 + [1, 1], estimator=estimator, scale=scale)
    assert values[:12] == [0.0] * 12
    assert values[12] < 0 < values[13]


def test_groups_of_equal_rewards_are_counted(tiny_model, tokenizer):
    """CHECKLIST 14"""
    episodes = with_rewards([0.1] * 12 + [0.0, 1.0], [0] * 12 + [1, 1])
    episodes = [dataclasses.replace(e, problem=EvenLetters().train_problem(0)) for e in episodes]
    assert grpo.reward_metrics(episodes, EvenLetters())["frac_reward_zero_std"] == 0.5


def test_the_divergence_of_a_group_of_equal_rewards_still_flows(tiny_model):
    """CHECKLIST 14: advantage 0, beta 0.1: the gradient is that of the divergence, and not nothing."""
    reference = make_model(seed=1)
    episodes = [dataclasses.replace(e, advantage=0.0) for e in near(tiny_model, make_episodes())]
    gradients, metrics = gradients_of(tiny_model, episodes, beta=0.1, reference=reference)
    assert_same(gradients, slow_gradients(tiny_model, episodes, beta=0.1, reference=reference))
    assert metrics["update/skipped"] == 0
    assert metrics["policy_loss"] == 0
    assert metrics["kl"] > 0.1


def test_the_divisor_is_the_populations_deviation_of_group_or_batch_or_nothing():
    """CHECKLIST 15"""
    rewards, groups = [0.0, 1.0, 2.0, 6.0], [0, 0, 1, 1]
    mean, others = [0.5, 0.5, 4.0, 4.0], [1.0, 0.0, 6.0, 2.0]
    group = [0.5, 0.5, 2.0, 2.0]
    batch = math.sqrt(sum((r - 2.25) ** 2 for r in rewards) / 4)
    for estimator, baseline in (("group_mean", mean), ("rloo", others), ("reinforce_pp", [2.25] * 4)):
        own = [batch] * 4 if estimator == "reinforce_pp" else group  # its baseline is the batch's
        for scale, divisor in (("group", own), ("batch", [batch] * 4), ("none", [1.0] * 4)):
            epsilon = 0.0 if scale == "none" else 0.01
            expected = [(r - b) / (d + epsilon) for r, b, d in zip(rewards, baseline, divisor)]
            found = advantages(rewards, groups, estimator=estimator, scale=scale, epsilon=0.01)
            assert found == pytest.approx(expected), (estimator, scale)


def test_reinforce_pp_gives_equal_groups_no_huge_advantage():
    """The baseline is the batch's mean, so a group of equal rewards is not divided by its own deviation of 0."""
    found = advantages([0.1, 0.1, 0.1, 1.1, 0.1, 1.1], [0, 0, 0, 1, 1, 1], estimator="reinforce_pp")
    assert max(map(abs, found)) < 2


@pytest.mark.parametrize("large", [1e155, 1e300, -1e200])
def test_a_huge_reward_overflows_nothing(large):
    found = advantages([large, 0.0, 0.0, 1.0], [0, 0, 0, 0])
    assert all(map(math.isfinite, found))
    assert abs(found[0]) == pytest.approx(math.sqrt(3), rel=1e-3)


def test_an_infinite_reward_counts_as_missing():
    assert advantages([math.inf, 0.0, 1.0], [0, 0, 0])[0] == 0
    assert advantages([math.inf, 0.0, 1.0], [0, 0, 0])[1:] == advantages([0.0, 1.0], [0, 0])


@pytest.mark.parametrize("wrong", [{"estimator": "mean"}, {"scale": "std"}])
def test_an_unknown_way_to_compute_advantages_is_refused(wrong):
    """CHECKLIST 15, 46"""
    with pytest.raises(ValueError, match="expected one of group_mean, rloo, reinforce_pp"):
        advantages([0.0, 1.0], [0, 0], **wrong)


@pytest.mark.parametrize("estimator", ["group_mean", "rloo", "reinforce_pp"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_missing_reward_leaves_the_others_alone(estimator, scale):
    """CHECKLIST 16: advantage 0 for it. A group of nothing but missing rewards has nothing to say."""
    options = {"estimator": estimator, "scale": scale}
    whole = advantages([0.0, 1.0, 0.5, 2.0, 3.0], [0, 0, 0, 1, 1], **options)
    holes = advantages([math.nan, 0.0, 1.0, math.nan, 0.5, 2.0, 3.0, math.nan], [0, 0, 0, 0, 0, 1, 1, 2], **options)
    assert [holes[i] for i in (0, 3, 7)] == [0.0] * 3
    assert [holes[i] for i in (1, 2, 4, 5, 6)] == whole


def test_a_missing_reward_is_no_part_of_the_reported_mean():
    """CHECKLIST 16"""
    episodes = with_rewards([0.0, 1.0, math.nan, 0.5, 0.5, math.nan], [0, 0, 0, 1, 1, 1])
    episodes = [dataclasses.replace(e, problem=EvenLetters().train_problem(0)) for e in episodes]
    metrics = grpo.reward_metrics(episodes, EvenLetters())
    assert metrics["reward"] == pytest.approx(0.5)
    assert metrics["reward_std"] == pytest.approx(statistics.stdev([0.0, 1.0, 0.5, 0.5]))
    assert metrics["frac_reward_zero_std"] == 0.5


# --- the gradient


@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_loss_and_every_gradient_equal_the_written_out_ones(tied):
    """CHECKLIST 1, 3, 7, 10, 17, 23: policy + beta k3 - alpha entropy, in fp32."""
    model = make_model(make_config(tie_word_embeddings=tied))
    reference = make_model(make_config(tie_word_embeddings=tied), seed=1)
    episodes = near(model, make_episodes())
    options = {"beta": 0.05, "entropy_coef": 0.02, "reference": reference}
    gradients, metrics = gradients_of(model, episodes, **options)
    assert_same(gradients, slow_gradients(model, episodes, **options))
    assert metrics["loss"] == pytest.approx(slow_loss(model, episodes, **options).item(), abs=1e-5)
    assert metrics["policy_loss"] == pytest.approx(slow_loss(model, episodes).item(), abs=1e-5)
    assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0  # noqa: PT018 (both sides clip)


def test_the_reference_is_scored_at_the_samplers_temperature(tiny_model):
    """CHECKLIST 3: at equal policies the divergence is 0 only if the temperature divides both sides alike."""
    _, metrics = gradients_of(tiny_model, near(tiny_model, make_episodes()), beta=0.1, reference=tiny_model)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-9)


def test_as_many_tokens_as_episodes_do_not_broadcast(tiny_model):
    """CHECKLIST 21: four answers of four tokens, where [B] against [B, T] would go through as [B, B]."""
    episodes = near(tiny_model, make_episodes(groups=1, n=4, lengths=[4]))
    assert len({e.advantage for e in episodes}) > 1
    assert_same(gradients_of(tiny_model, episodes)[0], slow_gradients(tiny_model, episodes))


LOSS_TYPES = ["dapo", "grpo", "bnpo", "dr_grpo", "gspo", "cispo", "sapo"]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_gradient_is_the_same_for_every_split_and_order(tiny_model, loss_type):
    """CHECKLIST 17, 24: micro-batches of one answer, of parts of groups, of all. Shuffled, and so is every metric."""
    reference = make_model(seed=1)
    episodes = near(tiny_model, make_episodes(n=6))
    options = {"loss_type": loss_type, "beta": 0.05, "entropy_coef": 0.02, "reference": reference}
    expected, told = gradients_of(tiny_model, episodes, micro_batch_tokens=10**6, **options)
    shuffled = random.Random(3).sample(episodes, len(episodes))
    for order in (episodes, shuffled):
        for tokens in (1, 23, 60):
            gradients, metrics = gradients_of(tiny_model, order, micro_batch_tokens=tokens, **options)
            assert_same(gradients, expected, rtol=1e-4)
            assert metrics == pytest.approx(told, rel=1e-4, abs=1e-6)


def test_gradients_added_by_autograd_are_the_same(tiny_model, monkeypatch):
    """CHECKLIST 17: the products that add to `.grad` in place, against autograd's own accumulation."""
    episodes = near(tiny_model, make_episodes(n=6))
    expected, _ = gradients_of(tiny_model, episodes, micro_batch_tokens=40)
    asked = []
    monkeypatch.setattr(grpo, "gradients_in_place", lambda enabled: asked.append(enabled) or nullcontext())
    assert_same(gradients_of(tiny_model, episodes, micro_batch_tokens=40)[0], expected)
    assert asked == [True]


def test_a_prompt_of_its_own_for_every_response_gives_the_same_gradient(tiny_model):
    """CHECKLIST 17: a group's shared prompt, against the same responses in groups of one."""
    episodes = near(tiny_model, make_episodes(n=6))
    alone = [dataclasses.replace(e, group_id=i) for i, e in enumerate(episodes)]
    rows = [sum(len(m.ids) for m in Step(part, torch.device("cpu")).micro_batches(10**6)) for part in (episodes, alone)]
    assert rows[0] < rows[1]
    assert_same(gradients_of(tiny_model, alone)[0], gradients_of(tiny_model, episodes)[0])


def test_answers_without_a_signal_count_in_the_denominator(tiny_model):
    """CHECKLIST 17: a group of advantage 0 is not computed, and yet the mean is over its tokens too."""
    episodes = near(tiny_model, make_episodes())
    episodes = [dataclasses.replace(e, advantage=0.0) if e.group_id == 1 else e for e in episodes]
    gradients, metrics = gradients_of(tiny_model, episodes)
    assert_same(gradients, slow_gradients(tiny_model, episodes))
    assert metrics["update/tokens"] == sum(len(e.response_ids) for e in episodes if e.advantage != 0)


def test_what_is_masked_may_hold_anything(tiny_model):
    """CHECKLIST 18: NaN and 1e9 in answers that were cut, with mask_truncated, reach neither loss nor gradient."""
    sane = near(tiny_model, make_episodes())
    wild = list(sane)
    for i, (logprob, advantage) in enumerate([(math.nan, 1.0), (1e9, 1e9), (-math.inf, -1.0)]):
        sane[i] = dataclasses.replace(sane[i], finish_reason="length")
        odd = [logprob] * len(sane[i].response_ids)
        wild[i] = dataclasses.replace(sane[i], logprobs=odd, advantage=advantage)
    expected, told = gradients_of(tiny_model, sane, mask_truncated=True)
    gradients, metrics = gradients_of(tiny_model, wild, mask_truncated=True)
    assert_same(gradients, expected)
    assert metrics == pytest.approx(told)
    assert_same(expected, slow_gradients(tiny_model, [e for e in sane if not e.truncated]))


@pytest.mark.parametrize("why", ["all truncated", "all equal", "all missing", "no episodes", "all empty"])
def test_with_nothing_to_train_on_the_weights_stay_bit_for_bit(tiny_model, caplog, why):
    """CHECKLIST 19: no 0/0, no weight decay, no step of the moments, and a warning."""
    optimizer = MemoryEfficientAdamW(tiny_model.parameters(), lr=0.1, weight_decay=0.5)
    episodes = near(tiny_model, make_episodes())
    update_policy(tiny_model, optimizer, episodes)  # the moments are not empty any more
    steps, before = [state["step"].item() for state in optimizer.state.values()], weights_of(tiny_model)
    changes = {
        "all truncated": {"finish_reason": "length"},
        "all equal": {"reward": 0.1},
        "all missing": {"reward": math.nan},
        "all empty": {"response_ids": [], "logprobs": []},
    }
    if why == "no episodes":
        episodes = []
    else:
        episodes = compute_advantages([dataclasses.replace(e, **changes[why]) for e in episodes])
    with caplog.at_level(logging.WARNING):
        metrics = update_policy(tiny_model, optimizer, episodes, mask_truncated=True)
    assert_untouched(tiny_model, before)
    assert [state["step"].item() for state in optimizer.state.values()] == steps
    assert (metrics["loss"], metrics["grad_norm"], metrics["update/skipped"]) == (0.0, 0.0, 1.0)
    assert "no episode has a gradient" in caplog.text


def test_on_the_first_update_the_loss_is_about_zero_and_the_gradient_is_not(tiny_model, tokenizer):
    """CHECKLIST 20: mean advantage 0 over answers, ratio 1."""
    episodes = compute_advantages(sampled(tiny_model, tokenizer))
    _, metrics = gradients_of(tiny_model, episodes, loss_type="grpo")
    assert abs(metrics["loss"]) < 1e-5
    assert metrics["ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["grad_norm"] > 1e-2


def test_the_gradient_makes_better_answers_likelier(tiny_model, tokenizer):
    """CHECKLIST 20: the sign, which a loss of 0 does not show."""
    episodes = compute_advantages(sampled(tiny_model, tokenizer))
    before = score_episodes(tiny_model, episodes)
    update_policy(tiny_model, torch.optim.SGD(tiny_model.parameters(), lr=0.01), episodes)
    after = score_episodes(tiny_model, episodes)
    gain = sum(e.advantage * (a.logp - b.logp).sum().item() for e, a, b in zip(episodes, after, before))
    assert gain > 0


@pytest.mark.parametrize("coefficient", [0.1, -0.1])
def test_a_positive_entropy_coefficient_raises_entropy(tiny_model, coefficient):
    """CHECKLIST 23: it has a gradient also where all advantages are 0, and its sign is the documented one."""
    episodes = [dataclasses.replace(e, advantage=0.0) for e in near(tiny_model, make_episodes())]
    before = torch.cat(slow_scores(tiny_model, episodes)[1]).mean().item()
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=0.1)
    metrics = update_policy(tiny_model, optimizer, episodes, entropy_coef=coefficient)
    after = torch.cat(slow_scores(tiny_model, episodes)[1]).mean().item()
    assert (after - before) * coefficient > 1e-6
    assert metrics["entropy"] == pytest.approx(before, abs=1e-4)
    assert metrics["loss"] == pytest.approx(-coefficient * before, abs=1e-4)


def test_the_reported_loss_is_the_steps(tiny_model):
    """CHECKLIST 24: one answer a micro-batch, and the loss is still that of all of them."""
    episodes = near(tiny_model, make_episodes())
    _, metrics = gradients_of(tiny_model, episodes, micro_batch_tokens=1)
    assert metrics["loss"] == pytest.approx(slow_loss(tiny_model, episodes).item(), abs=1e-6)
    last = slow_loss(tiny_model, episodes[-1:]).item()
    assert abs(metrics["loss"] - last) > 1e-3


def test_the_second_update_compares_with_the_stored_log_probabilities(tiny_model, tokenizer):
    """The old policy is the sampler, also after the weights moved."""
    episodes = compute_advantages(sampled(tiny_model, tokenizer))
    update_policy(tiny_model, torch.optim.SGD(tiny_model.parameters(), lr=0.3), episodes)
    gradients, metrics = gradients_of(tiny_model, episodes)
    assert_same(gradients, slow_gradients(tiny_model, episodes))
    assert metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"] > 0


def test_gradients_are_clipped_to_their_joint_norm_and_the_norm_before_is_told(tiny_model):
    episodes = near(tiny_model, make_episodes())
    whole, told = gradients_of(tiny_model, episodes)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in whole.values()))
    assert told["grad_norm"] == pytest.approx(norm, rel=1e-5)
    recorder = Recorder(tiny_model)
    metrics = update_policy(tiny_model, recorder, episodes, max_grad_norm=norm / 4)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert_same(recorder.seen, {name: g / 4 for name, g in whole.items()})


def test_episodes_sampled_at_different_temperatures_are_refused(tiny_model):
    """CHECKLIST 3"""
    episodes = make_episodes()
    episodes[0] = dataclasses.replace(episodes[0], temperature=1.0)
    with pytest.raises(ValueError, match="different temperatures"):
        gradients_of(tiny_model, episodes)


def test_beta_without_a_reference_is_refused(tiny_model):
    """CHECKLIST 46"""
    with pytest.raises(ValueError, match="no reference policy"):
        gradients_of(tiny_model, make_episodes(), beta=0.1)


# --- numbers that are not finite


@pytest.mark.parametrize("broken", ["advantage", "log-probability", "gradient", "loss", "weight"])
def test_a_step_that_is_not_finite_is_refused(tiny_model, caplog, monkeypatch, broken):
    """CHECKLIST 44: weights and moments stay as they were, the warning names the number that was not finite, and the
    next good step goes through."""
    optimizer = MemoryEfficientAdamW(tiny_model.parameters(), lr=0.01)
    good = near(tiny_model, make_episodes())
    update_policy(tiny_model, optimizer, good)
    bad, hook, norm = list(good), None, tiny_model.model.norm.weight
    if broken == "advantage":
        bad[0] = dataclasses.replace(bad[0], advantage=math.inf)
    elif broken == "log-probability":
        bad[0] = dataclasses.replace(bad[0], logprobs=[math.nan] * len(bad[0].logprobs), advantage=1.0)
    elif broken == "gradient":
        hook = norm.register_hook(lambda grad: grad * math.inf)
    elif broken == "loss":
        real = losses.weighted_sum
        monkeypatch.setattr(losses, "weighted_sum", lambda terms, weights: real(terms, weights) + math.nan)
    else:
        value = norm.data[0].clone()
        norm.data[0] = math.nan
    before, moments = weights_of(tiny_model), [s["exp_avg"].clone() for s in optimizer.state.values()]
    with caplog.at_level(logging.WARNING):
        metrics = update_policy(tiny_model, optimizer, bad)
    for name, p in tiny_model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(optimizer.state.values(), moments))
    assert metrics["update/skipped"] == 1
    assert "the update was refused" in caplog.text
    if broken != "loss":
        assert ("gradient norm nan" in caplog.text) or ("gradient norm inf" in caplog.text)
    if broken != "gradient":
        assert ("loss nan" in caplog.text) or ("loss inf" in caplog.text) or ("loss -inf" in caplog.text)
    monkeypatch.undo()
    if hook:
        hook.remove()
    if broken == "weight":
        norm.data[0] = value
    assert update_policy(tiny_model, optimizer, good)["update/skipped"] == 0
    assert all(p.isfinite().all() for p in tiny_model.parameters())


# --- precision


def test_a_hundred_small_steps_move_a_bf16_model():
    """CHECKLIST 29: lr 1e-6. Without fp32 masters hardly any weight would change."""
    model = make_model().bfloat16()
    before = weights_of(model)
    episodes = near(model, make_episodes(groups=1))
    optimizer = MemoryEfficientAdamW(model.parameters(), lr=1e-6)
    for _ in range(100):
        update_policy(model, optimizer, episodes)
    changed = {name: (p != before[name]).float().mean().item() for name, p in model.named_parameters()}
    projections = [share for name, share in changed.items() if name.endswith("proj.weight")]
    assert min(projections) > 0.01
    for p in model.parameters():
        master = optimizer.state[p]["master"]
        assert master.dtype == torch.float32
        assert torch.equal(p, master.bfloat16())
    plain = make_model().bfloat16()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-6, weight_decay=0.0)
    for _ in range(100):
        update_policy(plain, optimizer, episodes)
    kept = [(p != before[n]).float().mean().item() for n, p in plain.named_parameters() if n.endswith("proj.weight")]
    assert max(kept) < min(projections)


# --- the class


def make_trainer(model, tokenizer, **changes) -> GRPO:
    settings = {"prompts_per_step": 3, "group_size": 4, "max_new_tokens": 10, "lr": 1e-3, "steps": 10,
                "lr_schedule": "cosine", "prompt_style": "short", "device": "cpu"}  # fmt: skip
    config = Config(**(settings | changes))
    reference = make_model(seed=1) if config.beta else None
    return GRPO(config, model=model, tokenizer=tokenizer, task=EvenLetters(), reference=reference)


def take_steps(trainer: GRPO, first: int, last: int) -> list[dict[str, float]]:
    told = []
    for step in range(first, last + 1):
        problems = trainer.task.problems("train", 3, start=3 * step)
        told.append(trainer.step(MiniBatch.from_problems(problems, trainer.tokenizer))[1])
    return told


def test_every_update_of_a_rollout_gets_the_log_probabilities_of_the_sampler(tiny_model, tokenizer, monkeypatch):
    """updates_per_rollout 2: two updates, and the stored log-probabilities in both."""
    seen = []
    real = grpo.update_policy

    def spy(model, optimizer, episodes, **options):
        seen.append([list(e.logprobs) for e in episodes])
        metrics = real(model, optimizer, episodes, **options)
        seen[-1].append(metrics["ratio/mean"])
        return metrics

    monkeypatch.setattr(grpo, "update_policy", spy)
    trainer = make_trainer(tiny_model, tokenizer, updates_per_rollout=2, lr=1e-2)
    episodes, _ = trainer.step(MiniBatch.from_problems(trainer.task.problems("train", 3), tokenizer))
    assert len(seen) == 2
    *first, ratio = seen[0]
    *second, moved = seen[1]
    assert first == second == [e.logprobs for e in episodes]
    assert ratio == pytest.approx(1.0, abs=1e-5)
    assert abs(moved - 1) > 1e-3


def test_training_improves_what_is_rewarded(tiny_model, tokenizer):
    """CHECKLIST 20, over a whole loop: a random model learns to write letters with even codes."""
    trainer = make_trainer(tiny_model, tokenizer, group_size=16, lr=3e-3, lr_schedule="constant")
    told = take_steps(trainer, 1, 12)
    assert sum(m["reward"] for m in told[-3:]) / 3 > sum(m["reward"] for m in told[:3]) / 3 + 0.15


TIMING = {"step_time", "rollout/tokens_per_second", "update/tokens_per_second"}


@pytest.mark.parametrize("changes", [{}, {"updates_per_rollout": 2, "beta": 0.05, "entropy_coef": 0.01}])
def test_a_round_trip_through_the_state_changes_nothing(tokenizer, changes):
    """CHECKLIST 42, of the class: 5 steps are 3 steps, weights and optimizer state put into fresh objects, and 2."""
    straight = make_trainer(make_model(), tokenizer, **changes)
    told = take_steps(straight, 1, 5)
    first = make_trainer(make_model(), tokenizer, **changes)
    take_steps(first, 1, 3)
    second = make_trainer(make_model(seed=5), tokenizer, **changes)
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.step_count = first.step_count
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    again = take_steps(second, 4, 5)
    for old, new in zip(told[3:], again):
        assert {k: v for k, v in old.items() if k not in TIMING} == {k: v for k, v in new.items() if k not in TIMING}
    assert_untouched(second.model, weights_of(straight.model))


def test_the_rate_follows_the_schedule(tiny_model, tokenizer):
    trainer = make_trainer(tiny_model, tokenizer, warmup_steps=2, steps=4, lr=1e-3)
    rates = [m["learning_rate"] for m in take_steps(trainer, 1, 4)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])


def test_a_bf16_trainers_weights_are_its_rounded_masters(tokenizer):
    trainer = make_trainer(make_model().bfloat16(), tokenizer, lr=1e-4)
    take_steps(trainer, 1, 3)
    masters = [trainer.optimizer.state[p]["master"] for p in trainer.model.parameters()]
    assert all(torch.equal(p, m.bfloat16()) for p, m in zip(trainer.model.parameters(), masters))
    assert any(not torch.equal(m, m.bfloat16().float()) for m in masters)  # they hold what bf16 cannot


def test_one_step_on_one_question(tiny_model, tokenizer):
    """`train_step(question, answer)`: a finite loss, the trainer's own task back in its place, and another step."""
    trainer = make_trainer(tiny_model, tokenizer, entropy_coef=0.01)
    before = weights_of(tiny_model)
    loss = trainer.train_step("What is 12 + 7 * 3?", "33")
    assert isinstance(loss, float)
    assert math.isfinite(loss)
    assert isinstance(trainer.task, EvenLetters)
    assert trainer.step_count == 1
    assert any(not torch.equal(p, before[name]) for name, p in tiny_model.named_parameters())


# --- the calls that the design promises


def test_the_public_calls_work_as_they_are_written(tmp_path):
    """DESIGN, "Public calls", line by line, with the bundled checkpoint for a folder."""
    folder = locate_pretrained("countdown-tiny")
    config = Qwen2Config.from_pretrained(folder)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device="cpu")
    tokenizer = Tokenizer.from_pretrained(folder)
    input_ids = torch.tensor([tokenizer.encode("1 + 2")])
    assert model(input_ids).shape == (*input_ids.shape, config.vocab_size)
    model.save_pretrained(tmp_path)
    assert torch.equal(Qwen2ForCausalLM.from_pretrained(tmp_path, torch.bfloat16)(input_ids), model(input_ids))

    assert tokenizer.decode(input_ids[0].tolist()) == "1 + 2"
    assert tokenizer.eos_token_ids
    assert tokenizer.pad_token_id is not None
    optimizer = MemoryEfficientAdamW(
        model.parameters(), lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False
    )
    task = CountdownTask(numbers=(3, 4), max_number=99, seed=0, prompt_style="short")
    problem = task.problem([3, 5, 2], target=13)
    reward = task.reward(problem, "3 * 5 - 2 = 13 ok</think>\n<answer>3 * 5 - 2</answer>")
    assert (reward.total, reward.parts) == (pytest.approx(1.1), {"format": 1.0, "answer": 1.0})
    prompts = [tokenizer.render_chat(problem.messages) + problem.response_prefix]
    params = SamplingParams(n=8, max_new_tokens=64, temperature=1.0)
    completions = generate(model, prompts, params, tokenizer=tokenizer, seed=0)
    assert len(completions) == 8
    batch = MiniBatch.from_problems([problem], tokenizer)
    episodes = rollout(model, tokenizer, task, batch, params)
    assert [e.response_ids for e in episodes] == [c.response_ids for c in completions]
    metrics = update_policy(model, optimizer, compute_advantages(episodes))
    assert {"policy_loss", "entropy", "grad_norm", "clip_ratio/low_mean", "clip_ratio/high_mean"} <= set(metrics)


def test_the_class_without_arguments_is_the_bundled_model_with_its_preset():
    trainer = GRPO()
    assert trainer.config.ckpt == "countdown-tiny"
    assert trainer.model.dtype == torch.float32
    assert trainer.reference is None
    assert math.isfinite(trainer.train_step("What is 12 + 7 * 3?", "33"))


# --- metrics with the meaning that they have in TRL


def trl_deviation(values) -> float:
    """`trl.trainer.utils.nanstd` of TRL 1.16: the metrics `reward_std` and `rewards/<part>/std`."""
    utils = pytest.importorskip("trl.trainer.utils")
    return utils.nanstd(torch.tensor(values, dtype=torch.float64)).item()


def test_deviations_of_rewards_are_those_of_trl():
    """CHECKLIST 67: over all episodes, divisor n - 1, missing rewards left out."""
    rewards = [0.0, 1.0, math.nan, 0.5, 0.7, 2.0]
    episodes = [
        dataclasses.replace(e, problem=EvenLetters().train_problem(0), reward_parts={"answer": e.reward})
        for e in with_rewards(rewards, [0, 0, 0, 1, 1, 1])
    ]
    metrics = grpo.reward_metrics(episodes, EvenLetters())
    assert metrics["reward_std"] == pytest.approx(trl_deviation(rewards))
    assert metrics["rewards/answer/std"] == pytest.approx(trl_deviation(rewards))
    assert grpo.reward_metrics(episodes[:1], EvenLetters())["reward_std"] == 0.0
    episodes[0] = dataclasses.replace(episodes[0], reward=math.inf)
    assert grpo.reward_metrics(episodes, EvenLetters())["reward_std"] == pytest.approx(trl_deviation(rewards[1:]))


def test_the_number_of_tokens_adds_up_and_goes_on_after_a_resume(tiny_model, tokenizer):
    """CHECKLIST 67: prompt and response of every episode, since the start of the run."""
    trainer = make_trainer(tiny_model, tokenizer)
    counted = 0
    for step in (1, 2):
        batch = MiniBatch.from_problems(trainer.task.problems("train", 3, start=3 * step), tokenizer)
        episodes, metrics = trainer.step(batch)
        counted += sum(len(e.prompt_ids) + len(e.response_ids) for e in episodes)
        assert metrics["num_tokens"] == counted
    resumed = make_trainer(make_model(), tokenizer)
    resumed.load_state_dict(trainer.state_dict())
    _, metrics = resumed.step(batch)
    assert metrics["num_tokens"] > counted
    older = {name: value for name, value in trainer.state_dict().items() if name != "num_tokens"}
    resumed.load_state_dict(older)
    assert resumed.num_tokens == 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_entropy_bonus_is_the_mean_token_entropy_for_every_loss(tiny_model, loss_type):
    """CHECKLIST 67: the bonus lowers the loss by coefficient * entropy metric, and has the same gradient for all."""
    episodes = [dataclasses.replace(e, advantage=0.0) for e in near(tiny_model, make_episodes(n=3))]
    options = {"entropy_coef": 0.5, "max_new_tokens": 50}
    gradients, metrics = gradients_of(tiny_model, episodes, loss_type=loss_type, **options)
    assert metrics["loss"] - metrics["policy_loss"] == pytest.approx(-0.5 * metrics["entropy"], rel=1e-5)
    assert_same(gradients, gradients_of(tiny_model, episodes, loss_type="dapo", **options)[0])


def test_the_entropy_bonus_leaves_masked_responses_out(tiny_model):
    episodes = near(tiny_model, make_episodes(n=3))
    episodes[0] = dataclasses.replace(episodes[0], finish_reason="length")
    _, metrics = gradients_of(tiny_model, episodes, loss_type="grpo", mask_truncated=True, entropy_coef=0.5)
    assert metrics["loss"] - metrics["policy_loss"] == pytest.approx(-0.5 * metrics["entropy"], rel=1e-5)
