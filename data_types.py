"""The records of a training step: Problem -> MiniBatch -> Completion -> Episode.

They are plain dataclasses without tensors, models or files. Token ids go in and token ids come out. The text beside
them is for people and for rewards, and is never encoded again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
FinishReason = Literal["stop", "length", "not_finite"]


@dataclass(frozen=True)
class Problem:
    """One problem of a task: the chat messages, and the reference that an answer is compared with."""

    id: str
    messages: list[Message]
    target: Any  # for the task's reward: a number, a reference answer, ...
    response_prefix: str = ""  # begin of the assistant's text, behind the rendered chat: "...<think>"


class Reward(NamedTuple):
    """The reward of a response. `total` is trained on; every part is logged under its name."""

    total: float
    parts: dict[str, float]


class Turn(NamedTuple):
    """A piece of a response that calls a tool: text that the policy sampled, or an observation that it was given."""

    text: str
    given: bool


@dataclass
class MiniBatch:
    """The prompts of one step: problems, text and token ids, in the same order."""

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
    """One sampled response. `response_ids` ends with the stop token if there was one. `text` does not contain it."""

    prompt_index: int
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]  # the sampler's log-probability of each response id, before top-k, top-p and min-p
    text: str
    finish_reason: FinishReason  # "stop": a stop id or stop string. "length": cut at max_new_tokens. "not_finite": cut
    # because the logits were not finite; its last id was drawn from them and has log-probability NaN
    sampled: list[bool] | None = None  # for each response id: False if the environment gave it. None: all were sampled
    turns: list[Turn] | None = None  # the response's text in pieces, if `sampled` is not None
    kept: list[list[int]] | None = None  # the ids that were left to sample each token from; -1 fills up. None: all


@dataclass
class Episode:
    """One response with its place in a group, its reward and its advantage.

    `temperature` and `vocab_size` are those of the sampler. Training scores the response with the same values.
    """

    group_id: int
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]  # 0 for a token that the environment gave
    text: str
    finish_reason: FinishReason
    reward: float = math.nan  # NaN: the reward could not be computed; the episode gets advantage 0
    reward_parts: dict[str, float] = field(default_factory=dict)
    diagnostics: dict[str, float] | None = None  # the task's, of this response; None: not computed
    unshaped_reward: float | None = None  # `reward` before the trainer's penalties; None: there were none
    advantage: float = 0.0
    temperature: float = 1.0
    vocab_size: int | None = None  # ids from here on exist in the embedding but not in the tokenizer
    problem: Problem | None = None
    trace: dict[str, Any] | None = None  # numbers of its last update, token by token (update/token_traces.py)
    kept: list[list[int]] | None = None  # the ids that were left to sample each token from; -1 fills up. None: all
    sampled: list[bool] | None = None  # for each response id: False if the environment gave it. None: all were sampled
    turns: list[Turn] | None = None  # the response's text in pieces, if `sampled` is not None

    @property
    def sampled_positions(self) -> list[int]:
        """Indices of the response ids that the policy sampled. Losses, lengths and metrics count only these."""
        if self.sampled is None:
            return list(range(len(self.response_ids)))
        return [t for t, sampled in enumerate(self.sampled) if sampled]

    @property
    def n_sampled(self) -> int:
        """Number of sampled tokens: the length of the response."""
        return len(self.response_ids) if self.sampled is None else sum(self.sampled)

    @property
    def sampled_logprobs(self) -> list[float]:
        """The sampler's log-probability of each sampled token."""
        return [self.logprobs[t] for t in self.sampled_positions]

    @property
    def task_reward(self) -> float:
        """The task's own reward, without the trainer's penalties for length and divergence."""
        return self.reward if self.unshaped_reward is None else self.unshaped_reward

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"
