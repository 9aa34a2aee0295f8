"""Where memory runs out, the piece is halved and done again, with the result that it would have had."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_config, make_model
from safetensors.torch import load_file
from test_train import SMALL, metrics_of

import grpo
from data_types import MiniBatch
from grpo import GRPO, compute_advantages, update_policy
from model.memory import halve_when_out_of_memory, is_out_of_memory
from rollout import generation
from rollout.generation import generate
from rollout.sampling import SamplingParams
from update import objective

CPU_ERROR = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
)


class KeepGradients(torch.optim.SGD):
    def step(self):
        self.kept = [p.grad.clone() for group in self.param_groups for p in group["params"]]


@pytest.fixture(scope="module")
def trainer() -> GRPO:
    return GRPO()


@pytest.fixture(scope="module")
def batch(trainer) -> MiniBatch:
    return MiniBatch.from_problems(trainer.task.problems("train", 4), trainer.tokenizer)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(CPU_ERROR)]
)
def test_every_kind_of_out_of_memory_is_known(error):
    assert is_out_of_memory(error)


def test_other_errors_are_not_tried_again():
    calls = []

    def work(size):
        calls.append(size)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        halve_when_out_of_memory(work, 8)
    assert calls == [8]


def test_gives_up_where_a_piece_of_one_does_not_fit():
    calls = []

    def work(size):
        calls.append(size)
        raise MemoryError

    with pytest.raises(MemoryError):
        halve_when_out_of_memory(work, 5)
    assert calls == [5, 2, 1]


def test_a_rollout_that_does_not_fit_gives_the_same_answers_in_pieces(trainer, batch, monkeypatch):
    params, real = SamplingParams(n=2, max_new_tokens=8), generation.decode
    whole = generate(trainer.model, batch.prompt_ids, params, tokenizer=trainer.tokenizer)
    sizes = []

    def small_machine(model, ids, uniforms, params, tokenizer, rows, capture):
        sizes.append(rows)
        if rows > 2:
            raise RuntimeError(CPU_ERROR)
        return real(model, ids, uniforms, params, tokenizer, rows, capture)

    monkeypatch.setattr(generation, "decode", small_machine)
    pieces = generate(trainer.model, batch.prompt_ids, params, tokenizer=trainer.tokenizer, max_rows=8)
    assert sizes == [8, 4, 2]
    assert [c.response_ids for c in pieces] == [c.response_ids for c in whole]
    assert [c.prompt_index for c in pieces] == [c.prompt_index for c in whole]


def test_an_update_that_does_not_fit_gives_the_same_gradient_in_pieces(trainer, batch, monkeypatch):
    """The first micro-batch may have left its gradient behind when the second runs out: nothing is counted twice."""
    episodes = grpo.rollout(
        trainer.model, trainer.tokenizer, trainer.task, batch, SamplingParams(n=2, max_new_tokens=12)
    )
    for i, episode in enumerate(episodes):
        episode.reward = float(i % 2)
    episodes = compute_advantages(episodes)
    whole, pieces = (KeepGradients(trainer.model.parameters(), lr=0.0) for _ in range(2))
    expected = update_policy(trainer.model, whole, episodes)
    real, rows = objective.response_states, []

    def small_machine(model, micro):
        rows.append(len(micro.ids))
        if len(micro.ids) > 90 and sum(rows) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, micro)

    monkeypatch.setattr(objective, "response_states", small_machine)
    metrics = update_policy(trainer.model, pieces, episodes, micro_batch_tokens=100)
    assert max(rows) > 90, "the machine was never too small"
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    for a, b in zip(whole.kept, pieces.kept):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process's address space")
def test_a_run_in_a_process_with_too_little_memory_is_the_unlimited_run(tokenizer, tmp_path):
    """CHECKLIST 17: a real process, its real allocator, and 80 MiB of address space for step 2. A token's queries,
    keys and values take 16 KiB each: the rollout's cache 92 MiB, the step's activations some 400, those of an answer
    5. Same answers to the bit, and the weights of the unlimited run within the rounding of sums."""
    model = make_model(make_config(num_hidden_layers=1, num_attention_heads=16, num_key_value_heads=16, head_dim=256))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["--ckpt", tmp_path / "model", *SMALL, "--steps", 2, "--save-every", 1, "--eval-problems", 0, "--lr", 1e-3]
    words += ["--prompts-per-step", 24, "--max-new-tokens", 32, "--micro-batch-tokens", 16384]
    # Blocks of a megabyte go back to the system when they are freed: no free memory of step 1 is left for step 2.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    said = {}
    for name, mib in (("unlimited", 0), ("limited", 80)):
        command = [
            sys.executable,
            Path(__file__).with_name("limited_memory.py"),
            mib,
            *words,
            "--run-dir",
            tmp_path / name,
        ]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        said[name] = [
            int(size) for size in re.findall(r"out of memory; again with pieces of at most (\d+)", done.stderr)
        ]
    assert not said["unlimited"]
    update = said["limited"].index(8192)  # half of --micro-batch-tokens; the rollout halved its rows before
    assert said["limited"][update - 1] <= 64, "96 rows of the rollout were never cut"
    assert said["limited"][-1] <= 1024, "some 2,800 tokens of the update were never cut"

    samples = [
        [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()] for name in said
    ]
    for one, other in zip(*samples, strict=True):
        # Gradients come from other micro-batches, so numbers after the first update are equal up to rounding.
        ours, theirs = one.pop("update"), other.pop("update")
        assert one.pop("token_logprobs") == pytest.approx(other.pop("token_logprobs"), rel=1e-4, abs=1e-5)
        assert one == other
        assert ours.keys() == theirs.keys()
        for name in ("logp", "entropy", "coefficient"):
            assert ours.get(name) == pytest.approx(theirs.get(name), rel=1e-3, abs=1e-5)
    begin, (whole, pieces) = (
        load_file(tmp_path / "unlimited/checkpoints/step-000001/model.safetensors"),
        (load_file(tmp_path / name / "checkpoints/step-000002/model.safetensors") for name in said),
    )
    for name, start in begin.items():
        assert (whole[name] - pieces[name]).norm() <= 1e-3 * (whole[name] - start).norm(), name
    for a, b in zip(*(metrics_of(tmp_path / name) for name in said)):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
