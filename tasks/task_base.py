"""What a task is: problems by index, a prompt for each, a reward for each response.

    class MyTask(Task):
        def train_problem(self, index): ...        # -> Problem; the same one for the same index, always
        def test_problem(self, index): ...
        def is_correct(self, problem, answer): ... # answer: what stands in the answer tags
        # or, for a reward of your own: def reward(self, problem, response): return Reward(total, {"name": part})

Problems are reached by index and depend on (seed, split, index) only: there is no iterator to save, and a run that is
resumed at step k sees the problems it would have seen. Generated tasks decide between train and held-out by a hash of
the problem itself, so the two never meet, whatever the seed.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from data_types import Message, Problem, Reward
from tasks.expressions import false_sums, plain_number
from tasks.rewards import (
    SCRIPTS,
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
# The response prefix is put into the assistant's mouth behind the chat template; the model goes on from there.
RESPONSE_PREFIXES = {"full": "Let me solve this step by step.\n<think>", "short": "<think>\n"}


@dataclass(kw_only=True)
class Task:
    """Base of all tasks. A subclass gives the two problem methods and `is_correct`, or a whole `reward` of its own."""

    seed: int = 0  # which problems are drawn, or in which order the rows of a file come
    format_weight: float = 0.1
    answer_weight: float = 1.0
    language_weight: float = 0.0  # 0: not judged. Share of the thought's letters in the script `language`
    language: str = "latin"
    repetition_weight: float = 0.0  # 0: not judged. Minus the share of repeated phrases in the thought
    arithmetic_weight: float = 0.0  # 0: not judged. Minus 1 for a thought that holds a false sum
    prompt_style: str = "full"  # "full": system message and instructions; "short": the bare question, for tiny models

    def __post_init__(self):
        if self.prompt_style not in RESPONSE_PREFIXES:
            raise ValueError(f"prompt_style is {self.prompt_style!r}; expected 'full' or 'short'")
        if self.language not in SCRIPTS:
            raise ValueError(f"language is {self.language!r}; expected one of {', '.join(SCRIPTS)}")

    def train_problem(self, index: int) -> Problem:
        """Training problem number `index`, without end: a finite data set is shuffled anew every epoch."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its training problems are")

    def test_problem(self, index: int) -> Problem:
        """Held-out problem number `index`. Raises IndexError past the last one of a finite data set."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its held-out problems are")

    def test_problems(self, n: int) -> list[Problem]:
        """The first `n` held-out problems; fewer where a finite data set has no more."""
        return self.problems("test", n)

    def problems(self, split: Split, n: int, start: int = 0) -> list[Problem]:
        """Problems `start` to `start + n` of a split; of a finite held-out split those there are."""
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
        """The `n` training problems with the longest text, of a task that has all of them at hand; else none."""
        return []

    def levels(self) -> dict[str, Task]:
        """Easier versions of the task by name, easiest first, up to the task itself. Empty: the task has no levels."""
        return {}

    def prompt(self, problem: Problem) -> list[Message]:
        """The chat messages of a problem. The prompt is these, rendered, and then `problem.response_prefix`."""
        return problem.messages

    def is_correct(self, problem: Problem, answer: str) -> bool:
        """Whether what stands in the answer tags is right."""
        raise NotImplementedError(f"{type(self).__name__} does not say when an answer is right")

    def score(self, problem: Problem, answer: str) -> float:
        """How good the answer is, 0 to 1: right or wrong, where a task does not say it more finely."""
        return float(self.is_correct(problem, answer))

    def reward(self, problem: Problem, response: str) -> Reward:
        """Sum of weight * part: format and answer in [0, 1], and where they have a weight language, repetition and
        arithmetic.

        `response` is the text after the prompt. Rewards see no token counts: the soft overlong penalty is the hall's.
        """
        text = whole_text(problem, response)
        answer = answer_block(text)
        parts = {"format": format_reward(text), "answer": 0.0 if answer is None else self.score(problem, answer)}
        weights = {"format": self.format_weight, "answer": self.answer_weight}
        if self.language_weight:
            parts["language"] = language_consistency(think_block(text), self.language)
            weights["language"] = self.language_weight
        if self.repetition_weight:
            parts["repetition"] = repetition_penalty(think_block(text))
            weights["repetition"] = self.repetition_weight
        if self.arithmetic_weight:
            parts["arithmetic"] = arithmetic_penalty(think_block(text))
            weights["arithmetic"] = self.arithmetic_weight
        return Reward(sum(weights[name] * part for name, part in parts.items()), parts)

    def diagnostics(self, problem: Problem, response: str) -> dict[str, float]:
        """What is worth averaging beside the reward.

        solved: 1.0 for a right answer. full_format: 1.0 for the whole format, whose reward has credit for parts of it
        (only where the reward has a part `format`). sums: equalities written in the thought. false_sums: the share of
        them that is wrong (0.0 where there are none): a policy that is paid for answers only learns to write those.
        """
        parts = self.reward(problem, response).parts
        wrong, total = false_sums(think_block(whole_text(problem, response)))
        found = {"solved": float(parts.get("answer", 0.0) == 1.0)}
        if "format" in parts:
            found["full_format"] = float(parts["format"] == 1.0)
        return found | {"sums": float(total), "false_sums": wrong / total if total else 0.0}

    def messages(self, text: str) -> list[Message]:
        """Chat messages that say `text`; the short style has no system message."""
        user = {"role": "user", "content": text}
        return [user] if self.prompt_style == "short" else [{"role": "system", "content": SYSTEM_MESSAGE}, user]

    @property
    def response_prefix(self) -> str:
        return RESPONSE_PREFIXES[self.prompt_style]


@dataclass(kw_only=True)
class QuestionTask(Task):
    """Questions in words with a number for an answer. Base of arithmetic, GSM8K and files of (question, answer)."""

    example_answer: ClassVar[str] = "42"  # in the prompt's request

    def problem_from(self, question: str, answer: Any) -> Problem:
        """A problem from any question and its answer, also from outside the task's own data."""
        name = hashlib.blake2b(question.encode(), digest_size=4).hexdigest()
        request = "" if self.prompt_style == "short" else " " + TAG_REQUEST.format(example=self.example_answer)
        return Problem(f"question {name}", self.messages(question + request), str(answer), self.response_prefix)

    def is_correct(self, problem: Problem, answer: str) -> bool:
        """Equal as exact numbers (1,234 = 1234.0, 7/2 = 3.5); where the target is no number, as text."""
        given, wanted = plain_number(answer), plain_number(problem.target)
        return given == wanted if wanted is not None else answer.split() == problem.target.split()


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: what was probably meant, or all there is."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known[:20]) or 'none'}"


