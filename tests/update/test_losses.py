"""losses.py against slow references written here, closed-form numbers, and TRL's loss of the same name."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from update.losses import (
    KL_ESTIMATORS,
    POLICY_LOSSES,
    adapt_entropy_coef,
    entropy_bonus,
    importance_weights,
    kl_penalty,
    policy_loss,
    safe_exp,
    token_weights,
    top_entropy_mask,
    transport_cost,
    transport_penalty,
    weighted_sum,
)

LOSS_TYPES = list(POLICY_LOSSES)
LENGTHS = torch.tensor([3, 1, 0, 4])
M = int(LENGTHS.sum())


def randn(*shape, seed=0, dtype=torch.float32, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(scale).to(dtype)


def policy_inputs(seed=0, spread=0.5, lengths=LENGTHS, dtype=torch.float64):
    """Ratios well inside and well outside the clip range, advantages of both signs."""
    M, E = int(lengths.sum()), len(lengths)
    logp = (randn(M, seed=seed, dtype=dtype) - 2).requires_grad_()
    old_logp = logp.detach() + randn(M, seed=seed + 1, dtype=dtype, scale=spread)
    return logp, old_logp, randn(E, seed=seed + 2, dtype=dtype)


# ------------------------------------------------------------------------------------------------ weights of the tokens


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        *[(name, [1 / 8] * 8) for name in ("dapo", "bnpo", "cispo")],
        *[(name, [1 / 12] * 3 + [1 / 4] + [1 / 16] * 4) for name in ("grpo", "gspo", "sapo")],
        ("dr_grpo", [1 / 40] * 8),
    ],
)
def test_token_weights_by_hand(loss_type, expected):
    """Four episodes of 3, 1, 0 and 4 tokens, at most 10."""
    torch.testing.assert_close(token_weights(loss_type, LENGTHS, 10), torch.tensor(expected))


def test_token_weights_count_kept_tokens_only():
    keep = torch.tensor([1, 0, 1, 0, 1, 1, 1, 1]).bool()
    torch.testing.assert_close(token_weights("dapo", LENGTHS, 10, keep), keep / 6)
    expected = torch.tensor([1 / 8, 0, 1 / 8, 0] + [1 / 16] * 4)
    torch.testing.assert_close(token_weights("grpo", LENGTHS, 10, keep), expected)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("lengths", [torch.tensor([2, 3]), torch.tensor([0, 0]), torch.tensor([], dtype=torch.long)])
def test_everything_masked_is_loss_0_with_gradient_0(loss_type, lengths):
    """CHECKLIST 19: no 0/0, whether tokens are masked, responses empty or episodes none."""
    logp, old_logp, advantages = policy_inputs(lengths=lengths)
    keep = torch.zeros_like(logp, dtype=torch.bool)
    weights = token_weights(loss_type, lengths, 10, keep)
    loss = weighted_sum(policy_loss(logp, old_logp, advantages, lengths, loss_type=loss_type, keep=keep).loss, weights)
    loss.backward()
    assert loss == 0
    assert torch.equal(logp.grad, torch.zeros_like(logp))


# -------------------------------------------------------------------------------------------------------- policy losses


def slow_term(loss_type, logp, log_ratio, advantage, sequence_log_ratio, low, high, delta):
    """One token's loss in plain floats."""
    r = math.exp(sequence_log_ratio if loss_type == "gspo" else log_ratio)
    if loss_type == "cispo":
        return -min(r, 5.0) * advantage * logp
    if loss_type == "sapo":
        tau = 1.0 if advantage > 0 else 1.05
        return -4 / tau / (1 + math.exp(-tau * (r - 1))) * advantage
    bounded = r if delta is None else min(r, delta)
    return -min(bounded * advantage, min(max(r, 1 - low), 1 + high) * advantage)


