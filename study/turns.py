"""The turns of a response that calls a tool: the text that the policy sampled, and the text that its environment gave.

    for text, given in turns_of(record): ...        # a line of samples.jsonl or held_out.jsonl
    for text, is_false_sum, given in pieces(record): ...     # cut where a false sum begins or ends as well

A run writes both fields only for responses with a tool. A file may have been edited by hand, so a field that does not
fit its response is left out.
"""

from __future__ import annotations

from typing import Any

from data_types import Turn
from study.responses import marked


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


def pieces(record: dict[str, Any]) -> list[tuple[str, bool, bool]]:
    """The response as (text, whether it is a false sum, whether the environment gave it), in order.

    Turns that do not spell the response, as in a file that was edited by hand, are left out.
    """
    turns = turns_of(record)
    if "".join(turn.text for turn in turns) != record["response"]:
        turns = [Turn(record["response"], False)]
    found: list[tuple[str, bool, bool]] = []
    at = 0
    ends = [(sum(len(turn.text) for turn in turns[: i + 1]), turn.given) for i, turn in enumerate(turns)]
    for text, wrong in marked(record["response"]):
        stop = at + len(text)
        for end, given in ends:
            if at < stop and at < end:
                cut = min(stop, end)
                found.append((record["response"][at:cut], wrong and not given, given))
                at = cut
    return found


def sampled_mask(record: dict[str, Any]) -> list[bool] | None:
    """For each of `token_ids`, whether the policy sampled it. None: all of them."""
    mask = record.get("token_sampled")
    fits = isinstance(mask, list) and len(mask) == len(record["token_ids"]) and all(isinstance(m, bool) for m in mask)
    return mask if fits else None