def is_held_out(key: str) -> bool:
    """Whether the problem with this key belongs to the held-out split: a stable hash, the same on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def draw_problem(
    name: str, seed: int, split: Split, index: int, draw: Callable[[random.Random], tuple[str, Any] | None]
) -> Any:
    """Problem `index` of a split: `draw` gives (key, problem), or None for a misfire, until a key falls in the split.

    Raises ValueError after MAX_DRAWS draws: the settings admit no problem of this split.
    """
    generator = random.Random(f"{name} {seed} {split} {index}")  # seeded by SHA-512 of the text: the same everywhere
    for _ in range(MAX_DRAWS):
        drawn = draw(generator)
        if drawn is not None and is_held_out(drawn[0]) == (split == "test"):
            return drawn[1]
    raise ValueError(
        f"{name}: no {split} problem in {MAX_DRAWS} draws; its settings leave too few problems, widen them"
    )


def shuffled_index(n_rows: int, seed: int, index: int) -> int:
    """Row of training problem `index`: every row once an epoch, in another order each epoch."""
    epoch, place = divmod(index, n_rows)
    return _epoch_order(n_rows, seed, epoch)[place]


@functools.lru_cache(maxsize=4)  # consecutive indices share an epoch
def _epoch_order(n_rows: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n_rows))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order
