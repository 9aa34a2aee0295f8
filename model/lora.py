"""LoRA from scratch: y = W x + b + alpha / rank * B A dropout(x), W and b frozen (Hu et al. 2021, arXiv 2106.09685).

    add_lora(model, rank=16, alpha=32)                    # freezes the model; only A and B have gradients
    optimizer = MemoryEfficientAdamW(trainable(model))    # its state covers only the adapters
    with adapters_off(model): ...                         # the original model: a reference policy without extra memory
    save_adapters(model, "adapter")                       # PEFT's format; PeftModel.from_pretrained(base, "adapter")
    load_adapters(model, "adapter")                       # reads adapters that PEFT wrote, too
    merge_lora(model)                                     # plain layers again, with W + alpha / rank * B A

A is initialized as in PEFT, and B is 0. Before the first update, the model with adapters equals the original model.

Departure from PEFT: no wrapper around the model. A `LoraLinear` is the `Linear` it replaces, with two more parameters,
so the base's parameters keep the checkpoint's names. Its `state_dict` is that of the merged layer, so
`model.save_pretrained` writes a plain checkpoint that every program can open. A and B have the dtype of the weights.
The optimizer keeps fp32 masters of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.linear import Linear, linear

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
# Options of PEFT adapters that are not plain LoRA, with their values for "off".
UNSUPPORTED = {
    "use_dora": (False,), "use_rslora": (False,), "fan_in_fan_out": (False,), "bias": ("none",), "lora_bias": (False,),
    "rank_pattern": ({},), "alpha_pattern": ({},), "modules_to_save": ([],), "layers_to_transform": ([],),
    "exclude_modules": ([],), "layer_replication": ([],), "target_parameters": ([],),
    "trainable_token_indices": ([], {}), "alora_invocation_tokens": ([],),
}  # fmt: skip


class LoraLinear(Linear):
    """A `Linear` with frozen weights, and the two thin matrices A and B. [N, in] -> [N, out]"""

    def __init__(self, base: Linear, rank: int, alpha: float, dropout: float, generator: torch.Generator):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias  # the same parameters, not copies
        self.rank, self.alpha, self.dropout, self.enabled = rank, alpha, dropout, True
        A = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)  # on the CPU: the same on every device
        self.lora_A = nn.Parameter(A.to(base.weight))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank).to(base.weight))

    @property
    def scale(self) -> float:
        """alpha / rank, the factor of B A."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.enabled:
            return y
        thin = linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return y + self.scale * linear(thin, self.lora_B)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + scale * B A, [out, in]. The sum is in fp32 and is rounded once."""
        delta = self.scale * (self.lora_B.float() @ self.lora_A.float())
        return (self.weight.float() + delta).to(self.weight.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "lora_A"], destination[prefix + "lora_B"]
        destination[prefix + "weight"] = self.merged_weight()


def add_lora(
    model: nn.Module, rank: int, alpha: float = 32.0, dropout: float = 0.0, targets: Sequence[str] = TARGETS,
    seed: int = 0,
) -> nn.Module:  # fmt: skip
    """Freeze `model` and add an adapter to every `Linear` whose last name is in `targets`. Returns the same model.

    Raises ValueError for a rank or dropout out of range, for an unknown target, and for a second call.
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise ValueError(f"LoRA of rank {rank} with dropout {dropout}: expected a rank of 1 or more, dropout below 1")
    if has_lora(model):
        raise ValueError("the model has adapters already; merge_lora(model) first")
    # The head is only read as a weight and never called (head_logprobs.py), so an adapter on it would have no effect.
    layers = {name: m for name, m in model.named_modules() if type(m) is Linear and name != "lm_head"}
    known = sorted({name.rpartition(".")[2] for name in layers})
    if unknown := [target for target in targets if target not in known]:
        raise ValueError(f"LoRA target {unknown[0]!r} is no layer of this model; expected some of {', '.join(known)}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        owner, _, leaf = name.rpartition(".")
        if leaf in targets:
            setattr(model.get_submodule(owner), leaf, LoraLinear(layer, rank, alpha, dropout, generator))
    return model


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def has_lora(model: nn.Module) -> bool:
    return bool(lora_layers(model))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters for the optimizer: the adapters, or all parameters of a model without adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside this context, the model works as before `add_lora`. A model without adapters does not change.

    A backward pass through a result of this context must be inside, too: gradient checkpointing runs the forward pass
    again.
    """
    layers = [layer for layer in lora_layers(model).values() if layer.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the merged model under the checkpoint's names. The model does not change."""
    return dict(model.state_dict())


def merge_lora(model: nn.Module) -> nn.Module:
    """Replace every `LoraLinear` by a plain, trainable layer with the merged weight. Returns the same model."""
    for name, layer in lora_layers(model).items():
        plain = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(layer.merged_weight()), layer.bias
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, plain.train(layer.training))
    return model.requires_grad_(True)


# --- PEFT's format


def save_adapters(model: nn.Module, folder: str | Path, base_model: str | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT does. `base_model`: folder or id of the base.

    Raises ValueError if there are no adapters.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapters to save; add_lora(model, ...) first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def load_adapters(model: nn.Module, folder: str | Path, dropout: float | None = None) -> nn.Module:
    """Read adapters in PEFT's format. They are added to a model without adapters. `dropout`: None takes the file's.

    Raises FileNotFoundError for a missing file, and ValueError for adapters that are not plain LoRA or do not fit the
    model.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}, the adapters' weights")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read ({error}); it may be half-written") from None
    if not has_lora(model):
        rate = config.get("lora_dropout", 0.0) if dropout is None else dropout
        add_lora(model, config["r"], config["lora_alpha"], rate, config["target_modules"])
    wanted = {}
    for name, layer in lora_layers(model).items():
        layer.rank, layer.alpha = config["r"], config["lora_alpha"]
        wanted[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_A
        wanted[f"{PEFT_PREFIX}{name}.lora_B.weight"] = layer.lora_B
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        raise ValueError(f"{folder / WEIGHTS} and the model's adapters differ in {len(odd)} tensors, first {odd[0]!r}")
    for name, parameter in wanted.items():
        if tensors[name].shape != parameter.shape:
            found, expected = tuple(tensors[name].shape), tuple(parameter.shape)
            raise ValueError(f"{folder / WEIGHTS}: {name} has shape {found}, the model's adapter has {expected}")
        parameter.copy_(tensors[name])
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no adapters: there is no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, targets = config["peft_type"], config["target_modules"]
        numbers = {name: config[name] for name in ("r", "lora_alpha")} | {"lora_dropout": config.get("lora_dropout", 0)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{path} is not an adapter's configuration (peft_type, r, lora_alpha, target_modules)"
        ) from None
    if kind != "LORA" or not isinstance(targets, list):
        raise ValueError(f"{path}: peft_type {kind}, target_modules {targets}; expected LORA and a list of names")
    for name, value in numbers.items():
        whole = name == "r"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not abs(value) <= 2**31:
            raise ValueError(f"{path}: {name} is {value!r:.40}, expected a {'whole ' * whole}number")
    for key, off in UNSUPPORTED.items():
        if config.get(key) is not None and config[key] not in off:
            raise ValueError(f"{path}: {key} is {config[key]!r}, and only plain LoRA is supported")
    return config
