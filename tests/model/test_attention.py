"""attention.py: fused, packed, cached and shared attention against softmax(q k^T / sqrt(K)) v written with loops."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_config, make_model
from emulated_cuda import EmulatedCuda

from model.attention import (
    EagerAttention,
    KVCache,
    PackedAttention,
    PrefillAttention,
    _pack,
    attend_each_run,
    check_cuda_attention,
    has_flash,
)
from model.flash_cpu import attend_lse, merge_attention
from model.layout import Layout, Run
from rollout.group_cache import GroupCache

H, G, K = 4, 2, 8
LAYOUTS = {
    "one": Layout.causal([1]),
    "causal": Layout.causal([5, 1, 9]),
    "with-an-empty-text": Layout.causal([3, 0, 2]),
    "similar-lengths": Layout.causal([6, 7, 6, 8, 30, 31]),
    "group": Layout.shared_prefix([4], [[2, 3]]),
    "ragged-groups": Layout.shared_prefix([3, 6, 1], [[5, 1, 17], [2], [4, 4]]),
    "empty-responses": Layout.shared_prefix([3, 4, 2], [[0, 2, 0, 3], [0, 0], [1, 0]]),
    "prompt-without-responses": Layout.shared_prefix([3, 4], [[], [2]]),
    "prompts-first": Layout(
        [Run(0, 2), Run(2, 3), Run(5, 2, 0, 2), Run(7, 1, 2, 3), Run(8, 2, 2, 3), Run(10, 1, 0, 2)]
    ),
    "long": Layout.shared_prefix([70, 45], [[130, 3, 90], [64, 65]]),
}


@pytest.fixture(params=LAYOUTS)
def layout(request) -> Layout:
    return LAYOUTS[request.param]


def random_qkv(rows: int, heads: int = H, kv_heads: int = G, size: int = K, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, n, size, generator=generator) * 1.5 for n in (heads, kv_heads, kv_heads)]


def visible_rows(layout: Layout, row: int) -> list[int]:
    """The rows that a row may look at, from the fields of a Run."""
    run = next(r for r in layout.runs if r.start <= row < r.start + r.length)
    return [*range(run.prefix_start, run.prefix_start + run.prefix_length), *range(run.start, row + 1)]


def attend_by_loops(layout: Layout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Row by row, head by head, in float64."""
    group, out = q.shape[1] // k.shape[1], torch.zeros(q.shape, dtype=torch.float64)
    for row in range(len(q)):
        seen = visible_rows(layout, row)
        for head in range(q.shape[1]):
            scores = k[seen, head // group].double() @ q[row, head].double() / math.sqrt(q.shape[2])
            out[row, head] = scores.softmax(dim=0) @ v[seen, head // group].double()
    return out


def gradients(attend, qkv: list[torch.Tensor], weights: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = attend(0, *leaves)
    (out.float() * weights).sum().backward()
    return out.detach(), [x.grad for x in leaves]


# --- layouts


def test_layout_positions_and_mask(layout):
    """CHECKLIST 7. Masks and positions follow from lengths alone."""
    positions, mask = layout.positions(), layout.mask()
    assert mask.shape == (layout.n_rows, layout.n_rows) == (len(positions), len(positions))
    for row in range(layout.n_rows):
        assert mask[row].nonzero()[:, 0].tolist() == sorted(visible_rows(layout, row))
        assert positions[row] == len(visible_rows(layout, row)) - 1


def test_shared_prefix_places_responses_behind_their_prompt():
    runs = Layout.shared_prefix([4, 1], [[2, 3], [1]]).runs
    assert [(r.start, r.length, r.prefix_start, r.prefix_length) for r in runs] == [
        (0, 4, 0, 0), (4, 2, 0, 4), (6, 3, 0, 4), (9, 1, 0, 0), (10, 1, 9, 1),
    ]  # fmt: skip


def test_a_group_for_each_prompt_is_required():
    with pytest.raises(ValueError):
        Layout.shared_prefix([1, 2], [[1]])


# --- the reference


def test_eager_attention_is_the_formula(layout):
    qkv = random_qkv(layout.n_rows)
    expected = attend_by_loops(layout, *qkv).float()
    torch.testing.assert_close(EagerAttention(layout.mask())(0, *qkv), expected, atol=1e-5, rtol=0)


def test_recorded_weights_sum_to_one_and_respect_the_mask():
    layout, config = LAYOUTS["ragged-groups"], make_config(num_hidden_layers=3)
    model, eager = make_model(config), EagerAttention(layout.mask(), record=True)
    ids = torch.arange(layout.n_rows)
    hidden = model.hidden_states(ids, layout.positions(), eager)
    assert torch.equal(hidden, model.hidden_states(ids, layout.positions(), EagerAttention(layout.mask())))
    assert sorted(eager.weights) == [0, 1, 2]
    for weights in eager.weights.values():
        assert weights.shape == (4, layout.n_rows, layout.n_rows)
        assert not weights.requires_grad
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, layout.n_rows))
        assert (weights[:, ~layout.mask()] == 0).all()
    assert not EagerAttention(layout.mask()).weights


def test_a_row_that_sees_nothing_is_zero_and_sends_no_nan_back():
    """CHECKLIST 10."""
    mask = torch.tensor([[True, False], [False, False]])
    out, grads = gradients(EagerAttention(mask), random_qkv(2), torch.ones(2, H, K))
    assert (out[1] == 0).all()
    assert all(torch.isfinite(gradient).all() for gradient in grads)


# --- training


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 8), (4, 4, 16), (6, 1, 6)], ids=["gqa", "mha", "mqa"])
def test_packed_attention_equals_eager_in_outputs_and_gradients(layout, heads, kv_heads, size):
    """CHECKLIST 10. fp32."""
    qkv = random_qkv(layout.n_rows, heads, kv_heads, size)
    weights = torch.randn(layout.n_rows, heads, size, generator=torch.Generator().manual_seed(5))
    expected, expected_grads = gradients(EagerAttention(layout.mask()), qkv, weights)
    for attend in (PackedAttention(layout), lambda _, *qkv: attend_each_run(layout, *qkv)):
        out, grads = gradients(attend, qkv, weights)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
        for gradient, reference in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(gradient, reference, atol=3e-5, rtol=1e-5)


