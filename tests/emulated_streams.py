"""Streams, events, graphs and blocks of memory of the emulated CUDA device, and the order of the work on them.

The host and every stream are a `Timeline`. A timeline knows which events of the others lie in its past: an event that
was waited for, and everything that the timeline of that event knew (a vector clock, Mattern 1989). Two accesses to one
block of memory, at least one of them a write, must be ordered in this way. If they are not, `check` raises `Race`:
a wait is missing, even if the numbers are right today.

Copies on a side stream are also carried out late: when an event is waited for, when the stream computes, or never. So
with `check_races=False` a missing wait shows up as wrong numbers.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from emulated_cuda import EmulatedCuda

Moment = dict["Timeline", int]  # the number of events of each timeline that have happened for certain


class Race(RuntimeError):
    """Two accesses to the same memory without a wait between them."""


class CaptureError(RuntimeError):
    """An operation that CUDA does not allow while a graph is captured."""


class Timeline:
    """The host or a stream: its own events in order, and its knowledge of the others."""

    def __init__(self, name: str):
        self.name, self.known = name, {}
        self.known[self] = 0

    @property
    def now(self) -> int:
        return self.known[self]

    def tick(self) -> None:
        self.known[self] += 1

    def learn(self, moment: Moment) -> None:
        for other, time in moment.items():
            if time > self.known.get(other, -1):
                self.known[other] = time

    def has_seen(self, other: Timeline, time: int) -> bool:
        return self.known.get(other, -1) >= time


Marks = dict["Timeline", tuple[int, str]]  # of each timeline the last access: (its time, its line)
MOST_SPANS = 64  # of one block; more are taken for one, so that accesses to different parts look like one access


class Memory:
    """A block of memory and the accesses that later ones must come after.

    It lives as long as a tensor of the program points into it.
    """

    def __init__(self, device: EmulatedCuda, nbytes: int, storage: torch.UntypedStorage | None, stream: Stream):
        self.device, self.nbytes, self.storage, self.stream = device, nbytes, storage, stream
        self.key = storage._cdata if storage is not None else None
        self.spans: dict[tuple[int, int], tuple[Marks, Marks]] = {}  # first and last byte -> (writes, reads)
        self.recorded: set[Timeline] = set()  # streams named by `Tensor.record_stream`
        self.graph: Graph | None = None  # the graph whose replay writes this block
        self.counted = False

    def check(self, who: Timeline, where: str, span: tuple[int, int], writes: bool) -> None:
        """Note an access to some bytes. Raises Race if an earlier access to them may still be running."""
        for other, (written, read) in list(self.spans.items()):
            if other[1] <= span[0] or span[1] <= other[0]:
                continue
            self._compare(who, where, written, "written")
            if writes:
                self._compare(who, where, read, "read")
                if span[0] <= other[0] and other[1] <= span[1]:
                    del self.spans[other]  # later accesses come after this one
        if len(self.spans) > MOST_SPANS:
            self._join()
            span = next(iter(self.spans))
        self.spans.setdefault(span, ({}, {}))[0 if writes else 1][who] = (who.now, where)

    def _compare(self, who: Timeline, where: str, marks: Marks, done: str) -> None:
        for stream, (time, line) in marks.items():
            if not who.has_seen(stream, time):
                self.device.raced = True
                raise Race(f"{where} on {who.name}: this memory is {done} on {stream.name} at {line}, without a wait")

    def _join(self) -> None:
        joined: tuple[Marks, Marks] = ({}, {})
        for marks in self.spans.values():
            for all_marks, some in zip(joined, marks, strict=True):
                for stream, mark in some.items():
                    all_marks[stream] = max(mark, all_marks.get(stream, mark))
        self.spans = {(0, self.nbytes): joined}

    def still_running(self, host: Timeline) -> list[tuple[Timeline, str]]:
        """Accesses that may go on after the block has been given to another tensor, and are not recorded."""
        return [
            (stream, line)
            for marks in itertools.chain.from_iterable(self.spans.values())
            for stream, (time, line) in marks.items()
            if stream not in self.recorded and not any(known.has_seen(stream, time) for known in (self.stream, host))
        ]

    def __del__(self) -> None:
        self.device.freed(self)


class Region(NamedTuple):
    """The bytes of a block that a tensor covers."""

    memory: Memory
    span: tuple[int, int]

    @classmethod
    def of(cls, memory: Memory, x: torch.Tensor) -> Region:
        if not x.numel():
            return cls(memory, (0, 0))
        first = int(x.storage_offset())
        last = first + sum(int((size - 1) * stride) for size, stride in zip(x.shape, x.stride(), strict=True))
        return cls(memory, (first * x.itemsize, (last + 1) * x.itemsize))


class Stream(Timeline):
    """A CUDA stream. The default stream works at once. Copies on the others wait in `queue`."""

    def __init__(self, device: Any = None, priority: int = 0, *, name: str | None = None):
        super().__init__(name or f"stream {len(active().streams)}")
        self.queue: list[tuple[int, Callable[[], None]]] = []
        active().streams.append(self)

    def flush(self, upto: int | None = None) -> None:
        while self.queue and (upto is None or self.queue[0][0] <= upto):
            self.queue.pop(0)[1]()

    def wait_stream(self, other: Stream) -> None:
        other.flush()
        self.learn(other.known)

    def wait_event(self, event: Event) -> None:
        event.happen()
        self.learn(event.moment)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        active().wait("a stream", self)

    def query(self) -> bool:
        return not self.queue


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
        self.stream: Stream | None = None
        self.moment: Moment = {}

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or active().current
        self.moment = dict(self.stream.known)

    def happen(self) -> None:
        if self.stream is not None:
            self.stream.flush(self.moment[self.stream])

    def wait(self, stream: Stream | None = None) -> None:
        (stream or active().current).wait_event(self)

    def synchronize(self) -> None:
        active().forbid_in_capture("waiting for an event")
        self.happen()
        active().host.learn(self.moment)

    def query(self) -> bool:
        return self.stream is None or active().host.has_seen(self.stream, self.moment[self.stream])

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Pool:
    """Memory that the graphs of one pool share: a replay may overwrite the results of any other graph in it."""

    def __init__(self) -> None:
        self.replayed: Graph | None = None


class Graph:
    """A recorded list of operations on fixed memory. Nothing has happened when the recording ends."""

    def __init__(self, keep_graph: bool = False):
        self.tape: list[tuple[Callable, tuple, dict, list[torch.Tensor], bool]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # storage -> (all of it, its numbers before)
        self.outside: dict[tuple, tuple[weakref.ref[Memory], bool, str]] = {}  # memory of others that is touched
        self.pool: Pool | None = None
        self.finished = False

    def touch(self, region: Region, writes: bool, where: str) -> None:
        if region.memory.graph is self:
            return
        key = (id(region.memory), region.span)
        _, written, first = self.outside.get(key, (None, False, where))
        self.outside[key] = (weakref.ref(region.memory), written or writes, first)

    def keep_numbers(self, tensors: Iterable[torch.Tensor]) -> None:
        """Remember memory that an operation is about to change."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.before:
                with unobserved():
                    whole = torch.empty(0, dtype=tensor.dtype).set_(storage)
                    self.before[storage._cdata] = (whole, whole.clone())

    @property
    def is_overwritten(self) -> bool:
        return self.pool is None or self.pool.replayed is not self

    def undo(self) -> None:
        for whole, numbers in self.before.values():
            with unobserved():
                whole.copy_(numbers)

    def replay(self) -> None:
        device = active()
        device.forbid_in_capture("a replay")
        if not self.finished:
            raise CaptureError("the graph was never recorded")
        device.launch(device.current)
        for (_, span), (reference, writes, where) in self.outside.items():
            memory = reference()
            if memory is None:
                raise CaptureError(f"a replay reads memory that was freed since the recording, used at {where}")
            memory.check(device.current, f"replay of {where}", span, writes)
        if self.pool is not None:
            self.pool.replayed = self
        device.replays += 1
        with unobserved():
            for function, args, kwargs, outputs, in_place in self.tape:
                result = function(*args, **kwargs)
                if not in_place:
                    _overwrite(outputs, result)

    def reset(self) -> None:
        self.tape, self.outside, self.finished = [], {}, False


