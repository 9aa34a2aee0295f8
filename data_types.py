"""The records that travel through the project: Problem -> MiniBatch -> Completion -> Episode.

Plain dataclasses, nothing else: no tensors on a device, no model, no file. Token ids go in and token
ids come out; text is kept beside them for people and for rewards, and is never encoded again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
FinishReason = Literal["stop", "length", "not_finite"]


@dataclass(frozen=True)
class Problem:
    """One task instance: what is asked, and what the answer is checked against."""

    id: str
    messages: list[Message]
    target: Any  # whatever the task's reward needs: a number, a reference answer, ...
    response_prefix: str = ""  # put into the assistant's mouth, after the chat template: "...<think>"


class Reward(NamedTuple):
    """What a response earned: `total` trains, `parts` are logged one by one under their names."""

    total: float
    parts: dict[str, float]


@dataclass
class MiniBatch:
    """The prompts of one step, as problems, text and token ids, in the same order."""

    problems: list[Problem]
    prompts: list[str]
    prompt_ids: list[list[int]]

    @classmethod
    def from_problems(cls, problems: list[Problem], tokenizer) -> MiniBatch:
        """Render each problem's messages with the chat template, add its response prefix, and encode once."""
        prompts = [tokenizer.render_chat(p.messages) + p.response_prefix for p in problems]
        return cls(problems, prompts, [tokenizer.encode(text) for text in prompts])

    def __len__(self) -> int:
        return len(self.problems)


@dataclass
class Completion:
    """One sampled response. `response_ids` ends with the stop token where there was one; `text` leaves it out."""

    prompt_index: int
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]  # the sampler's log-probability of each response id, before top-k, top-p and min-p
    text: str
    finish_reason: FinishReason  # "stop": a stop id or stop string; "length": cut at max_new_tokens; "not_finite":
    # cut where the logits were not finite, its last id drawn from them and of log-probability NaN


@dataclass
class Episode:
    """One response with its place in a group, its reward and its advantage.

    `temperature` and `vocab_size` say how it was sampled, so that training scores it the same way (DESIGN 7).
    """

    group_id: int
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason
    reward: float = math.nan  # NaN: the reward could not be computed; the episode gets advantage 0
    reward_parts: dict[str, float] = field(default_factory=dict)
    unshaped_reward: float | None = None  # `reward` before the trainer's penalties; None: there were none
    advantage: float = 0.0
    temperature: float = 1.0
    vocab_size: int | None = None  # ids from here on exist in the embedding but not in the tokenizer
    problem: Problem | None = None

    @property
    def task_reward(self) -> float:
        """The task's own reward, without the trainer's penalties for length and divergence."""
        return self.reward if self.unshaped_reward is None else self.unshaped_reward

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"
