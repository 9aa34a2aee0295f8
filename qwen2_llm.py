"""Qwen2, from token ids to logits: config, RMSNorm, RoPE, attention, SwiGLU, block, model, load and save.

    model = Qwen2ForCausalLM.from_pretrained("models/Qwen2.5-0.5B-Instruct")
    logits = model(input_ids)                                   # [B, T] -> [B, T, V]

Two departures from the textbook. The model runs on flat token rows [N, D], because every part but attention works a
token at a time; who may look at whom is decided by the `attend` it is handed (attention.py). And logits are not the
natural output: training asks for `hidden_states` and goes through the LM head in chunks (head_logprobs.py).

Parameter names are those of the released checkpoints, so loading is `load_state_dict` and saving gives a folder that
transformers reads. The same lines read Llama 3 (no q/k/v bias, llama3 RoPE scaling) and Qwen3 (norms on q and k).

Shape letters: B batch, T time, N flat tokens, D hidden, H query heads, G key-value heads, K head size, F feed-forward,
V vocabulary. Sources: Qwen2 Technical Report (Yang et al. 2024); RMSNorm (Zhang & Sennrich 2019); RoPE (Su et al.
2021); SwiGLU (Shazeer 2020); grouped-query attention (Ainslie et al. 2023).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import Attend, Layout, PackedAttention
from linear import Embedding, Linear, linear

FAMILIES = {  # model_type -> what the family adds to a plain pre-norm transformer when its config does not say
    "qwen2": {"attention_bias": True, "qk_norm": False, "architecture": "Qwen2ForCausalLM"},
    "llama": {"attention_bias": False, "qk_norm": False, "architecture": "LlamaForCausalLM"},
    "qwen3": {"attention_bias": False, "qk_norm": True, "architecture": "Qwen3ForCausalLM"},
}


# ---------------------------------------------------------------------------------------------------------------------
# Config


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


# ---------------------------------------------------------------------------------------------------------------------
# Layers


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 (Zhang & Sennrich 2019, eq. 4). [..., D] -> [..., D]"""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return (x32 * scale).to(x.dtype) * self.weight


class RotaryEmbedding(nn.Module):
    """Rotation angles of each position (Su et al. 2021, eq. 15): positions [N] -> cos, sin [N, 1, K] in fp32."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        # No buffer: model.to(torch.bfloat16) would round it, and move every rotation with it.
        self.frequencies: dict[torch.device, Tensor] = {}

    def compute_frequencies(self) -> Tensor:
        """[K / 2] radians a token: theta^(-2i / K), stretched for long wavelengths where llama3 scaling asks for it."""
        K, scaling = self.config.head_dim, self.config.rope_scaling
        frequencies = self.config.rope_theta ** -(torch.arange(0, K, 2, dtype=torch.float32) / K)
        if scaling is None:
            return frequencies
        # Llama 3.1: keep short wavelengths, slow long ones down by `factor`, blend in between.
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / scaling["factor"])

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if positions.device not in self.frequencies:
            self.frequencies[positions.device] = self.compute_frequencies().to(positions.device)
        angles = positions[:, None, None].float() * self.frequencies[positions.device]  # [N, 1, K / 2]
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def apply_rope(x_NHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + K/2}) by their angle, in fp32."""
    first, second = x_NHK.chunk(2, dim=-1)
    return (x_NHK * cos + torch.cat([-second, first], dim=-1) * sin).to(x_NHK.dtype)


