"""The facts of `anatomy.look` and `anatomy.compare` as tables for a terminal.

print_text(facts, Console())
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from run.progress import plain
from run.terminal import printable
from study.anatomy import FILTERS


def print_text(facts: dict[str, Any], console: Console) -> None:
    first, c = facts["looks"][0], facts["config"]
    size = f"{facts['parameters']:,} parameters, {c['num_hidden_layers']} layers"
    console.print(plain(f"{facts['names'][0]}: {size}"), style="bold")
    row = " ".join(f"{visible(t['text'])}:{t['id']}" for t in first["tokens"])
    console.print(f"\n{len(first['tokens'])} tokens (text:id)\n{row}\n", markup=False)
    rows(console, "parts", ("part", "weight", "shapes", "times", "parameters", "FLOPs", "bytes"), [
        (p["name"], p["weight"], p["shape"], p["count"], f"{p['parameters']:,}", f"{p['flops']:,}", f"{p['bytes']:,}")
        for p in first["parts"]
    ])  # fmt: skip
    rows(console, "divisors of RMSNorm (root mean square)", ("layer", "norm", "mean", "last token"),
         [(n["layer"], n["norm"], n["mean"], n["last"]) for n in first["norms"]])  # fmt: skip
    rows(console, "RoPE: the last token's query, turned", ("layer", "head", "pair", "angle", "before", "after"), [
        (r["layer"], r["head"], r["pair"], f"{r['angle']:.3g}", r["before"], r["after"])
        for r in first["rope"] if r["layer"] == first["rope"][0]["layer"]
    ])  # fmt: skip
    rows(console, "attention: the last token looks most at", ("layer.head", "token", "weight"), [
        (name, *strongest(weights[-1], first["tokens"])) for name, weights in first["attention"].items()
    ])  # fmt: skip
    cache = first["cache"]
    rows(console, f"KV cache: {cache['bytes_per_token']:,} bytes a token", ("tokens", "bytes"),
         [(a["tokens"], f"{a['bytes']:,}") for a in cache["at"]])  # fmt: skip
    rows(console, "logit lens: next token by layer", ("before block", "likeliest"), [
        (x["layer"], "  ".join(f"{visible(t)} {p:.3f}" for t, p in x["last"])) for x in first["lens"]
    ])  # fmt: skip
    at, offset = first["shown"], len(first["tokens"]) - len(first["next"])
    title = f"next token where the model is least sure, {place(first['tokens'], at)}"
    rows(console, title, ("token", "logit", *FILTERS), [
        (visible(t["text"]), t["logit"], *(f"{p:.3f}" if p else "-" for p in t["p"].values()))
        for t in first["next"][at - offset]
    ])  # fmt: skip
    if "compare" in facts:
        print_comparison(facts, console)


def print_comparison(facts: dict[str, Any], console: Console) -> None:
    moved, tokens = facts["compare"], facts["looks"][0]["tokens"]
    console.print(plain(f"{facts['names'][0]} -> {facts['names'][1]}"), style="bold")
    console.print(f"KL(after || before): {moved['mean_kl']:.4f} nats a token of the answer\n")
    order = sorted(range(len(tokens)), key=lambda i: -moved["kl"][i])[:10]
    rows(console, "where they differ most", ("after token", "KL of the next", "log-probability of the next one"), [
        (f"{i} {visible(tokens[i]['text'])}", f"{moved['kl'][i]:.4f}",
         f"{moved['rise'][i + 1]:+.3f}" if i + 1 < len(tokens) else "") for i in order
    ])  # fmt: skip
    at, offset = moved["shown"], len(tokens) - len(moved["next"])
    rows(console, f"next token where they differ most, {place(tokens, at)}", ("token", "before", "after"), [
        (visible(t["text"]), f"{t['before']:.4f}", f"{t['after']:.4f}") for t in moved["next"][at - offset]
    ])  # fmt: skip
    weights = sorted(moved["weights"], key=lambda w: -w["relative"])[:10]
    rows(console, "weights that moved most: |after - before| / |before|", ("weight", "moved by"),
         [(w["name"], f"{w['relative']:.2e}") for w in weights])  # fmt: skip


def rows(console: Console, title: str, header: Sequence[str], body: Sequence[Sequence[object]]) -> None:
    console.print(title, style="italic", markup=False)  # a table's own title would be as narrow as the table
    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name)
    for cells in body:
        table.add_row(*(plain(str(cell)) for cell in cells))
    console.print(table, "")


def place(tokens: list[dict[str, Any]], at: int) -> str:
    return f"after token {at} {visible(tokens[at]['text'])}"


def strongest(weights: list[float], tokens: list[dict[str, Any]]) -> tuple[str, str]:
    j = max(range(len(weights)), key=weights.__getitem__)
    return f"{j} {visible(tokens[j]['text'])}", f"{weights[j]:.3f}"


def visible(text: str) -> str:
    """A token's text on one line. Line ends, blanks and control characters are shown."""
    shown = text.replace("\n", "\u21b5").replace(" ", "\u00b7")
    return printable(shown, keep="")
