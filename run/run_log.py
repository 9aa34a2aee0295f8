"""What a run leaves behind: config.yaml, metrics, samples and held-out answers, TensorBoard; and what it shows.

    with RunLog(run_dir, config, total_steps=config.steps) as log:
        log.log_step(0, evaluate(...))                             # one JSON object a step; eval_* names included
        log.phase("sampling")
        log.log_samples(1, episodes, tokenizer.decode)
        log.log_step(1, {**metrics, **evaluation})
        log.print_summary()                                        # step 0 beside the last

Where this departs from the usual logger:

* A full disk, a vanished folder or a closed pipe does not end a run: the line is lost, standard error says so, the
  next one is tried.
* A file never keeps half a line: what a failed write left is cut off, and `truncate_after` cuts what a resume from an
  older checkpoint would write twice.
* Numbers that are not finite are null, so that every line is JSON for every reader.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data_types import Episode
from run.closed_pipe import ReaderMayGo, nobody_reads
from run.config import Config, save_yaml
from run.machine import describe_machine
from run.progress import History, LiveProgress, PlainProgress, summary_table


class RunLog:
    """The files of one run and its display.

    Args:
        run_dir: the run's folder; made where it is not there.
        total_steps: steps the run will have had at its end, for the display.
        live: redraw a display in place; None: where standard output is a terminal. Otherwise a line a step.

    Raises ValueError where the folder already holds another run's metrics and `config.resume` is not set.
    """

    def __init__(self, run_dir: str | Path, config: Config, total_steps: int, live: bool | None = None):
        self.run_dir = Path(run_dir)
        metrics = self.run_dir / "metrics.jsonl"
        if config.resume is None and metrics.is_file() and metrics.stat().st_size:
            raise ValueError(
                f"{self.run_dir} already holds a run: continue it with --resume, or name another --run-dir"
            )
        self.run_dir.mkdir(parents=True, exist_ok=True)
        settings = (
            self.run_dir / ".config.yaml.new"
        )  # beside, then renamed: a resume reads it, after a kill at any time
        save_yaml(dataclasses.replace(config, run_dir=str(run_dir), resume=None), settings)
        settings.replace(self.run_dir / "config.yaml")
        self._metrics = _JsonLines(metrics)
        self._samples = _JsonLines(self.run_dir / "samples.jsonl")
        self._held_out = _JsonLines(self.run_dir / "held_out.jsonl")
        self._share = config.log_samples
        self._tensorboard: Any = None
        self._purge_step: int | None = None
        self._complaints: set[str] = set()
        machine = json.dumps(describe_machine(), indent=1) + "\n"
        self._try("machine.json", lambda: (self.run_dir / "machine.json").write_text(machine, encoding="ascii"))
        self.history = History(total_steps)
        self.console = ReaderMayGo()
        if live is None:
            live = self.console.is_terminal and not self.console.is_dumb_terminal
        title = f"{Path(config.ckpt).name}  {config.task}  {self.run_dir}"
        self._progress = LiveProgress(self.history, self.console, title) if live else PlainProgress(self.history)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def phase(self, name: str) -> None:
        """Say what the run is doing now ("sampling", "updating", ...); shown by the live display."""
        self._progress.phase(name)

    def log_step(self, step: int, metrics: dict[str, Any]) -> None:
        """Write and show one step's metrics: name -> number, which may be a 0-d tensor."""
        values = {name: _number(value) for name, value in metrics.items()}
        if self._try("metrics.jsonl", lambda: self._metrics.append({"step": step, **values})):
            self._try("TensorBoard events", lambda: self._write_events(step, values))
        self.history.add(step, values)
        self._try("standard output", lambda: self._progress.step(step, values))

    def say(self, text: str) -> None:
        """A line for people, beside the display."""
        self._try("standard output", lambda: self.console.print(text, markup=False))

    def log_samples(self, step: int, episodes: list[Episode], decode: Callable[[list[int]], str]) -> None:
        """Write `config.log_samples` of a step's rollouts to samples.jsonl, and show two. `decode`: ids -> text.

        The first group of a step is written token by token as well: the report colours it.
        """
        first = step * len(episodes)  # counted over the run, so that a share of 1 in 1000 is that of the whole run
        prompts: dict[int, str] = {}
        records = []
        for i, episode in enumerate(episodes, start=first):
            if math.floor((i + 1) * self._share) > math.floor(i * self._share):
                if episode.group_id not in prompts:
                    prompts[episode.group_id] = decode(episode.prompt_ids)
                record = _sample(step, episode, prompts[episode.group_id])
                if episode.group_id == episodes[0].group_id:
                    record |= _tokens(episode, decode)
                records.append(record)
        self._try("samples.jsonl", lambda: self._samples.append(*records))
        self._progress.samples(episodes)

    def log_held_out(
        self, step: int, episodes: list[Episode], sampled: bool, decode: Callable[[list[int]], str]
    ) -> None:
        """Write a few held-out answers to held_out.jsonl, so that the first and the last can be compared.

        sampled: True at the run's temperature, False greedy.
        """
        records = [_sample(step, e, decode(e.prompt_ids)) | {"sampled": sampled} | _tokens(e, decode) for e in episodes]
        self._try("held_out.jsonl", lambda: self._held_out.append(*records))

    def truncate_after(self, step: int) -> None:
        """Forget what was logged after `step`: a run resumed from there will log it again.

        TensorBoard hides the later events once the first new one is written.
        """
        for file in (self._metrics, self._samples, self._held_out):
            file.truncate_after(step)
        self._close_events()
        self._purge_step = step + 1
        self.history.clear()
        for record in read_metrics(self.run_dir):
            self.history.add(record.pop("step"), record)
        self.history.restart_clock()

    def print_summary(self) -> None:
        """End the display and print one table: the first evaluation and steps beside the last."""
        self._progress.close()
        self._try("standard output", lambda: self.console.print(summary_table(self.history)))

    def close(self) -> None:
        """End the display and write out what is still in memory. The log can not be used afterwards."""
        self._progress.close()
        self._close_events()
        self._metrics.close()
        self._samples.close()
        self._held_out.close()

    def _write_events(self, step: int, values: dict[str, float | None]) -> None:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # a second to import: only where a run begins

            self._tensorboard = SummaryWriter(str(self.run_dir), purge_step=self._purge_step)
            self._purge_step = None
        try:
            for name, value in values.items():
                if value is not None:
                    self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        except OSError:
            self._tensorboard = None  # its writer thread is gone; the next step begins a new file
            raise

    def _close_events(self) -> None:
        if self._tensorboard is not None:
            self._try("TensorBoard events", self._tensorboard.close)
            self._tensorboard = None

    def _try(self, what: str, write: Callable[[], object]) -> bool:
        """Do it; where the disk refuses, say so once until it works again, let the run live, and return False."""
        try:
            write()
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                nobody_reads()
            if what not in self._complaints:
                with contextlib.suppress(OSError):  # standard error may stand on the same full disk
                    print(f"WARNING: {self.run_dir}: {what} not written: {error.strerror or error}", file=sys.stderr)
            self._complaints.add(what)
            return False
        self._complaints.discard(what)
        return True


