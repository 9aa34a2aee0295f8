"""compiled.py: compiled functions give the plain numbers up to rounding, and are compiled only if a run asks for it."""

from __future__ import annotations

import pytest
import torch
from conftest import make_config, make_model, message_of

from data_types import Episode
from grpo import update_policy
from model import compiled
from model.compiled import compilable, compiled_functions
from optimizer import MemoryEfficientAdamW
from run import device
from run.device import check_compiler


class Keep(MemoryEfficientAdamW):
    def step(self, closure=None, *, gradient_factor: float = 1.0):
        self.kept = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure, gradient_factor=gradient_factor)


def gradients(on: bool, lengths: tuple[int, ...], checkpointing: bool = False) -> list[torch.Tensor]:
    """Of a policy-gradient and entropy step on two groups of ragged episodes."""
    model = make_model(make_config(qk_norm=True, model_type="qwen3"))
    model.model.gradient_checkpointing = checkpointing
    optimizer, draw = Keep(model.parameters(), lr=1e-3), torch.Generator().manual_seed(0)
    episodes = [
        Episode(
            i // 2, [1, 2, 3], torch.randint(200, (length,), generator=draw).tolist(), [-5.0] * length, "", "stop",
            reward=0.0, advantage=(-1.0) ** i, vocab_size=200,
        )
        for i, length in enumerate(lengths)
    ]  # fmt: skip
    with compiled_functions(on):
        update_policy(model, optimizer, episodes, entropy_coef=0.01, max_grad_norm=1e9)
    return optimizer.kept


def compiles() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_gradients_are_the_plain_ones_and_other_lengths_compile_nothing():
    """The tolerance that --compile states: 1e-5 of the norm in fp32."""
    before = compiles()
    for lengths in ((4, 6, 5, 7), (9, 3, 8, 2)):
        plain, fast = gradients(False, lengths), gradients(True, lengths)
        for a, b in zip(plain, fast, strict=True):
            assert (a - b).norm() <= 1e-5 * a.norm() + 1e-9
        if lengths[0] == 4:
            first = compiles()
            assert first > before, "nothing was compiled"
    assert compiles() == first


def test_nothing_is_compiled_outside(monkeypatch):
    monkeypatch.setattr(compiled.torch, "compile", lambda *_, **__: pytest.fail("it was compiled"))
    add = compilable(lambda a, b: a + b)
    assert add(1, 2) == 3
    with compiled_functions(False):
        assert add(1, 2) == 3


def test_an_exception_ends_the_compilation():
    def fail() -> None:
        with compiled_functions(True):
            assert compiled._on[0]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not compiled._on[0]


@pytest.mark.parametrize(("kind", "words"), [("cpu", "C++ compiler"), ("cuda", "Triton")])
def test_a_machine_without_a_compiler_is_told_in_one_line(kind, words, monkeypatch):
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="leave --compile out") as error:
        check_compiler(torch.device(kind))
    assert words in message_of(error)
