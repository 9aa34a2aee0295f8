"""Qwen2, from token ids to logits: RMSNorm, RoPE, attention, SwiGLU, block, model, load and save.

    model = Qwen2ForCausalLM.from_pretrained("models/Qwen2.5-0.5B-Instruct")
    logits = model(input_ids)                                   # [B, T] -> [B, T, V]

Two departures from the textbook. First, the model runs on flat token rows [N, D], because every part but attention
works on each token alone. The argument `attend` decides which tokens attend to which (attention.py). Second, training
calls `hidden_states` and computes the logits in chunks (head_logprobs.py).

Parameter names are those of the released checkpoints, so transformers reads a saved folder.
The same code runs Llama 3 (no q/k/v bias, llama3 RoPE scaling) and Qwen3 (norms on q and k).

Shape letters: B batch, T time, N flat tokens, D hidden, H query heads, G key-value heads, K head size, F feed-forward,
V vocabulary. Sources: Qwen2 Technical Report (Yang et al. 2024); RMSNorm (Zhang & Sennrich 2019); RoPE (Su et al.
2021); SwiGLU (Shazeer 2020); grouped-query attention (Ainslie et al. 2023).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Attend, PackedAttention
from model.compiled import compilable
from model.layout import Layout
from model.linear import Embedding, Linear, linear
from model.qwen2_config import Qwen2Config
from model.weight_files import read_safetensors, refuse_foreign

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# ---------------------------------------------------------------------------------------------------------------------
# Layers


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 (Zhang & Sennrich 2019, eq. 4). [..., D] -> [..., D]"""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda":  # one kernel. It rounds once, `rms_norm` before the weight and after it
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps)


@compilable
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    scale = torch.rsqrt(x32.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (x32 * scale).to(x.dtype) * weight


class RotaryEmbedding(nn.Module):
    """Rotation angles of each position (Su et al. 2021, eq. 15): positions [N] -> cos, sin [N, 1, K] in fp32."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        # Not a buffer: model.to(torch.bfloat16) would round it, and every rotation would change.
        self.frequencies: dict[torch.device, Tensor] = {}

    def compute_frequencies(self) -> Tensor:
        """[K / 2] radians a token: theta^(-2i / K). llama3 scaling lowers the low frequencies."""
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


@compilable
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
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


@compilable
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


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
    """The language model. Training and decoding call `hidden_states`. `forward` is for users and for tests."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.packed_head: Tensor | None = None  # linear.packed_weights
        self.model = Qwen2Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, D] weight of the LM head. If the two are tied, it is the embedding's."""
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

        At widths of a few hundred, the usual constant 0.02 makes the blocks' outputs small, and training is slow.
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

        The module is built without storage and each tensor is put in place as it is read, so the weights are not
        held twice. (Of tied weights, a folder may hold the embedding and an equal head. Both are held until the end.)
        Raises FileNotFoundError or ValueError with the name of the file or tensor that is missing or wrong.

        If config.json ties the LM head to the embedding but the folder has another `lm_head.weight`, the two stay
        apart, as in transformers, and a warning says so.
        """
        config = Qwen2Config.from_pretrained(folder)
        model = _without_storage(cls, config, folder)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if config.tie_word_embeddings:
            shapes[HEAD] = shapes[EMBEDDING]
        ends: dict[str, Tensor] = {}  # the embedding and the head, as the file has them
        for name, tensor in _tensors(folder, config, shapes):
            if name in (EMBEDDING, HEAD):
                ends[name] = tensor
            else:
                model._place(name, tensor.to(device=device, dtype=dtype))
        for name, tensor in model._untied(ends, folder).items():
            model._place(name, tensor.to(device=device, dtype=dtype))
        return model

    def _place(self, name: str, tensor: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(owner), leaf, nn.Parameter(tensor))

    def _untied(self, ends: dict[str, Tensor], folder: str | Path) -> dict[str, Tensor]:
        """Which of the embedding and the head to load. A head that differs gets a module of its own."""
        if not self.config.tie_word_embeddings:
            return ends
        if len(ends) == 1 or _equal(ends[EMBEDDING], ends[HEAD]):
            return {EMBEDDING: ends[min(ends, key=[EMBEDDING, HEAD].index)]}
        warnings.warn(
            f"{folder}: config.json ties the LM head to the embedding, but the weights have another {HEAD}; "
            "both are used, as in transformers",
            RuntimeWarning,
            stacklevel=3,
        )
        self.config = replace(self.config, tie_word_embeddings=False)
        with torch.device("meta"):
            self.lm_head = Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        return ends

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, with the model's names and dtype; transformers opens the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        # Written beside the old file, then renamed: the weights may be views of the file that this one replaces.
        save_file(state, folder / "model.safetensors.new", metadata={"format": "pt"})
        (folder / "model.safetensors.new").replace(folder / "model.safetensors")
        (folder / "config.json").write_text(
            json.dumps(self.config.to_dict(self.dtype), indent=2) + "\n", encoding="utf-8"
        )


def _without_storage(kind: type[Qwen2ForCausalLM], config: Qwen2Config, folder: str | Path) -> Qwen2ForCausalLM:
    try:
        with torch.device("meta"):
            return kind(config)
    except RuntimeError as error:  # a product of two sizes that passes 2^63
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{Path(folder) / 'config.json'}: the sizes are too large ({reason})") from None


def _tensors(
    folder: str | Path, config: Qwen2Config, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """(name in the model, tensor), each checked against `shapes`. Raises ValueError if one is missing."""
    full_names = {name.removeprefix("model."): name for name in shapes}  # a base model is saved without the prefix
    missing = set(shapes)
    for file_name, tensor in read_safetensors(folder):
        name = full_names.get(file_name, file_name)
        if name.endswith("rotary_emb.inv_freq"):
            continue  # a buffer of old releases
        if name not in shapes:
            refuse_foreign(folder, file_name, config.model_type)
        if name not in missing:
            raise ValueError(f"{folder} holds the tensor {name!r} twice")
        if tuple(tensor.shape) != shapes[name]:
            found, expected = tuple(tensor.shape), shapes[name]
            raise ValueError(f"{folder}: {name} has shape {found}, but config.json asks for {expected}")
        missing.remove(name)
        yield name, tensor
    if config.tie_word_embeddings and not {EMBEDDING, HEAD} <= missing:
        missing -= {EMBEDDING, HEAD}  # one of the two is enough
    if missing == {HEAD}:
        raise ValueError(
            f'{folder} lacks {HEAD}: take the release with its LM head, or set "tie_word_embeddings": true in '
            "config.json if the model's head is its embedding"
        )
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} tensors, the first is {min(missing)!r}; download it again")


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.float(), b.float())