@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_loss_equals_the_formula_token_by_token(loss_type, delta):
    logp, old_logp, advantages = policy_inputs(spread=1.0)
    terms = policy_loss(
        logp, old_logp, advantages, LENGTHS, loss_type=loss_type, epsilon_low=0.1, epsilon_high=0.3, delta=delta
    )
    i = 0
    for e, length in enumerate(LENGTHS.tolist()):
        log_ratios = (logp - old_logp)[i : i + length].tolist()
        for log_ratio in log_ratios:
            mean, advantage = sum(log_ratios) / length, advantages[e].item()
            expected = slow_term(loss_type, logp[i].item(), log_ratio, advantage, mean, 0.1, 0.3, delta)
            ratio = math.exp(mean if loss_type == "gspo" else log_ratio)
            assert terms.loss[i].item() == pytest.approx(expected, abs=1e-12)
            assert terms.ratio[i].item() == pytest.approx(ratio, abs=1e-12)
            if loss_type not in ("cispo", "sapo"):
                assert terms.clipped_low[i].item() == (ratio < 0.9 and advantage < 0)
                assert terms.clipped_high[i].item() == (ratio > 1.3 and advantage > 0)
            i += 1


@pytest.mark.parametrize(
    ("advantage", "ratio", "delta", "loss", "gradient"),
    [
        (1.0, 1.5, None, -1.2, 0.0),  # past the upper clip: nothing more to gain
        (1.0, 0.5, None, -0.5, -0.5),  # the clip never stops a repair
        (-1.0, 0.5, None, 0.8, 0.0),  # past the lower clip
        (-1.0, 3.0, None, 3.0, 3.0),  # the clip leaves this side open ...
        (-1.0, 3.0, 2.0, 2.0, 0.0),  # ... and dual clip closes it
        (1.0, 3.0, 2.0, -1.2, 0.0),
    ],
)
def test_clip_by_hand(advantage, ratio, delta, loss, gradient):
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    terms = policy_loss(logp, torch.zeros(1), torch.tensor([advantage]), torch.tensor([1]), delta=delta)
    terms.loss.sum().backward()
    assert terms.loss.item() == pytest.approx(loss, abs=1e-6)
    assert logp.grad.item() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_tokens_that_are_not_kept_have_no_term_and_no_clip(loss_type):
    """CHECKLIST 18, 23: not even where the ratio is the whole answer's, and far outside the clip range."""
    logp, lengths = torch.tensor([2.0, 2.0, -2.0, -2.0]), torch.tensor([2, 2])
    keep = torch.tensor([True, False, False, True])
    terms = policy_loss(logp, torch.zeros(4), torch.tensor([1.0, -1.0]), lengths, loss_type=loss_type, keep=keep)
    assert terms.loss[keep].all()
    assert not torch.stack([terms.loss, terms.clipped_low, terms.clipped_high])[:, ~keep].any()
    if loss_type not in ("cispo", "sapo"):
        assert terms.clipped_high.tolist() == [True, False, False, False]
        assert terms.clipped_low.tolist() == [False, False, False, True]


def test_cispo_keeps_the_gradient_of_a_clipped_token():
    logp = torch.tensor([math.log(9.0) - 3], requires_grad=True)
    terms = policy_loss(logp, torch.full((1,), -3.0), torch.tensor([2.0]), torch.tensor([1]), loss_type="cispo")
    terms.loss.sum().backward()
    assert terms.clipped_high.item()
    assert logp.grad.item() == pytest.approx(-5.0 * 2.0)


