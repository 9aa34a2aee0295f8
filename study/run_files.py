"""The files of a run as checked data: report.py trusts nothing that stands in them.

    run = read_run(Path("runs/NAME"))
    run.metrics["reward"]        # pandas, by step; NaN: not logged in that step
    run.samples                  # the lines of samples.jsonl that hold what a run writes
    run.notes                    # one sentence about every kind of line or value that was left out

A run may still be going on, may have been killed in the middle of a line, and may have been edited by hand. An
unfinished last line is ignored. Every other line that is not JSON, and every value of a wrong type, is left out and
counted in `notes`. So the page and its script only meet values of the types below.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import pandas as pd

from run.config import Config, load_config
from run.options import LossOptions, check_ranges

Record = dict[str, Any]
LARGEST = 2**53  # whole numbers beyond it are not exact in JavaScript


@dataclass
class Run:
    """One run. `metrics` is indexed by step; `held_out` are responses to held-out problems, `samples` the rollouts."""

    folder: Path
    name: str
    config: Config
    metrics: pd.DataFrame
    samples: list[Record]
    held_out: list[Record]
    machine: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Kind(NamedTuple):
    """A type that a field may have: how an error names it, and its test."""

    expected: str
    fits: Callable[[object], bool]


def is_number(value: object) -> bool:
    """Whether a value is a finite number that JavaScript can hold. A truth value is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e308 and math.isfinite(value)


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def _list_of(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(fits(item) for item in value)


def _is_parts(value: object) -> bool:
    return isinstance(value, dict) and all(part is None or is_number(part) for part in value.values())


COUNT = Kind("a whole number of 0 or more", is_count)
NUMBER = Kind("a number or null", lambda value: value is None or is_number(value))
TEXT = Kind("a text", lambda value: isinstance(value, str))
NAME = Kind("a text or null", lambda value: value is None or isinstance(value, str))
PARTS = Kind("an object of numbers", _is_parts)
TEXTS = Kind("a list of texts", _list_of(lambda value: isinstance(value, str)))
COUNTS = Kind("a list of whole numbers", _list_of(is_count))
NUMBERS = Kind("a list of numbers", _list_of(NUMBER.fits))

SAMPLE = {
    "step": COUNT, "group_id": COUNT, "problem": NAME, "prompt": TEXT, "response": TEXT, "reward": NUMBER,
    "reward_parts": PARTS, "advantage": NUMBER, "finish_reason": TEXT, "response_tokens": COUNT,
}  # fmt: skip
BY_TOKEN = {"tokens": TEXTS, "token_ids": COUNTS, "token_logprobs": NUMBERS}  # one item a token of the response
UPDATE_LISTS = ("logp", "entropy", "coefficient")  # of a response that took part in the update; each an item a token
FURTHER_LISTS = ("mask", "ref_logp", "rollout_logp")  # if the loss has them
DENOMINATORS = {"tokens": COUNT, "responses": COUNT, "longest": COUNT}


def read_run(folder: Path) -> Run:
    """Everything that a run has written so far.

    Raises FileNotFoundError or ValueError with one line: no run, no step yet, a config.yaml that cannot be read.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{folder} holds no metrics.jsonl; expected the folder of a run, such as runs/NAME")
    notes: list[str] = []
    metrics = read_metrics(folder / "metrics.jsonl", notes)
    if not len(metrics):
        reason = f" ({notes[0]})" if notes else "; wait for the first, or take another run"
        raise ValueError(f"{folder}/metrics.jsonl holds no step yet{reason}")
    config = read_config(folder / "config.yaml")
    samples, held_out = (read_samples(folder / name, notes) for name in ("samples.jsonl", "held_out.jsonl"))
    return Run(folder, folder.name, config, metrics, samples, held_out, read_machine(folder), notes)


def read_config(path: Path) -> Config:
    """The settings of a run; the defaults if there is no such file. Raises ValueError with one line."""
    if not path.is_file():
        return Config()
    try:
        config = load_config(path)
    except OverflowError:
        raise ValueError(f"{path}: a number is too large; expected less than 2^53") from None
    for name, value in vars(config).items():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int) and abs(item) >= LARGEST:
                raise ValueError(f"{path}: {name} is {_short(item)}, expected less than 2^53")
    return config


def read_metrics(path: Path, notes: list[str]) -> pd.DataFrame:
    """Every logged number, indexed by step, in the order of the steps. The last line of a step counts."""
    rows: dict[int, Record] = {}
    skipped = Skipped(path.name)
    for place, record in json_lines(path, skipped):
        if not is_count(record.get("step")):
            skipped.line(place, f"step is {_short(record.get('step'))}, expected {COUNT.expected}")
            continue
        wrong = {name: value for name, value in record.items() if not NUMBER.fits(value)}
        for name, value in wrong.items():
            skipped.value(place, f"{name} is {_short(value)}, expected {NUMBER.expected}")
        rows[record["step"]] = {name: v for name, v in record.items() if name not in wrong and name != "step"}
    notes += skipped.sentences()
    return pd.DataFrame(list(rows.values()), pd.Index(list(rows), name="step"), dtype="float64").sort_index()


def read_samples(path: Path, notes: list[str]) -> list[Record]:
    """The responses in a file; none if there is no such file. A list by token of a wrong kind or length is left out."""
    samples: list[Record] = []
    skipped = Skipped(path.name)
    for place, record in json_lines(path, skipped) if path.is_file() else ():
        if wrong := _wrong(record, SAMPLE):
            skipped.line(place, wrong)
            continue
        if (by_token := record.keys() & BY_TOKEN.keys()) and (wrong := _wrong_tokens(record)):
            skipped.value(place, wrong)
            record = {name: value for name, value in record.items() if name not in (*by_token, "update")}
        elif "update" in record and (wrong := _wrong_update(record)):
            skipped.value(place, f"update: {wrong}")
            record = {name: value for name, value in record.items() if name != "update"}
        samples.append(record)
    notes += skipped.sentences()
    return samples


def read_machine(folder: Path) -> dict[str, str]:
    """The record of RunLog about the computer. Nothing if it is missing or damaged."""
    try:
        found = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: str(value) for name, value in found.items() if isinstance(value, str) or is_number(value)}


# ---------------------------------------------------------------------------------------------------------------------
# Lines, and what is wrong with them


class Skipped:
    """Counts the lines and values of one file that were left out, and remembers the first of each."""

    def __init__(self, file: str):
        self.file = file
        self.lines: list[str] = []
        self.values: list[str] = []

    def line(self, place: int, reason: str) -> None:
        self.lines.append(f"line {place}: {reason}")

    def value(self, place: int, reason: str) -> None:
        self.values.append(f"line {place}: {reason}")

    def sentences(self) -> list[str]:
        found = []
        for what, reasons in (("line", self.lines), ("value", self.values)):
            if reasons:
                count = f"1 {what} was" if len(reasons) == 1 else f"{len(reasons)} {what}s were"
                found.append(f"{self.file}: {count} left out ({reasons[0]})")
        return found


def json_lines(path: Path, skipped: Skipped) -> Iterator[tuple[int, Record]]:
    """(Number of the line from 1, object) of every line that is an object. The last line may be unfinished."""
    with open(path, "rb") as file:
        for place, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line, parse_constant=lambda name: None)  # NaN and Infinity are no JSON
            except (ValueError, RecursionError):
                skipped.line(place, "it is not JSON")
                continue
            if isinstance(record, dict):
                yield place, record
            else:
                skipped.line(place, f"it is {_short(record)}, expected an object")


def _wrong(record: Record, kinds: dict[str, Kind]) -> str | None:
    """The first field that is missing or of another kind, in words."""
    for name, kind in kinds.items():
        if name not in record:
            return f"it has no {name!r}"
        if not kind.fits(record[name]):
            return f"{name} is {_short(record[name])}, expected {kind.expected}"
    return None


def _wrong_tokens(record: Record) -> str | None:
    if wrong := _wrong(record, BY_TOKEN):
        return wrong
    lengths = {name: len(record[name]) for name in BY_TOKEN}
    if len(set(lengths.values())) > 1:
        return f"the lists by token have lengths {lengths}, expected equal ones"
    return None if COUNTS.fits(record.get("prompt_ids")) else f"prompt_ids: expected {COUNTS.expected}"


def _wrong_update(record: Record) -> str | None:
    """The fault in the numbers of a response's update (update/token_traces.py), in words."""
    update = record["update"]
    if "tokens" not in record:
        return "the response is not written token by token"
    if not isinstance(update, dict) or not isinstance(update.get("step"), dict):
        return f"it is {_short(update)}, expected an object with the object 'step'"
    lists = {name: update[name] for name in (*UPDATE_LISTS, *FURTHER_LISTS) if name in update}
    kinds = {"weight": NUMBER} | dict.fromkeys(lists.keys() | set(UPDATE_LISTS if lists else ()), NUMBERS)
    if wrong := _wrong(update, kinds) or _wrong(update["step"], DENOMINATORS):
        return wrong
    if any(len(values) != len(record["tokens"]) for values in lists.values()):
        return f"a list by token does not have the length of the response, {len(record['tokens'])}"
    try:
        loss_options(update["step"])
    except ValueError as error:
        return str(error)
    return None


def loss_options(facts: Record) -> LossOptions:
    """The options of a step's loss, of which a run writes those that are not the default. Raises ValueError."""
    kinds = get_type_hints(LossOptions)
    given = {name: value for name, value in facts.items() if name not in (*DENOMINATORS, "refused")}
    for name, value in given.items():
        if name not in kinds:
            raise ValueError(f"{_short(name)} is not an option of the loss")
        if not _fits(value, kinds[name]):
            raise ValueError(f"{name} is {_short(value)}, which is not a value of that option")
    options = LossOptions(**given)
    check_ranges(options)
    if wrong := [sentence for applies, sentence in options.conflicts() if applies]:
        raise ValueError(wrong[0])
    return options


def _fits(value: object, kind: Any) -> bool:
    """Whether a value is of an option's type: a choice, a truth value, a number, or None."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if value is None or isinstance(value, bool):
        return type(value) in (kind, *get_args(kind))
    return is_count(value) if kind is int else is_number(value) and kind is not bool


def _short(value: object) -> str:
    return reprlib.repr(value)  # bounded: a list of 10^6 items is a few words
