"""Data that moves between the processes of a step, in several encodings: seconds and bytes of each, measured.

    python benchmarks/transfer.py                            # episodes of 256 answers of 1000 tokens, weights of 135 M
    python benchmarks/transfer.py --answers 2048 --weights 500

Episodes are ids and log-probabilities: as Python lists pickled (as distributed.gather does), as tensors, as JSON.
Weights go to a rollout engine or a checkpoint: safetensors, torch.save, pickle, shared memory, a pipe. Gradients are
summed over processes: in bf16 or in fp32, and how wrong the sum then is.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import common
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_types import Episode


def episodes(answers: int, tokens: int) -> list[Episode]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(answers):
        ids = torch.randint(150_000, (tokens,), generator=generator).tolist()
        logprobs = (-torch.rand(tokens, generator=generator)).tolist()
        made.append(Episode(i // 8, ids[:256], ids, logprobs, "abcd" * tokens, "stop", 1.0))
    return made


def as_tensors(made: list[Episode]) -> dict[str, Tensor]:
    return {
        "ids": torch.tensor([i for e in made for i in e.response_ids], dtype=torch.int32),
        "logprobs": torch.tensor([x for e in made for x in e.logprobs], dtype=torch.float32),
        "lengths": torch.tensor([len(e.response_ids) for e in made]),
        "rewards": torch.tensor([e.reward for e in made]),
    }


def from_tensors(tensors: dict[str, Tensor]) -> list[tuple]:
    lengths = tensors["lengths"].tolist()
    parts = (tensors[name].split(lengths) for name in ("ids", "logprobs"))
    return [(ids.tolist(), logprobs.tolist()) for ids, logprobs in zip(*parts)]


def torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


Way = tuple[Callable[[object], object], Callable[[object], object]]
EPISODE_WAYS: dict[str, Way] = {
    "pickle, lists": (pickle.dumps, pickle.loads),
    "pickle, tensors made of them": (lambda e: pickle.dumps(as_tensors(e)), lambda b: from_tensors(pickle.loads(b))),
    "JSON": (lambda e: json.dumps([vars(one) for one in e]).encode(), json.loads),
}


def weight_ways(folder: Path) -> dict[str, Way]:
    def safetensors(state):
        save_file(state, folder / "w.safetensors")
        return folder / "w.safetensors"

    def torch_file(state):
        torch.save(state, folder / "w.pt")
        return folder / "w.pt"

    return {
        "safetensors file, mapped, and read through": (safetensors, lambda path: touch(load_file(path))),
        "torch.save file, torch.load": (torch_file, lambda path: touch(torch.load(path, weights_only=True))),
        "torch.save file, torch.load mapped": (
            torch_file,
            lambda p: touch(torch.load(p, weights_only=True, mmap=True)),
        ),
        "pickle of tensors": (pickle.dumps, lambda b: touch(pickle.loads(b))),
        "through a pipe, pickled": (lambda state: state, through_a_pipe),
        "shared memory (copy in, read through)": (shared, touch),
    }


def touch(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read every byte, as a copy to a device would."""
    for tensor in state.values():
        tensor.view(torch.int16).sum(dtype=torch.int64)
    return state


def shared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty_like(x).share_memory_().copy_(x) for name, x in state.items()}


def through_a_pipe(state: dict[str, Tensor]) -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_receive, args=(there,))
    process.start()
    here.send_bytes(pickle.dumps(state))
    here.recv()
    process.join()


def _receive(pipe) -> None:
    pickle.loads(pipe.recv_bytes())
    pipe.send(True)


def measure(value: object, ways: dict[str, Way], repeats: int) -> list[dict]:
    rows = []
    for name, (write, read) in ways.items():
        written = write(value)
        size = written.stat().st_size if isinstance(written, Path) else None
        size = len(written) if isinstance(written, bytes) else size
        rows.append({
            "way": name, "MB": size / 1e6 if size else float("nan"),
            "write s": common.median_seconds(lambda write=write: write(value), repeats),
            "read s": common.median_seconds(lambda read=read, written=written: read(written), repeats),
        })  # fmt: skip
    return rows


def summed_wrongly(ranks: int, dtype: torch.dtype) -> float:
    """Relative error of a sum over so many processes' bf16 gradients, one added after the other in `dtype` as around a
    ring, beside the exact sum rounded once."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(ranks, 2**18, generator=generator).bfloat16()
    total = torch.zeros(2**18, dtype=dtype)
    for part in parts:
        total = total + part.to(dtype)
    exact = parts.double().sum(0)
    return ((total.bfloat16().double() - exact).norm() / exact.norm()).item()


def main(argv: list[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--answers", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1000, help="of an answer (default: %(default)s)")
    parser.add_argument("--weights", type=float, default=135, help="millions of bf16 weights (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    layers = {f"layer.{i}": torch.randn(int(args.weights * 1e6 / 30)).bfloat16() for i in range(30)}
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "episodes": measure(episodes(args.answers, args.tokens), EPISODE_WAYS, args.repeats),
            "weights": measure(layers, weight_ways(Path(folder)), args.repeats),
        }
    results["gradients"] = [
        {
            "processes": n,
            **{str(d).removeprefix("torch."): summed_wrongly(n, d) for d in (torch.bfloat16, torch.float32)},
        }
        for n in (2, 8, 64)
    ]
    for title, rows in results.items():
        print(title)
        print(common.table(list(rows[0]), [list(row.values()) for row in rows]), "\n")
    common.print_json(args, results)


if __name__ == "__main__":
    main()
