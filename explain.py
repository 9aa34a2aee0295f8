"""Look inside a checkpoint: one text on its way through the model, as a page that needs no network, and as text.

    python explain.py                                           # the bundled model: writes explain.html, prints it
    python explain.py --after runs/NAME                         # before and after GRPO, and its --snapshots
    python explain.py --ckpt Qwen2.5-0.5B-Instruct --prompt "What is 12 + 7?" --layers 0 12 23 --heads 0 1
    python explain.py --text                                    # only print, write no page

The page shows one chosen token in every panel: next token, attention, logit lens, RMSNorm, RoPE. For a model of a few
million parameters it is live: the weights are in the page in fp32, 5.3 characters a parameter, and qwen2.js runs them
(forward pass with a cache, tokenizer, sampler). Then a reader can type a problem, move the temperature and watch the
model think, offline. Its logits are those of PyTorch to 1e-4. Half the precision would halve the page and show another
model's numbers. For a larger model the page is static, and says so: it holds the facts of one text.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from rich.console import Console

from math_task import CountdownTask
from qwen2_llm import Qwen2ForCausalLM
from rollout.generation import generate
from rollout.sampling import SamplingParams
from run.checkpoint import find_checkpoint
from run.flags import normalise, one_line, parse_flags
from run.options import BUNDLED_CKPT
from run.pretrained import load_pretrained, locate_pretrained
from run.run_folder import check_output
from run.terminal import complain, run_program, say
from study.anatomy import compare, look
from study.live import (
    LIVE_PARAMETERS,
    countdown_form,
    live,
    refuse_unknown_letters,
    scrubbed,
    telling_problem,
    why_not_live,
)
from study.tables import print_text
from tokenizer import Tokenizer

PAGES = Path(__file__).resolve().parent / "study" / "pages"
STATIC_SCRIPTS = ("page.js", "panels.js", "static.js", "picture.js")
LIVE_SCRIPTS = (
    "page.js", "qwen2.js", "countdown.js", "arithmetic.js", "panels.js", "live.js", "picture.js", "group.js", "tour.js",
)  # fmt: skip
QUESTION_MARK = "\ue000"  # stands where the reader's question goes: a letter that no template writes


@dataclass
class Options:
    """Look inside a checkpoint: one text on its way through the model, as a page that needs no network, and as text."""

    ckpt: str = BUNDLED_CKPT
    """Checkpoint: a folder, the name of one under assets/ or models/, or a Hugging Face repo id."""
    after: str | None = None
    """A second checkpoint of the same model to compare with, or the folder of a run for its last one."""
    prompt: str | None = None
    """A question, put into the chat template; None: a Countdown problem."""
    raw: bool = False
    """Take the prompt as it is, without the chat template."""
    new_tokens: int = 96
    """Longest response that the model writes at temperature 0, to be looked at with the prompt."""
    layers: tuple[int, ...] = ()
    """Layers whose attention is shown; none: up to four."""
    heads: tuple[int, ...] = ()
    """Heads whose attention and rotation are shown; none: up to four."""
    out: Path = Path("explain.html")
    """The page."""
    text: bool = False
    """Print only, and write no page."""


def explain(options: Options) -> dict[str, Any]:
    """All facts of the page. Raises ValueError or FileNotFoundError, each with one line."""
    folder = locate_pretrained(options.ckpt)
    model, tokenizer = load_pretrained(folder, torch.float32)
    models, names = [model], [Path(options.ckpt).name]
    after = locate_after(options.after) if options.after else None
    if after:
        models.append(load_pretrained(after, torch.float32)[0])
        names.append(after.name)
    parameters = sum(p.numel() for p in model.parameters())
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    trained = None if options.raw else countdown_form(description)
    refuse_unknown_letters(options.prompt or "", trained)
    prompt = prompt_pieces(options, tokenizer, models)
    ids = tokenizer.encode("".join(prompt))
    if not ids:
        raise ValueError("the prompt is empty; give --prompt a text")
    text = ids + continuation(model, tokenizer, ids, options.new_tokens)
    facts: dict[str, Any] = {
        "names": names, "config": model.config.to_dict(), "prompt_tokens": len(ids), "parameters": parameters,
    }  # fmt: skip
    if after:
        facts["compare"] = compare(model, models[1], tokenizer, text, start=len(ids) - 1)
    facts["looks"] = [
        look(m, tokenizer, text, layers=options.layers, heads=options.heads, start=len(ids) - 1) for m in models
    ]
    facts["not_live"] = why_not_live(parameters, description)
    if facts["not_live"] is None:
        facts["live"] = live(models, tokenizer, description, prompt, trained)
        facts["live"]["snapshots"] = scrubbed(after.parent.parent, model) if after else None  # a run's folder
    return facts


def locate_after(name: str) -> Path:
    """The folder of a second checkpoint; of a run's folder its last one. Raises FileNotFoundError with one line."""
    return find_checkpoint(name) if (Path(name) / "checkpoints").is_dir() else locate_pretrained(name)


