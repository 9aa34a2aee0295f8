"""One GRPO step on paper, over any number of processes: where its time goes, and where more of them stop helping.

    python benchmarks/simulate.py                           # Qwen2.5-7B on 1 to 128 H100s, and engines of their own
    python benchmarks/simulate.py --check measured.json     # against the last lines of benchmarks/scaling.py

A step is rollout -> exchange -> update -> sum -> optimizer, one after the other, as in grpo.py. Each part takes the
larger of bytes / bandwidth and operations / rate (benchmarks/budget.py counts them), and decoding an overhead for every
token besides, in which a processor launches what the accelerator executes. Decoding goes on until the longest answer
ends. Rows that have ended cost nothing. Nothing else is modelled: no contention, no variance between devices.

The machines are data sheets times a share that one reaches: assumptions, not measurements. The check fits a machine to
one process and asks whether several take as long as the simulator says.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import budget
import common

from model.qwen2_config import Qwen2Config
from run.pretrained import locate_pretrained

BYTES_OF_A_TOKEN = 14  # of an episode, pickled: its id and its log-probability (benchmarks/transfer.py)


@dataclass(frozen=True)
class Machine:
    """Rates that are reached, of one process, in 10^9 bytes and 10^12 operations a second.

    link: between processes of a node. net: between nodes, the share of each process. host: main memory of a node,
    which its processes share for the optimizer's state.
    """

    tflops: float
    gb_per_s: float
    overhead_us: float  # of a token that is decoded, for each layer
    per_node: int
    link_gb_per_s: float
    net_gb_per_s: float
    latency_us: float
    host_gb_per_s: float
    object_gb_per_s: float = 0.2  # pickling and unpickling
    weight_bytes: int = 2


H100 = Machine(
    tflops=400,  # 989 in bf16 without sparsity
    gb_per_s=2400,  # 3350
    overhead_us=40,  # CUDA graphs would make it 10
    per_node=8,
    link_gb_per_s=300,  # NVLink: 450 in each direction
    net_gb_per_s=40,  # 400 Gbit/s for each GPU
    latency_us=20,
    host_gb_per_s=300,  # of two sockets with eight channels of DDR5: 600
)


@dataclass(frozen=True)
class Work:
    """A step's: prompts of all processes together. Answers have `mean` tokens, the longest of them `longest`."""

    config: Qwen2Config
    prompts: float
    group: int
    prompt_tokens: int
    mean: float
    longest: float
    micro_batch_tokens: int = 16384

    @property
    def parameters(self) -> int:
        sizes = budget.matrices(self.config)
        return sum(sizes.values()) + (0 if self.config.tie_word_embeddings else sizes["head"])

    def tokens(self, prompts: float) -> float:
        return prompts * (self.prompt_tokens + self.group * self.mean)


def rollout_s(work: Work, m: Machine, ranks: int) -> float:
    """Prefill, and then as many steps as the longest answer has tokens, with the rows that run on average."""
    prompts = work.prompts / ranks
    scale = m.weight_bytes / 2  # budget counts bf16
    body = sum(size for name, size in budget.matrices(work.config).items() if name != "head")
    prefill = 2 * prompts * work.prompt_tokens * body / (m.tflops * 1e12)
    rows = work.group * work.mean / work.longest
    parts = budget.decode_step(work.config, prompts, rows, work.prompt_tokens, work.mean / 2)
    one = sum(replace_bytes(part, scale).floor_s(m.gb_per_s, m.tflops) for part in parts)
    return prefill + work.longest * (one + m.overhead_us * 1e-6 * work.config.num_hidden_layers)


def replace_bytes(part: budget.Part, scale: float) -> budget.Part:
    return part._replace(bytes=part.bytes * scale)


def update_s(work: Work, m: Machine, ranks: int) -> float:
    """Forward and backward of a process's groups."""
    prompts = work.prompts / ranks
    pieces = max(1, round(work.tokens(prompts) / work.micro_batch_tokens))
    parts = budget.update(work.config, prompts, work.group, work.prompt_tokens, work.mean, pieces)
    return sum(p.floor_s(m.gb_per_s, m.tflops) for p in parts if p.name != "optimizer")


