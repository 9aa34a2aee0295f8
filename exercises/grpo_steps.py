"""Exercises, second part: from logits to a weight update, each step an empty function.

    python -m pytest exercises/test_grpo_steps.py                    # all fail
    python -m pytest exercises/ -k group_advantages                  # work on one until it passes

Order, reading and where the solution stands: exercises/README.md.

Shape letters: N rows that are decoding, M response tokens end to end, E episodes (answers), P prompts, n answers a
prompt, V vocabulary, r LoRA rank.
"""

from __future__ import annotations

from torch import Tensor


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Log-probability of each target under softmax(logits / temperature). [M, V], [M] -> [M] in fp32

    Must hold for logits of +-10,000, where the exponential of one overflows and the logarithm of another's is -inf.
    Hint: subtract the row's maximum before anything is exponentiated (log_softmax does), then `gather`.
    """
    raise NotImplementedError


def entropy(logits: Tensor) -> Tensor:
    """-sum_v p_v log p_v of p = softmax(logits), in nats. [M, V] -> [M]

    Hint: a token of probability 0 adds 0, not NaN: take log p from log_softmax.
    """
    raise NotImplementedError


def top_p(probabilities: Tensor, p: float) -> Tensor:
    """Set to 0 what is outside the smallest set of the likeliest tokens that holds at least p. [N, V] -> [N, V]

    The rest keeps its value (no renormalising) and its place. At least one token stays.
    Hint: sort, and look at the probability of all that is likelier than a token; `scatter` brings the values back.
    """
    raise NotImplementedError


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Draw an id a row by inverting the cumulative distribution. weights [N, V] >= 0, u [N] in [0, 1) -> ids [N]

    The id is the first whose cumulative weight exceeds u * total; the weights need not add up to 1. An id of weight 0
    is never drawn, at u = 0 neither.
    Hint: `cumsum` and `searchsorted`; mind on which side of an equal element it stops.
    """
    raise NotImplementedError


def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO's advantages: (reward - mean of its group) / (deviation of its group + 1e-4). [P, n] -> [P, n]

    The deviation is the population's (divisor n). Where all rewards of a group are equal the advantages are exactly 0.
    Hint: in fp32 the mean of eight times 0.7 is not 0.7.
    """
    raise NotImplementedError


def clipped_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) of each token, ratio = policy / old policy. Four times [M]

    PPO, eq. 7. `logp` carries the gradient; advantages are given a token.
    Hint: the minimum is what keeps the gradient alive where the policy has moved the wrong way.
    """
    raise NotImplementedError


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) for tokens of the policy: exp(d) - d - 1. [M] -> [M]

    d = ref_logp - logp. No gradient goes to the reference.
    """
    raise NotImplementedError


def token_weights(lengths: Tensor, loss_type: str, max_new_tokens: int) -> Tensor:
    """Weight of every token of an optimizer step, whose loss is sum(weight * term). lengths [E] -> [M], M their sum

    dapo     every token of the step alike: 1 / M
    grpo     a mean over answers of the mean over an answer's tokens: 1 / (E * length)
    dr_grpo  a sum over an answer's tokens, divided by a constant: 1 / (E * max_new_tokens)
    """
    raise NotImplementedError


def adamw_step(
    weight: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW update of `weight`, `first` and `second` (the moments), in place. `step` counts from 1.

    Kingma & Ba 2015, alg. 1, with the decay of Loshchilov & Hutter 2019: the weight shrinks by lr * weight_decay, and
    the moments never see the decay. Epsilon is added after the bias correction, outside the square root.
    """
    raise NotImplementedError


def lora_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """x W^T + alpha / r * (x A^T) B^T. x [N, in], weight [out, in], A [r, in], B [out, r] -> [N, out]

    Hint: r is read off A. Never make B A: it is as large as the weight.
    """
    raise NotImplementedError
