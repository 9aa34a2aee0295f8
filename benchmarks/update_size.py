"""How small may the update be? Two ways to train that are no options of train.py, on the bundled model.

    python benchmarks/update_size.py tied --seed 0          # 13 numbers, shared by all matrices (after TinyLoRA)
    python benchmarks/update_size.py evolution --seed 0     # evolution strategies: forward passes only, no gradient
    python benchmarks/update_size.py report                 # solve rate against trained numbers, with the LoRA runs

`tied` is after TinyLoRA (arXiv 2602.04118): every matrix is W + U S (v_1 P_1 + ... + v_13 P_13) V^T. U S V^T is the
truncated singular value decomposition of the released W, the P are fixed random matrices, and the 13 numbers v are
the same for all matrices. `evolution` is after arXiv 2509.24372: the weights are disturbed with normal noise, each
disturbed model answers the same problems, and the weights move along the noise by its standardized mean reward.
Neither formula was checked against its paper, and the step sizes are not tuned.

Full training and LoRA of rank 32, 8 and 1 are flags of train.py: `python benchmarks/compare.py update-size`.
A run that is finished is not repeated. The last line of `report` is JSON with the hardware.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev

import compare
import torch
from common import ROOT, hardware
from torch import Tensor

from data_types import MiniBatch
from grpo import GRPO, rollout
from model.lora import add_lora, trainable
from rollout.sampling import SamplingParams
from run.config import parse_args
from train import evaluate

RUNS = ROOT / "runs" / "update-size"
WAYS = ("tied", "evolution")


class TiedUpdate(torch.optim.Optimizer):
    """Adam on a few numbers v that all matrices share: W = W_0 + U S (sum_i v_i P_i) V^T, rank by rank.

    It takes the gradients of the matrices, as any optimizer of them would, and projects them onto v.
    """

    def __init__(self, matrices: Sequence[Tensor], numbers: int = 13, rank: int = 2, lr: float = 0.02, seed: int = 0):
        super().__init__(list(matrices), {"lr": lr})
        generator = torch.Generator().manual_seed(seed)
        self.v = torch.zeros(numbers, dtype=torch.float64)
        self.adam = torch.optim.Adam([self.v], lr)
        self.start = [p.detach().clone() for p in self.param_groups[0]["params"]]
        self.bases = []
        for W in self.start:
            U, S, Vh = torch.linalg.svd(W.double().cpu(), full_matrices=False)
            r = min(rank, len(S))
            P = torch.randn(numbers, r, r, generator=generator, dtype=torch.float64)
            self.bases.append((U[:, :r] * S[:r], P, Vh[:r]))

    def update_of(self, basis: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """U S (sum_i v_i P_i) V^T."""
        left, P, right = basis
        return left @ torch.einsum("n,nij->ij", self.v, P) @ right

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        gradient = torch.zeros_like(self.v)
        for p, (left, P, right) in zip(self.param_groups[0]["params"], self.bases):
            if p.grad is not None:
                gradient += torch.einsum("ij,nij->n", left.T @ p.grad.double().cpu() @ right.T, P)
        self.v.grad = gradient
        self.adam.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.adam.step()
        for p, W, basis in zip(self.param_groups[0]["params"], self.start, self.bases):
            p.copy_(W + self.update_of(basis).to(W))


class Evolution:
    """Evolution strategies on all weights. Noise is drawn again from its seed, so it is never stored."""

    def __init__(self, weights: Sequence[Tensor], sigma: float, lr: float):
        self.weights, self.sigma, self.lr = list(weights), sigma, lr

    def noise(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(p.shape, generator=generator).to(p) for p in self.weights]

    @torch.no_grad()
    def step(self, fitness: Callable[[], float], seeds: Sequence[int]) -> list[float]:
        """One step from the fitness of a disturbed model for each seed. Returns them. Equal ones change nothing."""
        start = [p.clone() for p in self.weights]
        found = []
        try:
            for seed in seeds:
                for p, W, e in zip(self.weights, start, self.noise(seed)):
                    p.copy_(W + self.sigma * e)
                found.append(fitness())
        finally:
            for p, W in zip(self.weights, start):
                p.copy_(W)
        if min(found) == max(found):
            return found
        mean, deviation = fmean(found), pstdev(found)
        for seed, value in zip(seeds, found):
            share = self.lr * (value - mean) / deviation / len(seeds)
            for p, e in zip(self.weights, self.noise(seed)):
                p.add_(share * e)
        return found


def matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The weights of the linear layers inside the blocks, which LoRA adapts, too."""
    return [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]


