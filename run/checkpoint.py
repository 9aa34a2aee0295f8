"""Save and resume: a checkpoint is whole or absent, and it is a Hugging Face folder.

    runs/<name>/checkpoints/latest                  the name of the newest whole checkpoint
    runs/<name>/checkpoints/step-000010/
        config.json model.safetensors tokenizer...  opens with transformers, vLLM, llama.cpp, and --ckpt
        optimizer.safetensors                       fp32 masters and moments, "<parameter's index>.<name>"
        trainer_state.json                          step, score, the trainer's state, the optimizer's settings
        adapter/                                    LoRA in PEFT's format; model.safetensors is merged then
        SHA256SUMS                                  load_checkpoint and `sha256sum -c SHA256SUMS` compare with it

Departure from `torch.save` into the run's folder: everything is written into a temporary folder, every file is synced
to the disk, the folder gets its name in one rename, and then `latest` moves. A kill at any moment, or a full disk,
leaves the checkpoints that were there before. Old checkpoints are deleted last. Nothing is pickled: a checkpoint of
somebody else can be wrong, but it cannot run code. Weights that are NaN or infinite are not saved.

    save_checkpoint(run_dir, step, model, tokenizer, optimizer.state_dict(), {"seen": 320}, keep=3)
    folder = find_checkpoint("latest", run_dir)
    model = Qwen2ForCausalLM.from_pretrained(folder)  # then build the optimizer, and
    state = load_checkpoint(folder, optimizer)        # and rewind(run_dir, state["step"]) if it is not the latest
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from run.weight_checks import NotFiniteError, first_not_finite

TEMPORARY = ".unfinished-"  # prefix of folders that are being written or deleted: they are no checkpoints
REPLACED = ".replaced"
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError)  # of wrong JSON
STATE, OPTIMIZER, SUMS = "trainer_state.json", "optimizer.safetensors", "SHA256SUMS"


# --- save


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    model,
    tokenizer,
    optimizer_state: dict[str, Any],
    state: dict[str, Any],
    keep: int = 3,
    score: float | None = None,
    sound: bool = True,
    extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write checkpoints/step-<step>/ and move `latest` to it.

    Args:
        optimizer_state: the optimizer's `state_dict()`.
        state: the trainer's state, of JSON types; floats come back to the last bit.
        keep: this many of the newest stay, as many of the newest sound ones, and the one of the highest score.
        score: how good this one is, for "the best"; None: not measured.
        sound: False if the last update was refused. Its weights are then older than the checkpoint, and may be the
            reason for the refusal, so that a sound checkpoint stays beside it.
        extra: writes more files into the folder it is given, such as adapters.

    Raises OSError (full disk, read-only or vanished folder) and NotFiniteError. All earlier checkpoints are untouched
    then, and the run can go on.
    """
    if name := first_not_finite((name, p.detach()) for name, p in model.named_parameters()):
        raise NotFiniteError(f"the weight {name} holds NaN or infinity")
    folder = Path(run_dir) / "checkpoints"
    folder.mkdir(exist_ok=True)  # not its parents: a run folder that vanished is worth an error
    _sync(folder.parent)
    _tidy(folder)
    unfinished, final = folder / f"{TEMPORARY}{_name(step)}", folder / _name(step)
    try:
        unfinished.mkdir()
        record = {"step": step, "score": score, "sound": sound, "state": state}
        _write_files(unfinished, model, tokenizer, optimizer_state, record, extra)
        _move_into_place(unfinished, final)
        _point_latest_to(final)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _delete_old(folder, final, keep)
    return final


def _write_files(
    folder: Path, model, tokenizer, optimizer_state: dict[str, Any], record: dict[str, Any], extra
) -> None:
    tensors, settings = _split(optimizer_state)
    if name := first_not_finite(tensors.items()):
        raise NotFiniteError(f"the optimizer's tensor {name} holds NaN or infinity")
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if extra is not None:
            extra(folder)
        save_file(tensors, folder / OPTIMIZER)
    except SafetensorError as error:  # safetensors reports a full disk so
        raise OSError(f"{folder}: {error}") from error
    text = json.dumps({**record, "optimizer": settings}, indent=1)
    (folder / STATE).write_text(text + "\n", encoding="utf-8")
    # The trainer's state is the last line, so that a list of sums that was cut off is noticed.
    inside = list(folder.rglob("*"))
    names = [path.relative_to(folder).as_posix() for path in inside if path.is_file()]
    names.sort(key=lambda name: (name == STATE, name))
    (folder / SUMS).write_text("".join(f"{_sha256(folder / name)}  {name}\n" for name in names), encoding="utf-8")
    for path in [*inside, folder / SUMS, folder]:
        _sync(path)


