"""Small snapshots of a run's weights, for later views: the weights at the start, and the change of each weight since.

    runs/<name>/snapshots/start.safetensors          the weights at the first snapshot, as they are
    runs/<name>/snapshots/step-000008.safetensors    changes since then, <name>: [R, C] int16, <name>#scale: [R, 1] fp32

A change is stored as a whole number from -2047 to 2047, times the scale of its row: 12 bits, of which a page needs two
characters. The error is at most half a scale, which is 1/4094 of the row's largest change. Training cannot
continue from a snapshot. It needs a checkpoint.

    take("runs/a", 8, count, steps, model)           # writes if a snapshot is due at this step; all ranks call this
    first, start, changes = read("runs/a")           # step, {name: tensor}, {step: {name: Change}}
    weights = restore(start, changes[8])             # {name: fp32 tensor}
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel import distributed
from parallel.sharding import whole
from qwen2_llm import Qwen2ForCausalLM

logger = logging.getLogger("snapshots")
FOLDER, START, SCALE = "snapshots", "start.safetensors", "#scale"
LARGEST = 2047  # of the whole numbers: 12 bits
Weights = dict[str, Tensor]


class Change(NamedTuple):
    """numbers [R, C] int16, scale [R, 1] fp32: the change is numbers * scale. A vector is one row."""

    numbers: Tensor
    scale: Tensor


def is_due(step: int, count: int, steps: int) -> bool:
    """Whether one of `count` snapshots, spread evenly from step 0 to step `steps`, is taken at this step."""
    return count > 1 and step in {round(i * steps / (count - 1)) for i in range(count)}


def take(run_dir: str | Path, step: int, count: int, steps: int, model: Qwen2ForCausalLM) -> None:
    """Write a snapshot if one is due. All ranks call this. A snapshot that cannot be written is a line in the log: the
    run goes on."""
    if not is_due(step, count, steps):
        return
    weights = whole(model).state_dict()

    def written() -> None:
        try:
            write(run_dir, step, weights)
        except (OSError, ValueError) as error:
            logger.error("no snapshot at step %d: %s; the run goes on", step, error)

    distributed.on_main(written)


def write(run_dir: str | Path, step: int, weights: Weights) -> Path:
    """Write the snapshot of a step; the first one is the start. Raises OSError, or ValueError for weights that are not
    finite or are not those of the start."""
    folder = Path(run_dir) / FOLDER
    folder.mkdir(exist_ok=True)
    weights = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
    if bad := [name for name, w in weights.items() if not w.isfinite().all()]:
        raise ValueError(f"the weight {bad[0]} holds NaN or infinity")
    if not (folder / START).is_file():
        return _save(weights, folder / START, step)
    start = _load(folder / START)
    _check_same(folder / START, start, weights)
    tensors: Weights = {}
    for name, w in weights.items():
        change = w.float() - start[name].float()
        rows = change.reshape(1, -1) if change.ndim < 2 else change
        scale = rows.abs().amax(-1, keepdim=True) / LARGEST
        numbers = (rows / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-LARGEST, LARGEST)
        tensors |= {name: numbers.to(torch.int16), name + SCALE: scale}
    return _save(tensors, folder / f"step-{step:06d}.safetensors", step)


def rewind(run_dir: str | Path, step: int) -> None:
    """Delete the snapshots after `step`, of a run that continues from there. A damaged one stays, with a warning."""
    for path in (Path(run_dir) / FOLDER).glob("*.safetensors"):
        try:
            if _step(path) > step:
                path.unlink(missing_ok=True)
        except (OSError, ValueError) as error:
            logger.warning("%s", error)


def read(run_dir: str | Path) -> tuple[int, Weights, dict[int, dict[str, Change]]]:
    """The step of the start, its weights, and the changes by step, the earliest first.

    Raises FileNotFoundError if there are no snapshots, and ValueError for a damaged file, with one line.
    """
    folder = Path(run_dir) / FOLDER
    if not (folder / START).is_file():
        raise FileNotFoundError(f"{folder / START} is missing: make the run with --snapshots 10")
    start = _load(folder / START)
    changes = {}
    for path in sorted(folder.glob("step-*.safetensors")):
        tensors = _load(path)
        if set(tensors) != {name + end for name in start for end in ("", SCALE)}:
            raise ValueError(f"{path} holds other weights than {folder / START}; delete it")
        found = {name: Change(tensors[name], tensors[name + SCALE]) for name in start}
        for name, change in found.items():
            if change.numbers.numel() != start[name].numel() or len(change.scale) != len(change.numbers):
                raise ValueError(f"{path}: {name} has another shape than in {folder / START}; delete it")
        changes[_step(path)] = found
    return _step(folder / START), start, dict(sorted(changes.items()))


def restore(start: Weights, changes: dict[str, Change]) -> Weights:
    """The weights of a snapshot in fp32."""
    return {
        name: start[name].float() + (change.numbers.float() * change.scale).reshape(start[name].shape)
        for name, change in changes.items()
    }


def _step(path: Path) -> int:
    """The step in a file's metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return int((file.metadata() or {})["step"])
    except (SafetensorError, KeyError, ValueError):
        raise ValueError(f"{path} is not a snapshot of a run; delete it") from None


def _load(path: Path) -> Weights:
    _step(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it") from None


def _save(tensors: Weights, path: Path, step: int) -> Path:
    """Beside the final name first: a kill leaves no half file under it."""
    beside = path.with_suffix(".unfinished")
    try:
        save_file(tensors, beside, metadata={"format": "pt", "step": str(step)})
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(f"{path}: {error}") from error
    os.replace(beside, path)
    return path


def _check_same(path: Path, start: Weights, weights: Weights) -> None:
    if {n: w.shape for n, w in start.items()} != {n: w.shape for n, w in weights.items()}:
        raise ValueError(f"{path} is of another model; delete the folder {path.parent}")
