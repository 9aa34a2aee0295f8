"""Decoding against the machine's limit: tokens a second over the number of rows, and where a step's time goes.

    python benchmarks/decode.py --ckpt models/Qwen2.5-0.5B-Instruct
    python benchmarks/decode.py --device cuda                           # random weights: speed needs no others

The limit is the roofline of the same run: the larger of bytes / read bandwidth and operations / rate of products, part
by part (budget.decode_step), both measured here. The time of a decode step is that of a generation less that of one
that stops at the first token, so prefill and packing fall out (recording CUDA graphs does not). The table by part comes
from a run of its own, in which hooks look at the clock. On CUDA they record events in a run without graphs, and a part
holds the gaps between its kernels.

Rows are groups of `--group-size` answers to prompts of equal length. No answer stops early.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict

import budget
import common
import torch

from model import linear
from model.linear import can_pack
from rollout import decoding
from rollout.generation import generate
from rollout.sampling import SamplingParams
from run.pretrained import load_pretrained

# name -> the arguments of run() and generate() that differ from their defaults
VARIANTS = {"default": {}, "not packed": {"packed": False}}
CUDA_VARIANTS = {"default": {}, "no graphs": {"graphs": False}}
PART_OF_MODULE = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o", "gate_proj": "gate+up", "up_proj": "gate+up",
    "down_proj": "down", "self_attn": "attention", "lm_head": "head",
}  # fmt: skip


class Clock:
    """Time spent inside calls, by part, from the first sampled token on (before that is the prefill)."""

    def __init__(self, device: str):
        self.cuda, self.on = device.startswith("cuda"), False
        self.started: dict[object, object] = {}
        self.spans: dict[str, list] = defaultdict(list)

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, key: object) -> None:
        self.started[key] = self.now()

    def stop(self, key: object, part: str) -> None:
        if self.on:
            self.spans[part].append((self.started[key], self.now()))

    def around(self, function, part: str, switch_on: bool = False):
        def timed(*args, **kwargs):
            self.start(part)
            result = function(*args, **kwargs)
            self.stop(part, part)
            self.on = self.on or switch_on
            return result

        return timed

    def totals(self) -> dict[str, float]:
        """Seconds a part."""
        if not self.cuda:
            return {part: sum(b - a for a, b in spans) for part, spans in self.spans.items()}
        torch.cuda.synchronize()
        return {part: sum(a.elapsed_time(b) for a, b in spans) / 1e3 for part, spans in self.spans.items()}


def seconds_by_part(model, device: str, run) -> dict[str, float]:
    """Seconds inside each part of the decode steps of `run()`. Norms, SwiGLU and bookkeeping are in no part."""
    clock, handles = Clock(device), []
    for name, module in model.named_modules():
        part = PART_OF_MODULE.get(name.rpartition(".")[2])
        if part is not None:
            handles.append(module.register_forward_pre_hook(lambda m, args: clock.start(m)))
            handles.append(module.register_forward_hook(lambda m, args, out, part=part: clock.stop(m, part)))
    sample, logits = decoding.sample, model.logits
    model.logits, decoding.sample = clock.around(logits, "head"), clock.around(sample, "sampling", switch_on=True)
    try:
        run()
    finally:
        decoding.sample = sample
        del model.logits  # the instance's; the class has its own
        for handle in handles:
            handle.remove()
    totals = clock.totals()
    if "attention" in totals:
        totals["attention"] -= totals.get("qkv", 0.0) + totals.get("o", 0.0)  # they run inside self_attn
    return totals


def measure_rows(model, tokenizer, args, rows: int, limits: tuple[float, float]) -> dict:
    """Decode speed of every variant at so many rows, and the parts of a step of the default one."""
    variants = CUDA_VARIANTS if args.device.startswith("cuda") else VARIANTS
    prompts = common.random_prompts(rows // args.group_size, args.prompt_tokens, tokenizer.vocab_size, args.seed)

    def run(new_tokens: int, packed: bool = True, **options):
        linear.can_pack = can_pack if packed else lambda weight: False
        params = SamplingParams(n=args.group_size, max_new_tokens=new_tokens)
        return generate(model, prompts, params, tokenizer=tokenizer, seed=args.seed, max_rows=rows, **options)

    steps = args.new_tokens - 1
    whole, first = defaultdict(list), defaultdict(list)
    for repeat in range(args.repeats + 1):
        for name, options in variants.items():
            timing = common.seconds(lambda o=options: run(1, **o), args.device)
            timings = common.seconds(lambda o=options: run(args.new_tokens, **o), args.device)
            if repeat:  # the first round warms up
                first[name].append(timing)
                whole[name].append(timings)
    parts = budget.decode_step(model.config, len(prompts), args.group_size, args.prompt_tokens, args.new_tokens / 2)
    floors = {p.name: p.floor_s(*limits) for p in parts}
    step_s = {name: (statistics.median(whole[name]) - statistics.median(first[name])) / steps for name in variants}
    spent = seconds_by_part(model, args.device, lambda: run(args.new_tokens, graphs=False))
    return {
        "rows": rows,
        "tokens_per_s": {name: rows / s for name, s in step_s.items()},
        "tokens_per_s_with_prefill": {n: rows * args.new_tokens / statistics.median(whole[n]) for n in variants},
        "step_ms": {name: s * 1e3 for name, s in step_s.items()},
        "floor_ms": sum(floors.values()) * 1e3,
        "share_of_roofline": sum(floors.values()) / step_s["default"],
        "gb_per_step": sum(p.bytes for p in parts) / 1e9,
        "tflop_per_step": sum(p.operations for p in parts) / 1e12,
        "part_ms": {p.name: spent.get(p.name, 0.0) / steps * 1e3 for p in parts},
        "part_floor_ms": {name: s * 1e3 for name, s in floors.items()},
    }


def print_tables(results: list[dict]) -> None:
    header = (
        "rows",
        *(f"{name} tok/s" for name in results[0]["tokens_per_s"]),
        "with prefill",
        "ms a step",
        "floor ms",
        "of roofline",
    )
    print(common.table(header, [
        (str(r["rows"]), *r["tokens_per_s"].values(), r["tokens_per_s_with_prefill"]["default"],
         r["step_ms"]["default"], r["floor_ms"], f"{r['share_of_roofline']:.0%}")
        for r in results
    ]))  # fmt: skip
    rows = []
    for part in results[0]["part_ms"]:
        rows.append([part] + [x for r in results for x in (r["part_ms"][part], r["part_floor_ms"][part])])
    rows.append(["rest"] + [x for r in results for x in (r["step_ms"]["default"] - sum(r["part_ms"].values()), "")])
    print("\nmilliseconds of a decode step, and the floor on paper")
    print(common.table(["part", *(x for r in results for x in (f"{r['rows']} rows", "floor"))], rows), "\n")


def main(argv: list[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", help="default: 8 32 64, on cuda 8 64 256 512")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=134)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    args.rows = args.rows or ([8, 64, 256, 512] if args.device.startswith("cuda") else [8, 32, 64])
    if args.new_tokens < 2 or any(rows % args.group_size for rows in args.rows):
        parser.error("expected rows that are multiples of --group-size, and --new-tokens of at least 2")
    with common.checkpoint(args) as folder:
        model, _ = load_pretrained(folder, common.DTYPES[args.dtype], args.device)
        tokenizer = common.endless_tokenizer(folder)
        bandwidth = common.read_gb_per_s(args.device)
        tflops = common.gemm_tflops(model.config, args.device, model.dtype)
        print(f"{args.device}: reads {bandwidth:.3g} GB/s, {args.dtype} products {tflops:.3g} Tflop/s\n")
        results = [measure_rows(model, tokenizer, args, rows, (bandwidth, tflops)) for rows in args.rows]
    print_tables(results)
    common.print_json(args, {"read_gb_per_s": bandwidth, "gemm_tflops": tflops, "rows": results})


if __name__ == "__main__":
    main()