def optimizer_s(work: Work, m: Machine, ranks: int, sharded: bool) -> float:
    """Without slices every process of a node updates all parameters, in the same memory."""
    beside = min(ranks, m.per_node)
    mine = work.parameters / (ranks if sharded else 1)
    return mine * beside * budget.optimizer_bytes(m.weight_bytes) / (m.host_gb_per_s * 1e9)


def link(m: Machine, ranks: int) -> float:
    return (m.link_gb_per_s if ranks <= m.per_node else m.net_gb_per_s) * 1e9


def sum_s(work: Work, m: Machine, ranks: int, sharded: bool) -> float:
    """Ring all-reduce of fp32 gradients, once (Patarasuk & Yuan 2009). In slices, of every micro-batch two gathers of
    the weights and a sum, of which the arithmetic hides what it can, and a whole copy for the rollout."""
    if ranks == 1:
        return 0.0
    share, N = (ranks - 1) / ranks, work.parameters
    if not sharded:
        return 2 * share * 4 * N / link(m, ranks) + 2 * (ranks - 1) * m.latency_us * 1e-6
    pieces = max(1, round(work.tokens(work.prompts / ranks) / work.micro_batch_tokens))
    moved = share * N * (2 * m.weight_bytes + 4) / link(m, ranks)
    hidden = min(moved * pieces, update_s(work, m, ranks))
    return moved * pieces - hidden + share * N * m.weight_bytes / link(m, ranks)


def exchange_s(work: Work, m: Machine, ranks: int) -> float:
    """Every process gets all episodes, and unpickles them."""
    if ranks == 1:
        return 0.0
    size = work.prompts * work.group * work.mean * BYTES_OF_A_TOKEN
    return size / (m.object_gb_per_s * 1e9) + ranks * m.latency_us * 1e-6


def step(work: Work, m: Machine, ranks: int, sharded: bool = False) -> dict[str, float]:
    """Seconds of each part of a synchronous step, and of all."""
    parts = {
        "rollout": rollout_s(work, m, ranks),
        "exchange": exchange_s(work, m, ranks),
        "update": update_s(work, m, ranks),
        "sum": sum_s(work, m, ranks, sharded),
        "optimizer": optimizer_s(work, m, ranks, sharded),
    }
    return parts | {"step": sum(parts.values())}


