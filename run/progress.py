"""What a person sees of a run: a display redrawn in place on a terminal, a line a step elsewhere, a table at the end.

A response is written by a model, so it may hold anything: terminal escapes, control characters, brackets that a
markup language would read. `clean` takes the first two out, and text is never handed over as markup.
"""

from __future__ import annotations

import re
import time
import unicodedata
from array import array
from collections import deque
from itertools import pairwise

from rich import box
from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from data_types import Episode

Values = dict[str, float | None]
WINDOW = 10  # steps averaged at either end of a run: a single step's reward is mostly luck
SAMPLE_LINES = 5  # of each of the two samples in the live display
# name -> (label, format), in the order shown; the live display and the lines show those that are there
SHOWN = {
    "reward": ("reward", "{:.3f}"),
    "rewards/answer/mean": ("solved", "{:.1%}"),
    "rewards/format/mean": ("format", "{:.2f}"),
    "completions/mean_length": ("length", "{:.0f}"),
    "completions/clipped_ratio": ("cut", "{:.1%}"),
    "frac_reward_zero_std": ("no signal", "{:.0%}"),
    "policy_loss": ("loss", "{:.4f}"),
    "kl": ("kl", "{:.4f}"),
    "entropy": ("entropy", "{:.3f}"),
    "grad_norm": ("grad", "{:.2f}"),
    "learning_rate": ("lr", "{:.1e}"),
    "sampling/sampling_logp_difference/max": ("logp diff", "{:.1e}"),
    "rollout/tokens_per_second": ("rollout tok/s", "{:,.0f}"),
    "update/tokens_per_second": ("update tok/s", "{:,.0f}"),
    "memory/peak_gib": ("peak GiB", "{:.2f}"),
    "step_time": ("s/step", "{:.2f}"),
}
LINE = ["reward", "rewards/answer/mean", "completions/mean_length", "completions/clipped_ratio", "entropy", "grad_norm"]


class History:
    """What the displays need of the steps so far; its size does not grow with the run, but for 8 bytes a step."""

    def __init__(self, total_steps: int):
        self.total_steps = total_steps
        self.clear()

    def clear(self) -> None:
        self.step = 0
        self.first: list[tuple[int, Values]] = []
        self.trained = 0
        self.last: deque[tuple[int, Values]] = deque(maxlen=WINDOW)
        self.evaluations: list[tuple[int, Values]] = []  # the first and the newest
        self.rewards = array("d")
        self._clock: tuple[float, int] | None = None  # when the first step began to count, and which it was

    def add(self, step: int, values: Values) -> None:
        now = time.monotonic()
        self.step = step
        training = {name: value for name, value in values.items() if not name.startswith("eval_")}
        evaluation = {name: value for name, value in values.items() if name.startswith("eval_")}
        if evaluation:
            self.evaluations = [*self.evaluations[:1], (step, evaluation)]
        if training:
            if len(self.first) < WINDOW:
                self.first.append((step, training))
            self.last.append((step, training))
            self.trained += 1
        if values.get("reward") is not None:
            self.rewards.append(values["reward"])
        if self._clock is None:
            seconds = values.get("step_time")
            self._clock = (now, step) if seconds is None else (now - seconds, step - 1)

    def restart_clock(self) -> None:
        self._clock = None

    def seconds_left(self) -> float | None:
        """Estimate from all steps since the clock began, evaluations and saves included; None before the first."""
        if self._clock is None or self.step <= self._clock[1]:
            return None
        return (time.monotonic() - self._clock[0]) / (self.step - self._clock[1]) * (self.total_steps - self.step)


