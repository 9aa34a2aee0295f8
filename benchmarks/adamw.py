"""An AdamW step: ours, with fp32 state on the CPU, beside torch.optim.AdamW, fused and foreach.

    python benchmarks/adamw.py                                 # 100 million parameters, cut like Qwen2.5-0.5B's
    python benchmarks/adamw.py --parameters 494000000 --device cuda

All contenders hold the same weights and gradients and take turns. On the CPU the fair pair is `ours, fp32` and `torch
fused, fp32`: the same bytes. `ours, bf16` also rounds masters to bf16 weights. On CUDA, `ours` carries gradients down
and weights up, `copies alone` does only that, over pinned memory, and `torch fused on the GPU` has its state there.
A step on paper moves budget.optimizer_bytes. The bandwidth is that of reading, measured in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import budget
import common
import torch
from torch import Tensor

from optimizer import MemoryEfficientAdamW

Step = Callable[[], object]
LR = 1e-6


def sizes(total: int, shape: str) -> list[int]:
    """Elements of tensors that a model of this shape has, as many as fit into `total`, and the remainder as one."""
    c = common.shape_config(shape)
    D, F = c.hidden_size, c.intermediate_size
    layer = [D * D, D * D // 7, D * D // 7, D * D, D * F, D * F, D * F, D, D]
    wanted = [c.vocab_size * D] + layer * c.num_hidden_layers
    found = []
    for size in wanted[1:] + wanted[:1]:
        if sum(found) + size <= total:
            found.append(size)
    return found + [total - sum(found)] * (sum(found) < total)


def parameters(count: list[int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Random parameters with gradients."""
    params = [torch.randn(n, device=device).mul_(0.02).to(dtype).requires_grad_() for n in count]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def contenders(count: list[int], device: str) -> dict[str, tuple[Step, int]]:
    """Name -> (one optimizer step, bytes a parameter that it must move in host memory, 0 where it is not there)."""
    adamw, bf16, fp32 = torch.optim.AdamW, torch.bfloat16, torch.float32
    if device.startswith("cuda"):
        ours = MemoryEfficientAdamW(parameters(count, bf16, device), lr=LR)
        fused = adamw(parameters(count, fp32, device), lr=LR, weight_decay=0.0, fused=True)
        return {
            "ours, bf16 on the GPU": (ours.step, budget.optimizer_bytes(2)),
            "copies alone": (copies(parameters(count, bf16, device)), 0),
            "torch fused on the GPU, fp32": (fused.step, 0),
            "torch foreach on the CPU, fp32": (_foreach(count).step, budget.optimizer_bytes(4)),
        }
    return {
        "ours, bf16": (MemoryEfficientAdamW(parameters(count, bf16, device), lr=LR).step, budget.optimizer_bytes(2)),
        "ours, fp32": (MemoryEfficientAdamW(parameters(count, fp32, device), lr=LR).step, budget.optimizer_bytes(4)),
        "torch fused, fp32": (
            adamw(parameters(count, fp32, device), lr=LR, weight_decay=0.0, fused=True).step,
            budget.optimizer_bytes(4),
        ),
        "torch foreach, fp32": (_foreach(count).step, budget.optimizer_bytes(4)),
    }


def _foreach(count: list[int]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters(count, torch.float32, "cpu"), lr=LR, weight_decay=0.0, foreach=True)


def copies(params: list[Tensor]) -> Step:
    """All gradients down and all weights up, over pinned memory on one stream: no step on the CPU can be faster."""
    down = [torch.empty(p.shape, dtype=p.dtype, pin_memory=True) for p in params]
    up = [p.detach().cpu().pin_memory() for p in params]

    @torch.no_grad()
    def step() -> None:
        for p, host in zip(params, down):
            host.copy_(p.grad, non_blocking=True)
        for p, host in zip(params, up):
            p.copy_(host, non_blocking=True)

    return step


def state_bytes_on_gpu(count: list[int], device: str) -> int:
    """GPU memory of our optimizer's state: allocated after a step, less allocated before."""
    params = parameters(count, torch.bfloat16, device)
    optimizer = MemoryEfficientAdamW(params, lr=LR)
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before


def main(argv: list[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument(
        "--parameters", type=int, default=100_000_000, help="how many, for each contender (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    count = sizes(args.parameters, args.random)
    results = {"read_gb_per_s": common.read_gb_per_s("cpu"), "contenders": {}}
    if args.device.startswith("cuda"):
        results["state_bytes_on_gpu"] = state_bytes_on_gpu(count, args.device)
    steps = contenders(count, args.device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(args.repeats + 1):
        for name, (step, _) in steps.items():
            elapsed = common.seconds(step, args.device)
            if repeat:  # the first step makes the state
                times[name].append(elapsed)
    for name, (_, per_parameter) in steps.items():
        s = statistics.median(times[name])
        gb_per_s = per_parameter * args.parameters / s / 1e9
        results["contenders"][name] = {
            "ms": s * 1e3,
            "ns_per_parameter": s * 1e9 / args.parameters,
            "gb_per_s": gb_per_s,
        }
    reads = results["read_gb_per_s"]
    print(f"host memory: reads {reads:.3g} GB/s; {args.parameters:,} parameters in {len(count)} tensors\n")
    rows = [(name, *r.values()) for name, r in results["contenders"].items()]
    print(common.table(("optimizer step", "ms", "ns a parameter", "GB/s"), rows), "\n")
    common.print_json(args, results)


if __name__ == "__main__":
    main()
