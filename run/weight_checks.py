"""Weights that nobody can use: NaN, infinity, or numbers so large that the logits are neither. They are not saved."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor

from parallel import distributed
from qwen2_llm import Qwen2ForCausalLM
from tokenizer import Tokenizer

PROBE = "Use the numbers 3, 5 and 2 to make 13."  # a model's logits for it are checked before the model is saved


class NotFiniteError(ValueError):
    """Weights, optimizer state or logits hold NaN or infinity: no training can continue from there."""


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None: all are finite. The device is asked once."""
    named = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not named:
        return None
    ends = torch.stack([torch.stack(torch.aminmax(tensor)).float() for _, tensor in named])  # NaN passes through
    finite = ends.isfinite().all(1).tolist()
    return next((name for (name, _), good in zip(named, finite) if not good), None)


@torch.no_grad()
def check_logits(model: Qwen2ForCausalLM, tokenizer: Tokenizer) -> None:
    """Raises NotFiniteError if the model's logits for a short text are not finite, as those of finite but huge weights.
    Such a checkpoint could not be trained from, and would take the place of one that can."""
    ids = tokenizer.encode(PROBE) or list(tokenizer.eos_token_ids)  # not a problem of the task, which may draw numbers
    training = model.training
    model.eval()
    finite = model(torch.tensor([ids], device=model.device)).isfinite().all().item()
    model.train(training)
    if not finite:
        raise NotFiniteError("the model's logits are NaN or infinite; try a lower --lr")


def broken_weight(model: Qwen2ForCausalLM) -> str | None:
    """The name of a trained weight that holds NaN or infinity, on whichever rank; None: all are finite."""
    named = ((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad)
    mine = first_not_finite((name, p.to_local() if isinstance(p, DTensor) else p) for name, p in named)
    return next((name for name in distributed.gather_each(mine) if name), None)
