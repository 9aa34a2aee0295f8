"""How much code does one training step run? Files, functions, executable lines, and changes of file.

    python benchmarks/reading_path.py

One step of the default run (bundled model, CPU, fp32, one process) is executed under `sys.setprofile`. Only functions
of this repository count. "Changes" are the changes of file if the functions are read in the order of their first call.
The last line printed is JSON.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import CodeType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import hardware  # noqa: E402

from data_types import MiniBatch  # noqa: E402
from grpo import GRPO  # noqa: E402
from run.config import load_config, preset_for  # noqa: E402


class ReadingPath(NamedTuple):
    """The functions of the repository that ran, in the order of their first call."""

    functions: list[tuple[str, str, int]]  # (file, qualified name, first line)

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(file for file, _, _ in self.functions))

    @property
    def changes(self) -> int:
        names = [file for file, _, _ in self.functions]
        return sum(a != b for a, b in pairwise(names))

    @property
    def lines(self) -> int:
        return sum(executable_lines(ROOT / file, first) for file, _, first in self.functions)


def executable_lines(file: Path, first: int) -> int:
    """Number of lines of the function that begins at line `first` on which a statement begins, without docstrings and
    without functions inside it (they are counted by themselves)."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.Lambda) and _first_line(node) == first:
            body = node.body if isinstance(node.body, list) else [node.body]
            return len({line for statement in body for line in _lines(statement)} | {node.lineno})
    return 1


def _first_line(node: ast.FunctionDef | ast.Lambda) -> int:
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)])


def _lines(statement: ast.AST) -> set[int]:
    if isinstance(statement, ast.FunctionDef):
        return set()
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return set()  # a docstring
    lines = {statement.lineno} if isinstance(statement, ast.stmt | ast.expr) else set()
    for child in ast.iter_child_nodes(statement):
        lines |= _lines(child)
    return lines


def trace(work: Callable[[], object]) -> ReadingPath:
    """Run `work` and note every function of the repository at its first call."""
    seen: dict[CodeType, tuple[str, str, int]] = {}

    def profile(frame, event, argument) -> None:
        code = frame.f_code
        if (event == "call" and code not in seen and code.co_name[0] != "<") or code.co_name == "<lambda>":
            path = Path(code.co_filename)
            if path.is_relative_to(ROOT) and path != Path(__file__).resolve():
                seen.setdefault(code, (path.relative_to(ROOT).as_posix(), code.co_qualname, code.co_firstlineno))

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return ReadingPath(list(seen.values()))


def main() -> None:
    config = load_config(preset_for("countdown-tiny"))
    config.device, config.dtype = "cpu", "fp32"
    trainer = GRPO(config)
    batch = MiniBatch.from_problems(trainer.task.problems("train", config.prompts_per_step), trainer.tokenizer)
    path = trace(lambda: trainer.step(batch))
    for file, name, _ in path.functions:
        print(f"{file:28} {name}")
    numbers = {"files": len(path.files), "functions": len(path.functions), "lines": path.lines, "changes": path.changes}
    print("\n" + ", ".join(f"{number} {name}" for name, number in numbers.items()))
    print(json.dumps({"reading_path": numbers, "hardware": hardware()}))


if __name__ == "__main__":
    main()
