"""Recipes: every command can be given, finished parts are skipped, and every published figure has its script."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_benchmarks import load

from run.config import parse_args
from run.flags import take_flag

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.sh") if path.name != "common.sh")
WITHOUT = {"worked-qwen2.5-coder-0.5b"}  # its examples are code of earlier commits
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def bash(script: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in ("SEEDS", "THREADS", "CKPT")}
    return subprocess.run(["bash", str(script), *words], capture_output=True, text=True, env=kept | environment)


def commands(script: Path, **environment: str) -> list[list[str]]:
    done = bash(script, "--dry", **environment)
    assert done.returncode == 0, done.stderr
    assert "# cost: " in done.stdout
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def without_values(options: list[str], *flags: str) -> list[str]:
    for flag in flags:
        _, options = take_flag(options, flag)
    return options


def check_options(file: str, options: list[str], monkeypatch) -> None:
    """The program's own parser reads the options. It is stopped before it does anything."""
    if file == "train.py":
        parse_args(without_values(options, "--resume"))
    elif file == "evaluate.py":
        parse_args(without_values(options, "--samples", "--after", "--json"))
    elif file == "warm_start.py" or file.startswith("docs/"):
        text = (ROOT / file).read_text(encoding="utf-8")
        for option in options:
            assert not option.startswith("--") or re.search(rf"{option}\b|\b{option[2:].replace('-', '_')}:", text), (
                option
            )
    else:
        real = argparse.ArgumentParser.parse_args

        def parse_only(parser, given=None, namespace=None):
            real(parser, options, namespace)
            raise InterruptedError

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        monkeypatch.setattr(sys, "argv", [file, *options])
        with pytest.raises(InterruptedError):
            load(Path(file).stem).main()
        monkeypatch.undo()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_command_of_a_recipe_can_be_given(recipe, monkeypatch):
    given = commands(recipe)
    assert given[0] == ["python", "-m", "pip", "install", "-r", "requirements.txt"]
    assert len(given) > 1
    for python, file, *options in given[1:]:
        assert python == "python"
        assert (ROOT / file).is_file(), file
        check_options(file, options, monkeypatch)


def test_the_flags_of_every_sweep_can_be_given():
    for sweep in load("compare").SWEEPS.values():
        for flags in sweep.values():
            parse_args(flags.split())


def test_a_wrong_flag_would_be_found(tmp_path, monkeypatch):
    for file, options in (
        ("train.py", ["--learning", "1"]), ("evaluate.py", ["--stepps", "1"]), ("benchmarks/compare.py", ["no-sweep"])
    ):  # fmt: skip
        with pytest.raises((ValueError, SystemExit)):
            check_options(file, options, monkeypatch)
    with pytest.raises(AssertionError):
        check_options("warm_start.py", ["--no-such-option"], monkeypatch)


def test_a_recipe_takes_only_dry():
    done = bash(ROOT / "recipes/countdown-tiny.sh", "--fast")
    assert done.returncode == 2
    assert "expected --dry or nothing" in done.stderr


# --- an interrupted recipe


@pytest.fixture
def copy(tmp_path) -> Path:
    """The recipes in a folder of their own, with a `python` that writes down its words and makes the files of a run."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        '[ "$1" = -c ] && exit 0\n'
        'echo "$*" >> log\n'
        'case "$*" in *"$FAIL"*) [ -n "$FAIL" ] && exit 3;; esac\n'
        'while [ $# -gt 1 ]; do case "$1" in --steps) steps=$2;; --run-dir) folder=$2;; --out) mkdir -p "$2";'
        ' touch "$2/config.json";; esac; shift; done\n'
        '[ -z "${folder:-}" ] || mkdir -p "$folder/checkpoints/$(printf step-%06d "$steps")"\n'
    )
    python.chmod(0o755)
    return tmp_path


def log_of(folder: Path) -> list[str]:
    lines = (folder / "log").read_text().splitlines()
    (folder / "log").unlink()
    return lines


def test_an_interrupted_recipe_goes_on_with_what_is_missing(copy):
    recipe, python = copy / "recipes/digits.sh", str(copy / "python")
    first = bash(recipe, PYTHON=python, FAIL="--seed 1")
    assert first.returncode == 3
    ran = log_of(copy)
    assert [line.split()[0] for line in ran] == ["warm_start.py", "train.py", "train.py"]
    again = bash(recipe, PYTHON=python, FAIL="")
    assert again.returncode == 0, again.stderr
    assert [line.split()[0] for line in log_of(copy)] == ["train.py", "docs/figures.py", "docs/workings.py"]
    assert "# finished: runs/digits-0" in again.stdout
    assert "# finished: models/digits/config.json" in again.stdout


def test_seeds_and_threads_can_be_chosen():
    for recipe in ("countdown-tiny", "digits"):
        given = commands(ROOT / f"recipes/{recipe}.sh", SEEDS="7")
        assert [take_flag(words, "--seed")[0] for words in given if "train.py" in words] == [["7"]]
    assert commands(ROOT / "recipes/losses.sh", THREADS="2", SEEDS="3")[-1][-4:] == ["--seeds", "3", "--threads", "2"]


# --- pages


def test_every_figure_has_a_recipe_and_its_page_names_it():
    index = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    for recipe in RECIPES:
        assert f"`recipes/{recipe.name}`" in index
    makes = dict(re.findall(r"`(recipes/[\w-]+\.sh)` \| `results/([\w.-]+)\.png`", index))
    figures = {path.stem for path in (ROOT / "docs/results").glob("*.png")}
    assert figures - set(makes.values()) == WITHOUT
    for recipe, figure in makes.items():
        assert figure in (ROOT / recipe).read_text(encoding="utf-8")
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for recipe, figure in makes.items():
            if f"results/{figure}.png)" in text:
                assert recipe in text, f"{page.name} shows {figure}.png and does not name {recipe}"
