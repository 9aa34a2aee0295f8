"""Properties that only a CUDA device can show: its kernels, graphs, streams and allocator against the CPU's twin of
each.

python -m pytest -m gpu
"""

from __future__ import annotations

import pytest
import torch
from conftest import make_config, make_model
from test_attention import LAYOUTS, G, H, K, gradients, random_qkv
from test_generation import PROMPTS, response_ids, stopping_model

from model.attention import EagerAttention, PackedAttention, attend_each_run
from model.flash_cpu import attend_lse
from optimizer import MemoryEfficientAdamW
from rollout import generation
from rollout.decode_graph import Recorder, cuda_capture
from rollout.generation import generate
from rollout.group_cache import _hide_behind
from rollout.sampling import SamplingParams

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


# --- generation


@pytest.mark.parametrize("options", [{"graphs": True}, {"graphs": False}], ids=str)
@pytest.mark.parametrize("max_rows", [512, 9])
@pytest.mark.parametrize(
    "params", [{"n": 3}, {"n": 12}, {"n": 1, "temperature": 0.0}, {"n": 3, "stop": ("e",)}], ids=str
)
def test_answers_are_those_of_the_cpu(options, max_rows, params, tokenizer):
    """CHECKLIST 27, CHECKLIST 38. fp32: id for id, with and without graphs."""
    model = stopping_model(1.0)
    params = SamplingParams(max_new_tokens=150, **params)
    expected = generate(model, PROMPTS, params, tokenizer=tokenizer)
    found = generate(model.to(DEVICE), PROMPTS, params, tokenizer=tokenizer, max_rows=max_rows, **options)
    assert response_ids(found) == response_ids(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-3, rtol=0)


@pytest.mark.parametrize("graphs", [True, False])
def test_bf16_answers_are_scored_as_training_scores_them(graphs, tokenizer):
    """CHECKLIST 2. The sampler's log-probabilities against one fp32 forward of the same bf16 weights."""
    model = make_model(make_config(head_dim=32)).bfloat16()
    params = SamplingParams(n=8, max_new_tokens=40)
    completions = generate(model.to(DEVICE), PROMPTS, params, tokenizer=tokenizer, graphs=graphs)
    reference, differences = model.float().cpu(), []
    for c in completions:
        with torch.no_grad():
            logits = reference(torch.tensor([c.prompt_ids + c.response_ids]))[0, len(c.prompt_ids) - 1 : -1, :259]
        expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(c.response_ids)[:, None])[:, 0]
        differences.append((torch.tensor(c.logprobs) - expected).abs())
    assert torch.cat(differences).mean() < 0.03


def test_logits_that_are_not_finite_leave_the_device_usable(tokenizer):
    """CHECKLIST 44."""
    model = make_model().to(DEVICE)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        generate(model, PROMPTS, SamplingParams(n=2), tokenizer=tokenizer)
    assert torch.ones(3, device=DEVICE).sum().item() == 3


def test_weights_that_change_between_rollouts_are_seen_by_graphs(tokenizer):
    """CHECKLIST 28."""
    model = make_model().to(DEVICE)
    params = SamplingParams(n=4, max_new_tokens=40)
    first = generate(model, PROMPTS, params, tokenizer=tokenizer)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    second = generate(model, PROMPTS, params, tokenizer=tokenizer)
    assert response_ids(second) == response_ids(generate(model, PROMPTS, params, tokenizer=tokenizer, graphs=False))
    assert response_ids(second) != response_ids(first)


def test_a_rollout_gives_its_memory_back(tokenizer):
    """Graphs, their pool and the cache: memory after three rollouts equals memory after one."""
    model, held = make_model().to(DEVICE), []
    for _ in range(3):
        generate(model, PROMPTS, SamplingParams(n=8, max_new_tokens=100), tokenizer=tokenizer)
        held.append(torch.cuda.memory_allocated())
    assert held[2] <= held[0]


def test_out_of_memory_halves_the_rows_and_gives_the_same_answers(tokenizer, monkeypatch):
    model, params, real, sizes = make_model().to(DEVICE), SamplingParams(n=3, max_new_tokens=20), generation.decode, []
    whole = generate(model, PROMPTS, params, tokenizer=tokenizer)

    def crowded(model, ids, uniforms, params, tokenizer, rows, capture):
        sizes.append(rows)
        if rows > 3:
            torch.empty(2**50, device=DEVICE)
        return real(model, ids, uniforms, params, tokenizer, rows, capture)

    monkeypatch.setattr(generation, "decode", crowded)
    assert response_ids(generate(model, PROMPTS, params, tokenizer=tokenizer, max_rows=12)) == response_ids(whole)
    assert sizes == [12, 6, 3]


