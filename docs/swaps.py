"""The figure of docs/sharpening.md: how much of a run's gain a few swapped tokens recover.

    python train.py --run-dir runs/tiny-0
    python docs/swaps.py --after runs/tiny-0 --problems 512       # writes docs/results/swaps.json and swaps.png
    python docs/swaps.py --draw                                   # draw again from the file

The model before training writes. At k positions it takes the token that the trained model prefers, and goes on. The
positions come from left to right: of the positions that are still open, the k with the largest score are found, the
earliest of them is swapped, the rest is written again, and k - 1 are left. Three ways to choose:

    most       score: KL(after || before) of the choice at the position, nats
    random     score: a random number
    own        as `most`, but the token is the one that the model before training prefers: how much of the effect is
               due to a likelier token, and not to the trained model

Sampling is at temperature 1 without filters. The gain is solved(after) - solved(before), the share recovered is
(solved(k swaps) - solved(before)) / gain. Intervals are 95% bootstrap intervals over the problems. The file also
has the share of positions where both models prefer different tokens, on the responses of the model before training.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data_types import Problem  # noqa: E402
from math_task import CountdownTask, task_from_config  # noqa: E402
from model.head_logprobs import scale_logits  # noqa: E402
from qwen2_llm import Qwen2ForCausalLM  # noqa: E402
from rollout.generation import generate  # noqa: E402
from rollout.sampling import SamplingParams  # noqa: E402
from run.checkpoint import find_checkpoint  # noqa: E402
from run.config import load_config, preset_for  # noqa: E402
from run.options import BUNDLED_CKPT  # noqa: E402
from run.pretrained import load_pretrained, locate_pretrained  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

RESULTS = ROOT / "docs" / "results"
WAYS = {
    "most": "where both models disagree most",
    "random": "at random positions",
    "own": "where they disagree most, but its own best token",
}
NEW_TOKENS = 192  # as in configs/countdown-tiny.yaml
ROWS = 32  # responses in one forward pass
DRAWS = 2000  # of the bootstrap


class Writer:
    """The model before training, the trained one, and the prompts they answer."""

    def __init__(
        self, before: Qwen2ForCausalLM, after: Qwen2ForCausalLM, tokenizer: Tokenizer, prompts: list[list[int]]
    ):
        self.before, self.after, self.tokenizer, self.prompts = before, after, tokenizer, prompts

    def go_on(self, model: Qwen2ForCausalLM, starts: list[list[int]], seed: int) -> list[list[int]]:
        """Responses that begin with `starts` and go on at temperature 1, the stop token included if it was drawn."""
        texts = [list(start) for start in starts]
        rows = [i for i, s in enumerate(starts) if not s or (s[-1] not in self.tokenizer.eos_token_ids)]
        rows = [i for i in rows if len(texts[i]) < NEW_TOKENS]
        if rows:
            params = SamplingParams(1, max(NEW_TOKENS - len(texts[i]) for i in rows), temperature=1.0)
            asked = [self.prompts[i] + texts[i] for i in rows]
            for i, done in zip(rows, generate(model, asked, params, tokenizer=self.tokenizer, seed=seed)):
                texts[i] = (texts[i] + list(done.response_ids))[:NEW_TOKENS]
        return texts

    def choices(self, texts: list[list[int]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """By response: KL(after || before) [T] at each of its T positions, and the tokens that both models prefer."""
        order = sorted(range(len(texts)), key=lambda i: len(self.prompts[i]) + len(texts[i]))
        found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            found |= dict(zip(rows, self._choices(rows, [texts[i] for i in rows])))
        return [found[i] for i in range(len(texts))]

    @torch.no_grad()
    def _choices(self, rows: list[int], texts: list[list[int]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        ids = [torch.tensor(self.prompts[i] + text) for i, text in zip(rows, texts)]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # the padding follows: no token looks at it
        old, new = (
            scale_logits(m(padded), vocab_size=self.tokenizer.vocab_size).log_softmax(-1)
            for m in (self.before, self.after)
        )
        columns = ((new.exp() * (new - old)).sum(-1), old.argmax(-1), new.argmax(-1))
        spans = [slice(len(self.prompts[i]) - 1, len(self.prompts[i]) - 1 + len(text)) for i, text in zip(rows, texts)]
        return [tuple(column[n, span] for column in columns) for n, span in enumerate(spans)]

    def swapped(self, written: list[list[int]], k: int, way: str, seed: int) -> list[list[int]]:
        """The responses after k swaps each, from left to right. Fewer if no position is left."""
        generator = torch.Generator().manual_seed(seed)
        texts, opens = [list(t) for t in written], [0] * len(written)
        for left in range(k, 0, -1):
            for i, (kl, own, preferred) in enumerate(self.choices(texts)):
                if opens[i] >= len(texts[i]):
                    continue
                score = torch.rand(len(kl), generator=generator) if way == "random" else kl
                best = score[opens[i] :].topk(min(left, len(kl) - opens[i])).indices
                at = opens[i] + int(best.min())
                texts[i] = [*texts[i][:at], int((own if way == "own" else preferred)[at])]
                opens[i] = at + 1
            texts = self.go_on(self.before, texts, seed=1000 * seed + left)
        return texts


def solved(task: CountdownTask, problems: list[Problem], writer: Writer, texts: list[list[int]]) -> list[float]:
    """1.0 for each problem whose response has a right answer, else 0.0."""
    decoded = (writer.tokenizer.decode(t, skip_special_tokens=True) for t in texts)
    return [float(task.reward(p, text).parts["answer"] == 1.0) for p, text in zip(problems, decoded)]


def recovered(before: list[float], after: list[float], swapped: list[float]) -> dict[str, float]:
    """(swapped - before) / (after - before) with its 95% bootstrap interval over the problems."""
    columns = torch.tensor([before, after, swapped])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(columns.shape[1], (DRAWS, columns.shape[1]), generator=generator)
    old, new, mixed = columns[:, rows].mean(-1)
    shares = ((mixed - old) / (new - old))[new != old]  # a draw of few problems may have no gain
    low, high = shares.quantile(torch.tensor([0.025, 0.975])).tolist() if len(shares) else (0.0, 0.0)
    old, new, mixed = columns.mean(-1).tolist()
    return {"solved": mixed, "share": (mixed - old) / (new - old) if new != old else 0.0, "low": low, "high": high}


def measure(options: argparse.Namespace) -> dict:
    preset = load_config(preset_for(BUNDLED_CKPT))
    task = task_from_config(preset)
    before, tokenizer = load_pretrained(locate_pretrained(options.ckpt), torch.float32)
    checkpoint = find_checkpoint(options.after)
    after, _ = load_pretrained(checkpoint, torch.float32)
    problems = task.test_problems(options.problems)
    prompts = [tokenizer.encode(tokenizer.render_chat(p.messages) + p.response_prefix) for p in problems]
    writer, nothing = Writer(before, after, tokenizer, prompts), [[] for _ in problems]
    start = time.perf_counter()
    written = writer.go_on(before, nothing, options.seed)
    old = solved(task, problems, writer, written)
    new = solved(task, problems, writer, writer.go_on(after, nothing, options.seed))

    def after_swaps(k: int, way: str) -> dict[str, float]:
        texts = writer.swapped(written, k, way, options.seed + k)
        return recovered(old, new, solved(task, problems, writer, texts))

    found = {way: {str(k): after_swaps(k, way) for k in options.swaps} for way in WAYS}
    return {
        "before": options.ckpt, "after": checkpoint.name, "problems": len(problems), "seed": options.seed,
        "solved_before": sum(old) / len(old), "solved_after": sum(new) / len(new), "swaps": found,
        "positions": positions(writer, written), "seconds": round(time.perf_counter() - start, 1),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores",
        "torch": torch.__version__,
    }  # fmt: skip


def positions(writer: Writer, written: list[list[int]]) -> dict:
    """Of all positions of the responses of the model before training: how many there are, and how many differ.

    `at_the_largest`: of each response's largest KL, the tokens that the models prefer there, with their counts.
    """
    found = writer.choices(written)
    kl = torch.cat([row[0] for row in found])
    other = torch.cat([own != preferred for _, own, preferred in found]).float()
    largest = kl.sort(descending=True).values.cumsum(0) / kl.sum()
    return {
        "number": len(kl), "per_response": len(kl) / len(written), "prefer_another_token": float(other.mean()),
        "kl_above_0.1": float((kl > 0.1).float().mean()), "kl_mean": float(kl.mean()),
        "hold_half_of_the_kl": float((largest < 0.5).float().mean()),
        "at_the_largest": {
            name: common(writer.tokenizer, [int(row[column][row[0].argmax()]) for row in found])
            for name, column in (("before", 1), ("after", 2))
        },
    }  # fmt: skip


def common(tokenizer: Tokenizer, ids: list[int]) -> dict[str, int]:
    """The five most common tokens as text, with their counts."""
    return {tokenizer.decode([i]): count for i, count in Counter(ids).most_common(5)}


def draw(found: dict, path: Path) -> None:
    """Share of the gain recovered against the number of swaps."""
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for colour, (way, label) in enumerate(WAYS.items()):
        points = {0: {"share": 0.0, "low": 0.0, "high": 0.0}} | {int(k): v for k, v in found["swaps"][way].items()}
        shares = [p["share"] for p in points.values()]
        bars = [[p["share"] - p["low"] for p in points.values()], [p["high"] - p["share"] for p in points.values()]]
        bars = [[max(0.0, b) for b in side] for side in bars]
        style = {"color": f"C{colour}", "marker": "o", "markersize": 4, "capsize": 2}
        axis.errorbar(list(points), shares, yerr=bars, label=label, **style)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="swaps per response", ylabel="share of the gain recovered")
    axis.set_title(
        f"{found['problems']} held-out problems, temperature 1; solved {found['solved_before']:.2f} before, "
        f"{found['solved_after']:.2f} after; 95% intervals", fontsize=8,
    )  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default=BUNDLED_CKPT, help="the model before training")
    parser.add_argument("--after", help="a run's folder, or a checkpoint")
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--swaps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "swaps.json")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw the file again")
    options = parser.parse_args(argv)
    if options.draw:
        found = json.loads(options.out.read_text(encoding="utf-8"))
    elif options.after is None:
        parser.error("--after: name a run's folder or a checkpoint")
    else:
        found = measure(options)
        options.out.write_text(json.dumps(found) + "\n", encoding="utf-8")
    draw(found, options.out.with_suffix(".png"))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