def _move_into_place(unfinished: Path, final: Path) -> None:
    """Rename. A checkpoint of the same step gets another name first, which `find_checkpoint` and `_tidy` know."""
    aside = final.with_name(final.name + REPLACED)
    if final.exists():
        os.rename(final, aside)
    os.rename(unfinished, final)
    _sync(final.parent)
    if aside.exists():
        _delete(aside)


def _point_latest_to(final: Path) -> None:
    beside = final.with_name(TEMPORARY + "latest")
    beside.write_text(final.name + "\n", encoding="utf-8")
    _sync(beside)
    os.replace(beside, final.with_name("latest"))
    _sync(final.parent)


def _delete_old(folder: Path, newest: Path, keep: int) -> None:
    """Keep the `keep` newest checkpoints, the `keep` newest sound ones and the best one.

    Checkpoints with a later step number are left over from before `rewind()` and are deleted. A folder that cannot be
    deleted harms nothing: a warning, not an error.
    """
    records = {path: _record(path) for path in _checkpoints(folder)}
    past = [path for path in records if _step(path) <= _step(newest)]
    sound = [path for path in past if records[path].get("sound", True)]
    scores = {path: score for path, record in records.items() if (score := _score(record)) is not None}
    keep = max(keep, 1)
    kept = {*past[-keep:], *sound[-keep:], max(scores, key=scores.__getitem__, default=newest)}
    for path in records:
        if path not in kept:
            _delete(path)


def rewind(run_dir: str | Path, step: int, keep: int | None = None) -> None:
    """Let `latest` be the checkpoint of `step`, before a run continues from there. Call it before the log is cut, so
    that log and checkpoint agree after a kill at any time. The next save deletes the checkpoints of later steps.

    keep: as for `save_checkpoint`. If there is no later checkpoint, surplus old ones are deleted now: the save that
    should have deleted them may have been killed, and a run at its end has no next save.
    """
    folder = Path(run_dir) / "checkpoints"
    _tidy(folder)
    final = folder / _name(step)
    if not final.is_dir():
        return
    _point_latest_to(final)
    if keep is not None and all(_step(path) <= step for path in _checkpoints(folder)):
        _delete_old(folder, final, keep)


# --- load


def find_checkpoint(where: str | Path, run_dir: str | Path | None = None) -> Path:
    """The folder of a checkpoint: of "latest" in `run_dir`, of the latest in the run folder `where`, or `where` itself.

    Raises FileNotFoundError with one line.
    """
    where = Path(where)
    if where.name == "latest" and not where.is_dir():
        where = where.parent if where.parent.name == "checkpoints" else Path(run_dir or ".")
    if (where / STATE).is_file():
        return where
    folder = where / "checkpoints" if where.name != "checkpoints" else where
    latest = folder / "latest"
    if not latest.is_file():
        whole = _checkpoints(folder)  # the first save was killed before it wrote `latest`; the folder is whole
        if whole:
            return whole[-1]
        raise FileNotFoundError(f"no checkpoint in {where}: expected a checkpoint's folder, or a run's with {latest}")
    name = latest.read_text(encoding="utf-8").strip()
    for candidate in (folder / name, folder / (name + REPLACED)):  # the second: killed between two renames
        if Path(name).name == name and (candidate / STATE).is_file():
            return candidate
    raise FileNotFoundError(
        f"{latest} names {name!r}, which is not a checkpoint; name another: --resume {folder}/step-..."
    )


