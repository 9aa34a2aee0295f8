"""Bytes and operations that one GRPO step needs, by part: on paper, before anything is measured.

    python benchmarks/budget.py                              # 4 prompts of 134 tokens x 8 answers x 64, Qwen2.5-0.5B
    python benchmarks/budget.py --gb-per-s 3350 --tflops 800 --group-size 64

A part's floor is the larger of bytes / bandwidth and operations / rate. Counted are bytes that cannot be avoided:
weights, keys and values, logits, gradients and optimizer state. Activations may stay in a cache and are left out.
A multiplication with its addition is two operations.

Shape letters: D hidden, F feed-forward, V vocabulary, K head size, H query heads, G key-value heads.
"""

from __future__ import annotations

from typing import NamedTuple

import common

from model.qwen2_config import Qwen2Config
from run.pretrained import locate_pretrained


class Part(NamedTuple):
    name: str
    bytes: float
    operations: float

    def floor_s(self, gb_per_s: float, tflops: float) -> float:
        return max(self.bytes / gb_per_s / 1e9, self.operations / tflops / 1e12)


def matrices(c: Qwen2Config) -> dict[str, int]:
    """Elements of the weight matrices by part, all layers together."""
    HK, GK, D, F = (
        c.num_attention_heads * c.head_dim,
        c.num_key_value_heads * c.head_dim,
        c.hidden_size,
        c.intermediate_size,
    )
    layer = {"qkv": D * (HK + 2 * GK), "o": HK * D, "gate+up": 2 * D * F, "down": F * D}
    return {name: size * c.num_hidden_layers for name, size in layer.items()} | {"head": c.vocab_size * D}


def decode_step(
    c: Qwen2Config, prompts: int, group: int, prompt_len: int, own_len: float, share_prompt=True
) -> list[Part]:
    """One token for each of prompts * group rows that have `own_len` tokens of their own, bf16 weights and cache.

    Sampling reads the logits once, and the head writes them once.
    """
    rows = prompts * group
    parts = [Part(name, 2 * size, 2 * rows * size) for name, size in matrices(c).items()]
    token_bytes = 2 * 2 * c.num_key_value_heads * c.head_dim * c.num_hidden_layers  # a token's keys and values
    read = rows * own_len + (prompts if share_prompt else rows) * prompt_len
    seen = rows * (own_len + prompt_len)
    attention = Part("attention", token_bytes * read, _attention_operations(c, seen))
    logits = Part("sampling", 2 * 2 * rows * c.vocab_size, rows * c.vocab_size)
    return [parts[0], attention, *parts[1:], logits]


def rollout(c: Qwen2Config, prompts: int, group: int, prompt_len: int, new_tokens: int) -> list[Part]:
    """Prefill of each prompt once, then new_tokens - 1 decode steps. Head and sampling also give the first token."""
    body = sum(size for name, size in matrices(c).items() if name != "head")
    tokens, pairs = prompts * prompt_len, prompts * prompt_len * (prompt_len + 1) / 2
    parts = [Part("prefill", 2 * body, 2 * tokens * body + _attention_operations(c, pairs))]
    for part in decode_step(c, prompts, group, prompt_len, new_tokens / 2):
        times = new_tokens if part.name in ("head", "sampling") else new_tokens - 1
        parts.append(Part(f"decode {part.name}", part.bytes * times, part.operations * times))
    return parts


def update(
    c: Qwen2Config, prompts: int, group: int, prompt_len: int, new_tokens: int, micro_batches: int = 1
) -> list[Part]:
    """Forward and backward over shared prompts, logits at response tokens only, then the optimizer on the CPU.

    Backward costs two products for one of forward. The head's backward computes its logits again. Gradients are
    added in place, so a micro-batch reads and writes them.
    """
    sizes = matrices(c)
    body, head = sum(sizes.values()) - sizes["head"], sizes["head"]
    own = new_tokens - 1  # the last token of an answer predicts nothing
    tokens, scored = prompts * (prompt_len + group * own), prompts * group * new_tokens
    pairs = prompts * (prompt_len * (prompt_len + 1) / 2 + group * (own * prompt_len + own * (own + 1) / 2))
    n = micro_batches
    everything = body + head if c.tie_word_embeddings else body + 2 * head
    return [
        Part("forward body", 2 * body * n, 2 * tokens * body),
        Part("forward head", 2 * head * n, 2 * scored * head),
        Part("backward body", (2 + 4) * body * n, 4 * tokens * body),
        Part("backward head", (2 + 4) * head * n, 6 * scored * head),
        Part("attention, both", 0, 3.5 * _attention_operations(c, pairs)),  # backward: 5 products to forward's 2
        Part("gradient norm and clip", (2 + 4) * everything, 3 * everything),
        Part("optimizer", optimizer_bytes(2) * everything, 12 * everything),
    ]


def optimizer_bytes(weight_bytes: int) -> int:
    """Of one parameter: read the gradient, read and write master and two moments in fp32, write the rounded weight."""
    return weight_bytes + 3 * 8 + (weight_bytes if weight_bytes < 4 else 0)


def _attention_operations(c: Qwen2Config, pairs: float) -> float:
    """Scores and weighted values of so many (query token, key token) pairs: two products of H * K."""
    return 4 * pairs * c.num_attention_heads * c.head_dim * c.num_hidden_layers


def main(argv: list[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=134)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--gb-per-s", type=float, default=30.0, help="read bandwidth (default: %(default)s)")
    parser.add_argument("--tflops", type=float, default=2.0, help="bf16 product rate (default: %(default)s)")
    args = parser.parse_args(argv)
    config = (
        Qwen2Config.from_pretrained(locate_pretrained(args.ckpt)) if args.ckpt else common.shape_config(args.random)
    )
    sizes = (config, args.prompts, args.group_size, args.prompt_tokens, args.new_tokens)
    results = {}
    for title, parts in [("rollout", rollout(*sizes)), ("update", update(*sizes))]:
        rows = [(p.name, p.bytes / 1e9, p.operations / 1e12, p.floor_s(args.gb_per_s, args.tflops)) for p in parts]
        rows.append(("together", *(sum(row[i] for row in rows) for i in (1, 2, 3))))
        print(common.table((title, "GB", "Tflop", f"s at {args.gb_per_s:g} GB/s, {args.tflops:g} Tflop/s"), rows), "\n")
        results[title] = {name: {"gb": gb, "tflop": tflop, "floor_s": floor} for name, gb, tflop, floor in rows}
    common.print_json(args, results)


if __name__ == "__main__":
    main()
