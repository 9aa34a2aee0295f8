"""A run folder belongs to one program at a time.

    with RunLock() as lock:
        lock.take(run_dir)      # RunInUseError with one line that says which process has it
        ...

Two programs in one folder mix their logs, and each deletes the other's checkpoints. The lock is the operating system's
(package `filelock`: flock, on Windows msvcrt.locking), so that it is free at once when its holder was killed. The file
`.running` beside it names the program that holds it. It decides nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)
LOCK, HOLDER = ".lock", ".running"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # of some network file systems


class RunInUseError(ValueError):
    """Another program writes to the run folder."""


class RunLock:
    """The lock of one run folder; `take` may come later, and may be repeated for the same folder."""

    def __init__(self) -> None:
        self.run_dir: Path | None = None
        self._lock: FileLock | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def take(self, run_dir: Path) -> None:
        """Lock a folder that exists. Raises RunInUseError if another program holds it, OSError if no file can be made
        there. On a file system without locks, it warns and goes on."""
        if self.run_dir == run_dir:
            return
        self.release()
        lock = FileLock(run_dir / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunInUseError(
                f"{run_dir} is in use by {_holder(run_dir)}: wait until it ends, stop it, or name another --run-dir"
            ) from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            logger.warning("the file system of %s has no locks: start no second program in this folder", run_dir)
        self.run_dir, self._lock = run_dir, lock
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
        with contextlib.suppress(OSError):  # a full disk: the lock holds without it
            (run_dir / HOLDER).write_text(json.dumps(who) + "\n", encoding="utf-8")

    def release(self) -> None:
        """Let other programs have the folder; nothing if no folder is locked."""
        if self.run_dir is not None and self._lock is not None:
            with contextlib.suppress(OSError):  # the folder may have vanished
                (self.run_dir / HOLDER).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._lock.release()
        self.run_dir = self._lock = None


def _holder(run_dir: Path) -> str:
    """The program that holds a folder's lock, as its `.running` says."""
    try:
        who = json.loads((run_dir / HOLDER).read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']}, since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another program"