def load_checkpoint(folder: str | Path, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Verify a checkpoint, restore the optimizer's state, and return the trainer's state with "step" and "score".

    The weights are loaded by `Qwen2ForCausalLM.from_pretrained(folder)`, in the dtype they were saved in.
    Raises FileNotFoundError, or ValueError if a file is not the one that was saved, with one line.
    """
    folder = Path(folder)
    verify_checkpoint(folder)
    state, settings = _read_record(folder)
    if optimizer is not None:
        try:
            optimizer.load_state_dict(_join(load_file(folder / OPTIMIZER), settings))
        except (SafetensorError, *DAMAGED) as error:
            raise ValueError(f"{folder / OPTIMIZER} does not fit this model and optimizer: {error}") from None
    return state


def read_state(folder: str | Path) -> dict[str, Any]:
    """The trainer's state alone, with "step", "score" and the "dtype" of the weights, and without verifying the
    checkpoint. Raises FileNotFoundError or ValueError with one line."""
    state, _ = _read_record(Path(folder))
    try:
        dtype = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("dtype")
    except (ValueError, AttributeError, RecursionError):
        dtype = None  # verify_checkpoint will say it
    return {**state, "dtype": dtype}


def _read_record(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trainer's state, and the optimizer's settings."""
    try:
        record = json.loads((folder / STATE).read_text(encoding="utf-8"))
        step = record["step"]
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise damaged_state(folder)
        return {**record["state"], "step": step, "score": record["score"]}, record["optimizer"]
    except DAMAGED:  # RecursionError is a RuntimeError
        raise damaged_state(folder) from None


def damaged_state(folder: Path) -> ValueError:
    """The error for a trainer_state.json with wrong values."""
    return ValueError(f"{folder / STATE} is not what save_checkpoint writes; resume from another checkpoint")


def weights_checksum(folder: str | Path) -> str:
    """SHA-256 over the names and the SHA-256 of all weight files of a folder."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return hashlib.sha256("".join(f"{_sha256(path)}  {path.name}\n" for path in files).encode()).hexdigest()


def verify_checkpoint(folder: str | Path) -> None:
    """Compare every file with its checksum. Raises FileNotFoundError or ValueError with one line."""
    folder = Path(folder)
    try:
        lines = (folder / SUMS).read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} is not a checkpoint to resume from: it has no {SUMS}") from None
    except UnicodeDecodeError:
        lines = []
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if STATE not in sums:
        raise ValueError(f"{folder / SUMS} is damaged; resume from another checkpoint")
    for name, digest in sums.items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not path.is_file():
            raise FileNotFoundError(f"{path} is missing; resume from another checkpoint")
        if _sha256(path) != digest:
            raise ValueError(f"{path} is not what was saved (its SHA-256 differs); resume from another checkpoint")


# --- small things


def _split(state_dict: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state_dict as (tensors by "<index>.<name>", the rest as JSON types)."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state_dict["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                scalars.setdefault(str(index), {})[name] = value
    return tensors, {"param_groups": state_dict["param_groups"], "scalars": scalars}


def _join(tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_split`. JSON turned tuples such as betas into lists; they become tuples again."""
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in settings["scalars"].items()}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    groups = [
        {key: tuple(value) if isinstance(value, list) and key != "params" else value for key, value in group.items()}
        for group in settings["param_groups"]
    ]
    return {"state": dict(sorted(state.items())), "param_groups": groups}


def _tidy(folder: Path) -> None:
    """Delete or restore the folders of a save that was killed."""
    for path in folder.glob(f"*{REPLACED}"):
        final = path.with_name(path.name.removesuffix(REPLACED))
        if final.exists():
            _delete(path)
        else:
            os.rename(path, final)
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
    (folder / f"{TEMPORARY}latest").unlink(missing_ok=True)


def _delete(path: Path) -> None:
    """Rename, then delete: a checkpoint that is half deleted must not look like one."""
    doomed = path.with_name(TEMPORARY + path.name)
    try:
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        warnings.warn(f"cannot delete the old checkpoint {path}: {error}", stacklevel=2)


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdecimal() and p.is_dir()), key=_step)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _step(path: Path) -> int:
    return int(path.name[5:])


def _record(path: Path) -> dict[str, Any]:
    """The trainer_state.json of a checkpoint; of a damaged one nothing, so that it is neither sound nor the best."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        record = json.loads((path / STATE).read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return record
    return {"sound": False}


def _score(record: dict[str, Any]) -> float | None:
    score = record.get("score")
    return score if isinstance(score, (int, float)) and not math.isnan(score) else None


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk. Windows has no way to ask for the latter."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path, size: int = 2**20) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(size):
            yield block
