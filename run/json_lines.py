"""Files of JSON lines that only ever hold whole lines, in the order of their steps: metrics, samples, held-out answers.

    file = JsonLines(run_dir / "metrics.jsonl", valid=is_metrics, once=True)
    file.append({"step": 3, "reward": 0.5})
    aside = file.truncate_after(2)         # a resumed run writes step 3 again; broken lines go to metrics.jsonl.broken
    records = read_lines(run_dir / "metrics.jsonl")

A line can be broken in any place: a disk error, an editor, a file that was copied while it was written. Such a line
costs itself and no other: readers skip it, and a resume sets it aside.
"""

from __future__ import annotations

import bisect
import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]
LARGEST_STEP = 2**53  # an integer that every reader of JSON holds exactly
LARGEST_INT = 2**100  # larger integers are written as floats


class Line(NamedTuple):
    """A line of a file. step: None if the line is broken."""

    start: int
    size: int
    step: int | None


class JsonLines:
    """A file of JSON objects with a "step", a line each.

    Args:
        valid: whether an object that has a step is what this file holds.
        once: a step has one line at most.
    """

    def __init__(self, path: Path, valid: Callable[[Record], bool] = lambda record: True, once: bool = False):
        self.path, self._valid, self._once = path, valid, once
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open for the length of the run)

    def append(self, *records: Record) -> None:
        """Write all of them, or none and raise OSError."""
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode("ascii")
        if not self.path.exists():  # deleted: writes to the open file would succeed, and be lost with it
            again = open(self.path, "ab", buffering=0)  # noqa: SIM115
            self._file.close()
            self._file = again
        start = self._file.seek(0, 2)
        try:
            if self._file.write(text) != len(text):
                raise OSError(errno.ENOSPC, "the disk is full")
        except OSError:
            self._file.truncate(start)
            raise

    def truncate_after(self, step: int) -> int:
        """Forget the lines of later steps. Lines that are broken, or not in the order of the steps, are appended to
        `<name>.broken`; their number is returned. Raises OSError before anything is lost."""
        lines = list(_scan(self.path, self._valid))
        whole = [line for line in lines if line.step is not None]
        ordered = rising([line.step for line in whole], self._once)
        in_order = [whole[i] for i in ordered]
        kept = [line for line in in_order if line.step <= step]
        chosen = {line.start for line in in_order}
        aside = [line for line in lines if line.start not in chosen]
        if aside or sum(line.size for line in kept) != _end(kept):
            self._rewrite(kept, aside)
        else:
            self._file.truncate(_end(kept))
        return len(aside)

    def _rewrite(self, kept: list[Line], aside: list[Line]) -> None:
        beside = self.path.with_name(f".{self.path.name}.new")
        with open(self.path, "rb") as old:
            with open(self.path.with_name(self.path.name + ".broken"), "ab") as broken:
                _copy(old, broken, aside)
            with open(beside, "wb") as new:
                _copy(old, new, kept)
        self._file.close()
        try:
            os.replace(beside, self.path)
        finally:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def close(self) -> None:
        self._file.close()


def _copy(old: Any, new: Any, lines: list[Line]) -> None:
    for line in lines:
        old.seek(line.start)
        new.write(old.read(line.size).rstrip(b"\n") + b"\n")  # an editor may have taken the last line's end
    new.flush()
    os.fsync(new.fileno())


def _end(lines: list[Line]) -> int:
    return lines[-1].start + lines[-1].size if lines else 0


def _scan(path: Path, valid: Callable[[Record], bool]) -> Iterator[Line]:
    start = 0
    with open(path, "rb") as file:
        for line in file:
            record = _record(line, valid)
            if line.strip():
                yield Line(start, len(line), None if record is None else record["step"])
            start += len(line)


def _record(line: bytes, valid: Callable[[Record], bool]) -> Record | None:
    """The object of a line; None if the line is broken."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record if 0 <= record["step"] < LARGEST_STEP and valid(record) else None


def rising(steps: Sequence[int], once: bool = False) -> list[int]:
    """The indices of the longest subsequence that never falls (once: that always rises); of equal ones the first.

    One wrong number among many is found so, whether it is too small or too large. (Patience sorting, Schensted 1961.)
    """
    find = bisect.bisect_left if once else bisect.bisect_right
    ends: list[int] = []  # ends[n]: the smallest last step of a subsequence of n + 1 steps
    last: list[int] = []  # and its index
    before: list[int | None] = []  # the index before each step in its subsequence
    for i, step in enumerate(steps):
        at = find(ends, step)
        before.append(last[at - 1] if at else None)
        if at == len(ends):
            ends.append(step)
            last.append(i)
        elif step < ends[at]:
            ends[at], last[at] = step, i
    chain: list[int] = []
    i = last[-1] if last else None
    while i is not None:
        chain.append(i)
        i = before[i]
    return chain[::-1]


def read_lines(path: Path, valid: Callable[[Record], bool] = lambda record: True) -> list[Record]:
    """The objects of a file of JSON lines. Broken lines are left out."""
    with open(path, "rb") as file:
        records = (_record(line, valid) for line in file)
        return [record for record in records if record is not None]


def is_metrics(record: Record) -> bool:
    """Whether every value is a number that a float can hold, or None."""
    return all(
        value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < LARGEST_INT)
        for value in record.values()
    )
