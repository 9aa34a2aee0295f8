"""The figure of docs/optimal-transport.md: transport between two orders of the same text.

    python docs/illustrations.py            # writes docs/images/optimal-transport.png and prints its numbers

Two texts for one problem. They have the same steps, and the first two are exchanged. The bundled model reads both.
*Rigid*: the divergence between its next-token distributions at equal positions of the two texts. *Transport*: the
cost of moving the last hidden states of one text onto those of the other. Nothing is sampled, so every run draws the
same figure.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.attention import PackedAttention  # noqa: E402
from model.layout import Layout  # noqa: E402
from run.pretrained import load_pretrained, locate_pretrained  # noqa: E402

PROMPT = "<|im_start|>user\n[19, 10, 25, 3] = 37<|im_end|>\n<|im_start|>assistant\n<think>\n"
TEXT = "19+25=44\n10-3=7\n44-7=37\n"
REORDERED = "10-3=7\n19+25=44\n44-7=37\n"
REGULARISATION, ITERATIONS = 0.1, 200


class Comparison(NamedTuple):
    tokens: list[str]  # of TEXT
    reordered: list[str]
    rigid: Tensor  # [T] KL of the next-token distributions at equal positions, nats
    plan: Tensor  # [T, T] mass that goes from a token of TEXT to one of REORDERED; rows and columns add up to 1
    moved: Tensor  # [T] plan * cost, summed over a token's partners
    unmoved: Tensor  # [T] the cost if every token had to stay at its position


@torch.no_grad()
def compare() -> Comparison:
    """Both comparisons of the two texts."""
    model, tokenizer = load_pretrained(locate_pretrained("countdown-tiny"), torch.float32, "cpu")
    prompt = tokenizer.encode(PROMPT)
    states, tokens = [], []
    for text in (TEXT, REORDERED):
        ids = tokenizer.encode(text)
        layout = Layout.causal([len(prompt) + len(ids)])
        rows = torch.tensor(prompt + ids)
        states.append(model.hidden_states(rows, layout.positions(), PackedAttention(layout))[len(prompt) :])
        tokens.append([tokenizer.decode([i]) for i in ids])
    logp, logq = (model.logits(hidden).log_softmax(-1) for hidden in states)
    cost = 1 - torch.nn.functional.normalize(states[0], dim=-1) @ torch.nn.functional.normalize(states[1], dim=-1).T
    plan = sinkhorn(cost)
    rigid = (logp.exp() * (logp - logq)).sum(-1)
    return Comparison(tokens[0], tokens[1], rigid, plan, (plan * cost).sum(1), cost.diagonal())


def sinkhorn(cost: Tensor) -> Tensor:
    """The entropic plan [T, T] between unit masses (Cuturi 2013): as losses.transport_cost, without a band."""
    kernel = (-cost.double() / REGULARISATION).exp()
    right = torch.ones(len(cost), dtype=torch.float64)
    for _ in range(ITERATIONS):
        left = 1 / (kernel @ right)
        right = 1 / (kernel.T @ left)
    return (left[:, None] * kernel * right).float()


def draw(c: Comparison, path: Path) -> None:
    shown, other = ([t.replace("\n", "\\n") for t in tokens] for tokens in (c.tokens, c.reordered))
    figure, (heat, bars, sums) = plt.subplots(
        3, 1, figsize=(6.4, 11.5), height_ratios=[2.2, 1, 1], layout="constrained"
    )
    image = heat.imshow(c.plan, cmap="Blues", vmin=0, vmax=1)
    heat.set(xlabel="reordered text", ylabel="text", title="Transport plan between two texts, one model")
    heat.set_xticks(range(len(other)), other, fontsize=7)
    heat.set_yticks(range(len(shown)), shown, fontsize=7)
    figure.colorbar(image, ax=heat, shrink=0.8, label="mass")
    place = torch.arange(len(shown))
    pairs = [("divergence at equal positions, nats", c.rigid, "tab:red"), ("transport cost", c.moved, "tab:blue")]
    for shift, (label, values, colour) in zip((-0.2, 0.2), pairs):
        bars.bar(place + shift, values / values.sum(), 0.4, label=f"{label} (sum {values.sum():.2f})", color=colour)
    bars.set(ylabel="share of the sum", title="Share of each token")
    bars.set_xticks(range(len(shown)), shown, fontsize=7)
    bars.legend(fontsize=8)
    sums.plot(place, c.unmoved.cumsum(0), label="cost at equal positions", color="tab:red")
    sums.plot(place, c.moved.cumsum(0), label="cost after transport", color="tab:blue")
    sums.set(xlabel="token of the text", ylabel="1 - cosine, added up", title="Accumulated")
    sums.set_xticks(range(len(shown)), shown, fontsize=7)
    sums.legend(fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    comparison = compare()
    draw(comparison, ROOT / "docs" / "images" / "optimal-transport.png")
    for label in ("rigid", "unmoved", "moved"):
        print(label, round(getattr(comparison, label).sum().item(), 2))
