"""Two additions to Markdown: formulas as MathML, and links from references to the code.

mkdocs calls the functions `on_*` during a build (mkdocs.yml, `hooks`).

- `$...$` and `$$...$$` become MathML. Browsers draw it without a script, a font or a request.
- `update/losses.py:policy_loss` in backticks becomes a link to that line, in a copy of the file inside the site. An
  unknown name fails the build: `find_line` raises ValueError. tests/test_docs.py checks every page.
"""

from __future__ import annotations

import ast
import html
import re
from functools import cache
from pathlib import Path

import latex2mathml.converter
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = re.compile(r"<code>((?:\w+/)*\w+\.py)(?::([\w.]+))?</code>")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


@cache
def definitions(file: str) -> dict[str, int]:
    """Name -> line of everything a file defines: functions, classes, `Class.method`, assigned names and fields.

    Raises FileNotFoundError if there is no such file in the repository.
    """
    lines: dict[str, int] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                lines.setdefault(prefix + node.name, node.lineno)
                visit(node.body if isinstance(node, ast.ClassDef) else [], f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for name in (n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)):
                    lines.setdefault(prefix + name.id, node.lineno)

    visit(ast.parse((ROOT / file).read_text(encoding="utf-8")).body, "")
    return lines


def find_line(file: str, name: str | None) -> int:
    """Line of the definition of `name` in `file`: a function, class, `Class.method`, constant or field. None: line 1.

    Raises ValueError if the file does not define the name, FileNotFoundError if there is no such file.
    """
    known = definitions(file)
    if name is not None and name not in known:
        raise ValueError(f"{file} defines no {name!r}: was it renamed? The file defines {', '.join(known)}")
    return 1 if name is None else known[name]


def on_files(files, config):
    """Add a page for every Python file of the repository that a page may refer to."""
    folders = ("model", "update", "rollout", "parallel", "tasks", "run", "study", "benchmarks", "docs")
    sources = [*ROOT.glob("*.py"), *(file for folder in folders for file in ROOT.glob(f"{folder}/*.py"))]
    for source in sorted(sources):
        name = source.relative_to(ROOT).as_posix()
        text = source.read_text(encoding="utf-8")
        meta = "---\nsearch:\n  exclude: true\nhide: [toc]\n---"
        page = f"{meta}\n\n# {name}\n\n~~~~ {{ .python linenums=1 }}\n{text}\n~~~~\n"
        files.append(File.generated(config, f"source/{name}.md", content=page))
    return files


def on_page_content(content: str, page, config, files) -> str:
    """Turn formulas into MathML, and references to code into links."""
    if page.file.src_uri.startswith("source/"):
        return content
    up = "../" * page.file.src_uri.count("/")

    def link(match: re.Match) -> str:
        file, name = match.groups()
        if not (ROOT / file).is_file() or file.startswith(("tests/", "exercises/")):
            return match.group()
        line = find_line(file, name)
        return f'<a class="code" href="{up}source/{file}.html#__codelineno-0-{line}">{match.group()}</a>'

    return FORMULA.sub(_mathml, REFERENCE.sub(link, content))


def _mathml(match: re.Match) -> str:
    """The formula of latex2mathml, with the spaces of TeX after `log` and around the bar of KL(p || q)."""
    display = "block" if match.group(1) == "div" else "inline"
    formula = latex2mathml.converter.convert(html.unescape(match.group(2)).strip(), display=display)
    formula = re.sub(r"(<mi>(?:log|exp|cos)</mi>)(?=<m(?!o))", r'\1<mspace width="0.17em"/>', formula)
    formula = formula.replace("<mi>&#x02016;</mi>", "<mo>&#x02016;</mo>")
    return f'<div class="formula">{formula}</div>' if display == "block" else formula
