"""Where a run begins: its folder, which only one program may write, and the checkpoint it continues from."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from run.checkpoint import find_checkpoint
from run.config import Config, new_run_dir
from run.resume_rules import Start, check_resume
from run.run_lock import RunLock
from run.run_log import read_metrics
from run.trackers import check_installed

logger = logging.getLogger("train")


def where_to_begin(config: Config, lock: RunLock) -> Start:
    """The checkpoint to continue from, if any. Refuses a run folder that is in use, holds another run, or cannot be
    written, and options that a resume cannot apply. This comes before the model is loaded."""
    if config.dry_run:
        return check_resume(config, find_resumed(config, new_run_dir(config)))
    run_dir = new_run_dir(config)
    check_installed(config.log_to)
    check_writable(run_dir)
    if run_dir.is_dir():
        lock.take(run_dir)
    resumed = find_resumed(config, run_dir)
    if holds_a_run(run_dir) and resumed is not None and resumed.resolve().parent.parent != run_dir.resolve():
        raise ValueError(
            f"--run-dir {run_dir} holds another run, which {resumed} would overwrite: leave --run-dir out, or name "
            "a new folder"
        )
    if holds_a_run(run_dir) and config.resume is None:
        raise ValueError(f"{run_dir} already holds a run: continue it with --resume, or name another --run-dir")
    return check_resume(config, resumed)


def find_resumed(config: Config, run_dir: Path) -> Path | None:
    """The checkpoint to continue from; None: the run begins with step 1.

    A run that was killed before its first checkpoint also starts from the beginning. Little work is lost, and
    `--resume` always works.
    """
    if not config.resume or (config.resume == "auto" and not (run_dir / "config.yaml").is_file()):
        return None
    where = "latest" if config.resume == "auto" else config.resume
    try:
        return find_checkpoint(where, run_dir)
    except FileNotFoundError:
        run = Path(where) if where != "latest" else run_dir
        done = len(read_metrics(run)) if (run / "metrics.jsonl").is_file() else 0
        began = (run / "config.yaml").is_file() and not list(run.glob("checkpoints/[sl]*"))  # no step-... or latest
        if not began or done > (config.save_every or config.steps) + 1:
            raise
    logger.warning("%s was ended before its first checkpoint: it begins again", run)
    return None


def holds_a_run(run_dir: Path) -> bool:
    """Whether a folder has metrics or checkpoints."""
    metrics = run_dir / "metrics.jsonl"
    return (metrics.is_file() and metrics.stat().st_size > 0) or any(run_dir.glob("checkpoints/step-*"))


def check_writable(run_dir: Path) -> None:
    """Raises ValueError if the run's folder cannot be made or written."""
    there = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"--run-dir {run_dir}: {there} is a file, expected a folder")
    if not _is_writable(there):
        raise ValueError(f"{there} cannot be written: name a folder for the run with --run-dir")


def check_output(path: Path, flag: str) -> None:
    """Raises FileNotFoundError or ValueError if a file cannot be written at `path`. Call it before time is spent."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{flag} {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder, expected a file")
    if not _is_writable(path if path.exists() else folder):
        raise ValueError(f"{flag} {path} cannot be written: name a file in another folder with {flag}")


def _is_writable(path: Path) -> bool:
    """Whether this process may write a file, or new files in a folder."""
    mode = os.W_OK | os.X_OK if path.is_dir() else os.W_OK
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def claim(config: Config, lock: RunLock) -> Path:
    """Make the run's folder and lock it. Of two programs that were started together, each gets its own new folder."""
    while True:
        run_dir = new_run_dir(config)
        try:
            run_dir.mkdir(parents=True, exist_ok=config.run_dir is not None)
            lock.take(run_dir)
            return run_dir
        except OSError as error:
            if isinstance(error, FileExistsError) and config.run_dir is None:
                continue  # the other program was faster; the next number is free
            reason = error.strerror or error
            raise ValueError(f"{run_dir} cannot be written ({reason}): name a folder with --run-dir") from None
