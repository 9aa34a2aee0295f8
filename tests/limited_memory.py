"""`train.py` in a process whose address space is bounded from its second step on: run by test_out_of_memory.py.

    python tests/limited_memory.py MIB FLAGS...     # MiB beyond those before the step; 0: no bound

How much address space torch takes differs from machine to machine, so the limit is counted from the memory in use.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_train import EvenLetters

import train
from grpo import GRPO


def address_space() -> int:
    """Bytes, now."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def bounded(step, mib: int):
    """GRPO.step under the limit, except for the first, which loads and warms up."""

    def bounded_step(trainer, *args):
        before = resource.getrlimit(resource.RLIMIT_AS)
        if trainer.step_count:
            resource.setrlimit(resource.RLIMIT_AS, (address_space() + mib * 2**20, before[1]))
        try:
            return step(trainer, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    return bounded_step


if __name__ == "__main__":
    mib, words = int(sys.argv[1]), sys.argv[2:]
    train.task_from_config = lambda config: EvenLetters(seed=config.seed)
    if mib:
        GRPO.step = bounded(GRPO.step, mib)
    sys.exit(train.main(words))
