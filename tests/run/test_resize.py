"""The live display after the window has become narrower or wider: one whole frame, and no pieces of an older one."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from run.progress import History, LiveProgress

CONTROLS = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n])")


class Terminal(io.StringIO):
    """The part of a terminal that rich uses. When it becomes narrower, it wraps the lines that are too long."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.lines, self.row, self.column = width, [""], 0, 0

    def write(self, text: str) -> int:
        for number, letter, home, newline, character in CONTROLS.findall(text):
            if home:
                self.column = 0
            elif newline:
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif character:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
                self.column += 1
            elif letter == "A":
                self.row = max(0, self.row - int(number or 1))
            elif letter == "K":
                self.lines[self.row] = ""
            elif letter == "H":
                self.row = self.column = 0
            elif letter == "J":
                self.lines = [""] * len(self.lines)
        return len(text)

    def isatty(self) -> bool:
        return True

    def resize(self, width: int) -> None:
        above = self.lines[: self.row]
        wrapped = [[line[i : i + width] for i in range(0, max(len(line), 1), width)] for line in self.lines]
        self.row = sum(len(pieces) for pieces in wrapped[: len(above)])
        self.lines, self.width = [piece for pieces in wrapped for piece in pieces], width


@pytest.mark.parametrize("widths", [(100, 60), (60, 100), (100, 40, 90, 50)])
def test_no_piece_of_an_older_frame_stays(widths):
    terminal = Terminal(widths[0])
    console = Console(file=terminal, force_terminal=True, width=widths[0], height=40)
    progress = LiveProgress(History(10), console, "a title")
    progress.history.add(1, {"reward": 0.5})
    progress.step(1, {"reward": 0.5})
    for step, width in enumerate(widths[1:], start=2):
        terminal.resize(width)
        console.width = width
        progress.history.add(step, {"reward": 0.25})
        progress.step(step, {"reward": 0.25})
        shown = [line.rstrip() for line in terminal.lines if line.strip()]
        assert shown[0].startswith("╭")
        assert shown[-1].startswith("╰")
        assert sum("a title" in line for line in shown) == 1
        assert sum("step" in line for line in shown) == 1
        assert {len(line) for line in shown} == {width}
    progress.close()
