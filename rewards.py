"""What a response earns for its form: the format reward, and where its answer stands.

The format is that of the lineage (GRPO-Zero, NanoGRPO): the thought in `<think> </think>`, then white space, then the
answer in `<answer> </answer>`, and nothing after. It departs from the lineage in two ways. Tags are found with
`str.find` and counted, not matched by a regex: a regex with two lazy stars needs quadratic time on hostile text, and
lets a second `</think>` or `<answer>` slip through as content. And an answer counts only where the thought has ended.

The rule for the answer, in full: the answer is what stands between `<answer>` and `</answer>` behind the first
`</think>` (in the whole text where there are no think tags at all). There must be exactly one such pair, and no think
tag behind the first `</think>`. So an answer block inside the thought does not count, two answer blocks behind it are
no answer, nested tags are no answer, and an unfinished thought has no answer. Text behind `</answer>` costs the full
format but not the answer.
"""

from __future__ import annotations

from data_types import Problem

THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE = "<think>", "</think>", "<answer>", "</answer>"
THINK_CREDIT, ANSWER_CREDIT = 0.1, 0.5  # the lineage's partial credit for a pair of tags


def whole_text(problem: Problem, response: str) -> str:
    """The assistant's text that is judged: the `<think>` of the response prefix, where it has one, and the response.

    A response that opens its thought again is taken as it is: one `<think>` is enough.
    """
    prefilled = THINK_OPEN in problem.response_prefix and not response.lstrip().startswith(THINK_OPEN)
    return (THINK_OPEN if prefilled else "") + response


def format_reward(text: str) -> float:
    """1.0 for `<think>...</think>`, white space, `<answer>...</answer>` and nothing after, each tag once.

    Otherwise 0.1 for a think pair anywhere plus 0.5 for an answer pair anywhere. `text` includes the opening `<think>`.
    """
    tags = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
    answer_part = text.partition(THINK_CLOSE)[2].lstrip()
    in_order = (
        text.startswith(THINK_OPEN) and answer_part.startswith(ANSWER_OPEN) and answer_part.endswith(ANSWER_CLOSE)
    )
    if in_order and all(text.count(tag) == 1 for tag in tags):
        return 1.0
    think, answer = _has_pair(text, THINK_OPEN, THINK_CLOSE), _has_pair(text, ANSWER_OPEN, ANSWER_CLOSE)
    return THINK_CREDIT * think + ANSWER_CREDIT * answer


def _has_pair(text: str, opening: str, closing: str) -> bool:
    start = text.find(opening)
    return start >= 0 and text.find(closing, start + len(opening)) >= 0


def answer_block(text: str) -> str | None:
    """What stands in the answer tags, by the rule in the module's docstring; None where there is no answer."""
    if THINK_OPEN in text or THINK_CLOSE in text:
        text = text.partition(THINK_CLOSE)[2]
    once = text.count(ANSWER_OPEN) == 1 and text.count(ANSWER_CLOSE) == 1
    if not once or THINK_OPEN in text or THINK_CLOSE in text:
        return None
    start, end = text.find(ANSWER_OPEN) + len(ANSWER_OPEN), text.find(ANSWER_CLOSE)
    return text[start:end] if start <= end else None


def think_block(text: str) -> str:
    """The thought: what stands before the first `</think>`, all of it where the thought never ends."""
    return text.partition(THINK_CLOSE)[0].removeprefix(THINK_OPEN)
