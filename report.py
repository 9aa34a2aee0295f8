"""A run, or several side by side, as one page that needs no network.

    python report.py runs/NAME                       # writes runs/NAME/report.html
    python report.py runs/A runs/B --out compare.html
    python report.py runs/NAME --after               # also how much likelier the last checkpoint makes the samples
    python report.py runs/NAME --png FOLDER          # also a picture of every chart, drawn by matplotlib
    python report.py runs/NAME --step 40             # the token microscope shows all responses of step 40
    python report.py --follow runs/NAME              # serves the page, which grows while the run goes on

The page is made from the files of a run (config.yaml, metrics.jsonl, samples.jsonl, held_out.jsonl, machine.json). The
run may still be going on, or may have been killed in the middle of a line. Lines and values of a wrong type are left
out, and the page and standard error say so. The charts are drawn by plotly, whose camera button saves a picture. Its
script is in the page, and is nearly all of the page's 4.9 MB.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline
import torch

from data_types import Episode
from run.checkpoint import find_checkpoint
from run.flags import ArgumentParser, one_line
from run.pretrained import load_policy
from run.run_folder import check_output
from run.terminal import complain, run_program, say
from study.follow import follow
from study.microscope import microscope
from study.pictures import save_pictures
from study.responses import marked_tokens
from study.run_facts import facts
from study.run_files import Record, Run, read_run
from study.turns import pieces, sampled_mask
from tokenizer import Tokenizer
from update.scoring import score_episodes

PAGES = Path(__file__).resolve().parent / "study" / "pages"
SCRIPTS = ("page.js", "charts.js", "microscope.js", "report.js")
GROUPS = 3  # sampled groups that are shown of the first step and of the last


def groups(run: Run) -> list[dict[str, Any]]:
    """Whole groups of the first logged step and of the last, those with tokens first."""
    found: list[dict[str, Any]] = []
    for step in sorted({run.samples[0]["step"], run.samples[-1]["step"]}) if run.samples else ():
        members: dict[int, list[Record]] = defaultdict(list)
        for sample in run.samples:
            if sample["step"] == step:
                members[sample["group_id"]].append({name: v for name, v in sample.items() if name != "update"})
        ordered = sorted(members.values(), key=lambda group: "tokens" not in group[0])
        found += [
            {"step": step, "problem": g[0]["problem"], "prompt": g[0]["prompt"], "answers": g} for g in ordered[:GROUPS]
        ]
    return found


def mark_false_sums(shown: dict[str, Any]) -> None:
    """Give every response that is shown its text in pieces (false sums, text of a tool), and the numbers of the tokens
    that touch a false sum."""
    pairs = [pair for held_out in shown["held_out"] for pair in held_out["pairs"]]
    answers = [answer for pair in pairs for both in pair["ways"].values() for answer in both]
    answers += [answer for run in shown["groups"] for group in run for answer in group["answers"]]
    for answer in answers:
        answer["pieces"] = pieces(answer)
        answer["false_tokens"] = marked_tokens(answer.get("tokens", []), answer["response"])


def add_ratios(run: Run, shown: list[dict[str, Any]], after: str = "latest") -> None:
    """Each token's ratio: its probability under a later checkpoint, by that under the policy that drew it.

    after: a checkpoint as `--ckpt` takes it; "latest" is the run's last one. Raises FileNotFoundError if there is none,
    and ValueError if the samples were not drawn by a model with its vocabulary.
    """
    model, tokenizer = load_policy(run.config, find_checkpoint(run.folder) if after == "latest" else after)
    answers = [a for group in shown for a in group["answers"] if "token_ids" in a and None not in a["token_logprobs"]]
    largest = max((i for a in answers for i in (*a["prompt_ids"], *a["token_ids"])), default=0)
    if largest >= model.config.vocab_size:
        raise ValueError(f"{run.folder}/samples.jsonl: token id {largest} is not in the vocabulary of --after {after}")
    answers = [a for a in answers if a["prompt_ids"] and a["token_ids"]]
    episodes = [_episode(a, tokenizer, run.config.temperature) for a in answers]
    for answer, episode, scores in zip(answers, episodes, score_episodes(model, episodes)):
        sampled = [True] * len(answer["token_ids"]) if episode.sampled is None else episode.sampled
        logp = torch.tensor(answer["token_logprobs"])  # of a token that the environment gave: ratio 1
        logp[torch.tensor(sampled)] -= scores.logp.float()
        answer["ratios"] = [round(x, 4) if s else 1.0 for x, s in zip((-logp).exp().tolist(), sampled)]


def _episode(answer: Record, tokenizer: Tokenizer, temperature: float) -> Episode:
    return Episode(
        group_id=answer["group_id"], prompt_ids=answer["prompt_ids"], response_ids=answer["token_ids"],
        logprobs=answer["token_logprobs"], text=answer["response"], finish_reason=answer["finish_reason"],
        temperature=temperature, vocab_size=tokenizer.vocab_size,
        sampled=sampled_mask(answer),
    )  # fmt: skip


def gather(folders: list[Path], steps: list[int], after: str | None = None) -> dict[str, Any]:
    """Read the runs. Returns everything that the page shows. Raises ValueError or OSError with one line."""
    runs = [read_run(folder) for folder in folders]
    shown = facts(runs)
    shown["groups"] = [groups(run) for run in runs]
    shown["microscope"] = [microscope(run, steps) for run in runs]
    shown["progress"] = ", ".join(f"{run.name}, step {run.metrics.index[-1]} of {run.config.steps}" for run in runs)
    if after:
        for run, found in zip(runs, shown["groups"]):
            add_ratios(run, found, after)
    mark_false_sums(shown)
    return shown


def page(shown: dict[str, Any], following: bool = False, scripts: bool = True) -> str:
    """One HTML file with everything in it. Text of a model is data: it never becomes markup.

    following: the page asks its server for news. scripts: False leaves the scripts out, for an answer to that.
    """
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGES), autoescape=True)
    names = [*SCRIPTS, "follow.js"] if following else SCRIPTS
    return environment.get_template("report.html").render(
        facts=shown,
        following=following,
        style="".join((PAGES / name).read_text(encoding="utf-8") for name in ("base.css", "report.css")),
        plotly=plotly.offline.get_plotlyjs() if scripts else "",
        script="\n".join((PAGES / name).read_text(encoding="utf-8") for name in names),
        data=json.dumps(_finite(shown), allow_nan=False).replace("<", "\\u003c"),
    )


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON cannot write."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not go together."""
    for name in ("out", "after", "png"):
        if args.follow and getattr(args, name):
            raise ValueError(
                f"--{name} does not go with --follow, which writes no file and loads no model: leave it out"
            )
    if args.port and not args.follow:
        raise ValueError(f"--port {args.port} is the port of --follow: add --follow, or leave --port out")


