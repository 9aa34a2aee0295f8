"""One changed value in the files of a run, in a checkpoint or in a command line, for test_one_value.py."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import yaml
from report_fixtures import EVIL

from run.checkpoint import STATE, SUMS, _sha256

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 1.5, 2**31, 2**53, 10**18, 10**400, 1e308, -1e308, 1e39, math.nan, math.inf,
    -math.inf, "", " ", "x", "1", EVIL, "a\nb", "\x00", "\ud800", "~nouser/x", "/dev/null", "a" * 5000, [], [1], ["x"],
    [[]], [None] * 3, [1e999], {}, {"a": 1}, {"": None},
]  # fmt: skip


def change(value: Any, rng: random.Random) -> Any:
    """The same with one value, at any depth, replaced or left out."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.05:
            return value | {rng.choice(["extra", EVIL, "step", "__proto__"]): rng.choice(VALUES)}
        return value | {key: change(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], change(value[i], rng), *value[i + 1 :]]
    return rng.choice(VALUES)


def change_file(path: Path, rng: random.Random) -> None:
    """Change one value in a file, or, seldom, cut it off."""
    text = path.read_text(encoding="utf-8")
    if rng.random() < 0.05:
        path.write_text(text[: rng.randrange(len(text) + 1)], encoding="utf-8")
    elif path.suffix == ".yaml":
        changed = change(yaml.safe_load(text), rng)
        path.write_text(json.dumps(changed) if rng.random() < 0.5 else yaml.safe_dump(changed), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(change(json.loads(text), rng)), encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines = text.splitlines()
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(change(json.loads(lines[i]), rng))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:  # `latest`, SHA256SUMS
        words = text.split()
        i = rng.randrange(len(words))
        new = ["", "x", "..", "../../x", "/", "\x00", "\ud800", "step-9", EVIL, "a" * 5000]
        words[i] = rng.choice(new)
        path.write_text(" ".join(words) + "\n", encoding="utf-8", errors="surrogatepass")


def sign(folder: Path) -> None:
    """Write the checksums of a changed checkpoint: such a change is not noticed by them."""
    names = sorted((p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != SUMS),
                   key=lambda name: (name == STATE, name))  # fmt: skip
    (folder / SUMS).write_text("".join(f"{_sha256(folder / name)}  {name}\n" for name in names), encoding="utf-8")


def copy(run: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(run, place)
    return place
