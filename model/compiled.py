"""Functions between the matrix products, compiled if a run asks for it (`--compile`).

    @compilable
    def swiglu(gate, up): ...                # as it is written

    with compiled_functions(config.compile):
        trainer.update(episodes)             # inside, if true, by torch.compile

Such a function is several kernels, and each of them reads and writes all its numbers. torch.compile makes one or two
kernels of it. Attention, matrix products and the bookkeeping of gradients stay as they are, so nothing is compiled
again for another layout, and gradients still go in place.

The results differ by rounding. In fp32 the gradient of a step agrees to 1e-5 of its norm
(tests/model/test_compiled.py). In 16 bits a compiled function rounds once, and the plain one after each operation.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
_on = [False]


def compilable(function: Callable[P, R]) -> Callable[P, R]:
    """A function of tensors that is compiled inside `compiled_functions(True)`, once for all sizes."""

    @functools.cache
    def fast() -> Callable[P, R]:
        return torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return fast()(*args, **kwargs) if _on[0] else function(*args, **kwargs)

    return call


@contextlib.contextmanager
def compiled_functions(on: bool) -> Iterator[None]:
    """Inside, every `compilable` function is compiled, or not."""
    before, _on[0] = _on[0], on
    try:
        yield
    finally:
        _on[0] = before
