"""Rows from files: parquet and JSONL, checked where they enter, with errors of one line.

rows = read_rows("data/countdown", columns=("nums", "target"))    # a folder or a file -> list of dicts
train, test = hold_out_last(rows, n_test=None, source="data/countdown")
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MAX_DEFAULT_TEST = 128  # held-out rows where the caller does not say: a tenth, at most so many
SUFFIXES = (".parquet", ".jsonl", ".json")


def read_rows(path: str | Path, columns: tuple[str, ...], optional: tuple[str, ...] = ()) -> list[Row]:
    """All rows of a file, or of all parquet and JSONL files in a folder and below it, in order of their paths.

    Only `columns` and those of `optional` that are there are kept. Raises FileNotFoundError where there is nothing, and
    ValueError, in one line, for files without a column, without a row, or that cannot be read.
    """
    rows: list[Row] = []
    for file in data_files(path):
        rows += (
            _read_parquet(file, columns, optional)
            if file.suffix == ".parquet"
            else _read_jsonl(file, columns, optional)
        )
    if not rows:
        raise ValueError(f"{path}: no rows; expected columns {', '.join(columns)}")
    return rows


def find_data(data: str | Path) -> Path:
    """The file or folder that `data` names: a path, or else a data set of the Hub ("openai/gsm8k"), fetched or cached.

    Raises FileNotFoundError, in one line, where it is neither.
    """
    path = Path(data).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(data)) or path.suffix in SUFFIXES:
        raise FileNotFoundError(f"{data}: no such data file or folder (looked in {Path.cwd()})")
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in SUFFIXES[:2]]
    try:
        return Path(snapshot_download(str(data), repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # of many kinds, by version of the library; all mean that there is no data
        why = f"no folder of that name in {Path.cwd()}, and the Hub gave none ({first_line(error)})"
        raise FileNotFoundError(
            f"{data}: {why}; download it where there is a network and give --data FOLDER"
        ) from error


def data_files(path: str | Path) -> list[Path]:
    """The data files that `path` names: itself, or those in the folder and below it, sorted."""
    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: expected a file that ends in .parquet or .jsonl")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such data file or folder (looked in {Path.cwd()})")
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES[:2] and file.is_file())
    if not files:
        raise FileNotFoundError(f"{path}: the folder holds no .parquet or .jsonl file")
    return files


def _read_parquet(file: Path, columns: tuple[str, ...], optional: tuple[str, ...]) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            found = parquet.schema_arrow.names
            _check_columns(file, found, columns)
            return parquet.read(columns=[*columns, *(c for c in optional if c in found)]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a readable parquet file ({first_line(error)})") from error


def _read_jsonl(file: Path, columns: tuple[str, ...], optional: tuple[str, ...]) -> list[Row]:
    rows = []
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_json_row(f"{file}, line {number}", line, columns, optional))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({first_line(error)})") from error
    return rows


def _json_row(where: str, line: str, columns: tuple[str, ...], optional: tuple[str, ...]) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({first_line(error)}); expected one object a line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found {type(row).__name__}, expected an object with the keys {', '.join(columns)}")
    _check_columns(where, list(row), columns)
    return {key: row[key] for key in (*columns, *optional) if key in row}


def _check_columns(where: str | Path, found: list[str], columns: tuple[str, ...]) -> None:
    missing = [column for column in columns if column not in found]
    if missing:
        shown = ", ".join(found[:10]) or "none"
        raise ValueError(f"{where}: no column {', '.join(missing)}; found {shown}; expected {', '.join(columns)}")


def hold_out_last(rows: list[Row], n_test: int | None, source: str | Path) -> tuple[list[Row], list[Row]]:
    """Split rows into (train, test): the last `n_test` are held out; None holds out a tenth, at most 128."""
    n_test = min(MAX_DEFAULT_TEST, len(rows) // 10) if n_test is None else n_test
    if not 0 <= n_test < len(rows):
        raise ValueError(
            f"{source}: n_test is {n_test}, expected 0 to {len(rows) - 1}, since there are {len(rows)} rows"
        )
    return rows[: len(rows) - n_test], rows[len(rows) - n_test :]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for messages that must stay on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