def trl_loss_and_gradient(loss_type, logp, old_logp, advantages, lengths, keep, max_new_tokens, **options):
    """GRPOTrainer._compute_loss of TRL 1.16 on these numbers, laid out as its padded batch. No model and no trainer."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    E, T = len(lengths), int(lengths.max())
    real = torch.arange(T) < lengths[:, None]
    logp = logp.detach().clone().requires_grad_()

    def padded(flat, fill=0.0):
        return torch.full((E, T), fill, dtype=flat.dtype).masked_scatter(real, flat)

    mask = padded(keep.to(logp.dtype))
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (padded(logp), torch.ones(E, T, dtype=logp.dtype), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if loss_type == "gspo" else "token",
        loss_type="grpo" if loss_type == "gspo" else loss_type,
        epsilon_low=options.get("epsilon_low", 0.2),
        epsilon_high=5.0 if loss_type == "cispo" else options.get("epsilon_high", 0.2),
        beta=options.get("beta", 0.0),
        args=SimpleNamespace(
            delta=options.get("delta"),
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            use_bias_correction_kl=options.get("unbiased", False),
        ),
        use_vllm=False,
        model=SimpleNamespace(training=False),  # evaluation: this batch is the whole step
        max_completion_length=max_new_tokens,
        accelerator=accelerator,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "prompt_ids": torch.zeros(E, 1, dtype=torch.long),
        "prompt_mask": torch.ones(E, 1),
        "completion_ids": torch.zeros(E, T, dtype=torch.long),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": padded(old_logp),
        "ref_per_token_logps": padded(options.get("ref_logp", old_logp)),
        "num_items_in_batch": mask.sum(),
    }
    loss = grpo_trainer.GRPOTrainer._compute_loss(stub, None, inputs)
    loss.backward()
    metrics = {name: values[0] for name, values in stub._metrics["eval"].items()}
    return loss.detach(), logp.grad, metrics


@pytest.mark.parametrize("delta", [None, 1.4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_loss_equals_trl(loss_type, masked, delta):
    """Values, gradients and clip metrics, with ragged and empty responses, masked tokens, clip-higher and dual clip."""
    logp, old_logp, advantages = policy_inputs(seed=3)
    keep = torch.tensor([1, 0, 1, 1, 1, 1, 0, 1]).bool() if masked else torch.ones(M, dtype=torch.bool)
    options = {"epsilon_low": 0.15, "epsilon_high": 0.28, "delta": delta}
    expected, gradient, metrics = trl_loss_and_gradient(
        loss_type, logp, old_logp, advantages, LENGTHS, keep, 10, **options
    )
    terms = policy_loss(logp, old_logp, advantages, LENGTHS, loss_type=loss_type, keep=keep, **options)
    loss = weighted_sum(terms.loss, token_weights(loss_type, LENGTHS, 10, keep).double())
    loss.backward()
    tolerance = {"rtol": 0, "atol": 1e-7}  # the weights are fp32
    torch.testing.assert_close(loss.detach(), expected, **tolerance)
    torch.testing.assert_close(logp.grad, gradient, **tolerance)
    if loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        assert metrics["clip_ratio/low_mean"] == pytest.approx(terms.clipped_low[keep].double().mean().item())
        assert metrics["clip_ratio/high_mean"] == pytest.approx(terms.clipped_high[keep].double().mean().item())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient_does_not_depend_on_micro_batches_or_order(loss_type):
    """CHECKLIST 17: weights are made once a step. Any cut between episodes, any order: the same gradient."""
    lengths = torch.tensor([3, 1, 5, 2])
    logp, old_logp, advantages = policy_inputs(lengths=lengths)
    segments = torch.arange(int(lengths.sum())).split(lengths.tolist())
    weights = token_weights(loss_type, lengths, 8)

    def gradient(micro_batches):
        logp.grad = None
        for episodes in micro_batches:
            tokens = torch.cat([segments[e] for e in episodes])
            terms = policy_loss(
                logp[tokens], old_logp[tokens], advantages[episodes], lengths[episodes], loss_type=loss_type
            )
            weighted_sum(terms.loss, weights[tokens]).backward()
        return logp.grad

    whole = gradient([[0, 1, 2, 3]])
    assert whole.abs().max() > 1e-3
    for cut in ([[0], [1, 2], [3]], [[2, 0, 3, 1]], [[3], [2], [1], [0]]):
        torch.testing.assert_close(gradient(cut), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "gspo"])
def test_first_update_has_loss_0_and_a_gradient(loss_type):
    """CHECKLIST 20: at equal policies the loss of balanced advantages is 0 and its gradient is -weight * advantage."""
    lengths, advantages = torch.tensor([3, 3]), torch.tensor([1.0, -1.0])
    logp = randn(6).requires_grad_()
    weights = token_weights(loss_type, lengths, 5)
    terms = policy_loss(logp, logp.detach(), advantages, lengths, loss_type=loss_type)
    loss = weighted_sum(terms.loss, weights)
    loss.backward()
    assert loss.abs() < 1e-7
    torch.testing.assert_close(logp.grad, -weights * advantages.repeat_interleave(3))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("log_ratio", [-100.0, 100.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_runaway_ratios_stay_finite(loss_type, log_ratio, advantage):
    """CHECKLIST 22: exp(100) is infinite in fp32. Neither the loss nor its gradient is."""
    logp = torch.tensor([-120.0], requires_grad=True)
    terms = policy_loss(
        logp, logp.detach() - log_ratio, torch.tensor([advantage]), torch.tensor([1]), loss_type=loss_type
    )
    terms.loss.sum().backward()
    assert torch.isfinite(terms.loss).all()
    assert torch.isfinite(logp.grad).all()


def test_safe_exp_is_exp_and_then_its_tangent():
    x = torch.tensor([-100.0, 0.0, 20.0, 22.0], dtype=torch.float64, requires_grad=True)
    y = safe_exp(x)
    y.sum().backward()
    e20 = math.exp(20)
    torch.testing.assert_close(y.detach(), torch.tensor([math.exp(-100), 1, e20, 3 * e20], dtype=torch.float64))
    torch.testing.assert_close(x.grad, torch.tensor([math.exp(-100), 1, e20, e20], dtype=torch.float64))


def test_policy_loss_refuses_wrong_shapes():
    """CHECKLIST 21: [B] against [B, T] never broadcasts to [B, B]."""
    logp, old_logp, advantages = policy_inputs()
    for bad in (
        (logp, old_logp[:, None], advantages, LENGTHS),
        (logp, old_logp, advantages[:, None], LENGTHS),
        (logp, old_logp, torch.zeros(M, dtype=torch.float64), LENGTHS),
        (logp, old_logp[:1], advantages, LENGTHS),
        (logp, old_logp, advantages, LENGTHS + 1),
        (logp[None], old_logp[None], advantages, LENGTHS),
    ):
        with pytest.raises(ValueError, match="expected"):
            policy_loss(*bad)
    with pytest.raises(ValueError, match="weights has shape"):
        weighted_sum(torch.zeros(3), torch.zeros(3, 1))


def test_policy_loss_refuses_what_it_does_not_know():
    logp, old_logp, advantages = policy_inputs()
    with pytest.raises(ValueError, match="loss_type is 'ppo', expected one of grpo"):
        policy_loss(logp, old_logp, advantages, LENGTHS, loss_type="ppo")
    with pytest.raises(ValueError, match="loss_type is 'ppo'"):
        token_weights("ppo", LENGTHS, 10)
    with pytest.raises(ValueError, match=r"delta is 1\.1"):
        policy_loss(logp, old_logp, advantages, LENGTHS, delta=1.1)
    with pytest.raises(TypeError, match="epsilon_hihg"):
        policy_loss(logp, old_logp, advantages, LENGTHS, epsilon_hihg=0.28)


# ----------------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [math.log(2), -math.log(4)]),
        ("k2", [math.log(2) ** 2 / 2, math.log(4) ** 2 / 2]),
        ("k3", [0.5 + math.log(2) - 1, 4 - math.log(4) - 1]),
        ("kl", [0.0, math.log(4) - 0.1]),
        ("approx_kl", [0.5 + math.log(2) - 1, 4 - math.log(4) - 1]),
    ],
)
def test_kl_by_hand(estimator, expected):
    """Policy 0.5 and 0.125 against a reference of 0.25 and 0.5."""
    logp, ref_logp = torch.tensor([0.5, 0.125]).log(), torch.tensor([0.25, 0.5]).log()
    torch.testing.assert_close(kl_penalty(logp, ref_logp, estimator, kl_target=0.1), torch.tensor(expected))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_kl_value_and_gradient_are_of_the_stated_direction(estimator, unbiased):
    """CHECKLIST 22: the table of kl_penalty, by exact expectation over a vocabulary of 5.

    Samples come from the policy itself, or (unbiased) from an old policy, corrected by the ratio.
    """
    logits, ref_logits = randn(5, dtype=torch.float64).requires_grad_(), randn(5, seed=1, dtype=torch.float64)
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    old_logp = randn(5, seed=2, dtype=torch.float64).log_softmax(-1) if unbiased else logp.detach()
    term = kl_penalty(logp, ref_logp, estimator, old_logp=old_logp if unbiased else None)
    expectation = (old_logp.exp() * term).sum()
    reverse = (logp.exp() * (logp - ref_logp)).sum()  # KL(policy || reference)
    forward = (ref_logp.exp() * (ref_logp - logp)).sum()
    (gradient,) = torch.autograd.grad(expectation, logits, retain_graph=True)
    (reverse_gradient,) = torch.autograd.grad(reverse, logits, retain_graph=True)
    (forward_gradient,) = torch.autograd.grad(forward, logits)
    assert (expectation - reverse).abs().item() < 1e-12 or estimator == "k2"
    if not unbiased:
        stated = {"k1": torch.zeros_like(gradient), "k2": reverse_gradient, "k3": forward_gradient}[estimator]
        torch.testing.assert_close(gradient, stated, rtol=0, atol=1e-12)
    elif estimator in ("k1", "k3"):
        torch.testing.assert_close(gradient, reverse_gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", list(KL_ESTIMATORS))
@pytest.mark.parametrize("difference", [-100.0, 100.0])
@pytest.mark.parametrize("with_ratio", [False, True])
def test_kl_stays_finite_at_huge_log_ratios(estimator, difference, with_ratio):
    """CHECKLIST 22: exp(100) is infinite in fp32. Value and gradient are finite, and the gradient is not lost."""
    logp = torch.tensor([-150.0], requires_grad=True)
    old_logp = torch.tensor([-149.0]) if with_ratio else None
    term = kl_penalty(logp, torch.tensor([-150.0 + difference]), estimator, old_logp=old_logp)
    term.sum().backward()
    assert torch.isfinite(term).all()
    assert torch.isfinite(logp.grad).all()
    assert logp.grad.item() != 0 or (estimator == "kl" and difference < 0)


@pytest.mark.parametrize("estimator", list(KL_ESTIMATORS))
def test_kl_of_equal_policies_is_0(estimator):
    """CHECKLIST 22."""
    logp = randn(4)
    assert not kl_penalty(logp, logp, estimator).any()


@pytest.mark.parametrize("estimator", list(KL_ESTIMATORS))
def test_kl_ignores_tokens_that_are_not_kept(estimator):
    """CHECKLIST 18: NaN on either side, and no gradient reaches the reference."""
    logp = torch.tensor([-1.0, math.nan, -3.0, 1e9], requires_grad=True)
    ref_logp = torch.tensor([-2.0, math.nan, math.nan, -1e9], requires_grad=True)
    keep = torch.tensor([True, False, False, False])
    term = kl_penalty(logp, ref_logp, estimator, keep=keep, old_logp=torch.tensor([-1.5, math.nan, 1.0, 1.0]))
    term.sum().backward()
    assert torch.isfinite(term).all()
    assert not term[1:].any()
    assert not logp.grad[1:].any()
    assert torch.isfinite(logp.grad).all()
    assert ref_logp.grad is None


@pytest.mark.parametrize("unbiased", [False, True])
def test_loss_with_k3_equals_trl(unbiased):
    """Policy and KL term together, values and gradients, without and with TRL's use_bias_correction_kl."""
    logp, old_logp, advantages = policy_inputs(seed=3)
    ref_logp = logp.detach() + randn(M, seed=9, dtype=torch.float64, scale=0.5)
    keep = torch.tensor([1, 0, 1, 1, 1, 1, 0, 1]).bool()
    options = {"beta": 0.3, "ref_logp": ref_logp, "unbiased": unbiased}
    expected, gradient, metrics = trl_loss_and_gradient(
        "dapo", logp, old_logp, advantages, LENGTHS, keep, 10, **options
    )
    weights = token_weights("dapo", LENGTHS, 10, keep).double()
    kl = kl_penalty(logp, ref_logp, "k3", old_logp=old_logp if unbiased else None, keep=keep)
    policy = policy_loss(logp, old_logp, advantages, LENGTHS, keep=keep).loss
    loss = weighted_sum(policy + 0.3 * kl, weights)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(logp.grad, gradient, rtol=0, atol=1e-7)
    assert metrics["kl"] == pytest.approx(kl[keep].mean().item())


