"""Several processes, one run: which part of a step is this rank's, and what the ranks tell one another.

    torchrun --nproc-per-node 2 train.py --config configs/qwen2.5-7b.yaml

Every rank has the whole model (or its shard of it: sharding.py) and runs the same program. Of a step's prompts a rank
samples and scores its share; then the ranks exchange their episodes, so that each knows all of them: advantages,
dropped groups, refills, denominators and metrics are computed on every rank from the same list, by the code of a single
process. Of the gradient a rank computes the part of some of the groups, and the parts are summed once a step.

Where this departs from the usual data parallelism: no wrapper around the model, and no mean over ranks. The weights of
the tokens are made for the whole step (losses.token_weights), so the parts of the gradient add up to that of a single
process, whatever each rank had to do; and a rank may have nothing to do. Who samples a group does not have to be who
learns from it: groups go to the ranks anew, so that each has about as many tokens.

In a single process every function here gives back what it was given. Nothing here looks at a model.

Two kinds of traffic: gradients, on the device they are on (NCCL, or gloo on a CPU), and small Python objects, always
through gloo on the CPU. They are pickled; the ranks are processes of one program, not strangers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data_types import Episode
from model.memory import is_out_of_memory

T = TypeVar("T")
BUCKET = 2**24  # elements of the gradient that are summed at a time: 64 MiB of fp32 beside it
LAST_WORDS = 5.0  # seconds in which the others may say what became of them, before the silent ones are named
_store: dist.Store | None = None  # torchrun's, where ranks leave a word for one another
_seconds = Counter()  # since `take_seconds`: "wait" for the slowest rank, "transfer" of what is exchanged


class RankError(RuntimeError):
    """The ranks cannot go on together; the message is one sentence that says why."""


# ---------------------------------------------------------------------------------------------------------------------
# Who is there


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes there are; 1 where none was started beside this one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the rank that speaks and writes."""
    return rank() == 0


@contextlib.contextmanager
def process_group(timeout_s: float, device: str = "auto") -> Iterator[None]:
    """Join the processes that torchrun started; without torchrun, or in a group already, nothing happens.

    Args:
        timeout_s: how long a rank waits for the others before it gives up.
        device: as in the config; a rank takes the GPU of its number on the machine.

    Raises ValueError for more processes than GPUs. Where another rank has died, whatever this one was waiting for ends
    as a RankError that names it.
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
    # What ranks that died had written there is still there when torchrun starts them again.
    _store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=_store, rank=number, world_size=size, timeout=limit)
    try:
        yield
        gather_each(None)  # leave together: torchrun ends the others where one has left
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
            "start no more than one for each, or --device cpu"
        )
    torch.cuda.set_device(number)


# ---------------------------------------------------------------------------------------------------------------------
# What is this rank's


def share(n: int) -> range:
    """Which of `n` things this rank does: ranges that differ by one in length at most, in the order of the ranks."""
    return range(n * rank() // world_size(), n * (rank() + 1) // world_size())


def my_groups(episodes: Iterable[Episode]) -> set[int]:
    """Ids of the groups whose gradient this rank computes, about as many tokens as every other's.

    The most expensive group that is left goes to the rank that has least (longest processing time first, Graham 1969).
    Groups without an advantage come after all others, so that ranks are even whether or not they count.
    """
    tokens, learns = Counter(), set()
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
# What the ranks tell one another


def gather_each(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks, on every rank.

    Raises MemoryError on all ranks where one of them has run out of memory: see `telling_the_others`.
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
    """The items of all ranks, one rank's after the other's."""
    return [item for part in gather_each(list(items)) for item in part]


def on_main(work: Callable[[], T]) -> T | None:
    """What `work` gives on rank 0, and None on the others; where it raises, all of them do."""
    result, error = None, None
    if is_main():
        try:
            result = work()
        except (ValueError, OSError) as caught:
            error = caught
    error = gather_each(error)[0]
    if error is not None:
        raise error
    return result


def from_main(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank."""
    return gather_each(on_main(work))[0]


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Let every `.grad` be the sum of the ranks'; a rank without one had nothing to add.

    Summed in fp32 and rounded once, a bucket at a time: bf16 sums would lose what fp32 masters are there to keep.
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
    bucket, size = [], 0
    for piece in pieces:
        if bucket and size + len(piece) > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(piece)
        size += len(piece)
    if bucket:
        yield bucket


class _OutOfMemory:
    """Sent in place of what a rank could not compute."""


