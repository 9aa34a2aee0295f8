"""Responses that the policy has moved away from: the off-policy sequence mask of DeepSeek-V3.2.

    terms.loss * sequence_mask(logp, old_logp, advantages, lengths, threshold=0.1)

Shape letters: M loss tokens, E episodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from update.losses import check_flat, episode_of_token, segment_sum


def sequence_mask(
    logp: Tensor, sampler_logp: Tensor, advantages: Tensor, lengths: Tensor, threshold: float,
    keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """0 [M] for the tokens of responses of negative advantage that became too unlikely, else 1. Without a gradient.

    A response is left out if its mean of sampler_logp - logp over its kept tokens is above `threshold`
    (DeepSeek-V3.2, arXiv 2512.02556, eq. 9; TRL's off_policy_mask_threshold). A policy learns from its own mistakes,
    and such a response would no longer be one of them. Responses of advantage 0 or more stay. Denominators stay, too.
    A token without the sampler's log-probability (NaN) counts as a difference of 0.
    """
    M, E = logp.numel(), lengths.numel()
    check_flat(M, logp=logp, sampler_logp=sampler_logp, keep=keep)
    drift = (sampler_logp - logp.detach()).nan_to_num(nan=0.0)
    keep = torch.ones_like(drift, dtype=torch.bool) if keep is None else keep
    episode = episode_of_token(lengths, M, logp.device)
    total = segment_sum(torch.where(keep, drift, 0.0), episode, E)
    mean_drift = total / segment_sum(keep.to(drift), episode, E).clamp(min=1)
    left_out = (advantages.to(drift) < 0) & (mean_drift > threshold)
    return (~left_out).to(drift)[episode]
