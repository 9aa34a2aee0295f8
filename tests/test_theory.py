"""Statements of the pages about the theory, each with its number: bias of an estimator, effect of a division, cost of
rounding. Every expectation is a finite sum, so no test depends on luck."""

from __future__ import annotations

import itertools
import math
from statistics import fmean

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data_types import Episode
from grpo import compute_advantages
from model.linear import Linear, gradients_in_place
from optimizer import MemoryEfficientAdamW, adamw_
from run.options import LossOptions
from update import losses
from update.objective import divergence_terms


def advantages_of(rewards: list[float], **options: str) -> list[float]:
    """The project's advantages of one group."""
    episodes = [Episode(0, [1], [2], [0.0], "", "stop", reward=reward) for reward in rewards]
    return [e.advantage for e in compute_advantages(episodes, **options)]


def mean_over_binary_groups(p: float, G: int, of_group) -> float:
    """Mean of `of_group(rewards)` over all groups of G rewards, each 1 with probability p and 0 otherwise."""
    total = 0.0
    for right in range(G + 1):
        probability = math.comb(G, right) * p**right * (1 - p) ** (G - right)
        total += probability * of_group([1.0] * right + [0.0] * (G - right))
    return total


def strength(p: float, G: int, **options: str) -> float:
    """How strongly a problem of solve rate p pulls: the expected policy gradient, divided by the gradient of p.

    The policy is one coin that is right with probability p. Its log-probability has the derivative
    (r - p) / (p (1 - p)) in p, and the exact policy gradient of the mean reward is 1.
    """

    def gradient(rewards: list[float]) -> float:
        return fmean(a * (r - p) / (p * (1 - p)) for a, r in zip(advantages_of(rewards, **options), rewards))

    return mean_over_binary_groups(p, G, gradient)


# -------------------------------------------------------------------------------------------------- docs/grpo.md


@pytest.mark.parametrize("G", [2, 8])
@pytest.mark.parametrize("p", [0.01, 0.5, 0.9])
def test_the_mean_of_the_group_shrinks_the_gradient_and_the_mean_of_the_others_does_not(G, p):
    """The reward of a response is part of its own baseline: the gradient is (G - 1) / G of the exact one."""
    assert strength(p, G, scale="none") == pytest.approx((G - 1) / G)
    assert strength(p, G, scale="none", estimator="rloo") == pytest.approx(1)


@pytest.mark.parametrize(("p", "pull"), [(0.01, 2.61), (0.1, 2.33), (0.5, 1.86)])
def test_division_by_the_deviation_of_a_group_of_eight(p, pull):
    """Far from 1 / sqrt(p (1 - p)), which is 10.05, 3.33 and 2: that holds in the limit of large groups."""
    assert strength(p, 8) == pytest.approx(pull, abs=0.01)
    assert strength(p, 8) < 1 / math.sqrt(p * (1 - p))


def test_division_by_the_deviation_of_a_large_group_approaches_the_limit():
    distance = [1 / math.sqrt(0.1 * 0.9) - strength(0.1, G) for G in (8, 32, 128)]
    assert distance[0] > 3 * distance[1] > 9 * distance[2] > 0


def test_the_deviation_is_of_the_population_and_that_of_the_sample_is_larger():
    """TRL divides by the sample's deviation (divisor G - 1): for groups of 8, advantages are 1.069 times as large here,
    for groups of 2, 1.414 times."""
    for G in (2, 8):
        rewards = [1.0] + [0.0] * (G - 1)
        sample = torch.tensor(rewards).std(correction=1).item()
        theirs = (1.0 - fmean(rewards)) / (sample + 1e-4)
        ratio = advantages_of(rewards)[0] / theirs
        assert ratio == pytest.approx(math.sqrt(G / (G - 1)), rel=1e-3)


def test_the_loss_of_a_first_update_is_minus_a_covariance_under_dapo_and_0_under_grpo():
    """At ratio 1: -cov(advantage, length) / mean length. It is 0 only if length and advantage are not correlated."""
    advantages = torch.tensor(advantages_of([1.0, 0.0, 0.0, 1.0]))
    lengths = torch.tensor([2, 9, 7, 4])
    logp = torch.full((int(lengths.sum()),), -1.0)

    def loss(loss_type: str) -> float:
        terms = losses.policy_loss(logp, logp, advantages, lengths, loss_type=loss_type)
        return losses.weighted_sum(terms.loss, losses.token_weights(loss_type, lengths, 16)).item()

    covariance = (advantages * lengths).mean() - advantages.mean() * lengths.float().mean()
    assert loss("dapo") == pytest.approx((-covariance / lengths.float().mean()).item(), abs=1e-6)
    assert loss("dapo") == pytest.approx(0.4545, abs=1e-3)
    assert loss("grpo") == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("grpo", "gspo", "sapo"), [1 / 6, 1 / 6, 1 / 6, 1 / 2]),
        (("dapo", "bnpo", "cispo"), [1 / 4] * 4),
        (("dr_grpo",), [1 / 20] * 4),
    ],
)
def test_the_table_of_weights(names, wanted):
    """Responses of three tokens and of one, at most ten allowed. All seven losses stand in one of the rows."""
    for name in names:
        torch.testing.assert_close(losses.token_weights(name, torch.tensor([3, 1]), 10), torch.tensor(wanted))
    rows = {"grpo", "gspo", "sapo", "dapo", "bnpo", "cispo", "dr_grpo"}
    assert set(losses.POLICY_LOSSES) == rows


