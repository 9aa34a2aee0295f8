"""Standard output whose reader has gone, as in `python train.py | head -1`.

    with reader_may_go():                       # what is printed in here is the last that the program has to do
        ReaderMayGo().print(table)

Python raises BrokenPipeError at the next line, and again at its end; rich ends the program. A run of hours goes on
instead, for what it makes is in files; who only has something left to say ends with exit code 0.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

from rich.console import Console


class ReaderMayGo(Console):
    """A console that leaves it to its caller what happens when nobody reads it, and does not end the program."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def nobody_reads() -> None:
    """After a BrokenPipeError: what is still printed, and what waits to be, goes nowhere, without further errors."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def reader_may_go() -> Iterator[None]:
    """End the block, quietly, where its output is not read to the end."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        nobody_reads()
