"""A run as a person sees it: a display redrawn in place on a terminal, a line a step elsewhere, a table at the end.

A response, a name of a metric or of a checkpoint may hold anything: terminal escapes, control characters, brackets that
a markup language would read. Such text is printed by `text`, which escapes control characters and is no markup.
"""

from __future__ import annotations

import errno
import os
import time
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
from run.terminal import printable

Values = dict[str, float | None]
Ends = tuple[tuple[str, Values], tuple[str, Values]]  # (label, values) of the beginning and of the end of a run
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


class Display(Console):
    """A console that raises BrokenPipeError where its reader has gone, and does not end the program as rich does."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class History:
    """The steps so far, as far as the displays need them; 8 bytes a step, and nothing else grows with the run.

    Args:
        eval_every: steps between evaluations, 0: only after the last step; None: there are no evaluations.
    """

    def __init__(self, total_steps: int, eval_every: int | None = None):
        self.total_steps, self.eval_every = total_steps, eval_every
        self.evaluation_seconds = 0.0  # of the last evaluation
        self.clear()

    def clear(self) -> None:
        self.step = 0
        self.first: list[tuple[int, Values]] = []
        self.trained = 0
        self.last: deque[tuple[int, Values]] = deque(maxlen=WINDOW)
        self.evaluations: list[tuple[int, Values]] = []  # the first and the newest
        self.rewards = array("d")
        self.restart_clock()

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
        self._clock: tuple[float, int] | None = None  # when the first step began to count, and which it was
        self._evaluating = 0.0  # seconds of evaluations since then

    def evaluated(self, seconds: float) -> None:
        """An evaluation took so long. Call it before `add` of its step."""
        self.evaluation_seconds = seconds
        if self._clock is not None:
            self._evaluating += seconds

    def seconds_left(self) -> float | None:
        """Estimate: the mean of all steps since the clock began, saves included, and the evaluations that are still to
        come. None before the first step."""
        if self._clock is None or self.step <= self._clock[1]:
            return None
        since, first = self._clock
        step_seconds = (time.monotonic() - since - self._evaluating) / (self.step - first)
        return step_seconds * (self.total_steps - self.step) + self.evaluation_seconds * self.evaluations_left()

    def evaluations_left(self) -> int:
        """Evaluations after later steps: after each multiple of `eval_every`, and after the last step."""
        step, total, every = self.step, self.total_steps, self.eval_every
        if every is None or step >= total:
            return 0
        return 1 if every == 0 else total // every - step // every + (total % every != 0)


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
                print(printable(" | ".join([head, *line]), keep=""), flush=True)

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
    """The display of a terminal. The prints of others appear above it."""

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
        title = Text(printable(self.title, keep=""), overflow="ellipsis", no_wrap=True)
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
        steps = f"step {first_step}" if first_step == last_step else f"step {first_step} -> {last_step}"
        line = Text.assemble((f"evaluation, {steps}:", "dim"), overflow="ellipsis")
        pairs = [(name, first.get(name), last[name]) for name in last]
        for name, a, b in [(name, a, b) for name, a, b in pairs if a is not None and b is not None][:4]:
            change = f"{a:.3g}" if first_step == last_step else f"{a:.3g} -> {b:.3g}"
            line.append(f"  {printable(name.removeprefix('eval_'), keep='')} {change}", style="bold")
        return line


def sample_text(episode: Episode) -> Text:
    """A response on one line, behind its reward and the end of the problem's last sentence."""
    line = Text(f"reward {episode.reward:.2f}  ", style="green" if episode.advantage > 0 else "yellow")
    if episode.truncated:
        line.append("cut  ", style="red")
    if episode.problem:
        prompt = " ".join(printable(episode.problem.messages[-1]["content"]).split())
        line.append((prompt if len(prompt) <= 50 else "..." + prompt[-47:]) + "  ", style="dim")
    return line.append(" ".join(printable(episode.text[:1000]).split()), style="default")


def plain(text: str) -> Text:
    """A name or a response for a table or a display: no markup, control characters escaped, on one line."""
    return Text(printable(text, keep=""))


def result_lines(history: History) -> list[str]:
    """The result of a run in a few lines: `solved, sampled: 24 % -> 63 % (step 0 -> step 100)`.

    Evaluations first; the means of the first and last steps if there were not two evaluations to compare.
    """
    evaluated, trained = _evaluation_ends(history), _training_ends(history)
    lines = [_result(evaluated, "eval_", "sampled"), _result(evaluated, "eval_greedy_", "greedy")]
    if evaluated is None or evaluated[0] == evaluated[1]:
        lines.append(_result(trained, "", "in training"))
    return [line for line in lines if line]


def _result(ends: Ends | None, prefix: str, how: str) -> str | None:
    """One of these lines: the share of solved problems if the reward has a part `answer`, else the reward."""
    if ends is None:
        return None
    (first_label, first), (last_label, last) = ends
    has_answer = f"{prefix}answer" in first or (not prefix and "rewards/answer/mean" in first)
    name = "solved" if has_answer and f"{prefix}solved" in first else "reward"
    a, b = first.get(prefix + name), last.get(prefix + name)
    if a is None or b is None:
        return None
    shown = [f"{100 * value:.0f} %" if name == "solved" else f"{value:.3f}" for value in (a, b)]
    if first_label == last_label:
        return f"{name}, {how}: {shown[0]} ({first_label})"
    return f"{name}, {how}: {' -> '.join(shown)} ({first_label} -> {last_label})"


def summary_table(history: History) -> Table:
    """Metric, first, last, change: evaluations as they are, training metrics as means of WINDOW steps. Of a single
    evaluation, or a single step, the value only."""
    sections = [ends for ends in (_evaluation_ends(history), _training_ends(history)) if ends]
    columns = ("first", "last", "change") if any(a != b for a, b in sections) else ("value",)
    table = Table(box=box.SIMPLE_HEAD, title="Summary")
    table.add_column("metric", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for (first_label, first), (last_label, last) in sections:
        both = first_label != last_label
        table.add_row("", first_label, *[last_label] * both, style="dim")
        for name in [name for name in first if name.startswith("eval_") or _labelled(name, first)]:
            a, b = first[name], last.get(name)
            if a is not None and b is not None:
                table.add_row(plain(name), f"{a:.4g}", *[f"{b:.4g}", f"{b - a:+.4g}"] * both)
        table.add_section()
    return table


def _evaluation_ends(history: History) -> Ends | None:
    """The first and the last evaluation; the same one twice if there was only one."""
    if not history.evaluations:
        return None
    (first_step, first), (last_step, last) = history.evaluations[0], history.evaluations[-1]
    return (f"step {first_step}", first), (f"step {last_step}", last)


def _training_ends(history: History) -> Ends | None:
    """Means over the first and over the last steps."""
    if not history.first:
        return None
    window = max(1, min(WINDOW, history.trained // 2))
    first, last = history.first[:window], list(history.last)[-window:]
    return (_span(first), _means(first)), (_span(last), _means(last))


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
        shown = (name.removeprefix("rewards/").removesuffix("/mean"), "{:.3f}")  # parts have names of their own
    return None if value is None or shown is None else (printable(shown[0], keep=""), shown[1].format(value))


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
