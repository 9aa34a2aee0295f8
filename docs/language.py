"""How plain is the English of the docstrings? Two shares, and the sentences behind them.

    python docs/language.py            # the shares
    python docs/language.py --list     # every sentence that counts, with its file and line

Counted are the sentences of all docstrings of the project. A sentence counts as indirect if "what", "who" or "whoever"
stands for a thing in it, and it counts if it contains a semicolon. The last line printed is JSON.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (
    "model",
    "update",
    "rollout",
    "parallel",
    "run",
    "tasks",
    "study",
    "benchmarks",
    "docs",
    "tests",
    "exercises",
)
INDIRECT = re.compile(r"\b(what|who|whoever|whatever)\b", re.IGNORECASE)


class Sentence(NamedTuple):
    file: str
    line: int
    text: str


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring of a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                yield node.body[0].lineno, text


def sentences(text: str) -> list[str]:
    """Sentences of the prose of a docstring: without indented code, quotes and code between `."""
    prose = "\n".join("" if line.startswith("        ") else line for line in text.splitlines())
    prose = re.sub(r"`[^`]*`|\"[^\"]*\"", "X", prose)
    parts = re.split(r"(?<=[.!?:])\s+|\n\s*\n", prose)
    return [" ".join(part.split()) for part in parts if len(part.split()) > 2]


def all_sentences() -> list[Sentence]:
    files = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in ROOT.glob(f"{folder}/**/*.py"))]
    return [
        Sentence(file.relative_to(ROOT).as_posix(), line, sentence)
        for file in sorted(files)
        for line, text in docstrings(file)
        for sentence in sentences(text)
    ]


def main() -> None:
    found = all_sentences()
    indirect = [s for s in found if INDIRECT.search(s.text)]
    semicolons = [s for s in found if ";" in s.text]
    if "--list" in sys.argv:
        for s in sorted({*indirect, *semicolons}):
            print(f"{s.file}:{s.line}: {s.text}")
    numbers = {
        "sentences": len(found),
        "what, who, whoever": len(indirect) / len(found),
        "semicolon": len(semicolons) / len(found),
    }
    print(", ".join(f"{name} {x if isinstance(x, int) else f'{x:.1%}'}" for name, x in numbers.items()))
    print(json.dumps({"docstrings": numbers}))


if __name__ == "__main__":
    main()
