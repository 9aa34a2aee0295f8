"""MaxRL, GDPO, pass@k and OPO: closed forms by hand, the published formulas, all subsets counted, and edge cases."""

from __future__ import annotations

import itertools
import math
import random
from statistics import fmean, pstdev

import pytest
import torch

from data_types import Episode
from grpo import GRPO, compute_advantages
from run.config import Config, parse_args, validate
from tasks.task_base import Task
from update.advantages import ESTIMATORS, NAMED, best_of_k, decoupled, length_weighted_mean, maxrl


def episodes_of(rewards, groups=None, parts=None, lengths=None) -> list[Episode]:
    n = len(rewards)
    groups, parts, lengths = groups or [0] * n, parts or [{}] * n, lengths or [1] * n
    return [
        Episode(g, [1], [3] * length, [-1.0] * length, "", "stop", reward=r, reward_parts=p)
        for r, g, p, length in zip(rewards, groups, parts, lengths)
    ]


def advantages(rewards, groups=None, parts=None, lengths=None, **options) -> list[float]:
    return [e.advantage for e in compute_advantages(episodes_of(rewards, groups, parts, lengths), **options)]


# --- MaxRL


@pytest.mark.parametrize("right", range(1, 8))
def test_maxrl_of_right_and_wrong_answers(right):
    """CHECKLIST 66: K right responses of N: N / K - 1 for them and -1 for the others (arXiv 2602.02710)."""
    found = advantages([1.0] * right + [0.0] * (8 - right), estimator="maxrl", epsilon=0.0)
    assert found == pytest.approx([8 / right - 1] * right + [-1.0] * (8 - right))


@pytest.mark.parametrize("rewards", [[0.0] * 4, [1.0] * 4, [0.1] * 12, [-0.3] * 5])
def test_maxrl_of_equal_rewards_is_exactly_zero(rewards):
    assert advantages(rewards, estimator="maxrl", epsilon=0.0) == [0.0] * len(rewards)


def test_maxrl_of_rewards_between_is_the_published_formula():
    rewards = [1.1, 0.1, 0.1, 0.0]
    r = torch.tensor(rewards, dtype=torch.float64)
    wanted = (r - r.mean()) / (r.mean() + 1e-6)
    assert advantages(rewards, estimator="maxrl", epsilon=1e-6) == pytest.approx(wanted.tolist())


@pytest.mark.parametrize(
    "rewards", [[1.0, -0.3, -0.3, -0.4], [-0.3, 0.0, 0.0], [0.5, -0.5], [-2.0, -1.0], [1e-9, -1.0]]
)
def test_maxrl_keeps_the_sign_and_the_bounds_for_negative_rewards(rewards):
    """A mean of 0 or below would give an infinite advantage, or one of the wrong sign."""
    found = maxrl(rewards)
    assert sum(found) == pytest.approx(0)
    for reward, advantage in zip(rewards, found):
        assert math.copysign(1, advantage) == math.copysign(1, reward - fmean(rewards))
        assert -1 - 1e-12 <= advantage <= len(rewards) - 1 + 1e-12
    assert found == pytest.approx(maxrl([r - min(rewards) for r in rewards]))


def test_the_expected_gradient_of_maxrl_is_that_of_its_objective():
    """Over all groups of N: the gradient of -sum_{j <= N - 1} (1 - p)^j / j, the first terms of log p."""
    N, p = 6, 0.2
    total = 0.0
    for right in range(N + 1):
        rewards = [1.0] * right + [0.0] * (N - right)
        scores = [(r - p) / (p * (1 - p)) for r in rewards]  # d log pi / dp of a right and of a wrong response
        chance = math.comb(N, right) * p**right * (1 - p) ** (N - right)
        total += chance * sum(a * s for a, s in zip(maxrl(rewards), scores)) / N
    assert total == pytest.approx(sum((1 - p) ** (j - 1) for j in range(1, N)))


# --- pass@k


