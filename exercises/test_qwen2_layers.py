"""Tests of exercises/qwen2_layers.py: comparison with loops, number by number."""

from __future__ import annotations

import math

import pytest
import qwen2_layers as mine
import torch
from torch import Tensor

N, D, H, G, K, F = 6, 10, 4, 2, 8, 12


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_rms_norm_is_its_formula():
    x, weight = random(N, D) + 0.5, random(D, seed=1)
    wanted = torch.empty(N, D)
    for i in range(N):
        scale = 1 / math.sqrt(sum(float(v) ** 2 for v in x[i]) / D + 1e-6)
        for j in range(D):
            wanted[i, j] = x[i, j] * scale * weight[j]
    close(mine.rms_norm(x, weight, 1e-6), wanted)


def test_rms_norm_has_eps_under_the_root():
    close(mine.rms_norm(torch.full((1, D), 1e-3), torch.ones(D), 1e-6), torch.full((1, D), math.sqrt(0.5)))


def test_rms_norm_computes_in_fp32_and_returns_the_dtype_it_was_given():
    y = mine.rms_norm(torch.full((2, D), 300.0, dtype=torch.float16), torch.ones(D, dtype=torch.float16), 1e-6)
    assert y.dtype == torch.float16
    close(y.float(), torch.ones(2, D))


def test_rope_angles_turn_a_pair_by_its_frequency():
    positions = torch.tensor([0, 1, 7, 1000])
    cos, sin = mine.rope_angles(positions, K, 10000.0)
    assert cos.shape == sin.shape == (4, 1, K)
    for row, position in enumerate(positions.tolist()):
        for channel in range(K):
            angle = position * 10000.0 ** (-2 * (channel % (K // 2)) / K)
            assert float(cos[row, 0, channel]) == pytest.approx(math.cos(angle), abs=1e-4)
            assert float(sin[row, 0, channel]) == pytest.approx(math.sin(angle), abs=1e-4)


def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
    """The same table, for the exercises that come after it."""
    angle = positions[:, None, None] * 100.0 ** -(torch.arange(0, K, 2) / K)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def test_apply_rope_rotates_each_pair():
    x, (cos, sin) = random(N, H, K), angles(torch.arange(N))
    wanted = torch.empty(N, H, K)
    for i in range(K // 2):
        a, b, c, s = x[..., i], x[..., i + K // 2], cos[..., i], sin[..., i]
        wanted[..., i], wanted[..., i + K // 2] = a * c - b * s, b * c + a * s
    close(mine.apply_rope(x, cos, sin), wanted)


def test_apply_rope_makes_scores_depend_on_the_distance_alone():
    q, k = random(1, 1, K), random(1, 1, K, seed=1)

    def score(i: int, j: int) -> Tensor:
        return (mine.apply_rope(q, *angles(torch.tensor([i]))) * mine.apply_rope(k, *angles(torch.tensor([j])))).sum()

    close(score(5, 3), score(25, 23))
    assert abs(float(score(5, 3) - score(5, 4))) > 1e-3


def attention_by_loops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [T, H, K] over keys [S, G, K], mask [T, S]."""
    out = torch.zeros_like(q)
    for t in range(len(q)):
        for h in range(H):
            g = h // (H // G)
            scores = [float(q[t, h] @ k[j, g]) / math.sqrt(K) if mask[t, j] else -math.inf for j in range(len(k))]
            weights = [math.exp(s - max(scores)) for s in scores]
            out[t, h] = sum(w / sum(weights) * v[j, g] for j, w in enumerate(weights))
    return out


def test_grouped_query_attention_is_its_formula():
    q, k, v = random(N, H, K), random(N, G, K, seed=1), random(N, G, K, seed=2)
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    mask[4, 1] = False
    close(mine.grouped_query_attention(q, k, v, mask), attention_by_loops(q, k, v, mask))


def test_grouped_query_attention_never_reads_what_is_masked():
    q, k, v = random(N, H, K), random(N, G, K, seed=1), random(N, G, K, seed=2)
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    before = mine.grouped_query_attention(q, k, v, mask)
    k[-1], v[-1] = 100.0, 1e4
    close(mine.grouped_query_attention(q, k, v, mask)[:-1], before[:-1])


def test_swiglu_is_its_formula():
    x, gate, up, down = random(N, D), random(F, D, seed=1), random(F, D, seed=2), random(D, F, seed=3)
    wanted = torch.zeros(N, D)
    for i in range(N):
        for f in range(F):
            z = float(gate[f] @ x[i])
            wanted[i] += down[:, f] * (z / (1 + math.exp(-z))) * (up[f] @ x[i])
    close(mine.swiglu(x, gate, up, down), wanted)


def test_block_adds_each_half_to_the_stream_it_read_normed():
    x = random(N, D)
    y = mine.block(x, lambda z: 2 * z, lambda z: z**2, lambda z: z + 3, lambda z: z**3)
    middle = x + (2 * x) ** 2
    close(y, middle + (middle + 3) ** 3)


def test_append_to_cache_writes_in_place_behind_the_valid_tokens():
    cache, new = random(N + 3, G, K), random(2, G, K, seed=1)
    wanted = cache.clone()
    wanted[4], wanted[5] = new[0], new[1]
    mine.append_to_cache(cache, 4, new)
    assert torch.equal(cache, wanted)


@pytest.mark.parametrize(
    ("length", "rows"),
    [(0, ["100", "110", "111"]), (3, ["111100", "111110", "111111"]), (4, ["11111"])],
)
def test_cache_mask_by_hand(length, rows):
    found = mine.cache_mask(length, len(rows))
    assert found.dtype == torch.bool
    assert [["0", "1"][x] for row in found.tolist() for x in row] == list("".join(rows))
    assert found.shape == (len(rows), length + len(rows))


@pytest.mark.parametrize("pieces", [[N], [1] * N, [3, 1, 2]])
def test_attend_with_cache_equals_attention_over_the_whole(pieces):
    q, k, v = random(N, H, K), random(N, G, K, seed=1), random(N, G, K, seed=2)
    wanted = attention_by_loops(q, k, v, torch.ones(N, N, dtype=torch.bool).tril())
    cache_k, cache_v = (
        torch.full((N + 3, G, K), 50.0),
        torch.full((N + 3, G, K), 1e4),
    )  # other numbers behind the valid ones
    outputs, length = [], 0
    for size in pieces:
        new = slice(length, length + size)
        outputs.append(mine.attend_with_cache(cache_k, cache_v, length, q[new], k[new], v[new]))
        length += size
    close(torch.cat(outputs), wanted)
    close(cache_k[:N], k)
    close(cache_v[:N], v)