def run(asked: argparse.Namespace) -> Path:
    """Train, evaluate every `eval_every` steps, and write metrics.jsonl as train.py does."""
    flags = ["--seed", str(asked.seed), "--steps", str(asked.steps), "--eval-problems", str(asked.eval_problems)]
    flags += ["--arithmetic-weight", "0", "--lr", str(asked.lr), *asked.flags]
    config = parse_args(flags)
    trainer = GRPO(config)
    if asked.way == "tied":
        trainer.optimizer = TiedUpdate(matrices(trainer.model), asked.numbers, asked.rank, asked.lr, asked.seed)
        numbers = asked.numbers
    else:
        search = Evolution(list(trainer.model.parameters()), asked.sigma, asked.lr)
        numbers = sum(p.numel() for p in trainer.model.parameters())
    held_out = trainer.task.test_problems(config.eval_problems)
    folder = run_folder(asked.way, asked.seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(config.steps + 1):
            record: dict[str, float] = {"step": step, "trained_numbers": numbers}
            if step:
                problems = trainer.problems(config.prompts_per_step, start=(step - 1) * config.prompts_per_step)
                batch = MiniBatch.from_problems(problems, trainer.tokenizer)
                if asked.way == "tied":
                    record["reward"] = trainer.step(batch)[1]["reward"]
                else:
                    seeds = [(asked.seed * 1_000_003 + step) * 1000 + n for n in range(asked.population)]
                    record["reward"] = fmean(search.step(partial(greedy_reward, trainer, batch), seeds))
            if step == config.steps or step % asked.eval_every == 0:
                record |= evaluate(trainer, held_out)
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(
                json.dumps({k: round(v, 4) for k, v in record.items() if not k.startswith("eval_greedy")}), flush=True
            )
    return folder


def greedy_reward(trainer: GRPO, batch: MiniBatch) -> float:
    """Mean reward of one greedy response per problem. A reward that is missing counts as 0."""
    sampling = SamplingParams(1, trainer.config.max_new_tokens, temperature=0.0)
    episodes = rollout(trainer.model, trainer.tokenizer, trainer.task, batch, sampling, must_be_finite=False)
    return fmean(e.reward if e.reward == e.reward else 0.0 for e in episodes)


def run_folder(way: str, seed: int) -> Path:
    return RUNS / f"{way}-seed-{seed}"


def finished(way: str, seed: int, steps: int) -> bool:
    records = compare.read(run_folder(way, seed))
    return bool(records) and records[-1]["step"] == steps and "eval_solved" in records[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Report


def trained_numbers(flags: str) -> int:
    """Numbers that a run of train.py with these flags trains."""
    config = parse_args(flags.split())
    model = GRPO(parse_args([])).model
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha, 0.0, config.lora_targets, 0)
    return sum(p.numel() for p in trainable(model))


def collect(seeds: Sequence[int]) -> list[dict]:
    """One record per finished run: way, seed, trained numbers, solve rate before and after."""
    found = []
    for variant, flags in compare.SWEEPS["update-size"].items():
        for seed in seeds:
            if compare.finished(flags, seed):
                found.append(
                    summary(variant, seed, trained_numbers(flags), compare.read(compare.run_folder(flags, seed)))
                )
    for way in WAYS:
        for seed in seeds:
            records = compare.read(run_folder(way, seed))
            if records and "eval_solved" in records[-1]:
                found.append(summary(way, seed, records[-1]["trained_numbers"], records))
    return found


def summary(way: str, seed: int, numbers: int, records: list[dict]) -> dict:
    solved = [r["eval_solved"] for r in records if "eval_solved" in r]
    return {"way": way, "seed": seed, "trained_numbers": numbers, "before": solved[0], "after": solved[-1]}


def draw(found: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for way in dict.fromkeys(r["way"] for r in found):
        runs = [r for r in found if r["way"] == way]
        axis.plot([r["trained_numbers"] for r in runs], [r["after"] for r in runs], "o", label=way)
    axis.axhline(fmean(r["before"] for r in found), color="grey", linewidth=1, linestyle="--", label="before training")
    axis.set_xscale("log")
    axis.set_xlabel("trained numbers")
    axis.set_ylabel("held out: solved, sampled")
    axis.set_title(f"one dot per seed ({', '.join(map(str, sorted({r['seed'] for r in found})))})", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def report(asked: argparse.Namespace) -> None:
    found = collect(asked.seeds)
    if not found:
        sys.exit(f"no finished run in {RUNS} or {compare.RUNS}")
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "update-size.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found), encoding="utf-8")
    draw(found, asked.out / "update-size.png")
    for way in dict.fromkeys(r["way"] for r in found):
        runs = [r for r in found if r["way"] == way]
        after = " ".join(f"{r['after']:.3f}" for r in runs)
        print(f"{way:14} {runs[0]['trained_numbers']:>9} numbers   {runs[0]['before']:.3f} -> {after}")
    print(json.dumps({"results": found, "hardware": hardware()}))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=[*WAYS, "report"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="report: seeds to show")
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--eval-every", type=int, default=25)
    parser.add_argument("--eval-problems", type=int, default=512)
    parser.add_argument("--lr", type=float, help="step size (default: tied 0.02, evolution 0.0015)")
    parser.add_argument("--numbers", type=int, default=13, help="tied: how many numbers are trained")
    parser.add_argument("--rank", type=int, default=2, help="tied: singular directions of each matrix")
    parser.add_argument("--population", type=int, default=16, help="evolution: disturbed models per step")
    parser.add_argument("--sigma", type=float, default=0.003, help="evolution: size of the noise")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of train.py")
    parser.add_argument(
        "--out", type=Path, default=compare.RESULTS, help="report: folder of the figure and the raw file"
    )
    asked = parser.parse_args(argv)
    if asked.way == "report":
        return report(asked)
    asked.lr = asked.lr or {"tied": 0.02, "evolution": 0.0015}[asked.way]
    if finished(asked.way, asked.seed, asked.steps):
        print(f"{run_folder(asked.way, asked.seed)} is finished")
        return None
    run(asked)
    return None


if __name__ == "__main__":
    main()
