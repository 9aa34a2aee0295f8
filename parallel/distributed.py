"""A run on several processes: each rank's share of a step, and the communication between the ranks.

    torchrun --nproc-per-node 2 train.py --config configs/qwen2.5-7b.yaml

Every rank has the whole model (or its shard of it: sharding.py) and runs the same program. Each rank samples and scores
its share of a step's prompts. Then the ranks exchange their episodes, and every rank has all of them. Advantages,
dropped groups, refills, denominators and metrics are computed on every rank from the same list, by the code for a
single process. Each rank computes the gradient of some of the groups. The gradients are summed once per step.

Departure from the usual data parallelism: no wrapper around the model, and no mean over ranks. The weights of the
tokens are computed for the whole step (losses.token_weights), so the sum of the ranks' gradients is the gradient of a
single process. A rank may have no group at all. The groups are distributed again after sampling, so that every rank has
about as many tokens. A group may be sampled on one rank and trained on another.

In a single process every function here returns its input unchanged. Nothing here depends on the model.

There are two kinds of traffic. Gradients are exchanged on their own device, by NCCL (by gloo on a CPU). Small Python
objects are pickled and exchanged by gloo on the CPU. Pickle is safe here: all ranks are processes of one program.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from data_types import Episode
from model.memory import is_out_of_memory
from run.terminal import printable
from tasks.messages import first_line

T = TypeVar("T")
BUCKET = 2**24  # elements of the gradient that are summed at a time: a buffer of 64 MiB of fp32
LAST_WORDS = 5.0  # seconds to wait for the other ranks' error messages, before the silent ranks are named
_store: dist.Store | None = None  # torchrun's store, for short messages between the ranks
_seconds: dict[str, float] = defaultdict(float)  # since `rank_metrics`: "wait" for the slowest rank, "transfer" of data


class RankError(RuntimeError):
    """The ranks cannot continue together. The message is one sentence with the reason."""


# ---------------------------------------------------------------------------------------------------------------------
# The ranks


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes of the run. It is 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, the only one that prints and writes files."""
    return rank() == 0


@contextlib.contextmanager
def process_group(timeout_s: float, device: str = "auto") -> Iterator[None]:
    """Join the processes that torchrun started. Without torchrun, or inside a group, nothing happens.

    Args:
        timeout_s: longest time, in seconds, that a rank waits for the others.
        device: as in the config. A rank takes the GPU with its local number.

    Raises ValueError for more processes than GPUs, and RankError if another rank has died. The RankError names it.
    """
    global _store
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        _take_gpu(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    limit = timedelta(seconds=timeout_s)
    store, number, size = next(dist.rendezvous("env://", timeout=limit))
    # If torchrun starts the ranks again, the store still has the messages of the ranks that died.
    _store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=_store, rank=number, world_size=size, timeout=limit)
    try:
        yield
        gather_each(None)  # leave together: torchrun stops the other ranks after one has ended
    except Exception as error:
        if not _lost_connection(error):
            _store.set(f"end of {number}", f"{type(error).__name__}: {error}")
            raise
        raise RankError(_who_is_gone(error)) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _take_gpu(number: int, processes: int) -> None:
    if processes > torch.cuda.device_count():
        raise ValueError(
            f"torchrun started {processes} processes on a machine with {torch.cuda.device_count()} GPUs: "
            "start at most one process per GPU, or use --device cpu"
        )
    torch.cuda.set_device(number)


# ---------------------------------------------------------------------------------------------------------------------
# The share of this rank