class PlainProgress:
    """A line a step, for pipes and log files."""

    def __init__(self, history: History):
        self.history = history

    def phase(self, name: str) -> None:
        """Lines say nothing between steps."""

    def samples(self, episodes: list[Episode]) -> None:
        """They are in samples.jsonl."""

    def step(self, step: int, values: Values) -> None:
        head = f"step {step}/{self.history.total_steps}"
        words = [" ".join(pair) for name in LINE if (pair := _labelled(name, values))]
        if values.get("step_time") is not None:
            words += [f"{values['step_time']:.2f} s", f"left {duration(self.history.seconds_left())}"]
        evaluation = [
            f"{name} {value:.4g}" for name, value in values.items() if name.startswith("eval_") and value is not None
        ]
        for line in (words, evaluation):
            if line:
                print(" | ".join([head, *line]), flush=True)

    def close(self) -> None:
        """Nothing is held."""


class _RedrawnLive(Live):
    """A live display that begins on an empty screen when the window's size has changed.

    rich goes back by as many lines as it drew. A terminal wraps these lines when it becomes narrower, so that there are
    more of them, and their first pieces would stay on the screen.
    """

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        before, self._size = getattr(self, "_size", self.console.size), self.console.size
        shown = super().process_renderables(renderables)
        return shown if before == self._size else [Control.home(), Control.clear(), *shown[1:]]


