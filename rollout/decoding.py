"""The decode loop: seat prompts, step, look which answers have ended, seat the next ones. With or without CUDA graphs.

    answers = decode(model, prompt_ids, uniforms, params, tokenizer, rows=512)

One step is forward, logits and sampling, all of it on tensors that stay where they are: which answer a row is writing,
its last token, its length, the table of uniforms, the tables of results. A row whose answer ends points at a spare line
of the tables from then on and is idle, so the host need not look at every token; it looks every CHECK_EVERY tokens
(every token on a CPU, where a look costs nothing), lets the living rows move together, and gives free rows to prompts
that wait. So memory is bounded by `rows`, however many prompts there are, and the batch stays full.

On a GPU a step of the 0.5B model is some 1,500 kernels that each take less time than their launch. There the step is
recorded as a CUDA graph, a few shapes of it (`Recorder`), and replayed. Why not torch.compile(mode="reduce-overhead")?
It would fuse kernels besides, but it compiles for minutes, holds on to memory of its own between rollouts, and what it
replays is not the code on this page; the step traces without a break, so `torch.compile` may still be laid around it.

Shape letters: N rows in use, A answers, V vocabulary, D hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention import PrefillAttention
from qwen2_llm import Qwen2ForCausalLM
from rollout.decode_graph import Capture, Recorder
from rollout.group_cache import GroupCache, take
from rollout.sampling import SamplingParams, sample
from tokenizer import Tokenizer

CHECK_EVERY = 16  # tokens between two looks at which rows have ended, where a look waits for the device
PREFILL_TOKENS = 16384  # of prompts in one forward pass
REFILL = 1 / 8  # of the rows must be free before waiting prompts are prefilled
COMPACT = 0.85  # of the rows, or fewer, must be alive before they move together: a copy of their keys and values
WIDTH = 8  # most rows that share a prompt's keys in a recorded step; a group with a living row is decoded whole
SHORTEST_REACH = 128  # own tokens that the first recorded step reads; then twice as many, ...


class Answers(NamedTuple):
    """Tables with a line for each answer, on the CPU: ids and log-probabilities [A, max_new_tokens], of which the first
    `lengths` [A] are the answer; `stopped` [A]: by a stop id or string, not by the cap."""

    sampled: Tensor
    logprobs: Tensor
    lengths: Tensor
    stopped: Tensor


def decode(
    model: Qwen2ForCausalLM, prompts: Sequence[list[int]], uniforms: Tensor, params: SamplingParams,
    tokenizer: Tokenizer, rows: int, capture: Capture | None = None,
) -> Answers:  # fmt: skip
    """Answer i * params.n + j is the j-th to prompt i and is drawn by `uniforms[i * params.n + j]`.

    At most `rows` rows decode at a time, or `params.n` where that is more. `capture` records steps; None runs each.
    """
    decoder = Decoder(model, prompts, uniforms, params, tokenizer, rows, capture)
    return decoder.run()


class Decoder:
    """The state of a rollout, and what happens to it."""

    def __init__(
        self, model: Qwen2ForCausalLM, prompts: Sequence[list[int]], uniforms: Tensor, params: SamplingParams,
        tokenizer: Tokenizer, rows: int, capture: Capture | None,
    ):  # fmt: skip
        self.model, self.prompts, self.params, self.tokenizer = model, prompts, params, tokenizer
        device, total, cap = model.device, len(prompts) * params.n, params.max_new_tokens
        self.idle = total  # the spare line of the tables
        self.uniforms = torch.cat([uniforms, uniforms.new_zeros(1, cap)]).to(device, _wide(device))
        self.sampled = torch.zeros(total + 1, cap, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(total + 1, cap, device=device)
        self.lengths = torch.zeros(total + 1, dtype=torch.long, device=device)
        self.stopped = torch.zeros(total + 1, dtype=torch.bool, device=device)
        stop_ids = () if params.ignore_eos else tokenizer.eos_token_ids
        self.stop_ids = torch.tensor(stop_ids, dtype=torch.long, device=device)

        width = None if capture is None else -(-params.n // -(-params.n // WIDTH))  # equal pieces of a prompt's rows
        self.pieces = 1 if width is None else -(-params.n // width)
        self.rows = self.groups = min(max(rows, params.n), total)  # the most at a time
        if width is not None:
            self.groups = min(max(rows // width, self.pieces), len(prompts) * self.pieces)
            self.rows = self.groups * width
        size = max(map(len, prompts))
        room = max(cap - 1, 1)
        self.cache = GroupCache(model.config, self.rows, self.groups, size, room, width, model.dtype, device)
        self.answer = torch.full((self.rows,), self.idle, device=device)  # that each row is writing
        self.token = torch.zeros(self.rows, dtype=torch.long, device=device)  # the last one of each row

        self.waiting = list(range(len(prompts)))
        self.seated: list[int] = []  # answers as they were seated; some may have ended since
        self.prompt_of_group: list[int] = []  # -1: none
        self.born: list[int] = []  # the number of steps before each row's first one
        self.births: list[int] = []  # the same, of the rows that were alive at the last look
        self.steps, self.checked = 0, [0] * total
        self.recorder = None if capture is None else Recorder(self.step, capture)
        self.check_every = 1 if capture is None and device.type == "cpu" else CHECK_EVERY

    @torch.inference_mode()
    def run(self) -> Answers:
        while self.seat(self.look()):
            self.advance()
        tables = (self.sampled, self.logprobs, self.lengths, self.stopped)
        return Answers(*(table[: self.idle].cpu() for table in tables))

    # -----------------------------------------------------------------------------------------------------------------
    # On the device: no waiting, no new shapes, no number of Python's that changes from step to step

    def step(self) -> None:
        """One more token for every row in use."""
        positions = self.cache.begin()
        rows = slice(0, self.cache.n_rows)
        hidden = self.model.hidden_states(self.token[rows], positions, self.cache.attend)
        self.cache.advance()
        self.draw(rows, hidden)

    def draw(self, rows: slice | Tensor, hidden: Tensor) -> None:
        """Draw the next token of some rows from their hidden states [N, D], and write it down."""
        answer, t = self.answer[rows], self.cache.lengths[rows]
        u = self.uniforms[answer, t]
        token, logprob = sample(self.model.logits(hidden), u, self.params, self.tokenizer.vocab_size)
        self.token[rows], self.sampled[answer, t], self.logprobs[answer, t] = token, token, logprob
        at_stop = (token[:, None] == self.stop_ids).any(dim=-1)
        self.stopped[answer], self.lengths[answer] = at_stop, t + 1
        ended = at_stop | (t + 1 == self.params.max_new_tokens) | logprob.isnan()
        answer = answer.masked_fill(ended, self.idle)
        self.answer[rows], self.cache.lengths[rows] = answer, t.masked_fill(answer == self.idle, 0)

    # -----------------------------------------------------------------------------------------------------------------
    # On the host

    def advance(self) -> None:
        """Steps until the next look, none of them beyond the cap."""
        oldest, youngest, cap = min(self.births), max(self.births), self.params.max_new_tokens
        for _ in range(min(self.check_every, cap - 1 - (self.steps - youngest))):
            tokens = min(self.steps - oldest + 1, self.cache.k.shape[3])  # of the oldest row, with the one it brings
            self.steps += 1
            if self.recorder is not None:
                self.cache.reach = _reach(tokens, self.cache.k.shape[3])
                self.recorder((self.cache.n_groups, self.cache.reach))
            else:
                self.cache.reach, self.cache.lockstep = tokens, oldest == youngest
                self.step()

    def look(self) -> list[int]:
        """The rows that are alive. The one place that waits for the device."""
        if self.params.stop and self.seated:
            self._end_at_strings()
        answers = self.answer[: len(self.seated)].tolist()
        alive = [row for row, answer in enumerate(answers) if answer != self.idle]
        self.births = [self.born[row] for row in alive]
        return alive

    def seat(self, alive: list[int]) -> bool:
        """Let waiting prompts in, or the living rows move together, where it is worth it. False: all is done."""
        if self.cache.width is None:
            taken, room, per_prompt = len(alive), self.rows, self.params.n
            sparse = len(alive) <= COMPACT * self.cache.n_rows
        else:
            taken, room, per_prompt = len(self._groups([self.seated[row] for row in alive])), self.groups, self.pieces
            sparse = self._size(taken) < self.cache.n_groups
        fit = min((room - taken) // per_prompt, len(self.waiting))
        if fit and (fit == len(self.waiting) or fit * per_prompt >= REFILL * room or not alive):
            entering, self.waiting = self.waiting[:fit], self.waiting[fit:]
            self.arrange(alive, entering)
            self.admit(entering)
        elif alive and sparse:
            self.arrange(alive, [])
        return bool(alive or fit)

    def _size(self, groups: int) -> int:
        """Recorded steps have all groups, half of them, a quarter, ... 1: the least that holds so many."""
        size = self.groups
        while size // 2 >= groups and size > 1:
            size //= 2
        return size

    def _groups(self, answers: list[int]) -> list[list[int]]:
        """Answers of one prompt, together; in a recorded step pieces of `width`, filled up with idle rows."""
        width, groups = self.cache.width, []
        for _, members in itertools.groupby(answers, key=lambda answer: answer // self.params.n):
            members = list(members)
            size = width or len(members)
            pieces = [members[i : i + size] for i in range(0, len(members), size)]
            groups += [piece + [self.idle] * (size - len(piece)) for piece in pieces]
        return groups

    def arrange(self, alive: list[int], entering: list[int]) -> None:
        """Move the living rows to the front, behind them rows for the prompts that enter."""
        n = self.params.n
        answers = [self.seated[row] for row in alive] + [p * n + i for p in entering for i in range(n)]
        groups = self._groups(answers)
        if self.cache.width is not None:
            groups += [[self.idle] * self.cache.width] * (self._size(len(groups)) - len(groups))
        row_of = {self.seated[row]: row for row in alive}
        group_of = {prompt: group for group, prompt in enumerate(self.prompt_of_group) if prompt >= 0}
        self.prompt_of_group = [members[0] // n if members[0] != self.idle else -1 for members in groups]
        self.seated = [answer for members in groups for answer in members]
        source = [row_of.get(answer, -1) for answer in self.seated]
        self.born = [self.steps if row < 0 else self.born[row] for row in source]
        self.births = [born for born, answer in zip(self.born, self.seated) if answer != self.idle]
        self.cache.arrange(
            source,
            [group for group, members in enumerate(groups) for _ in members],
            [group_of.get(prompt, -1) for prompt in self.prompt_of_group],
        )
        self.token[: len(source)] = take(self.token, source, empty=0)
        self.answer[: len(source)] = torch.tensor(self.seated, device=self.answer.device)

    def admit(self, entering: list[int]) -> None:
        """Prefill prompts that have just been seated and draw the first token of each of their rows."""
        for piece in _pieces(entering, [len(self.prompts[p]) for p in entering], PREFILL_TOKENS):
            hidden, prefill = prefill_prompts(self.model, [self.prompts[p] for p in piece])
            number = {prompt: i for i, prompt in enumerate(piece)}
            groups = [g for g, prompt in enumerate(self.prompt_of_group) if prompt in number]
            self.cache.fill(groups, prefill, [number[self.prompt_of_group[g]] for g in groups])
            rows = [row for row, a in enumerate(self.seated) if a != self.idle and a // self.params.n in number]
            last = [number[self.seated[row] // self.params.n] for row in rows]
            self.draw(torch.tensor(rows, device=hidden.device), hidden[last])

    def _end_at_strings(self) -> None:
        """Cut answers at the first stop string that was completed since the last look."""
        rows = [row for row, answer in enumerate(self.seated) if answer != self.idle]
        answers = torch.tensor([self.seated[row] for row in rows], device=self.answer.device)
        tail = stop_tail(self.params.stop)
        size = min(tail + self.check_every, self.params.max_new_tokens)
        lengths = self.lengths[answers]
        at = (lengths[:, None] - size + torch.arange(size, device=lengths.device)).clamp(min=0)
        recent = self.sampled[answers[:, None], at].tolist()
        for row, answer, length, ids in zip(rows, answers.tolist(), lengths.tolist(), recent):
            unseen, self.checked[answer] = length - self.checked[answer], length
            ids = ids[max(size - length, 0) :]
            end = stop_string_end(ids, unseen, self.params.stop, self.tokenizer)
            if end is not None:
                self.lengths[answer], self.stopped[answer] = length - len(ids) + end, True
                self.answer[row], self.cache.lengths[row] = self.idle, 0


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _reach(tokens: int, most: int) -> int:
    """Own tokens that a recorded step reads: 128, 256, ... and in the end `most`."""
    reach = SHORTEST_REACH
    while reach < tokens:
        reach *= 2
    return min(reach, most)


def _pieces(items: list[int], sizes: list[int], most: int) -> list[list[int]]:
    """Consecutive items whose sizes add up to at most `most`, or one that is larger by itself."""
    pieces, total = [], 0
    for item, size in zip(items, sizes):
        if not pieces or total + size > most:
            pieces.append([])
            total = 0
        pieces[-1].append(item)
        total += size
    return pieces


def prefill_prompts(model: Qwen2ForCausalLM, ids: list[list[int]]) -> tuple[Tensor, PrefillAttention]:
    """Run prompts once: hidden state of the last token of each [prompts, D], and all keys and values."""
    lengths = [len(prompt) for prompt in ids]
    prefill = PrefillAttention(lengths)
    flat = torch.tensor([i for prompt in ids for i in prompt], device=model.device)
    hidden = model.hidden_states(flat, prefill.layout.positions(model.device), prefill)
    return hidden[torch.tensor(lengths, device=model.device).cumsum(0) - 1], prefill


def stop_tail(stop: tuple[str, ...]) -> int:
    """Tokens in which any stop string lies: a token is at least a byte."""
    return max(len(s.encode()) for s in stop) + 1


def stop_string_end(ids: list[int], unseen: int, stop: tuple[str, ...], tokenizer: Tokenizer) -> int | None:
    """How many of `ids` there are up to where the first stop string is completed by one of the last `unseen`."""
    tail = stop_tail(stop)
    for end in range(len(ids) - unseen + 1, len(ids) + 1):
        text = tokenizer.decode(ids[max(0, end - tail) : end], skip_special_tokens=False)
        if any(s in text for s in stop):
            return end
    return None