class NoLog:
    """In the place of a `RunLog` where another process writes it: says and writes nothing."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def phase(self, name: str) -> None: ...

    def say(self, text: str) -> None: ...

    def log_step(self, step: int, metrics: dict[str, Any]) -> None: ...

    def log_samples(self, step: int, episodes: list[Episode], decode: Callable[[list[int]], str]) -> None: ...

    def log_held_out(
        self, step: int, episodes: list[Episode], sampled: bool, decode: Callable[[list[int]], str]
    ) -> None: ...

    def truncate_after(self, step: int) -> None: ...

    def print_summary(self) -> None: ...


class _JsonLines:
    """A file of JSON objects, a line each, in the order of their "step"; only ever whole lines."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open for the length of the run)

    def append(self, *records: dict[str, Any]) -> None:
        """All of them, or none and OSError."""
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode("ascii")
        if not self.path.exists():  # deleted: writes to the open file would succeed, and be lost with it
            again = open(self.path, "ab", buffering=0)  # noqa: SIM115
            self._file.close()
            self._file = again
        start = self._file.seek(0, 2)
        try:
            if self._file.write(text) != len(text):
                raise OSError(errno.ENOSPC, "the disk is full")
        except OSError:
            self._file.truncate(start)
            raise

    def truncate_after(self, step: int) -> None:
        """Cut the file before its first line of a later step, or the first that is broken."""
        end = sum(len(line) for line, record in _lines(self.path) if record["step"] <= step)
        self._file.truncate(end)

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> Iterable[tuple[bytes, dict[str, Any]]]:
    """The lines of a file with what they say, up to one that a killed process left unfinished."""
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                return
            if not line.endswith(b"\n") or not isinstance(record, dict) or "step" not in record:
                return
            yield line, record


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, oldest first."""
    return read_lines(Path(run_dir) / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, up to a line that is not whole."""
    return [record for _, record in _lines(path)]


def _number(value: Any) -> float | int | None:
    """A plain number; None for one that is not finite, which JSON cannot write."""
    if value is None or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _sample(step: int, episode: Episode, prompt: str) -> dict[str, Any]:
    return {
        "step": step,
        "group_id": episode.group_id,
        "problem": episode.problem.id if episode.problem else None,
        "prompt": prompt,
        "response": episode.text,
        "reward": _number(episode.reward),
        "reward_parts": {name: _number(value) for name, value in episode.reward_parts.items()},
        "advantage": _number(episode.advantage),
        "finish_reason": episode.finish_reason,
        "response_tokens": len(episode.response_ids),
    }


def _tokens(episode: Episode, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """The answer token by token, with the sampler's log-probability of each."""
    return {
        "prompt_ids": episode.prompt_ids,
        "token_ids": episode.response_ids,
        "tokens": [decode([token_id]) for token_id in episode.response_ids],
        "token_logprobs": [_number(round(logprob, 4)) for logprob in episode.logprobs],
    }
