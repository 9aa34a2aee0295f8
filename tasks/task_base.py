"""The interface of a task: problems by index, a prompt for each, a reward for each response.

    class MyTask(Task):
        def train_problem(self, index): ...         # -> Problem; always the same one for the same index
        def test_problem(self, index): ...          # raises IndexError behind the last one
        def is_correct(self, problem, answer): ...  # answer: the text in the answer tags
        # or, for a reward of your own: def reward(self, problem, response): return Reward(total, {"name": part})

A problem depends on (seed, split, index) only. So there is no iterator to save, and a run that is resumed at step k
sees the same problems as an uninterrupted one. Generated tasks choose the split by a hash of the problem, so training
and held-out problems are disjoint for any two seeds.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, ClassVar, Literal

from data_types import Message, Problem, Reward, Turn
from tasks.expressions import false_sums, plain_number
from tasks.rewards import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    SCRIPTS,
    THINK_CLOSE,
    THINK_OPEN,
    answer_block,
    arithmetic_penalty,
    format_reward,
    language_consistency,
    repetition_penalty,
    think_block,
    whole_text,
)

Split = Literal["train", "test"]
HELD_OUT_ONE_IN = 10  # generated tasks: one problem in ten is held out
MAX_DRAWS = 20_000  # before a generator says that its settings admit no problem

SYSTEM_MESSAGE = (
    "You are a helpful assistant. You first think about the reasoning process in your mind "
    "and then provide the user with the answer."
)
TAG_REQUEST = (
    "Show your work in <think> </think> tags. And return the final answer in <answer> </answer> tags, "
    "for example <answer> {example} </answer>."
)
# The response prefix follows the rendered chat. The model continues it.
RESPONSE_PREFIXES = {"full": "Let me solve this step by step.\n<think>", "short": "<think>\n"}


@dataclass(kw_only=True)
class Task:
    """Base of all tasks. A subclass defines the two problem methods, and `is_correct` or its own `reward`."""

    seed: int = 0  # of the problems that are drawn, or of the order of a file's rows
    format_weight: float = 0.1
    answer_weight: float = 1.0
    language_weight: float = 0.0  # 0: off. The part is the share of the thought's letters in the script `language`
    language: str = "latin"
    repetition_weight: float = 0.0  # 0: off. The part is minus the share of repeated phrases in the thought
    arithmetic_weight: float = 0.0  # 0: off. The part is -1 for a thought that contains a false sum
    prompt_style: str = "full"  # "full": system message and instructions; "short": the bare question, for tiny models
    _judged: ClassVar[tuple[Problem, str, Reward] | None] = None  # by `judge`, for `diagnostics`
    data_summary: str = field(default="", init=False, repr=False)  # one line: which files or rows are which split

    def __post_init__(self) -> None:
        if self.prompt_style not in RESPONSE_PREFIXES:
            raise ValueError(f"prompt_style is {self.prompt_style!r}; expected 'full' or 'short'")
        if self.language not in SCRIPTS:
            raise ValueError(f"language is {self.language!r}; expected one of {', '.join(SCRIPTS)}")

    def train_problem(self, index: int) -> Problem:
        """Training problem number `index`, which has no upper limit: a data set is shuffled again for every epoch."""
        raise NotImplementedError(f"{type(self).__name__} has no method train_problem")

    def test_problem(self, index: int) -> Problem:
        """Held-out problem number `index`. Raises IndexError past the last one of a finite data set."""
        raise NotImplementedError(f"{type(self).__name__} has no method test_problem")

    def test_problems(self, n: int) -> list[Problem]:
        """The first `n` held-out problems, or all of a data set that has fewer."""
        return self.problems("test", n)

    def problems(self, split: Split, n: int, start: int = 0) -> list[Problem]:
        """Problems `start` to `start + n` of a split. Held-out problems end at the last one of a data set."""
        if split == "train":
            return [self.train_problem(index) for index in range(start, start + n)]
        found = []
        for index in range(start, start + n):
            try:
                found.append(self.test_problem(index))
            except IndexError:
                break
        return found

    def longest_problems(self, n: int) -> list[Problem]:
        """The `n` training problems with the longest text. Empty: the task does not know them."""
        return []

    def levels(self) -> dict[str, Task]:
        """Easier versions of the task by name, easiest first, up to the task itself. Empty: the task has no levels."""
        return {}

    def prompt(self, problem: Problem) -> list[Message]:
        """The chat messages of a problem. The rendered messages and `problem.response_prefix` are the prompt."""
        return problem.messages

    def is_correct(self, problem: Problem, answer: str) -> bool:
        """Whether the text in the answer tags is right."""
        raise NotImplementedError(f"{type(self).__name__} has no method is_correct")

    def score(self, problem: Problem, answer: str) -> float:
        """Score of the answer from 0 to 1. A task with partial credit overrides it."""
        return float(self.is_correct(problem, answer))

    def reward(self, problem: Problem, response: str) -> Reward:
        """Sum of weight * part. Parts: format and answer in [0, 1], and the other ones that have a weight.

        `response` is the text after the prompt. A reward does not see token counts: the trainer applies the overlong
        penalty (shaping.py).
        """
        text = whole_text(problem, response)
        answer = answer_block(text)
        parts = {"format": format_reward(text), "answer": 0.0 if answer is None else self.score(problem, answer)}
        if self.language_weight:
            parts["language"] = language_consistency(think_block(text), self.language)
        if self.repetition_weight:
            parts["repetition"] = repetition_penalty(think_block(text))
        if self.arithmetic_weight:
            parts["arithmetic"] = arithmetic_penalty(think_block(text))
        weights = self.part_weights()
        return Reward(sum(weights[name] * part for name, part in parts.items()), parts)

    def part_weights(self) -> dict[str, float]:
        """Weight of each reward part in the total, by name. GDPO takes 1 for a part that has none here."""
        return {
            "format": self.format_weight,
            "answer": self.answer_weight,
            "language": self.language_weight,
            "repetition": self.repetition_weight,
            "arithmetic": self.arithmetic_weight,
        }

    def judge(self, problem: Problem, response: str) -> tuple[Reward, dict[str, float]]:
        """Reward and diagnostics of a response. The reward is called once, although the default diagnostics need it."""
        reward = self.reward(problem, response)
        self._judged = problem, response, reward  # type: ignore[misc]
        return reward, self.diagnostics(problem, response)

    def judge_turns(self, problem: Problem, turns: Sequence[Turn]) -> tuple[Reward, dict[str, float]]:
        """Reward and diagnostics of a response with a tool."""
        reward, response = self.reward_turns(problem, turns), "".join(turn.text for turn in turns)
        self._judged = problem, response, reward  # type: ignore[misc]
        return reward, self.diagnostics(problem, response)

    def diagnostics(self, problem: Problem, response: str) -> dict[str, float]:
        """Numbers of a response that are logged as means, but not rewarded.

        solved: 1.0 for a right answer. full_format: 1.0 for the complete format, because the reward part `format` also
        has partial credit (only if the reward has this part). sums: equalities in the thought. false_sums: the wrong
        share of them, 0.0 without equalities. A policy whose thought is not rewarded can learn to write false sums.
        """
        judged = self._judged
        known = judged is not None and judged[0] is problem and judged[1] == response
        parts = judged[2].parts if judged is not None and known else self.reward(problem, response).parts
        wrong, total = false_sums(think_block(whole_text(problem, response)))
        found = {"solved": float(parts.get("answer", 0.0) == 1.0)}
        if "format" in parts:
            found["full_format"] = float(parts["format"] == 1.0)
        return found | {"sums": float(total), "false_sums": wrong / total if total else 0.0}

    def messages(self, text: str) -> list[Message]:
        """Chat messages with `text` as the user's. The short style has no system message."""
        user = {"role": "user", "content": text}
        return [user] if self.prompt_style == "short" else [{"role": "system", "content": SYSTEM_MESSAGE}, user]

    @property
    def response_prefix(self) -> str:
        return RESPONSE_PREFIXES[self.prompt_style]

    # -----------------------------------------------------------------------------------------------------------------
    # A task with a tool (docs/tools.md). Without stop strings, a response is one turn

    stop_strings: ClassVar[tuple[str, ...]] = ()  # each of them ends a turn: the environment responds
    max_turns: int = 16  # calls of a response that the environment answers. One more call ends the response
    max_turn_tokens: int = 0  # sampled tokens of a turn. A longer turn ends the response. 0: no limit of its own

    def respond(self, problem: Problem, text_so_far: str) -> str | None:
        """The environment's text after a turn that ended with a stop string. None ends the response.

        `text_so_far` is the response up to here, with the earlier observations. The text depends on nothing else: a
        rollout may ask twice. An error that the policy caused is a text like any other.
        """
        raise NotImplementedError(f"{type(self).__name__} has stop_strings and no method respond")

    def reward_turns(self, problem: Problem, turns: Sequence[Turn]) -> Reward:
        """The reward of a response with a tool. A task overrides it to tell sampled text from observations."""
        return self.reward(problem, "".join(turn.text for turn in turns))