class Attention(nn.Module):
    """Grouped-query attention: H query heads, G key-value heads. [N, D] -> [N, D]"""

    def __init__(self, config: Qwen2Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        D, HK, GK = (
            config.hidden_size,
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.q_proj = Linear(D, HK, bias=config.attention_bias)
        self.k_proj = Linear(D, GK, bias=config.attention_bias)
        self.v_proj = Linear(D, GK, bias=config.attention_bias)
        self.o_proj = Linear(HK, D, bias=config.attention_bias and config.model_type != "qwen2")
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q_NHK, k_NGK, v_NGK = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_NHK, k_NGK = apply_rope(self.q_norm(q_NHK), cos, sin), apply_rope(self.k_norm(k_NGK), cos, sin)
        o_NHK = attend(self.layer, q_NHK, k_NGK, v_NGK)
        return self.o_proj(o_NHK.flatten(1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6). [N, D] -> [N, F] -> [N, D]"""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A pre-norm transformer block: each half reads the normed residual stream and adds to it. [N, D] -> [N, D]"""

    def __init__(self, config: Qwen2Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---------------------------------------------------------------------------------------------------------------------
# Model


class Qwen2Model(nn.Module):
    """Embedding, blocks, final norm: ids [N] and positions [N] -> hidden states [N, D]."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = RotaryEmbedding(config)
        self.gradient_checkpointing = False  # keep only each block's input, and run the block again in backward

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x_ND = self.embed_tokens(ids)
        cos, sin = self.rope(positions)
        for block in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_ND = checkpoint(block, x_ND, cos, sin, attend, use_reentrant=False)
            else:
                x_ND = block(x_ND, cos, sin, attend)
        return self.norm(x_ND)


class Qwen2ForCausalLM(nn.Module):
    """The language model. `hidden_states` is what training and decoding call; `forward` is for people and parity."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.packed_head: Tensor | None = None  # linear.packed_weights
        self.model = Qwen2Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> nn.Parameter:
        """[V, D] weight of the LM head; the embedding itself where the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    def hidden_states(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Final hidden states, after the last norm: ids [N], positions [N] -> [N, D]."""
        return self.model(ids, positions, attend)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] in the weights' dtype."""
        return linear(hidden, self.head_weight, packed=self.packed_head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of a padded batch: ids [B, T], mask [B, T] (True or 1 where a token is real) -> [B, T, V].

        Padding may stand on either side and hold any id; the logits at padding are 0.
        """
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected [batch, time]")
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        layout = Layout.causal(real.sum(dim=1).tolist())
        hidden = self.hidden_states(input_ids[real], layout.positions(input_ids.device), PackedAttention(layout))
        logits = self.logits(hidden)
        return logits.new_zeros(*input_ids.shape, logits.shape[-1]).index_put((real,), logits)

    # Load and save

    @classmethod
    def from_config(
        cls, config: Qwen2Config, dtype: torch.dtype = torch.float32, device="cpu", seed: int = 0
    ) -> Qwen2ForCausalLM:
        """Fresh weights: normal with deviation 0.8 / sqrt(fan in), the embedding 0.02, norms 1, biases 0.

        At widths of a few hundred, the usual constant 0.02 leaves the blocks nearly silent and learns slowly.
        """
        model = cls(config)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                std = 0.02 if "embed_tokens" in name else 0.8 * parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std, generator=generator)
        return model.to(device=device, dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> Qwen2ForCausalLM:
        """Load a folder of config.json and safetensors (one file, or shards with an index).

        The module is built without storage and each tensor is put in place as it is read, so the weights are never
        held twice. Raises FileNotFoundError or ValueError, naming the file or tensor that is missing or wrong.
        """
        config = Qwen2Config.from_pretrained(folder)
        with torch.device("meta"):
            model = cls(config)
        wanted = dict(model.named_parameters())
        for name, tensor in read_safetensors(folder):
            if (name == "lm_head.weight" and config.tie_word_embeddings) or name.endswith("rotary_emb.inv_freq"):
                continue  # a copy of the tied embedding; a buffer of old releases
            if name not in wanted:
                raise ValueError(
                    f"{folder} holds a tensor {name!r} that {config.model_type} does not have; is config.json its own?"
                )
            expected = tuple(wanted.pop(name).shape)
            if tuple(tensor.shape) != expected:
                raise ValueError(
                    f"{folder}: {name} has shape {tuple(tensor.shape)}, but config.json asks for {expected}"
                )
            if not tensor.is_floating_point() or not tensor.sum(dtype=torch.float32).isfinite():
                raise ValueError(f"{folder}: {name} is not finite or no floating point; the weights are damaged")
            owner, leaf = name.rpartition(".")[::2]
            parameter = nn.Parameter(tensor.to(device=device, dtype=dtype))
            setattr(model.get_submodule(owner), leaf, parameter)
        if wanted:
            raise ValueError(
                f"{folder} lacks {len(wanted)} tensors, the first is {sorted(wanted)[0]!r}; download it again"
            )
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, in the names and the dtype the model has; transformers opens it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        # Beside, then renamed: the weights may be views of the very file that this one replaces.
        save_file(state, folder / "model.safetensors.new", metadata={"format": "pt"})
        (folder / "model.safetensors.new").replace(folder / "model.safetensors")
        (folder / "config.json").write_text(
            json.dumps(self.config.to_dict(self.dtype), indent=2) + "\n", encoding="utf-8"
        )


def read_safetensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of model.safetensors, or of the shards that model.safetensors.index.json names, one at a time."""
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