def _port(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text[:40]!r}, expected a port from 1 to 65535")


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first run)")
    after = "score the shown samples with a later checkpoint (default: each run's last one)"
    parser.add_argument("--after", nargs="?", const="latest", metavar="CHECKPOINT", help=after)
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="also write every chart as a picture there")
    step = "show all responses of this step in the token microscope (repeatable; default: the first and the last)"
    parser.add_argument("--step", action="append", type=int, default=[], metavar="N", help=step)
    serve = "serve the page on the loopback address; it grows while the run goes on (Ctrl-C ends it)"
    parser.add_argument("--follow", action="store_true", help=serve)
    parser.add_argument("--port", type=_port, help="port of --follow (default: the first free one from 8765 on)")
    try:
        args = parser.parse_args(argv)
        out = args.out or args.runs[0] / "report.html"
        check_flags(args)
        if args.follow:
            return follow(
                args.runs,
                build=lambda: gather(args.runs, args.step),
                render=lambda shown, scripts: page(shown, following=True, scripts=scripts),
                port=args.port,
            )
        if args.out or args.runs[0].is_dir():
            check_output(out, "--out")
        shown = gather(args.runs, args.step, args.after)
        if args.png:
            save_pictures(shown["charts"], shown["names"], args.png)
        out.write_text(page(shown), encoding="utf-8", errors="replace")  # a lone surrogate has no UTF-8
    except (ValueError, OSError) as error:
        complain(f"report.py: {one_line(error)}")
        return 2
    for note in shown["notes"]:
        complain(f"report.py: {one_line(ValueError(note))}")
    say(f"{out} ({out.stat().st_size / 1e6:.1f} MB, needs no network)")
    return 0


if __name__ == "__main__":
    sys.exit(run_program("report.py", main))