def check_stop_strings(stop_strings: Any) -> tuple[str, ...]:
    """The stop strings as a tuple. Raises ValueError, in one line, for anything but texts that are not empty."""
    if not isinstance(stop_strings, tuple | list) or not all(isinstance(s, str) and s for s in stop_strings):
        raise ValueError(f"stop_strings is {stop_strings!r:.200}; expected a tuple of texts, none empty")
    return tuple(stop_strings)


@dataclass(kw_only=True)
class QuestionTask(Task):
    """Questions with a short answer, mostly a number. Base of arithmetic, GSM8K and files of (question, answer)."""

    example_answer: ClassVar[str] = "42"  # in the prompt's request

    def problem_from(self, question: str, answer: Any) -> Problem:
        """A problem from any question and its answer. Raises ValueError for an answer that no response can match."""
        name = hashlib.blake2b(question.encode(), digest_size=4).hexdigest()
        request = "" if self.prompt_style == "short" else " " + TAG_REQUEST.format(example=self.example_answer)
        target = answer_text(answer)
        return Problem(f"question {name}", self.messages(question + request), target, self.response_prefix)

    def is_correct(self, problem: Problem, answer: str) -> bool:
        """Equal as exact numbers (1,234 = 1234.0, 7/2 = 3.5). A target that is no number is compared as text.

        A target with 15 or more digits and a point is the rounded result of a computation. It only has to agree in the
        precision of a float64, so 1/3 equals 0.3333333333333333.
        """
        given, wanted = plain_number(answer), plain_number(problem.target)
        if given is None or wanted is None:
            return wanted is None and _words(answer) == _words(problem.target)
        rounded = "." in problem.target and sum(map(str.isdigit, problem.target)) >= 15
        return abs(given - wanted) <= abs(wanted) / 2**52 if rounded else given == wanted


