"""What a response earns for its form: format, language, repetition, length; and where its answer stands.

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

import re

from data_types import Problem
from tasks.expressions import false_sums

THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE = "<think>", "</think>", "<answer>", "</answer>"
THINK_CREDIT, ANSWER_CREDIT = 0.1, 0.5  # the lineage's partial credit for a pair of tags

# Sets of weights that are known by what they pay: make_task("gsm8k", **REWARD_PRESETS["correct-format-language"])
REWARD_PRESETS = {
    "lineage": {"answer_weight": 1.0, "format_weight": 0.1},
    "correct-format-language": {"answer_weight": 1.0, "format_weight": 0.25, "language_weight": 0.10},
}

MAX_JUDGED_CHARS = 20_000  # language and repetition look at so much of a text: bounded time
_LETTER = re.compile(r"[^\W\d_]")
_LATIN, _HAN = "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff", "\u3400-\u4dbf\u4e00-\u9fff"
SCRIPTS = {
    "latin": _LATIN,
    "greek": "\u0370-\u03ff\u1f00-\u1fff",
    "cyrillic": "\u0400-\u052f",
    "hebrew": "\u0590-\u05ff",
    "arabic": "\u0600-\u06ff\u0750-\u077f",
    "devanagari": "\u0900-\u097f",
    "thai": "\u0e00-\u0e7f",
    "chinese": _HAN,
    "japanese": _HAN + "\u3005\u3040-\u30ff",
    "korean": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3",
}


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
    """The thought: the text before the first `</think>`, or all of it if the thought never ends."""
    start, end = len(THINK_OPEN) if text.startswith(THINK_OPEN) else 0, text.find(THINK_CLOSE)
    return text[start : end if end >= 0 else None]  # one copy: a response may have a million characters


def language_consistency(text: str, script: str) -> float:
    """Share of the letters that belong to a script of SCRIPTS, 0 to 1; 1 where there are none (DeepSeek-R1, 2.3.1).

    In steps of a tenth: advantages are divided by a group's deviation, so that a share of .998 beside .999 would turn a
    single stray letter into a full-strength gradient.
    """
    letters = "".join(_LETTER.findall(text[:MAX_JUDGED_CHARS]))
    own = len(re.findall(f"[{SCRIPTS[script]}]", letters))
    return round(own / len(letters), 1) if letters else 1.0


def repetition_penalty(text: str, n: int = 3) -> float:
    """Minus the share of word n-grams that are repetitions, -1 to 0 (Yeo et al. 2025, arXiv 2502.03373, 4.3)."""
    words = text[:MAX_JUDGED_CHARS].lower().split()
    ngrams = list(zip(*(words[i:] for i in range(n))))
    return len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0


def arithmetic_penalty(thought: str) -> float:
    """-1 where the thought holds a false sum, `3 + 5 = 9`, else 0.

    Not the share of false ones: a longer thought would then make each of them cheaper.
    """
    wrong, _ = false_sums(thought)
    return -1.0 if wrong else 0.0


def soft_overlong_penalty(length: int, max_length: int, cache_length: int) -> float:
    """0 up to max_length - cache_length tokens, then in a line down to -1 at max_length and beyond (DAPO, eq. 13)."""
    if not 0 < cache_length <= max_length:
        raise ValueError(
            f"soft overlong penalty: cache_length is {cache_length}, expected 1 to max_length {max_length}"
        )
    return max(-1.0, min(0.0, (max_length - cache_length - length) / cache_length))