def test_kl_refuses_what_it_does_not_know():
    """CHECKLIST 21 for the shapes."""
    with pytest.raises(ValueError, match="kl estimator is 'k4', expected one of k1, k2, k3"):
        kl_penalty(torch.zeros(2), torch.zeros(2), "k4")
    with pytest.raises(ValueError, match="ref_logp has shape"):
        kl_penalty(torch.zeros(2), torch.zeros(2, 1))


# -------------------------------------------------------------------------------------------------------------- entropy


def test_entropy_bonus_raises_the_entropy():
    """CHECKLIST 23: a step down its gradient makes the distribution flatter. Tokens of weight 0 count nothing."""
    logits = randn(3, 6).requires_grad_()
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    weights = torch.tensor([0.5, 0.5, 0.0])
    bonus = entropy_bonus(torch.where(weights != 0, entropy, math.nan), weights, 0.1)
    bonus.backward()
    assert bonus.item() == pytest.approx(-0.1 * entropy[:2].mean().item())
    after = (logits - logits.grad).log_softmax(-1)
    assert (-(after.exp() * after).sum(-1) > entropy)[:2].all()
    assert not logits.grad[2].any()


def test_adaptive_entropy_coefficient():
    """Up at or below the target, down and not applied above it, within its bounds."""
    assert adapt_entropy_coef(0.01, 0.5, target=0.5, step=0.005) == (pytest.approx(0.015), pytest.approx(0.015))
    assert adapt_entropy_coef(0.01, 0.6, target=0.5, step=0.005) == (pytest.approx(0.005), 0.0)
    assert adapt_entropy_coef(0.001, 0.6, target=0.5, step=0.005) == (0.0, 0.0)
    assert adapt_entropy_coef(0.998, 0.1, target=0.5, step=0.005) == (1.0, 1.0)


