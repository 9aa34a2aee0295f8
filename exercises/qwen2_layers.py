"""Exercises, first part: the layers of Qwen2, each an empty function.

    python -m pytest exercises/test_qwen2_layers.py                  # all fail
    python -m pytest exercises/ -k rms_norm                          # work on one until it passes

A function takes its weights as arguments and keeps no state. The version of the repository is a module in
qwen2_llm.py or model/attention.py. Order, reading and the place of the solution: exercises/README.md.

Shape letters: N flat tokens, T new tokens, S cached tokens, D hidden, H query heads, G key-value heads, K head size,
F feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension. x [..., D], weight [D] -> [..., D]

    Compute the scale in fp32 for x of any dtype, go back to that dtype, and then multiply by the weight.
    Hint: nothing is subtracted, unlike LayerNorm. 300^2 does not fit into fp16.
    """
    raise NotImplementedError


def rope_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each token's rotation angles. positions [N] -> cos, sin, each [N, 1, K] in fp32

    Pair i = 0 .. K/2 - 1 turns by position * theta^(-2i / K). Channels i and i + K/2 are the two members of pair i, so
    the row of K/2 angles is repeated once.
    Hint: the 1 in the shape lets one table serve every head.
    """
    raise NotImplementedError


def apply_rope(x_NHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (a, b) = (x_i, x_{i + K/2}) to (a cos - b sin, b cos + a sin). [N, H, K] -> [N, H, K]

    Hint: with the halves swapped and one of them negated, it is x * cos + swapped * sin.
    """
    raise NotImplementedError


def grouped_query_attention(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, mask_NN: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K) + mask) v. q [N, H, K], k and v [N, G, K], mask [N, N] bool -> [N, H, K]

    Query head h reads key-value head h // (H / G). Token i attends to token j if mask[i, j] is True.
    Hint: `repeat_interleave` the key-value heads, `masked_fill` the scores with -inf before the softmax.
    """
    raise NotImplementedError


def swiglu(x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)), without biases. [N, D] -> [N, F] -> [N, D]

    Hint: weights are stored [out, in], so a layer is x @ weight.T. silu(z) = z * sigmoid(z).
    """
    raise NotImplementedError


def block(
    x: Tensor,
    first_norm: Callable[[Tensor], Tensor],
    attention: Callable[[Tensor], Tensor],
    second_norm: Callable[[Tensor], Tensor],
    mlp: Callable[[Tensor], Tensor],
) -> Tensor:
    """A pre-norm transformer block from its four parts, each [N, D] -> [N, D].

    Each half reads the residual stream after a norm, and adds to the stream itself. The second half reads the result of
    the first.
    """
    raise NotImplementedError


def append_to_cache(cache: Tensor, length: int, new: Tensor) -> None:
    """Write T new keys (or values) [T, G, K] in place into a cache [S, G, K] whose first `length` tokens are valid.

    Other places keep their numbers.
    Hint: assign to a slice. `torch.cat` makes a new tensor, and the caller's cache stays as it was.
    """
    raise NotImplementedError


def cache_mask(length: int, T: int) -> Tensor:
    """Which key each of T new tokens attends to, if `length` tokens are cached: [T, length + T] bool.

    New token t sees all cached tokens and the new tokens 0 .. t.
    Hint: for length 0 it is `tril`. For length 3 and T 2 the first row is 1 1 1 1 0.
    """
    raise NotImplementedError


def attend_with_cache(
    cache_k: Tensor, cache_v: Tensor, length: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor
) -> Tensor:
    """Decode T new tokens of one sequence with `length` cached tokens. Returns [T, H, K].

    cache_k and cache_v [S, G, K] have room for S tokens. The first `length` are valid, and the rest holds other numbers
    that must not be read. Store the new keys and values, then attend.
    Hint: `append_to_cache` and `cache_mask`, then `grouped_query_attention` over the first length + T keys. Its mask
    has one row per query and one column per key, and need not be square.
    """
    raise NotImplementedError
