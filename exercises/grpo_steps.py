"""Exercises, second part: from logits to a weight update, one function per step.

    python -m pytest exercises/test_grpo_steps.py                    # all fail
    python -m pytest exercises/ -k group_advantages                  # work on one until it passes

Order, reading and the place of the solution: exercises/README.md.

Shape letters: N rows of a decode step, M response tokens end to end, E episodes (responses), P prompts, n responses per
prompt, V vocabulary, r LoRA rank.
"""

from __future__ import annotations

from torch import Tensor


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Log-probability of each target under softmax(logits / temperature). [M, V], [M] -> [M] in fp32

    Must be right for logits of +-10,000: the exponential of one of them overflows, and that of another is 0.
    Hint: subtract the maximum of the row before any exponential (log_softmax does), then `gather`.
    """
    raise NotImplementedError


def entropy(logits: Tensor) -> Tensor:
    """-sum_v p_v log p_v of p = softmax(logits), in nats. [M, V] -> [M]

    Hint: a token of probability 0 adds 0, not NaN: take log p from log_softmax.
    """
    raise NotImplementedError


def top_p(probabilities: Tensor, p: float) -> Tensor:
    """Keep the smallest set of the most likely tokens that holds at least p, and set all others to 0. [N, V] -> [N, V]

    Kept tokens keep their value (no renormalising) and their place. At least one token stays.
    Hint: sort, and add up the probability of all tokens that are more likely. `scatter` brings the values back.
    """
    raise NotImplementedError


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Draw one id per row by inverting the cumulative distribution. weights [N, V] >= 0, u [N] in [0, 1) -> ids [N]

    The id is the first one with a cumulative weight above u * total. The weights need not add up to 1. An id of
    weight 0 is never drawn, not even at u = 0.
    Hint: `cumsum` and `searchsorted`. Check on which side of an equal element it stops.
    """
    raise NotImplementedError


def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO's advantages: (reward - mean of its group) / (deviation of its group + 1e-4). [P, n] -> [P, n]

    The deviation is that of the population (divisor n). If all rewards of a group are equal, its advantages are
    exactly 0. Hint: in fp32 the mean of eight times 0.7 is not 0.7.
    """
    raise NotImplementedError


def clipped_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) of each token, ratio = policy / old policy. Four times [M]

    PPO, eq. 7. `logp` carries the gradient. There is one advantage per token.
    Hint: the minimum keeps the gradient if the policy has moved in the wrong direction.
    """
    raise NotImplementedError


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) for tokens of the policy: exp(d) - d - 1. [M] -> [M]

    d = ref_logp - logp. No gradient goes to the reference.
    """
    raise NotImplementedError


def token_weights(lengths: Tensor, loss_type: str, max_new_tokens: int) -> Tensor:
    """Weight of every token of an optimizer step. Its loss is sum(weight * term). lengths [E] -> [M], M their sum

    dapo     all tokens of the step have the same weight: 1 / M
    grpo     a mean over responses of the mean over the tokens of a response: 1 / (E * length)
    dr_grpo  a sum over the tokens of a response, divided by a constant: 1 / (E * max_new_tokens)
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

    Kingma & Ba 2015, alg. 1, with the decay of `torch.optim.AdamW`: the weight is multiplied by 1 - lr * weight_decay,
    and the moments do not see the decay. (Algorithm 2 of Loshchilov & Hutter 2019 has no lr there.) Epsilon is added
    after the bias correction, outside the square root.
    """
    raise NotImplementedError


def lora_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """x W^T + alpha / r * (x A^T) B^T. x [N, in], weight [out, in], A [r, in], B [out, r] -> [N, out]

    Hint: r is the first size of A. Never compute B A: it is as large as the weight.
    """
    raise NotImplementedError