def test_top_entropy_mask_keeps_the_share_asked_for():
    """CHECKLIST 18: tokens not kept neither count nor pass, at any entropy."""
    entropy = torch.tensor([0.1, math.nan, 0.9, 0.4, 0.3, 0.8, 1e9, 0.7])
    keep = torch.tensor([1, 0, 1, 1, 1, 1, 0, 1]).bool()
    expected = {0.0: [2], 0.2: [2, 5], 0.4: [2, 5, 7], 1.0: [0, 2, 3, 4, 5, 7]}
    for share, tokens in expected.items():
        assert top_entropy_mask(entropy, share, keep).nonzero().squeeze(1).tolist() == tokens
    assert not top_entropy_mask(entropy, 0.2, torch.zeros(8, dtype=torch.bool)).any()
    with pytest.raises(ValueError, match="share of tokens is 20"):
        top_entropy_mask(entropy, 20)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.35, 0.8, 1.0])
def test_top_entropy_mask_equals_trl(share):
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    accelerator = SimpleNamespace(pad_across_processes=lambda x, **_: x, gather=lambda x: x)
    entropy, keep = randn(4, 9).abs(), torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) < 0.7
    get_mask = grpo_trainer.GRPOTrainer.get_high_entropy_mask
    expected = get_mask(SimpleNamespace(accelerator=accelerator), entropy, keep, 1 - share)
    assert torch.equal(top_entropy_mask(entropy.flatten(), share, keep.flatten()), expected.flatten())


