"""The states of random generators as JSON, for checkpoints.

states = random_states(own=generator)        # Python's and torch's global generators, and those that are named
set_random_states(states, own=generator)
"""

from __future__ import annotations

import random
from typing import Any

import torch


def random_states(**generators: torch.Generator) -> dict[str, Any]:
    """The states of Python's and torch's global generators and of the named ones, as JSON types."""
    states: dict[str, Any] = {"python": random.getstate(), "torch": _hex(torch.get_rng_state())}
    if torch.cuda.is_available():
        states["cuda"] = [_hex(state) for state in torch.cuda.get_rng_state_all()]
    return states | {f"generator.{name}": _hex(generator.get_state()) for name, generator in generators.items()}


def set_random_states(states: dict[str, Any], **generators: torch.Generator) -> None:
    """Restore the states that `random_states` with the same names returned. Raises KeyError, TypeError, ValueError or
    RuntimeError if they are something else."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(_unhex(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_unhex(state) for state in states["cuda"]])
    for name, generator in generators.items():
        generator.set_state(_unhex(states[f"generator.{name}"]))


def _hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _unhex(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