def share(n: int) -> range:
    """The range of 0 to `n` - 1 that is this rank's. The ranges of the ranks differ in length by at most one."""
    return range(n * rank() // world_size(), n * (rank() + 1) // world_size())


def my_groups(episodes: Iterable[Episode]) -> set[int]:
    """Ids of the groups whose gradient this rank computes. All ranks get about as many tokens.

    The largest remaining group goes to the rank with the fewest tokens (longest processing time first, Graham 1969).
    Groups without an advantage come last. The load is then even both if they are computed and if they are skipped.
    """
    tokens: Counter[int] = Counter()
    learns = set()
    for e in episodes:
        tokens[e.group_id] += len(e.response_ids) + (0 if e.group_id in tokens else len(e.prompt_ids))
        if e.advantage:
            learns.add(e.group_id)
    loads, mine = [0] * world_size(), set()
    for group in sorted(tokens, key=lambda g: (g not in learns, -tokens[g], g)):
        least = loads.index(min(loads))
        loads[least] += tokens[group]
        if least == rank() or world_size() == 1:
            mine.add(group)
    return mine


# ---------------------------------------------------------------------------------------------------------------------
# Communication between the ranks


def gather_each(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks, on every rank.

    Raises MemoryError on all ranks if one of them has run out of memory: see `telling_the_others`.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _timed("wait"):
        dist.all_reduce(torch.zeros(1))
    with _timed("transfer"):
        dist.all_gather_object(values, value)
    for number, other in enumerate(values):
        if isinstance(other, _OutOfMemory):
            raise MemoryError(f"rank {number} ran out of memory")
    return values


def gather(items: Sequence[T]) -> list[T]:
    """The items of all ranks in one list, in the order of the ranks."""
    return [item for part in gather_each(list(items)) for item in part]


def on_main(work: Callable[[], T]) -> T | None:
    """Run `work` on rank 0. Returns its result there, and None on the others. Its ValueError or OSError is raised on
    all ranks."""
    result: T | None = None
    own_error: Exception | None = None
    if is_main():
        try:
            result = work()
        except (ValueError, OSError) as caught:
            own_error = caught
    error = gather_each(own_error)[0]
    if error is not None:
        raise error
    return result


def from_main(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result on every rank."""
    return cast(T, gather_each(on_main(work))[0])  # the first value is that of rank 0


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every `.grad` by its sum over the ranks. A missing gradient counts as 0.

    The sum is in fp32, one bucket at a time, and is rounded once. A bf16 sum would lose small gradients.
    """
    if world_size() == 1:
        return
    with _timed("wait"):
        dist.all_reduce(torch.zeros(1))
    pieces = []
    for p in parameters:
        p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format) if p.grad is None else p.grad.contiguous()
        pieces += p.grad.view(-1).split(BUCKET)
    with _timed("transfer"):
        for bucket in _buckets(pieces):
            joint = torch.cat([piece.float() for piece in bucket])
            dist.all_reduce(joint)
            for piece, total in zip(bucket, joint.split([len(piece) for piece in bucket])):
                piece.copy_(total)
        if pieces and pieces[0].is_cuda:
            torch.cuda.synchronize()


def _buckets(pieces: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for piece in pieces:
        if bucket and size + len(piece) > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(piece)
        size += len(piece)
    if bucket:
        yield bucket


class _OutOfMemory:
    """Sent in place of a result that did not fit into memory."""


def telling_the_others(work: Callable[[int], T]) -> Callable[[int], T]:
    """Wrap `work` so that the other ranks hear of a lack of memory. `work` must end with the gathering of its result.

    All ranks then raise an out-of-memory error, and `halve_when_out_of_memory` tries again on all of them.
    """

    @functools.wraps(work)
    def wrapped(size: int) -> T:
        try:
            return work(size)
        except (RuntimeError, MemoryError) as error:
            if world_size() > 1 and is_out_of_memory(error) and not str(error).endswith("ran out of memory"):
                with contextlib.suppress(MemoryError):
                    gather_each(_OutOfMemory())
            raise

    return wrapped


def in_lockstep(work: Callable[[int], T]) -> Callable[[int], T]:
    """Wrap `work`, during which the ranks gather sharded weights. A lack of memory ends the run with a RankError.

    The ranks cannot start again together in the middle of such a pass."""

    @functools.wraps(work)
    def wrapped(size: int) -> T:
        try:
            return work(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RankError(
                f"rank {rank()} ran out of memory; with sharded weights the ranks cannot try again with less: "
                f"set --micro-batch-tokens below {size}, or use more processes"
            ) from error

    return wrapped


# ---------------------------------------------------------------------------------------------------------------------
# Checks and errors


def check_equal_weights(parameters: Iterable[Tensor], step: int) -> None:
    """Compare the weights of all ranks, bit for bit. Raises RankError if a rank's differ from those of rank 0."""
    sums = gather_each([checksum(p) for p in parameters] if world_size() > 1 else [])
    odd = [number for number, other in enumerate(sums) if other != sums[0]]
    if odd:
        raise RankError(
            f"after step {step} the weights of rank {odd[0]} are not those of rank 0 any more: its memory or its "
            "device may be faulty; continue from the last checkpoint with --resume"
        )


@torch.no_grad()
def checksum(x: Tensor) -> tuple[int, int]:
    """Two sums over the bits of a tensor, modulo 2^64. The second depends on the order (Fletcher 1982)."""
    bits = x.detach().contiguous().view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    plain, ordered = 0, 0
    for start in range(0, len(bits), BUCKET):
        piece = bits[start : start + BUCKET].long()
        plain += int(piece.sum())
        ordered += int((piece * torch.arange(start + 1, start + 1 + len(piece), device=x.device)).sum())
    return plain % 2**64, ordered % 2**64


def complain(text: str) -> None:
    """Print one line on standard error. The same line of several ranks is printed once."""
    if _store is None:  # there is no process group yet: print once per machine
        first = os.environ.get("LOCAL_RANK", "0") == "0"
    else:
        try:
            first = _store.add(hashlib.sha256(text.encode()).hexdigest(), 1) == 1
        except dist.DistError:  # the process with the store has ended
            first = True
    if first:
        with contextlib.suppress(OSError, ValueError):  # standard error may be a closed pipe or on a full disk
            print(printable(text), file=sys.stderr, flush=True)


def _lost_connection(error: Exception) -> bool:
    """Whether the error is a broken connection. gloo's errors have no type of their own, but contain its name."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _who_is_gone(error: Exception) -> str:
    """A sentence that names the ranks that ended first.

    A rank that lost its connection writes a message to the store and closes its other connections. The loss then
    reaches every rank. A rank without a message after `LAST_WORDS` seconds was killed, or hangs.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it, but this rank is about to end anyway
    store = _store
    if store is None:  # the process group was not started here
        return f"the connection to the other ranks broke ({first_line(error)})"
    number, others = dist.get_rank(), [i for i in range(dist.get_world_size()) if i != dist.get_rank()]
    try:
        store.set(f"end of {number}", "")
        dist.destroy_process_group()
        deadline = time.monotonic() + LAST_WORDS
        while time.monotonic() < deadline and not all(store.check([f"end of {i}"]) for i in others):
            time.sleep(0.05)
        words = {i: store.get(f"end of {i}").decode() if store.check([f"end of {i}"]) else None for i in others}
    except dist.DistError:
        return f"the connections to the other ranks and to torchrun broke ({first_line(error)})"
    said = [f"rank {i} ended with {first_line(word)}" for i, word in words.items() if word]
    silent = [f"rank {i}" for i, word in words.items() if word is None]
    if silent:
        said.append(f"{' and '.join(silent)} left no message: killed, or it hangs")
    return "; ".join(said) or f"the connection between the ranks broke ({first_line(error)})"


# ---------------------------------------------------------------------------------------------------------------------
# Time


@contextlib.contextmanager
def _timed(what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    _seconds[what] += time.perf_counter() - started


def rank_metrics(**rates: float) -> dict[str, float]:
    """Metrics of a step on several ranks: rates per rank, and a rank's mean seconds of waiting and of exchange."""
    if world_size() == 1:
        return {}
    spent = {what: _seconds[what] for what in ("wait", "transfer")}
    _seconds.clear()
    everyone = gather_each(spent)
    metrics = {f"distributed/{what}_time": sum(s[what] for s in everyone) / len(everyone) for what in spent}
    return {f"{name}_per_rank": rate / world_size() for name, rate in rates.items()} | metrics
