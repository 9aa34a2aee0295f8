"""Parts of error messages of one line: the first line of another error, the nearest known name, a path with `~`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def first_line(error: object) -> str:
    """The first line of an error's text, at most 200 characters, or the error's type if it has no text."""
    return plain((str(error).strip().splitlines() or [type(error).__name__])[0][:200])


def plain(text: str) -> str:
    """Text of a file or of a user's code, with control characters in Python's notation."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def closest(name: str, known: Iterable[str], cutoff: float = 0.0) -> str | None:
    """The most similar name in `known`, or None. `cutoff`: 0 takes any name, 1 only an equal one."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the similar known name, or else all known names."""
    known = sorted(known)
    close = closest(name, known, cutoff=0.6)
    return f"; did you mean {close}?" if close else f"; known are {', '.join(known[:20]) or 'none'}"


def home_path(path: str | Path) -> Path:
    """`path` with the user's folder for `~`. Raises FileNotFoundError, in one line, for `~name` of an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise FileNotFoundError(f"{path}: there is no user {user[1:]!r} whose folder {user} could be") from error
