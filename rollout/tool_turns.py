"""Rollouts of a task with a tool: a response stops, its environment answers, and the response continues.

    environment = Environment.of(task, problems)
    responses, given = decode_with_tools(model, prompts, uniforms, params, tokenizer, rows, environment)

A turn ends when one of its sampled tokens completes a stop string. The row then *waits*: it leaves the decode batch,
and its keys and values stay in the cache behind those of the running rows. Rows return together, once RETURN of the
rows wait or no row runs. Their observations are encoded once and prefilled behind their own tokens, so tokens are not
computed again (one is, if an observation is empty). tests/plain_tools.py is the reference implementation.

A turn ends with the sampled token that completes the stop string. Given tokens follow it. That token is kept whole,
even if it has more text after the stop string. The stop string must lie in the turn: text of an
observation never counts. Sampled ids are never decoded and encoded again.

The uniform numbers of a response belong to its sampled tokens, so observations use none. A response does not depend on
its neighbours or on the time it waited: the environment sees the response's text only, and it is asked in a fixed
order. Calls are made one after the other while nothing decodes. A tool in another process has a deadline
(tasks/sandbox.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from data_types import Completion, Problem, Turn
from qwen2_llm import Qwen2ForCausalLM
from rollout.continued_attention import ContinuedAttention
from rollout.decode_graph import Capture
from rollout.decoding import Decoder, Responses, _pieces, stop_string_end, stop_tail
from rollout.group_cache import take
from rollout.sampling import SamplingParams
from tasks.task_base import Task, check_stop_strings
from tokenizer import Tokenizer

RETURN = 1 / 8  # of the rows that are not finished must wait before they return: one prefill for all of them
PREFILL_SCORES = 1 << 22  # attention scores of one head in a prefill of observations

Spans = list[tuple[int, int]]  # [start, end) of the given tokens of a response


@dataclass(frozen=True)
class Environment:
    """The other side of a rollout with a tool.

    respond: (number of the prompt, text of the response so far) -> text of the environment, or None to end it.
    stop_strings: each of them ends a turn.
    max_turns: observations of a response. One more call ends the response, with the finish reason "length".
    max_turn_tokens: sampled tokens of a turn. A longer turn ends the response in the same way. 0: no limit.
    """

    respond: Callable[[int, str], str | None]
    stop_strings: tuple[str, ...]
    max_turns: int = 16
    max_turn_tokens: int = 0

    def __post_init__(self) -> None:
        check_stop_strings(self.stop_strings)

    @classmethod
    def of(cls, task: Task, problems: Sequence[Problem]) -> Environment | None:
        """The task as the environment of responses to these problems. None: the task has no tool."""
        if not getattr(task, "stop_strings", ()):  # any object with a reward is a task
            return None

        def respond(prompt: int, text_so_far: str) -> str | None:
            text = task.respond(problems[prompt], text_so_far)
            if text is not None and not isinstance(text, str):
                raise TypeError(f"{type(task).__name__}.respond returned {type(text).__name__}, expected text or None")
            return text

        return cls(respond, tuple(task.stop_strings), task.max_turns, task.max_turn_tokens)


def decode_with_tools(
    model: Qwen2ForCausalLM, prompts: Sequence[list[int]], uniforms: Tensor, params: SamplingParams,
    tokenizer: Tokenizer, rows: int, environment: Environment, capture: Capture | None = None,
) -> tuple[Responses, list[Spans]]:  # fmt: skip
    """As `decode`, and the given tokens of each response. `params.max_new_tokens` counts them, too.

    Recorded steps are not kept for the next rollout.
    """
    decoder = ToolDecoder(model, prompts, uniforms, params, tokenizer, rows, environment, capture)
    return decoder.run(), decoder.given


def with_turns(completion: Completion, given: Spans, tokenizer: Tokenizer) -> Completion:
    """A completion with the mask of its sampled tokens, and its text in turns. The stop token has no text."""
    ids, sampled, turns, start = completion.response_ids, [True] * len(completion.response_ids), [], 0
    end = len(ids) - (completion.finish_reason == "stop" and ids[-1] in tokenizer.eos_token_ids)
    for a, b in [*given, (end, end)]:
        sampled[a:b] = [False] * (b - a)
        turns += [Turn(tokenizer.decode(ids[start:a]), False), Turn(tokenizer.decode(ids[a:b]), True)]
        start = b
    return replace(completion, sampled=sampled, turns=turns[:-1])


class Call(NamedTuple):
    """A response that waits: its number of tokens, and how many of them are in the cache."""

    length: int
    cached: int


class ToolDecoder(Decoder):
    """A decoder whose rows may wait for their environment.

    `placed` has the running, the waiting and the finished rows. Waiting rows are like finished ones for the device.
    """

    def __init__(
        self, model: Qwen2ForCausalLM, prompts: Sequence[list[int]], uniforms: Tensor, params: SamplingParams,
        tokenizer: Tokenizer, rows: int, environment: Environment, capture: Capture | None,
    ):  # fmt: skip
        super().__init__(model, prompts, uniforms, params, tokenizer, rows, capture)
        total = len(uniforms)
        self.environment, self.own_uniforms = environment, uniforms
        self.calls: dict[int, Call] = {}  # of the waiting responses
        self.given: list[Spans] = [[] for _ in range(total)]
        self.turn_start = [0] * total
        self.limits = torch.full((total + 1,), params.max_new_tokens, device=model.device)  # last length of the turn
        self.limits[:total] = self._limit(0)
        self._ends: dict[int, bool] = {}  # token -> whether a stop string may end in it

    def _limit(self, turn_start: int) -> int:
        cap, most = self.params.max_new_tokens, self.environment.max_turn_tokens
        return min(cap, turn_start + most) if most else cap

    # -----------------------------------------------------------------------------------------------------------------
    # On the device

    def draw(self, rows: slice | Tensor, hidden: Tensor) -> None:
        """The decoder's, with the limit of a turn.

        A row that is not running keeps its length: it writes behind its own tokens, which it may need again.
        """
        response, t = self.response[rows].clone(), self.cache.lengths[rows].clone()
        super().draw(rows, hidden)
        self.response[rows] = self.response[rows].masked_fill(t + 1 >= self.limits[response], self.spare)
        self.cache.lengths[rows] = t.clamp(max=self.cache.k.shape[3] - 1)

    # -----------------------------------------------------------------------------------------------------------------
    # On the host

    def advance(self) -> None:
        """The decoder's. `reach` also covers the tokens of waiting rows, so that no move loses them."""
        self.running_since = self.running_since + [self.steps - call.cached for call in self.calls.values()]
        super().advance()

    def running_rows(self) -> list[int]:
        """The running rows. Rows that have completed a call begin to wait."""
        self._take_calls()
        return super().running_rows()

    def refill(self, running: list[int]) -> bool:
        """Let rows return and prompts enter if enough of them wait. Rows that wait leave the batch at once.

        False: every response is finished. In a recorded step a group is decoded whole: a waiting row leaves it if no
        row of its group runs.
        """
        while True:
            if self.calls and (not running or len(self.calls) >= RETURN * (len(running) + len(self.calls))):
                self.bring_back(running)
            elif entering := self._take_prompts(running, self.calls):
                self.arrange(running, entering)
                self.prefill(entering)
            else:
                break
            running = self.running_rows()  # the first tokens may end a turn, or a response
        if running and self._is_sparse(running):
            self.arrange(running, [])
        return bool(running)

    def _is_sparse(self, running: list[int]) -> bool:
        waiting_in_batch = not self.calls.keys().isdisjoint(self.placed[: self.cache.n_rows])
        return super()._is_sparse(running) or (self.shape.width is None and waiting_in_batch)

    def arrange(self, running: list[int], entering: list[int]) -> None:
        """Running rows come first. Waiting rows keep their tokens behind them, outside of the batch."""
        n, width = self.params.n, self.shape.width
        now = {self.placed[row] for row in running} | {p * n + i for p in entering for i in range(n)}
        row_of = {response: row for row, response in enumerate(self.placed) if response != self.spare}
        group_of = {prompt: group for group, prompt in enumerate(self.prompt_of_group) if prompt >= 0}
        if width is None:  # rows in any order: move as few as possible
            placed = _settle(self.placed, now, self.calls)
            prompts = _settle(self.prompt_of_group, {r // n for r in now}, {r // n for r in self.calls})
            number = {prompt: group for group, prompt in enumerate(prompts)}
            group_of_row = [number[response // n] for response in placed]
            n_rows, n_groups = len(now), len({r // n for r in now})
        else:
            groups = sorted(self._groups(sorted(now | self.calls.keys())), key=now.isdisjoint)
            n_groups = self._size(sum(not now.isdisjoint(members) for members in groups))
            groups += [[self.spare] * width] * (n_groups - len(groups))
            placed, n_rows = [response for members in groups for response in members], n_groups * width
            prompts = [members[0] // n if members[0] != self.spare else -1 for members in groups]
            group_of_row = [group for group in range(len(groups)) for _ in range(width)]
        source = [row_of.get(response, -1) for response in placed]
        self.cache.arrange(source, group_of_row, [group_of.get(prompt, -1) for prompt in prompts])
        self.cache.leave_out(n_rows, n_groups, group_of_row)
        self.placed, self.prompt_of_group = placed, prompts
        self.start_step = [self.steps if row < 0 else self.start_step[row] for row in source]
        self.running_since = [start for start, response in zip(self.start_step, placed) if response in now]
        self.token[: len(source)] = take(self.token, source, empty=0)
        responses = [response if response in now else self.spare for response in placed]
        self.response[: len(source)] = torch.tensor(responses, device=self.response.device)

    # -----------------------------------------------------------------------------------------------------------------
    # Calls

    def _take_calls(self) -> None:
        """Let rows wait if one of their new tokens completes a stop string."""
        rows = [row for row, r in enumerate(self.placed) if r != self.spare and r not in self.calls]
        if not rows:
            return
        numbers = [self.placed[row] for row in rows]
        responses = torch.tensor(numbers, device=self.response.device)
        stop, lengths = self.environment.stop_strings, self.lengths[responses]
        size = min(stop_tail(stop) + self.check_every, self.params.max_new_tokens)
        at = (lengths[:, None] - size + torch.arange(size, device=lengths.device)).clamp(min=0)
        recent = self.sampled[responses[:, None], at].tolist()
        for row, response, length, ids in zip(rows, numbers, lengths.tolist(), recent):
            unseen, self.checked[response] = length - self.checked[response], length
            in_turn = min(size, length - self.turn_start[response])
            ids = ids[size - in_turn :] if in_turn else []
            if not any(map(self._may_end, ids[len(ids) - unseen :])):
                continue
            end = stop_string_end(ids, unseen, stop, self.tokenizer)
            if end is not None:
                self._wait(row, response, Call(length - in_turn + end, min(length - 1, length - in_turn + end)))

    def _may_end(self, token: int) -> bool:
        """Whether a stop string may end in this token. It saves the search in most tokens."""
        if token not in self._ends:
            text = self.tokenizer.decode([token], skip_special_tokens=False)
            lasts = {stop[-1] for stop in self.environment.stop_strings}
            # A letter beyond ASCII has several bytes, and may end in a token that begins inside of it.
            self._ends[token] = any(last in text or not last.isascii() for last in lasts)
        return self._ends[token]

    def _wait(self, row: int, response: int, call: Call) -> None:
        """The row stops, with the tokens up to the end of its call. On a GPU it may have sampled a few more."""
        if self.logprobs[response, : call.length].isnan().any():
            return  # the logits were not finite, so the response has ended
        self.calls[response] = call
        self.lengths[response], self.stopped[response], self.response[row] = call.length, False, self.spare

    def bring_back(self, running: list[int]) -> None:
        """Ask the environment for every waiting row, and let those with an observation continue."""
        observations: dict[int, list[int]] = {}
        for response in sorted(self.calls):
            ids = self._observation(response, self.calls[response].length)
            if ids is not None:
                observations[response] = ids
        calls, self.calls = self.calls, {}
        if not observations:
            return
        self.arrange(running + [self.placed.index(response) for response in observations], [])
        rows = {response: row for row, response in enumerate(self.placed)}
        feeds = {r: self._write_down(rows[r], r, calls[r], ids) for r, ids in observations.items()}
        order = sorted(feeds, key=lambda r: len(feeds[r][1]))  # pieces of similar length share a prefill
        keys = [len(self.prompts[r // self.params.n]) + calls[r].length + len(observations[r]) for r in order]
        scores = [len(feeds[r][1]) * n for r, n in zip(order, keys)]
        for piece in _pieces(order, scores, PREFILL_SCORES):
            self._prefill_observations([rows[r] for r in piece], [feeds[r] for r in piece])

    def _observation(self, response: int, length: int) -> list[int] | None:
        """Ids of the environment's text. None: the response ends, by the environment or by a limit."""
        cap = self.params.max_new_tokens
        if length >= cap or len(self.given[response]) >= self.environment.max_turns:
            return None
        text_so_far = self.tokenizer.decode(self.sampled[response, :length].tolist())
        text = self.environment.respond(response // self.params.n, text_so_far)
        if text is None:
            self.stopped[response] = True
            return None
        ids = self.tokenizer.encode(text)
        return ids if length + len(ids) < cap else None  # there must be room for a sampled token behind it

    def _write_down(self, row: int, response: int, call: Call, ids: list[int]) -> tuple[int, list[int]]:
        """Put an observation into the tables. Returns the place and the ids of the tokens that are not cached yet."""
        start, end = call.length, call.length + len(ids)
        n_sampled = start - sum(b - a for a, b in self.given[response])
        rest = self.own_uniforms[response, n_sampled : n_sampled + self.params.max_new_tokens - end]
        self.uniforms[response, end:] = rest.to(self.uniforms)
        self.sampled[response, start:end] = torch.tensor(ids, dtype=torch.long, device=self.sampled.device)
        self.logprobs[response, start:end] = 0.0
        self.lengths[response] = end
        self.limits[response] = self._limit(end)
        self.given[response].append((start, end))
        self.turn_start[response] = self.checked[response] = end
        cached = min(call.cached, end - 1)  # an empty observation: the last token is computed again for its state
        self.start_step[row] = self.steps - end
        return cached, self.sampled[response, cached:end].tolist()

    def _prefill_observations(self, rows: list[int], feeds: list[tuple[int, list[int]]]) -> None:
        """Run the tokens (place, ids) of these rows, and draw the next token of each."""
        device = self.token.device
        attention = ContinuedAttention(self.cache, rows, [at for at, _ in feeds], [len(ids) for _, ids in feeds])
        flat = torch.tensor([i for _, ids in feeds for i in ids], device=device)
        hidden = self.model.hidden_states(flat, attention.positions, attention)
        at = torch.tensor(rows, device=device)
        self.cache.lengths[at] = attention.ends
        self.cache.reach = max(self.cache.reach, attention.reach)  # for a move before the next step
        self.draw(at, hidden[attention.last])


def _settle(old: list[int], front: Iterable[int], back: Iterable[int]) -> list[int]:
    """`front` in the first places and `back` behind them. An item that stands in its part of `old` keeps its place."""
    front = set(front)
    back = set(back) - front
    places: list[int] = []
    for part, before in ((front, old[: len(front)]), (back, old[len(front) :])):
        stay = [item if item in part else None for item in before[: len(part)]]
        stay += [None] * (len(part) - len(stay))
        new = iter(sorted(part - set(stay)))
        places += [next(new) if item is None else item for item in stay]
    return places
