"""Whole runs on the emulated CUDA device: the metrics are the CPU's, for every dtype and generation of cards.

A run is `train.py` itself: evaluation, rollout with graphs, update, optimizer, checkpoint. Then faults are planted in
it, and the device must find each.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from emulated_cuda import EmulatedCuda, EmulatedMps
from emulated_streams import CaptureError, Event, Race, Stream
from safetensors.torch import load_file

import chat
import train
from model import attention
from model.layout import Layout
from optimizer import _Ring
from rollout import group_cache
from rollout.decode_graph import shelf
from rollout.decoding import Decoder

SMALL = ["--prompts-per-step", "2", "--group-size", "3", "--max-new-tokens", "20", "--eval-problems", "2"]
SMALL += ["--eval-every", "0", "--save-every", "1", "--lr", "1e-3", "--no-curriculum"]
CARDS = {"T4": (7, 5), "A100": (8, 0), "H100": (9, 0)}
# Sums over many tokens agree to the rounding of one product. In 16 bits, CPU and GPU round at different places.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.01}
COMPARED = ("reward", "entropy", "grad_norm", "completions/mean_length", "eval_reward", "eval_mean_length", "kl",
            "loss_scale", "update/skipped")  # fmt: skip
RUNS = [(dtype, card) for dtype in ("fp32", "bf16", "fp16") for card in CARDS if (dtype, card) != ("bf16", "T4")]


@pytest.fixture(autouse=True)
def _no_decoders_of_other_devices():
    shelf.kept.clear()
    shelf.crowded.clear()


def run(folder: Path, *flags: str, steps: int = 2) -> list[dict]:
    assert train.main([*SMALL, "--steps", str(steps), *flags, "--run-dir", str(folder)]) == 0
    return metrics_of(folder)


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cpu_run(tmp_path_factory):
    """The metrics of a run on the CPU, once for each set of flags."""
    known: dict[tuple[str, ...], list[dict]] = {}

    def metrics(*flags: str) -> list[dict]:
        if flags not in known:
            known[flags] = run(tmp_path_factory.mktemp("cpu") / "run", "--device", "cpu", *flags)
        return known[flags]

    return metrics


def assert_close(found: list[dict], expected: list[dict], dtype: str) -> None:
    assert len(found) == len(expected)
    assert any(row.get("grad_norm", 0) > 0 for row in expected), "the run has learned nothing"
    for mine, reference in zip(found, expected, strict=True):
        for name in COMPARED:
            if name in reference:
                assert mine[name] == pytest.approx(reference[name], rel=TOLERANCE[dtype], abs=1e-4), name


# --- the same run everywhere


@pytest.mark.parametrize(("dtype", "card"), RUNS)
def test_a_run_has_the_metrics_of_the_cpu(dtype, card, cpu_run, tmp_path):
    """One card runs the optimizer on the host and one on the device."""
    place = "device" if card == "H100" else "host"
    with EmulatedCuda(CARDS[card]) as gpu:
        found = run(tmp_path / "run", "--device", "cuda", "--dtype", dtype, "--optimizer-state", place)
    assert_close(found, cpu_run("--dtype", dtype), dtype)
    assert gpu.replays > 0
    assert (gpu.pinned_reserved > 0) == (place == "host")


@pytest.mark.parametrize(("dtype", "card"), [("fp32", "T4"), ("fp16", "T4"), ("bf16", "A100")])
def test_adapters_with_a_reference_have_the_metrics_of_the_cpu(dtype, card, cpu_run, tmp_path):
    # A second update in bf16 clips other tokens than the CPU does, because the ratios at the border round differently.
    updates = "1" if dtype == "bf16" else "2"
    flags = ["--dtype", dtype, "--lora-rank", "4", "--beta", "0.1", "--updates-per-rollout", updates]
    with EmulatedCuda(CARDS[card]):
        found = run(tmp_path / "run", "--device", "cuda", *flags)
    assert_close(found, cpu_run(*flags), dtype)
    assert "kl" in found[-1]


PLACES = [("fp32", "host"), ("fp16", "host"), ("bf16", "device"), ("fp16", "device")]


@pytest.mark.parametrize(("dtype", "place"), PLACES)
def test_a_resumed_run_is_the_uninterrupted_one(dtype, place, tmp_path):
    """CHECKLIST 42. Bit for bit: metrics, weights and optimizer state, and in fp16 the loss scale."""
    flags = ["--device", "cuda", "--dtype", dtype, "--optimizer-state", place, "--eval-problems", "0"]
    with EmulatedCuda():
        straight = run(tmp_path / "straight", *flags, steps=3)
    with EmulatedCuda():
        run(tmp_path / "parts", *flags, steps=2)
    with EmulatedCuda():
        assert train.main(["--resume", str(tmp_path / "parts"), "--steps", "3"]) == 0
    parts = metrics_of(tmp_path / "parts")
    timed = ("time", "tokens_per_second", "memory")
    for mine, reference in zip(parts, straight, strict=True):
        for name in reference:
            if not any(word in name for word in timed):
                assert mine[name] == reference[name], name
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(tmp_path / name / "checkpoints/step-000003" / file) for name in ("straight", "parts"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_on_a_mac_has_the_metrics_of_the_cpu(dtype, cpu_run, tmp_path):
    with EmulatedMps():
        found = run(tmp_path / "run", "--device", "mps", "--dtype", dtype)
    assert_close(found, cpu_run("--dtype", dtype), dtype)


@pytest.mark.parametrize("device", [EmulatedCuda, EmulatedMps])
def test_chat_says_what_it_says_on_the_cpu(device):
    """The number that draws a token is fp64 on the host, and MPS has no fp64."""
    said = []
    for kind in ("cpu", device.kind):
        with device() if kind != "cpu" else contextlib.nullcontext():
            talk = chat.Chat(chat.Options(device=kind, max_new_tokens=12))
            said.append("".join(talk.answer("[3, 5, 2] = 13")))
    assert said[0] == said[1] != ""


def test_waits_of_a_step_do_not_grow_with_the_tokens(tmp_path):
    """A rollout looks at its rows every 16 tokens. An update waits a fixed number of times for each micro-batch."""
    seen: list[Counter[str]] = []
    for tokens in ("17", "33"):
        with EmulatedCuda() as gpu:
            flags = ["--device", "cuda", "--eval-problems", "0", "--max-new-tokens", tokens, "--dtype", "bf16"]
            (metrics,) = run(tmp_path / tokens, *flags, "--entropy-coef", "0.01", steps=1)
            assert metrics["update/skipped"] == 0
        seen.append(Counter({line.rpartition("@")[2].split(":")[0]: 0 for line in gpu.syncs}))
        for line, number in gpu.syncs.items():
            seen[-1][line.rpartition(":")[0].rpartition("@")[2].strip()] += number
    short, long = seen
    for file in short.keys() | long.keys():
        assert long[file] <= short[file] + 12, (file, short[file], long[file])


# --- planted faults


def train_on_gpu(tmp_path: Path, *flags: str, capability: tuple[int, int] = (8, 0)) -> None:
    with EmulatedCuda(capability):
        train.train(train.parse_args([*SMALL, "--steps", "2", "--device", "cuda", "--run-dir", str(tmp_path), *flags]))


@pytest.mark.parametrize("method", ["wait", "finish"])
def test_a_missing_wait_is_found(method, tmp_path, monkeypatch):
    """The third one, `begin`, is needed after a bare backward pass (test_optimizer.py). Here the norm has waited."""
    real = getattr(_Ring, method)

    def without_waiting(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stream, "wait_stream", lambda *_: None)
            patch.setattr(Event, "synchronize", lambda *_: None)
            return real(*args)

    monkeypatch.setattr(_Ring, method, without_waiting)
    with pytest.raises(Race):
        train_on_gpu(tmp_path / "run", "--dtype", "bf16", "--optimizer-state", "host")


@pytest.mark.parametrize("fault", ["item", "branch", "tolist", "host tensor"])
def test_a_number_that_is_read_in_the_recorded_step_is_found(fault, tmp_path, monkeypatch):
    real = Decoder.draw

    def draw(self, rows, hidden):
        if fault == "item":
            self.cache.lengths.sum().item()
        elif fault == "branch" and self.lengths[0] < 0:
            return
        elif fault == "tolist":
            self.token.tolist()
        elif fault == "host tensor":
            self.token.add_(torch.tensor([0], device=self.token.device))
        real(self, rows, hidden)

    monkeypatch.setattr(Decoder, "draw", draw)
    with pytest.raises(CaptureError, match="not permitted"):
        train_on_gpu(tmp_path / "run")


def test_an_unaligned_mask_is_found(tmp_path, monkeypatch):
    def unaligned(lengths, size, dtype):
        hidden = torch.arange(size, device=lengths.device) >= lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device).masked_fill(hidden, -torch.inf)
        return mask[:, None, None]

    monkeypatch.setattr(group_cache, "_hide_behind", unaligned)
    with pytest.raises(RuntimeError, match="not correctly aligned"):
        train_on_gpu(tmp_path / "run")


@pytest.mark.parametrize("place", ["positions", "lengths of sequences"])
def test_a_forgotten_move_to_the_device_is_found(place, tmp_path, monkeypatch):
    if place == "positions":
        real = Layout.positions
        monkeypatch.setattr(Layout, "positions", lambda self, device="cpu": real(self))
    else:
        pack = attention._pack
        monkeypatch.setattr(attention, "_pack", lambda layout, device: pack(layout, torch.device("cpu")))
    with pytest.raises(RuntimeError, match=r"same device|devices"):
        train_on_gpu(tmp_path / "run")


def test_a_sequence_without_tokens_is_found(tmp_path, monkeypatch):
    """A response of one token is a run of length 0. Its rows were once handed to the kernel."""
    real = attention._pack

    def with_an_empty_one(layout, device):
        packed = real(layout, device)
        cu_q, cu_k = (torch.cat([x, x[-1:]]) for x in (packed.cu_q, packed.cu_k))
        return packed._replace(cu_q=cu_q, cu_k=cu_k)

    monkeypatch.setattr(attention, "_pack", with_an_empty_one)
    with pytest.raises(RuntimeError, match="length 0"):
        train_on_gpu(tmp_path / "run")


ECHO = """
from dataclasses import dataclass
from math_task import CountdownTask

@dataclass(kw_only=True)
class Echo(CountdownTask):
    stop_strings = ("=",)

    def respond(self, problem, text_so_far):
        return f" {len(text_so_far)}"
"""


def test_a_run_with_a_tool_is_the_cpus(tmp_path):
    """CHECKLIST 74. Recorded steps, rows that go on behind a call, and prefills of observations."""
    file = tmp_path / "echo.py"
    file.write_text(ECHO)
    flags = ["--task", f"{file}:Echo", "--dtype", "fp32"]
    expected = run(tmp_path / "cpu", "--device", "cpu", *flags)
    assert expected[1]["tools/calls"] > 0
    with EmulatedCuda(CARDS["H100"]):
        found = run(tmp_path / "cuda", "--device", "cuda", *flags)
    assert_close(found, expected, "fp32")
    assert [row.get("tools/calls") for row in found] == [row.get("tools/calls") for row in expected]