def answer_text(answer: Any) -> str:
    """A reference answer as text.

    Raises ValueError if no response can match it (NaN, tags inside) or an empty response can (no text).
    """
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | Decimal):
        raise ValueError(f"answer is {answer!r:.200}, expected text or a number")
    if not isinstance(answer, str) and not math.isfinite(answer):
        raise ValueError(f"answer is {answer}, which no response can match; expected a finite number")
    text = str(answer)
    if not text.strip():
        raise ValueError(f"answer is {text!r}, which an empty response would match; expected text or a number")
    tag = next((tag for tag in (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE) if tag in text), None)
    if tag:
        raise ValueError(f"answer contains {tag}, which no response can match; leave the tags out")
    return text


def _words(text: str) -> list[str]:
    """Words with one code for each letter: é may also be stored as e and an accent."""
    return unicodedata.normalize("NFC", text).split()


def is_held_out(key: str) -> bool:
    """Whether the problem with this key belongs to the held-out split: a stable hash, the same on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def draw_problem(
    name: str, seed: int, split: Split, index: int, draw: Callable[[random.Random], tuple[str, Any] | None]
) -> Any:
    """Problem `index` of a split. `draw` gives (key, problem), or None, and is called until a key is in the split.

    Raises ValueError after MAX_DRAWS draws, because the settings allow no problem of this split.
    """
    generator = random.Random(f"{name} {seed} {split} {index}")  # seeded by SHA-512 of the text: the same everywhere
    for _ in range(MAX_DRAWS):
        drawn = draw(generator)
        if drawn is not None and is_held_out(drawn[0]) == (split == "test"):
            return drawn[1]
    raise ValueError(
        f"{name}: no {split} problem in {MAX_DRAWS} draws; its settings allow too few problems, widen them"
    )


def shuffled_index(n_rows: int, seed: int, index: int) -> int:
    """Row of training problem `index`. Every row comes once in an epoch, and every epoch has its own order."""
    epoch, place = divmod(index, n_rows)
    return _epoch_order(n_rows, seed, epoch)[place]


@functools.lru_cache(maxsize=4)  # consecutive indices share an epoch
def _epoch_order(n_rows: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n_rows))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order
