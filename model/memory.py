"""Memory: how many rows fit, the remedy when it runs out, and how to give it back to the system.

rows = rows_that_fit(model.config, tokens=2048, dtype=model.dtype, device=model.device)
metrics = halve_when_out_of_memory(work, micro_batch_tokens)
"""

from __future__ import annotations

import ctypes
import logging
import platform
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch

from model.qwen2_config import Qwen2Config

logger = logging.getLogger(__name__)
T = TypeVar("T")
_droppable: list[Callable[[], bool]] = []
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def rows_that_fit(config: Qwen2Config, tokens: int, dtype: torch.dtype, device: torch.device, reusable: int = 0) -> int:
    """Number of rows of `tokens` tokens whose keys and values fill half of a GPU's free memory, or a quarter of a
    computer's memory. At least 1.

    reusable: bytes of a GPU that are in use and count as free.
    """
    c = config
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * dtype.itemsize * tokens
    on_gpu = device.type == "cuda"
    memory = (torch.cuda.mem_get_info(device)[0] + reusable) // 2 if on_gpu else host_memory() // 4
    return max(1, memory // row)


def host_memory() -> int:
    """Bytes of the computer's memory."""
    return psutil.virtual_memory().total


def device_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that are free or in use by this process; other processes have the rest."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def drop_first(drop: Callable[[], bool]) -> None:
    """Register a function that frees memory which is kept for speed only. It returns True if there was any."""
    _droppable.append(drop)


def halve_when_out_of_memory(work: Callable[[int], T], size: int) -> T:
    """work(size). If memory runs out, again from the start: first without the memory that is kept for speed, then with
    half the size, down to 1. The result of `work` must not depend on the size."""
    while True:
        try:
            return work(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            dropped = sum(drop() for drop in _droppable)
            if not dropped and size == 1:
                raise
        # Outside the except clause: the error's traceback holds on to tensors.
        if dropped:
            logger.warning("out of memory; again without the recorded decode steps of earlier rollouts")
        else:
            size //= 2
            logger.warning("out of memory; again with pieces of at most %d", size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """torch's own error on a GPU; on a CPU its allocator raises a RuntimeError that only its text tells."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def return_free_memory() -> None:
    """Give memory that was freed back to the system, and from now on keep less of it.

    glibc holds on to freed pieces of up to 32 MiB. Rollout and update ask for pieces of ever other sizes, the holes
    of some do not fit the next, and a process with a 0.5B model grows by 0.2 GiB a step without end. Pieces from
    8 MiB on now come from the system and go back to it (docs/performance.md).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 8 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 256 << 20)  # the end of the heap, where small pieces come and go
        libc.malloc_trim(0)
