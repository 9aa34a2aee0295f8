"""The off-policy sequence mask: by hand, against TRL, and in a whole update."""

from __future__ import annotations

import math

import pytest
import torch
from test_objectives import ADVANTAGES, ANSWERS, flat, logprobs_of, make_episodes, models, update  # noqa: F401

from run.config import parse_args
from update.off_policy import sequence_mask

LENGTHS = torch.tensor([3, 1, 0, 2])


def test_only_unlikely_responses_of_negative_advantage_are_left_out():
    """CHECKLIST 66: the mean over the response decides, and a mean at the threshold stays."""
    old = torch.zeros(6)
    logp = torch.tensor([-0.5, -1.5, -1.0, -9.0, -1.0, -1.5])  # means of the drift: 1, 9 and 1.25
    for advantages, threshold, expected in (
        ([-1.0, 1.0, -1.0, -1.0], 1.0, [1, 1, 1, 1, 0, 0]),
        ([-1.0, 0.0, -1.0, 1.0], 0.5, [0, 0, 0, 1, 1, 1]),
        ([-1.0, -1.0, -1.0, -1.0], 20.0, [1] * 6),
    ):
        mask = sequence_mask(logp, old, torch.tensor(advantages), LENGTHS, threshold)
        assert mask.tolist() == expected
    likelier = sequence_mask(-logp, old, -torch.ones(4), LENGTHS, 0.0)
    assert likelier.tolist() == [1] * 6


def test_tokens_that_do_not_count_and_unknown_ones_are_no_evidence():
    logp = torch.tensor([-9.0, 0.0, 0.0, -9.0, 0.0, 0.0])
    keep = torch.tensor([0, 1, 1, 0, 1, 1]).bool()
    assert sequence_mask(logp, torch.zeros(6), -torch.ones(4), LENGTHS, 0.1, keep).tolist() == [1] * 6
    old = torch.tensor([math.nan, 0, 0, math.nan, 0, 0])
    assert sequence_mask(logp, old, -torch.ones(4), LENGTHS, 0.1).tolist() == [1] * 6


def test_the_mask_equals_trl():
    """`GRPOTrainer.get_off_policy_mask` of TRL 1.16 on the padded batch."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 2, 7, 1, 4, 3])
    real = torch.arange(7) < lengths[:, None]
    for _ in range(20):
        logp, old = torch.randn(2, 22, generator=generator)
        advantages = torch.randn(6, generator=generator)
        keep = torch.rand(22, generator=generator) < 0.8
        padded = [torch.zeros(6, 7).masked_scatter(real, x) for x in (logp, old, keep.float())]
        wanted = trainer.get_off_policy_mask(advantages[:, None], *padded, off_policy_threshold=0.3)
        found = sequence_mask(logp, old, advantages, lengths, 0.3, keep)
        assert found.tolist() == wanted[:, 0].repeat_interleave(lengths).tolist()


def test_an_update_leaves_the_responses_out_and_keeps_the_denominator(models):  # noqa: F811
    policy, sampler, _ = models
    episodes = make_episodes(sampler)
    lengths = torch.tensor([len(answer) for answer in ANSWERS])
    old, new = flat(logprobs_of, sampler), flat(logprobs_of, policy)
    drift = torch.stack([part.mean() for part in (old - new).split(lengths.tolist())])
    advantage = torch.tensor(ADVANTAGES)
    threshold = (drift[1] + drift[3]).item() / 2  # between the two responses of negative advantage
    left_out = (advantage < 0) & (drift > threshold)
    assert left_out.sum() == 1
    ratio, A = (new - old).exp(), advantage.repeat_interleave(lengths)
    kept = (~left_out).repeat_interleave(lengths)
    wanted = -(torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A) * kept).sum() / lengths.sum()
    metrics = update(policy, episodes, off_policy_threshold=threshold, micro_batch_tokens=12)
    assert metrics["loss"] == pytest.approx(wanted.item(), abs=1e-5)
    assert metrics["update/off_policy_masked"] == pytest.approx(1 - kept.float().mean().item())
    assert "update/off_policy_masked" not in update(policy, episodes, micro_batch_tokens=12)


def test_the_option_has_a_range():
    assert parse_args(["--off-policy-threshold", "0.1"]).off_policy_threshold == 0.1
    with pytest.raises(ValueError, match=r"--off-policy-threshold -0\.1: expected 0 or more"):
        parse_args(["--off-policy-threshold", "-0.1"])