# -------------------------------------------------------------------------------------------------- docs/kl.md


def expected_gradient_of_group(logits: Tensor, reference: Tensor, beta: float, G: int, scale: str, kl: str) -> Tensor:
    """Expected gradient [V] of sum_i A_i log pi(o_i) / G, if the reward is -beta * penalty alone.

    Exact: all V^G groups of tokens are enumerated, and each is weighed by its probability.
    """
    logp = logits.detach().log_softmax(-1)
    penalty = losses.kl_penalty(logp, reference, kl)
    scores = torch.eye(len(logits), dtype=torch.float64) - logp.exp()  # row o: gradient of log pi(o) in the logits
    total = torch.zeros_like(logits)
    for tokens in itertools.product(range(len(logits)), repeat=G):
        advantages = advantages_of([-beta * penalty[o].item() for o in tokens], scale=scale)
        group = sum(a * scores[o] for a, o in zip(advantages, tokens)) / G
        total += logp[list(tokens)].sum().exp() * group
    return total


@pytest.fixture
def two_policies() -> tuple[Tensor, Tensor]:
    """Logits of a policy over four tokens, and log-probabilities of a reference."""
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(4, generator=draw, dtype=torch.float64, requires_grad=True)
    return logits, torch.randn(4, generator=draw, dtype=torch.float64).log_softmax(-1)


def gradient_of_kl(logits: Tensor, reference: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits)[0]


@pytest.mark.parametrize("G", [2, 4])
def test_k1_in_the_reward_has_the_gradient_of_kl_without_the_division_only(two_policies, G):
    """Times (G - 1) / G, as every reward under the mean of the group. Beta scales it."""
    logits, reference = two_policies
    wanted = -(G - 1) / G * gradient_of_kl(logits, reference)
    for beta in (0.04, 0.4):
        found = expected_gradient_of_group(logits, reference, beta, G, "none", "k1")
        torch.testing.assert_close(found, beta * wanted, rtol=1e-6, atol=1e-9)


def test_division_by_the_deviation_cancels_beta_in_the_reward(two_policies):
    """In a group whose task rewards are equal, only the penalty is left to compare. Ten times the weight pulls as hard,
    and the direction is no longer that of the divergence."""
    logits, reference = two_policies
    weak, strong = (expected_gradient_of_group(logits, reference, beta, 4, "group", "k1") for beta in (0.1, 1.0))
    torch.testing.assert_close(weak, strong, rtol=0.02, atol=1e-3)
    kl = gradient_of_kl(logits, reference)
    assert strong.norm() > kl.norm() / 2  # a full-strength gradient at beta 0.1, too
    assert torch.nn.functional.cosine_similarity(-strong, kl, dim=0) < 0.9999


def test_k3_with_old_logp_has_the_gradient_of_kl_off_policy(two_policies):
    logits, reference = two_policies
    old = torch.randn(4, generator=torch.Generator().manual_seed(6), dtype=torch.float64).log_softmax(-1)
    term = losses.kl_penalty(logits.log_softmax(-1), reference, "k3", old_logp=old)
    found = torch.autograd.grad((old.exp() * term).sum(), logits)[0]
    torch.testing.assert_close(found, gradient_of_kl(logits, reference), rtol=1e-9, atol=1e-12)


def test_no_option_of_a_run_reaches_the_corrected_divergence(monkeypatch):
    """docs/kl.md says that `old_logp` is for callers of the library: an update never passes it."""
    passed = []
    plain = losses.kl_penalty

    def spy(*arguments, **options):
        passed.append(options.get("old_logp"))
        return plain(*arguments, **options)

    monkeypatch.setattr(losses, "kl_penalty", spy)

    class Micro:
        old_logp, weights = torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 0.5])

    logp = torch.tensor([-1.5, -1.5])
    for kl in ("k1", "k2", "k3", "kl", "approx_kl"):
        divergence_terms(LossOptions(beta=0.1, kl=kl), Micro, logp, logp, None)
    assert passed == [None] * 5


# ------------------------------------------------------------------------------------- docs/optimal-transport.md


