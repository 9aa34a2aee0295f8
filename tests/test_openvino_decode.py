"""The benchmark beside OpenVINO GenAI, with a stand-in for it: its requests, and the use of the times."""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
STAND_IN = {
    "openvino": """
__version__ = "0"
Tensor = lambda array: array.tolist()

class Type:
    get_type_name = lambda self: "bf16"

class Compiled:
    get_property = lambda self, name: 2 if name.endswith("THREADS") else Type()

class Core:
    compile_model = lambda self, path, device, properties: Compiled()
""",
    "openvino_genai": """
import json
from pathlib import Path

__version__ = "0"

class SchedulerConfig:
    pass

class GenerationConfig:
    pass

class Result:
    def __init__(self, config):
        length = config.max_new_tokens if getattr(config, "ignore_eos", False) else 1
        self.m_generation_ids = [[0] * length] * config.num_return_sequences

class ContinuousBatchingPipeline:
    def __init__(self, path, scheduler, device, properties):
        self.log = Path(path) / "asked.jsonl"

    def generate(self, inputs, configs):
        asked = {"inputs": inputs, "configs": [vars(c) for c in configs]}
        self.log.write_text((self.log.read_text() if self.log.exists() else "") + json.dumps(asked) + "\\n")
        return [Result(c) for c in configs]
""",
}


@pytest.fixture
def script(monkeypatch):
    """By its own name: its sides are imported again in processes of their own."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    return importlib.import_module("openvino_decode")


@pytest.fixture
def exported(script, tmp_path, monkeypatch):
    """A tiny checkpoint, and beside it what stands for its export."""
    common = script.common
    common.write_tokenizer(tmp_path, common.SHAPES["tiny"][0])
    common.Qwen2ForCausalLM.from_config(common.shape_config("tiny")).save_pretrained(tmp_path)
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "config.json").write_text((tmp_path / "config.json").read_text())
    (folder / "openvino_model.xml").write_text("")
    for name, source in STAND_IN.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def flags(folder: Path) -> list[str]:
    return ["--ckpt", str(folder.parent), "--openvino", str(folder)]


def test_both_sides_sample_the_same_work_and_the_ratios_follow_from_the_times(script, exported, capsys):
    small = ["--rows", "2", "4", "--group-size", "2", "--prompt-tokens", "5", "--new-tokens", "3", "--repeats", "2"]
    script.main([*flags(exported), *small])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    sides, rows = report["results"]["sides"], report["results"]["rows"]
    assert {"cpu", "cores", "commit"} <= report["hardware"].keys()
    assert str(exported.parent) not in json.dumps(report), "a path of this machine in a result"

    sizes = [(t["answers"], t["tokens"]) for t in sides["ours"]["turns"]]
    assert sizes == [(2, 6)] * 3 + [(4, 12)] * 3 == [(t["answers"], t["tokens"]) for t in sides["openvino"]["turns"]]
    assert [r["rows"] for r in rows] == [2, 4]
    for i, row in enumerate(rows):
        seconds = {
            name: statistics.median(t["whole_s"] for t in side["turns"][3 * i + 1 : 3 * i + 3])
            for name, side in sides.items()
        }
        assert row["rollout_tok_s"] == pytest.approx({n: 3 * row["rows"] / s for n, s in seconds.items()})
        assert row["rollout_ratio"] == pytest.approx(seconds["openvino"] / seconds["ours"])

    asked = [json.loads(line) for line in (exported / "asked.jsonl").read_text().splitlines()]
    wanted = {"do_sample": True, "temperature": 1.0, "ignore_eos": True, "num_return_sequences": 2}
    for call, turn in enumerate(asked):  # two calls a turn: one stops at the first token
        expected = wanted | {"rng_seed": call // 2, "max_new_tokens": 3 if call % 2 else 1}
        assert turn["configs"] == [expected] * (1 if call < 6 else 2)
    prompts = [turn["inputs"] for turn in asked[1::2]]
    assert all(len(ids) == 5 for prompt in prompts for [ids] in prompt)
    assert len({str(prompt) for prompt in prompts}) == 6, "a prompt came back: a cache would know it"


def test_speeds_are_medians_without_the_warm_up(script):
    def turns(*whole_s: float) -> list[dict]:
        return [{"whole_s": s, "first_s": 0.5, "answers": 8, "tokens": 32} for s in whole_s]

    args = argparse.Namespace(rows=[8], warmup=1, repeats=3, new_tokens=4)
    found = {"ours": turns(99.0, 1.5, 2.0, 50.0), "openvino": turns(0.01, 6.5, 8.0, 8.5)}
    assert script.summarise(found, args) == [{
        "rows": 8,
        "rollout_tok_s": {"ours": 16.0, "openvino": 4.0},
        "decode_tok_s": {"ours": 16.0, "openvino": 3.2},  # 24 tokens in 1.5 and in 7.5 s
        "rollout_ratio": 4.0,
        "decode_ratio": 5.0,
    }]  # fmt: skip
    found["openvino"][2]["tokens"] = 31
    with pytest.raises(ValueError, match="openvino sampled 31 tokens in 8 answers; expected 32 in 8"):
        script.summarise(found, args)


def test_what_cannot_be_compared_is_one_line_and_exit_code_2(script, exported, monkeypatch, capsys):
    def complaint() -> str:
        with pytest.raises(SystemExit) as stopped:
            script.main(flags(exported))
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(config | {"hidden_size": 96}))
    assert "hidden_size is 96, but 64 in" in complaint()
    (exported / "openvino_model.xml").unlink()
    assert "no openvino_model.xml there" in complaint()
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    assert "pip install openvino-genai" in complaint()
