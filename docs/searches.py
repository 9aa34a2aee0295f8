"""Table of the searches of a Countdown run: attempts, repetitions, false sums, false claims.

    python docs/searches.py runs/countdown-0/samples.jsonl              # every ten steps, a line of a table
    python docs/searches.py docs/results/countdown-in-order-qwen2.5-coder-0.5b/seed-0-answers.jsonl

The first file belongs to a run. With `--keep FILE` its problems and responses go to a small file like the second one.

An attempt is a line of the thought with a sum (the form of tasks/search_traces.py). It is repeated if an earlier line
of the response is the same. It has noticed the target if its last operation is the one of four that comes closest.
A false claim is a response that says `ok` and is not right.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from workings import report

from tasks.expressions import false_sums

COLUMNS = ("solved", "attempts an answer", "repeated", "noticed", "false sums", "false claims", "tokens an answer")


def short(record: dict) -> dict:
    """A line of samples.jsonl as problem, response, its number of tokens, and whether it is right."""
    if "prompt" not in record:
        return record
    solved = record["reward_parts"]["answer"] == 1
    kept = {name: record[name] for name in ("step", "problem", "response")}
    return {**kept, "tokens": record["response_tokens"], "solved": solved}


def noticed(attempt: str, target: int) -> bool:
    """Whether the last operation of a line, its numbers given, is one of those that come closest to `target`."""
    sums = re.findall(r"(\d+)([-+*/])(\d+)", attempt)
    if not sums:
        return False
    a, operator, b = int(sums[-1][0]), sums[-1][1], int(sums[-1][2])
    misses = {"+": abs(a + b - target), "-": abs(a - b - target), "*": abs(a * b - target)}
    if b and a % b == 0:
        misses["/"] = abs(a // b - target)
    return misses.get(operator) == min(misses.values())


def count(record: dict) -> dict[str, float]:
    """Contribution of one response to each column."""
    thought = record["response"].partition("</think>")[0]
    attempts = [line for line in thought.splitlines() if "=" in line]
    target = int(record["problem"].rpartition("=")[2])
    wrong, written = false_sums(thought)
    return {
        "solved": record["solved"],
        "attempts": len(attempts),
        "repeated": len(attempts) - len(set(attempts)),
        "noticed": sum(noticed(line, target) for line in attempts),
        "wrong": wrong,
        "written": written,
        "false claims": " ok" in thought and not record["solved"],
        "tokens": record["tokens"],
    }


def table(records: list[dict], every: int) -> list[str]:
    """Lines of a Markdown table, one per span of steps: rates over its responses, attempts or sums."""
    spans = defaultdict(list)
    for record in records:
        spans[(record["step"] - 1) // every].append(count(record))
    lines = ["| steps | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for span, answers in sorted(spans.items()):
        total = {name: sum(answer[name] for answer in answers) for name in answers[0]}
        cells = [
            f"{total['solved'] / len(answers):.2f} of {len(answers)}",
            f"{total['attempts'] / len(answers):.1f}",
            f"{total['repeated'] / max(total['attempts'], 1):.2f}",
            f"{total['noticed'] / max(total['attempts'], 1):.2f}",
            f"{total['wrong'] / max(total['written'], 1):.2f}",
            f"{total['false claims'] / len(answers):.2f}",
            f"{mean(answer['tokens'] for answer in answers):.0f}",
        ]
        lines.append(f"| {span * every + 1} to {(span + 1) * every} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    report(__doc__, short, table)
