"""Command line and YAML into a dataclass. `tyro` reads the flags, and this file shortens its error messages.

Departures from a plain `tyro.cli(Config)`:

* A YAML file is converted into flags and read by the same parser. Types and errors are then the same for both. Floats
  such as `1e-6`, which are text in YAML 1.1, are read as floats.
* An error is one line, not a box of several lines. It is a ValueError: the program prints it and exits with code 2.
* The error for an unknown name suggests the nearest known name.
* The first line of the docstring of each base class is a title in `--help`.

How to call it:

    @dataclass
    class Options: ...
    options = parse_flags(Options, sys.argv[1:])
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import io
import logging
import re
import reprlib  # a bounded repr: a few lines of YAML aliases can expand to a list of 10^10 items
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_type_hints

import tyro
import yaml

from run.terminal import printable, say
from tasks.messages import closest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
logger = logging.getLogger(__name__)
REMOVED = {"shared_prefix"}  # options of older versions. A config.yaml of an old run may have them; they are ignored
RENAMED = {"cpu_optimizer": ("optimizer_state", {True: "host", False: "device"})}  # read from files, with a warning


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, for a program with other arguments than flags. A mistake is a ValueError with one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"command line: {message}; --help lists all options")


class _Capture(io.StringIO):
    """Captures tyro's output. Its boxes can be told from text only in UTF-8."""

    encoding = "utf-8"


def parse_flags(schema: type[T], argv: list[str], default: T | None = None, source: str = "command line") -> T:
    """Read flags into a dataclass whose fields are the flags, over the values of `default`.

    Raises ValueError with one line that begins with `source`. `--help` prints and exits with code 0.
    """
    out, error = _Capture(), _Capture()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            values, unknown = _parse(schema, argv, default, return_unknown_args=True)
    except SystemExit as exit:
        if exit.code:
            raise ValueError(f"{source}: {_sentence(error.getvalue())}") from None
        say(help_text(schema, default=default))
        raise
    if unknown:
        names = [flag_name(field.name) for field in dataclasses.fields(schema)]
        raise ValueError(f"{source}: {_unknown(unknown[0], names)}")
    return values


def _parse(schema: type[T], argv: list[str], default: T | None, **more: Any) -> Any:
    """Without a default, tyro makes the object once, so that its `__post_init__` sees the flags."""
    if default is not None:
        more["default"] = default
    return tyro.cli(schema, args=argv, **more)


def help_text(schema: type[T], only: Collection[str] | None = None, default: T | None = None) -> str:
    """The text of `--help`. only: the fields to show; None: all."""
    out = _Capture()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        _parse(schema, ["--help"], default)
    text = _with_titles(out.getvalue(), schema).rstrip()
    if only is not None:
        text = _lines_of(text, {flag_name(name) for name in only})
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _lines_of(help: str, flags: Collection[str]) -> str:
    """The lines of these flags, and the titles above them."""
    title, kept, shown = "", [], False
    for line in help.splitlines():
        name = re.match(r"│ (--[\w-]+)", line)
        if line.startswith("├─ "):
            title, shown = line, False
        elif name:
            shown = name[1] in flags
            kept += [title] * bool(shown and title) + [line] * shown
            title = "" if shown else title
        elif shown and line.startswith("│"):
            kept.append(line)
    return "\n".join(line.strip("│├┤ ─" if line.startswith("├") else "│").rstrip() for line in kept)