# ------------------------------------------------------------------------------------------------------ off-policy care


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("truncate_token", [2.0, 0.5, 1.0, 2.0, 0.25]),  # 0.125 is below the floor, 4 above the cap
        ("mask_token", [0.0, 0.5, 1.0, 2.0, 0.0]),
        ("truncate_sequence", [2.0, 2.0, 2.0, 0.25, 0.25]),  # 4 x 0.5 x 1 and 2 x 0.125
        ("mask_sequence", [2.0, 2.0, 2.0, 0.25, 0.25]),
    ],
)
def test_importance_weights_by_hand(mode, expected):
    """Ratios 4, 0.5, NaN (no log-probability: 1) and 2, 0.125. Cap 2, floor 0.25. Detached."""
    rollout_logp = torch.full((5,), -8.0)
    ratio = torch.tensor([4.0, 0.5, math.nan, 2.0, 0.125])
    old_logp = (rollout_logp + ratio.log()).requires_grad_()
    weights = importance_weights(old_logp, rollout_logp, torch.tensor([3, 2]), mode, cap=2.0001, floor=0.2499)
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-3, atol=0)
    assert not weights.requires_grad


def test_importance_mask_drops_the_whole_answer():
    old_logp = torch.tensor([1.0, 0.5, 0.1])  # ratios e^1.5 = 4.5 and e^0.1
    weights = importance_weights(old_logp, torch.zeros(3), torch.tensor([2, 1]), "mask_sequence", cap=3.0)
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.0, math.exp(0.1)]))


