"""Ctrl-C, SIGTERM and a closed terminal end a run after its step, which is saved."""

from __future__ import annotations

import os
import signal
from types import FrameType

from parallel import distributed
from run.terminal import write_now

HANG_UP = getattr(signal, "SIGHUP", None)  # Windows has none
STOPS = [number for number in (signal.SIGINT, signal.SIGTERM, HANG_UP) if number]


class StopRequest:
    """Ctrl-C, SIGTERM and SIGHUP let the running step finish and be saved. A second signal ends the program at once.

    A closed terminal sends SIGHUP more than once (the kernel, then the shell), and nobody could mean the second one.
    It is ignored then, and after another signal. A program that was started with `nohup` ignores SIGHUP from the start.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._on_terminal = _has_terminal()
        for number in STOPS:
            if number != HANG_UP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def agreed(self) -> bool:
        """Whether any process received a signal. All processes then know it, and stop after the same step."""
        number = max(distributed.gather_each(int(self.requested or 0)))
        if number:
            self.requested = signal.Signals(number)
        return bool(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        closed = number != HANG_UP or (self._on_terminal and not _has_terminal())
        for again in STOPS:  # before the message, so that a second signal is obeyed as soon as the message is there
            signal.signal(again, signal.SIG_IGN if again == HANG_UP and closed else signal.SIG_DFL)
        self.requested = signal.Signals(number)
        if distributed.is_main():
            write_now(f"\n{self.requested.name}: finishing this step, then saving; once more to leave at once\n")


def _has_terminal() -> bool:
    """Whether this process has a terminal that controls it, and that is still there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK))
    except (OSError, AttributeError):  # Windows has neither the file nor the flags
        return False
    return True
