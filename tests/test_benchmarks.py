"""The benchmarks run on a tiny random model, and say where they ran; their numbers are nobody's business here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = {
    "budget": ["--random", "tiny"],
    "decode": ["--random", "tiny", "--rows", "4", "8", "--group-size", "4", "--new-tokens", "4", "--repeats", "1"],
    "optimizer": ["--random", "tiny", "--parameters", "100000", "--repeats", "1"],
    "memory": ["--random", "tiny", "--lengths", "8", "--groups", "2", "--prompts", "2"],
}


def load(name: str) -> ModuleType:
    """A script as a module; not by `import`, for the root has an optimizer.py as well."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))  # behind the root; the scripts import common.py and budget.py
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SMALL)
def test_the_last_line_is_json_with_the_hardware_and_the_commit(name, capsys):
    load(name).main(SMALL[name])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"cpu", "cores", "gpu", "torch", "commit"} <= report["hardware"].keys()
    results = report["results"]
    if name == "decode":
        assert [r["rows"] for r in results["rows"]] == [4, 8]
        assert all(min(r["part_ms"].values()) > 0 for r in results["rows"]), "a part of the decode step was not timed"
    if name == "memory":
        assert all(r[phase]["peak"] >= r[phase]["loaded"] > 0 for r in results for phase in ("rollout", "update"))
    if name == "optimizer":
        assert all(r["ms"] > 0 for r in results["contenders"].values())


def test_a_decode_step_leaves_no_hooks_behind():
    decode, common = load("decode"), load("common")
    model = common.Qwen2ForCausalLM.from_config(common.shape_config("tiny"))
    sample = decode.decoding.sample
    with pytest.raises(ZeroDivisionError):
        decode.seconds_by_part(model, "cpu", lambda: 1 / 0)
    assert decode.decoding.sample is sample
    assert "logits" not in vars(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_budget_counts_what_can_be_counted_by_hand():
    """Qwen2.5-0.5B: a decode step reads 0.988 GB of weights, and the keys of a shared prompt once a group."""
    budget, common = load("budget"), load("common")
    shared, repeated = (
        {p.name: p for p in budget.decode_step(common.shape_config("0.5b"), 4, 8, 134, 32, share)}
        for share in (True, False)
    )
    weights = 24 * (896 * 18 * 64 + 896 * 896 + 3 * 896 * 4864) + 151_936 * 896
    assert sum(shared[name].bytes for name in ("qkv", "o", "gate+up", "down", "head")) == 2 * weights
    assert sum(shared[name].operations for name in ("qkv", "o", "gate+up", "down", "head")) == 2 * 32 * weights
    assert shared["attention"].bytes == 24 * 2 * 2 * 128 * (32 * 32 + 4 * 134)
    assert repeated["attention"].bytes == 24 * 2 * 2 * 128 * (32 * 32 + 32 * 134)
