"""loss_scale.py and fp16 training: gradients against fp32, changes of the scale, and a resume. On the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_model

import grpo
from data_types import Episode
from grpo import GRPO, update_policy
from optimizer import MemoryEfficientAdamW, gradient_norm
from update.loss_scale import FIRST, GROW_AFTER, LARGEST, SMALLEST, LossScale

VOCABULARY = 259


def episodes(seed: int = 0) -> list[Episode]:
    """Two groups of ragged episodes with advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(6):
        prompt = [int(i) for i in torch.randint(VOCABULARY, (3 + number // 3,), generator=generator)]
        if number % 3:
            prompt = made[-1].prompt_ids
        response = [int(i) for i in torch.randint(VOCABULARY, (4 + number,), generator=generator)]
        made.append(
            Episode(
                number // 3, prompt, response, [-5.5] * len(response), "", "stop", reward=float(number % 2),
                advantage=(-1.0) ** number, vocab_size=VOCABULARY,
            )
        )  # fmt: skip
    return made


class Keep(MemoryEfficientAdamW):
    """Keeps the gradients of each step, as the update uses them: in fp32, without the loss scale."""

    def step(self, closure=None, *, gradient_factor: float = 1.0):
        params = [p for group in self.param_groups for p in group["params"]]
        self.factor, self.raw = gradient_factor, [p.grad.clone() for p in params]
        self.kept = [p.grad.float() * gradient_factor for p in params]
        return super().step(closure, gradient_factor=gradient_factor)


def update(dtype: torch.dtype, scale: LossScale | None = None, **options) -> tuple[Keep, dict[str, float]]:
    model = make_model().half().to(dtype)  # the same weights in both types
    optimizer = Keep(model.parameters(), lr=1e-3)
    metrics = update_policy(model, optimizer, episodes(), loss_scale=scale, **options)
    return optimizer, metrics


# --- gradients


@pytest.mark.parametrize(
    "options", [{}, {"entropy_coef": 0.01}, {"loss_type": "gspo"}, {"micro_batch_tokens": 20}], ids=str
)
def test_gradients_in_fp16_are_those_of_fp32(options):
    """CHECKLIST 17. Norms, log-probabilities and losses are computed in fp32. The rest is fp16's rounding."""
    (half, found), (full, expected) = update(torch.float16, **options), update(torch.float32, **options)
    assert found["loss_scale"] == FIRST
    assert "loss_scale" not in expected
    for name in ("loss", "entropy", "ratio/mean", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=0.01, abs=1e-3), name
    for mine, reference in zip(half.kept, full.kept, strict=True):
        assert (mine - reference).norm() <= 0.01 * reference.norm() + 1e-6


def test_without_a_scale_small_gradients_would_be_lost():
    """The purpose of the scale: the advantages are so small that most gradients are below fp16's smallest number."""
    small = [Episode(**{**vars(e), "advantage": e.advantage * 1e-6}) for e in episodes()]
    zeros = {}
    for value in (1.0, FIRST):
        scale = LossScale(torch.float16)
        scale.value = value
        model = make_model().half()
        optimizer = Keep(model.parameters(), lr=1e-3)
        update_policy(model, optimizer, small, loss_scale=scale)
        gradient = optimizer.raw[0]
        zeros[value] = (gradient == 0).float().mean().item()
    exact = (update(torch.float32)[0].raw[0] == 0).float().mean().item()
    assert zeros[FIRST] == pytest.approx(exact, abs=0.02)
    assert zeros[1.0] > exact + 0.2


def test_the_norm_of_large_fp16_gradients_is_finite():
    """65,504 is the largest fp16 number. A norm computed in fp16 would be infinite."""
    gradients = [torch.full((1000,), 3e4).half(), torch.zeros(0).half(), torch.ones(3, 3).half()]
    exact = math.sqrt(1000 * float(gradients[0][0]) ** 2 + 9)
    assert gradient_norm(gradients).item() == pytest.approx(exact, rel=1e-6)
    assert gradient_norm([]).item() == 0


def test_the_norm_of_bf16_gradients_has_the_digits_of_fp32():
    gradients = [torch.randn(40_000, generator=torch.Generator().manual_seed(0)).bfloat16()]
    exact = gradients[0].double().norm().item()
    assert gradient_norm(gradients).item() == pytest.approx(exact, rel=1e-5)


def test_gradients_are_clipped_to_the_norm_without_the_scale():
    optimizer, metrics = update(torch.float16, max_grad_norm=0.01)
    assert metrics["grad_norm"] > 0.01
    assert gradient_norm(optimizer.kept).item() == pytest.approx(0.01, rel=1e-3)
    assert optimizer.factor == pytest.approx(0.01 / metrics["grad_norm"] / FIRST, rel=1e-3)


# --- changes of the scale


def test_the_scale_halves_at_an_overflow_and_grows_after_calm():
    scale = LossScale(torch.float16)
    assert scale.value == 2.0**16
    assert scale.lower()
    assert scale.value == 2.0**15
    for _ in range(GROW_AFTER - 1):
        scale.note_update()
    assert scale.value == 2.0**15
    scale.note_update()
    assert scale.value == 2.0**16
    for _ in range(20 * GROW_AFTER):
        scale.note_update()
    assert scale.value == LARGEST
    for _ in range(24):
        assert scale.lower()
    assert scale.value == SMALLEST
    assert not scale.lower()


def test_an_overflow_counts_the_calm_updates_from_the_beginning():
    scale = LossScale(torch.float16)
    for _ in range(GROW_AFTER - 1):
        scale.note_update()
    scale.lower()
    scale.note_update()
    assert scale.value == 2.0**15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_have_no_scale(dtype):
    scale = LossScale(dtype)
    for _ in range(3 * GROW_AFTER):
        scale.note_update()
    assert scale.value == 1.0
    assert not scale.lower()
    assert not scale.active


def test_an_overflow_repeats_the_step_with_half_the_scale():
    """CHECKLIST 65. The update is that of the lower scale, bit for bit: no step is lost, and none is refused."""
    scale = LossScale(torch.float16)
    scale.value = 2.0**23
    repeated, metrics = update(torch.float16, scale)
    assert metrics["update/skipped"] == 0
    assert metrics["loss_scale"] == scale.value < 2.0**23
    same = LossScale(torch.float16)
    same.value = scale.value
    direct, expected = update(torch.float16, same)
    assert metrics == expected
    for p, q in zip(repeated.param_groups[0]["params"], direct.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_numbers_that_are_not_finite_at_any_scale_refuse_the_step(broken, monkeypatch):
    """CHECKLIST 44. A loss that is not finite does not touch the scale. A gradient is tried down to scale 1."""
    scale, model = LossScale(torch.float16), make_model().half()
    before = [p.detach().clone() for p in model.parameters()]
    made = episodes()
    if broken == "loss":
        made[0].advantage = math.nan
    else:
        real = grpo.micro_batch_loss

        def infinite_gradient(loss, model, *rest):
            return real(loss, model, *rest) + (model.model.norm.weight.float() * 0).sum().sqrt()

        monkeypatch.setattr(grpo, "micro_batch_loss", infinite_gradient)
    metrics = update_policy(model, MemoryEfficientAdamW(model.parameters(), lr=1e-3), made, loss_scale=scale)
    assert metrics["update/not_finite"] == 1
    assert scale.value == (FIRST if broken == "loss" else SMALLEST)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)


# --- resume


def test_a_trainer_saves_its_scale_and_takes_it_back(tokenizer):
    one, other = (GRPO(model=make_model().half(), tokenizer=tokenizer) for _ in range(2))
    one.loss_scale.value, one.loss_scale.updates = 2.0**11, 7
    other.load_state_dict(one.state_dict())
    assert (other.loss_scale.value, other.loss_scale.updates) == (2.0**11, 7)
    full = GRPO(model=make_model(), tokenizer=tokenizer)
    assert "loss_scale" not in full.state_dict()
    other.load_state_dict(full.state_dict())  # of a run in fp32: nothing to take over
    assert other.loss_scale.value == 2.0**11