def counted(rewards, k):
    """The same numbers from all subsets of k."""
    subsets = list(itertools.combinations(range(len(rewards)), k))
    best = [max(rewards[i] for i in subset) for subset in subsets]
    mean, deviation = fmean(best), pstdev(best)
    with_me = [fmean(b for b, s in zip(best, subsets) if i in s) for i in range(len(rewards))]
    return [(w - mean) / deviation if deviation else 0.0 for w in with_me], [w - mean for w in with_me]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_pass_at_k_equals_all_subsets_counted(k):
    """CHECKLIST 66: rewards with ties, in any order, also negative ones."""
    generator = random.Random(k)
    for _ in range(10):
        rewards = [generator.choice([-0.3, 0.0, 0.1, 1.0, 1.1]) for _ in range(6)]
        wanted, plain = counted(rewards, k)
        assert best_of_k(rewards, k) == pytest.approx(wanted, abs=1e-12)
        assert best_of_k(rewards, k, divide=False) == pytest.approx(plain, abs=1e-12)
        assert advantages(rewards, estimator="pass_at_k", k=k, scale="none") == pytest.approx(plain, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("wrong", range(1, 8))
def test_pass_at_k_of_right_and_wrong_answers_is_the_papers_closed_form(k, wrong):
    """arXiv 2508.10751: R = 1 - C(W, k) / C(N, k), sigma = sqrt(R (1 - R))."""
    N = 8
    R = 1 - math.comb(wrong, k) / math.comb(N, k)
    sigma = math.sqrt(R * (1 - R))
    right = (1 - R) / sigma if sigma else 0.0
    false = (1 - R - math.comb(wrong - 1, k - 1) / math.comb(N - 1, k - 1)) / sigma if sigma else 0.0
    found = advantages([0.0] * wrong + [1.0] * (N - wrong), estimator="pass_at_k", k=k, epsilon=0.0)
    assert found == pytest.approx([false] * wrong + [right] * (N - wrong), abs=1e-12)


def test_pass_at_1_is_grpo():
    rewards = [1.1, 0.1, 0.1, 0.0, -0.3]
    assert advantages(rewards, estimator="pass_at_k", k=1) == pytest.approx(advantages(rewards))
    assert advantages(rewards, estimator="pass_at_k", k=1, scale="none") == pytest.approx(
        advantages(rewards, scale="none")
    )


def test_pass_at_k_without_a_difference_is_exactly_zero():
    assert best_of_k([0.1] * 12, 3) == [0.0] * 12
    assert best_of_k([0.0, 1.0, 1.0], 3) == [0.0] * 3  # the whole group
    assert best_of_k([0.0, 1.0], 5) == [0.0] * 2  # a group with missing rewards may be smaller than k
    assert best_of_k([1.0, 1.0, 1.0, 0.0], 2) == [0.0] * 4  # every two responses have a right one
    with pytest.raises(ValueError, match="k 0: expected 1 or more"):
        best_of_k([0.0, 1.0], 0)


# --- GDPO


def published_gdpo(parts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[groups, G, parts] -> [groups, G]: arXiv 2601.05242 in tensors, with the divisor n."""
    normal = (parts - parts.mean(1, keepdim=True)) / (parts.std(1, keepdim=True, correction=0) + 1e-4)
    sums = (normal * weights).sum(-1)
    return (sums - sums.mean()) / (sums.std(correction=0) + 1e-4)


def test_gdpo_equals_the_published_formula():
    """CHECKLIST 66: each part in its group, the weighted sum over the batch. Groups in any order."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.rand(3, 4, 2, generator=generator, dtype=torch.float64)
    wanted = published_gdpo(parts, torch.tensor([0.1, 1.0], dtype=torch.float64)).flatten()
    order = torch.randperm(12, generator=generator).tolist()
    flat = parts.flatten(0, 1).tolist()
    named = [{"format": flat[i][0], "answer": flat[i][1]} for i in order]
    found = advantages(
        [0.0] * 12, [i // 4 for i in order], named, estimator="gdpo", part_weights={"format": 0.1, "answer": 1.0}
    )
    assert found == pytest.approx([wanted[i].item() for i in order], abs=1e-12)


def test_gdpo_tells_apart_rewards_that_add_up_to_the_same():
    """The paper's example: totals 1 and 1 from different parts are one reward to GRPO."""
    parts = [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 0.0}]
    rewards = [sum(part.values()) for part in parts]
    grpo = advantages(rewards, parts=parts)
    gdpo = advantages(rewards, parts=parts, estimator="gdpo")
    assert grpo[0] == grpo[1]
    assert gdpo[0] > gdpo[1] > gdpo[3]


def test_gdpo_of_one_part_in_one_group_is_grpo():
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0]
    parts = [{"answer": r} for r in rewards]
    assert advantages(rewards, parts=parts, estimator="gdpo", epsilon=0.0) == pytest.approx(
        advantages(rewards, epsilon=0.0)
    )


def test_gdpo_without_a_signal_is_exactly_zero():
    equal = [[{"format": 0.1, "answer": 1.0}] * 12, [{"format": 0.0}, {"format": 1.0}]]
    found = decoupled(equal, {})
    assert found[0] == [0.0] * 12
    assert found[1] == pytest.approx([-math.sqrt(7), math.sqrt(7)], rel=1e-3)  # the deviation is that of the batch
    assert decoupled([[{"format": 0.1}] * 3], {}) == [[0.0] * 3]
    assert decoupled([[{}, {}]], {}) == [[0.0, 0.0]]
    assert decoupled([], {}) == []


def test_a_missing_part_adds_nothing():
    parts = [
        {"answer": 1.0, "style": 0.0},
        {"answer": 0.0, "style": 1.0},
        {"answer": 0.0},
        {"answer": 0.0, "style": math.nan},
    ]
    found = decoupled([parts], {"answer": 0.0})[0]
    assert found[2:] == [0.0, 0.0]
    assert found[0] == pytest.approx(-found[1])


class Weighted(Task):
    """Weights of its own, a part without a weight, and problems that are not needed here."""

    def part_weights(self):
        return super().part_weights() | {"style": 0.5}


def test_the_weights_of_the_parts_are_those_of_the_reward():
    task = Weighted(format_weight=0.25, answer_weight=2.0, arithmetic_weight=0.3)
    assert task.part_weights() == {
        "format": 0.25, "answer": 2.0, "language": 0.0, "repetition": 0.0, "arithmetic": 0.3, "style": 0.5
    }  # fmt: skip


# --- OPO


def test_opo_weights_the_baseline_by_lengths():
    """arXiv 2505.23585: sum(length * reward) / sum(length)."""
    assert length_weighted_mean([1.0, 0.0, 0.0], [10, 20, 70]) == pytest.approx(0.1)
    assert length_weighted_mean([1.0, 0.0], [0, 0]) == 0.5
    found = advantages([1.0, 0.0, 0.0], lengths=[1, 2, 7], estimator="opo", scale="none")
    assert found == pytest.approx([0.9, -0.1, -0.1])
    assert advantages([1.0, 0.0], lengths=[5, 5], estimator="opo") == advantages([1.0, 0.0])
    assert advantages([0.1] * 12, lengths=list(range(1, 13)), estimator="opo", scale="none") == [0.0] * 12


# --- all of them


@pytest.mark.parametrize("estimator", ["opo", *NAMED])
def test_a_missing_reward_leaves_the_others_alone(estimator):
    """CHECKLIST 16"""
    rewards = [0.0, 1.0, 0.5, 0.2, 0.1, 2.0, 3.0]
    groups = [0, 0, 0, 0, 0, 1, 1]
    parts = [{"answer": r} for r in rewards]
    whole = advantages(rewards, groups, parts, estimator=estimator)
    holes = advantages([math.nan, *rewards, math.inf], [0, *groups, 2], [{}, *parts, {}], estimator=estimator)
    assert holes == [0.0, *whole, 0.0]


@pytest.mark.parametrize("estimator", ["opo", *NAMED])
@pytest.mark.parametrize("large", [1e155, 1e300, -1e200])
def test_a_huge_reward_overflows_nothing(estimator, large):
    rewards = [large, 0.0, 0.0, 1.0, 0.5]
    found = advantages(rewards, parts=[{"answer": r} for r in rewards], estimator=estimator)
    assert all(map(math.isfinite, found))
    assert any(found) or (estimator == "pass_at_k" and large < 0)  # the best of 4 is never the lowest of 5


@pytest.mark.parametrize(
    ("estimator", "scale"), [("maxrl", "none"), ("maxrl", "batch"), ("gdpo", "none"), ("pass_at_k", "batch")]
)
def test_a_scale_that_an_estimator_does_not_have_is_refused(estimator, scale):
    with pytest.raises(ValueError, match=f"scale {scale} does not go with estimator {estimator}"):
        advantages([0.0, 1.0], estimator=estimator, scale=scale)
    with pytest.raises(ValueError, match=f"--advantage-scale {scale} does not go with"):
        validate(Config(advantage_estimator=estimator, advantage_scale=scale))


@pytest.mark.parametrize("k", [8, 9])
def test_a_k_as_large_as_the_group_is_refused(k):
    with pytest.raises(ValueError, match=f"--pass-k {k} and --group-size 8: the best of the whole group"):
        parse_args(["--advantage-estimator", "pass_at_k", "--pass-k", str(k), "--group-size", "8"])
    assert parse_args(["--pass-k", str(k), "--group-size", "8"]).pass_k == k  # without effect for the others


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_trains_the_bundled_model(estimator):
    """A whole step, with its preset: the reward has negative parts, and gdpo sees the weights of the run."""
    words = [
        "--advantage-estimator",
        estimator,
        "--prompts-per-step",
        "2",
        "--group-size",
        "6",
        "--max-new-tokens",
        "24",
    ]
    trainer = GRPO(parse_args([*words, "--overlong-buffer", "8"]))
    loss = trainer.train_step("[3, 5, 2] = 13", "13")
    assert math.isfinite(loss)
