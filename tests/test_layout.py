"""The layout: few files at the root, imports in one direction, no circle, names from the modules that define them."""

from __future__ import annotations

import ast
import subprocess
import sys
import venv
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["model", "update", "rollout", "parallel", "run", "tasks", "study"]
# A module may import modules of a lower level, and of its own level if there is no circle.
LEVELS = [
    {"data_types"},
    {"model"},
    {"qwen2_llm", "tokenizer", "optimizer"},
    {"tasks"},
    {"rollout", "run", "parallel", "math_task"},
    {"update"},
    {"grpo", "textbook", "study"},
    {"train", "evaluate", "chat", "explain", "report", "warm_start"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the project."""
    files = [*ROOT.glob("*.py"), *(file for package in PACKAGES for file in ROOT.glob(f"{package}/*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files if file.stem != "__init__"}


@cache
def imports(name: str) -> list[tuple[str, str]]:
    """(module of the project, imported name) for every import of a module."""
    found = []
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner, "") if inner in modules() else (node.module, alias.name))
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return [(module, alias) for module, alias in found if module in modules()]


def level(name: str) -> int:
    return LEVEL[name.partition(".")[0]]


def test_the_root_has_at_most_13_python_files():
    assert len(list(ROOT.glob("*.py"))) <= 13


def test_every_module_has_a_level():
    assert {name.partition(".")[0] for name in modules()} == set(LEVEL)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_in_one_direction(name):
    upward = [module for module, _ in imports(name) if level(module) > level(name)]
    assert not upward, f"{name} imports from a higher level"


def test_there_is_no_import_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for module, _ in imports(name):
                visit(module, (*path, name))
            done.add(name)

    for name in modules():
        visit(name, ())


@pytest.mark.parametrize("name", sorted(modules()))
def test_names_come_from_the_module_that_defines_them(name):
    """`from grpo import SamplingParams` would work, and would hide the place of the class."""
    for module, alias in imports(name):
        if alias:
            tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
            borrowed = {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
            assert alias not in borrowed, f"{name} takes {alias} from {module}, which imports it"


@pytest.mark.slow
def test_an_installed_copy_works_from_any_folder(tmp_path):
    """pip install -e . in a fresh environment. Then GRPO() finds the bundled model and the presets."""
    venv.create(tmp_path / "venv", with_pip=False, system_site_packages=False)
    bin_folder = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    site = subprocess.run(
        [bin_folder / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    # The packages of this environment are visible by a path file, so that nothing is downloaded; the project is not.
    own = [path for path in sys.path if path.rstrip("/").endswith(("site-packages", "dist-packages"))]
    Path(site, "borrowed.pth").write_text("\n".join(own) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(bin_folder / "python"), "install", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, "--no-build-isolation", "-e", str(ROOT)], capture_output=True, text=True)
    if "No module named 'setuptools'" in done.stderr or "Cannot import 'setuptools" in done.stderr:
        done = subprocess.run([*pip, "-e", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = "from grpo import GRPO; trainer = GRPO(); import grpo; print(trainer.config.max_new_tokens, grpo.__file__)"
    command = [str(bin_folder / "python"), "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["192", str(ROOT / "grpo.py")]
