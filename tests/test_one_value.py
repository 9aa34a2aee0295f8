"""One value changed in a run's files, in a checkpoint or in a command line, in every program. It works, or ends with
exit code 2 and one line. A traceback, a second line or an escape sequence fails the test.

A changed file of a checkpoint gets a new checksum. Otherwise the checksum alone would answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import make_model, write_tokenizer
from one_value import change_file, copy, sign
from test_train import SMALL

import chat
import evaluate
import explain
import report
import train
import warm_start
from run.config import Config

CASES = 12  # of each test; thousands were tried by hand
STEP = "checkpoints/step-000002"
WORDS = [*SMALL, "--task", "arithmetic"]
RUN_FILES = ["config.yaml", "metrics.jsonl", "samples.jsonl", "held_out.jsonl", "machine.json", "checkpoints/latest"]
CHECKPOINT_FILES = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "SHA256SUMS",
                    "trainer_state.json", "trainer_state.json", "adapter/adapter_config.json"]  # fmt: skip
TEXTS = ["", " ", "x", "-1", "0", "1", "2", "1.5", "nan", "inf", "-inf", "1e39", "1e400", str(2**31), str(10**22),
         "9" * 500, "~nouser/x", "/dev/null", "/", "a\nb", "\x1b[2Jx", "\udcff", "true", "None", "[]", "a" * 300, "1 2",
         None]  # fmt: skip
NAMES = {
    "train": [field.name for field in dataclasses.fields(Config)],
    "evaluate": [field.name for field in dataclasses.fields(Config)] + ["samples", "after", "json"] * 6,
    "chat": [field.name for field in dataclasses.fields(chat.Options)],
    "explain": [field.name for field in dataclasses.fields(explain.Options)],
    "report": ["out", "after", "png", "unknown"],
    "warm_start": [field.name for field in dataclasses.fields(warm_start.Options)],
}


class Input(io.StringIO):
    def reconfigure(self, **changes: object) -> None:
        """A text in memory has no encoding."""


def talk(argv: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", Input("3 + 5\n"))
        patch.setattr(sys, "stdout", Input())
        return chat.main(argv)


MAIN = {
    "train": train.main, "evaluate": evaluate.main, "chat": talk, "explain": explain.main, "report": report.main,
    "warm_start": warm_start.program,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Path]:
    """A folder with a checkpoint, a run of all weights and a run of adapters."""
    folder = tmp_path_factory.mktemp("runs")
    make_model().save_pretrained(write_tokenizer(folder / "tiny"))
    for name, rank in (("full", "0"), ("lora", "2")):
        argv = ["--ckpt", str(folder / "tiny"), "--run-dir", str(folder / name), "--steps", "2", "--lora-rank", rank]
        assert train.main([*argv, *WORDS, "--log-to"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain, "page", json.dumps)
        patch.setattr(report.plotly.offline, "get_plotlyjs", lambda: "")  # 4.8 MB that these tests do not need
        patch.chdir(folder)
        yield folder


def words_of(program: str, ckpt: Path, run: Path) -> list[str]:
    """A command line that works."""
    room = ["--tokens", "300", "--eval-problems", "2", "--room", "120"]
    words = {
        "train": ["--ckpt", ckpt, "--run-dir", "new", "--steps", 1, "--log-to", *WORDS],
        "evaluate": ["--ckpt", ckpt, *WORDS, "--samples", 2],
        "chat": ["--ckpt", ckpt, "--max-new-tokens", 8],
        "explain": ["--ckpt", ckpt, "--new-tokens", 4, "--out", "x.html"],
        "report": [run, "--after"],
        "warm_start": ["--ckpt", ckpt, "--out", "warm", *room],
    }
    return list(map(str, words[program]))


def assert_works_or_is_refused(program: str, argv: list[str], what: str, codes: tuple[int, ...] = (0, 2)) -> int:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            code = MAIN[program](argv)
        except (Exception, SystemExit) as failure:
            raise AssertionError(f"{program}: {what}") from failure
    said = [line for line in error.getvalue().splitlines() if not line.startswith(("WARNING", "ERROR"))]
    assert code in codes, (what, said)
    assert code == 0 or len(said) == 1, (what, said)
    assert "\x1b[2J" not in out.getvalue() + error.getvalue(), what
    return code


def refused(program: str, *words: object, file: str) -> None:
    """Exit code 2, and one line that names the file."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        assert MAIN[program](list(map(str, words))) == 2
    assert error.getvalue().count("\n") == 1
    assert file in error.getvalue()


