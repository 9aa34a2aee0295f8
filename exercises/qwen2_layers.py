"""Exercises, first part: the layers of Qwen2, each an empty function.

    python -m pytest exercises/test_qwen2_layers.py                  # all fail
    python -m pytest exercises/ -k rms_norm                          # work on one until it passes

A function here takes its weights as arguments and keeps no state; the repository's own version is a module in
qwen2_llm.py or attention.py. Order, reading and where the solution stands: exercises/README.md.

Shape letters: N flat tokens, T new tokens, S cached tokens, D hidden, H query heads, G key-value heads, K head size,
F feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension. x [..., D], weight [D] -> [..., D]

    Compute the scale in fp32 whatever the dtype of x, go back to that dtype, and multiply by the weight then.
    Hint: nothing is subtracted, unlike LayerNorm; 300^2 does not fit into fp16.
    """
    raise NotImplementedError


def rope_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each token's rotation angles. positions [N] -> cos, sin, each [N, 1, K] in fp32

    Pair i = 0 .. K/2 - 1 turns by position * theta^(-2i / K). Channels i and i + K/2 are the two members of pair i, so
    the K/2 angles stand twice, one after the other.
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

    Query head h reads key-value head h // (H / G). Token i may look at token j where mask[i, j] is True.
    Hint: `repeat_interleave` the key-value heads, `masked_fill` the scores with -inf before the softmax.
    """
    raise NotImplementedError


def swiglu(x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)), without biases. [N, D] -> [N, F] -> [N, D]

    Hint: weights are stored [out, in], so a layer is x @ weight.T; silu(z) = z * sigmoid(z).
    """
    raise NotImplementedError


def block(
    x: Tensor,
    first_norm: Callable[[Tensor], Tensor],
    attention: Callable[[Tensor], Tensor],
    second_norm: Callable[[Tensor], Tensor],
    mlp: Callable[[Tensor], Tensor],
) -> Tensor:
    """A pre-norm transformer block made of its four parts, each [N, D] -> [N, D].

    Each half reads the normed residual stream and adds to the stream itself, the second after the first.
    """
    raise NotImplementedError


def attend_with_cache(
    cache_k: Tensor, cache_v: Tensor, length: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor
) -> Tensor:
    """Decode T new tokens of one sequence of which `length` tokens are cached. Returns [T, H, K].

    cache_k and cache_v [S, G, K] have room for S tokens; the first `length` are valid and the rest is rubbish. Write
    the new keys and values in place behind the valid ones. New token t sees the cache, and new tokens 0 .. t.
    Hint: the mask is [T, length + T], and it is not a plain `tril`.
    """
    raise NotImplementedError
