"""The worth of a rollout after k more updates: the policies drift apart, and the clip and the ratio feel it.

    python benchmarks/staleness.py                           # the bundled model, 8 updates of its preset
    python benchmarks/staleness.py --updates 16 --lr 1e-6 --ckpt models/Qwen2.5-0.5B-Instruct

Answers are sampled once, by the weights before the first update. After every update of the usual training (which
samples its own) they are scored anew, as an asynchronous trainer would find them when they come in k steps late:
  kl            mean of the log-ratio of sampler to trainer over the answers' tokens, an estimate of their divergence
  clipped       share of tokens whose ratio leaves 1 +- 0.2
  effective     effective sample size of the answers under sequence weights: (sum w)^2 / (n sum w^2), 1 for equal ones
"""

from __future__ import annotations

import common
import torch

from data_types import MiniBatch
from grpo import GRPO, rollout
from run.config import load_config, preset_for
from update.scoring import score_episodes


def drift(trainer: GRPO, episodes: list) -> dict[str, float]:
    scores = score_episodes(trainer.model, episodes, micro_batch_tokens=trainer.config.micro_batch_tokens)
    log_ratios = [s.logp - torch.tensor(e.logprobs) for e, s in zip(episodes, scores)]
    tokens, sequences = torch.cat(log_ratios), torch.stack([r.sum() for r in log_ratios])
    weights = (sequences - sequences.max()).exp()
    return {
        "kl": -tokens.mean().item(),
        "clipped": ((tokens.exp() - 1).abs() > 0.2).float().mean().item(),
        "effective": (weights.sum().square() / (len(weights) * weights.square().sum())).item(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--lr", type=float, help="default: the preset's")
    parser.add_argument("--prompts", type=int, help="of an update (default: the preset's)")
    args = parser.parse_args(argv)
    config = load_config(preset_for(args.ckpt or "countdown-tiny"))
    config.ckpt, config.lr = args.ckpt or config.ckpt, args.lr or config.lr
    config.prompts_per_step = args.prompts or config.prompts_per_step
    trainer = GRPO(config)
    n = config.prompts_per_step
    first = MiniBatch.from_problems(trainer.task.problems("train", n, start=10**6), trainer.tokenizer)
    episodes = rollout(trainer.model, trainer.tokenizer, trainer.task, first, trainer.sampling, seed=args.seed)
    rows = [{"updates late": 0, **drift(trainer, episodes)}]
    for late in range(1, args.updates + 1):
        problems = trainer.task.problems("train", n, start=(late - 1) * n)
        trainer.step(MiniBatch.from_problems(problems, trainer.tokenizer))
        rows.append({"updates late": late, **drift(trainer, episodes)})
    print(common.table(list(rows[0]), [list(row.values()) for row in rows]))
    common.print_json(args, rows)


if __name__ == "__main__":
    main()
