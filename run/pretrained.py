"""Where a checkpoint's name leads (a folder, a name under assets/ or models/, a repo of the Hugging Face Hub), and what
is loaded from there.

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
from tasks.messages import first_line, home_path
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt"]  # never pickled weights, never code
DEFAULT_OWNER = "Qwen"


def locate_pretrained(name: str) -> Path:
    """The local folder of a checkpoint; a repo id is fetched, or found in the Hub's cache when there is no network.

    Raises FileNotFoundError that says what was looked for, where, and how to get it.
    """
    if folder := _local_folder(name):
        return folder
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(
            f"--ckpt {name}: there is no such folder, and it is not a repo id like Qwen/Qwen2.5-0.5B-Instruct"
        )
    repo = _repo_id(name)
    try:
        return Path(snapshot_download(repo, allow_patterns=FILES))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"--ckpt {name}: no folder of that name here, under assets/ or under models/, and {repo} could not be "
            f"fetched ({first_line(error)[:150]}); with a network, run: "
            f"hf download {repo} --local-dir models/{Path(name).name}"
        ) from None


def _local_folder(name: str) -> Path | None:
    candidates = [home_path(name), ROOT / "assets" / name, ROOT / "models" / name, Path("models") / name]
    return next((folder for folder in candidates if folder.is_dir()), None)


def _repo_id(name: str) -> str:
    return name if "/" in name else f"{DEFAULT_OWNER}/{name}"


def load_pretrained(
    folder: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Qwen2ForCausalLM, Tokenizer]:
    """Model and tokenizer of one folder. Raises ValueError or FileNotFoundError, also where the two do not fit."""
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype, device=device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the embedding only "
            f"{model.config.vocab_size} rows; tokenizer.json belongs to another model"
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