def test_a_recorded_graph_replays_on_new_numbers():
    x, total = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    recorder = Recorder(lambda: total.add_(x), cuda_capture())
    for number in range(1, 5):
        x.fill_(number)
        recorder("shape")
    assert total.tolist() == [10.0] * 8


# --- attention


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_attention_equals_eager(layout, dtype):
    """CHECKLIST 10, CHECKLIST 11. Variable-length attention in bf16, the memory-efficient kernel in fp32."""
    qkv = [x.to(dtype) for x in random_qkv(layout.n_rows, H, G, K)]
    weights = torch.randn(layout.n_rows, H, K, generator=torch.Generator().manual_seed(5))
    expected, expected_grads = gradients(EagerAttention(layout.mask()), [x.float() for x in qkv], weights)
    out, grads = gradients(PackedAttention(layout), [x.to(DEVICE) for x in qkv], weights.to(DEVICE))
    out_tolerance, grad_tolerance = (1e-4, 1e-3) if dtype == torch.float32 else (0.03, 0.04)
    torch.testing.assert_close(out.cpu().float(), expected, atol=out_tolerance, rtol=out_tolerance)
    for gradient, reference in zip(grads, expected_grads, strict=True):
        scale = reference.abs().max().clamp(min=1)
        assert (gradient.cpu().float() - reference).abs().max() < grad_tolerance * scale


def test_the_run_by_run_twin_agrees_in_fp32():
    layout = LAYOUTS["long"]
    qkv = random_qkv(layout.n_rows)
    out = attend_each_run(layout, *(x.to(DEVICE) for x in qkv)).cpu()
    torch.testing.assert_close(out, EagerAttention(layout.mask())(0, *qkv), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 37, 128])
@pytest.mark.parametrize("masked", [True, False])
def test_decode_attention_and_its_log_sum_exp_equal_the_cpus(size, masked, dtype):
    generator = torch.Generator().manual_seed(size)
    q, k, v = (torch.randn(5, 2, n, 64, generator=generator).to(dtype) for n in (7, size, size))
    mask = _hide_behind(torch.arange(5).remainder(size) + 1, size, dtype) if masked else None
    expected, expected_lse = attend_lse(q.double(), k.double(), v.double(), None if mask is None else mask.double())
    q, k, v = (x.to(DEVICE) for x in (q, k, v))
    mask = _hide_behind(torch.arange(5, device=DEVICE).remainder(size) + 1, size, dtype) if masked else None
    out, lse = attend_lse(q, k, v, mask)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(out.cpu().double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.cpu().double(), expected_lse.double(), atol=tolerance, rtol=tolerance)


# --- optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_optimizer_steps_equal_the_cpus(dtype):
    """CHECKLIST 32. Copies on the side stream: gradients rewritten right after a step, weights read right after it."""
    shapes = [(300, 700), (1,), (2_000_003,), (64, 64)]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    params = {device: [w.clone().to(device).requires_grad_() for w in weights] for device in ("cpu", DEVICE)}
    optimizers = {device: MemoryEfficientAdamW(p, lr=1e-2, weight_decay=0.1) for device, p in params.items()}
    for _ in range(4):
        grads = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        for device, optimizer in optimizers.items():
            for p, grad in zip(params[device], grads, strict=True):
                p.grad = grad.to(device) if p.grad is None else p.grad.copy_(grad)
            optimizer.step()
            for p in params[device]:
                p.grad.fill_(torch.nan)
        for mine, reference in zip(params[DEVICE], params["cpu"], strict=True):
            torch.testing.assert_close(mine.cpu(), reference, atol=1e-6, rtol=1e-5)


def test_optimizer_state_takes_nothing_of_the_gpu():
    """CHECKLIST 31."""
    params = [torch.randn(1000, 1000, device=DEVICE, dtype=torch.bfloat16).requires_grad_()]
    params[0].grad = torch.ones_like(params[0])
    optimizer, before = MemoryEfficientAdamW(params), torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert optimizer.state_bytes() >= 3 * 4 * 10**6