def test_packed_attention_in_bf16_is_as_near_as_bf16_allows(layout):
    qkv = [x.bfloat16() for x in random_qkv(layout.n_rows)]
    weights = torch.randn(layout.n_rows, H, K, generator=torch.Generator().manual_seed(5)).bfloat16().float()
    exact = [x.float() for x in qkv]
    expected, expected_grads = gradients(EagerAttention(layout.mask()), exact, weights)
    out, grads = gradients(PackedAttention(layout), qkv, weights)
    assert out.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.bfloat16 for gradient in grads)
    torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0.02)
    for gradient, reference in zip(grads, expected_grads, strict=True):
        scale = reference.abs().max().clamp(min=1)
        assert (gradient.float() - reference).abs().max() < 0.03 * scale


def test_extreme_scores_stay_finite():
    """Merging by log-sum-exp must not overflow where one side holds all the weight."""
    layout = LAYOUTS["group"]
    q, k, v = random_qkv(layout.n_rows)
    for factor in (40.0, -40.0):
        prompt_heavy = k.clone()
        prompt_heavy[:4] *= factor
        qkv = [q * 10, prompt_heavy, v]
        expected, expected_grads = gradients(EagerAttention(layout.mask()), qkv, torch.ones(layout.n_rows, H, K))
        out, grads = gradients(PackedAttention(layout), qkv, torch.ones(layout.n_rows, H, K))
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)
        for gradient, reference in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(gradient, reference, atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_prefix_gives_the_gradients_of_padded_rows(checkpointing):
    """CHECKLIST 10, CHECKLIST 34. Prompt computed once a group, against prompt + response written out in each row."""
    prompts, responses = [[1, 2, 3], [4, 5, 6, 7, 8]], [[[9, 10], [11], [12, 13, 14, 15]], [[16, 17, 18], []]]
    layout = Layout.shared_prefix([len(p) for p in prompts], [[len(r) for r in group] for group in responses])
    flat = [token for p, group in zip(prompts, responses, strict=True) for r in [p, *group] for token in r]
    shared, padded = make_model(), make_model()
    shared.model.gradient_checkpointing = checkpointing
    hidden = shared.hidden_states(torch.tensor(flat), layout.positions(), PackedAttention(layout))
    rows = [p + r for p, group in zip(prompts, responses, strict=True) for r in group]
    ids, mask = torch.zeros(len(rows), 9, dtype=torch.long), torch.zeros(len(rows), 9)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    reference = padded(ids, mask)
    weights, i, total, expected = torch.randn(275, generator=torch.Generator().manual_seed(1)), 0, 0.0, 0.0
    response_runs = [run for run in layout.runs if run.prefix_length]
    assert len(response_runs) == len(rows)
    for i, run in enumerate(response_runs):
        mine, other = shared.logits(hidden[run.rows]), reference[i, run.prefix_length : run.prefix_length + run.length]
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
        total, expected = total + (mine * weights).sum(), expected + (other * weights).sum()
    total.backward()
    expected.backward()
    for (name, mine), other in zip(shared.named_parameters(), padded.parameters(), strict=True):
        assert other.grad.abs().sum() > 0, name
        torch.testing.assert_close(mine.grad, other.grad, atol=2e-4, rtol=1e-4)


def test_the_index_of_the_variable_length_kernel(layout):
    """CHECKLIST 11. The arguments of CUDA's kernel, evaluated by its definition: causal, aligned at the bottom
    right."""
    q, k, v = random_qkv(layout.n_rows)
    rows, cu_q, cu_k, max_q, max_k = _pack(layout, torch.device("cpu"))
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (cu_q.diff() > 0).all(), "a sequence without queries"
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert (int(cu_q[-1]), int(cu_k[-1])) == (layout.n_rows, len(rows))
    out = torch.zeros(q.shape, dtype=torch.float64)
    keys, values = k[rows].double(), v[rows].double()
    for sequence in range(len(cu_q) - 1):
        queries, seen = range(cu_q[sequence], cu_q[sequence + 1]), range(cu_k[sequence], cu_k[sequence + 1])
        for i, row in enumerate(queries):
            last = i + len(seen) - len(queries)  # bottom right: the last query sees the last key
            own = [seen[j] for j in range(last + 1)]
            for head in range(H):
                scores = keys[own, head // 2] @ q[row, head].double() / math.sqrt(K)
                out[row, head] = scores.softmax(dim=0) @ values[own, head // 2]
    torch.testing.assert_close(out, attend_by_loops(layout, q, k, v))


@pytest.mark.parametrize(
    ("capability", "dtype", "flash"),
    [
        ((7, 5), torch.float32, False), ((7, 5), torch.float16, False), ((8, 0), torch.float32, False),
        ((8, 0), torch.float16, True), ((8, 0), torch.bfloat16, True), ((9, 0), torch.bfloat16, True),
    ],
)  # fmt: skip
def test_attention_on_a_gpu_is_one_call_for_each_layer(layout, capability, dtype, flash):
    """CHECKLIST 10, CHECKLIST 11. Responses of one token are runs of length 0, which no kernel takes. The output and
    the gradients are those of the reference, and the number of kernels does not grow with the sequences."""
    qkv = [x.to(dtype) for x in random_qkv(layout.n_rows)]
    weights = torch.randn(layout.n_rows, H, K, generator=torch.Generator().manual_seed(5))
    expected, expected_grads = gradients(EagerAttention(layout.mask()), [x.float() for x in qkv], weights)
    with EmulatedCuda(capability) as gpu:
        out, grads = gradients(PackedAttention(layout), [x.to("cuda") for x in qkv], weights.to("cuda"))
        forward, backward = (
            ("torch_attn._varlen_attn.default", "torch_attn._varlen_attn_backward.default")
            if flash
            else ("_efficient_attention_forward.default", "_efficient_attention_backward.default")
        )
        assert (gpu.kernels[forward], gpu.kernels[backward]) == (1, 1)
        tolerance = {torch.float32: 3e-5, torch.float16: 0.005, torch.bfloat16: 0.04}[dtype]
        torch.testing.assert_close(out.cpu().float(), expected, atol=tolerance, rtol=tolerance)
        for gradient, reference in zip(grads, expected_grads, strict=True):
            scale = reference.abs().max().clamp(min=1)
            assert (gradient.cpu().float() - reference).abs().max() < tolerance * scale


def test_flash_attention_is_taken_where_it_runs():
    assert has_flash(torch.bfloat16, 64, (8, 0))
    assert has_flash(torch.float16, 256, (9, 0))
    for dtype, size, capability in [
        (torch.float32, 64, (9, 0)), (torch.float16, 64, (7, 5)), (torch.bfloat16, 12, (8, 0)),
        (torch.bfloat16, 264, (8, 0)),
    ]:  # fmt: skip
        assert not has_flash(dtype, size, capability)


@pytest.mark.parametrize(
    ("dtype", "size", "capability", "message"),
    [
        (torch.bfloat16, 64, (7, 5), "compute capability 7.5.*--dtype fp16 or fp32"),
        (torch.float32, 6, (8, 0), "size 6.*--device cpu"),
        (torch.float16, 6, (7, 5), "size 6.*--device cpu"),
    ],
)
def test_a_gpu_without_a_training_kernel_is_refused(dtype, size, capability, message):
    """One line with the remedy."""
    for good in [(torch.bfloat16, 12, (8, 0)), (torch.float16, 512, (7, 5)), (torch.float32, 7, (7, 5))]:
        check_cuda_attention(*good)
    with pytest.raises(ValueError, match=message) as error:
        check_cuda_attention(dtype, size, capability)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_written_out_keeps_its_scores_in_fp32(dtype):
    """A device without a fused kernel, such as MPS. Large scores: in 16 bits their differences would be lost."""
    q, k, v = (torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(n)) * 4 for n in (3, 9, 9))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    expected, expected_lse = attend_lse(q.double(), k.double(), v.double())
    out, lse = attend_lse(*(x.to("meta") for x in (q, k, v)))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    out, lse = attend_lse(*(NotTheCpu(x) for x in (q, k, v)))
    assert (lse.double() - expected_lse).abs().max() < 1e-4
    assert (out.double() - expected).abs().max() < 2 * torch.finfo(dtype).eps * expected.abs().max()


class NotTheCpu(torch.Tensor):
    """A host tensor that says it is on a device without fused kernels."""

    @staticmethod
    def __new__(cls, x):
        return x.as_subclass(cls)

    @property
    def device(self):
        return torch.device("mps")


def test_merging_two_halves_is_attention_over_all():
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    scores = q @ k.mT / math.sqrt(8)
    left, right = attend_lse(q, k[:, :, :2], v[:, :, :2]), attend_lse(q, k[:, :, 2:], v[:, :, 2:])
    out, lse = merge_attention(*left, *right)
    torch.testing.assert_close(out, scores.softmax(dim=-1) @ v, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fused", "written-out"])
def test_attend_lse_hides_what_the_mask_hides(dtype):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=dtype) for n in (4, 6, 6))
    hidden = torch.tensor([[False] * 6, [False] * 2 + [True] * 4])
    mask = torch.zeros(2, 6, dtype=dtype).masked_fill(hidden, -torch.inf)[:, None, None]
    k[1, :, 2:], v[1, :, 2:] = 1e4, 1e4
    out, lse = attend_lse(q, k, v, mask)
    for b, stop in enumerate((6, 2)):
        expected, expected_lse = attend_lse(q[b : b + 1], k[b : b + 1, :, :stop], v[b : b + 1, :, :stop])
        torch.testing.assert_close(out[b : b + 1], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(lse[b : b + 1], expected_lse, atol=1e-5, rtol=0, check_dtype=False)


# --- decoding


def full_hidden(model, texts: list[list[int]]) -> list[torch.Tensor]:
    """Hidden states of each text, alone, by the eager reference."""
    layouts = [Layout.causal([len(text)]) for text in texts]
    return [
        model.hidden_states(torch.tensor(text), layout.positions(), EagerAttention(layout.mask()))
        for text, layout in zip(texts, layouts, strict=True)
    ]


def prefill(model, prompts: list[list[int]]) -> PrefillAttention:
    attend = PrefillAttention([len(prompt) for prompt in prompts])
    model.hidden_states(torch.tensor([i for prompt in prompts for i in prompt]), attend.layout.positions(), attend)
    return attend


def random_tokens(rows: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(275, (rows, length), generator=torch.Generator().manual_seed(seed))


PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]


@pytest.mark.parametrize("chunk", [1, 3, 12])
@pytest.mark.parametrize("dirty", [False, True], ids=["fresh", "held-other-data"])
@torch.no_grad()
def test_prefill_and_chunks_equal_the_full_forward(chunk, dirty):
    """CHECKLIST 27, CHECKLIST 11. Ragged rows, two copies a prompt, chunks of 1, 3 and all. Then garbage behind."""
    model, new = make_model(), random_tokens(6, 12)
    texts = [PROMPTS[row // 2] + new[row].tolist() for row in range(6)]
    cache = KVCache.from_prefill(prefill(model, PROMPTS), copies=2, room=12)
    assert cache.size == 17
    if dirty:
        unused = torch.arange(cache.size) >= cache.lengths[:, None, None]  # [B, 1, S]
        cache.k.masked_fill_(unused[..., None], 1e4)
        cache.v.masked_fill_(unused[..., None], -1e4)
    parts = []
    for start in range(0, 12, chunk):
        positions = cache.positions(chunk).flatten()
        ids = new[:, start : start + chunk].flatten()
        parts.append(model.hidden_states(ids, positions, cache.attend).unflatten(0, (6, chunk)))
        cache.advance(chunk)
    assert cache.lengths.tolist() == [len(text) for text in texts]
    for row, (text, expected) in enumerate(zip(texts, full_hidden(model, texts), strict=True)):
        mine = torch.cat(parts, dim=1)[row]
        torch.testing.assert_close(mine, expected[len(text) - 12 :], atol=2e-5, rtol=0)


@pytest.mark.parametrize("chunk", [1, 3, 9])
@torch.no_grad()
def test_an_empty_cache_takes_the_whole_text_through_attend(chunk):
    """CHECKLIST 27, CHECKLIST 11. No prefill at all: the prompt comes in chunks as well."""
    model, ids, config = make_model(), random_tokens(2, 9), make_config()
    cache = KVCache(config.num_hidden_layers, 2, 9, config.num_key_value_heads, config.head_dim, torch.float32)
    parts = []
    for start in range(0, 9, chunk):
        part = ids[:, start : start + chunk]
        hidden = model.hidden_states(part.flatten(), cache.positions(chunk).flatten(), cache.attend)
        parts.append(hidden.unflatten(0, (2, chunk)))
        cache.advance(chunk)
    for mine, expected in zip(torch.cat(parts, dim=1), full_hidden(model, ids.tolist()), strict=True):
        torch.testing.assert_close(mine, expected, atol=2e-5, rtol=0)


def group_cache(model, filled: PrefillAttention, copies: int, room: int, width: int | None = None) -> GroupCache:
    """A cache whose groups are `copies` rows of each prompt."""
    n = len(filled.lengths)
    cache = GroupCache(model.config, n * copies, n, max(filled.lengths), room, width, dtype=model.dtype)
    cache.arrange([-1] * n * copies, [group for group in range(n) for _ in range(copies)], [-1] * n)
    cache.fill(range(n), filled, range(n))
    return cache


def step(cache: GroupCache, model, ids: torch.Tensor) -> torch.Tensor:
    hidden = model.hidden_states(ids, cache.begin(), cache.attend)
    cache.advance()
    return hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prompts", [PROMPTS, [[1, 2, 3], [4, 5, 6]]], ids=["ragged", "equal"])
@pytest.mark.parametrize(("kv_heads", "lockstep"), [(1, False), (2, True), (2, False), (4, True)])
@torch.no_grad()
def test_group_cache_equals_kv_cache_while_rows_leave(prompts, kv_heads, lockstep, dtype):
    """CHECKLIST 27. Rows leave from the middle, a whole group leaves, and the last row goes on alone."""
    model = make_model(make_config(num_key_value_heads=kv_heads)).to(dtype)
    filled, n = prefill(model, prompts), len(prompts)
    group, plain = group_cache(model, filled, 3, 12), KVCache.from_prefill(filled, copies=3, room=12)
    rows, new = torch.arange(3 * n), random_tokens(3 * n, 12)
    leaving = {2: [1, 4], 5: [3, 5], 8: [0]}
    tolerance = 2e-5 if dtype == torch.float32 else 0.15
    group.lockstep = lockstep
    for t in range(12):
        if t in leaving:
            keep = torch.tensor([i for i, row in enumerate(rows.tolist()) if row not in leaving[t]])
            groups = sorted({int(row) // 3 for row in rows})
            rows = rows[keep]
            left = sorted({int(row) // 3 for row in rows})
            group.arrange(
                keep.tolist(), [left.index(int(row) // 3) for row in rows], [groups.index(prompt) for prompt in left]
            )
            plain.keep(keep)
        group.reach = t + 1 if lockstep else 12
        assert torch.equal(group.begin(), plain.positions().flatten())
        a = step(group, model, new[rows, t])
        b = model.hidden_states(new[rows, t], plain.positions().flatten(), plain.attend)
        plain.advance()
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0.05 if dtype == torch.bfloat16 else 0)
    assert group.n_groups == n - 1  # the second prompt left with its last row
    assert len(rows) == 3 * n - 5


@pytest.mark.parametrize("width", [None, 1])
@torch.no_grad()
def test_group_cache_reads_nothing_behind_a_short_prompt(width):
    """CHECKLIST 27. Garbage in the padding of prompts and in the room for new tokens is never seen."""
    model, new = make_model(), random_tokens(3, 4)
    cache = group_cache(model, prefill(model, PROMPTS), copies=1, room=4, width=width)
    padding = torch.arange(5) >= cache.prompt_lengths[:, None, None]  # [prompts, 1, P]
    cache.prompt_k.masked_fill_(padding[..., None], 1e3)
    cache.prompt_v.masked_fill_(padding[..., None], 1e3)
    cache.k.fill_(1e3)
    cache.v.fill_(1e3)
    parts = [step(cache, model, new[:, t]) for t in range(4)]
    texts = [prompt + new[row].tolist() for row, prompt in enumerate(PROMPTS)]
    for row, (prompt, expected) in enumerate(zip(PROMPTS, full_hidden(model, texts), strict=True)):
        torch.testing.assert_close(torch.stack(parts, dim=1)[row], expected[len(prompt) :], atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_row_that_is_handed_on_reads_nothing_of_what_it_held():
    """CHECKLIST 27. Rows of unequal age, out of order. A new prompt takes the place of one that has left."""
    model, new = make_model(), random_tokens(3, 6)
    cache = group_cache(model, prefill(model, PROMPTS), copies=1, room=6)
    for t in range(3):
        old = step(cache, model, new[:, t])
    cache.arrange([2, -1, 0], [0, 1, 2], [2, -1, 0])  # the second prompt leaves, first and last change places
    cache.fill([1], prefill(model, [[9, 8, 7, 6]]), [0])
    for t in range(3, 6):
        last = step(cache, model, torch.stack([new[2, t], new[1, t - 3], new[0, t]]))
    assert old.isfinite().all()
    texts = [PROMPTS[2] + new[2].tolist(), [9, 8, 7, 6, *new[1, :3].tolist()], PROMPTS[0] + new[0].tolist()]
    expected = torch.stack([hidden[-1] for hidden in full_hidden(model, texts)])
    torch.testing.assert_close(last, expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_prefill_equals_the_full_forward_and_pads_with_zeros():
    """CHECKLIST 27."""
    model, attend = make_model(), PrefillAttention([5, 1, 3])
    hidden = model.hidden_states(
        torch.tensor([i for prompt in PROMPTS for i in prompt]), attend.layout.positions(), attend
    )
    torch.testing.assert_close(hidden, torch.cat(full_hidden(model, PROMPTS)), atol=2e-5, rtol=0)
    padded = attend.padded(attend.keys, 7)
    assert padded.shape == (2, 3, 2, 7, 16)
    for layer, keys in enumerate(attend.keys):
        for row, own in enumerate(keys.split([5, 1, 3])):
            assert torch.equal(padded[layer, row, :, : len(own)], own.transpose(0, 1))
            assert (padded[layer, row, :, len(own) :] == 0).all()
