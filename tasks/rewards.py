"""Rewards for the form of a response (format, language, repetition, length), and the place of its answer.

The format is that of GRPO-Zero and NanoGRPO: the thought in `<think> </think>`, then white space, then the answer in
`<answer> </answer>`, and nothing after. Two things differ. Tags are found with `str.find` and counted. A regex with two
lazy stars needs quadratic time on hostile text, and accepts a second `</think>` or `<answer>` as content. And an answer
counts only behind the end of the thought.

The complete rule: the answer is the text between `<answer>` and `</answer>` behind the first `</think>` (in the whole
text if there are no think tags). There must be exactly one such pair, and no think tag behind the first `</think>`. So
an answer block inside the thought does not count. Two answer blocks behind it, nested tags, and an unfinished thought
are no answer. Text behind `</answer>` costs the full format but not the answer.
"""

from __future__ import annotations

import re

from data_types import Problem
from tasks.expressions import false_sums

THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE = "<think>", "</think>", "<answer>", "</answer>"
THINK_CREDIT, ANSWER_CREDIT = 0.1, 0.5  # partial credit for a pair of tags, as in GRPO-Zero

# Known sets of weights: make_task("gsm8k", **REWARD_PRESETS["correct-format-language"])
REWARD_PRESETS = {
    "grpo-zero": {"answer_weight": 1.0, "format_weight": 0.1},
    "correct-format-language": {"answer_weight": 1.0, "format_weight": 0.25, "language_weight": 0.10},
}
REWARD_PRESETS["lineage"] = REWARD_PRESETS["grpo-zero"]  # the name in configurations of older runs

MAX_JUDGED_CHARS = 20_000  # of a text, for language and repetition: bounded time
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
    """The assistant's text that is judged: the `<think>` of the response prefix, if it has one, and the response.

    A response that opens its thought again stays as it is: one `<think>` is enough.
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
    """The text in the answer tags by the rule in the module's docstring, or None if there is no answer."""
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
    """Share of the letters that belong to a script of SCRIPTS, 0 to 1, or 1 without letters (DeepSeek-R1, 2.3.1).

    It is rounded to a tenth. Advantages are divided by a group's deviation, so a share of .998 beside .999 would turn a
    single letter into a full-strength gradient.
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
    """-1 if the thought contains a false sum, `3 + 5 = 9`, else 0.

    It is not the share of false sums: then each of them would cost less in a longer thought.
    """
    wrong, _ = false_sums(thought)
    return -1.0 if wrong else 0.0


def soft_overlong_penalty(length: int, max_length: int, cache_length: int) -> float:
    """0 up to max_length - cache_length tokens, then linear down to -1 at max_length and above (DAPO, eq. 13)."""
    if not 0 < cache_length <= max_length:
        raise ValueError(
            f"soft overlong penalty: cache_length is {cache_length}, expected 1 to max_length {max_length}"
        )
    return max(-1.0, min(0.0, (max_length - cache_length - length) / cache_length))
