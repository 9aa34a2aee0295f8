"""Tokens that the environment gave: context for later tokens, and nothing else. Against textbook.py and full logits.

CHECKLIST 75.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from conftest import make_config, make_model
from test_textbook import (
    MICRO_BATCH_TOKENS,
    TEMPERATURE,
    VOCAB,
    assert_same_gradients,
    exact,
    fast_gradients,
    textbook_gradients,
)

import textbook
from data_types import Episode
from grpo import compute_advantages, update_policy
from update.scoring import score_episodes
from update.shaping import penalise_divergence, penalise_length
from update.step_metrics import reward_metrics

OPTIONS = [
    {"loss_type": loss_type} for loss_type in ("dapo", "grpo", "bnpo", "dr_grpo", "gspo", "cispo", "sapo")
] + [{"beta": 0.3, "kl": kl} for kl in ("k1", "k2", "k3", "kl", "approx_kl", "ot")] + [
    {"entropy_coef": 0.1},
    {"top_entropy_share": 0.4},
    {"importance_correction": "truncate_token"},
    {"importance_correction": "mask_sequence", "importance_cap": 50.0},
    {"mask_truncated": True},
]  # fmt: skip


@pytest.fixture
def model():
    return make_model(make_config())


def make_episodes(model, groups: int = 3, n: int = 4, noise: float = 0.3) -> list[Episode]:
    """Random responses in interleaved groups. Most contain tokens of an environment, some at the very end."""
    rng = random.Random(1)
    prompts = [[rng.randrange(VOCAB) for _ in range(3 + 4 * g)] for g in range(groups)]
    episodes = []
    for _ in range(n):
        for g, prompt in enumerate(prompts):
            ids = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))]
            sampled = [True, *(rng.random() < 0.6 for _ in ids[1:])] if rng.random() < 0.8 else None
            e = Episode(g, prompt, ids, [0.0] * len(ids), "", "stop", rng.random(), temperature=TEMPERATURE,
                        vocab_size=VOCAB, sampled=sampled)  # fmt: skip
            for t, x in zip(e.sampled_positions, full_logprobs(model, e).tolist()):
                e.logprobs[t] = x + rng.gauss(0, noise)
            episodes.append(e)
    assert any(e.sampled and not e.sampled[-1] for e in episodes)
    return compute_advantages(episodes)


@torch.no_grad()
def full_logprobs(model, e: Episode) -> torch.Tensor:
    """Log-probability of each sampled token from the logits of the whole sequence, one token after the other."""
    ids, rows = e.prompt_ids + e.response_ids, []
    for t, token in enumerate(e.response_ids):
        if e.sampled is None or e.sampled[t]:
            logits = model(torch.tensor([ids[: len(e.prompt_ids) + t]]))[0, -1, :VOCAB].float()
            rows.append(torch.log_softmax(logits / TEMPERATURE, dim=-1)[token])
    return torch.stack(rows)


def with_other_numbers(e: Episode, number: float) -> Episode:
    """The same episode with another log-probability for each given token."""
    sampled = e.sampled or [True] * len(e.response_ids)
    return replace(e, logprobs=[x if s else number for x, s in zip(e.logprobs, sampled)])


def metrics_of(model, episodes, **options) -> dict[str, float]:
    return update_policy(model, torch.optim.SGD(model.parameters(), lr=0.0), episodes, **options)


# --- textbook


def test_the_textbook_scores_sampled_tokens_only(model):
    for e in make_episodes(model):
        torch.testing.assert_close(textbook.token_logprobs(model, e).detach(), full_logprobs(model, e))


@pytest.mark.parametrize("micro_batch_tokens", MICRO_BATCH_TOKENS)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_gradient_is_that_of_the_textbook(model, micro_batch_tokens, beta):
    episodes, reference = make_episodes(model), make_model(make_config(), seed=1)
    found = fast_gradients(model, episodes, micro_batch_tokens=micro_batch_tokens, reference=reference, beta=beta)
    expected = textbook_gradients(
        model, lambda m: textbook.policy_loss(m, episodes, exact(reference) if beta else None, beta)
    )
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo", "dr_grpo"])
def test_denominators_count_sampled_tokens(model, loss_type):
    episodes, cap = make_episodes(model), 12
    tokens = sum(sum(e.sampled or [True] * len(e.response_ids)) for e in episodes)
    counts = [sum(e.sampled or [True] * len(e.response_ids)) for e in episodes]
    weights = {
        "dapo": [n / tokens for n in counts],
        "bnpo": [n / tokens for n in counts],
        "grpo": [1 / len(episodes)] * len(episodes),
        "dr_grpo": [n / (len(episodes) * cap) for n in counts],
    }[loss_type]

    def loss(model):
        return sum(w * textbook.policy_loss(model, [e]) for w, e in zip(weights, episodes))

    found = fast_gradients(model, episodes, loss_type=loss_type, max_new_tokens=cap, micro_batch_tokens=40)
    assert_same_gradients(found, textbook_gradients(model, loss))


@pytest.mark.parametrize("micro_batch_tokens", MICRO_BATCH_TOKENS)
def test_scores_are_those_of_sampled_tokens(model, micro_batch_tokens):
    episodes = make_episodes(model)
    for e, scores in zip(episodes, score_episodes(model, episodes, micro_batch_tokens=micro_batch_tokens)):
        torch.testing.assert_close(scores.logp, full_logprobs(model, e), rtol=0, atol=1e-5)


# --- every option


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("number", [math.nan, 1e9])
def test_numbers_of_given_tokens_change_neither_gradient_nor_metrics(model, options, number):
    episodes, reference = make_episodes(model), make_model(make_config(), seed=1)
    options = {"reference": reference, "micro_batch_tokens": 40, "max_new_tokens": 12} | options
    others = [with_other_numbers(e, number) for e in episodes]
    assert metrics_of(model, others, **options) == metrics_of(model, episodes, **options)
    plain, found = fast_gradients(model, episodes, **options), fast_gradients(model, others, **options)
    assert all(torch.equal(plain[name], found[name]) for name in plain)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_mask_of_sampled_tokens_only_changes_no_bit(model, options):
    reference = make_model(make_config(), seed=1)
    episodes = [replace(e, sampled=None) for e in make_episodes(model)]
    masked = [replace(e, sampled=[True] * len(e.response_ids)) for e in episodes]
    options = {"reference": reference, "micro_batch_tokens": 40, "max_new_tokens": 12} | options
    plain, found = fast_gradients(model, episodes, **options), fast_gradients(model, masked, **options)
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_given_tokens_are_context_of_later_tokens(model):
    """Another given id changes the gradient, so it is no padding."""
    e = Episode(0, [1, 2], [3, 4, 5], [-1.0, 0.0, -1.0], "", "stop", 1.0, advantage=1.0, sampled=[True, False, True])
    other = replace(e, response_ids=[3, 9, 5])
    before, after = fast_gradients(model, [e]), fast_gradients(model, [other])
    assert not torch.allclose(before["model.norm.weight"], after["model.norm.weight"])


def test_an_episode_without_a_sampled_token_has_no_gradient_and_counts_in_the_mean(model):
    """It cannot come from a rollout. It must not break the step."""
    e = Episode(0, [1, 2], [3, 4], [-1.0, -1.0], "", "stop", 1.0, advantage=1.0)
    nothing = replace(e, sampled=[False, False])
    one, both = fast_gradients(model, [e], loss_type="grpo"), fast_gradients(model, [e, nothing], loss_type="grpo")
    assert all(torch.allclose(both[name], one[name] / 2) for name in one)


# --- lengths, penalties, metrics


def test_metrics_count_sampled_tokens(model):
    episodes = make_episodes(model)
    tokens = sum(e.n_sampled for e in episodes)
    assert tokens < sum(len(e.response_ids) for e in episodes)
    assert metrics_of(model, episodes)["update/tokens"] == tokens

    class NoTask:
        @staticmethod
        def diagnostics(problem, text):
            return {}

    assert reward_metrics(episodes, NoTask())["completions/mean_length"] == pytest.approx(tokens / len(episodes))


def test_entropy_is_the_mean_over_sampled_tokens(model):
    episodes, total, count = make_episodes(model), 0.0, 0
    for e in episodes:
        with torch.no_grad():
            logp = textbook.all_logprobs(model, e.prompt_ids + e.response_ids, TEMPERATURE, VOCAB)
        rows = logp[len(e.prompt_ids) - 1 : -1][e.sampled_positions]
        total -= float((rows.exp() * rows).sum())
        count += e.n_sampled
    assert metrics_of(model, episodes)["entropy"] == pytest.approx(total / count, rel=1e-4)


def test_penalties_count_sampled_tokens(model):
    reference, episodes = make_model(make_config(), seed=1), make_episodes(model)
    for e in penalise_length(episodes, 12, 6):
        assert e.reward_parts["overlong"] == max(-1.0, min(0.0, (12 - 6 - e.n_sampled) / 6))
    for e in penalise_divergence(reference, episodes, 0.5, "k1"):
        expected = float((torch.tensor(e.sampled_logprobs) - full_logprobs(reference, e)).sum())
        assert e.reward_parts["kl"] == pytest.approx(expected, abs=1e-4)
