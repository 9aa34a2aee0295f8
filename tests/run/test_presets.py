"""Every preset in configs/ parses, states its memory, and dry-runs on a random two-layer model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import train
from run.config import parse_args

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
EXPECTED = {"countdown-tiny", "cpu", "kl", "approx_kl", "ot", "dr_grpo", "dapo", "gspo", "gsm8k", "math"}
EXPECTED |= {f"qwen2.5-{size}{way}" for size in ("0.5b", "1.5b", "3b", "7b") for way in ("", "-lora")}
SCALED = ["--max-new-tokens", "12", "--prompts-per-step", "2", "--group-size", "2", "--eval-problems", "2"]


def test_all_presets_are_there():
    assert {preset.stem for preset in PRESETS} == EXPECTED


@pytest.fixture
def data_files(tmp_path) -> dict[str, Path]:
    """Files in the released schemas of GSM8K and MATH."""
    rows = {
        "gsm8k": [{"question": f"What is {i} + 1?", "answer": f"Add them.\n#### {i + 1}"} for i in range(20)],
        "math": [{"problem": f"What is ${i} + 1$?", "solution": f"\\boxed{{{i + 1}}}"} for i in range(20)],
    }
    for name, table in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return {name: tmp_path / f"{name}.jsonl" for name in rows}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_dry_runs(preset, checkpoint_folder, data_files, tmp_path, capsys, monkeypatch):
    """Lengths are scaled down by flags. The loss, the adapters and all other options are the preset's."""
    monkeypatch.chdir(tmp_path)
    flags = [*SCALED, "--ckpt", str(checkpoint_folder), "--device", "cpu", "--prompt-style", "short", "--dry-run"]
    config = parse_args(["--config", str(preset), *SCALED, "--overlong-buffer", "0"])
    if config.task in data_files:
        pytest.importorskip("math_verify") if config.task == "math" else None
        flags += ["--data", str(data_files[config.task])]
    if "overlong_buffer" in preset.read_text():
        flags += ["--overlong-buffer", "6"]
    assert train.main(["--config", str(preset), *flags]) == 0
    said = capsys.readouterr()
    assert "nothing was written" in said.out
    assert "refused" not in said.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_states_its_memory_and_how_it_was_estimated(preset):
    comment = " ".join(line.lstrip("# ") for line in preset.read_text().splitlines() if line.startswith("#"))
    if preset.stem in ("countdown-tiny", "cpu"):
        assert "CPU" in comment
    elif "Lay it over" in comment:
        assert re.search(r"--config configs/countdown-tiny.yaml --config configs/\w+.yaml", comment)
        assert "Memory: that of the preset under it" in comment
    else:
        stated = re.search(r"about ([\d.]+) GiB there .* and ([\d.]+) GiB of host memory", comment)
        assert stated
        assert "estimated by benchmarks/preset_memory.py" in comment
        assert [float(number) for number in stated.groups()] == pytest.approx(list(estimate(preset)), abs=0.051)


def estimate(preset: Path) -> tuple[float, float]:
    import importlib.util

    spec = importlib.util.spec_from_file_location("preset_memory", ROOT / "benchmarks/preset_memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.preset_gib(preset)


@pytest.mark.parametrize("name", ["kl", "approx_kl", "ot", "dr_grpo", "dapo", "gspo"])
def test_a_preset_of_an_algorithm_changes_only_the_algorithm(name):
    """Laid over another it leaves model, task, lengths and learning rate alone."""
    under = ["--config", str(ROOT / "configs/countdown-tiny.yaml")]
    plain, laid_over = parse_args(under), parse_args([*under, "--config", str(ROOT / f"configs/{name}.yaml")])
    for field in ("ckpt", "task", "prompts_per_step", "group_size", "max_new_tokens", "lr", "steps", "prompt_style"):
        assert getattr(plain, field) == getattr(laid_over, field)
    assert plain != laid_over
