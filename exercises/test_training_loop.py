"""Tests of exercises/training_loop.py: cases by hand, a model of four tokens, exact means, and a run that must
learn."""

from __future__ import annotations

import math

import pytest
import torch
import training_loop as mine
from torch import Tensor


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("prompt_length", "rows"), [(2, [1, 2, 3]), (1, [0, 1, 2, 3]), (4, [3])])
def test_shift_by_one_pairs_each_token_with_the_row_before_it(prompt_length, rows):
    logits, ids = random(5, 7), torch.tensor([3, 1, 4, 1, 5])
    found_logits, found_ids = mine.shift_by_one(logits, ids, prompt_length)
    assert found_logits.shape == (len(rows), 7)
    close(found_logits, logits[rows])
    assert found_ids.tolist() == ids[prompt_length:].tolist()


class Counter:
    """A model that says the next number, up to `last`, and checks how it is called."""

    def __init__(self, last: int):
        self.last, self.cached = last, []
        self.calls: list[int] = []

    def __call__(self, new_ids: list[int], length: int) -> Tensor:
        assert length == len(self.cached), f"{len(self.cached)} tokens are cached, the call says {length}"
        self.cached += list(new_ids)
        self.calls.append(len(new_ids))
        return torch.eye(10)[[min(i + 1, self.last) for i in new_ids]]


def test_decode_stops_at_a_stop_token_and_keeps_it():
    model = Counter(last=9)
    assert list(mine.decode(model, [1, 2, 3], 20, stop_ids=[6, 8])) == [4, 5, 6]
    assert model.calls == [3, 1, 1]
    assert model.cached == [1, 2, 3, 4, 5]


def test_decode_ends_at_the_cap_without_a_call_too_many():
    model = Counter(last=9)
    assert list(mine.decode(model, [1], 4, stop_ids=[9])) == [2, 3, 4, 5]
    assert model.calls == [1, 1, 1, 1]


def gradient(cut: list[int]) -> tuple[Tensor, Tensor]:
    """Accumulated gradient of two parameters over 12 tokens in micro-batches of these sizes."""
    x = random(12, 3)
    first, second = random(3, seed=1).requires_grad_(), random(1, seed=2).requires_grad_()
    first.grad = torch.full((3,), 100.0)  # of an earlier step
    mine.accumulate(lambda m: (m @ first).tanh() * second, [first, second], list(x.split(cut)))
    return first.grad, second.grad


def test_accumulate_is_the_gradient_of_the_mean():
    x, first, second = random(12, 3), random(3, seed=1).requires_grad_(), random(1, seed=2).requires_grad_()
    wanted = torch.autograd.grad(((x @ first).tanh() * second).mean(), (first, second))
    for found, right in zip(gradient([12]), wanted):
        close(found, right)


@pytest.mark.parametrize("cut", [[1] * 12, [1, 11], [5, 4, 3]])
def test_accumulate_does_not_depend_on_the_cut(cut):
    for found, wanted in zip(gradient(cut), gradient([12])):
        close(found, wanted)


def test_accumulate_frees_each_graph():
    x, weight, alive = random(6, 3), random(3, seed=1).requires_grad_(), []

    def term(m: Tensor) -> Tensor:
        assert all(output.grad_fn is None or done[0] for output, done in alive), "two graphs at a time"
        output, done = (m @ weight).tanh(), [False]
        output.register_hook(lambda _: done.__setitem__(0, True))
        alive.append((output, done))
        return output

    mine.accumulate(term, [weight], list(x.split(2)))
    assert len(alive) == 3


def policies() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(6, generator=draw, dtype=torch.float64, requires_grad=True)
    return logits, torch.randn(6, generator=draw, dtype=torch.float64).log_softmax(-1)


def test_kl_loss_has_the_gradient_of_kl():
    """Exact: the mean over the policy is a sum over the six tokens."""
    logits, reference = policies()
    logp = logits.log_softmax(-1)
    (wanted,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits)
    logp = logits.log_softmax(-1)
    (found,) = torch.autograd.grad((logp.detach().exp() * mine.kl_loss(logp, reference)).sum(), logits)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_kl_loss_has_no_gradient_in_the_reference():
    logp, reference = torch.tensor([-1.0], requires_grad=True), torch.tensor([-3.0], requires_grad=True)
    mine.kl_loss(logp, reference).sum().backward()
    assert logp.grad is not None
    assert reference.grad is None


@pytest.mark.parametrize(("p", "k"), [(0.1, 1), (0.1, 3), (0.5, 3), (0.93, 3), (0.5, 8)])
def test_pass_at_k_has_the_right_mean(p, k):
    n = 8
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(x * mine.pass_at_k(n, c, k) for c, x in enumerate(chance))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-9)


def near_the_goal(responses: Tensor) -> Tensor:
    """Reward: a quarter for every token that is its own position, and 1 more if all four are."""
    right = (responses == torch.arange(4)).float()
    return right.mean(-1) + right.prod(-1)


def test_train_learns():
    torch.manual_seed(0)
    logits = torch.zeros(4, 4)
    rewards = mine.train(logits, near_the_goal, steps=150, groups=4, group_size=8, lr=0.1)
    assert len(rewards) == 150
    assert sum(rewards[:10]) / 10 < 0.5  # by chance: 0.25
    assert sum(rewards[-10:]) / 10 > 1.8  # the best is 2
    assert logits.argmax(-1).tolist() == [0, 1, 2, 3]


def test_train_compares_within_a_group():
    """Rewards that are equal within each group hold no information: nothing is learnt from them."""
    torch.manual_seed(0)
    logits, step = torch.zeros(4, 4), [0.0]

    def by_group(responses: Tensor) -> Tensor:
        return torch.arange(4.0).repeat_interleave(len(responses) // 4) + step[0]

    mine.train(logits, by_group, steps=5, groups=4, group_size=8, lr=0.1)
    assert torch.equal(logits, torch.zeros(4, 4))


def test_train_takes_adam_steps():
    """The first step of Adam moves each logit by lr, for a gradient of any size."""
    torch.manual_seed(1)
    logits = torch.zeros(4, 4)
    mine.train(logits, near_the_goal, steps=1, groups=4, group_size=8, lr=0.01)
    moved = logits.abs()
    assert (moved < 0.01001).all()
    assert (moved > 0.0099).sum() >= 12


def test_train_gives_every_token_the_advantage_of_its_response():
    """Only the last token decides, and the other positions must stay near uniform in the mean."""
    torch.manual_seed(0)
    logits = torch.zeros(3, 2)
    mine.train(logits, lambda r: (r[:, -1] == 1).float(), steps=60, groups=8, group_size=8, lr=0.05)
    p = logits.softmax(-1)[:, 1]
    assert p[-1] > 0.9
    assert ((p[:2] - 0.5).abs() < 0.35).all()