def test_importance_weights_ignore_tokens_that_are_not_kept():
    """CHECKLIST 18."""
    keep = torch.tensor([True, False, True])
    weights = importance_weights(
        torch.tensor([0.5, 1e9, 0.0]), torch.zeros(3), torch.tensor([2, 1]), "truncate_sequence", keep=keep
    )
    torch.testing.assert_close(weights, torch.tensor([math.exp(0.5), math.exp(0.5), 1.0]))


def test_importance_weights_refuse_an_unknown_mode():
    with pytest.raises(ValueError, match="importance mode is 'mask_batch', expected one of truncate_token"):
        importance_weights(torch.zeros(1), torch.zeros(1), torch.tensor([1]), "mask_batch")


# ---------------------------------------------------------------------------------------------------- optimal transport


def slow_transport(new, old, window, regularisation, iterations, a, b, keep):
    """Textbook Sinkhorn (scaling vectors, no logs) on the whole [T, T] matrix of the kept tokens."""
    position = keep.nonzero().squeeze(1)
    new, old = new[position], old[position]
    cost = 1 - (new / new.norm(dim=-1, keepdim=True)) @ (old / old.norm(dim=-1, keepdim=True)).T
    allowed = (position[:, None] - position).abs() <= window
    kernel = torch.where(allowed, (-cost / regularisation).exp(), 0.0)
    a, b, v = a[position], b[position], torch.ones(len(position), dtype=new.dtype)
    for _ in range(iterations):
        u = a / (kernel @ v)
        v = b / (kernel.T @ u)
    return ((u[:, None] * kernel * v) * cost).sum() / len(position), cost, allowed, a, b


def transport_inputs(T=9, D=4):
    new, old = randn(T, D, dtype=torch.float64).requires_grad_(), randn(T, D, seed=1, dtype=torch.float64)
    a, b = randn(T, seed=2, dtype=torch.float64).exp(), randn(T, seed=3, dtype=torch.float64).exp()
    return new, old, a, b * a.sum() / b.sum()


