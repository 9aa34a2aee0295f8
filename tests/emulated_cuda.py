"""A CUDA device for the tests of a machine without a GPU: it computes on the CPU and refuses as CUDA does.

    with EmulatedCuda(capability=(8, 0)) as gpu:
        model.to("cuda"); generate(model, ...); update_policy(...)
    print(gpu.syncs, gpu.launches, gpu.peak)

Its tensors report `cuda:0` and hold numbers, so whole rollouts and updates run, and the results can be compared with
those of the CPU. Checked or imitated:

  * every operator whose tensors are on different devices raises, by CUDA's rules (0-dim host tensors and host indices
    are allowed).
  * everything that waits for the device (item, tolist, nonzero, .cpu(), copies of memory that is not pinned) is counted
    in `syncs` with its line.
  * `torch.cuda.graph` records operators and replays them on the same memory. Synchronization, host copies and host
    numbers raise `CaptureError` during a capture (emulated_streams.py).
  * streams: accesses without a wait between them raise `Race`, and copies on side streams happen as late as possible.
  * attention kernels follow the conditions of their CUDA sources (emulated_kernels.py).
  * memory of the device and pinned memory are counted, and more than `memory` bytes raise torch.OutOfMemoryError.

Not covered: rounding of the real kernels, races inside one stream, temporary memory inside one operator, and speed.

torch's C++ side takes the tensors for host tensors, because a build without CUDA cannot switch devices.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import emulated_kernels as kernels
import torch
from emulated_streams import (
    CaptureError,
    Event,
    Graph,
    Memory,
    Pool,
    Race,
    Region,
    Stream,
    Timeline,
    _devices,
    capture,
    unobserved,
    use_stream,
)
from emulated_tensor import CudaTensor, Moves, is_emulated, tensors_in, to_device, tree_map, unwrap
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent

# Operators that wait for the device, because their result is a host number or a shape that depends on numbers.
# In inference mode composite operators arrive under their own names.
WAITS = {
    "aten._local_scalar_dense.default", "aten.item.default", "aten.is_nonzero.default", "aten.equal.default",
    "aten.nonzero.default", "aten.argwhere.default", "aten.where.default", "aten.masked_select.default",
    "aten.repeat_interleave.Tensor", "aten.repeat_interleave.self_Tensor", "aten._unique2.default",
    "aten.unique_dim.default", "aten.unique_consecutive.default", "aten.bincount.default", "aten.histc.default",
}  # fmt: skip
COPIES = {"aten.copy_.default", "aten._to_copy.default"}
INDEXING = {
    "aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default", "aten._index_put_impl_.default",
    "aten._unsafe_index.Tensor",
}  # fmt: skip
ALL_ON_DEVICE = {"aten._fused_adamw_.default"}  # also 0-dim tensors, here the number of the step
NO_KERNEL = {
    "aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default", "aten.empty_strided.default",
    "aten.new_empty_strided.default",
}  # fmt: skip


class EmulatedCuda(TorchDispatchMode):
    """The device.

    Args:
        capability: compute capability. It decides which kernels exist.
        memory: bytes of the device.
        check_races: False runs on where a wait is missing, with the numbers that the delayed copies leave.

    Counters: `syncs` (reason @ line), `launches`, `kernels` by name, `replays`, `captured` (operators of each recorded
    graph), `allocated` and `peak` bytes, `pinned` and `pinned_reserved` bytes (torch reserves powers of two).
    """

    kind = "cuda"

    def __init__(self, capability: tuple[int, int] = (8, 0), memory: int = 80 * 2**30, check_races: bool = True):
        super().__init__()
        self.capability, self.memory, self.check_races = capability, memory, check_races
        self.syncs: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.launches = self.replays = self.allocated = self.peak = self.pinned = self.pinned_reserved = 0
        self.captured: list[int] = []
        self.faults: list[str] = []  # found where nothing can be raised
        self.raced = False
        self.host = Timeline("the host")
        self.streams: list[Stream] = []
        self.recording: Graph | None = None
        self.blocks: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()  # by storage
        self.pinned_blocks: dict[int, Memory] = {}
        self._free_pinned: Counter[int] = Counter()

    # -----------------------------------------------------------------------------------------------------------------
    # Switching on and off

    def __enter__(self):
        torch._C._ensureCUDADeviceGuardSet()
        self._lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        self._threads = torch.autograd.is_multithreading_enabled()
        torch._C._set_multithreading_enabled(False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        _devices.append(self)
        self.default = self.current = Stream(name="the default stream")
        self._patches = self.patches()
        for patch in self._patches:
            patch.start()
        super().__enter__()
        self._moves = Moves()
        self._moves.__enter__()
        return self

    def patches(self) -> list:
        return [mock.patch.object(torch.cuda, name, fake) for name, fake in _torch_cuda(self).items()]

    def __exit__(self, *error):
        self._moves.__exit__(*error)
        super().__exit__(*error)
        for patch in self._patches:
            patch.stop()
        _devices.remove(self)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch._C._set_only_lift_cpu_tensors(self._lift)
        torch._C._set_multithreading_enabled(self._threads)
        if error[0] is None:
            self._raise_faults()

    # -----------------------------------------------------------------------------------------------------------------
    # Order and memory

    def launch(self, stream: Timeline) -> None:
        """The host starts work on a stream: it comes after everything that the host knows of."""
        stream.learn(self.host.known)
        stream.tick()

    def wait(self, why: str, stream: Stream | None = None) -> None:
        """The host waits for a stream."""
        self.forbid_in_capture(why)
        stream = stream or self.current
        stream.flush()
        self.host.learn(stream.known)
        self.syncs[f"{why} @ {self.where()}"] += 1

    def wait_for_all(self) -> None:
        for stream in self.streams:
            stream.flush()
            self.host.learn(stream.known)
        self.wait("torch.cuda.synchronize")

    def forbid_in_capture(self, what: str) -> None:
        if self.recording is not None:
            raise CaptureError(f"operation not permitted when stream is capturing: {what} at {self.where()}")

    def where(self) -> str:
        """The line of the program that is running: the innermost one that is not the emulation's own."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(str(ROOT)) and "/emulated_" not in name:
                return f"{Path(name).name}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        return "?"

    def access(self, who: Timeline, reads: list[Region], writes: list[Region]) -> None:
        where = self.where()
        self._raise_faults()
        for region, writing in [*((r, False) for r in reads), *((r, True) for r in writes)]:
            graph = region.memory.graph
            if self.recording is not None:
                self.recording.touch(region, writing, where)
            elif graph is not None and graph.is_overwritten and not writing:
                raise Race(f"{where} reads the result of a recorded graph that another replay has overwritten")
            elif self.check_races and region.span[1]:
                region.memory.check(who, where, region.span, writing)

    def block(self, inner: torch.Tensor) -> Memory:
        """The block that a device tensor points into. A new one is counted."""
        self.check_dtype(inner.dtype)
        storage = inner.untyped_storage()
        memory = self.blocks.get(storage._cdata)
        if memory is None:
            memory = Memory(self, -(-storage.nbytes() // 512) * 512, storage, self.current)
            if self.allocated + memory.nbytes > self.memory:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {memory.nbytes} bytes, {self.allocated} of {self.memory} "
                    f"are in use, at {self.where()}"
                )
            memory.graph = self.recording
            memory.counted = True
            self.allocated += memory.nbytes
            self.peak = max(self.peak, self.allocated)
            self.blocks[storage._cdata] = memory
        return memory

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Every dtype lives on CUDA."""

    def freed(self, memory: Memory) -> None:
        """A block goes back to the allocator, which may give it to the next tensor of its stream at once."""
        if not memory.counted or self not in _devices:
            return
        self.allocated -= memory.nbytes
        for stream, line in memory.still_running(self.host):
            self.faults.append(f"memory is freed while {stream.name} uses it at {line}; record_stream is missing")

    def _raise_faults(self) -> None:
        if self.faults and self.check_races and not self.raced:
            raise Race(self.faults.pop())

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a host tensor as pinned memory. Freed blocks of the same size are used again."""
        storage = tensor.untyped_storage()
        size = 1 << max(0, storage.nbytes() - 1).bit_length()
        memory = self.pinned_blocks[storage._cdata] = Memory(self, size, None, self.default)
        weakref.finalize(storage, self._unpin, storage._cdata, storage.nbytes())
        self.pinned += storage.nbytes()
        if self._free_pinned[memory.nbytes]:
            self._free_pinned[memory.nbytes] -= 1
        else:
            self.pinned_reserved += memory.nbytes
        return tensor

    def _unpin(self, key: int, nbytes: int) -> None:
        self.pinned -= nbytes
        self._free_pinned[self.pinned_blocks.pop(key).nbytes] += 1

    def pinned_block(self, tensor: torch.Tensor) -> Memory | None:
        return self.pinned_blocks.get(tensor.untyped_storage()._cdata) if self.pinned_blocks else None

    # -----------------------------------------------------------------------------------------------------------------
    # One operator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        name = str(func)
        flat = tensors_in((args, kwargs))
        on_device = [x for x in flat if isinstance(x, CudaTensor)]
        on_host = [x for x in flat if not isinstance(x, CudaTensor)]
        if not on_device and not is_emulated(kwargs.get("device")):
            return self._run_on_host(func, args, kwargs, flat)
        if on_device and on_host and name not in COPIES:
            args, kwargs, on_host = self._check_devices(name, args, kwargs, on_host)
        if name in INDEXING and any(isinstance(i, CudaTensor) and i.dtype == torch.bool for i in args[1]):
            self.wait("a mask as index")
        if name in WAITS:
            self.wait(name)
        if name == "aten.copy_.default":
            return self._copy(func, args, kwargs)
        call = func
        if name in kernels.KERNELS:
            call = functools.partial(kernels.KERNELS[name], self)
        if is_emulated(kwargs.get("device")):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if self.current is not self.default and self.recording is None:
            self.current.flush()  # work on a side stream comes after the copies that were queued there
        written = [unwrap(x) for x in _written(func, args, kwargs)]
        if self.recording is not None:
            self.recording.keep_numbers(written)
        inner_args, inner_kwargs = unwrap((args, kwargs))
        with unobserved():
            result = call(*inner_args, **inner_kwargs)
        on_gpu = tree_map(to_device, result)  # from here on these tensors keep their blocks alive
        self._account(name, call, inner_args, inner_kwargs, result, written, on_device)
        if written and not isinstance(result, (list, tuple)):  # in place: the very tensor that was given
            return None if result is None else _written(func, args, kwargs)[0]
        return on_gpu

    def _account(self, name, call, args, kwargs, result, written, on_device):
        """Count an operator that has run, order it behind earlier ones, and note it if a graph is recorded."""
        tensors = tensors_in(result)
        given = {x.memory.key for x in on_device}
        # By memory and not by name: in inference mode `to`, `reshape` and the like may copy or not.
        is_view = bool(tensors) and not written and all(x.untyped_storage()._cdata in given for x in tensors)
        if not is_view:
            if name not in NO_KERNEL:
                self.launches += 1
                self.kernels[name.removeprefix("aten.")] += 1
                self.launch(self.current)
                new = [x for x in tensors if x.untyped_storage()._cdata not in given]
                changed = [Region.of(self.block(x), x) for x in (*written, *new)]
                self.access(self.current, [Region.of(x.memory, x.host) for x in on_device], changed)
            if self.recording is not None:
                self.recording.tape.append((call, args, kwargs, tensors, bool(written)))

    def _run_on_host(self, func, args, kwargs, flat):
        if kwargs.get("pin_memory"):
            return self.pin(func(*args, **{**kwargs, "pin_memory": False}))
        result = func(*args, **kwargs)
        if self.pinned_blocks:
            reads, writes = (self._pinned_regions(x) for x in (flat, _written(func, args, kwargs)))
            results = tensors_in(result)
            is_view = results and not writes and len(self._pinned_regions(results)) == len(results)
            if (reads or writes) and not is_view:
                self.host.tick()
                self.access(self.host, reads, writes)
        return result

    def _pinned_regions(self, tensors: list[torch.Tensor]) -> list[Region]:
        found = ((self.pinned_block(x), x) for x in tensors)
        return [Region.of(block, x) for block, x in found if block is not None]

    def _check_devices(self, name, args, kwargs, on_host):
        """CUDA's rules for tensors of different devices. Raises RuntimeError."""
        in_backward = torch._C._current_graph_task_id() != -1
        odd = [x for x in on_host if x.dim() > 0 or name in ALL_ON_DEVICE]
        if in_backward and odd and not any(bool(x.any()) for x in odd):
            # A gradient that nobody sent: autograd made zeros, on the device that it takes the tensor for.
            args, kwargs = tree_map(lambda x: to_device(x) if any(x is o for o in odd) else x, (args, kwargs))
            return args, kwargs, []
        if name in INDEXING:
            if not isinstance(args[0], CudaTensor):
                raise RuntimeError(
                    f"indices should be on the same device as the indexed tensor (cpu): {name} at {self.where()}"
                )
            if any(x is o for o in odd for x in args[1] if x is not None):
                self.wait("a host index is copied")
                odd = [o for o in odd if not any(x is o for x in args[1])]
        if odd:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {self.kind}:0 and "
                f"cpu! {name} at {self.where()}"
            )
        return args, kwargs, on_host

    def _copy(self, func, args, kwargs):
        target, source = args[:2]
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        blocks = [x.memory if isinstance(x, CudaTensor) else self.pinned_block(x) for x in (target, source)]
        inner_target, inner_source = unwrap((target, source))
        across = isinstance(target, CudaTensor) != isinstance(source, CudaTensor)
        waits = across and not (non_blocking and all(blocks)) and min(target.dim(), source.dim()) + source.dim() > 0
        if across and not all(blocks):
            self.forbid_in_capture("a copy from or to memory that is not pinned")
        self.launches += 1
        self.launch(self.current)
        regions = [Region.of(b, unwrap(x)) if b else None for b, x in zip(blocks, (target, source), strict=True)]
        self.access(self.current, [r for r in regions[1:] if r], [r for r in regions[:1] if r])
        if self.recording is not None:
            self.recording.keep_numbers([inner_target])
            self.recording.tape.append((func, (inner_target, inner_source), {}, [inner_target], True))

        def carry_out() -> None:
            with unobserved():
                inner_target.copy_(inner_source)

        if self.current is not self.default and not waits and self.recording is None:
            self.current.queue.append((self.current.now, carry_out))
            return target
        carry_out()
        if waits:
            self.wait("a copy that waits")
        return target


