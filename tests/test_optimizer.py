"""MemoryEfficientAdamW against torch.optim.AdamW, and the order in which copies are waited for."""

from __future__ import annotations

import contextlib
import itertools

import emulated_streams
import pytest
import torch
from emulated_cuda import EmulatedCuda
from torch import nn

import optimizer as optimizer_module
from optimizer import MemoryEfficientAdamW, _Ring, adamw_, learning_rate

SHAPES = [(7, 5), (1,), (33,), (3, 2, 4), (0,)]  # odd sizes, and nothing at all
SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6}


def make_parameters(dtype=torch.float32, seed=0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(parameters: list[nn.Parameter], step: int, missing: bool = False) -> None:
    """The same gradients for the same step. With `missing`, each parameter goes without one now and then."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(parameters):
        grad = torch.randn(p.shape, generator=generator) * 10 ** ((step + i) % 5 - 2)
        p.grad = None if missing and (step + i) % 3 == 0 else grad.to(p.dtype)


def two_groups(parameters, weight_decay):
    return [
        {"params": parameters[:2], "weight_decay": weight_decay},
        {"params": parameters[2:], "lr": 1e-2, "weight_decay": 0.0},
    ]


def assert_equal_states(mine, theirs, parameters, references, names):
    for p, q in zip(parameters, references):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)
        for name in names:
            if q in theirs.state:
                torch.testing.assert_close(mine.state[p][name], theirs.state[q][name], rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("weight_decay", "amsgrad", "mode"),
    list(itertools.product((0.0, 0.3), (False, True), ("fused", "written out"))),
)
def test_equals_torchs_adamw(monkeypatch, weight_decay, amsgrad, mode):
    """CHECKLIST 30: 100 steps, two groups, gradients that are missing now and then: parameters and all moments.

    A slice is 8 elements here, so that most parameters are cut and the last slice is not full.
    """
    monkeypatch.setattr(optimizer_module, "SLICE", 8)
    parameters, references = make_parameters(), make_parameters()
    mine = MemoryEfficientAdamW(
        two_groups(parameters, weight_decay), amsgrad=amsgrad, fused=mode == "fused",
        **SETTINGS,
    )  # fmt: skip
    theirs = torch.optim.AdamW(two_groups(references, weight_decay), amsgrad=amsgrad, foreach=False, **SETTINGS)
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if amsgrad else 2]
    for step in range(100):
        for all_parameters in (parameters, references):
            set_gradients(all_parameters, step, missing=True)
        mine.step()
        theirs.step()
    assert_equal_states(mine, theirs, parameters, references, names)


@pytest.mark.parametrize("fused", [True, False])
def test_a_bf16_models_masters_are_torchs_adamw_in_fp32(fused):
    """CHECKLIST 30, for weights that are not fp32: the masters walk as fp32 weights would, and the weights are the
    masters, rounded."""
    parameters = make_parameters(torch.bfloat16)
    references = [nn.Parameter(p.detach().float()) for p in parameters]
    mine = MemoryEfficientAdamW(parameters, weight_decay=0.1, fused=fused, **SETTINGS)
    theirs = torch.optim.AdamW(references, weight_decay=0.1, foreach=False, **SETTINGS)
    for step in range(100):
        set_gradients(parameters, step)
        for p, q in zip(parameters, references):
            q.grad = p.grad.float()
        mine.step()
        theirs.step()
    for p, q in zip(parameters, references):
        master = mine.state[p]["master"]
        assert master.dtype == torch.float32
        torch.testing.assert_close(master, q.detach(), rtol=2e-6, atol=2e-7)
        assert torch.equal(p, master.to(torch.bfloat16))


def test_epsilon_comes_after_the_bias_correction():
    """CHECKLIST 30: one step from nothing moves a weight by lr * g / (|g| + eps), also where g is as small as eps."""
    weight, grad, first, second = torch.zeros(1), torch.full((1,), 1e-3), torch.zeros(1), torch.zeros(1)
    adamw_(weight, grad, first, second, None, 1.0, lr=0.1, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.0)
    torch.testing.assert_close(weight, torch.tensor([-0.05]))


def test_updates_below_bf16_rounding_add_up():
    """CHECKLIST 29: a hundred steps of 1e-6 move bf16 weights of 0.02, whose neighbours are 1e-4 away."""
    start = torch.linspace(0.0195, 0.0205, 1001).bfloat16()
    weight = nn.Parameter(start.clone())
    masterless = nn.Parameter(start.clone())
    mine, plain = MemoryEfficientAdamW([weight], lr=1e-6), torch.optim.AdamW([masterless], lr=1e-6, weight_decay=0.0)
    initial = None
    for _ in range(100):
        for p, optimizer in ((weight, mine), (masterless, plain)):
            p.grad = torch.ones_like(p)
            optimizer.step()
        initial = mine.state[weight]["master"].clone() if initial is None else initial
    torch.testing.assert_close(
        mine.state[weight]["master"], start.float() - 1e-4, rtol=0, atol=2e-6
    )  # a hundred steps of 1e-6
    assert (weight != start).float().mean() > 0.5
    assert torch.equal(masterless, start)  # what masters are for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transposed_parameter_moves_like_a_contiguous_one(dtype):
    """Flat slices of a parameter that is not contiguous are copies: they have to be written back."""
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    parameter, reference = nn.Parameter(base.clone().t()), nn.Parameter(base.clone().t().contiguous())
    mine, theirs = MemoryEfficientAdamW([parameter], **SETTINGS), MemoryEfficientAdamW([reference], **SETTINGS)
    for step in range(5):
        grad = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        parameter.grad, reference.grad = grad.clone().t().contiguous().t(), grad.clone()
        mine.step()
        theirs.step()
    assert not torch.equal(reference, base.t())
    assert torch.equal(parameter, reference)


# --- state


def trained(dtype, steps, parameters=None, **options):
    parameters = parameters or make_parameters(dtype)
    optimizer = MemoryEfficientAdamW(parameters, **SETTINGS, **options)
    for step in range(steps):
        set_gradients(parameters, step)
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1}, {"place": "device"}])
def test_the_state_comes_back_exactly_and_training_goes_on_as_if_nothing_had_happened(dtype, options):
    """CHECKLIST 42, of the optimizer: 10 steps are 4 steps, a round trip, and 6 steps, bit for bit."""
    straight, whole = trained(dtype, 10, **options)
    first, before = trained(dtype, 4, **options)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    after = MemoryEfficientAdamW(second, lr=123.0, **({k: v for k, v in options.items() if k == "place"}))
    after.load_state_dict(before.state_dict())
    assert after.param_groups[0]["lr"] == SETTINGS["lr"]
    for index, p in enumerate(first):
        for name, value in before.state[p].items():
            assert torch.equal(after.state[second[index]][name], value), name
    for step in range(4, 10):
        set_gradients(second, step)
        after.step()
    for p, q in zip(straight, second):
        assert torch.equal(p, q)
        for name, value in whole.state[p].items():
            assert torch.equal(value, after.state[q][name]), name


def test_loaded_moments_stay_fp32_on_the_cpu_and_are_copies():
    """CHECKLIST 31: torch's own load_state_dict casts them to the parameter's bf16."""
    parameters, before = trained(torch.bfloat16, 3)
    again = [nn.Parameter(p.detach().clone()) for p in parameters]
    after = MemoryEfficientAdamW(again)
    after.load_state_dict(before.state_dict())
    for p, q in zip(parameters, again):
        for name in ("exp_avg", "exp_avg_sq", "master"):
            value = after.state[q][name]
            assert value.dtype == torch.float32
            assert value.device.type == "cpu"
            assert value.numel() == 0 or value.data_ptr() != before.state[p][name].data_ptr()


def test_the_state_of_another_model_is_refused():
    """CHECKLIST 46"""
    _, optimizer = trained(torch.float32, 1)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"groups of \[5\] parameters, the model has \[1\]"):
        MemoryEfficientAdamW(make_parameters()[:1]).load_state_dict(state)
    others = [nn.Parameter(torch.zeros(9)), *make_parameters()[1:]]
    with pytest.raises(ValueError, match=r"0.exp_avg has shape \(7, 5\), expected \(9,\)"):
        MemoryEfficientAdamW(others).load_state_dict(state)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}, {"weight_decay": -0.1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="expected none below 0"):
        MemoryEfficientAdamW(make_parameters(), **wrong)


def test_a_bf16_parameter_costs_twelve_bytes_and_an_fp32_one_eight():
    for dtype, bytes_each in ((torch.bfloat16, 12), (torch.float32, 8)):
        parameters, optimizer = trained(dtype, 1)
        elements, steps = sum(p.numel() for p in parameters), 4 * len(parameters)
        assert optimizer.state_bytes() == bytes_each * elements + steps


# --- schedule


def test_the_rate_rises_evenly_and_then_stays_or_falls_along_a_cosine():
    rates = [learning_rate(step, 1.0, "constant", 4, 10) for step in range(1, 11)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1, 1, 1, 1, 1, 1]
    rates = [learning_rate(step, 1.0, "cosine", 4, 10, min_ratio=0.1) for step in range(1, 11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0  # the first step of the cosine has the full rate
    assert rates[7] == pytest.approx(0.55)  # half way: half between 1 and 0.1
    assert rates[9] > 0.1
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert learning_rate(11, 1.0, "cosine", 4, 10, min_ratio=0.1) == pytest.approx(0.1)
    assert learning_rate(12, 1.0, "cosine", 4, 10, min_ratio=0.1) == pytest.approx(0.1)  # past the end: stays


def test_no_step_of_a_cosine_run_is_at_rate_0():
    """A run of one step learns at the full rate, and the last step of a longer one still learns."""
    assert learning_rate(1, 1.0, "cosine", 0, 1) == 1.0
    for steps in (2, 3, 10):
        assert min(learning_rate(step, 1.0, "cosine", 0, steps) for step in range(1, steps + 1)) > 0


# --- state on the device, and copies in flight


def moved(parameters: list[nn.Parameter], device: str) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().to(device)) for p in parameters]


def set_gradients_on_gpu(parameters: list[nn.Parameter], step: int) -> None:
    host = make_parameters(parameters[0].dtype)
    set_gradients(host, step)
    grads = [q.grad.to("cuda") for q in host]
    for p, grad in zip(parameters, grads):
        p.grad = grad.clone()  # work of the device, for which the host has not waited


@pytest.fixture
def small_slices(monkeypatch):
    """Slices of 8 elements and a ring of 2 slots: most parameters are cut, and every slot is used again."""
    monkeypatch.setattr(optimizer_module, "SLICE", 8)
    monkeypatch.setattr(optimizer_module, "DEVICE_SLICE", 8)
    monkeypatch.setattr(optimizer_module, "SLOTS", 2)


@pytest.mark.parametrize("factor", [1.0, 0.125])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("fused", [True, False])
def test_steps_on_a_gpu_leave_the_numbers_of_the_cpu(place, dtype, factor, fused, small_slices):
    """CHECKLIST 32. Bit for bit: weights, masters and moments, although every copy lands as late as it may. Gradients
    are overwritten right after a step, and weights are read right after it."""
    references = make_parameters(dtype)
    with EmulatedCuda():
        parameters = moved(references, "cuda")
        mine = MemoryEfficientAdamW(parameters, place=place, fused=fused, weight_decay=0.1, **SETTINGS)
        theirs = MemoryEfficientAdamW(references, fused=fused, weight_decay=0.1, **SETTINGS)
        for step in range(4):
            set_gradients(references, step, missing=True)
            for p, q in zip(parameters, references):
                p.grad = None if q.grad is None else q.grad.to("cuda")
            mine.step(gradient_factor=factor)
            theirs.step(gradient_factor=factor)
            for p, q in zip(parameters, references):
                if p.grad is not None:
                    p.grad.fill_(torch.nan)
                assert torch.equal(p.detach().cpu(), q.detach())
        for p, q in zip(parameters, references):
            assert p not in mine.state or mine.state[p]["exp_avg"].device == (
                p.device if place == "device" else q.device
            )
            for name, value in theirs.state[q].items():
                own = mine.state[p].get(name, p.detach())
                assert own.dtype == torch.float32
                assert torch.equal(own.cpu(), value), name


def test_a_factor_is_applied_in_fp32_and_the_gradient_stays_as_it_is():
    """A loss scale of 2^16 divides a gradient of 2^-9 to 2^-25, which fp16 rounds to 0."""
    weight, reference = nn.Parameter(torch.ones(3).half()), nn.Parameter(torch.ones(3))
    mine, theirs = MemoryEfficientAdamW([weight], **SETTINGS), MemoryEfficientAdamW([reference], **SETTINGS)
    weight.grad, reference.grad = torch.full((3,), 2.0**-9).half(), torch.full((3,), 2.0**-25)
    mine.step(gradient_factor=2.0**-16)
    theirs.step()
    assert torch.equal(mine.state[weight]["master"], reference.detach())
    assert torch.equal(mine.state[weight]["exp_avg"], theirs.state[reference]["exp_avg"])
    assert (weight.grad == 2.0**-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["host", "device"])
def test_a_transposed_parameter_on_a_gpu_moves_like_a_contiguous_one(place, dtype, small_slices):
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    reference = nn.Parameter(base.clone().t().contiguous())
    with EmulatedCuda():
        parameter = nn.Parameter(base.to("cuda").t())
        mine, theirs = MemoryEfficientAdamW([parameter], place=place), MemoryEfficientAdamW([reference])
        for step in range(3):
            grad = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
            parameter.grad, reference.grad = grad.t().contiguous().to("cuda").t(), grad
            mine.step()
            theirs.step()
        assert torch.equal(parameter.detach().cpu(), reference.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "second"), [("host", "device"), ("device", "host"), ("device", "device")])
def test_the_state_can_be_loaded_at_another_place(first, second, dtype):
    """CHECKLIST 31. A run that goes on with another --optimizer-state goes on with the same numbers."""
    with EmulatedCuda():
        straight, split = (moved(make_parameters(dtype), "cuda") for _ in range(2))
        before = MemoryEfficientAdamW(split, place=first, **SETTINGS)
        whole = MemoryEfficientAdamW(straight, place=first, **SETTINGS)
        for step in range(4):
            if step == 2:
                saved = before.state_dict()
                before = MemoryEfficientAdamW(split, place=second, **SETTINGS)
                before.load_state_dict(saved)
            for parameters in (straight, split):
                set_gradients_on_gpu(parameters, step)
            whole.step()
            before.step()
        for p, q in zip(straight, split):
            assert torch.equal(p, q)
            assert before.state[q]["exp_avg"].device.type == ("cuda" if second == "device" else "cpu")


def test_updates_below_bf16_rounding_add_up_on_the_device_too():
    """CHECKLIST 29."""
    with EmulatedCuda():
        weight = nn.Parameter(torch.linspace(0.0195, 0.0205, 101).bfloat16().to("cuda"))
        start, optimizer = weight.detach().clone(), MemoryEfficientAdamW([weight], lr=1e-6, place="device")
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        assert (weight != start).float().mean() > 0.5


def test_pinned_memory_does_not_grow_with_the_model():
    """One ring serves gradients and weights of all parameters, and torch rounds it up by nothing to speak of."""
    with EmulatedCuda() as gpu:
        parameters = [nn.Parameter(torch.zeros(n, dtype=torch.bfloat16, device="cuda")) for n in (3, 40, 9) * 20]
        optimizer = MemoryEfficientAdamW(parameters)
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert gpu.pinned == optimizer.pinned_bytes() == 32 * 40 * 2, "32 slots of the largest slice, in bf16"
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert gpu.pinned == optimizer.pinned_bytes(), "a second step needs no more"


def step_on_gpu(skipped: str = "") -> None:
    with EmulatedCuda() as gpu, waits_left_out(skipped):
        parameters = moved(make_parameters(torch.bfloat16), "cuda")
        optimizer = MemoryEfficientAdamW(parameters, **SETTINGS)
        for step in range(2):
            set_gradients_on_gpu(parameters, step)
            optimizer.step()
            for p in parameters:
                p.grad.zero_()
                p.detach().add_(1)
        assert gpu.launches > 0


@contextlib.contextmanager
def waits_left_out(method: str):
    """Plant a fault: the waits inside one method of `_Ring` are left out."""
    if not method:
        yield
        return
    real = getattr(_Ring, method)

    def without(self, *args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(emulated_streams.Stream, "wait_stream", lambda *_: None)
            patch.setattr(emulated_streams.Event, "synchronize", lambda *_: None)
            return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Ring, method, without)
        yield


def test_every_wait_of_the_ring_is_needed(small_slices):
    """CHECKLIST 32. The step as it is has no race. With any of its waits left out the emulated device finds one."""
    step_on_gpu()
    for method in ("begin", "wait", "finish"):
        with pytest.raises(emulated_streams.Race):
            step_on_gpu(skipped=method)
