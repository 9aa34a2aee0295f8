"""The files of a run (config.yaml, metrics, samples, held-out responses, charts) and its lines on the terminal.

    with RunLog(run_dir, config, total_steps=config.steps) as log:
        log.log_step(0, evaluate(...))                             # one JSON object a step; eval_* names included
        log.phase("rollout and update")
        log.log_samples(1, episodes, tokenizer.decode)
        log.log_step(1, {**metrics, **evaluation})
        log.print_summary()                                        # step 0 beside the last

Departures from the usual logger:

* A full disk, a vanished folder or a closed pipe does not end a run: the line is lost, standard error says so, and the
  next line is tried.
* A file never keeps half a line (json_lines.py), and a resume from an older checkpoint leaves no step twice.
* Numbers that are not finite are null, so that every line is JSON for every reader.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from data_types import Episode
from run.config import Config, save_yaml
from run.flags import one_line
from run.json_lines import LARGEST_INT, JsonLines, is_metrics, read_lines
from run.machine import describe_machine
from run.progress import (
    Display,
    History,
    LiveProgress,
    PlainProgress,
    duration,
    plain,
    result_lines,
    summary_table,
)
from run.terminal import can_redraw, complain, discard, write_error
from run.trackers import Tracker, held_out_texts, open_trackers, sample_texts


class RunLog:
    """The files of one run and its display.

    Args:
        run_dir: the run's folder. It is made if it is not there.
        total_steps: number of the last step, for the display.
        live: True redraws a display in place, False prints a line a step. None: live on a terminal, but not in the
            cell of a notebook.

    Raises ValueError if the folder already holds another run's metrics and `config.resume` is not set, and if a tracker
    of `config.log_to` cannot be started.
    """

    def __init__(self, run_dir: str | Path, config: Config, total_steps: int, live: bool | None = None):
        self.run_dir = Path(run_dir)
        metrics = self.run_dir / "metrics.jsonl"
        if config.resume is None and metrics.is_file() and metrics.stat().st_size:
            raise ValueError(
                f"{self.run_dir} already holds a run: continue it with --resume, or name another --run-dir"
            )
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._trackers = open_trackers(config, self.run_dir)
        settings = self.run_dir / ".config.yaml.new"  # renamed when it is whole: a resume reads it after any kill
        save_yaml(dataclasses.replace(config, run_dir=str(run_dir), resume=None), settings)
        settings.replace(self.run_dir / "config.yaml")
        self._metrics = JsonLines(metrics, is_metrics, once=True)
        self._samples = JsonLines(self.run_dir / "samples.jsonl")
        self._held_out = JsonLines(self.run_dir / "held_out.jsonl")
        self._share = config.log_samples
        self._texts: dict[str, str] = {}  # for the trackers, with the metrics of their step
        self._complaints: set[str] = set()
        self._token_texts: dict[
            int, str
        ] = {}  # token id -> its text: a step has thousands of tokens and few different ones
        machine = json.dumps(describe_machine(), indent=1) + "\n"
        self._try("machine.json", lambda: (self.run_dir / "machine.json").write_text(machine, encoding="ascii"))
        self.history = History(total_steps, config.eval_every if config.eval_problems else None)
        self._evaluating_since: float | None = None
        self.console = Display()
        if live is None:
            live = can_redraw() and not self.console.is_dumb_terminal
        title = f"{Path(config.ckpt).name}  {config.task}  {self.run_dir}"
        self._progress = LiveProgress(self.history, self.console, title) if live else PlainProgress(self.history)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def phase(self, name: str) -> None:
        """Say what the run is doing now ("rollout and update", "evaluating", ...), for the live display. The time of
        an evaluation is measured, for the estimate of the time that is left."""
        self._evaluation_ends()
        self._evaluating_since = time.monotonic() if name == "evaluating" else None
        self._progress.phase(name)

    def _evaluation_ends(self) -> None:
        if self._evaluating_since is not None:
            self.history.evaluated(time.monotonic() - self._evaluating_since)
            self._evaluating_since = None

    def log_step(self, step: int, metrics: dict[str, Any]) -> None:
        """Write and show one step's metrics: name -> number, which may be a 0-d tensor."""
        self._evaluation_ends()
        values = {name: _number(value) for name, value in metrics.items()}
        if self._try("metrics.jsonl", lambda: self._metrics.append({"step": step, **values})):
            texts, self._texts = self._texts, {}
            self._track(lambda tracker: tracker.log(step, values, texts))
        self.history.add(step, values)
        self._show(lambda: self._progress.step(step, values))

    def say(self, text: str) -> None:
        """A line for people, beside the display."""
        self._show(lambda: self.console.print(plain(text)))

    def say_duration(self, step_time: float) -> None:
        """After the first step: how long the run will last. step_time: seconds."""
        left = duration(self.history.seconds_left())
        self.say(f"a step takes {step_time:.1f} s; the run will last about {left}, evaluations included")

    def log_samples(self, step: int, episodes: list[Episode], decode: Callable[[list[int]], str]) -> None:
        """Write `config.log_samples` of a step's rollouts to samples.jsonl, and show two. `decode`: ids -> text.

        The first group of a step, and every response with a trace, is written token by token as well.
        """
        first = step * len(episodes)  # counted over the run, so that a share of 1 in 1000 is that of the whole run
        prompts: dict[int, str] = {}
        records = []
        for i, episode in enumerate(episodes, start=first):
            if math.floor((i + 1) * self._share) > math.floor(i * self._share):
                if episode.group_id not in prompts:
                    prompts[episode.group_id] = decode(episode.prompt_ids)
                record = _sample(step, episode, prompts[episode.group_id])
                if episode.group_id == episodes[0].group_id or episode.trace:
                    record |= self._tokens(episode, decode)
                records.append(record)
        self._try("samples.jsonl", lambda: self._samples.append(*records))
        if records:
            self._texts |= sample_texts(episodes)
        self._progress.samples(episodes)

    def log_held_out(
        self, step: int, episodes: list[Episode], sampled: bool, decode: Callable[[list[int]], str]
    ) -> None:
        """Write a few held-out responses to held_out.jsonl, so that the first and the last can be compared.

        sampled: True at the run's temperature, False greedy.
        """
        records = [
            _sample(step, e, decode(e.prompt_ids)) | {"sampled": sampled} | self._tokens(e, decode) for e in episodes
        ]
        self._try("held_out.jsonl", lambda: self._held_out.append(*records))
        self._texts |= held_out_texts(episodes, sampled)

    def _tokens(self, episode: Episode, decode: Callable[[list[int]], str]) -> dict[str, Any]:
        """The response token by token: text, log-probability under the sampler, and the part in the update."""
        for token_id in episode.response_ids:
            if token_id not in self._token_texts:
                self._token_texts[token_id] = decode([token_id])
        found = {
            "prompt_ids": episode.prompt_ids,
            "token_ids": episode.response_ids,
            "tokens": [self._token_texts[token_id] for token_id in episode.response_ids],
            "token_logprobs": _rounded(episode.logprobs),
            **({} if episode.sampled is None else {"token_sampled": episode.sampled}),
        }
        return found | {"update": episode.trace} if episode.trace else found

    def truncate_after(self, step: int) -> None:
        """Forget all lines after `step`: a run resumed from there will log it again.

        TensorBoard hides the later events once the first new one is written.
        """
        for file in (self._metrics, self._samples, self._held_out):
            if aside := file.truncate_after(step):
                complain(f"WARNING: {file.path}: {aside} broken lines were moved to {file.path.name}.broken")
        self._track(lambda tracker: tracker.restart(step))
        self.history.clear()
        for record in read_metrics(self.run_dir):
            self.history.add(record.pop("step"), record)
        self.history.restart_clock()

    def print_summary(self) -> None:
        """End the display, print the result in a few lines, and write summary.txt: all metrics, first beside last."""
        self._show(self._progress.close)
        self._try("summary.txt", self._write_summary)
        for line in result_lines(self.history):
            self.say(line)

    def _write_summary(self) -> None:
        with open(self.run_dir / "summary.txt", "w", encoding="utf-8", errors="replace") as file:
            Display(file=file, width=100).print(summary_table(self.history))

    def close(self) -> None:
        """End the display and write out the lines that are still in memory. The log can not be used afterwards."""
        self._show(self._progress.close)
        self._track(lambda tracker: tracker.close())
        self._trackers.clear()
        self._metrics.close()
        self._samples.close()
        self._held_out.close()

    def _track(self, values: Callable[[Tracker], None]) -> None:
        """Let every tracker take something. A package that fails otherwise than by the disk is not asked again."""
        for tracker in list(self._trackers):
            try:
                self._try(tracker.name, partial(values, tracker))
            except Exception as error:  # packages of others raise anything, and a run is worth more than its charts
                complain(f"WARNING: {tracker.name} failed ({one_line(error)}); the run goes on without it")
                self._trackers.remove(tracker)

    def _show(self, write: Callable[[], None]) -> None:
        """Print; the run goes on if nobody reads it."""

        def shown() -> None:
            write()
            if error := write_error(sys.stdout):  # a replaced stream does not raise
                raise error

        self._try("standard output", shown)

    def _try(self, what: str, write: Callable[[], object]) -> bool:
        """Do it; where the disk refuses, say so once until it works again, let the run live, and return False."""
        try:
            write()
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                discard(sys.stdout)
            if what not in self._complaints:
                complain(f"WARNING: {self.run_dir}: {what} not written: {error.strerror or error}")
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

    def say_duration(self, step_time: float) -> None: ...

    def log_step(self, step: int, metrics: dict[str, Any]) -> None: ...

    def log_samples(self, step: int, episodes: list[Episode], decode: Callable[[list[int]], str]) -> None: ...

    def log_held_out(
        self, step: int, episodes: list[Episode], sampled: bool, decode: Callable[[list[int]], str]
    ) -> None: ...

    def truncate_after(self, step: int) -> None: ...

    def print_summary(self) -> None: ...


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, oldest first; broken ones are left out."""
    return read_lines(Path(run_dir) / "metrics.jsonl", is_metrics)


def _number(value: Any) -> float | int | None:
    """A plain number that a float can hold; None for one that is not finite, which JSON cannot write."""
    if value is None or (isinstance(value, int) and abs(value) < LARGEST_INT):
        return value
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _rounded(logprobs: list[float]) -> list[float | None]:
    if math.isfinite(sum(logprobs)):
        return [round(x, 7) for x in logprobs]
    return [_number(round(x, 7)) for x in logprobs]


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
        "response_tokens": episode.n_sampled,
    } | ({} if episode.turns is None else {"turns": [turn._asdict() for turn in episode.turns]})
