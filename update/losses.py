"""The losses of GRPO and its variants as pure functions on flat tensors: no model, no optimizer, no padding.

The response tokens of all episodes of a micro-batch lie end to end, [M]. `lengths` [E] gives the number of tokens of
each episode. There is no padding and no padding mask. If a token must not count, its `keep` [M] is False and its weight
is 0. Its numbers (even NaN or 1e9) then change neither value nor gradient.

Two departures from the textbook:

- A loss here is a *term per token*. Denominators belong to the optimizer step: `token_weights` gives every token of
  the step its weight once, and each micro-batch adds up `weight * term`. The gradient then does not depend on the size
  of the micro-batches. With a mean per micro-batch it would.
- The whole logits are never stored: `token_logprobs` applies the LM head to chunks of the vocabulary (chunked LM head).
  head_logprobs.py has that function and its reference implementation.

    logp, entropy = token_logprobs(hidden, model.lm_head.weight, targets, temperature)
    weights = token_weights("dapo", lengths, max_new_tokens)                       # once a step
    terms = policy_loss(logp, old_logp, advantages, lengths, loss_type="dapo")
    loss = weighted_sum(terms.loss + beta * kl_penalty(logp, ref_logp, "k3"), weights)

Shape letters: M loss tokens, E episodes, D hidden, V vocabulary, T tokens of a response. All in fp32 (fp64 stays fp64).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # `safe_exp` is linear above this: e^20 = 5e8, and e^89 would overflow fp32


# ------------------------------------------------------------------------------------------------ weights of the tokens


def token_weights(loss_type: str, lengths: Tensor, max_new_tokens: int, keep: Tensor | None = None) -> Tensor:
    """Weight [M] of every loss token of an optimizer step, fp32. The step's loss is sum(weight * term).

    `lengths` [E] are those of the whole step, not of a micro-batch. `keep` [M] is False for tokens that must not count.
    With n_i kept tokens in episode i and N in all (as in TRL 1.16):
      dapo, cispo        1 / N                       (DAPO, arXiv 2503.14476, eq. 8)
      bnpo               1 / N                       (TRL's mean over the local batch, if that is the whole step)
      grpo, gspo, sapo   1 / (E n_i)                 (DeepSeekMath, arXiv 2402.03300, eq. 3)
      dr_grpo            1 / (E max_new_tokens)      (Dr. GRPO, arXiv 2503.20783)
    E counts episodes without a kept token, too. If no token is kept, all weights are 0.
    Raises ValueError for an unknown loss.
    """
    _check_loss_type(loss_type)
    M, E = int(lengths.sum()), lengths.numel()
    keep = torch.ones(M, dtype=torch.bool, device=lengths.device) if keep is None else keep
    check_flat(M, keep=keep)
    counted = keep.float()
    if loss_type in ("dapo", "bnpo", "cispo"):
        return counted / counted.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return counted / max(1, E * max_new_tokens)
    episode = episode_of_token(lengths, M, keep.device)
    return counted / (E * segment_sum(counted, episode, E).clamp(min=1))[episode]


def weighted_sum(terms: Tensor, weights: Tensor) -> Tensor:
    """sum(weights * terms), a scalar, of two [M] tensors. A term of weight 0 adds 0, even if it is NaN."""
    check_flat(terms.numel(), terms=terms, weights=weights)
    return (torch.where(weights != 0, terms, 0.0) * weights).sum()


def episode_of_token(lengths: Tensor, M: int, device: torch.device) -> Tensor:
    """[3, 1] -> [0, 0, 0, 1], on `device`. Raises ValueError if the lengths do not add up to M."""
    if lengths.dim() != 1 or int(lengths.sum()) != M:
        raise ValueError(f"lengths are {lengths.tolist()}, expected [E] numbers that add up to the {M} tokens")
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths).to(device)


def segment_sum(x: Tensor, episode: Tensor, E: int) -> Tensor:
    """Sum of each episode's tokens, [M] -> [E]."""
    return x.new_zeros(E).index_add(0, episode, x)


def check_flat(M: int, **tensors: Tensor | None) -> None:
    """Raises ValueError for a tensor that does not have one number per loss token."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != (M,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected [{M}]: one number per loss token")


# -------------------------------------------------------------------------------------------------------- policy losses


class PolicyTerms(NamedTuple):
    """All [M]. `loss` has the gradient. For metrics: the detached ratio, and True for each token that is clipped."""

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


class PolicyInputs(NamedTuple):
    """Inputs of a policy loss: [M] tensors, 0 for a token that is not kept, and the options with their defaults."""

    logp: Tensor
    log_ratio: Tensor
    advantage: Tensor  # of the token's episode
    keep: Tensor
    episode: Tensor  # index of the token's episode, 0 to E - 1
    E: int
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2  # DAPO's clip-higher: 0.28. gspo needs both near 3e-4
    delta: float | None = None  # dual clip: an upper bound of the ratio, above 1 + epsilon_high
    cispo_epsilon_max: float = 5.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, lengths: Tensor, *,
    loss_type: str = "dapo", keep: Tensor | None = None, **options: Any,
) -> PolicyTerms:  # fmt: skip
    """The policy loss of every token, [M], before weights. See `token_weights` and `weighted_sum`.

    logp, old_logp [M]. advantages [E], one per episode: all its tokens get it. lengths [E]: whole episodes, end to end.
    keep [M]: None means all tokens. options: those of `PolicyInputs`.
    Raises ValueError for an unknown loss, wrong shapes and a `delta` inside the clip range, TypeError for an unknown
    option.
    """
    _check_loss_type(loss_type)
    M, E = logp.numel(), lengths.numel()
    check_flat(M, logp=logp, old_logp=old_logp, keep=keep)
    if advantages.shape != (E,):
        raise ValueError(f"advantages have shape {tuple(advantages.shape)}, expected [{E}]: one per episode")
    keep = torch.ones_like(logp, dtype=torch.bool) if keep is None else keep
    episode = episode_of_token(lengths, M, logp.device)
    logp, old_logp = torch.where(keep, logp, 0.0), torch.where(keep, old_logp, 0.0)
    x = PolicyInputs(logp, logp - old_logp, advantages.to(logp)[episode], keep, episode, E, **options)
    if x.delta is not None and x.delta <= 1 + x.epsilon_high:
        raise ValueError(f"delta is {x.delta}, expected more than 1 + epsilon_high = {1 + x.epsilon_high}, or None")
    loss, ratio, low, high = POLICY_LOSSES[loss_type](x)
    return PolicyTerms(torch.where(keep, loss, 0.0), ratio.detach(), low & keep, high & keep)


def clipped_surrogate(x: PolicyInputs) -> PolicyTerms:
    """-min(r A, clip(r, 1 - low, 1 + high) A): PPO (arXiv 1707.06347, eq. 7), clip-higher (DAPO, arXiv 2503.14476).

    `delta` is an upper bound of r itself. Without it, a token of negative advantage and very large r has a very large
    gradient. The bound is from dual-clip PPO (arXiv 1912.09729). INTELLECT-2 (arXiv 2505.07291) uses it in GRPO.
    """
    return _clip(safe_exp(x.log_ratio), x)


def sequence_surrogate(x: PolicyInputs) -> PolicyTerms:
    """The same with one ratio per episode, the geometric mean over its tokens: GSPO (arXiv 2507.18071, eqs. 5, 7)."""
    count = segment_sum(x.keep.to(x.logp), x.episode, x.E).clamp(min=1)
    return _clip(safe_exp(segment_sum(x.log_ratio, x.episode, x.E) / count)[x.episode], x)


def _clip(ratio: Tensor, x: PolicyInputs) -> PolicyTerms:
    clipped = ratio.clamp(1 - x.epsilon_low, 1 + x.epsilon_high)
    bounded = ratio if x.delta is None else ratio.clamp(max=x.delta)
    low = (ratio < 1 - x.epsilon_low) & (x.advantage < 0)
    high = (ratio > 1 + x.epsilon_high) & (x.advantage > 0)
    return PolicyTerms(-torch.min(bounded * x.advantage, clipped * x.advantage), ratio, low, high)


def cispo(x: PolicyInputs) -> PolicyTerms:
    """-sg(min(r, epsilon_max)) A log pi, sg: stop gradient. Only the weight is clipped. Every token has a gradient.

    MiniMax-M1 (arXiv 2506.13585, eq. 4) without the lower bound, as in TRL and ScaleRL (arXiv 2510.13786).
    """
    ratio = safe_exp(x.log_ratio)
    high = (ratio > x.cispo_epsilon_max) & (x.advantage > 0)
    weight = ratio.clamp(max=x.cispo_epsilon_max).detach()
    return PolicyTerms(-weight * x.advantage * x.logp, ratio, torch.zeros_like(high), high)


def sapo(x: PolicyInputs) -> PolicyTerms:
    """-sigmoid(tau (r - 1)) 4 / tau A: a smooth gate of slope 1 at r = 1 replaces the clip (SAPO, arXiv 2511.20347)."""
    ratio = safe_exp(x.log_ratio)
    tau = torch.full_like(ratio, x.sapo_temperature_neg).masked_fill(x.advantage > 0, x.sapo_temperature_pos)
    never = torch.zeros_like(x.keep)
    return PolicyTerms(-torch.sigmoid(tau * (ratio - 1)) * 4 / tau * x.advantage, ratio, never, never)


POLICY_LOSSES: dict[str, Callable[..., PolicyTerms]] = {
    "grpo": clipped_surrogate,  # grpo, bnpo, dr_grpo and dapo differ only in their token weights
    "bnpo": clipped_surrogate,
    "dr_grpo": clipped_surrogate,
    "dapo": clipped_surrogate,
    "gspo": sequence_surrogate,
    "cispo": cispo,
    "sapo": sapo,
}


def safe_exp(x: Tensor) -> Tensor:
    """exp(x) up to x = 20, and its tangent above. Value and gradient are always finite, and the gradient is never 0."""
    return x.clamp(max=LOG_RATIO_LIMIT).exp() * (1 + F.relu(x - LOG_RATIO_LIMIT))


def _check_loss_type(loss_type: str) -> None:
    if loss_type not in POLICY_LOSSES:
        raise ValueError(f"loss_type is {loss_type!r}, expected one of {', '.join(POLICY_LOSSES)}")


# ----------------------------------------------------------------------------------------------------------- divergence


def kl_penalty(
    logp: Tensor, ref_logp: Tensor, estimator: str = "k3", *,
    kl_target: float = 0.0, old_logp: Tensor | None = None, keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Divergence term [M] of each token, for samples of the policy. It is 0 at equal policies.

    k1, k2, k3 (Schulman 2020, joschu.net/blog/kl-approx.html) estimate KL(policy || reference). d = ref_logp - logp:

      k1         -d               unbiased, any sign    as a loss its expected gradient is 0: use it in the reward
      k2         d^2 / 2          biased, small spread  gradient of KL(policy || reference), exact on policy
      k3         exp(d) - d - 1   unbiased, >= 0        gradient of KL(reference || policy), the other direction
      kl         max(0, d - kl_target)                  biased; only tokens that became less likely count (GRPO-Mini)
      approx_kl  exp(d) - d - 1                         k3 under GRPO-Mini's name, against the rollout policy

    To compare with the rollout policy, pass its log-probabilities as `ref_logp`. With `old_logp` the term is multiplied
    by policy / old policy, which has a gradient. Then k3 has the gradient of KL(policy || reference), also off policy
    (DeepSeek-V3.2, arXiv 2512.02556; TRL's use_bias_correction_kl). No gradient reaches the reference.
    """
    check_flat(logp.numel(), logp=logp, ref_logp=ref_logp, old_logp=old_logp, keep=keep)
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl estimator is {estimator!r}, expected one of {', '.join(KL_ESTIMATORS)}")
    old = logp if old_logp is None else old_logp
    if keep is not None:  # zeros before the arithmetic: every estimator then has value 0 and gradient 0
        logp, ref_logp, old = (torch.where(keep, x, 0.0) for x in (logp, ref_logp, old))
    term = KL_ESTIMATORS[estimator](ref_logp.detach() - logp, kl_target)
    return term if old_logp is None else term * safe_exp(logp - old.detach())


KL_ESTIMATORS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "k1": lambda d, target: -d,
    "k2": lambda d, target: d.square() / 2,
    "k3": lambda d, target: safe_exp(d) - d - 1,
    "kl": lambda d, target: F.relu(d - target),
    "approx_kl": lambda d, target: safe_exp(d) - d - 1,
}


