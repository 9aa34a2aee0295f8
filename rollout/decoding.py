"""The decode loop: fill free rows with waiting prompts, decode, remove finished rows. With or without CUDA graphs.

    responses = decode(model, prompt_ids, uniforms, params, tokenizer, rows=512)

One step is forward, logits and sampling. All its tensors stay where they are: the response that each row writes, its
last token and its length, the table of uniform numbers, and the tables of results. A row whose response is finished
points to the spare line of the tables. It may go on decoding, and its results are never read. So the host need not
check every token. It checks every CHECK_EVERY tokens (every token on a CPU, which has nothing to wait for). Then the
running rows move together, and free rows take waiting prompts. The size of the KV cache depends on `rows`, not on the
number of prompts. The tables have a line for every response.

On a GPU, a step of the 0.5B model is some 1,500 kernels, each of which takes less time than its launch. So the step is
recorded as a CUDA graph in a few shapes (`Recorder`), and replayed. torch.compile(mode="reduce-overhead") would fuse
kernels besides. It is not used here because it compiles for minutes, keeps memory of its own between rollouts, and runs
code that is not on this page. The step has no graph break, so `torch.compile` can compile it.

Shape letters: N rows in use, A responses, V vocabulary, D hidden.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention import PrefillAttention
from qwen2_llm import Qwen2ForCausalLM
from rollout.decode_graph import Capture, Recorder, addresses, shelf
from rollout.group_cache import GroupCache, take
from rollout.sampling import SamplingParams, sample, sample_kept, wide_dtype
from tokenizer import Tokenizer

CHECK_EVERY = 16  # tokens between two checks for finished rows, if a check waits for the device
PREFILL_TOKENS = 16384  # of prompts in one forward pass
REFILL = 1 / 8  # of the rows must be free before waiting prompts are prefilled
COMPACT = 0.85  # rows move together if at most this share of them is running: it copies their keys and values
WIDTH = 8  # most rows that share a prompt's keys in a recorded step; a group with a running row is decoded whole
SHORTEST_REACH = 128  # own tokens that the first recorded step reads; then twice as many, ...
PROMPT_STEP = 64  # room for prompts in recorded steps is a multiple of this, so that the next prompts fit, too


class Responses(NamedTuple):
    """Tables on the CPU with a line for each response: ids and log-probabilities [A, max_new_tokens], of which the
    first `lengths` [A] are the response; `stopped` [A]: by a stop id or string, not by the cap."""

    sampled: Tensor
    logprobs: Tensor
    lengths: Tensor
    stopped: Tensor


class MaskedResponses(Responses):
    """Responses with `keep_mask`. kept [A, max_new_tokens, K]: the ids that each token was drawn from; -1 fills up."""

    kept: Tensor


def decode(
    model: Qwen2ForCausalLM, prompts: Sequence[list[int]], uniforms: Tensor, params: SamplingParams,
    tokenizer: Tokenizer, rows: int, capture: Capture | None = None,
) -> Responses:  # fmt: skip
    """Response i * params.n + j is the j-th to prompt i and is drawn by `uniforms[i * params.n + j]`.

    At most `rows` rows decode at a time, or `params.n` if that is more. `capture` records steps; None runs each.
    """
    if capture is None:
        return Decoder(model, prompts, uniforms, params, tokenizer, rows, None).run()
    key = Decoder.key(model, prompts, params, tokenizer, rows)
    decoder = shelf.take(model, key)
    if isinstance(decoder, Decoder):
        decoder.begin_again(prompts, uniforms)
    else:
        decoder = Decoder(model, prompts, uniforms, params, tokenizer, rows, capture)
    responses = decoder.run()
    shelf.put(model, key, decoder, device_memory=torch.cuda.mem_get_info(model.device)[1])
    return responses


class _Shape(NamedTuple):
    """Sizes of a decoder: they and the weights' addresses are all that a recorded step depends on."""

    responses: int
    rows: int  # most at a time
    groups: int
    width: int | None  # rows of a group in a recorded step; None: groups of any size
    pieces: int  # groups of one prompt
    prompt_size: int
    room: int  # tokens of a response that are read again: all but the last

    @classmethod
    def of(cls, prompts: Sequence[list[int]], params: SamplingParams, rows: int, recorded: bool) -> _Shape:
        total, size, room = len(prompts) * params.n, max(map(len, prompts)), max(params.max_new_tokens - 1, 1)
        if not recorded:
            most = min(max(rows, params.n), total)
            return cls(total, most, most, None, 1, size, room)
        width = -(-params.n // -(-params.n // WIDTH))  # equal pieces of a prompt's rows
        pieces = -(-params.n // width)
        groups = min(max(rows // width, pieces), len(prompts) * pieces)
        return cls(total, groups * width, groups, width, pieces, -(-size // PROMPT_STEP) * PROMPT_STEP, room)


class Decoder:
    """The state of a rollout, and the work on it."""

    def __init__(
        self, model: Qwen2ForCausalLM, prompts: Sequence[list[int]], uniforms: Tensor, params: SamplingParams,
        tokenizer: Tokenizer, rows: int, capture: Capture | None,
    ):  # fmt: skip
        self._model = weakref.ref(model)  # a decoder that is kept must not keep the weights
        self.params, self.tokenizer = params, tokenizer
        self.shape = shape = _Shape.of(prompts, params, rows, capture is not None)
        device, lines, cap = model.device, shape.responses + 1, params.max_new_tokens
        self.spare = shape.responses  # the line of the tables that finished rows write to
        self.uniforms = torch.zeros(lines, cap, dtype=wide_dtype(device), device=device)
        self.sampled = torch.zeros(lines, cap, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(lines, cap, device=device)
        width = min(params.top_k, tokenizer.vocab_size or model.config.vocab_size) if params.keep_mask else 0
        self.kept = torch.full((lines, cap, width), -1, device=device)  # of width 0 without keep_mask
        self.lengths = torch.zeros(lines, dtype=torch.long, device=device)
        self.stopped = torch.zeros(lines, dtype=torch.bool, device=device)
        stop_ids = () if params.ignore_eos else tokenizer.eos_token_ids
        self.stop_ids = torch.tensor(stop_ids, dtype=torch.long, device=device)
        self.cache = GroupCache(
            model.config, shape.rows, shape.groups, shape.prompt_size, shape.room, shape.width, model.dtype, device
        )
        self.response = torch.full((shape.rows,), self.spare, device=device)  # that each row writes
        self.token = torch.zeros(shape.rows, dtype=torch.long, device=device)  # the last one of each row
        self.recorder = None if capture is None else Recorder(self.step, capture)
        self.check_every = 1 if capture is None and device.type == "cpu" else CHECK_EVERY
        self.vocab_rows = shape.rows * model.config.vocab_size
        self.begin(prompts, uniforms)

    @staticmethod
    def key(
        model: Qwen2ForCausalLM, prompts: Sequence[list[int]], params: SamplingParams, tokenizer: Tokenizer, rows: int
    ) -> Hashable:
        """Two recorded rollouts with equal keys can use the same decoder."""
        vocabulary = (tokenizer.vocab_size, tuple(tokenizer.eos_token_ids))
        return _Shape.of(prompts, params, rows, True), params, vocabulary, addresses(model)

    def begin(self, prompts: Sequence[list[int]], uniforms: Tensor) -> None:
        """Start a rollout with empty tables and an empty cache."""
        self.prompts = prompts
        self.uniforms[: self.spare].copy_(uniforms)
        self.waiting = list(range(len(prompts)))
        self.placed: list[int] = []  # the response of each row when it was placed; it may be finished since
        self.prompt_of_group: list[int] = []  # -1: none
        self.start_step: list[int] = []  # value of `steps` when the row started
        self.running_since: list[int] = []  # `start_step` of the rows that were running at the last check
        self.steps, self.checked = 0, [0] * self.spare

    def begin_again(self, prompts: Sequence[list[int]], uniforms: Tensor) -> None:
        """Start another rollout on the same tensors: recorded steps point to them."""
        for table in (self.sampled, self.logprobs, self.lengths, self.stopped):
            table.zero_()
        self.kept.fill_(-1)
        self.response.fill_(self.spare)
        self.cache.clear()
        self.begin(prompts, uniforms)

    @property
    def model(self) -> Qwen2ForCausalLM:
        model = self._model()
        assert model is not None, "the caller of decode() holds the model"
        return model

    @property
    def nbytes(self) -> int:
        """Memory on the device: cache, tables, and about three fp32 numbers for each logit in the recordings' pool."""
        tables = (self.uniforms, self.sampled, self.logprobs, self.lengths, self.stopped, self.kept)
        return self.cache.nbytes + sum(table.nbytes for table in tables) + 3 * 4 * self.vocab_rows

    def close(self) -> None:
        self.recorder = None
        del self.cache

    @torch.inference_mode()
    def run(self) -> Responses:
        while self.refill(self.running_rows()):
            self.advance()
        tables = (self.sampled, self.logprobs, self.lengths, self.stopped)
        responses = (table[: self.spare].cpu() for table in tables)
        if not self.params.keep_mask:
            return Responses(*responses)
        masked = MaskedResponses(*responses)
        masked.kept = self.kept[: self.spare].cpu()
        return masked

    # -----------------------------------------------------------------------------------------------------------------
    # On the device: no waiting, no new shapes, no Python number that changes from step to step

    def step(self) -> None:
        """One more token for every row in use."""
        positions = self.cache.begin()
        rows = slice(0, self.cache.n_rows)
        hidden = self.model.hidden_states(self.token[rows], positions, self.cache.attend)
        self.cache.advance()
        self.draw(rows, hidden)

    def draw(self, rows: slice | Tensor, hidden: Tensor) -> None:
        """Draw the next token of some rows from their hidden states [N, D], and write it to the tables."""
        response, t = self.response[rows], self.cache.lengths[rows]
        # Finished rows all read and write the spare line. Which of them writes last does not matter.
        u = self.uniforms[response, t]
        logits, vocab_size = self.model.logits(hidden), self.tokenizer.vocab_size
        if self.params.keep_mask:
            token, logprob, self.kept[response, t] = sample_kept(logits, u, self.params, vocab_size)
        else:
            token, logprob = sample(logits, u, self.params, vocab_size)
        self.token[rows], self.sampled[response, t], self.logprobs[response, t] = token, token, logprob
        at_stop = (token[:, None] == self.stop_ids).any(dim=-1)
        self.stopped[response], self.lengths[response] = at_stop, t + 1
        # NaN ends a response, too: it would spread to every later token.
        finished = at_stop | (t + 1 == self.params.max_new_tokens) | logprob.isnan()
        response = response.masked_fill(finished, self.spare)
        self.response[rows] = response
        # A finished row starts again at length 0, so that it never grows beyond its room in the cache.
        self.cache.lengths[rows] = t.masked_fill(response == self.spare, 0)

    # -----------------------------------------------------------------------------------------------------------------
    # On the host

    def advance(self) -> None:
        """Steps until the next check, none of them beyond the cap."""
        oldest, youngest, cap = min(self.running_since), max(self.running_since), self.params.max_new_tokens
        for _ in range(min(self.check_every, cap - 1 - (self.steps - youngest))):
            # Own tokens of the oldest row, with the one that it brings. Rows that finish on the way need fewer.
            tokens = min(self.steps - oldest + 1, self.cache.k.shape[3])
            self.steps += 1
            if self.recorder is not None:
                self.cache.reach = _reach(tokens, self.cache.k.shape[3])
                self.recorder((self.cache.n_groups, self.cache.reach))
            else:
                self.cache.reach, self.cache.lockstep = tokens, oldest == youngest
                self.step()

    def running_rows(self) -> list[int]:
        """The rows whose response is not finished. During decoding, only this waits for the device."""
        if self.params.stop and self.placed:
            self._end_at_strings()
        responses = self.response[: len(self.placed)].tolist()
        running = [row for row, response in enumerate(responses) if response != self.spare]
        self.running_since = [self.start_step[row] for row in running]
        return running

    def refill(self, running: list[int]) -> bool:
        """Give free rows to waiting prompts, or move the running rows together, if that saves time.

        False: every response is finished.
        """
        entering = self._take_prompts(running)
        if entering:
            self.arrange(running, entering)
            self.prefill(entering)
        elif running and self._is_sparse(running):
            self.arrange(running, [])
        return bool(running or entering)

    def _take_prompts(self, running: list[int], held: Iterable[int] = ()) -> list[int]:
        """Take prompts from `waiting`, as many as fit, if that is worth a prefill. `held`: responses that do not run
        and keep their row."""
        responses = sorted([*(self.placed[row] for row in running), *held])
        if self.shape.width is None:
            taken, room, per_prompt = len(responses), self.shape.rows, self.params.n
        else:
            taken, room, per_prompt = len(self._groups(responses)), self.shape.groups, self.shape.pieces
        fit = min((room - taken) // per_prompt, len(self.waiting))
        if not (fit == len(self.waiting) or fit * per_prompt >= REFILL * room or not running):
            return []
        entering, self.waiting = self.waiting[:fit], self.waiting[fit:]
        return entering

    def _is_sparse(self, running: list[int]) -> bool:
        """Whether steps become much smaller if the running rows move together."""
        if self.shape.width is None:
            return len(running) <= COMPACT * self.cache.n_rows
        return self._size(len(self._groups([self.placed[row] for row in running]))) < self.cache.n_groups

    def _size(self, groups: int) -> int:
        """Recorded steps have all groups, half of them, a quarter, ... 1: the least number that holds `groups`."""
        size = self.shape.groups
        while size // 2 >= groups and size > 1:
            size //= 2
        return size

    def _groups(self, responses: list[int]) -> list[list[int]]:
        """The responses of each prompt together. In a recorded step they are cut into pieces of `width`, and the last
        piece is filled up with finished rows."""
        width, groups = self.shape.width, []
        for _, same_prompt in itertools.groupby(responses, key=lambda response: response // self.params.n):
            members = list(same_prompt)
            size = width or len(members)
            pieces = [members[i : i + size] for i in range(0, len(members), size)]
            groups += [piece + [self.spare] * (size - len(piece)) for piece in pieces]
        return groups

    def arrange(self, running: list[int], entering: list[int]) -> None:
        """Move the running rows to the front, and place the responses of entering prompts behind them."""
        n = self.params.n
        responses = [self.placed[row] for row in running] + [p * n + i for p in entering for i in range(n)]
        groups = self._groups(responses)
        if self.shape.width is not None:
            groups += [[self.spare] * self.shape.width] * (self._size(len(groups)) - len(groups))
        row_of = {self.placed[row]: row for row in running}
        group_of = {prompt: group for group, prompt in enumerate(self.prompt_of_group) if prompt >= 0}
        self.prompt_of_group = [members[0] // n if members[0] != self.spare else -1 for members in groups]
        self.placed = [response for members in groups for response in members]
        source = [row_of.get(response, -1) for response in self.placed]
        self.start_step = [self.steps if row < 0 else self.start_step[row] for row in source]
        self.running_since = [s for s, response in zip(self.start_step, self.placed) if response != self.spare]
        self.cache.arrange(
            source,
            [group for group, members in enumerate(groups) for _ in members],
            [group_of.get(prompt, -1) for prompt in self.prompt_of_group],
        )
        self.token[: len(source)] = take(self.token, source, empty=0)
        self.response[: len(source)] = torch.tensor(self.placed, device=self.response.device)

    def prefill(self, entering: list[int]) -> None:
        """Run prompts that have just been placed, and draw the first token of each of their rows."""
        for piece in _pieces(entering, [len(self.prompts[p]) for p in entering], PREFILL_TOKENS):
            hidden, keys_and_values = prefill_prompts(self.model, [self.prompts[p] for p in piece])
            number = {prompt: i for i, prompt in enumerate(piece)}
            groups = [g for g, prompt in enumerate(self.prompt_of_group) if prompt in number]
            self.cache.fill(groups, keys_and_values, [number[self.prompt_of_group[g]] for g in groups])
            rows = [row for row, r in enumerate(self.placed) if r != self.spare and r // self.params.n in number]
            last = [number[self.placed[row] // self.params.n] for row in rows]
            self.draw(torch.tensor(rows, device=hidden.device), hidden[torch.tensor(last, device=hidden.device)])

    def _end_at_strings(self) -> None:
        """Cut responses at the first stop string that was completed since the last check."""
        rows = [row for row, response in enumerate(self.placed) if response != self.spare]
        responses = torch.tensor([self.placed[row] for row in rows], device=self.response.device)
        # A stop string that ends in an unseen token may begin `tail` tokens before it.
        size = min(stop_tail(self.params.stop) + self.check_every, self.params.max_new_tokens)
        lengths = self.lengths[responses]
        at = (lengths[:, None] - size + torch.arange(size, device=lengths.device)).clamp(min=0)
        recent = self.sampled[responses[:, None], at].tolist()
        for row, response, length, ids in zip(rows, responses.tolist(), lengths.tolist(), recent):
            unseen, self.checked[response] = length - self.checked[response], length
            ids = ids[max(size - length, 0) :]
            end = stop_string_end(ids, unseen, self.params.stop, self.tokenizer)
            if end is not None:
                self.lengths[response], self.stopped[response] = length - len(ids) + end, True
                self.response[row], self.cache.lengths[row] = self.spare, 0


def _reach(tokens: int, most: int) -> int:
    """Own tokens that a recorded step reads: 128, 256, ... and in the end `most`."""
    reach = SHORTEST_REACH
    while reach < tokens:
        reach *= 2
    return min(reach, most)


def _pieces(items: list[int], sizes: list[int], most: int) -> list[list[int]]:
    """Consecutive items whose sizes add up to at most `most`, or one item that is larger by itself."""
    pieces: list[list[int]] = []
    total = 0
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
    """Most tokens of a stop string, at one byte a token. One more, because it may begin inside of a token."""
    return max(len(s.encode()) for s in stop) + 1


def stop_string_end(ids: list[int], unseen: int, stop: tuple[str, ...], tokenizer: Tokenizer) -> int | None:
    """Number of `ids` up to the first stop string that one of the last `unseen` completes. None: there is none."""
    tail = stop_tail(stop)
    for end in range(len(ids) - unseen + 1, len(ids) + 1):
        text = tokenizer.decode(ids[max(0, end - tail) : end], skip_special_tokens=False)
        if any(s in text for s in stop):
            return end
    return None
