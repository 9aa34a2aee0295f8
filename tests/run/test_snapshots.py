"""Snapshots: the right steps, small files, weights close to the run's, and a run that never ends because of them."""

from __future__ import annotations

import pytest
import torch
from conftest import make_config, make_model
from safetensors.torch import load_file
from test_train import SMALL, EvenLetters, run

import train
from model.lora import add_lora
from run import snapshots
from run.pretrained import load_pretrained, locate_pretrained


@pytest.fixture(autouse=True)
def _even_letters(monkeypatch):
    monkeypatch.setattr(train, "task_from_config", lambda config: EvenLetters(seed=config.seed))


def moved(model, seed: int, size: float = 0.01):
    """A copy's weights, some way from the model's."""
    generator = torch.Generator().manual_seed(seed)
    return {n: w + size * torch.randn(w.shape, generator=generator) for n, w in model.state_dict().items()}


@pytest.mark.parametrize(
    ("count", "steps", "expected"),
    [(0, 10, []), (2, 10, [0, 10]), (3, 10, [0, 5, 10]), (10, 75, [0, 8, 17, 25, 33, 42, 50, 58, 67, 75]),
     (10, 3, [0, 1, 2, 3])],
)  # fmt: skip
def test_snapshots_are_spread_from_the_start_to_the_end(count, steps, expected):
    assert [step for step in range(steps + 1) if snapshots.is_due(step, count, steps)] == expected


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"model_type": "qwen3", "qk_norm": True,
                                                                          "attention_bias": False}])  # fmt: skip
def test_restored_weights_are_within_half_a_scale(tmp_path, changes):
    model = make_model(make_config(**changes))
    wanted = {step: moved(model, step) for step in (4, 9)}
    snapshots.write(tmp_path, 0, model.state_dict())
    for step, weights in wanted.items():
        snapshots.write(tmp_path, step, weights)
    first, start, found = snapshots.read(tmp_path)
    assert first == 0
    assert list(found) == [4, 9]
    for name, w in model.state_dict().items():
        assert torch.equal(start[name], w)
    for step, weights in wanted.items():
        restored = snapshots.restore(start, found[step])
        assert restored.keys() == weights.keys()
        for name, w in weights.items():
            half = found[step][name].scale.max() * 0.51 + 1e-8
            torch.testing.assert_close(restored[name], w, atol=float(half), rtol=1e-6)


def test_a_weight_that_did_not_change_is_exactly_that_of_the_start(tmp_path):
    model = make_model()
    snapshots.write(tmp_path, 0, model.state_dict())
    snapshots.write(tmp_path, 1, model.state_dict())
    _, start, found = snapshots.read(tmp_path)
    for name, w in snapshots.restore(start, found[1]).items():
        assert torch.equal(w, model.state_dict()[name])


def test_ten_snapshots_of_the_bundled_model_take_less_than_twenty_megabytes(tmp_path):
    model, _ = load_pretrained(locate_pretrained("countdown-tiny"), torch.float32)
    snapshots.write(tmp_path, 0, model.state_dict())
    for step in range(1, 10):
        snapshots.write(tmp_path, step, moved(model, step))
    assert sum(path.stat().st_size for path in (tmp_path / "snapshots").iterdir()) < 20e6


def test_a_run_keeps_its_snapshots_and_they_are_its_weights(checkpoint_folder, tmp_path):
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--save-every", 1, "--eval-every", 0, *SMALL]
    assert run(*words, "--steps", 2, "--snapshots", 3) == 0
    first, start, found = snapshots.read(tmp_path / "run")
    assert (first, list(found)) == (0, [1, 2])
    before = load_file(checkpoint_folder / "model.safetensors")
    assert all(torch.equal(start[name], w) for name, w in before.items())
    for step in (1, 2):
        saved = load_file(tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "model.safetensors")
        restored = snapshots.restore(start, found[step])
        for name, w in saved.items():
            assert (restored[name] - w).norm() <= 1e-3 * (w - before[name]).norm() + 1e-6


