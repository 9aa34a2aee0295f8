"""Standard streams that cannot fail, and text that cannot steer a terminal. Only the standard library is imported.

    sys.exit(run_program("evaluate.py", main))     # the last line of every program
    print(printable(text))                         # text of a file, a model or an error: escapes are shown, not obeyed
    write_now("stopping")                          # the only way to print inside a signal handler

A print can fail on either stream: the reader of a pipe has gone (`| head`), the device is full (`> /dev/full`, a log
on a full disk), the terminal was closed, the shell closed the handle (`>&-`). A failed print must change neither the
files of a run nor an exit code, whichever library prints. So the streams themselves are replaced: the lowest layer of
standard output and standard error drops every byte that cannot be written.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import select
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Callable
from typing import Any, TextIO

JOINERS = "\u200c\u200d"  # of Persian words and of emoji; they cannot do harm
CONTROLS = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # controls, formats and direction marks, halves of characters, ...
MAY_PASS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.ENOBUFS)  # the next write may succeed


# ---------------------------------------------------------------------------------------------------------------------
# Text


def printable(text: object, keep: str = "\n\t") -> str:
    r"""Text that a terminal can only show: `\x1b[2J` becomes the seven characters of its Python notation.

    Everything that comes from a file, a model or an exception is printed through this function: it may hold escape
    sequences, which clear the screen or set the window's title, or marks that turn the direction of writing around.

    keep: control characters that stay as they are.
    """
    return "".join(
        c if c in keep or c in JOINERS or unicodedata.category(c) not in CONTROLS else _notation(c) for c in str(text)
    )


def _notation(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


# ---------------------------------------------------------------------------------------------------------------------
# Programs


def run_program(name: str, main: Callable[[list[str]], int]) -> int:
    """Run a program's `main` with streams that cannot fail; its exit code. `name`: how its errors begin, `train.py`."""
    replace_streams()
    warnings.showwarning = _show_warning
    sys.excepthook = _show_exception
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        complain(f"{name}: stopped by Ctrl-C")
        return 130
    sys.stdout.flush()
    error = write_error(sys.stdout)
    if error is not None and error.errno != errno.EPIPE:  # a reader that goes has seen enough
        complain(f"{name}: standard output could not be written: {error.strerror or error}")
    return code


def say(text: str, end: str = "\n") -> None:
    """A line on standard output, if it can be written, without control characters."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(text), end=end, flush=True)


def complain(text: str) -> None:
    """A line on standard error, if it can be written, without control characters."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(text), file=sys.stderr, flush=True)


def can_redraw() -> bool:
    """Whether standard output is a terminal that a person looks at. The cell of a notebook gives its programs a
    terminal, too, and stores every frame that is drawn there."""
    in_cell = any(name in os.environ for name in ("JPY_PARENT_PID", "JPY_SESSION_NAME"))  # set by Jupyter's kernels
    return not in_cell and sys.stdout.isatty()


def log_to_standard_error() -> None:
    """Let the `logging` module write one plain line a record, without control characters."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler])


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    complain(f"WARNING: {message}")


def _show_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    complain("".join(traceback.format_exception(kind, error, trace)).rstrip())


# ---------------------------------------------------------------------------------------------------------------------
# Streams


class _Outlives(io.RawIOBase):
    """The lowest layer of a stream: takes every byte, and drops those that `raw`, the file below, does not take."""

    def __init__(self, raw: io.RawIOBase, above: TextIO | None = None):
        self._raw = raw
        self._above = above  # the stream that was replaced: the end of its life would close `raw`
        self.error: OSError | None = None  # of the last write

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._raw.isatty()

    def fileno(self) -> int:
        return self._raw.fileno()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size, done = len(view), 0
        if self.error is not None and self.error.errno not in MAY_PASS:
            return size  # the reader or the terminal has gone, and does not come back
        while done < size:
            try:
                written = self._raw.write(view[done:])
            except OSError as error:
                self.error = error
                return size
            if written is None:  # a pipe that does not block, and is full
                with contextlib.suppress(OSError, ValueError):
                    select.select([], [self], [], 1.0)
            done += written or 0
        self.error = None
        return size


def replace_streams() -> None:
    """Let standard output and standard error take every write; open those that the shell closed, as empty ones.

    A closed handle would be given to the next file that is opened, and a library's message would be written into it.
    Streams that are not files (of a notebook, of a test) stay. Calling it again changes nothing.
    """
    for number, stream, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, stream) is None:
            setattr(sys, stream, _nothing(number, mode))
    sys.stdout, sys.stderr = _replaced(sys.stdout), _replaced(sys.stderr)


def _replaced(stream: TextIO) -> TextIO:
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # with `python -u` there is no buffer between
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(raw, io.RawIOBase) or isinstance(raw, _Outlives):
        return stream
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    errors = "replace" if stream.errors == "strict" else stream.errors  # a box in a terminal that only knows ASCII
    return io.TextIOWrapper(
        io.BufferedWriter(_Outlives(raw, stream)), stream.encoding, errors,
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip


def _nothing(number: int, mode: str) -> TextIO:
    """An empty file, or one that takes everything, for a stream that the shell closed."""
    file = open(os.devnull, mode, encoding="utf-8", errors="replace")  # noqa: SIM115 (for the program's life)
    if file.fileno() == number:
        os.set_inheritable(number, True)
    elif not _is_open(number):
        os.dup2(file.fileno(), number)
    return file


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def write_error(stream: TextIO) -> OSError | None:
    """Why the last write to a replaced stream failed; None: it did not."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _Outlives) else None


def discard(stream: TextIO) -> None:
    """Let a stream that was not replaced write into nothing from now on, with all that waits in its buffers."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def write_now(text: str) -> None:
    """Write to standard error past all buffers; for signal handlers.

    A handler runs in the middle of any statement, also of a print, whose buffer cannot be entered twice (RuntimeError:
    reentrant call); and an exception in a handler would be raised in the middle of a step.
    """
    if sys.__stderr__ is not None:  # else the handle may belong to another file
        with contextlib.suppress(OSError):
            os.write(2, text.encode("ascii", "replace"))
