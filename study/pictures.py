"""The charts of a report as PNG files, drawn by matplotlib.

save_pictures(shown["charts"], shown["names"], Path("pictures"))     # pictures/solved.png, ...
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DASHES = ("-", ":", "--", "-.")


def save_pictures(charts: Sequence[dict[str, Any]], names: Sequence[str], folder: Path) -> None:
    """Write each chart as FOLDER/<title>.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        rows = -(-len(chart["lines"]) // 2)  # of the legend below
        figure = Figure(figsize=(6, 3.5 + 0.16 * rows), constrained_layout=True)
        draw_chart(figure.subplots(), chart, names)
        figure.legend(loc="outside lower center", ncols=2, fontsize=7)
        figure.savefig(folder / (re.sub(r"\W+", "-", chart["title"].lower()).strip("-") + ".png"), dpi=150)


def draw_chart(axis: Axes, chart: dict[str, Any], names: Sequence[str]) -> None:
    """Draw the lines and bands of one chart. One run: a colour a metric. Several: a colour a run, a dash a metric."""
    metrics = list(dict.fromkeys(line["metric"] for line in chart["lines"]))
    for line in chart["lines"]:
        kind, many = metrics.index(line["metric"]), len(names) > 1
        colour, held_out = f"C{(line['run'] if many else kind) % 10}", line["metric"].startswith("eval")
        axis.plot(
            line["x"], line["y"], color=colour, linestyle=DASHES[kind % 4 if many else 0], linewidth=1.3,
            marker="." if held_out else None,
            label=_plain(f"{names[line['run']]}: {line['label']}" if many else line["label"]),
        )  # fmt: skip
        if "low" in line and (held_out or not many):
            axis.fill_between(line["x"], line["low"], line["high"], color=colour, alpha=0.15, linewidth=0)
    axis.set(title=chart["title"], xlabel="step")
    axis.grid(alpha=0.3)


def _plain(text: str) -> str:
    """matplotlib reads formulas between dollar signs, and its fonts know no halves of characters."""
    return text.replace("$", r"\$").encode("utf-8", "replace").decode("utf-8")
