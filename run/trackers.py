"""Where a run's metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio (`--log-to`).

    for tracker in open_trackers(config, run_dir):        # ValueError with one line if a package is not installed
        tracker.log(step, {"reward": 0.5}, {"samples": "reward 1.00 ..."})

TensorBoard writes event files into the run's folder. The other two are optional packages: wandb sends the metrics to
its service (WANDB_MODE=offline keeps them here), trackio keeps them in a local database.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from data_types import Episode
from run.config import Config
from run.flags import one_line
from run.terminal import printable

PROJECT = "nanogrpo"
Values = dict[str, float | int | None]


class Tracker(Protocol):
    """A place for metrics. `restart`: a resumed run logs the steps after this one again."""

    name: str

    def log(self, step: int, values: Values, texts: dict[str, str]) -> None: ...

    def restart(self, step: int) -> None: ...

    def close(self) -> None: ...


def check_installed(log_to: tuple[str, ...]) -> None:
    """Raises ValueError for a tracker whose package is not there."""
    for name in log_to:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--log-to {name}: the package {name} is not installed; run: pip install {name}")


def open_trackers(config: Config, run_dir: Path) -> list[Tracker]:
    """All trackers of `--log-to`. Raises ValueError, with one line, if one cannot be started."""
    check_installed(config.log_to)
    kinds: dict[str, Callable[[Config, Path], Tracker]] = {
        "tensorboard": TensorBoard,
        "wandb": Wandb,
        "trackio": Trackio,
    }
    opened: list[Tracker] = []
    for name in config.log_to:
        try:
            opened.append(kinds[name](config, run_dir))
        except Exception as error:  # packages of others raise anything: no key, no network, no database
            for tracker in opened:
                tracker.close()
            raise ValueError(f"--log-to {name}: {one_line(error)}") from None
    return opened


class TensorBoard:
    """Event files, read by `tensorboard --logdir runs`. A file is begun with the first step."""

    name = "TensorBoard events"

    def __init__(self, config: Config, run_dir: Path):
        self._folder = str(run_dir)
        self._purge_step: int | None = None
        self._writer: Any = None

    def log(self, step: int, values: Values, texts: dict[str, str]) -> None:
        """Raises OSError if the disk does not take it; the next step begins a new file."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second: only where a run begins

            self._writer = SummaryWriter(self._folder, purge_step=self._purge_step)
            self._purge_step = None
        try:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(printable(name, keep=""), float(value), step)
            for name, text in texts.items():
                self._writer.add_text(printable(name, keep=""), _code_block(text), step)
            self._writer.flush()
        except OSError:
            self._writer = None  # its thread has ended
            raise

    def restart(self, step: int) -> None:
        """TensorBoard hides the later events once the first new one is written."""
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


class Wandb:
    """Weights & Biases. A resumed run goes on as the same run of the service."""

    name = "wandb"

    def __init__(self, config: Config, run_dir: Path):
        import wandb  # optional

        place = hashlib.sha256(str(run_dir.resolve()).encode("utf-8", "replace")).hexdigest()[:16]
        self._run = wandb.init(
            project=PROJECT, name=printable(run_dir.name), id=place, resume="allow", dir=str(run_dir),
            config=dataclasses.asdict(config), settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")  # its own step cannot go back to that of a checkpoint

    def log(self, step: int, values: Values, texts: dict[str, str]) -> None:
        self._run.log({**_known(values), "step": step})

    def restart(self, step: int) -> None:
        """The service shows the steps that are logged again over the old ones."""

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Trackio, a local dashboard: `trackio show`."""

    name = "trackio"

    def __init__(self, config: Config, run_dir: Path):
        import trackio  # optional

        self._run = trackio.init(
            project=PROJECT, name=printable(run_dir.name), config=dataclasses.asdict(config), resume="allow",
            embed=False,  # no dashboard in the cell of a notebook
        )  # fmt: skip

    def log(self, step: int, values: Values, texts: dict[str, str]) -> None:
        self._run.log(_known(values), step=step)

    def restart(self, step: int) -> None:
        """The dashboard shows the steps that are logged again over the old ones."""

    def close(self) -> None:
        self._run.finish()


def _known(values: Values) -> dict[str, float]:
    return {printable(name, keep=""): float(value) for name, value in values.items() if value is not None}


def sample_texts(episodes: list[Episode]) -> dict[str, str]:
    """The response of the highest and of the lowest reward, for people."""
    known = sorted((e for e in episodes if e.reward == e.reward), key=lambda e: e.reward)
    chosen = {"samples/best": known[-1:], "samples/worst": known[:1] if len(known) > 1 else []}
    return {name: _text(found[0]) for name, found in chosen.items() if found}


def held_out_texts(episodes: list[Episode], sampled: bool) -> dict[str, str]:
    """The first responses to held-out problems, which are the same problems in every evaluation."""
    kind = "sampled" if sampled else "greedy"
    return {f"held_out_{kind}/{number}": _text(episode) for number, episode in enumerate(episodes[:4])}


def _text(episode: Episode) -> str:
    prompt = episode.problem.messages[-1]["content"] if episode.problem else ""
    head = f"reward {episode.reward:.3f}, {episode.n_sampled} tokens, {episode.finish_reason}"
    return printable(f"{head}\n\n{prompt}\n\n{episode.text}")


def _code_block(text: str) -> str:
    """Markdown that shows a text as it is: nothing in a response is a heading, a link or a picture."""
    return "\n".join("    " + line for line in text.split("\n"))
