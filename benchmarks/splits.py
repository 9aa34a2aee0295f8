"""How far the gradient of a step moves when the step is cut into other micro-batches, and a check that the same cut
gives the same bits.

    python benchmarks/splits.py                    # fp32 and bf16, the last line is results/splits.json

Printed for each cut is |gradient - gradient of the whole| / |gradient of the whole|, all parameters together. In exact
arithmetic it is 0. The order of additions is left.
"""

from __future__ import annotations

import argparse

import common
import torch

from data_types import Episode
from grpo import update_policy
from qwen2_llm import Qwen2ForCausalLM

SPLITS = [16384, 400, 200, 100, 60, 1]


def gradient(model: Qwen2ForCausalLM, episodes: list[Episode], micro_batch_tokens: int) -> torch.Tensor:
    class Keep(torch.optim.SGD):
        def step(self) -> None:
            self.kept = torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]])

    optimizer = Keep(model.parameters(), lr=0.0)
    settings = {"micro_batch_tokens": micro_batch_tokens, "max_grad_norm": 1e9, "entropy_coef": 0.01}
    update_policy(model, optimizer, episodes, **settings)
    return optimizer.kept


def measure(dtype: torch.dtype) -> dict[str, object]:
    """Whether every cut gives its own bits again, and how far each is from the whole."""
    model = Qwen2ForCausalLM.from_config(common.shape_config("tiny"), dtype)
    prompts = common.random_prompts(6, 20, 2048)
    answers = common.random_prompts(24, 30, 2048, seed=1)
    episodes = [
        Episode(
            i // 4, prompts[i // 4], ids[: 10 + i % 20], [-7.6] * (10 + i % 20), "", "stop", advantage=(i % 4) - 1.5
        )
        for i, ids in enumerate(answers)
    ]
    gradients = {split: gradient(model, episodes, split).double() for split in SPLITS}
    same = all(torch.equal(gradient(model, episodes, split).double(), g) for split, g in gradients.items())
    whole = gradients[SPLITS[0]]
    errors = {
        str(split): float((g - whole).norm() / whole.norm()) for split, g in gradients.items() if split != SPLITS[0]
    }
    return {"same bits": same, "splits": errors}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=common.DTYPES)
    args = parser.parse_args(argv)
    results = {dtype: measure(common.DTYPES[dtype]) for dtype in args.dtype}
    rows = [(split, *(f"{results[dtype]['splits'][str(split)]:.1e}" for dtype in args.dtype)) for split in SPLITS[1:]]
    print(common.table(("most tokens a micro-batch", *args.dtype), rows))
    common.print_json(args, results)


if __name__ == "__main__":
    main()
