"""The tensors of a checkpoint folder, one at a time: model.safetensors, or the shards that its index names.

for name, tensor in read_safetensors("models/Qwen2.5-0.5B-Instruct"): ...
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor


def read_safetensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of model.safetensors, or of the shards that model.safetensors.index.json names, one at a time.

    A tensor is a view of the mapped file. Raises FileNotFoundError for a missing file, ValueError for a damaged one.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = {single: None}
    elif index.is_file():
        files = _shards(index)
    else:
        raise FileNotFoundError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json; download it again"
        )
    for path, names in files.items():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though {index.name} names it; download it again")
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in names or tensors.keys():
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}); it may be half-downloaded: download it again") from None


def _shards(index: Path) -> dict[Path, list[str]]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(shard)) for name, shard in weight_map.items()]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{index} is not an index of shards (an object with a weight_map); download it again"
        ) from None
    shards: dict[Path, list[str]] = {}
    for name, shard in pairs:
        if Path(shard).name != shard:
            raise ValueError(f"{index} names the shard {shard!r}; expected the name of a file in the same folder")
        shards.setdefault(index.parent / shard, []).append(name)
    return shards