def _overwrite(outputs: list, result: Any) -> None:
    """Put the numbers of a replayed operation where the recorded operation put its own."""
    tensors = [x for x in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(x, torch.Tensor)]
    for old, new in zip(outputs, tensors, strict=True):
        if new.data_ptr() != old.data_ptr():
            old.copy_(new)


@contextlib.contextmanager
def capture(graph: Graph, pool: Pool | None = None, stream: Stream | None = None, **_: Any) -> Iterator[None]:
    """torch.cuda.graph"""
    device = active()
    device.forbid_in_capture("a second capture")
    device.wait("torch.cuda.graph synchronizes before it records")
    graph.pool = pool or Pool()
    device.recording = graph
    try:
        yield
        graph.finished = True
    finally:
        device.recording = None
        graph.undo()
        device.captured.append(len(graph.tape))


@contextlib.contextmanager
def use_stream(stream: Stream | None) -> Iterator[None]:
    """torch.cuda.stream"""
    device = active()
    before, device.current = device.current, stream or device.default
    try:
        yield
    finally:
        device.current = before


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    """Run operators on host tensors. The device sees none of them."""
    with torch.utils._python_dispatch._disable_current_modes():
        yield


_devices: list[EmulatedCuda] = []


def active() -> EmulatedCuda:
    if not _devices:
        raise RuntimeError("a tensor of the emulated CUDA device is used outside `with EmulatedCuda()`")
    return _devices[-1]
