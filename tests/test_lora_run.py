"""A run with adapters: the contents of its checkpoints, and that it resumes bit for bit."""

from __future__ import annotations

import json
import re

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import train
from qwen2_llm import Qwen2ForCausalLM
from run.checkpoint import verify_checkpoint


def run(ckpt, run_dir, *flags: str) -> None:
    words = ["--ckpt", str(ckpt), "--run-dir", str(run_dir), "--task", "arithmetic", "--prompt-style", "short"]
    words += ["--max-new-tokens", "6", "--group-size", "3", "--prompts-per-step", "2", "--eval-problems", "2"]
    words += ["--device", "cpu", "--dtype", "bf16", "--lr", "1e-2", "--save-every", "1", "--beta", "0.05"]
    words += ["--lora-rank", "2", "--lora-dropout", "0.3", "--entropy-target", "9", "--entropy-coef-step", "0.1"]
    assert train.main([*words, *flags]) == 0


def metrics_of(run_dir) -> list[dict]:
    """Without times."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "tokens_per_second", "memory")
    return [{name: value for name, value in row.items() if not any(t in name for t in timed)} for row in rows]


def test_a_run_with_adapters_resumes_bit_for_bit(checkpoint_folder, tmp_path):
    """CHECKLIST 42, with dropout, bf16 weights under fp32 masters, and an adaptive entropy coefficient."""
    run(checkpoint_folder, tmp_path / "whole", "--steps", "4")
    run(checkpoint_folder, tmp_path / "cut", "--steps", "2")
    assert train.main(["--resume", str(tmp_path / "cut"), "--steps", "4"]) == 0
    ends = [tmp_path / name / "checkpoints/step-000004" for name in ("whole", "cut")]
    for file in ("model.safetensors", "optimizer.safetensors", "adapter/adapter_model.safetensors"):
        whole, cut = (load_file(end / file) for end in ends)
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[name], cut[name]) for name in whole), file
    states = [json.loads((end / "trainer_state.json").read_text()) for end in ends]
    assert states[0]["state"]["trainer"] == states[1]["state"]["trainer"]
    assert states[0]["state"]["trainer"]["entropy_coef"] == pytest.approx(0.4)
    rows = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "cut")
    assert [row["step"] for row in rows[0]] == [0, 1, 2, 3, 4]
    assert {**rows[0][0]} == {**rows[1][0]}
    for whole, cut in zip(*rows, strict=True):
        shared = whole.keys() & cut.keys()  # a last step was evaluated
        assert "grad_norm" in shared or whole["step"] == 0
        assert {name: whole[name] for name in shared} == {name: cut[name] for name in shared}


def test_a_checkpoint_with_adapters_opens_everywhere(checkpoint_folder, tmp_path):
    """Merged weights for every program that opens the folder. The adapters beside them for PEFT, on the untouched
    base."""
    run(checkpoint_folder, tmp_path / "run", "--steps", "2", "--dtype", "fp32")
    folder = tmp_path / "run/checkpoints/step-000002"
    verify_checkpoint(folder)
    assert "adapter/adapter_model.safetensors" in (folder / "SHA256SUMS").read_text()
    ids = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    merged = Qwen2ForCausalLM.from_pretrained(folder)(ids).detach()
    assert (merged - Qwen2ForCausalLM.from_pretrained(checkpoint_folder)(ids)).abs().max() > 0.01
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(theirs(ids).logits, merged, atol=1e-4, rtol=1e-3)
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint_folder)
    adapted = peft.PeftModel.from_pretrained(base, folder / "adapter")
    torch.testing.assert_close(adapted(ids).logits, merged, atol=1e-4, rtol=1e-3)
    optimizer = load_file(folder / "optimizer.safetensors")
    assert sum(t.numel() for name, t in optimizer.items() if name.endswith("exp_avg")) == sum(
        t.numel() for t in load_file(folder / "adapter/adapter_model.safetensors").values()
    )


def test_a_damaged_adapter_is_noticed(checkpoint_folder, tmp_path, capsys):
    run(checkpoint_folder, tmp_path / "run", "--steps", "1")
    assert re.search(r": 0\.0 M of 0\.0 M parameters are trained, in ", capsys.readouterr().out)
    path = tmp_path / "run/checkpoints/step-000001/adapter/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "2"]) == 2
    assert "adapter_model.safetensors is not what was saved" in capsys.readouterr().err
