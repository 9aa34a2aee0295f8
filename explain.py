"""Look inside a checkpoint: one text on its way through the model, as a page that needs no network, and as text.

    python explain.py                                           # the bundled model: writes explain.html, prints it
    python explain.py --after runs/NAME/checkpoints/step-000075 # before and after GRPO, side by side
    python explain.py --ckpt Qwen2.5-0.5B-Instruct --prompt "What is 12 + 7?" --layers 0 12 23 --heads 0 1

The page holds every fact of `anatomy.look`. For a model of a few million parameters it is live, too: the weights are in
the page, and qwen2.js runs them (forward pass with a cache, tokenizer, sampler), so that one can type a problem, move
the temperature and watch the model think, offline. Its logits are those of PyTorch to 1e-4.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from pathlib import Path

import jinja2
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anatomy import FILTERS, compare, look
from generation import SamplingParams, generate
from math_task import CountdownTask
from pretrained import load_pretrained, locate_pretrained
from qwen2_llm import Qwen2ForCausalLM
from tokenizer import Tokenizer

PAGES = Path(__file__).resolve().parent / "pages"
LIVE_PARAMETERS = 5_000_000  # a page with the weights of more would take a browser too long


def explain(args: argparse.Namespace) -> dict:
    """All facts of the page. Raises ValueError or FileNotFoundError, each with one line."""
    folder = locate_pretrained(args.ckpt)
    model, tokenizer = load_pretrained(folder, torch.float32)
    ids = tokenizer.encode(prompt_text(args, tokenizer))
    if not ids:
        raise ValueError("the prompt is empty; give --prompt a text")
    text = ids + continuation(model, tokenizer, ids, args.new_tokens)
    facts = {
        "names": [Path(args.ckpt).name], "config": model.config.to_dict(), "prompt_tokens": len(ids),
        "parameters": sum(p.numel() for p in model.parameters()),
        "looks": [look(model, tokenizer, text, layers=args.layers, heads=args.heads)],
    }  # fmt: skip
    models = [model]
    if args.after:
        models.append(load_pretrained(locate_pretrained(args.after), torch.float32)[0])
        facts["names"].append(Path(args.after).name)
        facts["compare"] = compare(model, models[1], tokenizer, text, start=len(ids) - 1)
        facts["looks"].append(look(models[1], tokenizer, text, layers=args.layers, heads=args.heads))
    if facts["parameters"] <= LIVE_PARAMETERS:
        facts["live"] = live(models, tokenizer, folder, args)
    return facts


def continuation(model: Qwen2ForCausalLM, tokenizer: Tokenizer, ids: list[int], new_tokens: int) -> list[int]:
    """What the model writes at temperature 0, without the last token: that is the one which the facts predict."""
    if new_tokens < 1:
        return []
    greedy = SamplingParams(n=1, max_new_tokens=new_tokens, temperature=0.0)
    return generate(model, [ids], greedy, tokenizer=tokenizer)[0].response_ids[:-1]


def prompt_text(args: argparse.Namespace, tokenizer: Tokenizer) -> str:
    """The prompt as the model reads it: chat template, question, and the opening of the thought for Countdown."""
    if args.raw:
        return args.prompt or ""
    if args.prompt is not None:
        return tokenizer.render_chat([{"role": "user", "content": args.prompt}])
    problem = countdown(args).problem([3, 5, 2], target=13)
    return tokenizer.render_chat(problem.messages) + problem.response_prefix


def countdown(args: argparse.Namespace) -> CountdownTask:
    return CountdownTask(prompt_style="short" if args.ckpt == "countdown-tiny" else "full")


def live(models: list[Qwen2ForCausalLM], tokenizer: Tokenizer, folder: Path, args: argparse.Namespace) -> dict:
    """What qwen2.js needs: tokenizer, prompt around the question, and the weights as base64 of little-endian fp32."""
    mark = "\ue000"
    task = countdown(args)
    prefix = task.problem([3, 5, 2], 13).response_prefix if args.prompt is None else ""
    before, after = tokenizer.render_chat([{"role": "user", "content": mark}]).split(mark)
    names = sorted(dict(models[0].named_parameters()))
    return {
        "tokenizer": json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")),
        "stop": list(tokenizer.eos_token_ids),
        "vocab_size": tokenizer.vocab_size,
        "before": before,
        "after": after + prefix,
        "question": "[3, 5, 2] = 13" if args.prompt is None else args.prompt,
        "shapes": [[name, list(models[0].get_parameter(name).shape)] for name in names],
        "weights": [base64_fp32(m.get_parameter(name) for name in names) for m in models],
    }


def base64_fp32(tensors) -> str:
    flat = torch.cat([t.detach().float().flatten() for t in tensors])
    return base64.b64encode(flat.numpy().astype("<f4").tobytes()).decode()


# ---------------------------------------------------------------------------------------------------------------------
# The page


def page(facts: dict) -> str:
    """One HTML file with everything in it. Texts of the model are data: they never become markup."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGES), autoescape=True)
    scripts = ["explain.js"] + (["qwen2.js", "live.js"] if "live" in facts else [])
    return environment.get_template("explain.html").render(
        facts=facts,
        style=(PAGES / "explain.css").read_text(encoding="utf-8"),
        script="\n".join((PAGES / name).read_text(encoding="utf-8") for name in scripts),
        data=json.dumps(facts).replace("<", "\\u003c"),  # no text can close the script element it stands in
    )


