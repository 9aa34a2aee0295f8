"""The benchmarks run on a tiny random model, and say where they ran. Their numbers are nobody's business here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = {
    "budget": ["--random", "tiny"],
    "simulate": [],
    "staleness": ["--updates", "1", "--prompts", "2"],
    "transfer": ["--answers", "2", "--tokens", "8", "--weights", "0.01", "--repeats", "1"],
    "decode": ["--random", "tiny", "--rows", "4", "8", "--group-size", "4", "--new-tokens", "4", "--repeats", "1"],
    "adamw": ["--random", "tiny", "--parameters", "100000", "--repeats", "1"],
    "memory": ["--random", "tiny", "--lengths", "8", "--groups", "2", "--prompts", "2"],
}


def load(name: str) -> ModuleType:
    """A script as a module, loaded from its path: the folder is not on the import path of the tests."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))  # behind the root; the scripts import common.py and budget.py
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
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
    if name == "adamw":
        assert all(r["ms"] > 0 for r in results["contenders"].values())


def test_both_sides_of_the_resident_memory_run():
    """As a script: its sides are processes of their own."""
    command = [sys.executable, "benchmarks/resident.py", "--random", "tiny", "--steps", "2", "--new-tokens", "4"]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True)
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert {side: len(turns) for side, turns in results.items()} == {"as it is": 2, "ours": 2}
    assert all(0 < turn["resident_gib"] <= turn["peak_gib"] for turns in results.values() for turn in turns)


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


# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures from the metrics of runs


def write_metrics(folder: Path, solved: list[float]) -> None:
    """A run of len(solved) - 1 steps: evaluated at each, and `solved` is what it got."""
    folder.mkdir(parents=True)
    lines = []
    for step, share in enumerate(solved):
        names = ("eval_greedy_solved", "eval_format", "eval_greedy_format", "eval_false_sums")
        record = {"step": step, "eval_solved": share, "eval_mean_length": 50 + step, **dict.fromkeys(names, 0.5)}
        if step:
            record |= {"reward": share, "entropy": 1.0, "completions/mean_length": 50.0, "step_time": 30.0,
                       "clip_ratio/low_mean": 0.1, "clip_ratio/high_mean": 0.2}  # fmt: skip
        lines.append(json.dumps(record) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    compare = load("compare")
    monkeypatch.setattr(compare, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(compare, "SWEEPS", {"x": {"one way": "--lr 1 --steps 2", "another": "--lr 2 --steps 2"}})
    write_metrics(compare.run_folder("--lr 1 --steps 2", 0), [0.1, 0.3, 0.5])
    write_metrics(compare.run_folder("--lr 1 --steps 2", 1), [0.1, 0.4, 0.7])
    write_metrics(compare.run_folder("--lr 2 --steps 2", 0), [0.1, 0.2, 0.2])
    return compare


def test_a_sweep_is_the_mean_over_its_seeds_and_their_range(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", "x", "--report", "--out", str(tmp_path / "out")])
    sweep.main()
    said = capsys.readouterr().out.splitlines()
    assert said[2].startswith("| one way | 2 | 0.100 -> 0.600 (0.500 to 0.700) |")
    assert said[3].startswith("| another | 1 | 0.100 -> 0.200 |")
    assert {"hardware", "commands", "sweep"} <= json.loads(said[-1]).keys()
    raw = [json.loads(line) for line in (tmp_path / "out" / "x.jsonl").read_text().splitlines()]
    assert [(r["variant"], r["seed"], len(r["records"])) for r in raw] == [
        ("one way", 0, 3), ("one way", 1, 3), ("another", 0, 3),
    ]  # fmt: skip
    assert (tmp_path / "out" / "x.png").stat().st_size > 10_000


def test_a_sweeps_curves_have_every_run_at_every_step(sweep):
    runs = sweep.collect("x", [0, 1])["one way"]
    assert sweep.curves(list(runs.values()), "eval_solved") == ([0, 1, 2], [[0.1, 0.1], [0.3, 0.4], [0.5, 0.7]])
    steps, rows = sweep.curves(list(runs.values()), "clipped")
    assert (steps, [row[0] for row in rows]) == ([1, 2], [pytest.approx(0.3)] * 2)


def test_a_sweep_runs_what_is_missing_and_nothing_else(sweep, tmp_path, monkeypatch):
    asked = []

    def train(command, **options):
        asked.append(command)
        write_metrics(Path(command[command.index("--run-dir") + 1]), [0.1, 0.2, 0.3])
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(sweep.subprocess, "run", train)
    for variant, flags in sweep.SWEEPS["x"].items():
        for seed in (0, 1):
            sweep.run(variant, flags, seed, threads=1)
    assert [(c[2:4], c[c.index("--seed") + 1]) for c in asked] == [(["--lr", "2"], "1")]


def test_a_run_that_has_evaluated_but_not_ended_is_not_in_the_table(sweep):
    write_metrics(sweep.run_folder("--lr 2 --steps 2", 1), [0.1, 0.3])
    assert list(sweep.collect("x", [0, 1])["another"]) == [0]


def test_every_flag_of_every_sweep_is_one_of_trains():
    from run.config import parse_args

    for variants in load("compare").SWEEPS.values():
        for flags in variants.values():
            parse_args(["--config", str(BENCHMARKS.parent / "configs/countdown-tiny.yaml"), *flags.split()])


def test_the_figure_of_several_seeds(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("figures", BENCHMARKS.parent / "docs" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    monkeypatch.setattr(figures, "RESULTS", tmp_path / "results")
    for seed, solved in enumerate(([0.2, 0.4, 0.6], [0.3, 0.5, 0.7])):
        write_metrics(tmp_path / f"run-{seed}", solved)
    figures.main(["x", str(tmp_path / "run-0"), str(tmp_path / "run-1")])
    said = capsys.readouterr().out.splitlines()
    assert said[2].startswith("| run-0 | 0.200 -> 0.600 |")
    assert said[2].endswith("| 1.0 |")  # minutes: two steps of 30 s
    assert json.loads(said[-1])["runs"]["run-1"]["eval_solved"] == [0.3, 0.7]
    assert (tmp_path / "results" / "x.png").stat().st_size > 10_000
    assert (tmp_path / "results" / "x" / "seed-1.jsonl").read_bytes() == (
        tmp_path / "run-1" / "metrics.jsonl"
    ).read_bytes()
    assert "eval_full_format" not in said[0]  # older runs lack it, and are drawn without
    for seed in (0, 1):
        path = tmp_path / f"run-{seed}" / "metrics.jsonl"
        lines = [json.loads(line) | {"eval_full_format": 0.25} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures.main(["x", str(tmp_path / "run-0"), str(tmp_path / "run-1")])
    said = capsys.readouterr().out.splitlines()
    assert "eval_full_format" in said[0]
    assert "0.250 -> 0.250" in said[2]
    assert figures.series([{"step": i, "m": v} for i, v in enumerate([1, 3, 5])], "m", 2) == ([0, 1, 2], [1, 2, 4])
