"""Shared by the benchmarks: a checkpoint to measure, a clock, peak memory, a table, and the last line of JSON.

Importing it puts the repository's root on the path, in front of this folder (which has an optimizer.py of its own).

    parser = arguments(__doc__)
    with checkpoint(parser.parse_args()) as folder: ...
    found = take_turns({"ours": ours, "theirs": theirs}, 3, folder)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tokenizers  # noqa: E402
import torch  # noqa: E402

from model.qwen2_config import Qwen2Config  # noqa: E402
from qwen2_llm import Qwen2ForCausalLM  # noqa: E402
from run.pretrained import locate_pretrained  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

# Speed asks for a model's shape, not for its training: vocabulary, hidden, feed-forward, layers, heads, kv heads.
SHAPES = {
    "tiny": (2048, 64, 128, 2, 4, 2),
    "135m": (49_152, 576, 1536, 30, 9, 3),
    "0.5b": (151_936, 896, 4864, 24, 14, 2),
    "1.5b": (151_936, 1536, 8960, 28, 12, 2),
    "3b": (151_936, 2048, 11_008, 36, 16, 2),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NO_STOP_ID = (-1,)  # stop ids of a run in which every answer has its full length


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def arguments(doc: str) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark. Its description is the script's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="checkpoint folder or name; without it, random weights (--random)")
    parser.add_argument(
        "--random", default="0.5b", choices=SHAPES, help="shape of the random model (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="of the weights (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def shape_config(shape: str) -> Qwen2Config:
    """The architecture of the Qwen2.5 model of that size."""
    V, D, F, layers, heads, kv_heads = SHAPES[shape]
    return Qwen2Config(V, D, F, layers, heads, kv_heads, head_dim=D // heads, tie_word_embeddings=True)


@contextlib.contextmanager
def checkpoint(args: argparse.Namespace) -> Iterator[Path]:
    """The folder to load: `--ckpt`, or a temporary one with random weights and a tokenizer of the whole vocabulary."""
    if args.ckpt:
        yield locate_pretrained(args.ckpt)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = shape_config(args.random)
        write_tokenizer(Path(folder), config.vocab_size)
        Qwen2ForCausalLM.from_config(config, DTYPES[args.dtype], seed=args.seed).save_pretrained(folder)
        yield Path(folder)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A token a byte, and as many more that no text holds, so that sampling searches a whole vocabulary."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = letters + [f"<{i}>" for i in range(len(letters), vocab_size - 1)]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>"])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": vocab_size - 1}))


def endless_tokenizer(folder: Path) -> Tokenizer:
    """The checkpoint's tokenizer, without stop ids: every answer runs to its cap."""
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.eos_token_ids = NO_STOP_ID
    return tokenizer


def random_prompts(n: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (n, length), generator=generator).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Clock and memory


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Wall time of one call, with everything it queued on the device."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def median_seconds(work: Callable[[], object], repeats: int, device: str = "cpu", warmup: int = 1) -> float:
    for _ in range(warmup):
        work()
    return statistics.median(seconds(work, device) for _ in range(repeats))


def peak_gib(device: str = "cpu") -> float:
    """Highest memory so far: of CUDA's allocator, or resident of this process (mapped weight files included).

    VmHWM and not getrusage's ru_maxrss: that one is handed on by the process that started this one.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kib) / 2**20


def read_gb_per_s(device: str = "cpu", repeats: int = 5) -> float:
    """Streaming read bandwidth in 10^9 bytes a second: the best of a sum and a matrix-vector product of one buffer."""
    mib = 4096 if device.startswith("cuda") else 512  # far beyond any cache, and long beside the launch of a kernel
    buffer = torch.ones(mib * 2**18 // 4096, 4096, device=device)
    vector = torch.ones(4096, device=device)
    ways = [lambda: buffer.sum(), lambda: buffer @ vector]
    return max(buffer.nbytes / seconds(way, device) for way in ways for _ in range(repeats)) / 1e9


def gemm_tflops(config: Qwen2Config, device: str, dtype: torch.dtype, repeats: int = 5) -> float:
    """Rate of the feed-forward's products with many rows, 10^12 operations a second (an addition is one, too)."""
    D, F = config.hidden_size, config.intermediate_size
    rows = 65536 if device.startswith("cuda") else 2048
    rates = []
    for wide, narrow in [(D, F), (F, D)]:
        x, w = (torch.randn(n, wide, device=device, dtype=dtype) for n in (rows, narrow))
        y = torch.mm(x, w.T)  # written again and again: asking the system for fresh memory takes as long as the product
        best = min(seconds(lambda x=x, w=w, y=y: torch.mm(x, w.T, out=y), device) for _ in range(repeats))
        rates.append(2 * rows * D * F / best / 1e12)
    return max(rates)


# ---------------------------------------------------------------------------------------------------------------------
# Sides that take turns


def take_turns(sides: dict[str, Callable[..., None]], turns: int, *args: object) -> dict[str, dict]:
    """Run each side in a process of its own, a turn at a time: it has the machine, and a peak of memory, to itself.

    A side is a function of a module, called as side(pipe, *args). It sends "ready" once it has loaded, then for every
    turn receives a message and sends its measurement, and sends a last word when no turn is left.

    Returns name -> {"turns": [its measurements], "last": its last word}. Raises SystemExit where a process ends early.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, {}
    try:
        for name, side in sides.items():
            pipes[name], theirs = context.Pipe()
            processes[name] = context.Process(target=_side, args=(side, theirs, args), daemon=True)
            processes[name].start()
            theirs.close()  # ours alone: its end is then seen when the process dies
            _receive(pipes, name)
        found = {name: {"turns": [], "last": None} for name in sides}
        for _ in range(turns):
            for name in sides:
                pipes[name].send("go")
                found[name]["turns"].append(_receive(pipes, name))
        for name in sides:
            found[name]["last"] = _receive(pipes, name)
        return found
    finally:
        for process in processes.values():
            process.join(timeout=5)
            process.terminate()


def _side(side: Callable[..., None], pipe: Connection, args: tuple[object, ...]) -> None:
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # stdout is for the result
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    side(pipe, *args)


def _receive(pipes: dict[str, Connection], name: str):
    try:
        return pipes[name].recv()
    except EOFError:
        raise SystemExit(f"the process of {name!r} ended early; its error stands above") from None


# ---------------------------------------------------------------------------------------------------------------------
# Output


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns in a terminal: the first to the left, numbers to the right with three digits that matter."""
    cells = [list(header), *([_cell(x) for x in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))) for row in cells
    )


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def hardware() -> dict[str, object]:
    """Hardware and software of a measurement, printed beside every figure."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else ""),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def print_json(args: argparse.Namespace, results: object) -> None:
    """The last line: settings, results and hardware."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    print(json.dumps({"settings": settings, "results": results, "hardware": hardware()}), flush=True)
