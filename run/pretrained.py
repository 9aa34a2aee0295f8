"""From a checkpoint's name to its folder (a path, a name under assets/ or models/, a repo of the Hugging Face Hub), and
from the folder to model and tokenizer.

    folder = locate_pretrained("Qwen2.5-0.5B-Instruct")       # models/Qwen2.5-0.5B-Instruct, or Qwen/... from the Hub
    model, tokenizer = load_pretrained(folder, torch.bfloat16, "cuda")
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from model.qwen2_config import Qwen2Config
from qwen2_llm import Qwen2ForCausalLM
from run.config import Config
from run.device import check_dtype, choose_device, choose_dtype
from tasks.messages import closest, first_line, home_path
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt"]  # never pickled weights, never code
DEFAULT_OWNER = "Qwen"
OWN_FOLDERS = ("models", "assets", "runs", "checkpoints", "output", "outputs")  # no owners of repos
HUB = "https://huggingface.co/"
REPO = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # no path: it does not begin with ".", "/" or "~"


def locate_pretrained(name: str) -> Path:
    """The local folder of a checkpoint. A repo id is fetched, or found in the Hub's cache if there is no network.

    Raises FileNotFoundError with the places that were searched and the way to get the checkpoint. A name that can only
    be a path is never asked of the network.
    """
    return _local_folder(name) or _fetch(name)


def _local_folder(name: str) -> Path | None:
    """The folder of that name on this machine, or None. Raises FileNotFoundError if the name can only be a path."""
    if not name or "\0" in name:
        raise FileNotFoundError(f"--ckpt {name!r} is no name: expected a folder or a repo id like Qwen/Qwen2.5-0.5B")
    path = home_path(name)
    folders = [path, ROOT / "assets" / name, ROOT / "models" / name, Path("models") / name]
    for folder in folders if REPO.fullmatch(name) else folders[:1]:
        if _is_folder(folder):
            return _with_config(folder, name)
    if name.startswith(HUB):
        repo = "/".join(name[len(HUB) :].split("/")[:2])
        raise FileNotFoundError(f"--ckpt {_cut(name)} is an address; expected the repo id: --ckpt {_cut(repo)}")
    if path.is_file():
        raise FileNotFoundError(f"--ckpt {name} is a file; expected the folder that holds it: --ckpt {path.parent}")
    if not REPO.fullmatch(name) or _is_path_of_ones_own(name):
        fetch = f"; to fetch it: --ckpt {name[7:]}" if re.fullmatch(r"models/[\w.-]+", name) else ""
        found = f"{_looked_in(path)}{_neighbours(path)}{fetch}"
        raise FileNotFoundError(f"--ckpt {_cut(name)}: there is no such folder{found}")
    return None


def _repo_id(name: str) -> str:
    return name if "/" in name else f"{DEFAULT_OWNER}/{name}"


def load_pretrained(
    folder: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Qwen2ForCausalLM, Tokenizer]:
    """Model and tokenizer of one folder. Raises ValueError or FileNotFoundError, also if the two do not fit."""
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype, device=device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the embedding has only "
            f"{model.config.vocab_size} rows; either tokenizer.json belongs to another model, or a file declares a "
            "token that the model was not trained with"
        )
    return model, tokenizer


def peek_sizes(name: str) -> Qwen2Config | None:
    """The architecture of a checkpoint, without its weights. None if there is none to read; `locate_pretrained` then
    says why."""
    try:
        if folder := _local_folder(name):
            return Qwen2Config.from_pretrained(folder)
        return Qwen2Config.from_pretrained(Path(hf_hub_download(_repo_id(name), "config.json")).parent)
    except (OSError, ValueError, HfHubHTTPError):
        return None


def load_policy(config: Config, name: str | Path) -> tuple[Qwen2ForCausalLM, Tokenizer]:
    """Model and tokenizer of a checkpoint, on the device and in the dtype of the config.

    Raises ValueError, before a download, if the machine has no such device or does not compute in that dtype.
    """
    device = choose_device(config.device)
    check_dtype(config.dtype, device)
    folder = locate_pretrained(str(name))
    dtype, _ = choose_dtype(config.dtype, device, Qwen2Config.from_pretrained(folder))
    return load_pretrained(folder, dtype, device)


def _fetch(name: str) -> Path:
    """The snapshot of a repo, from the network or the Hub's cache."""
    repo = _repo_id(name)
    try:
        return Path(snapshot_download(repo, allow_patterns=FILES))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = first_line(error)[:150]
        owner = "" if "/" in name else f" ({DEFAULT_OWNER}/ was put in front; write OWNER/{name} for another owner)"
        raise FileNotFoundError(
            f"--ckpt {name}: no folder of that name here, under assets/ or under models/{_neighbours(Path(name))}, and "
            f"{repo} could not be fetched{owner} ({reason}); with a network, run: "
            f"hf download {repo} --local-dir models/{Path(name).name}"
        ) from None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # a name that is too long, or a folder above it that may not be read
        raise FileNotFoundError(f"--ckpt {_cut(str(path))}: {error.strerror}") from None


def _with_config(folder: Path, name: str) -> Path:
    """The folder, or FileNotFoundError if it is not a checkpoint but holds some: a run, or its checkpoints/."""
    if (folder / "config.json").is_file():
        return folder
    for inside in (folder, folder / "checkpoints"):
        found = [path.parent for path in inside.glob("*/config.json")] if inside.is_dir() else []
        if found:
            newest = max(found, key=lambda path: (path / "config.json").stat().st_mtime)
            raise FileNotFoundError(
                f"--ckpt {name} is not a checkpoint, it holds {len(found)} of them; the newest is --ckpt {newest}"
            )
    return folder  # the loaders name the files that are missing


def _is_path_of_ones_own(name: str) -> bool:
    """True for runs/mine and the like, which look like repo ids.

    A folder runs that is here makes runs/mine a path. A folder of checkpoints does not: with Qwen/Qwen2.5-0.5B here,
    Qwen/Qwen2.5-7B may still be on the Hub.
    """
    first, _, rest = name.partition("/")
    above = Path(first)
    return bool(rest) and (first in OWN_FOLDERS or (above.is_dir() and not any(above.glob("*/config.json"))))


def _looked_in(path: Path) -> str:
    """The part of a path that exists."""
    above = next((folder for folder in path.absolute().parents if folder.is_dir()), path.absolute().parent)
    return "" if above == path.absolute().parent else f" ({_cut(str(above))} is the part that exists)"


def _neighbours(path: Path) -> str:
    """A question with the folder of the most similar name, or nothing."""
    places = [path.parent, ROOT / "assets", ROOT / "models", Path("models")]
    names: list[str] = []
    for place in places:
        try:
            names += [entry.name for entry in place.iterdir() if entry.is_dir()]
        except OSError:
            continue
    close = closest(path.name, names, cutoff=0.6)
    return f"; did you mean {close}?" if close else ""


def _cut(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."
