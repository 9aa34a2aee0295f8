"""A decode step recorded once for each shape and replayed: launches are paid once, and not once for each token.

    recorder = Recorder(step, cuda_capture())
    recorder(shape)                                    # once for each token
    decoder = shelf.take(model, key)                   # from the last rollout, with its recordings; or None

A CUDA graph replays the same kernels on the same addresses. So the step must read and write tensors that stay where
they are, must not wait for the device, and must not depend on a Python number other than `shape`.
tests/rollout/test_decode_graph.py checks this, and replays a recording of the step without a GPU.

The first call of a shape runs the step as it is. That does what may not happen while recording, such as the first call
of a library, and it is a step like any other. The second call records and replays. Batches only shrink, so the largest
shape is recorded first, and the others find their memory in the pool that all recordings share. Results leave through
the decoder's tables, so no replay overwrites a result that is still needed.

Recording a step takes as long as many replays. The decoder is therefore kept from one rollout to the next, with its KV
cache and its recordings (`Shelf`), while it takes a small part of the device's memory. If memory runs out, it is
dropped first.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import nn

from model.memory import drop_first

Step = Callable[[], None]
Capture = Callable[[Step], Step]  # records a call without running it, and returns a function that replays it
KEEP_SHARE = 1 / 8  # of the device's memory that kept decoders may take: the update needs the rest


class Recorder:
    """Runs `step` on the first call of a shape, records it on the second, replays from then on."""

    def __init__(self, step: Step, capture: Capture):
        self.step, self.capture = step, capture
        self.warm: set[Hashable] = set()
        self.replays: dict[Hashable, Step] = {}

    def __call__(self, shape: Hashable) -> None:
        if shape not in self.warm:
            self.warm.add(shape)
            self.step()
            return
        if shape not in self.replays:
            self.replays[shape] = self.capture(self.step)
        self.replays[shape]()


def cuda_capture() -> Capture:
    """Records CUDA graphs, all in one memory pool."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        return graph.replay

    return capture


class Kept(Protocol):
    """An object with recordings."""

    @property
    def nbytes(self) -> int:
        """Its memory on the device."""
        ...

    def close(self) -> None:
        """Free its memory now. A recorder and its step point to each other, so nothing else frees them at once."""
        ...


class Shelf:
    """Decoders of past rollouts, by model and by everything that their recordings depend on.

    It does not keep a model alive. A model whose decoders were dropped because memory ran out keeps none again.
    """

    def __init__(self) -> None:
        self.kept: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Hashable, Kept]] = weakref.WeakKeyDictionary()
        self.crowded: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def take(self, model: nn.Module, key: Hashable) -> Kept | None:
        """The decoder for `key`, which leaves the shelf while it works."""
        return self.kept.get(model, OrderedDict()).pop(key, None)

    def put(self, model: nn.Module, key: Hashable, decoder: Kept, device_memory: int) -> None:
        """Keep a decoder, and drop those that were used least recently if all together take too much."""
        if model in self.crowded:
            decoder.close()
            return
        mine = self.kept.setdefault(model, OrderedDict())
        mine[key] = decoder
        while mine and sum(one.nbytes for one in mine.values()) > KEEP_SHARE * device_memory:
            mine.popitem(last=False)[1].close()

    def nbytes(self, model: nn.Module) -> int:
        return sum(one.nbytes for one in self.kept.get(model, OrderedDict()).values())

    def drop(self) -> bool:
        """Free all of it. True if there was anything."""
        models = [model for model, decoders in self.kept.items() if decoders]
        self.crowded.update(models)
        for decoders in self.kept.values():
            for decoder in decoders.values():
                decoder.close()
        self.kept.clear()
        return bool(models)


shelf = Shelf()
drop_first(shelf.drop)


def addresses(model: nn.Module) -> Hashable:
    """Equal while a recorded step reads the right weights: an update writes them in place, `model.to` moves them."""
    modules = tuple((type(module), getattr(module, "enabled", True)) for module in model.modules())
    return modules, tuple((p.data_ptr(), p.dtype) for p in model.parameters())
