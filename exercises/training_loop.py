"""Exercises, third part: the loop around the functions of the first two parts.

    python -m pytest exercises/test_training_loop.py                 # all fail
    python -m pytest exercises/ -k shift_by_one                      # work on one until it passes

The last one trains a small policy with your own functions from grpo_steps.py. Order, reading and the place of the
solution: exercises/README.md.

Shape letters: N tokens of one sequence, M response tokens of a step, E responses, T tokens per response, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def shift_by_one(logits: Tensor, ids: Tensor, prompt_length: int) -> tuple[Tensor, Tensor]:
    """Logits and targets of the response tokens of one sequence. [N, V], [N] -> [N - prompt_length, V] and as many ids

    logits[t] belong to the token *after* ids[t]. The first response token is predicted by the last token of the prompt.
    The last token of the sequence predicts nothing that is in it.
    Hint: two slices of equal length. Check the first and the last row by hand for a prompt of 2 and a response of 3.
    """
    raise NotImplementedError


def decode(
    forward: Callable[[list[int], int], Tensor], prompt: list[int], max_new_tokens: int, stop_ids: Sequence[int]
) -> list[int]:
    """Greedy decoding with a cache. Returns the response, its stop token included, at most max_new_tokens ids.

    forward(new_ids, length) runs the model on `new_ids` with `length` tokens already in its cache, stores them there,
    and returns the logits [len(new_ids), V] of the next token at each of them.
    Each token goes through the model once: the whole prompt in the first call, one token in each later call. No call
    is made whose logits are not needed.
    """
    raise NotImplementedError


def accumulate(term: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], micro_batches: Sequence[Tensor]) -> None:
    """Add up the gradient of the mean of term(token) over all tokens of a step, in pieces, into `parameter.grad`.

    term maps a micro-batch [m, ...] to [m], and micro-batches have different sizes. The result must not depend on the
    cut. Gradients from before are dropped first. Call `backward` once per micro-batch, so that the graph of only one
    of them is in memory.
    Hint: the denominator belongs to the step. A mean per micro-batch is wrong.
    """
    raise NotImplementedError


def kl_loss(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """A term per token, for tokens that the policy sampled, with the gradient of KL(policy || reference). [M] -> [M]

    Autograd treats the sampled tokens as constants. So the term must be chosen by its gradient and not by its mean: of
    k1 = -d, k2 = d^2 / 2 and k3 = exp(d) - d - 1, with d = ref_logp - logp, only one is right. No gradient goes into
    the reference.
    Hint: the mean of grad(term) over the policy must be the mean of -d * grad(logp).
    """
    raise NotImplementedError


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that one of k responses is right, estimated from n >= k responses of which `correct` are right.

    The mean of the estimate must be 1 - (1 - p)^k exactly, for any solve rate p (Chen et al. 2021, eq. 1).
    Hint: draw k of the n responses without replacement. How likely is it that none of them is right? `math.comb`.
    """
    raise NotImplementedError


def train(
    logits: Tensor, reward: Callable[[Tensor], Tensor], steps: int, groups: int, group_size: int, lr: float
) -> list[float]:
    """Train a policy with GRPO. Changes `logits` [T, V] in place, and returns the mean reward of each step.

    The policy draws token t of a response from softmax(logits[t]), for any other tokens. All groups have the same
    (empty) prompt. `reward` maps responses [E, T] to rewards [E].

    One step:
      1. Draw groups * group_size responses [E, T]: `draw` with uniform numbers from torch.rand.
      2. Rewards [E], and `group_advantages` of them as [groups, group_size].
      3. `token_logprobs` of the drawn tokens, with a gradient into the logits. The old policy is this one, detached.
      4. `clipped_loss` with 0.2 and 0.2, weighted by `token_weights` of loss type "dapo", summed.
      5. `adamw_step` on the logits with betas (0.9, 0.999), eps 1e-8 and no decay. The step number counts from 1.
    Hint: `from grpo_steps import ...` takes your own functions. Every token of a response has the advantage of the
    response.
    """
    raise NotImplementedError