class LiveProgress:
    """The display of a terminal. What others print appears above it."""

    def __init__(self, history: History, console: Console, title: str):
        self.history, self.console, self.title = history, console, title
        self._phase, self._values, self._samples = "starting", {}, []
        self._live = _RedrawnLive(self, console=console, refresh_per_second=2, vertical_overflow="crop")
        self._live.start()

    def phase(self, name: str) -> None:
        self._phase = name

    def samples(self, episodes: list[Episode]) -> None:
        """Show the best and the worst rewarded of them."""
        by_reward = sorted((e for e in episodes if e.reward == e.reward), key=lambda e: e.reward)
        self._samples = by_reward[-1:] + by_reward[:1] if len(by_reward) > 1 else by_reward

    def step(self, step: int, values: Values) -> None:
        self._values = {**self._values, **values}
        self._live.refresh()

    def close(self) -> None:
        self._phase = "ended"
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        inside = options.update(width=max(20, options.max_width - 4), height=None)
        parts: list[RenderableType] = [self._head(), self._numbers(inside.max_width)]
        if len(self.history.rewards) > 1:
            bars = sparkline(self.history.rewards, inside.max_width - 8)
            parts.append(Text.assemble(("reward  ", "dim"), (bars, "green"), no_wrap=True))
        if self.history.evaluations:
            parts.append(self._evaluation())
        used = len(console.render_lines(Group(*parts), inside)) + 4  # borders, rule, and the line of the cursor
        room = min(SAMPLE_LINES, (console.size.height - used) // 2)
        if self._samples and room > 0:
            parts.append(Rule("samples", style="dim"))
            parts += [line for e in self._samples for line in sample_text(e).wrap(console, inside.max_width)[:room]]
        title = Text(self.title, overflow="ellipsis", no_wrap=True)
        yield Panel(Group(*parts), title=title, box=box.ROUNDED)

    def _head(self) -> RenderableType:
        step, total = self.history.step, self.history.total_steps
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        left = duration(self.history.seconds_left())
        grid.add_row(f"step {step}/{total}", ProgressBar(total=total, completed=step), f"left {left}  {self._phase}")
        return grid

    def _numbers(self, width: int) -> RenderableType:
        columns = max(1, width // 24)
        grid = Table.grid(padding=(0, 2), expand=True)
        names = [*SHOWN, *(name for name in self._values if name not in SHOWN)]
        pairs = [pair for name in names if (pair := _labelled(name, self._values))]
        cells = [Text.assemble((f"{label} ", "dim"), (text, "bold")) for label, text in pairs]
        for start in range(0, len(cells), columns):
            grid.add_row(*cells[start : start + columns])
        return grid

    def _evaluation(self) -> RenderableType:
        (first_step, first), (last_step, last) = self.history.evaluations[0], self.history.evaluations[-1]
        text = Text.assemble((f"evaluation, step {first_step} -> {last_step}:", "dim"), overflow="ellipsis")
        for name in [name for name in last if first.get(name) is not None and last[name] is not None][:4]:
            text.append(f"  {name.removeprefix('eval_')} {first[name]:.3g} -> {last[name]:.3g}", style="bold")
        return text


def sample_text(episode: Episode) -> Text:
    """A response on one line, behind its reward and the end of the problem's last sentence."""
    text = Text(f"reward {episode.reward:.2f}  ", style="green" if episode.advantage > 0 else "yellow")
    if episode.truncated:
        text.append("cut  ", style="red")
    if episode.problem:
        prompt = " ".join(clean(episode.problem.messages[-1]["content"]).split())
        text.append((prompt if len(prompt) <= 50 else "..." + prompt[-47:]) + "  ", style="dim")
    return text.append(" ".join(clean(episode.text[:1000]).split()), style="default")


def summary_table(history: History) -> Table:
    """Metric, first, last, change: evaluations as they are, training metrics as means of WINDOW steps."""
    table = Table(box=box.SIMPLE_HEAD, title="Summary")
    table.add_column("metric", overflow="fold")
    for name in ("first", "last", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    sections = []
    if history.evaluations:
        (first_step, first), (last_step, last) = history.evaluations[0], history.evaluations[-1]
        sections.append((f"step {first_step}", f"step {last_step}", first, last))
    if history.first:
        window = max(1, min(WINDOW, history.trained // 2))
        ends = [history.first[:window], list(history.last)[-window:]]
        sections.append((*map(_span, ends), *map(_means, ends)))
    for first_label, last_label, first, last in sections:
        table.add_row("", first_label, last_label, "", style="dim")
        for name in [name for name in first if name.startswith("eval_") or _labelled(name, first)]:
            if first[name] is not None and last.get(name) is not None:
                a, b = first[name], last[name]
                table.add_row(name, f"{a:.4g}", f"{b:.4g}", f"{b - a:+.4g}")
        table.add_section()
    return table


def _span(records: list[tuple[int, Values]]) -> str:
    first, last = records[0][0], records[-1][0]
    return f"step {first}-{last}" if last > first else f"step {first}"


def _means(records: list[tuple[int, Values]]) -> dict[str, float | None]:
    """Means over the steps that have a value; None where none has."""
    columns = {name: [values.get(name) for _, values in records] for name in records[-1][1]}
    known = {name: [value for value in column if value is not None] for name, column in columns.items()}
    return {name: sum(column) / len(column) if column else None for name, column in known.items()}


def _labelled(name: str, values: Values) -> tuple[str, str] | None:
    """A metric as (label, number); None for one that is not there or not shown."""
    value, shown = values.get(name), SHOWN.get(name)
    if shown is None and name.startswith("rewards/") and name.endswith("/mean"):
        shown = (name.split("/")[1], "{:.3f}")  # the parts of a reward have names of their own
    return None if value is None or shown is None else (shown[0], shown[1].format(value))


def duration(seconds: float | None) -> str:
    """`1h02m`, `3m05s`, `7s`; `?` where it is not known."""
    if seconds is None:
        return "?"
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{int(seconds) % 60:02d}s" if minutes else f"{int(seconds)}s"


def sparkline(values: array, width: int) -> str:
    """The values as bars, thinned to `width` by means of equal pieces."""
    width = max(1, min(width, len(values)))
    edges = [i * len(values) // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[int(7 * (mean - low) / (high - low)) if high > low else 0] for mean in means)


ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(\x07|\x1b\\|$)|.)?|\x9b[0-?]*[ -/]*[@-~]", re.DOTALL)


def clean(text: str) -> str:
    """Text that a terminal can only show: no escape sequences, no controls but newline and tab, no direction marks."""
    text = ESCAPES.sub("", text)
    return "".join(
        c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    )