# ---------------------------------------------------------------------------------------------------------------------
# Plain text


def print_text(facts: dict, console: Console) -> None:
    first, c = facts["looks"][0], facts["config"]
    console.print(
        f"{facts['names'][0]}: {facts['parameters']:,} parameters, {c['num_hidden_layers']} layers", style="bold"
    )
    row = " ".join(f"{visible(t['text'])}:{t['id']}" for t in first["tokens"])
    console.print(f"\n{len(first['tokens'])} tokens (text:id)\n{row}\n", markup=False)
    rows(console, "parts", ("part", "weight", "shapes", "times", "parameters", "FLOPs", "bytes"), [
        (p["name"], p["weight"], p["shape"], p["count"], f"{p['parameters']:,}", f"{p['flops']:,}", f"{p['bytes']:,}")
        for p in first["parts"]
    ])  # fmt: skip
    rows(console, "what RMSNorm divides by (root mean square)", ("layer", "norm", "mean", "last token"),
         [(n["layer"], n["norm"], n["mean"], n["last"]) for n in first["norms"]])  # fmt: skip
    rows(console, "RoPE: the last token's query, turned", ("layer", "head", "pair", "angle", "before", "after"), [
        (r["layer"], r["head"], r["pair"], f"{r['angle']:.3g}", r["before"], r["after"]) for r in first["rope"]
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
    rows(console, "next token", ("token", "logit", *FILTERS),
         [(visible(t["text"]), t["logit"], *(f"{p:.3f}" for p in t["p"].values())) for t in first["next"]])  # fmt: skip
    if "compare" in facts:
        print_comparison(facts, console)


def print_comparison(facts: dict, console: Console) -> None:
    moved, tokens = facts["compare"], facts["looks"][0]["tokens"]
    console.print(f"{facts['names'][0]} -> {facts['names'][1]}", style="bold")
    console.print(f"KL(after || before): {moved['mean_kl']:.4f} nats a token of the answer\n")
    order = sorted(range(len(tokens)), key=lambda i: -moved["kl"][i])[:10]
    rows(console, "where they differ most", ("after token", "KL of the next", "log-probability of the next one"), [
        (f"{i} {visible(tokens[i]['text'])}", f"{moved['kl'][i]:.4f}",
         f"{moved['rise'][i + 1]:+.3f}" if i + 1 < len(tokens) else "") for i in order
    ])  # fmt: skip
    rows(console, "next token", ("token", "before", "after"),
         [(visible(t["text"]), f"{t['before']:.4f}", f"{t['after']:.4f}") for t in moved["next"]])  # fmt: skip
    weights = sorted(moved["weights"], key=lambda w: -w["relative"])[:10]
    rows(console, "weights that moved most: |after - before| / |before|", ("weight", "moved by"),
         [(w["name"], f"{w['relative']:.2e}") for w in weights])  # fmt: skip


def rows(console: Console, title: str, header: tuple, body: list[tuple]) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in header:
        table.add_column(name)
    for cells in body:
        table.add_row(*(Text(str(cell)) for cell in cells))
    console.print(table, "")


def strongest(weights: list[float], tokens: list[dict]) -> tuple[str, str]:
    j = max(range(len(weights)), key=weights.__getitem__)
    return f"{j} {visible(tokens[j]['text'])}", f"{weights[j]:.3f}"


def visible(text: str) -> str:
    """A token's text on one line, control characters and blanks shown."""
    shown = text.replace("\n", "\u21b5").replace(" ", "\u00b7")
    return "".join(c if c.isprintable() else "\u25a1" for c in shown)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="countdown-tiny", help="folder, name under models/, or Hub id")
    parser.add_argument("--after", help="a second checkpoint of the same model to compare with")
    parser.add_argument("--prompt", help="a question, put into the chat template (default: a Countdown problem)")
    parser.add_argument("--raw", action="store_true", help="take --prompt as it is, without the chat template")
    parser.add_argument("--new-tokens", type=int, default=24, help="greedy tokens that are looked at with the prompt")
    parser.add_argument("--layers", type=int, nargs="+", help="layers whose attention is shown (default: four)")
    parser.add_argument("--heads", type=int, nargs="+", help="heads whose attention is shown (default: four)")
    parser.add_argument("--out", type=Path, default=Path("explain.html"), help="the page")
    args = parser.parse_args(argv)
    try:
        facts = explain(args)
        args.out.write_text(page(facts), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"explain.py: {error}", file=sys.stderr)
        return 2
    print_text(facts, Console() if sys.stdout.isatty() else Console(width=160))
    print(f"the page: {args.out} ({args.out.stat().st_size / 1e6:.1f} MB, needs no network)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