def yaml_flags(path: str | Path, schema: type) -> list[str]:
    """Convert a YAML file into flags. Raises FileNotFoundError or ValueError, each with one line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected lines of `name: value`, found {type(values).__name__}")
    hints = get_type_hints(schema)
    flags: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in REMOVED:
            continue
        if name in RENAMED:
            name, value = _renamed(path, name, value)
        if name not in hints:
            raise ValueError(f"{path}: {_unknown(str(key), list(hints))}")
        flags += _as_flag(f"{path}: {name}", flag_name(name), value, hints[name])
    return flags


def _renamed(path: Path, old: str, value: Any) -> tuple[str, Any]:
    """Name and value of an option today. The file of an old run has the old one, and the run can still be resumed."""
    name, values = RENAMED[old]
    if not isinstance(value, bool):
        raise ValueError(f"{path}: {old} is now {name}: expected one of {', '.join(values.values())}")
    logger.warning("%s: %s is now %s; %s is read as %s", path, old, name, str(value).lower(), values[value])
    return name, values[value]


def _as_flag(where: str, flag: str, value: Any, hint: Any) -> list[str]:
    """One YAML value as a flag: a switch, a flag with one word, or a flag with several words."""
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{where}: expected true or false, found {reprlib.repr(value)}")
        return [flag if value else "--no-" + flag[2:]]
    several = str(hint).startswith("tuple")
    words = value if isinstance(value, list) else [value]
    if isinstance(value, list) != several or any(isinstance(word, (list, dict, set, bool)) for word in words):
        raise ValueError(
            f"{where}: expected {'a list of values' if several else 'one value'}, found {reprlib.repr(value)}"
        )
    return [flag, *map(str, words)] if several else [f"{flag}={value}"]


def one_line(error: BaseException, limit: int = 600) -> str:
    """The text of an error on one line, bounded and without control characters: it may quote any file."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def flag_name(field: str) -> str:
    """The flag of a field: `group_size` -> `--group-size`."""
    return "--" + field.replace("_", "-")


def normalise(argv: list[str], bare: dict[str, str]) -> list[str]:
    """Write `--run_dir` as `--run-dir`. A flag in `bare` that has no value gets the value from `bare`."""
    words: list[str] = []
    for word, following in zip(argv, [*argv[1:], "--"]):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            word = name.replace("_", "-") + equals + value
        words.append(f"{word}={bare[word]}" if word in bare and following.startswith("--") else word)
    return words


def take_flag(argv: list[str], flag: str) -> tuple[list[str], list[str]]:
    """Take every `flag VALUE` and `flag=VALUE` out of a command line: (values, remaining words)."""
    values, rest, words = [], [], iter(argv)
    for word in words:
        if word.startswith(flag + "="):
            values.append(word.partition("=")[2])
        elif word == flag:
            value = next(words, "--")
            if value.startswith("--"):
                raise ValueError(f"command line: {flag} needs a value")
            values.append(value)
        else:
            rest.append(word)
    return values, rest


def _unknown(word: str, known: list[str]) -> str:
    """The error message for a name that is not in `known`."""
    if known[0].startswith("--") and not word.startswith("--"):
        return f"unexpected argument {word!r}"
    word = word.partition("=")[0]
    old = word.removeprefix("--").removeprefix("no-").replace("-", "_")
    if old in RENAMED:
        name, values = RENAMED[old]
        return f"{word} is now {flag_name(name)}, with one of {', '.join(values.values())}"
    return f"unknown option {word}, the nearest known one is {closest(word, known)}; --help lists all"


def _sentence(box: str) -> str:
    """The text of the box around an error of tyro, up to its first horizontal line, as one line."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    body = [line for line in lines if not line.startswith("╭")]
    end = next((i for i, line in enumerate(body) if line.startswith(("──", "╰"))), len(body))
    return " ".join(" ".join(body[:end]).split())


def _with_titles(help: str, schema: type) -> str:
    """Put the first line of each base class's docstring above the flags of that class."""
    for group in schema.__bases__:
        own = list(vars(group).get("__annotations__", {}))
        if not own:
            continue
        title = inspect.cleandoc(group.__doc__ or group.__name__).splitlines()[0]
        line = re.search(rf"^│ {flag_name(own[0])}\b.*\n", help, flags=re.MULTILINE)
        if line:
            rule = f"├─ {title} ".ljust(len(line[0]) - 2, "─") + "┤\n"
            help = help[: line.start()] + rule + help[line.start() :]
    return help
