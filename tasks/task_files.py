"""Rows of data files: parquet and JSONL, split into training and held-out rows, checked at the entrance.

    rows = read_rows("data/countdown", columns=("nums", "target"))       # a folder or a file -> list of dicts
    splits = read_splits("openai/gsm8k", columns, parse, key)            # -> training and held-out rows

A file is held out if a part of its path is the word test, validation, valid, val, eval or dev, in any case:
`main/test/0000.parquet`, `gsm8k_test.jsonl`, `Validation/a.parquet`. If no file is held out, the last rows are. A
training row that repeats a held-out one is left out. pyarrow reads parquet, because the type of a column matters: a
float32 of 0.1 must stay 0.1. pandas would need pyarrow as well.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tasks.messages import first_line, home_path, plain

T = TypeVar("T")
Row = dict[str, Any]
MAX_DEFAULT_TEST = 128  # held-out rows if the caller does not say: a tenth, at most so many
SUFFIXES = (".parquet", ".jsonl", ".json")
USUAL_COLUMNS = {  # of the tasks that read files
    frozenset(["question", "answer"]): "jsonl",
    frozenset(["problem", "solution"]): "math",
    frozenset(["nums", "target"]): "countdown",
}
TEST_WORDS = frozenset(["test", "tests", "testing", "testset", "heldout", "holdout"])
OTHER_HELD_OUT_WORDS = frozenset(["validation", "valid", "val", "eval", "evals", "evaluation", "dev", "devset"])
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # gsm8kTest has the words gsm, k and Test


@dataclass(frozen=True)
class Splits(Generic[T]):
    """Rows of a data set. `summary`: one line that says which files or rows are which split."""

    train: list[T]
    test: list[T]
    rows: list[T]  # all rows in order, without those of held-out files if there are other files
    summary: str


def read_splits(
    data: str | Path,
    columns: tuple[str, ...],
    parse: Callable[[Row], T | None],
    key: Callable[[T], Hashable],
    n_test: int | None = None,
    subset: str | None = None,
    optional: tuple[str, ...] = (),
    empty: str = "no rows",
) -> Splits[T]:
    """Training and held-out rows of a file, a folder or a data set of the Hub.

    Args:
        parse: makes a row; None leaves it out. Its ValueError is raised again with file and row number.
        key: two rows with equal keys ask the same. Training rows with the key of a held-out row are left out.
        n_test: held-out rows if no file is held out; None: a tenth, at most 128.
        subset: a folder inside `data` to read, if it is there.
        empty: the error if `parse` leaves out every row.

    If there are test files and validation files, the test files are the held-out rows and no validation row is used.
    Raises FileNotFoundError or ValueError, in one line.
    """
    if len(set(columns)) < len(columns):
        raise ValueError(f"{data}: the column {columns[0]} is given twice; question and answer need two columns")
    folder = find_data(data)
    if subset and (folder / subset).is_dir():
        folder = folder / subset
    files = data_files(folder)
    train_files = [file for file in files if not held_out_words(file, folder)]
    test_files = [file for file in files if held_out_words(file, folder) & TEST_WORDS]
    others = [file for file in files if file not in train_files and file not in test_files]
    rows_of = {file: list(_file_rows(file, columns, optional, parse)) for file in files}
    train, test, unused = (
        [row for file in group for row in rows_of[file]]
        for group in (train_files, test_files or others, others if test_files else [])
    )
    if not train and not test:
        raise ValueError(f"{folder}: {empty}; expected columns {', '.join(columns)}")
    names = [_names(group, folder) for group in (train_files, test_files or others)]
    rows: list[T] = []
    if not test:
        rows = train
        train, test = hold_out_last(rows, n_test, folder)
        names[1] = f"the last rows of {names[0]}"
    held_out = {key(row) for row in (*test, *unused)}
    kept = [row for row in train if key(row) not in held_out]
    if train and not kept:
        raise ValueError(f"{folder}: every training row repeats a held-out one; give more rows or a smaller n_test")
    summary = f"training {names[0] or 'nothing'}: {_count(kept)}; held out {names[1]}: {_count(test)}"
    if len(kept) < len(train):
        summary += f"; left out of training, because held-out rows ask the same: {_count(train, minus=kept)}"
    if unused:
        summary += f"; not used {_names(others, folder)}: {_count(unused)}"
    return Splits(kept, test, rows or kept or [*test, *unused], summary)


def held_out_words(file: Path, root: Path) -> set[str]:
    """The words in a file's path that say it is not training data: those below `root`, which is a folder or the file.

    The folder that directly holds the data may also have a name that ends with such a word, as in `--data gsm8k/test`,
    unless the file's own path says train. Folders above do not count: a home folder may be called dev.
    """
    inside = file.relative_to(root).parts if file != root else (file.name,)
    parts = [part.removesuffix(file.suffix) for part in inside]
    words = {word for part in parts for word in _words(part)}
    holder = os.path.basename(os.path.abspath(root if file != root else root.parent))
    if not words & {"train", "training"} and holder[-1:].isalpha():
        words.update(_words(holder)[-1:])
    return words & (TEST_WORDS | OTHER_HELD_OUT_WORDS)


def _words(name: str) -> list[str]:
    """Words of a name, in lower case: held_out is one word, and gsm8kTest has the word test."""
    name = re.sub(r"(?i)held[\W_]*out|hold[\W_]*out", "heldout", name)
    return [word.lower() for word in (*_WORD.findall(name.lower()), *_WORD.findall(name))]


def _count(rows: list[T], minus: Sequence[T] = ()) -> str:
    number = len(rows) - len(minus)
    return f"{number:,} row{'s' if number != 1 else ''}"


def _names(files: list[Path], folder: Path) -> str:
    names = [file.relative_to(folder).as_posix() if file != folder else file.name for file in files]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_rows(path: str | Path, columns: tuple[str, ...], optional: tuple[str, ...] = ()) -> list[Row]:
    """All rows of a file, or of all parquet and JSONL files in a folder and below it, in order of their paths.

    Only `columns` and those of `optional` that are there are kept. Raises FileNotFoundError if there is no file, and
    ValueError, in one line, for files without a column, without a row, or that cannot be read.
    """
    rows = [row for file in data_files(path) for row in _file_rows(file, columns, optional, lambda row: row)]
    if not rows:
        raise ValueError(f"{path}: no rows; expected columns {', '.join(columns)}")
    return rows


def find_data(data: str | Path) -> Path:
    """The file or folder that `data` names: a path, or else a data set of the Hub ("openai/gsm8k"), fetched or cached.

    Raises FileNotFoundError, in one line, if it is neither.
    """
    path = home_path(data)
    if path_exists(path):
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(data)) or path.suffix in SUFFIXES:
        raise FileNotFoundError(f"{data}: no such data file or folder (looked in {Path.cwd()})")
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in SUFFIXES[:2]]
    try:
        return Path(snapshot_download(str(data), repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the type depends on the library's version; every one means that there is no data
        why = f"no folder of that name in {Path.cwd()}, and the Hub gave none ({first_line(error)})"
        hint = "download it on a machine with network and give --data FOLDER"
        raise FileNotFoundError(f"{data}: {why}; {hint}") from error


def path_exists(path: Path) -> bool:
    """`path.exists()`, and False for a path that the system refuses."""
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def data_files(path: str | Path) -> list[Path]:
    """The data files that `path` names: itself, or those in the folder and below it, sorted and without hidden ones."""
    path = home_path(path)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path}: expected a file that ends in .parquet or .jsonl")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such data file or folder (looked in {Path.cwd()})")
    found = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES[:2] and file.is_file())
    files = sorted(file for file in found if not any(part[0] == "." for part in file.relative_to(path).parts))
    if not files:
        raise FileNotFoundError(f"{path}: the folder holds no .parquet or .jsonl file")
    return files


def _file_rows(
    file: Path, columns: tuple[str, ...], optional: tuple[str, ...], parse: Callable[[Row], T | None]
) -> Iterator[T]:
    read = _read_parquet if file.suffix.lower() == ".parquet" else _read_jsonl
    for number, row in read(file, columns, optional):
        try:
            _check_text(row)
            parsed = parse(row)
        except ValueError as error:
            raise ValueError(f"{file}, row {number}: {first_line(error)}") from error
        if parsed is not None:
            yield parsed


def _check_text(value: Any) -> None:
    """Raise ValueError for text that no tokenizer can encode. JSON can hold half of a character: "\\ud83d"."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"half of a character, {value[error.start : error.end]!a}, is in its text") from error
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            _check_text(item)


