"""The turns of a response that calls a tool: the text that the policy sampled, and the text that its environment gave.

    for text, given in turns_of(record): ...        # a line of samples.jsonl or held_out.jsonl
    html = turns_html(record)                       # the same, with <ins class="given"> around given text

A run writes both fields only for responses with a tool. A file may have been edited by hand, so a field that does not
fit its response is left out.
"""

from __future__ import annotations

import html
from typing import Any

from data_types import Turn


def turns_of(record: dict[str, Any]) -> list[Turn]:
    """The response in pieces, each with whether the environment gave it. Without a tool it is one sampled piece."""
    turns = record.get("turns")
    valid = isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("text"), str) and isinstance(turn.get("given"), bool)
        for turn in turns
    )
    if not valid or not turns:
        return [Turn(record["response"], False)]
    return [Turn(turn["text"], turn["given"]) for turn in turns]


def turns_html(record: dict[str, Any]) -> str:
    """The response as HTML. All text is escaped, and given text is marked."""
    pieces = ((html.escape(text), given) for text, given in turns_of(record))
    return "".join(f'<ins class="given">{text}</ins>' if given else text for text, given in pieces)


def sampled_mask(record: dict[str, Any]) -> list[bool] | None:
    """For each of `token_ids`, whether the policy sampled it. None: all of them."""
    mask = record.get("token_sampled")
    fits = isinstance(mask, list) and len(mask) == len(record["token_ids"]) and all(isinstance(m, bool) for m in mask)
    return mask if fits else None
