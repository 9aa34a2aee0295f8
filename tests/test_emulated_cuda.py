"""The emulated CUDA device computes as the CPU does, and refuses or counts as a GPU refuses or waits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from emulated_cuda import EmulatedCuda, EmulatedMps
from emulated_streams import CaptureError, Race
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

aten = torch.ops.aten


@pytest.fixture
def gpu():
    with EmulatedCuda() as device:
        yield device


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to("cuda")


# --- numbers and devices


def test_a_module_trains_as_on_the_cpu(gpu):
    def train(device: str) -> tuple[list[torch.Tensor], torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.LayerNorm(3)).to(device)
        ids = torch.tensor([1, 5, 5], device=device)
        loss = (net(ids) ** 2 * torch.arange(3.0, device=device)).sum()
        loss.backward()
        return [p.grad.cpu() for p in net.parameters()], loss.detach().cpu()

    (grads, loss), (expected, expected_loss) = train("cuda"), train("cpu")
    assert torch.equal(loss, expected_loss)
    for mine, reference in zip(grads, expected, strict=True):
        assert torch.equal(mine, reference)


def test_tensors_say_where_they_are(gpu):
    x = torch.zeros(3, device="cuda")
    assert x.device == torch.device("cuda", 0)
    assert x.is_cuda
    assert not x.is_cpu
    assert torch.zeros_like(x).device == x[1:].device == (x + 1).device == x.device
    assert x.cpu().device == x.to("cpu").device == torch.zeros(3).to(x.cpu()).device == torch.device("cpu")
    assert torch.zeros(3).to(x).device == torch.tensor([1], device="cuda").device == x.device
    assert nn.Linear(2, 2).to("cuda").weight.device == x.device
    assert x.to(torch.float16).dtype == x.cpu().to("cuda", torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.where(y > 0, x, x),
        lambda x, y: x[:2].copy_(x[:2].add(y[:2])),
        lambda x, y: F.linear(x[None], y[None]),
        lambda x, y: x.index_add_(0, torch.tensor([0, 1, 2]), x),
        lambda x, y: F.embedding(torch.tensor([0]), x[None]),
        lambda x, y: y[torch.tensor([0], device="cuda")],
        lambda x, y: x.gather(0, torch.tensor([0])),
    ],
)
def test_tensors_of_different_devices_are_refused(mix, gpu):
    """A forgotten `.to(device)`."""
    with pytest.raises(RuntimeError, match="same device"):
        mix(torch.ones(3, device="cuda"), torch.ones(3))


def test_a_gradient_on_the_host_is_refused(gpu):
    x = on_gpu(3).requires_grad_()
    with pytest.raises(RuntimeError, match="different device"):
        x.grad = torch.ones(3)
    x.grad = torch.ones_like(x)
    assert x.grad.is_cuda


def test_numbers_and_host_indices_are_allowed(gpu):
    x = on_gpu(4)
    assert (x + torch.tensor(2.0)).device == x.device
    before = sum(gpu.syncs.values())
    assert torch.equal(x[torch.tensor([3, 0])].cpu(), x.cpu()[[3, 0]])
    assert any("a host index" in line for line in gpu.syncs)
    assert sum(gpu.syncs.values()) > before


def test_numpy_needs_a_copy_first(gpu):
    with pytest.raises(TypeError, match="cpu"):
        on_gpu(3).numpy()


def test_a_tensor_is_of_no_use_after_the_device_is_gone():
    with EmulatedCuda():
        x = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="outside"):
        x + 1


# --- waits


@pytest.mark.parametrize(
    ("wait", "why"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: float(x[0]), "_local_scalar_dense"),
        (lambda x: bool(x[0] > 0), "_local_scalar_dense"),
        (lambda x: x.tolist(), "copy"),
        (lambda x: x.cpu(), "copy"),
        (lambda x: x.to("cpu", non_blocking=True), "copy"),
        (lambda x: torch.ones(3).to("cuda"), "copy"),
        (lambda x: torch.tensor([1, 2], device="cuda"), "copy"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "mask as index"),
        (lambda x: x.repeat_interleave(x.long() * 0 + 1), "repeat_interleave"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: torch.cuda.synchronize(), "synchronize"),
        (lambda x: torch.cuda.current_stream().synchronize(), "stream"),
    ],
)
def test_waits_are_counted_with_their_line(wait, why, gpu):
    x = on_gpu(3)
    gpu.syncs.clear()
    wait(x)
    assert sum(gpu.syncs.values()) == 1
    (line,) = gpu.syncs
    assert why in line
    assert "test_emulated_cuda.py:" in line
    assert "<lambda>" in line


def test_work_that_does_not_wait_is_not_counted(gpu):
    x, pinned = on_gpu(3), torch.empty(3, pin_memory=True)
    gpu.syncs.clear()
    y = (x * 2).softmax(0).view(3, 1).expand(3, 2).sum(0)
    y[0].add_(1)
    pinned.copy_(x, non_blocking=True)
    x.copy_(pinned, non_blocking=True)
    torch.where(x > 0, x, 0.0)
    assert not gpu.syncs
    pinned.copy_(x)
    assert sum(gpu.syncs.values()) == 1


# --- graphs


def record(step, pool=None) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph


def test_a_graph_replays_on_the_same_memory_and_does_nothing_while_recorded(gpu):
    x, total = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")

    def step() -> None:
        doubled = x * 2
        total.add_(doubled)
        total[0] = doubled[1]

    graph = record(step)
    assert total.tolist() == [0, 0, 0]
    for number in (1.0, 10.0):
        x.fill_(number)
        graph.replay()
    assert total.tolist() == [20, 22, 22]
    assert gpu.replays == 2
    assert len(gpu.captured) == 1


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x.sum().item(),
        lambda x: x.add_(1) if x[0] > 0 else None,
        lambda x: x.cpu(),
        lambda x: x.add_(torch.tensor([1.0, 2.0], device="cuda")),
        lambda x: x.copy_(torch.ones(2), non_blocking=True),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.Event().synchronize(),
        lambda x: x[torch.tensor([0])],
        lambda x: x.nonzero(),
        lambda x: record(lambda: x.add_(1)),
    ],
)
def test_what_a_capture_forbids(fault, gpu):
    x = torch.ones(2, device="cuda")
    with pytest.raises(CaptureError, match="not permitted"):
        record(lambda: fault(x))
    assert x.tolist() == [1, 1]
    assert gpu.recording is None


def test_a_pinned_copy_may_be_recorded(gpu):
    x, pinned = torch.zeros(2, device="cuda"), torch.ones(2, pin_memory=True)
    graph = record(lambda: x.copy_(pinned, non_blocking=True))
    pinned.fill_(7)
    graph.replay()
    assert x.tolist() == [7, 7]


def test_a_replay_on_freed_memory_is_refused(gpu):
    inputs, y = [torch.ones(2, device="cuda")], torch.zeros(2, device="cuda")
    graph = record(lambda: y.add_(inputs[0]))
    graph.replay()
    inputs.clear()
    with pytest.raises(CaptureError, match="freed"):
        graph.replay()


def test_results_inside_a_shared_pool_are_overwritten_by_the_next_graph(gpu):
    x, pool, results = torch.ones(2, device="cuda"), torch.cuda.graph_pool_handle(), []
    first, second = (record(lambda: results.append(x * 2), pool) for _ in range(2))
    first.replay()
    assert results[0].tolist() == [2, 2]
    second.replay()
    with pytest.raises(Race, match="overwritten"):
        results[0].tolist()


# --- streams


def transfer(gpu, leave_out: str = "") -> list[float]:
    """Copy 5 to the host and back on a side stream, with three waits. Each may be left out."""
    x, y = torch.zeros(2, device="cuda"), torch.zeros(2, device="cuda")
    pinned, side = torch.full((2,), -1.0, pin_memory=True), torch.cuda.Stream()
    x.fill_(5)
    if leave_out != "side waits for compute":
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        pinned.copy_(x, non_blocking=True)
        event = side.record_event()
    if leave_out != "host waits for the copy":
        event.synchronize()
    pinned.mul_(2)
    with torch.cuda.stream(side):
        y.copy_(pinned, non_blocking=True)
    if leave_out != "compute waits for side":
        torch.cuda.current_stream().wait_stream(side)
    z = y + 1
    torch.cuda.synchronize()
    return z.tolist()


def test_a_transfer_with_all_its_waits(gpu):
    assert transfer(gpu) == [11, 11]


@pytest.mark.parametrize("left_out", ["side waits for compute", "host waits for the copy", "compute waits for side"])
def test_a_missing_wait_is_found(left_out, gpu):
    with pytest.raises(Race, match="without a wait"):
        transfer(gpu, left_out)


@pytest.mark.parametrize("left_out", ["host waits for the copy", "compute waits for side"])
def test_copies_on_a_side_stream_happen_as_late_as_they_may(left_out):
    """Without the check for races, a missing wait leaves the numbers of before."""
    with EmulatedCuda(check_races=False) as gpu:
        assert transfer(gpu, left_out) != [11, 11]


def test_a_pinned_buffer_must_not_be_written_while_it_is_copied(gpu):
    x, pinned, side = torch.zeros(2, device="cuda"), torch.ones(2, pin_memory=True), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.copy_(pinned, non_blocking=True)
    with pytest.raises(Race, match="is read on stream"):
        pinned.zero_()


def test_parts_of_one_buffer_do_not_wait_for_each_other(gpu):
    """A flat buffer in which one part is computed while another is copied has no race. The same part has."""
    x, pinned, side = torch.ones(4, device="cuda"), torch.zeros(8, pin_memory=True), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        pinned[:4].copy_(x, non_blocking=True)
    x.record_stream(side)
    pinned[4:].add_(1)
    with pytest.raises(Race, match="is written on stream"):
        pinned[3:5].add_(1)


def test_memory_that_a_side_stream_still_reads_needs_record_stream(gpu):
    for recorded in (True, False):
        x, pinned, side = torch.ones(2, device="cuda"), torch.empty(2, pin_memory=True), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            pinned.copy_(x, non_blocking=True)
        if recorded:
            x.record_stream(side)
        del x
        if recorded:
            torch.ones(2, device="cuda")
            side.synchronize()
    with pytest.raises(Race, match="record_stream"):
        torch.ones(2, device="cuda") + 1


# --- memory


def test_memory_is_counted_and_runs_out():
    with EmulatedCuda(memory=4096) as gpu:
        x = torch.zeros(2, 256, device="cuda")
        view = x[1]
        assert gpu.allocated == torch.cuda.memory_allocated() == 2048
        y = x + 1
        assert torch.cuda.mem_get_info() == (0, 4096)
        with pytest.raises(torch.OutOfMemoryError):
            y + 1
        del x, y
        assert gpu.allocated == 2048, "a view keeps its block"
        del view
        assert gpu.allocated == 0
        assert gpu.peak == 4096


def test_gradients_and_saved_activations_count(gpu):
    x = torch.ones(1024, device="cuda", requires_grad=True)
    loss = (x.exp() * x).sum()
    assert gpu.allocated >= 2 * 4096
    loss.backward()
    del loss
    assert gpu.allocated == 2 * 4096  # the leaf and its gradient


def test_pinned_memory_is_counted_as_torch_reserves_it(gpu):
    a = torch.empty(1000, pin_memory=True)
    assert a.is_pinned()
    assert not torch.empty(3).is_pinned()
    assert (gpu.pinned, gpu.pinned_reserved) == (4000, 4096)
    b = torch.ones(3000).pin_memory()
    assert (gpu.pinned, gpu.pinned_reserved) == (16000, 4096 + 16384)
    del a, b
    c = torch.empty(900, pin_memory=True)  # a freed block is used again
    assert (gpu.pinned, gpu.pinned_reserved, c.numel()) == (3600, 4096 + 16384, 900)


# --- kernels


def test_attention_kernels_give_the_textbooks_numbers(gpu):
    q, k, v = (on_gpu(2, 3, n, 8, seed=n) for n in (5, 6, 6))
    expected = F.scaled_dot_product_attention(*(x.cpu() for x in (q, k, v)))
    out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    torch.testing.assert_close(out.cpu(), expected)
    scores = q.cpu() @ k.cpu().mT / 8**0.5
    torch.testing.assert_close(lse.cpu()[..., :5], scores.logsumexp(-1))
    assert lse.shape[-1] == 32
    assert lse.cpu()[..., 5:].isnan().all()
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v).cpu(), expected)


@pytest.mark.parametrize("kernel", ["varlen", "efficient"])
def test_kernels_of_variable_lengths_have_the_gradients_of_plain_attention(kernel, gpu):
    """Two sequences of 2 and 3 queries with 4 and 3 keys, causal from the bottom right."""
    dtype = torch.float32 if kernel == "efficient" else torch.bfloat16
    q, k, v = (on_gpu(n, 2, 8, dtype=dtype, seed=n).requires_grad_() for n in (5, 7, 8))
    v = v.detach()[:7].clone().requires_grad_()
    cu_q, cu_k = (torch.tensor(n, dtype=torch.int32, device="cuda") for n in ([0, 2, 5], [0, 4, 7]))
    if kernel == "varlen":
        out = varlen_attn(q, k, v, cu_q, cu_k, 3, 4, window_size=(-1, 0))
    else:
        batch = (x[None] for x in (q, k, v))
        out = aten._efficient_attention_forward(*batch, None, cu_q, cu_k, 3, 4, 0.0, 2, True)[0][0]
    weights = on_gpu(5, 2, 8, seed=9)
    grads = torch.autograd.grad((out.float() * weights).sum(), (q, k, v))
    exact = [x.detach().cpu().float().requires_grad_() for x in (q, k, v)]
    parts = []
    for rows, keys in ((slice(0, 2), slice(0, 4)), (slice(2, 5), slice(4, 7))):
        qs, ks, vs = (x[at].transpose(0, 1) for x, at in zip(exact, (rows, keys, keys), strict=True))
        mask = torch.ones(qs.shape[1], ks.shape[1], dtype=torch.bool).tril(ks.shape[1] - qs.shape[1])
        parts.append(F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask).transpose(0, 1))
    expected = torch.autograd.grad((torch.cat(parts) * weights.cpu()).sum(), exact)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(out.cpu().float(), torch.cat(parts), atol=tolerance, rtol=tolerance)
    for mine, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine.cpu().float(), reference, atol=tolerance, rtol=tolerance)


def efficient(q_shape=(2, 2, 1, 8), keys=16, dtype=torch.float32, mask_line=None, mask_dtype=None):
    q = torch.zeros(q_shape, dtype=dtype, device="cuda")
    k = torch.zeros(*q_shape[:2], keys, q_shape[3], dtype=dtype, device="cuda")
    mask = None
    if mask_line is not None:
        mask = torch.zeros(q_shape[0], 1, 1, mask_line, dtype=mask_dtype or dtype, device="cuda")[..., :keys]
        mask = mask.expand(-1, q_shape[1], q_shape[2], -1)
    return aten._scaled_dot_product_efficient_attention(q, k, k, mask, True)


def varlen(dtype=torch.bfloat16, size=8, cu=(0, 2, 5), longest=3, lengths_dtype=torch.int32):
    q = torch.zeros(5, 2, size, dtype=dtype, device="cuda")
    cu = torch.tensor(cu, dtype=lengths_dtype, device="cuda")
    return varlen_attn(q, q, q, cu, cu, longest, longest, window_size=(-1, 0))


def efficient_varlen(dtype=torch.float32, size=8, cu=(0, 2, 5), longest=3, batch=1):
    q = torch.zeros(batch, 5, 2, size, dtype=dtype, device="cuda")
    cu = torch.tensor(cu, dtype=torch.int32, device="cuda")
    return aten._efficient_attention_forward(q, q, q, None, cu, cu, longest, longest, 0.0, 2, True)


def only_efficient(q_shape=(1, 2, 3, 8), dtype=torch.float32, **options):
    q = torch.zeros(q_shape, dtype=dtype, device="cuda")
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return F.scaled_dot_product_attention(q, q, q, **options)


@pytest.mark.parametrize(
    ("capability", "call", "refused"),
    [
        ((8, 0), efficient, None),
        ((8, 0), lambda: efficient(mask_line=16), None),
        ((8, 0), lambda: efficient(keys=9, mask_line=9), "not correctly aligned"),
        ((8, 0), lambda: efficient(keys=9, mask_line=16), None),
        ((8, 0), lambda: efficient(keys=12, mask_line=12), None),
        ((8, 0), lambda: efficient(keys=12, mask_line=12, dtype=torch.bfloat16), "not correctly aligned"),
        ((8, 0), lambda: efficient(mask_line=16, mask_dtype=torch.float16), "dtype"),
        ((8, 0), lambda: efficient(q_shape=(2, 2, 0, 8)), "nothing to attend to"),
        ((8, 0), lambda: efficient(keys=0), "nothing to attend to"),
        ((8, 0), lambda: efficient(q_shape=(2, 2, 1, 6)), "aligned"),
        ((7, 5), lambda: efficient(q_shape=(2, 2, 1, 6)), None),
        ((7, 5), lambda: efficient(q_shape=(2, 2, 1, 6), dtype=torch.float16), "aligned"),
        ((7, 5), lambda: efficient(dtype=torch.float16), None),
        ((7, 5), lambda: efficient(dtype=torch.bfloat16), "compute capability"),
        ((8, 0), varlen, None),
        ((9, 0), lambda: varlen(dtype=torch.float16), None),
        ((7, 5), varlen, "Ampere"),
        ((8, 0), lambda: varlen(dtype=torch.float32), "fp16 and bf16"),
        ((8, 0), lambda: varlen(size=12), "multiple of 8"),
        ((8, 0), lambda: varlen(size=264), "256"),
        ((8, 0), lambda: varlen(cu=(0, 2, 2, 5)), "length 0"),
        ((8, 0), lambda: varlen(longest=4), "longest"),
        ((8, 0), lambda: varlen(cu=(0, 2, 4), longest=2), "rows"),
        ((8, 0), lambda: varlen(lengths_dtype=torch.int64), "int32"),
        ((7, 5), efficient_varlen, None),
        ((7, 5), lambda: efficient_varlen(dtype=torch.float16), None),
        ((7, 5), lambda: efficient_varlen(dtype=torch.bfloat16), "compute capability"),
        ((8, 0), lambda: efficient_varlen(cu=(0, 2, 2, 5)), "length 0"),
        ((8, 0), lambda: efficient_varlen(batch=2), "batch_size=1"),
        ((8, 0), lambda: efficient_varlen(size=6), "aligned"),
        ((8, 0), only_efficient, None),
        ((8, 0), lambda: only_efficient((1, 2, 0, 8)), "No available kernel"),
        ((8, 0), lambda: only_efficient(enable_gqa=True), "No available kernel"),
        ((8, 0), lambda: only_efficient((1, 2, 3, 6)), "No available kernel"),
        ((7, 5), lambda: only_efficient(dtype=torch.bfloat16), "No available kernel"),
    ],
)
def test_kernel_conditions(capability, call, refused):
    with EmulatedCuda(capability):
        if refused is None:
            call()
            return
        with pytest.raises(RuntimeError, match=refused):
            call()


# --- the GPU of a Mac


def test_a_mac_has_no_fp64():
    with EmulatedMps():
        x = torch.ones(3).to("mps")
        assert x.device == torch.device("mps", 0)
        assert not x.is_cuda
        assert (x + 1).tolist() == [2, 2, 2]
        for fault in (
            lambda: torch.ones(3, dtype=torch.float64).to("mps"),
            lambda: x.double(),
            lambda: torch.tensor([1.0], dtype=torch.float64, device="mps"),
            lambda: x.sum(dtype=torch.float64),
        ):
            with pytest.raises(TypeError, match="float64"):
                fault()
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
