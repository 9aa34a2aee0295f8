"""Several processes for a test: `run_ranks(3, work, argument)` runs `work(argument)` as ranks 0, 1 and 2 of one group.

They are forked from a server that has imported torch and the project once, which takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from parallel import distributed

ROOT = Path(distributed.__file__).resolve().parent.parent
SECONDS = 120  # until a test is given up


def run_ranks(n: int, work: Callable, *args: Any, timeout_s: float = 60.0, device: str = "cpu") -> list[Any]:
    """Results of `work(*args)` in each of `n` processes. An exception is returned, and a process that died is None.

    `work` is a function of a module, `timeout_s` how long its ranks wait for one another.
    """
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the server, which starts with the first process
    context.set_forkserver_preload(["ranks", "grpo", "train", "conftest"])
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # here, as torchrun's is
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / str(rank) for rank in range(n)]
        processes = [
            context.Process(target=_rank, args=(rank, n, store.port, timeout_s, device, results[rank], work, args))
            for rank in range(n)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        return [pickle.loads(file.read_bytes()) if file.is_file() else None for file in results]


def _rank(
    rank: int, n: int, port: int, timeout_s: float, device: str, result: Path, work: Callable, args: tuple
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    try:
        with distributed.process_group(timeout_s, device):
            value = work(*args)
    except Exception as error:
        traceback.print_exc()
        value = error
    result.with_suffix(".new").write_bytes(pickle.dumps(value))
    result.with_suffix(".new").rename(result)


def values_of(results: list[Any]) -> list[Any]:
    """The results, where all processes have one."""
    for rank, value in enumerate(results):
        assert value is not None, f"rank {rank} died"
        if isinstance(value, Exception):
            raise AssertionError(f"rank {rank}: {type(value).__name__}: {value}") from value
    return results