def _read_parquet(file: Path, columns: tuple[str, ...], optional: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            found = parquet.schema_arrow.names
            _check_columns(file, found, columns)
            table = parquet.read(columns=[*columns, *(c for c in optional if c in found)])
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a readable parquet file ({first_line(error)})") from error
    for name, column in zip(table.column_names, table.columns):
        if pyarrow.types.is_floating(column.type) and column.type != pyarrow.float64():
            # 0.1 in float32 is 0.100000001490116; its shortest text is 0.1
            values = [float(str(value)) for value in column.to_numpy()]
            table = table.set_column(table.column_names.index(name), name, [values])
    try:
        yield from enumerate(table.to_pylist(), start=1)
    except UnicodeDecodeError as error:
        number = next(i for i in range(table.num_rows) if not _is_text(table.slice(i, 1)))
        raise ValueError(f"{file}, row {number + 1}: not UTF-8 text ({first_line(error)})") from error


def _is_text(table: Any) -> bool:
    try:
        return bool(table.to_pylist())
    except UnicodeDecodeError:
        return False


def _read_jsonl(file: Path, columns: tuple[str, ...], optional: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _json_row(f"{file}, line {number}", line, columns, optional)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({first_line(error)})") from error


def _json_row(place: str, line: str, columns: tuple[str, ...], optional: tuple[str, ...]) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({first_line(error)}); expected one object a line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: found {type(row).__name__}, expected an object with the keys {', '.join(columns)}")
    _check_columns(place, list(row), columns)
    return {key: row[key] for key in (*columns, *optional) if key in row}


def _check_columns(place: str | Path, found: list[str], columns: tuple[str, ...]) -> None:
    missing = [column for column in columns if column not in found]
    if missing:
        shown = plain(", ".join(found[:10])) or "none"
        task = next((task for names, task in USUAL_COLUMNS.items() if names <= set(found)), None)
        hint = f"; did you mean --task {task}?" if task else ""
        raise ValueError(
            f"{place}: no column {', '.join(missing)}; found {shown}; expected {', '.join(columns)}, or your own names "
            f"in --question-column and --answer-column{hint}"
        )


def hold_out_last(rows: list[T], n_test: int | None, source: str | Path) -> tuple[list[T], list[T]]:
    """Split rows into (train, test): the last `n_test` are held out. None: a tenth, at most 128."""
    n_test = min(MAX_DEFAULT_TEST, len(rows) // 10) if n_test is None else n_test
    if not 0 <= n_test < len(rows):
        raise ValueError(
            f"{source}: n_test is {n_test}, expected 0 to {len(rows) - 1}, since there are {len(rows)} rows"
        )
    return rows[: len(rows) - n_test], rows[len(rows) - n_test :]