class EmulatedMps(EmulatedCuda):
    """The GPU of a Mac, as far as it differs: `mps:0`, without fp64."""

    kind = "mps"
    macos = (14, 0)

    def patches(self) -> list:
        answers = {"is_available": lambda: True, "is_macos_or_newer": lambda *version: version <= self.macos}
        return [mock.patch.object(torch.backends.mps, name, fake) for name, fake in answers.items()]

    def check_dtype(self, dtype: torch.dtype) -> None:
        if dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please use "
                f"float32 instead. At {self.where()}"
            )


def _written(func, args, kwargs) -> list[torch.Tensor]:
    """The tensors that an operator changes, by its schema."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors_in(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


def _torch_cuda(gpu: EmulatedCuda) -> dict[str, Any]:
    """Replacements for the functions of torch.cuda."""
    properties = types.SimpleNamespace(
        name="an emulated card", major=gpu.capability[0], minor=gpu.capability[1], total_memory=gpu.memory,
        multi_processor_count=80,
    )  # fmt: skip
    return {
        "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "set_device": lambda *_: None, "init": lambda: None, "_lazy_init": lambda: None,
        "get_device_capability": lambda *_: gpu.capability, "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "is_bf16_supported": lambda *_, **__: gpu.capability >= (8, 0),
        "mem_get_info": lambda *_: (gpu.memory - gpu.allocated, gpu.memory),
        "memory_allocated": lambda *_: gpu.allocated, "max_memory_allocated": lambda *_: gpu.peak,
        "memory_reserved": lambda *_: gpu.allocated, "max_memory_reserved": lambda *_: gpu.peak,
        "reset_peak_memory_stats": lambda *_: setattr(gpu, "peak", gpu.allocated), "empty_cache": lambda: None,
        "synchronize": lambda *_: gpu.wait_for_all(), "is_current_stream_capturing": lambda: gpu.recording is not None,
        "current_stream": lambda *_: gpu.current, "default_stream": lambda *_: gpu.default, "stream": use_stream,
        "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": capture, "graph_pool_handle": Pool,
        "get_rng_state_all": lambda: [torch.get_rng_state()], "set_rng_state_all": lambda states: None,
        "manual_seed_all": lambda seed: None,
    }  # fmt: skip
