"""Table of the products of two numbers above 9 in an arithmetic run, by the way they are calculated.

    python docs/workings.py runs/digits-0/samples.jsonl              # every ten steps, a line of a table
    python docs/workings.py docs/results/digits-qwen2.5-coder-0.5b/seed-0-answers.jsonl

The first file belongs to a run. With `--keep FILE` its questions and responses go to a small file like the second one.
A response is `by digits` if an equation has further products on its right side (`65 * 90 = 60 * 90 + 5 * 90`).
Otherwise it is `by heart`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

KINDS = ("no large product", "large product by digits", "large product by heart")


def short(record: dict) -> dict:
    """A line of samples.jsonl, or of a kept file, as question, response, and whether it is right."""
    if "question" in record:
        return record
    question = re.search(r"What is ([\d+\-* ]+)\?", record["prompt"]).group(1)
    solved = record["reward_parts"]["answer"] == 1
    return {"step": record["step"], "question": question, "response": record["response"], "solved": solved}


def kind(question: str, response: str) -> str:
    """The one of KINDS that a response belongs to."""
    terms = question.split()
    products = [(terms[i - 1], terms[i + 1]) for i, term in enumerate(terms) if term == "*"]
    if not any(min(int(a), int(b)) > 9 for a, b in products):
        return KINDS[0]
    return KINDS[1] if re.search(r"=[^=\n]*\*", response) else KINDS[2]


def table(records: list[dict], every: int) -> list[str]:
    """Lines of a Markdown table: for each span of steps and kind, the share of right responses and their number."""
    cells = defaultdict(list)
    for record in records:
        cells[(record["step"] - 1) // every, kind(record["question"], record["response"])].append(record["solved"])
    lines = ["| steps | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for span in sorted({span for span, _ in cells}):
        found = [cells[span, name] for name in KINDS]
        rates = [f"{sum(right) / len(right):.2f} of {len(right)}" if right else "" for right in found]
        lines.append(f"| {span * every + 1} to {(span + 1) * every} | " + " | ".join(rates) + " |")
    return lines


def report(doc: str, short: Callable[[dict], dict], table: Callable[[list[dict], int], list[str]]) -> None:
    """The command line: read the samples, keep them shortened if asked, print their table."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--every", type=int, default=10, help="steps per line of the table")
    parser.add_argument("--keep", type=Path, help="write the questions and responses here")
    options = parser.parse_args()
    if not options.samples.is_file():
        parser.error(f"{options.samples} is no file; expected the samples.jsonl of a run, or a file made with --keep")
    records = [short(json.loads(line)) for line in options.samples.read_text(encoding="utf-8").splitlines()]
    if options.keep:
        options.keep.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print("\n".join(table(records, options.every)))


if __name__ == "__main__":
    report(__doc__, short, table)