@pytest.mark.parametrize("window", [0, 2, 100])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_transport_cost_equals_plain_sinkhorn(window, unit, masked):
    """Values and gradients of the banded log-domain iterations, after a few of them, with gaps between kept tokens."""
    new, old, a, b = transport_inputs()
    keep = torch.tensor([1, 1, 0, 0, 1, 1, 1, 0, 1]).bool() if masked else torch.ones(9, dtype=torch.bool)
    marginals = None if unit else (a, b)
    a, b = (torch.ones_like(a), torch.ones_like(b)) if unit else (a, b)
    ours = transport_cost(new, old, window, 0.3, 4, marginals, keep)
    slow = slow_transport(new, old, window, 0.3, 4, a, b, keep)[0]
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(x, new)[0] for x in (ours, slow)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [3, 100])
def test_transport_cost_equals_pot(window):
    """Converged, it is the plan of a generic solver (POT). A forbidden pair is a very dear one there."""
    ot = pytest.importorskip("ot")
    new, old, _, _ = transport_inputs()
    keep = torch.ones(9, dtype=torch.bool)
    ones = torch.ones(9, dtype=torch.float64)
    _, cost, allowed, a, b = slow_transport(new.detach(), old, window, 0.1, 1, ones, ones, keep)
    dear = torch.where(allowed, cost, 1e3)
    plan = ot.sinkhorn(a.numpy(), b.numpy(), dear.numpy(), 0.1, "sinkhorn_log", numItermax=20_000, stopThr=1e-12)
    ours = transport_cost(new, old, window, regularisation=0.1, iterations=2_000)
    assert ours.item() == pytest.approx((torch.from_numpy(plan) * cost).sum().item() / 9, abs=1e-8)


def test_transport_cost_with_junk_where_not_kept():
    """CHECKLIST 18: NaN hidden states, in both policies, and no gradient for the rollout side."""
    new, old, _, _ = transport_inputs()
    keep = torch.tensor([1, 1, 0, 0, 1, 1, 1, 0, 1]).bool()
    old.requires_grad_()
    junk = torch.where(keep[:, None], 0.0, math.nan)
    cost = transport_cost(new + junk, old + junk, 2, keep=keep)
    cost.backward()
    assert torch.equal(cost, transport_cost(new, old, 2, keep=keep))
    assert torch.isfinite(new.grad).all()
    assert old.grad is None
    assert transport_cost(new, old, 2, keep=torch.zeros(9, dtype=torch.bool)) == 0


def test_transport_cost_is_fp32_and_near_0_at_equal_policies():
    hidden = randn(20, 64).bfloat16()
    cost = transport_cost(hidden, hidden, 4)
    assert cost.dtype == torch.float32
    assert 0 <= cost.item() < 0.02
    assert transport_cost(hidden, hidden, 0).abs().item() < 1e-6
    assert transport_cost(-hidden, hidden, 0).item() == pytest.approx(2.0, abs=1e-6)


def test_transport_penalty_is_a_hinge_per_answer():
    """Answers do not see each other. Below the target there is neither cost nor gradient. An empty answer costs 0."""
    new, old, _, _ = transport_inputs()
    lengths = torch.tensor([4, 0, 5])
    costs = torch.stack([transport_cost(new[:4], old[:4], 2), new.new_zeros(()), transport_cost(new[4:], old[4:], 2)])
    target = costs[2].item() / 2 + costs[0].item() / 2
    penalty = transport_penalty(new, old, lengths, ot_target=target, window=2)
    torch.testing.assert_close(penalty, (costs - target).clamp(min=0))
    penalty.sum().backward()
    quiet, loud = (new.grad[:4], new.grad[4:]) if costs[0] < costs[2] else (new.grad[4:], new.grad[:4])
    assert not quiet.any()
    assert loud.any()


@pytest.mark.parametrize(
    "options",
    [{"window": -1}, {"regularisation": 0.0}, {"iterations": 0}, {"marginals": (torch.ones(9), torch.zeros(9))}],
)
def test_transport_cost_refuses_numbers_out_of_range(options):
    new, old, _, _ = transport_inputs()
    with pytest.raises(ValueError, match="expected >= 0, > 0, >= 1, and positive marginals"):
        transport_cost(new, old, **{"window": 2, **options})


def test_transport_cost_refuses_wrong_shapes():
    new, old, _, _ = transport_inputs()
    with pytest.raises(ValueError, match=r"expected \[T, D\] twice"):
        transport_cost(new, old[:-1], 2)