@pytest.mark.parametrize("program", ["train", "report"])
def test_a_run_s_files(runs, program):
    for seed in range(CASES):
        rng = random.Random(seed)
        run, name = copy(runs / rng.choice(["full", "lora"]), runs / "copy"), rng.choice(RUN_FILES)
        try:
            change_file(run / name, rng)
        except (yaml.YAMLError, UnicodeEncodeError):
            continue  # the value cannot be written there
        argv = ["--resume", str(run), "--steps", "3"] if program == "train" else [str(run), "--after"]
        assert_works_or_is_refused(
            program, argv, f"seed {seed}, {name}", (0, 2, 3, 4) if program == "train" else (0, 2)
        )


@pytest.mark.parametrize("program", MAIN)
def test_a_checkpoint_s_files(runs, program):
    for seed in range(CASES):
        rng = random.Random(seed)
        run = copy(runs / rng.choice(["full", "lora"]), runs / "copy")
        name = rng.choice([name for name in CHECKPOINT_FILES if (run / STEP / name).is_file()])
        change_file(run / STEP / name, rng)
        if name != "SHA256SUMS":
            sign(run / STEP)
        argv = words_of(program, run / STEP, run)
        if program == "train" and rng.random() < 0.8:
            argv = ["--resume", str(run), "--steps", "3"]
        copy(runs / "tiny", runs / "new")
        assert_works_or_is_refused(
            program, argv, f"seed {seed}, {name}", (0, 2, 3, 4) if program == "train" else (0, 2)
        )


@pytest.mark.parametrize("program", MAIN)
def test_flags(runs, program):
    for seed in range(CASES):
        rng = random.Random(seed)
        flag, value = "--" + rng.choice(NAMES[program]).replace("_", "-"), rng.choice(TEXTS)
        new = [flag] if value is None else rng.choice([[flag, value], [f"{flag}={value}"]])
        copy(runs / "tiny", runs / "new")
        argv = [*words_of(program, runs / "tiny", runs / "full"), *new]
        assert_works_or_is_refused(program, argv, f"seed {seed}, {new}", (0, 2, 3, 4) if program == "train" else (0, 2))


# --- values that ended in a traceback


def changed_state(runs: Path, run: str, name: str, change: Callable[[dict], object]) -> Path:
    copied = copy(runs / run, runs / "copy")
    path = copied / STEP / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    sign(copied / STEP)
    return copied


@pytest.mark.parametrize("change", [
    lambda record: record["state"]["random"].update(torch=3),
    lambda record: record["state"]["random"].update(torch="00"),
    lambda record: record["state"]["random"].update(python=[3, [1, 2], None]),
    lambda record: record["state"]["random"].pop("python"),
    lambda record: record["state"]["trainer"].update(entropy_coef="x"),
    lambda record: record["state"]["trainer"].update(refusals=[]),
    lambda record: record["state"].update(trainer=None),
    lambda record: record.update(step=-1),
    lambda record: record.update(step=True),
    lambda record: record.update(step="2"),
])  # fmt: skip
def test_a_wrong_value_of_the_trainer_s_state_is_refused(runs, change):
    run = changed_state(runs, "full", "trainer_state.json", change)
    refused("train", "--resume", run, "--steps", 3, file="trainer_state.json")


@pytest.mark.parametrize("change", [
    lambda record: record["optimizer"].update(param_groups="x"),
    lambda record: record["optimizer"].update(param_groups=["x"]),
    lambda record: record["optimizer"].update(scalars={"x": {}}),
    lambda record: record["optimizer"].update(scalars=[]),
])  # fmt: skip
def test_a_wrong_value_of_the_optimizer_s_settings_is_refused(runs, change):
    run = changed_state(runs, "full", "trainer_state.json", change)
    refused("train", "--resume", run, "--steps", 3, file="optimizer.safetensors")


@pytest.mark.parametrize("values", [{"r": 1.5}, {"r": "2"}, {"r": True}, {"lora_alpha": None}, {"lora_alpha": "x"},
                                    {"lora_dropout": "x"}])  # fmt: skip
def test_a_wrong_number_of_adapters_is_refused(runs, values):
    run = changed_state(runs, "lora", "adapter/adapter_config.json", lambda config: config.update(values))
    refused("train", "--resume", run, "--steps", 3, file="adapter_config.json")


def test_a_mistake_in_flags_is_one_line_in_every_program(runs, capsys):
    for program in MAIN:
        for words in (["--nothing-known", "3"], ["--ckpt"] if program != "report" else ["--out"]):
            assert MAIN[program]([*words_of(program, runs / "tiny", runs / "full"), *words]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1, said
            assert said.startswith(f"{program}.py: "), said
