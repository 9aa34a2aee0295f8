"""A decode step recorded once a shape and replayed: what a launch costs is paid once and not once a token.

    recorder = Recorder(step, cuda_capture())
    recorder(shape)                                    # once a token

A CUDA graph replays the same kernels on the same addresses. So the step must read and write tensors that stay where
they are, must not wait for the device, and must not depend on a number of Python's beyond `shape`
(tests/test_decode_graph.py holds the step to that, and replays a recording of it without a GPU).

The first call of a shape runs the step as it is: that warms up what may not happen while recording, and is a step like
any other. The second records and replays. Batches only shrink, so the largest is recorded first, and the later ones
find their memory in the pool that all share; results leave through the decoder's tables, so no replay can overwrite
what another has yet to read. Recordings live as long as the rollout: the cache they point into is given back for the
update.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

Step = Callable[[], None]
Capture = Callable[[Step], Step]  # records a call without running it, and returns what replays it


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
