"""The exercises have solutions: the code of the repository passes their tests. Empty functions and frequent mistakes
fail."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from exercise_answers import SOLUTIONS, WRONG

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "exercises"
PARTS = ("qwen2_layers", "grpo_steps", "training_loop")


@pytest.fixture
def parts(monkeypatch) -> Iterator[dict[str, tuple[ModuleType, ModuleType]]]:
    """The modules of exercises and those of their tests, imported as pytest imports them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield {part: (importlib.import_module(part), importlib.import_module(f"test_{part}")) for part in PARTS}
    for part in PARTS:
        sys.modules.pop(part), sys.modules.pop(f"test_{part}")


def exercises(module: ModuleType) -> list[str]:
    return [name for name, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__]


def failures(parts, name: str, solution: Callable | None, monkeypatch) -> tuple[int, list[BaseException]]:
    """Put `solution` in the place of an exercise (None: leave it) and run its tests. Their number and errors."""
    module, tests = next((module, tests) for module, tests in parts.values() if name in exercises(module))
    if solution is not None:
        monkeypatch.setattr(module, name, solution)
    count, failed = 0, []
    for title, test in inspect.getmembers(tests, inspect.isfunction):
        if title == f"test_{name}" or title.startswith(f"test_{name}_"):
            for arguments in cases(test):
                count += 1
                try:
                    test(**arguments)
                except Exception as error:
                    failed.append(error)
    return count, failed


def cases(test: Callable) -> list[dict]:
    """The cases of the one `pytest.mark.parametrize` of a test, or one empty case."""
    for mark in vars(test).get("pytestmark", []):
        names, values = mark.args
        return [dict(zip(names, v)) if isinstance(names, tuple) else {names: v} for v in values]
    return [{}]


def test_every_exercise_has_a_solution_a_wrong_one_and_a_line_in_the_readme(parts):
    names = [name for module, _ in parts.values() for name in exercises(module)]
    assert sorted(names) == sorted(SOLUTIONS) == sorted(WRONG)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \d+ \| `(\w+)`", readme, re.MULTILINE) == [
        name for part in PARTS for name in re.findall(r"^def (\w+)", (FOLDER / f"{part}.py").read_text(), re.MULTILINE)
    ]


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_repository_solves_the_exercise(parts, name, monkeypatch):
    count, failed = failures(parts, name, SOLUTIONS[name], monkeypatch)
    assert count > 0
    assert not failed, failed


@pytest.mark.parametrize("name", SOLUTIONS)
def test_an_empty_function_fails_every_test_of_its_exercise(parts, name, monkeypatch):
    module = next(module for module, _ in parts.values() if name in exercises(module))
    if "raise NotImplementedError" not in inspect.getsource(getattr(module, name)):
        pytest.skip(f"{name} is solved in this working tree")
    count, failed = failures(parts, name, None, monkeypatch)
    assert len(failed) == count
    assert all(isinstance(error, NotImplementedError) for error in failed)


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, wrong in WRONG.items() for i in range(len(wrong))])
def test_a_plausible_wrong_solution_fails(parts, name, number, monkeypatch):
    _, failed = failures(parts, name, WRONG[name][number], monkeypatch)
    assert failed
    assert all(isinstance(error, AssertionError) for error in failed), failed  # by a wrong number, not by a crash


def test_a_solution_can_be_worked_on_through_pytest(tmp_path):
    """`python -m pytest exercises/` runs them. A solved one passes, and the others fail."""
    for file in FOLDER.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    mine = tmp_path / "qwen2_layers.py"
    text = mine.read_text(encoding="utf-8")
    start = text.index("raise NotImplementedError", text.index("def swiglu"))
    line = "import torch; return (torch.nn.functional.silu(x @ gate_FD.T) * (x @ up_FD.T)) @ down_DF.T"
    mine.write_text(text[:start] + line + text[start + len("raise NotImplementedError") :], encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "swiglu or block", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert re.search(r"1 failed, 1 passed", done.stdout), done.stdout


def test_the_readme_refers_to_code_that_is_there():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    references = re.findall(r"`((?:\w+/)*\w+\.py):([\w.]+)`", text)
    assert len(references) == len(SOLUTIONS)
    assert all(hooks.find_line(file, name) > 0 for file, name in references)
    assert all((FOLDER / link.partition("#")[0]).is_file() for link in re.findall(r"\]\(([^)]+)\)", text))


def test_the_exercises_need_torch_and_pytest_and_nothing_else():
    """requirements.txt and pytest are enough, and the exercises do not import the repository."""
    allowed = {"__future__", "collections", "itertools", "math", "pytest", "torch", *PARTS}
    for file in FOLDER.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {name.partition(".")[0] for name in names} <= allowed, file


def test_the_exercises_run_in_a_folder_of_their_own(tmp_path):
    """No conftest, setting or module of the repository is needed: unsolved exercises fail, and none has an error."""
    for file in FOLDER.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "pass_at_k or cache_mask", "."]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert re.search(r"8 failed, \d+ deselected", done.stdout), done.stdout


def test_the_main_suite_does_not_collect_the_exercises(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
