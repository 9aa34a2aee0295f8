"""Tests of exercises/grpo_steps.py: numbers by hand, loops, and the AdamW of torch."""

from __future__ import annotations

import math

import grpo_steps as mine
import pytest
import torch
from torch import Tensor


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_token_logprobs_is_its_formula(temperature):
    logits, targets = random(5, 7), torch.tensor([0, 6, 3, 3, 1])
    wanted = []
    for row, target in zip(logits.tolist(), targets.tolist()):
        total = sum(math.exp(z / temperature) for z in row)
        wanted.append(math.log(math.exp(row[target] / temperature) / total))
    close(mine.token_logprobs(logits, targets, temperature), torch.tensor(wanted))


def test_token_logprobs_stays_finite_for_large_logits():
    logits = torch.tensor([[1e4, 0.0, -1e4], [1e4, 0.0, -1e4]])
    close(mine.token_logprobs(logits, torch.tensor([0, 2]), 1.0), torch.tensor([0.0, -2e4]))


def test_token_logprobs_has_the_gradient_one_hot_minus_probability():
    logits = random(1, 4).requires_grad_()
    mine.token_logprobs(logits, torch.tensor([2]), 1.0).sum().backward()
    close(logits.grad, torch.eye(4)[2:3] - logits.detach().softmax(-1))


def test_entropy_of_known_distributions():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1000.0, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, -1e4, -1e4]])
    third = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    close(mine.entropy(logits), torch.tensor([math.log(4), 0.0, third]))


@pytest.mark.parametrize(
    ("p", "kept"), [(1.0, [0, 1, 2, 3]), (0.8, [1, 3, 0]), (0.75, [1, 3]), (0.6, [1, 3]), (0.5, [1]), (0.01, [1])]
)
def test_top_p_keeps_the_smallest_set_that_holds_p(p, kept):
    probabilities = torch.tensor([[0.15625, 0.5, 0.09375, 0.25]])
    wanted = torch.zeros(1, 4)
    wanted[0, kept] = probabilities[0, kept]
    close(mine.top_p(probabilities, p), wanted)


def test_draw_inverts_the_cumulative_distribution():
    weights = torch.tensor([[0.0, 1.0, 2.0, 0.0, 1.0]])  # cumulative, as shares: 0, 1/4, 3/4, 3/4, 1
    u = torch.tensor([0.0, 0.2, 0.25, 0.7, 0.75, 0.99])
    assert mine.draw(weights.expand(6, 5), u).tolist() == [1, 1, 2, 2, 4, 4]


def test_draw_gives_each_row_its_own_distribution():
    assert mine.draw(torch.eye(4)[[2, 0, 3]], torch.tensor([0.0, 0.5, 0.99])).tolist() == [2, 0, 3]


def test_group_advantages_by_hand():
    deviation = math.sqrt(3) / 4  # of 1, 0, 0, 0 around 1/4, divisor 4
    a = 1 / (deviation + 1e-4)
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [10.0, 10.0, 12.0, 12.0]])
    b = 1 / (1 + 1e-4)
    close(mine.group_advantages(rewards), torch.tensor([[0.75 * a, *[-0.25 * a] * 3], [-b, -b, b, b]]))


def test_group_advantages_are_exactly_zero_where_a_group_agrees():
    rewards = torch.tensor([[0.1] * 8, [0.7] * 8, [1.3] * 8])
    assert torch.equal(mine.group_advantages(rewards), torch.zeros(3, 8))


def test_clipped_loss_values_and_gradients():
    """The four corners of PPO's figure 1, and the ratio 1."""
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5])
    advantage = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0])
    old = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.5])
    logp = (old + ratio.log()).requires_grad_()
    loss = mine.clipped_loss(logp, old, advantage, 0.2, 0.3)
    close(loss, torch.tensor([-2.0, -2.6, -1.0, 3.0, 1.6]))
    loss.sum().backward()
    close(logp.grad, torch.tensor([-2.0, 0.0, -1.0, 3.0, 0.0]))


def test_k3_is_unbiased():
    """Its mean over the policy is the divergence itself: exact, by adding up a vocabulary of five."""
    logp, ref = random(5).log_softmax(-1), random(5, seed=1).log_softmax(-1)
    wanted = sum(math.exp(p) * (p - q) for p, q in zip(logp.tolist(), ref.tolist()))
    assert float((logp.exp() * mine.k3(logp, ref)).sum()) == pytest.approx(wanted, abs=1e-5)


def test_k3_is_never_negative_and_zero_at_equal_policies():
    logp, ref = -random(100).abs(), -random(100, seed=1).abs()
    assert (mine.k3(logp, ref) > 0).all()
    assert torch.equal(mine.k3(logp, logp), torch.zeros(100))


def test_k3_has_its_gradient_in_the_policy_alone():
    logp, ref = torch.tensor([-1.0], requires_grad=True), torch.tensor([-3.0], requires_grad=True)
    mine.k3(logp, ref).sum().backward()
    close(logp.grad, torch.tensor([1 - math.exp(-2.0)]))
    assert ref.grad is None


@pytest.mark.parametrize(
    ("loss_type", "wanted"),
    [("dapo", [1 / 4] * 4), ("grpo", [1 / 6, 1 / 6, 1 / 6, 1 / 2]), ("dr_grpo", [1 / 20] * 4)],
)
def test_token_weights_of_answers_of_three_and_one_tokens(loss_type, wanted):
    close(mine.token_weights(torch.tensor([3, 1]), loss_type, 10), torch.tensor(wanted))


def test_adamw_step_follows_torch():
    options = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.3}
    theirs = torch.nn.Parameter(random(20))
    weight, first, second = theirs.detach().clone(), torch.zeros(20), torch.zeros(20)
    optimizer = torch.optim.AdamW([theirs], **options)
    for step in range(1, 5):
        theirs.grad = random(20, seed=step) * 0.1
        optimizer.step()
        mine.adamw_step(weight, theirs.grad.clone(), first, second, step, **options)
        close(weight, theirs.detach())
    close(first, optimizer.state[theirs]["exp_avg"])
    close(second, optimizer.state[theirs]["exp_avg_sq"])


def test_lora_linear_is_the_merged_layer():
    x, weight, A, B = random(3, 6), random(5, 6, seed=1), random(2, 6, seed=2), random(5, 2, seed=3)
    close(mine.lora_linear(x, weight, A, B, 8.0), x @ (weight + 4 * B @ A).T)