# -------------------------------------------------------------------------------------------------------------- entropy


def entropy_bonus(entropy: Tensor, weights: Tensor, coef: float) -> Tensor:
    """-coef * mean entropy, a scalar to add to the loss. `weights` [M]: `token_weights("dapo", ...)` for any loss."""
    return -coef * weighted_sum(entropy, weights)


def adapt_entropy_coef(
    coef: float, entropy: float, target: float, step: float = 0.005, low: float = 0.0, high: float = 1.0
) -> tuple[float, float]:
    """The new coefficient, and the coefficient that the next step applies: the same, or 0 above the target.

    `entropy`: mean of a step, in nats. The coefficient rises by `step` if the entropy is at or below the target, and
    falls by `step` if it is above (Skywork-OR1, arXiv 2505.22312).
    """
    too_low = entropy <= target
    coef = min(coef + step, high) if too_low else max(coef - step, low)
    return coef, coef if too_low else 0.0


def top_entropy_mask(entropy: Tensor, share: float, keep: Tensor | None = None) -> Tensor:
    """True [M] for the `share` (0 to 1) of kept tokens of highest entropy: "Beyond the 80/20 rule", arXiv 2506.01939.

    Multiply the policy weights by it. Denominators and KL do not change (TRL's top_entropy_quantile). The quantile is
    over the given tokens. Pass those of the whole step: otherwise the mask depends on the micro-batches.
    """
    keep = torch.ones_like(entropy, dtype=torch.bool) if keep is None else keep
    check_flat(entropy.numel(), entropy=entropy, keep=keep)
    if not 0 <= share <= 1:
        raise ValueError(f"share of tokens is {share}, expected 0 to 1")
    if not keep.any():
        return keep
    return keep & (entropy >= torch.quantile(entropy.detach()[keep], 1 - share))


