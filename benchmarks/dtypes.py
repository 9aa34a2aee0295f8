"""One GRPO step in bf16 and in fp32, under each instruction set that this CPU can imitate.

    python benchmarks/dtypes.py                                  # random weights of the shape of SmolLM2-135M
    python benchmarks/dtypes.py --ckpt models/SmolLM2-135M-Instruct --new-tokens 32 --group-size 16

Environment variables limit the instructions: ATEN_CPU_CAPABILITY those of torch's own kernels, ONEDNN_MAX_CPU_ISA those
of oneDNN, MKL_ENABLE_INSTRUCTIONS those of MKL. The clock rate, the caches and the memory stay this machine's. A real
laptop also has another of each, so only the ratio of the two types says something about it.

Each type is a process of its own, and they take turns. The seconds are those of the processor, so other programs on the
machine do not count. `auto` is the type that `--dtype auto` takes there, and `auto / other` its time over that of the
other type. Medians over `--repeats` steps, after `--warmup` that are not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import common
import step
import torch

from model.qwen2_config import Qwen2Config
from run.device import choose_dtype


def _limits(aten: str, onednn: str, mkl: str) -> dict[str, str]:
    return {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}


SETS = {
    "AVX2": _limits("avx2", "AVX2", "AVX2"),
    "AVX2 VNNI": _limits("avx2", "AVX2_VNNI", "AVX2"),
    "AVX-512": _limits("avx512", "AVX512_CORE", "AVX512"),
    "AVX-512 BF16": _limits("avx512", "AVX512_CORE_BF16", "AVX512"),
    "all": {},
}


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Processes that start inside this context see the variables. This process has read its own at the start."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Clocked:
    """A pipe whose timings also hold the processor's seconds since the last message came."""

    def __init__(self, pipe: Connection):
        self.pipe, self.started = pipe, 0.0

    def recv(self) -> object:
        message, self.started = self.pipe.recv(), time.process_time()
        return message

    def send(self, message: object) -> None:
        if isinstance(message, dict):
            message = message | {"cpu_s": time.process_time() - self.started}
        self.pipe.send(message)


def one_type(dtype: str, pipe: Connection, args: argparse.Namespace, folder: Path) -> None:
    step.ours(Clocked(pipe), argparse.Namespace(**{**vars(args), "dtype": dtype}), folder)


def bf16(pipe: Connection, args: argparse.Namespace, folder: Path) -> None:
    one_type("bf16", pipe, args, folder)


def fp32(pipe: Connection, args: argparse.Namespace, folder: Path) -> None:
    one_type("fp32", pipe, args, folder)


def choice(folder: Path) -> tuple[str, str]:
    """The type of `--dtype auto`, and its reason, in a process that starts now."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_choice, (folder,))


def _choice(folder: Path) -> tuple[str, str]:
    dtype, reason = choose_dtype("auto", torch.device("cpu"), Qwen2Config.from_pretrained(folder))
    return next(name for name, known in common.DTYPES.items() if known == dtype), reason


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """Instruction set -> seconds of a step in each type, the type that auto takes, its reason, and the ratio."""
    results = {}
    for name in args.sets:
        with environment(SETS[name]):
            auto, reason = choice(folder)
            found = common.take_turns({"bf16": bf16, "fp32": fp32}, args.warmup + args.repeats, args, folder)
        steps = {side: f["turns"][args.warmup :] for side, f in found.items()}
        medians = {side: statistics.median(t["cpu_s"] for t in turns) for side, turns in steps.items()}
        ratio = medians[auto] / medians["fp32" if auto == "bf16" else "bf16"]
        results[name] = {**medians, "auto": auto, "reason": reason, "auto/other": ratio, "steps": steps}
        print(name, medians, file=sys.stderr)
    return results


def main(argv: list[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.set_defaults(random="135m")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    parser.add_argument("--sets", nargs="+", default=list(SETS) if x86 else ["all"], choices=SETS)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=134, help="of the random model")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    args = parser.parse_args(argv)
    if args.device != "cpu":
        parser.error("expected --device cpu: a GPU's type follows from its compute capability")
    with common.checkpoint(args) as folder:
        results = measure(args, folder)
    print(common.table(
        ("instructions", "bf16 cpu s", "fp32 cpu s", "auto", "auto / other"),
        [(name, row["bf16"], row["fp32"], row["auto"], row["auto/other"]) for name, row in results.items()],
    ))  # fmt: skip
    common.print_json(args, {"sets": results})


if __name__ == "__main__":
    main()