def states(T: int = 12, D: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def debiased(new: Tensor, old: Tensor, window: int) -> Tensor:
    """As docs/optimal-transport.md defines it. `transport_cost` sends no gradient into its second argument."""

    def cost(a: Tensor, b: Tensor) -> Tensor:
        return losses.transport_cost(a, b, window, iterations=200)

    value = cost(new, old) - (cost(new, new) + cost(old, old)) / 2
    pull = cost(new, old) - cost(new, new)  # cost(new, new) has two equal gradients, and half of both is one
    return pull + (value - pull).detach()


def test_transport_between_equal_states_costs_something_and_pulls():
    """Above window 0, the entropy term spreads a token over its neighbours."""
    h = states().requires_grad_()
    found = {}
    for window in (0, 2, 8):
        cost = losses.transport_cost(h, h.detach(), window)
        found[window] = cost.item(), torch.autograd.grad(cost, h)[0].norm().item()
    assert found[0] == pytest.approx((0, 0), abs=1e-7)
    assert found[2][0] > 1e-3
    assert found[2][1] > 1e-4
    assert found[8][0] > found[2][0]


def test_the_debiased_divergence_is_0_at_equal_states_and_does_not_pull():
    """Feydy et al. 2019: cost(new, old) - cost(new, new) / 2 - cost(old, old) / 2."""
    h = states().requires_grad_()
    for window in (2, 8):
        same = debiased(h, h.detach(), window)
        assert same.item() == pytest.approx(0, abs=1e-9)
        assert torch.autograd.grad(same, h)[0].norm().item() < 1e-6
        assert debiased(h, states(seed=1), window).item() > 0.1


def test_the_gradient_of_the_debiased_divergence_is_that_of_its_value():
    new, old = states().requires_grad_(), states(seed=1)
    (gradient,) = torch.autograd.grad(debiased(new, old, 2), new)
    step = torch.randn(new.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 1e-4
    with torch.no_grad():
        difference = debiased(new + step, old, 2) - debiased(new - step, old, 2)
    assert difference.item() == pytest.approx(2 * (gradient * step).sum().item(), rel=1e-3)


class Shapes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.made: set[tuple[str, tuple[int, ...]]] = set()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        if isinstance(result, Tensor):
            self.made.add((operation.overloadpacket.__name__, tuple(result.shape)))
        return result


def test_the_iterations_work_on_the_band_and_the_cost_is_made_in_full():
    """docs/optimal-transport.md says so: one matrix [T, T], then [T, 2 window + 1] in every iteration."""
    with Shapes() as shapes:
        losses.transport_cost(states(), states(seed=1), window=2)
    made_by = {name for name, shape in shapes.made if shape == (12, 12)}
    assert "mm" in made_by
    assert "exp" not in made_by
    assert ("exp", (12, 5)) in shapes.made


# -------------------------------------------------------------------------------------- docs/memory.md, docs/faq.md


@pytest.mark.parametrize(("pieces", "error"), [(1, 0.0017), (8, 0.0036), (64, 0.0096), (512, 0.0267)])
def test_a_bf16_gradient_is_rounded_once_a_micro_batch(pieces, error):
    """The relative error of the sum grows like the square root of the number of micro-batches. In fp32 it is 1e-6."""
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(512, 64, generator=draw).bfloat16() for _ in range(2))
    exact = dy.double().T @ x.double()

    def relative_error(dtype: torch.dtype) -> float:
        layer = Linear(64, 64, bias=False).to(dtype)
        with gradients_in_place():
            for x_i, dy_i in zip(x.to(dtype).chunk(pieces), dy.to(dtype).chunk(pieces)):
                (layer(x_i) * dy_i).sum().backward()
        return ((layer.weight.grad.double() - exact).norm() / exact.norm()).item()

    assert relative_error(torch.bfloat16) == pytest.approx(error, rel=0.1)
    assert relative_error(torch.float32) < 1e-6


def test_the_decay_is_that_of_pytorch_and_not_of_the_paper():
    """Loshchilov & Hutter 2019, algorithm 2, line 12, takes schedule * decay * weight. PyTorch and this project take
    lr * decay * weight: at lr 1e-3 a decay of 0.1 shrinks a weight by 1e-4 a step and not by 0.1."""
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    theirs = torch.nn.Parameter(torch.tensor([2.0]))
    for parameter, AdamW in ((weight, MemoryEfficientAdamW), (theirs, torch.optim.AdamW)):
        parameter.grad = torch.zeros(1)
        AdamW([parameter], lr=1e-3, weight_decay=0.1).step()
    assert weight.item() == pytest.approx(2.0 * (1 - 1e-4), rel=1e-7)
    assert weight.item() == theirs.item()
    plain, zero = torch.tensor([2.0]), torch.zeros(1)  # the update written out
    adamw_(plain, zero, zero.clone(), zero.clone(), None, 1, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    assert plain.item() == theirs.item()