# ------------------------------------------------------------------------------------------------------ off-policy care


def importance_weights(
    trainer_old_logp: Tensor, rollout_logp: Tensor, lengths: Tensor, mode: str = "mask_sequence",
    cap: float | None = 2.0, floor: float | None = None, keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Detached factor [M] of the policy terms. It corrects the difference of sampler and trainer at equal weights.

    r = trainer's / sampler's probability of the token (mode `*_token`) or of the whole response (`*_sequence`).
    `truncate_*` clamps r into [floor, cap]. `mask_*` replaces r by 0 outside this range. Both are as in TRL 1.16's
    vllm_importance_sampling_mode. A token without the sampler's log-probability (NaN) has log r = 0.
    """
    if mode not in IMPORTANCE_MODES:
        raise ValueError(f"importance mode is {mode!r}, expected one of {', '.join(IMPORTANCE_MODES)}")
    M, E = trainer_old_logp.numel(), lengths.numel()
    check_flat(M, trainer_old_logp=trainer_old_logp, rollout_logp=rollout_logp, keep=keep)
    log_ratio = (trainer_old_logp - rollout_logp).detach().nan_to_num(nan=0.0)
    log_ratio = log_ratio if keep is None else torch.where(keep, log_ratio, 0.0)
    if mode.endswith("sequence"):
        episode = episode_of_token(lengths, M, log_ratio.device)
        log_ratio = segment_sum(log_ratio, episode, E)[episode]
    ratio = safe_exp(log_ratio)
    low, high = -math.inf if floor is None else floor, math.inf if cap is None else cap
    if mode.startswith("truncate"):
        return ratio.clamp(low, high)
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


IMPORTANCE_MODES = ("truncate_token", "mask_token", "truncate_sequence", "mask_sequence")


# ---------------------------------------------------------------------------------------------------- optimal transport


def transport_cost(
    hidden_new: Tensor, hidden_old: Tensor, window: int, regularisation: float = 0.1, iterations: int = 5,
    marginals: tuple[Tensor, Tensor] | None = None, keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Entropic transport cost between the last hidden states of one response in two policies, each [T, D]. A scalar.

    A pair of tokens costs 1 - cosine. Only tokens at most `window` apart may pair. The sum of plan * cost is divided by
    the number of kept tokens (none kept: 0). `marginals`: positive masses [T] of new and of old tokens, by default 1.
    The plan is Sinkhorn's in the log domain (Cuturi, arXiv 1306.0895; Peyre and Cuturi, arXiv 1803.00567, section 4.4).
    The gradient passes through its iterations, only into `hidden_new`. Costs are computed for neighbours only, as
    [T, J]: row i is a token, and its columns are the J = 2 window + 1 tokens around i.
    Raises ValueError for wrong shapes and for numbers out of range.
    """
    shapes, T = (tuple(hidden_new.shape), tuple(hidden_old.shape)), len(hidden_new)
    keep = torch.ones(T, dtype=torch.bool, device=hidden_new.device) if keep is None else keep
    mass_new, mass_old = (torch.ones(T, device=keep.device),) * 2 if marginals is None else marginals
    check_flat(T, keep=keep, mass_new=mass_new, mass_old=mass_old)
    if hidden_new.dim() != 2 or shapes[0] != shapes[1]:
        raise ValueError(f"hidden states are {shapes[0]} and {shapes[1]}, expected [T, D] twice")
    if window < 0 or iterations < 1 or not (regularisation > 0 and mass_new.gt(0).all() and mass_old.gt(0).all()):
        options = f"window {window}, regularisation {regularisation}, iterations {iterations}"
        raise ValueError(f"{options}: expected >= 0, > 0, >= 1, and positive marginals")
    position = keep.nonzero().squeeze(-1)
    dtype = torch.promote_types(hidden_new.dtype, torch.float32)
    new, old = (F.normalize(x[position].to(dtype), dim=-1) for x in (hidden_new, hidden_old.detach()))
    log_new, log_old = (mass[position].to(dtype).log() for mass in (mass_new, mass_old))
    neighbour, allowed = _band(position, window)
    cost = 1 - new @ old.T
    cost, cost_T = cost.gather(1, neighbour), cost.T.gather(1, neighbour)  # a new token's partners, an old one's
    kernel, kernel_T = (torch.where(allowed, -c / regularisation, -math.inf) for c in (cost, cost_T))
    g = torch.zeros_like(log_old)
    for _ in range(iterations):
        f = log_new - (kernel + g[neighbour]).logsumexp(-1)
        g = log_old - (kernel_T + f[neighbour]).logsumexp(-1)
    plan = (f[:, None] + kernel + g[neighbour]).exp()
    return (plan * cost).sum() / max(1, len(position))


def _band(position: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """For kept tokens at these positions: indices [T, J] of the J nearest, and True for those within the window."""
    T = len(position)
    reach = min(window, max(0, T - 1))
    offset = torch.arange(-reach, reach + 1, device=position.device)
    neighbour = torch.arange(T, device=position.device)[:, None] + offset
    inside = (neighbour >= 0) & (neighbour < T)
    neighbour = neighbour.clamp(0, max(0, T - 1))
    return neighbour, inside & ((position[neighbour] - position[:, None]).abs() <= window)


def transport_penalty(
    hidden_new: Tensor, hidden_old: Tensor, lengths: Tensor,
    keep: Tensor | None = None, ot_target: float = 0.0, **options,
) -> Tensor:  # fmt: skip
    """max(0, OT - ot_target) of each episode, [E], for flat hidden states [M, D]. Options: those of `transport_cost`.

    The loss is its mean over the step's episodes (GRPO-Mini's `ot`).
    """
    sizes = lengths.tolist()
    keep = torch.ones(len(hidden_new), dtype=torch.bool, device=hidden_new.device) if keep is None else keep
    responses = zip(hidden_new.split(sizes), hidden_old.split(sizes), keep.split(sizes))
    costs = [transport_cost(new, old, keep=k, **options) for new, old, k in responses]
    return F.relu(torch.stack(costs) - ot_target) if costs else hidden_new.new_zeros(0)