def engines(work: Work, m: Machine, trainers: int, samplers: int, decode_gain: float = 1.0) -> dict[str, float]:
    """Rollouts on processes of their own: the seconds of a step, and by how many updates answers come late.

    synchronous: the two wait for each other. one ahead: the next answers are sampled while the last are learnt from,
    and come one update late. continuous: samplers are always full and nobody waits for the longest answer, as late
    as the updates that are made while it is written. `decode_gain`: how much less overhead an engine has for a token.
    """
    engine = replace(m, overhead_us=m.overhead_us / decode_gain)
    sample = rollout_s(work, engine, samplers)
    train = step(work, m, trainers, sharded=trainers > 1)
    learn = train["update"] + train["sum"] + train["optimizer"] + train["exchange"]
    send = work.parameters * m.weight_bytes / (m.net_gb_per_s * 1e9)  # each sampler gets all of them
    continuous = max(rollout_s(replace(work, longest=work.mean), engine, samplers), learn) + send
    return {
        "sampling": sample,
        "learning": learn,
        "weights": send,
        "synchronous": sample + learn + send,
        "one ahead": max(sample, learn) + send,
        "continuous": continuous,
        "longest late by": sample / continuous,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Against measurements


def fit(work: Work, measured: dict[str, float], m: Machine) -> Machine:
    """The machine on which one process takes the rollout and update that were measured."""
    for _ in range(40):
        rollout, update = rollout_s(work, m, 1), update_s(work, m, 1) + optimizer_s(work, m, 1, False)
        tflops = m.tflops * update / measured["update"]
        per_token = (measured["rollout"] - rollout) / work.longest / work.config.num_hidden_layers
        m = replace(m, tflops=tflops, overhead_us=max(0.0, m.overhead_us + 1e6 * per_token))
    return m


def check(path: str) -> list[dict]:
    """Predictions beside measurements: from one process to several, and from one amount of work to others."""
    reports = [json.loads(line) for line in Path(path).read_text().splitlines() if line.startswith("{")]
    rows = []
    cpu = Machine(0.05, 10, 50, 8, 1, 1, 100, 10)
    fitted: dict[tuple, Machine] = {}
    for report in reports:
        s, results = report["settings"], report["results"]
        config = Qwen2Config.from_pretrained(locate_pretrained(s["ckpt"])) if s["ckpt"] else None
        config = config or common.shape_config(s["random"])
        one = Work(config, s["prompts"], s["group_size"], s["prompt_tokens"], s["new_tokens"], s["new_tokens"],
                   s["micro_batch_tokens"])  # fmt: skip
        kind = (s["ckpt"], s["random"], s["dtype"])
        if kind not in fitted:
            fitted[kind] = fit(one, results["1"], replace(cpu, weight_bytes=4 if s["dtype"] == "fp32" else 2))
        for ranks, measured in results.items():
            n = int(ranks)
            m = fitted[kind]
            if n > 1:
                m = replace(m, link_gb_per_s=2 * (n - 1) / n * measured["sum_gb_per_s"],
                            latency_us=measured["latency_s"] * 1e6)  # fmt: skip
            predicted = step(replace(one, prompts=one.prompts * n), replace(m, host_gb_per_s=m.host_gb_per_s * n), n)
            rows.append({
                "what": f"{s['ckpt'] or s['random']}, {s['prompts']} prompts x {s['new_tokens']} tokens, {n} processes",
                "rollout": measured["rollout"], "rollout predicted": predicted["rollout"] + predicted["exchange"],
                "update": measured["update"],
                "update predicted": predicted["update"] + predicted["sum"] + predicted["optimizer"],
                "step": measured["step"], "step predicted": predicted["step"],
                "error": predicted["step"] / measured["step"] - 1,
            })  # fmt: skip
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Tables


SHAPE_7B = Qwen2Config(152_064, 3584, 18_944, 28, 28, 4, head_dim=128)


def tables(args: argparse.Namespace) -> dict[str, list[dict]]:
    work = Work(SHAPE_7B, args.prompts, args.group_size, args.prompt_tokens, args.mean, args.longest)
    strong = [
        {"GPUs": n, "prompts": work.prompts, **step(work, H100, n, sharded=n > 1)} for n in (1, 8, 16, 32, 64, 128)
    ]
    weak = [
        {"GPUs": n, "prompts": 4 * n, **step(replace(work, prompts=4 * n), H100, n, sharded=n > 1)}
        for n in (1, 8, 16, 32, 64, 128)
    ]
    whole = [{"GPUs": n, "prompts": 4 * n, **step(replace(work, prompts=4 * n), H100, n)} for n in (1, 8, 64)]
    for rows in (strong, weak, whole):
        for row in rows:
            row["prompts a GPU and s"] = row["prompts"] / row["GPUs"] / row["step"]
    split = [
        {"trainers": t, "samplers": 64 - t, **engines(replace(work, prompts=256), H100, t, 64 - t, decode_gain=4)}
        for t in (8, 16, 32)
    ]
    return {
        "the same step on more GPUs": strong,
        "four prompts for each GPU": weak,
        "the same, all weights on every GPU": whole,
        "64 GPUs, 256 prompts, engines of their own": split,
    }


def main(argv: list[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=128, help="of the step on more GPUs (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--mean", type=float, default=1000, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--longest", type=float, default=4096, help="tokens of the longest (default: %(default)s)")
    parser.add_argument("--check", help="a file with last lines of benchmarks/scaling.py")
    args = parser.parse_args(argv)
    results = {"check": check(args.check)} if args.check else tables(args)
    for title, rows in results.items():
        print(title)
        print(common.table(list(rows[0]), [list(row.values()) for row in rows]), "\n")
    common.print_json(args, {"machine": asdict(H100), **results})


if __name__ == "__main__":
    main()
