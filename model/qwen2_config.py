"""The architecture of a checkpoint, as its config.json gives it: what is read, what is refused, what is written back.

    config = Qwen2Config.from_pretrained("models/Qwen2.5-0.5B-Instruct")

Every value is checked here, so that the layers (qwen2_llm.py) can rely on it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

FAMILIES = {  # model_type -> what the family adds to a plain pre-norm transformer when its config does not say
    "qwen2": {"attention_bias": True, "qk_norm": False, "architecture": "Qwen2ForCausalLM"},
    "llama": {"attention_bias": False, "qk_norm": False, "architecture": "LlamaForCausalLM"},
    "qwen3": {"attention_bias": False, "qk_norm": True, "architecture": "Qwen3ForCausalLM"},
}


@dataclass
class Qwen2Config:
    """The architecture, as `config.json` gives it. Sizes are in elements.

    `raw` keeps the file's other keys, so that saving writes back what was read.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: dict[str, Any] | None = None  # None, or llama3's four numbers
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    qk_norm: bool = False
    model_type: str = "qwen2"
    raw: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Qwen2Config:
        """Read `folder/config.json`. Raises FileNotFoundError, or ValueError with what was found and expected."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: a checkpoint folder holds config.json, *.safetensors and tokenizer.json"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number of a million digits
            raise ValueError(f"{path} is not JSON ({error}): download it again") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path} holds a {type(raw).__name__}, expected an object of settings")
        try:
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Qwen2Config:
        """From the keys of config.json, of old (`rope_theta`) and new (`rope_parameters`) releases."""
        family = raw.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise ValueError(f"model_type is {family!r}; this code reads {', '.join(FAMILIES)}")
        _refuse_unsupported(raw)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"rope_scaling or rope_parameters is {rope!r}, expected an object")
        theta = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
        hidden, heads = _positive_int(raw, "hidden_size"), _positive_int(raw, "num_attention_heads")
        config = cls(
            vocab_size=_positive_int(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive_int(raw, "intermediate_size"),
            num_hidden_layers=_positive_int(raw, "num_hidden_layers", limit=1000),
            num_attention_heads=heads,
            num_key_value_heads=_positive_int(raw, "num_key_value_heads", heads),
            head_dim=_positive_int(raw, "head_dim", max(hidden // heads, 1)),
            rms_norm_eps=_positive_float(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
            rope_theta=_positive_float(theta, "rope_theta"),
            rope_scaling=_rope_scaling(rope),
            max_position_embeddings=_positive_int(raw, "max_position_embeddings", 32768),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", FAMILIES[family]["attention_bias"])),
            qk_norm=FAMILIES[family]["qk_norm"],
            model_type=family,
            raw=dict(raw),
        )
        if heads % config.num_key_value_heads or config.head_dim % 2:
            raise ValueError(
                f"{heads} query heads over {config.num_key_value_heads} key-value heads of size {config.head_dim}: "
                "expected a whole number of query heads a key-value head and an even head size"
            )
        return config

    def to_dict(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The keys of config.json, in the form that both old and new transformers read."""
        rope = {"rope_theta": self.rope_theta, **(self.rope_scaling or {"rope_type": "default"})}
        names = [name for name in self.__dataclass_fields__ if name not in ("raw", "qk_norm", "rope_scaling")]
        known = {
            **{name: getattr(self, name) for name in names},
            "architectures": [FAMILIES[self.model_type]["architecture"]],
            "hidden_act": "silu",
            "rope_parameters": rope,
            "rope_scaling": self.rope_scaling,
        }
        if dtype is not None:  # under both names: transformers believes `dtype` where a file has it
            known["torch_dtype"] = known["dtype"] = str(dtype).removeprefix("torch.")
        return {**self.raw, **known}


def _positive_int(raw: dict, key: str, default: int | None = None, limit: int = 2**31) -> int:
    value = raw.get(key) if raw.get(key) is not None else default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < limit:
        raise ValueError(f"{key} is {value!r}, expected a positive whole number below {limit}")
    return value


def _positive_float(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{key} is {value!r}, expected a positive number")
    return float(value)


def _refuse_unsupported(raw: dict) -> None:
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {raw['hidden_act']!r}; this code computes SwiGLU with silu only")
    layer_types = raw.get("layer_types") or []
    if raw.get("use_sliding_window") or "sliding_attention" in layer_types:
        raise ValueError("sliding-window attention is switched on, and this code has full attention only; "
                         'set "use_sliding_window": false if the texts are shorter than the window')  # fmt: skip
    if raw.get("mlp_bias"):
        raise ValueError("mlp_bias is true; this code has feed-forward layers without bias only")


def _rope_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"RoPE scaling {kind!r} is not supported; this code reads plain RoPE and 'llama3'")
    numbers = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {"rope_type": "llama3"} | {key: _positive_float(rope.get(key), f"rope_scaling.{key}") for key in numbers}
