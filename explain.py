"""Look inside a checkpoint: one text on its way through the model, as a page that needs no network, and as text.

    python explain.py                                           # the bundled model: writes explain.html, prints it
    python explain.py --after runs/NAME/checkpoints/step-000075 # before and after GRPO, side by side
    python explain.py --ckpt Qwen2.5-0.5B-Instruct --prompt "What is 12 + 7?" --layers 0 12 23 --heads 0 1
    python explain.py --text                                    # only print, write no page

The page holds every fact of `anatomy.look`. For a model of a few million parameters it is live, too: the weights are in
the page in fp32, 5.3 characters a parameter, and qwen2.js runs them (forward pass with a cache, tokenizer, sampler), so
that one can type a problem, move the temperature and watch the model think, offline. Its logits are those of PyTorch to
1e-4; half the precision would halve the page and show another model's numbers.
"""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from rich.console import Console
from rich.table import Table

from math_task import CountdownTask
from qwen2_llm import Qwen2ForCausalLM
from rollout.generation import generate
from rollout.sampling import SamplingParams
from run.flags import normalise, one_line, parse_flags
from run.options import BUNDLED_CKPT
from run.pretrained import load_pretrained, locate_pretrained
from run.progress import plain
from run.terminal import complain, printable, run_program
from study.anatomy import FILTERS, compare, look
from tokenizer import Tokenizer

PAGES = Path(__file__).resolve().parent / "study" / "pages"
LIVE_PARAMETERS = 5_000_000  # a page with the weights of more would take a browser too long


@dataclass
class Options:
    """Look inside a checkpoint: one text on its way through the model, as a page that needs no network, and as text."""

    ckpt: str = BUNDLED_CKPT
    """Checkpoint: a folder, the name of one under assets/ or models/, or a Hugging Face repo id."""
    after: str | None = None
    """A second checkpoint of the same model, such as one behind training, to compare with."""
    prompt: str | None = None
    """A question, put into the chat template; None: a Countdown problem."""
    raw: bool = False
    """Take the prompt as it is, without the chat template."""
    new_tokens: int = 24
    """Tokens that the model writes at temperature 0, to be looked at with the prompt."""
    layers: tuple[int, ...] = ()
    """Layers whose attention is shown; none: up to four."""
    heads: tuple[int, ...] = ()
    """Heads whose attention and rotation are shown; none: up to four."""
    out: Path = Path("explain.html")
    """The page."""
    text: bool = False
    """Print only, and write no page."""


def explain(options: Options) -> dict:
    """All facts of the page. Raises ValueError or FileNotFoundError, each with one line."""
    folder = locate_pretrained(options.ckpt)
    model, tokenizer = load_pretrained(folder, torch.float32)
    small = sum(p.numel() for p in model.parameters()) <= LIVE_PARAMETERS
    prompt = prompt_pieces(options, tokenizer, small)
    ids = tokenizer.encode("".join(prompt))
    if not ids:
        raise ValueError("the prompt is empty; give --prompt a text")
    text = ids + continuation(model, tokenizer, ids, options.new_tokens)
    shown = {"layers": options.layers, "heads": options.heads, "start": len(ids) - 1}
    facts = {
        "names": [Path(options.ckpt).name], "config": model.config.to_dict(), "prompt_tokens": len(ids),
        "parameters": sum(p.numel() for p in model.parameters()),
        "looks": [look(model, tokenizer, text, **shown)],
    }  # fmt: skip
    models = [model]
    if options.after:
        models.append(load_pretrained(locate_pretrained(options.after), torch.float32)[0])
        facts["names"].append(Path(options.after).name)
        facts["compare"] = compare(model, models[1], tokenizer, text, start=len(ids) - 1)
        facts["looks"].append(look(models[1], tokenizer, text, **shown))
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if small and reads_like_qwen2(description):
        facts["live"] = live(models, tokenizer, description, prompt)
    return facts


def continuation(model: Qwen2ForCausalLM, tokenizer: Tokenizer, ids: list[int], new_tokens: int) -> list[int]:
    """What the model writes at temperature 0, without the last token: that is the one which the facts predict."""
    if new_tokens < 1:
        return []
    greedy = SamplingParams(n=1, max_new_tokens=new_tokens, temperature=0.0)
    return generate(model, [ids], greedy, tokenizer=tokenizer)[0].response_ids[:-1]


