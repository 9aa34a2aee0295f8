"""run/device.py: the device and the type of a run follow the machine, and a machine that cannot is told in one line."""

from __future__ import annotations

import pytest
import torch
from conftest import make_config, message_of
from emulated_cuda import EmulatedCuda, EmulatedMps

from run import device
from run.config import Config
from run.device import check_dtype, choose_device, choose_dtype, cuda_problem
from run.pretrained import load_policy

LARGE = make_config(hidden_size=896, num_hidden_layers=24, head_dim=64)
CPU = torch.device("cpu")
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version\nfrom the URL: http://www.nvidia.com/Download/index.aspx"
)


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((6, 1), torch.float32, "no fast 16-bit products"), ((7, 0), torch.float16, "7.0"),
        ((7, 5), torch.float16, "computes in fp16 and not in bf16"), ((8, 0), torch.bfloat16, "8.0"),
        ((8, 9), torch.bfloat16, "8.9"), ((12, 0), torch.bfloat16, "12.0"),
    ],
)  # fmt: skip
def test_auto_takes_the_type_that_a_card_computes_in(capability, dtype, reason):
    with EmulatedCuda(capability):
        found, why = choose_dtype("auto", choose_device("auto"), LARGE)
    assert found == dtype
    assert reason in why


@pytest.mark.parametrize(("products", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_bf16_on_a_cpu_only_with_its_instructions(products, dtype, monkeypatch):
    monkeypatch.setattr(device, "has_bf16_products", lambda: products)
    found, reason = choose_dtype("auto", CPU, LARGE)
    assert found == dtype
    assert "bf16" in reason


def test_auto_takes_fp32_for_a_tiny_model_and_an_asked_type_as_it_is():
    with EmulatedCuda():
        assert choose_dtype("auto", torch.device("cuda"), make_config())[0] == torch.float32
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
            assert choose_dtype(name, torch.device("cuda"), LARGE) == (dtype, "as asked for")


@pytest.mark.parametrize(("macos", "dtype"), [((14, 0), torch.bfloat16), ((13, 3), torch.float16)])
def test_a_mac_computes_in_bf16_from_macos_14_on(macos, dtype, monkeypatch):
    monkeypatch.setattr(EmulatedMps, "macos", macos)
    with EmulatedMps():
        device = choose_device("auto")
        assert device.type == "mps"
        assert choose_dtype("auto", device, LARGE)[0] == dtype
        if macos < (14, 0):
            with pytest.raises(ValueError, match="from macOS 14 on"):
                check_dtype("bf16", device)


@pytest.mark.parametrize(("name", "products", "warned"), [("bf16", True, 0), ("bf16", False, 1), ("fp16", True, 1)])
def test_a_type_that_is_slow_on_a_cpu_is_taken_with_a_warning(name, products, warned, monkeypatch, caplog):
    monkeypatch.setattr(device, "has_bf16_products", lambda: products)
    for _ in range(2):
        check_dtype(name, CPU)
    assert len(caplog.records) == warned
    assert all("--dtype fp32" in record.message for record in caplog.records)


def test_bf16_on_an_old_card_is_refused_in_one_line():
    with EmulatedCuda((7, 5)):
        with pytest.raises(ValueError, match=r"compute capability 7\.5") as error:
            check_dtype("bf16", torch.device("cuda"))
        for name in ("auto", "fp16", "fp32"):
            check_dtype(name, torch.device("cuda"))
    assert "--dtype fp16" in message_of(error)


def test_a_head_size_without_a_kernel_is_refused_before_the_weights_are_read(tmp_path):
    """config.json is there, model.safetensors is not."""
    import json

    (tmp_path / "config.json").write_text(json.dumps(make_config(head_dim=6).to_dict(torch.float32)))
    with EmulatedCuda(), pytest.raises(ValueError, match="size 6") as error:
        load_policy(Config(device="cuda"), tmp_path)
    assert "--device cpu" in message_of(error)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"--device {name}") as error:
        choose_device(name)
    assert "take --device cpu" in message_of(error)


@pytest.fixture(autouse=True)
def _no_warning_was_given():
    device._warn_once.cache_clear()


@pytest.fixture
def broken_driver(monkeypatch):
    """A GPU whose driver is older than the wheel, as torch reports it."""

    def init():
        raise RuntimeError(TOO_OLD)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)


def test_auto_says_that_a_driver_is_too_old(broken_driver, caplog):
    """CHECKLIST 64. A run of hours on the CPU beside a GPU begins with one line that says why."""
    assert choose_device("auto") == CPU
    (record,) = caplog.records
    assert "the GPU is not used" in record.message
    assert "too old (found version 11040)" in record.message
    assert "CUDA 13.0" in record.message
    assert "\n" not in record.message


def test_cuda_with_a_driver_that_is_too_old_is_refused_with_the_reason(broken_driver):
    with pytest.raises(ValueError, match="too old") as error:
        choose_device("cuda")
    assert "--device cuda" in message_of(error)


@pytest.mark.parametrize("reason", ["Found no NVIDIA driver on your system", "No CUDA GPUs are available"])
def test_a_machine_without_a_gpu_is_told_nothing(reason, broken_driver, monkeypatch, caplog):
    def init():
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.cuda, "init", init)
    assert cuda_problem() is None
    assert choose_device("auto") == CPU
    assert not caplog.records


def test_a_build_without_cuda_is_told_nothing(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda_problem() is None
