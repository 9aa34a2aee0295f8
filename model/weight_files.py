"""The tensors of a checkpoint folder, one at a time: model.safetensors, or the shards that its index names.

    for name, tensor in read_safetensors("models/Qwen2.5-0.5B-Instruct"): ...

Folders with other kinds of weights (pickled, GGUF, adapters, quantized) are refused with their kind and the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FLOATS = ("F16", "BF16", "F32", "F64")
# The last part of a tensor's name, in quantized releases only.
QUANTIZED = {
    *("qweight", "qzeros", "scales", "g_idx"),  # GPTQ and AWQ
    *("SCB", "absmax", "quant_map", "nested_absmax", "nested_quant_map"),  # bitsandbytes
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale"),  # fp8
    *("weight_packed", "weight_shape", "weight_zero_point"),  # compressed-tensors
    "biases",  # MLX, beside `scales`
}
FOREIGN = {  # a part of a tensor's name -> the kind of file that it belongs to, and the remedy
    "lora_": "these are the weights of a LoRA adapter: merge it into its base model first",
    "experts": "this is a mixture of experts",
    "score.": "this is a classification or reward model: take the language model that it was made from",
    "v_head": "this model has a value head: take the language model that it was made from",
    "visual": "this model also reads images: take a model for text",
    "vision": "this model also reads images: take a model for text",
    "module.": "the names carry a prefix of the training program: remove it from them",
    "_orig_mod.": "the names carry a prefix of torch.compile: remove it from them",
}


def read_safetensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of model.safetensors, or of the shards that model.safetensors.index.json names, one at a time.

    A tensor is a view of the mapped file. Raises FileNotFoundError for a missing file. Raises ValueError for a damaged
    or quantized one, and for weights of another kind than safetensors.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files: dict[Path, list[str]] = {single: []}
    elif index.is_file():
        files = _shards(index)
    else:
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor {index.name}; {_other_weights(folder)}")
    for path, names in files.items():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though {index.name} names it; download it again")
        try:
            with safe_open(path, framework="pt") as tensors:
                there = list(tensors.keys())
                absent = sorted(set(names).difference(there))
                if absent:
                    raise ValueError(f"{path} lacks the tensor {absent[0]!r}, though {index.name} names it")
                for name in there:
                    yield name, _checked(tensors, name, path)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}); it may be half-downloaded: download it again") from None


def refuse_foreign(folder: str | Path, name: str, model_type: str) -> None:
    """Raise ValueError for a tensor that the model does not have, with the likely reason."""
    reasons = [reason for part, reason in FOREIGN.items() if part in name]
    reason = reasons[0] if reasons else "is config.json its own?"
    raise ValueError(f"{folder} holds a tensor {name!r} that {model_type} does not have; {reason}")


def _checked(tensors: Any, name: str, path: Path) -> Tensor:
    """One tensor, which must hold finite floating-point numbers."""
    kind = tensors.get_slice(name).get_dtype()
    if name.rpartition(".")[2] in QUANTIZED or kind not in FLOATS:
        raise ValueError(
            f"{path}: the weights are quantized ({name!r} has dtype {kind}); this code reads bf16, fp16 and fp32: "
            "take the release that is not quantized"
        )
    tensor = tensors.get_tensor(name)
    if not tensor.sum(dtype=torch.float32).isfinite():
        raise ValueError(f"{path}: {name} is not finite; the weights are damaged")
    return tensor


def _shards(index: Path) -> dict[Path, list[str]]:
    """Path of each shard -> the names of the tensors that the index promises in it."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(shard)) for name, shard in weight_map.items()]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{index} is not an index of shards (an object with a weight_map); download it again"
        ) from None
    shards: dict[Path, list[str]] = {}
    for name, shard in pairs:
        if Path(shard).name != shard or "\0" in shard:
            raise ValueError(f"{index} names the shard {shard!r}; expected the name of a file in the same folder")
        shards.setdefault(index.parent / shard, []).append(name)
    return shards


def _other_weights(folder: Path) -> str:
    """The files of a folder without model.safetensors, and the remedy."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def first(*endings: str) -> str | None:
        return next((name for name in names if name.endswith(endings)), None)

    if "adapter_config.json" in names or first("adapter_model.safetensors", "adapter_model.bin"):
        return f"it holds an adapter{_base_model(folder)}: merge the two (peft: merge_and_unload) and save the result"
    if name := first(".gguf"):
        return f"{name} is in llama.cpp's format, which this code does not read: take the original release"
    if name := first(".safetensors"):
        return f"it has {name}; expected that name, or shards and their index: is a file missing?"
    if name := first(".bin", ".pt", ".pth", ".ckpt", ".bin.index.json"):
        return (
            f"{name} holds pickled weights, which this code never opens: in transformers, load the folder and call "
            "save_pretrained, which writes safetensors"
        )
    if name := first(".h5", ".msgpack", ".onnx", ".npz"):
        return f"{name} is in another format: take a release with safetensors"
    return (
        "it has no weights of any kind: copy them there; a release without safetensors must be converted in "
        "transformers first"
    )


def _base_model(folder: Path) -> str:
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return ""
    return f" of {str(base)[:100]!r}"