def telling_the_others(work: Callable[[int], T]) -> Callable[[int], T]:
    """`work`, whose last deed is to gather what it computed; where memory runs out before, the others are told.

    So all ranks leave with an error that says so, and `halve_when_out_of_memory` tries again on all of them.
    """

    @functools.wraps(work)
    def told(size: int) -> T:
        try:
            return work(size)
        except (RuntimeError, MemoryError) as error:
            if world_size() > 1 and is_out_of_memory(error) and not str(error).endswith("ran out of memory"):
                with contextlib.suppress(MemoryError):
                    gather_each(_OutOfMemory())
            raise

    return told


def in_lockstep(work: Callable[[int], T]) -> Callable[[int], T]:
    """`work`, inside which the ranks gather weights from one another: one that runs out of memory can not make all
    begin again, and ends the run with a RankError."""

    @functools.wraps(work)
    def bound(size: int) -> T:
        try:
            return work(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RankError(
                f"rank {rank()} ran out of memory; with sharded weights the ranks can not try again with less: "
                f"set --micro-batch-tokens below {size}, or use more processes"
            ) from error

    return bound


# ---------------------------------------------------------------------------------------------------------------------
# Are all well


def check_equal_weights(parameters: Iterable[Tensor], step: int) -> None:
    """Raises RankError where a rank's weights are not those of rank 0, bit for bit."""
    sums = gather_each([checksum(p) for p in parameters] if world_size() > 1 else [])
    odd = [number for number, other in enumerate(sums) if other != sums[0]]
    if odd:
        raise RankError(
            f"after step {step} the weights of rank {odd[0]} are not those of rank 0 any more: its memory or its "
            "device is not to be trusted; go on from the last checkpoint with --resume"
        )


@torch.no_grad()
def checksum(x: Tensor) -> tuple[int, int]:
    """Two sums over the bits of a tensor, of which one knows the order (Fletcher 1982), modulo 2^64."""
    bits = x.detach().contiguous().view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    plain, ordered = 0, 0
    for start in range(0, len(bits), BUCKET):
        piece = bits[start : start + BUCKET].long()
        plain += int(piece.sum())
        ordered += int((piece * torch.arange(start + 1, start + 1 + len(piece), device=x.device)).sum())
    return plain % 2**64, ordered % 2**64


def complain(text: str) -> None:
    """One line on standard error, once where several ranks say the same."""
    if _store is None:  # before the ranks have met: one a machine
        first = os.environ.get("LOCAL_RANK", "0") == "0"
    else:
        try:
            first = _store.add(hashlib.sha256(text.encode()).hexdigest(), 1) == 1
        except dist.DistError:  # whoever kept the store has gone first
            first = True
    if first:
        with contextlib.suppress(OSError, ValueError):  # standard error may be a closed pipe or on a full disk
            print(text, file=sys.stderr, flush=True)


def _lost_connection(error: Exception) -> bool:
    """gloo's errors have no type of their own; they name the file they come from."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _who_is_gone(error: Exception) -> str:
    """The sentence that names the ranks which ended first.

    A rank that lost the connection says so and hangs up, so that the news goes round; whoever then says nothing for
    `LAST_WORDS` seconds has been killed, or hangs.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, to which the answer is already on its way
    number, others = dist.get_rank(), [i for i in range(dist.get_world_size()) if i != dist.get_rank()]
    try:
        _store.set(f"end of {number}", "")
        dist.destroy_process_group()
        deadline = time.monotonic() + LAST_WORDS
        while time.monotonic() < deadline and not all(_store.check([f"end of {i}"]) for i in others):
            time.sleep(0.05)
        words = {i: _store.get(f"end of {i}").decode() if _store.check([f"end of {i}"]) else None for i in others}
    except dist.DistError:
        return f"the connection to the other ranks broke, and torchrun with it ({_first_line(error)})"
    said = [f"rank {i} ended with {_first_line(word)}" for i, word in words.items() if word]
    silent = [f"rank {i}" for i, word in words.items() if word is None]
    if silent:
        said.append(f"{' and '.join(silent)} went without a word: killed, or it hangs")
    return "; ".join(said) or f"the connection between the ranks broke ({_first_line(error)})"


def _first_line(text: object) -> str:
    return str(text).strip().split("\n")[0][:300]


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


@contextlib.contextmanager
def _timed(what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    _seconds[what] += time.perf_counter() - started


def rank_metrics(**rates: float) -> dict[str, float]:
    """Of a step with several ranks: rates a rank, and the mean time a rank spent waiting and exchanging, in seconds."""
    if world_size() == 1:
        return {}
    spent = {what: _seconds[what] for what in ("wait", "transfer")}
    _seconds.clear()
    everyone = gather_each(spent)
    metrics = {f"distributed/{what}_time": sum(s[what] for s in everyone) / len(everyone) for what in spent}
    return {f"{name}_per_rank": rate / world_size() for name, rate in rates.items()} | metrics