def test_a_resumed_run_drops_the_snapshots_after_its_checkpoint(checkpoint_folder, tmp_path):
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--save-every", 1, "--eval-every", 0, *SMALL]
    assert run(*words, "--steps", 2, "--snapshots", 3) == 0
    once = snapshots.read(tmp_path / "run")
    again = tmp_path / "run" / "checkpoints" / "step-000001"
    assert run("--resume", again, "--steps", 2, "--snapshots", 3) == 0
    twice = snapshots.read(tmp_path / "run")
    assert list(twice[2]) == list(once[2]) == [1, 2]
    for name, change in once[2][2].items():
        assert torch.equal(change.numbers, twice[2][2][name].numbers)
    assert run("--resume", again, "--steps", 1, "--snapshots", 0) == 0
    assert list(snapshots.read(tmp_path / "run")[2]) == [1]


def test_a_run_without_the_option_has_none(checkpoint_folder, tmp_path):
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", 1, "--eval-every", 0, *SMALL]
    assert run(*words) == 0
    assert not (tmp_path / "run" / "snapshots").exists()
    with pytest.raises(FileNotFoundError, match="--snapshots 10"):
        snapshots.read(tmp_path / "run")


def test_adapters_are_in_the_snapshot(tmp_path):
    """The weights are those of the merged model, as in a checkpoint."""
    model = make_model()
    snapshots.take(tmp_path, 0, 2, 1, model)
    before = {n: w.clone() for n, w in model.state_dict().items()}
    add_lora(model, 2, 4.0, 0.0, ["q_proj"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_()
    snapshots.take(tmp_path, 1, 2, 1, model)
    _, start, found = snapshots.read(tmp_path)
    restored = snapshots.restore(start, found[1])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (restored[name] - before[name]).norm() > 0.1
    torch.testing.assert_close(restored[name], model.state_dict()[name], atol=1e-2, rtol=1e-2)


def test_a_snapshot_that_cannot_be_written_does_not_end_the_run(checkpoint_folder, tmp_path, caplog):
    """CHECKLIST 72: no room, a file in the way, weights that are not finite: a line in the log."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "snapshots").write_text("in the way")
    words = ["--ckpt", checkpoint_folder, "--run-dir", folder, "--steps", 1, "--eval-every", 0, *SMALL]
    assert run(*words, "--snapshots", 2) == 0
    assert "no snapshot at step 0" in caplog.text
    assert "the run goes on" in caplog.text
    model = make_model()
    model.model.norm.weight.data[0] = float("nan")
    snapshots.take(tmp_path, 0, 2, 1, model)
    assert "model.norm.weight holds NaN" in caplog.text


@pytest.mark.parametrize("damage", [b"", b"garbage", b"\x08\0\0\0\0\0\0\0{}      "])
@pytest.mark.parametrize("name", ["start.safetensors", "step-000004.safetensors"])
def test_a_damaged_snapshot_is_one_line_with_its_name(tmp_path, name, damage):
    model = make_model()
    snapshots.write(tmp_path, 0, model.state_dict())
    snapshots.write(tmp_path, 4, moved(model, 1))
    (tmp_path / "snapshots" / name).write_bytes(damage)
    with pytest.raises(ValueError, match=name) as caught:
        snapshots.read(tmp_path)
    assert "\n" not in str(caught.value)
    snapshots.rewind(tmp_path, -1)  # and a resume is not stopped by it


def test_snapshots_of_another_model_are_not_mixed(tmp_path):
    snapshots.write(tmp_path, 0, make_model().state_dict())
    with pytest.raises(ValueError, match="of another model"):
        snapshots.write(tmp_path, 1, make_model(make_config(hidden_size=64)).state_dict())


def test_one_snapshot_is_refused(capsys, tmp_path):
    assert run("--snapshots", 1, "--run-dir", tmp_path / "run") == 2
    assert "take 2 or more" in capsys.readouterr().err