def continuation(model: Qwen2ForCausalLM, tokenizer: Tokenizer, ids: list[int], new_tokens: int) -> list[int]:
    """The model's response at temperature 0, without its last token: that is the one which the facts predict."""
    if new_tokens < 1:
        return []
    greedy = SamplingParams(n=1, max_new_tokens=new_tokens, temperature=0.0)
    return generate(model, [ids], greedy, tokenizer=tokenizer)[0].response_ids[:-1]


def prompt_pieces(options: Options, tokenizer: Tokenizer, models: list[Qwen2ForCausalLM]) -> tuple[str, str, str]:
    """The prompt as the model reads it: chat template, question, and the rest with the opening of the thought.

    A small model is taken for the bundled one or its like: it knows the short form of Countdown's prompts only.
    """
    if options.raw:
        return "", options.prompt or "", ""
    small = sum(p.numel() for p in models[0].parameters()) <= LIVE_PARAMETERS
    if small and options.prompt is None:
        problem = telling_problem(models, tokenizer)
    else:
        problem = CountdownTask(prompt_style="short" if small else "full").problem([3, 5, 2], target=13)
    messages = problem.messages if options.prompt is None else [{"role": "user", "content": options.prompt}]
    opening = problem.response_prefix if small or options.prompt is None else ""
    asked = [*messages[:-1], {"role": "user", "content": QUESTION_MARK}]
    before, _, after = tokenizer.render_chat(asked).partition(QUESTION_MARK)
    return before, messages[-1]["content"], after + opening


# ---------------------------------------------------------------------------------------------------------------------
# The page


def page(facts: dict[str, Any]) -> str:
    """One HTML file with everything in it. Texts of the model are data: they never become markup."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGES), autoescape=True)
    scripts = [*(LIVE_SCRIPTS if "live" in facts else STATIC_SCRIPTS)]
    if "compare" in facts:
        scripts += ["compare.js", *(["swap.js"] if "live" in facts else [])]
    if facts.get("live", {}).get("snapshots"):
        scripts.append("scrub.js")
    data = _without_what_the_page_computes(facts) if "live" in facts else facts
    return environment.get_template("explain.html").render(
        facts=facts,
        style="".join((PAGES / name).read_text(encoding="utf-8") for name in ("base.css", "explain.css")),
        script="\n".join((PAGES / name).read_text(encoding="utf-8") for name in scripts),
        data=json.dumps(data).replace("<", "\\u003c"),  # no text can close the script element it stands in
    )


def _without_what_the_page_computes(facts: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in facts.items() if name not in ("looks", "compare")}
    return kept | ({"compare": {"weights": facts["compare"]["weights"]}} if "compare" in facts else {})


def main(argv: list[str]) -> int:
    try:
        options = parse_flags(Options, normalise(argv, {}))
        if not options.text:
            check_output(options.out, "--out")
        facts = explain(options)
        if not options.text:
            options.out.write_text(page(facts), encoding="utf-8")
    except (ValueError, OSError) as error:
        complain(f"explain.py: {one_line(error)}")
        return 2
    print_text(facts, Console(width=None if sys.stdout.isatty() else 160))
    if not options.text:
        size = options.out.stat().st_size / 1e6
        kind = f"static: {facts['not_live']}" if facts["not_live"] else "live"
        say(f"the page: {options.out} ({size:.1f} MB, needs no network; {kind})")
    return 0


if __name__ == "__main__":
    sys.exit(run_program("explain.py", main))