def prompt_pieces(options: Options, tokenizer: Tokenizer, small: bool) -> tuple[str, str, str]:
    """The prompt as the model reads it: chat template, question, and the rest with the opening of the thought.

    A small model is taken for the bundled one or its like: it knows the short form of Countdown's prompts only.
    """
    if options.raw:
        return "", options.prompt or "", ""
    problem = CountdownTask(prompt_style="short" if small else "full").problem([3, 5, 2], target=13)
    messages = problem.messages if options.prompt is None else [{"role": "user", "content": options.prompt}]
    opening = problem.response_prefix if small or options.prompt is None else ""
    mark = "\ue000"  # where the reader's question goes: a letter that no template writes
    before, _, after = tokenizer.render_chat([*messages[:-1], {"role": "user", "content": mark}]).partition(mark)
    return before, messages[-1]["content"], after + opening


def reads_like_qwen2(description: dict) -> bool:
    """Is this tokenizer.json of the kind that qwen2.js reads: NFC, one split, bytes as letters, merges?"""
    normalizer, splits = description.get("normalizer") or {}, description.get("pre_tokenizer") or {}
    kinds = [part.get("type") for part in splits.get("pretokenizers", [])]
    model = description["model"]
    plain = model.get("type") == "BPE" and not model.get("ignore_merges")
    return plain and normalizer.get("type") == "NFC" and kinds == ["Split", "ByteLevel"]


def live(models: list[Qwen2ForCausalLM], tokenizer: Tokenizer, description: dict, prompt: tuple[str, str, str]) -> dict:
    """What qwen2.js needs: tokenizer, prompt around the question, and the weights as base64 of little-endian fp32."""
    names = sorted(dict(models[0].named_parameters()))
    return {
        "tokenizer": description,
        "stop": list(tokenizer.eos_token_ids),
        "vocab_size": tokenizer.vocab_size,
        "before": prompt[0],
        "question": prompt[1],
        "after": prompt[2],
        "frequencies": models[0].model.rope.compute_frequencies().tolist(),
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
    scripts = ["explain.js"] + (["qwen2.js", "arithmetic.js", "live.js"] if "live" in facts else [])
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
    size = f"{facts['parameters']:,} parameters, {c['num_hidden_layers']} layers"
    console.print(plain(f"{facts['names'][0]}: {size}"), style="bold")
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
    at, offset = first["shown"], len(first["tokens"]) - len(first["next"])
    title = f"next token where the model is least sure, {place(first['tokens'], at)}"
    rows(console, title, ("token", "logit", *FILTERS), [
        (visible(t["text"]), t["logit"], *(f"{p:.3f}" if p else "-" for p in t["p"].values()))
        for t in first["next"][at - offset]
    ])  # fmt: skip
    if "compare" in facts:
        print_comparison(facts, console)


def print_comparison(facts: dict, console: Console) -> None:
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


def rows(console: Console, title: str, header: tuple, body: list[tuple]) -> None:
    console.print(title, style="italic", markup=False)  # a table's own title would be as narrow as the table
    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name)
    for cells in body:
        table.add_row(*(plain(str(cell)) for cell in cells))
    console.print(table, "")


def place(tokens: list[dict], at: int) -> str:
    return f"after token {at} {visible(tokens[at]['text'])}"


def strongest(weights: list[float], tokens: list[dict]) -> tuple[str, str]:
    j = max(range(len(weights)), key=weights.__getitem__)
    return f"{j} {visible(tokens[j]['text'])}", f"{weights[j]:.3f}"


def visible(text: str) -> str:
    """A token's text on one line. Line ends, blanks and control characters are shown."""
    shown = text.replace("\n", "\u21b5").replace(" ", "\u00b7")
    return printable(shown, keep="")


def main(argv: list[str]) -> int:
    try:
        options = parse_flags(Options, normalise(argv, {}))
        if not (options.text or options.out.parent.is_dir()):
            raise FileNotFoundError(f"--out {options.out}: there is no folder {options.out.parent}; make it first")
        facts = explain(options)
        if not options.text:
            options.out.write_text(page(facts), encoding="utf-8")
    except (ValueError, OSError) as error:
        complain(f"explain.py: {one_line(error)}")
        return 2
    print_text(facts, Console(width=None if sys.stdout.isatty() else 160))
    if not options.text:
        size, live = options.out.stat().st_size / 1e6, "live" in facts
        kind = "live" if live else "not live: the model is too large for it, or its tokenizer of another kind"
        print(f"the page: {options.out} ({size:.1f} MB, needs no network; {kind})")
    return 0


if __name__ == "__main__":
    sys.exit(run_program("explain.py", main))
