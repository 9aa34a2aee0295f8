"""The architecture of a checkpoint: `config.json` is read, checked and written back.

    config = Qwen2Config.from_pretrained("models/Qwen2.5-0.5B-Instruct")

Every value is checked here, so the layers (qwen2_llm.py) can rely on it. The same file means the same model as in
transformers. A setting that transformers would compute and this code cannot is refused by name.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Family:
    """What a `model_type` adds to a plain pre-norm transformer, and the values its `config.json` may leave out."""

    architecture: str
    attention_bias: bool  # of q, k and v
    qk_norm: bool
    head_dim: int | None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int


FAMILIES = {
    "qwen2": Family("Qwen2ForCausalLM", True, False, None, 32768),
    "llama": Family("LlamaForCausalLM", False, False, None, 2048),
    "qwen3": Family("Qwen3ForCausalLM", False, True, 128, 32768),
}
MAX_FLOAT = sys.float_info.max  # JSON has whole numbers beyond it, such as 10**400
LLAMA3_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")  # transformers, its old name, MLX
NOT_SAVED = (*QUANTIZATION_KEYS, "auto_map", "rope_scaling")  # they describe the source's files, not the saved ones


@dataclass
class Qwen2Config:
    """The architecture. Sizes are in elements.

    `raw` holds the file's other keys, and saving writes them back.
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
        """Read `folder/config.json`. Raises FileNotFoundError, or ValueError with the found and the expected value."""
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
        name = raw.get("model_type")
        if not isinstance(name, str) or name not in FAMILIES:
            raise ValueError(f"model_type is {name!r}; this code reads {', '.join(FAMILIES)}")
        family = FAMILIES[name]
        hidden, heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
        config = cls(
            vocab_size=_size(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_size(raw, "intermediate_size"),
            num_hidden_layers=_size(raw, "num_hidden_layers", limit=1000),
            num_attention_heads=heads,
            num_key_value_heads=_size(raw, "num_key_value_heads", heads),
            head_dim=_size(raw, "head_dim", family.head_dim or max(hidden // heads, 1)),
            rms_norm_eps=_positive(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
            max_position_embeddings=_size(raw, "max_position_embeddings", family.max_position_embeddings),
            tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
            # transformers does not read the key for qwen2: its q, k and v always have a bias.
            attention_bias=name == "qwen2" or _flag(raw, "attention_bias", family.attention_bias),
            qk_norm=family.qk_norm,
            model_type=name,
            raw=dict(raw),
        )
        config.rope_theta, config.rope_scaling = _rope(raw, config.max_position_embeddings)
        _refuse_unsupported(raw, config)
        return config

    def to_dict(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The keys of config.json, in the form that both old and new transformers read.

        `quantization_config` and `auto_map` of the source are left out: the saved weights are not quantized, and the
        source's Python files are not saved.
        """
        names = [name for name in self.__dataclass_fields__ if name not in ("raw", "qk_norm", "rope_scaling")]
        saved = {key: value for key, value in self.raw.items() if key not in NOT_SAVED}
        saved |= {name: getattr(self, name) for name in names}
        saved |= {"architectures": [FAMILIES[self.model_type].architecture], "hidden_act": "silu"}
        saved["rope_parameters"] = {"rope_theta": self.rope_theta, **(self.rope_scaling or {"rope_type": "default"})}
        if self.rope_scaling is not None:
            saved["rope_scaling"] = self.rope_scaling
        if dtype is not None:  # under both names: transformers prefers `dtype` if a file has it
            saved["torch_dtype"] = saved["dtype"] = str(dtype).removeprefix("torch.")
        return saved


# --- single values


def _size(raw: dict, key: str, default: int | None = None, limit: int = 2**31) -> int:
    value = raw.get(key) if raw.get(key) is not None else default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < limit:
        raise ValueError(f"{key} is {_short(value)}, expected a positive whole number below {limit}")
    return value


def _positive(value: Any, key: str) -> float:
    """A positive number, as it was written: whole numbers stay whole when the config is saved."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_FLOAT:
        raise ValueError(f"{key} is {_short(value)}, expected a positive number")
    return value


def _flag(raw: dict, key: str, default: bool = False) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {_short(value)}, expected true or false")
    return value


def _short(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of more than 256 bits"
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + "..."


# --- RoPE


def _rope(raw: dict[str, Any], max_position_embeddings: int) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and the scaling: None for plain RoPE, or llama3's numbers.

    Releases differ in where they write these values: at the top level, in `rope_scaling`, or in `rope_parameters`.
    transformers itself changed which one wins, so two places that disagree are refused.
    """
    places = {key: _rope_place(raw, key) for key in ("rope_parameters", "rope_scaling")}
    kinds = {place: kind for place, values in places.items() if (kind := _rope_type(place, values)) is not None}
    if len(set(kinds.values())) > 1:
        found = " and ".join(f"{place} says {kind!r}" for place, kind in kinds.items())
        raise ValueError(f"two types of RoPE: {found}; remove the wrong one")
    places["the outer object"] = raw
    theta = _positive(_agreed(places, "rope_theta", 10000.0), "rope_theta")
    if _agreed(places, "partial_rotary_factor", 1) != 1:
        raise ValueError("partial_rotary_factor is not 1; this code rotates whole heads only")
    kind = next(iter(kinds.values()), "default")
    inner = {place: values for place, values in places.items() if values is not raw}
    if kind == "default":
        if _agreed(inner, "factor", 1) != 1:
            raise ValueError("RoPE has a scaling factor but its type is plain; expected a rope_type beside it")
        return theta, None
    scaling = {key: _agreed(inner, key) for key in LLAMA3_NUMBERS}
    scaling[LLAMA3_NUMBERS[3]] = _agreed(places, LLAMA3_NUMBERS[3], max_position_embeddings)
    scaling = {key: _positive(value, f"rope_scaling.{key}") for key, value in scaling.items()}
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(f"rope_scaling: {scaling}: expected low_freq_factor below high_freq_factor")
    return theta, {"rope_type": "llama3", **scaling}


def _rope_place(raw: dict[str, Any], key: str) -> dict[str, Any]:
    values = {} if raw.get(key) is None else raw[key]
    if not isinstance(values, dict):
        raise ValueError(f"{key} is {_short(values)}, expected an object")
    nested = [name for name, value in values.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"{key} gives RoPE by layer type ({_short(nested[0])}); this code has one RoPE for all layers")
    return values


def _rope_type(place: str, values: dict[str, Any]) -> str | None:
    """The type that one place names, or None."""
    named = {key: values[key] for key in ("rope_type", "type") if values.get(key) is not None}
    for kind in named.values():
        if kind not in ("default", "llama3"):
            raise ValueError(f"{place}: RoPE scaling {_short(kind)} is not supported; this code reads plain RoPE "
                             "and 'llama3'")  # fmt: skip
    if len(set(named.values())) > 1:
        raise ValueError(f"{place} names two types of RoPE: {named}; remove the wrong one")
    return next(iter(named.values()), None)


def _agreed(places: dict[str, dict[str, Any]], key: str, default: Any = None) -> Any:
    """The one value that the places give for a key. A place that has null, or no such key, says nothing."""
    found = {place: values[key] for place, values in places.items() if values.get(key) is not None}
    values = list(found.values())
    if any(value != values[0] for value in values):
        listed = ", ".join(f"{_short(value)} in {place}" for place, value in found.items())
        raise ValueError(f"{key} has two values: {listed}; remove the wrong one")
    return values[0] if values else default


# --- settings that change the computation


def _refuse_unsupported(raw: dict[str, Any], config: Qwen2Config) -> None:
    """Raise ValueError for a computation that transformers has and this code has not."""
    for key in QUANTIZATION_KEYS:
        if raw.get(key):
            raise ValueError(
                f"the weights are quantized ({_quantization(key, raw[key])}); this code reads bf16, fp16 and fp32: "
                "take the release that is not quantized"
            )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {_short(raw['hidden_act'])}; this code computes SwiGLU with silu only")
    if raw.get("is_causal", True) is not True:
        raise ValueError(f"is_causal is {_short(raw['is_causal'])}; this code has causal attention only")
    if raw.get("mlp_bias"):
        raise ValueError("mlp_bias is true; this code has feed-forward layers without bias only")
    if raw.get("per_layer_config"):
        raise ValueError("per_layer_config is set; this code has equal layers only")
    _refuse_sliding_windows(raw, config)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups or config.head_dim % 2:
        raise ValueError(
            f"{heads} query heads over {groups} key-value heads of size {config.head_dim}: "
            "expected a whole number of query heads a key-value head and an even head size"
        )


def _quantization(key: str, value: Any) -> str:
    """A few words on how weights are quantized, such as "quantization_config: quant_method awq, bits 4"."""
    known = ("quant_method", "bits", "load_in_4bit", "load_in_8bit", "group_size")
    told = [f"{name} {value[name]}" for name in known if value.get(name)] if isinstance(value, dict) else []
    return f"{key}: {', '.join(told)}"[:100] if told else key


def _refuse_sliding_windows(raw: dict[str, Any], config: Qwen2Config) -> None:
    """A window that no layer uses is accepted, as many Qwen2 releases have one."""
    L, types = config.num_hidden_layers, raw.get("layer_types")
    if types is None and config.model_type != "llama":  # transformers derives the types; llama has no such keys
        window = _flag(raw, "use_sliding_window") and raw.get("sliding_window", 4096) is not None
        first = raw.get("max_window_layers", 28)
        if window and (not isinstance(first, int) or first < L):
            raise ValueError("sliding-window attention is switched on, and this code has full attention only; set "
                             '"use_sliding_window": false if the texts are shorter than the window')  # fmt: skip
    foreign = [kind for kind in types if kind != "full_attention"] if isinstance(types, list) else []
    if foreign:
        what = "sliding-window attention" if foreign[0] == "sliding_attention" else _short(foreign[0])
        raise ValueError(f"layer_types asks for {what}; this code has full attention only")
    if types is not None and (not isinstance(types, list) or len(types) != L):
        raise ValueError(f"layer_types is {_short(types)}, expected a list with one entry for each of {L} layers")
