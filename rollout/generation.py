"""Batched sampling: prefill each prompt once, decode its whole group together, stop, let waiting prompts in.

    completions = generate(model, prompts, SamplingParams(n=8, max_new_tokens=256), tokenizer=tokenizer, seed=0)

What is sampled is what training scores (sampling.py), by the loop of decoding.py. Nothing of a checkpoint's
generation_config.json but its stop ids is used.

Departure from the textbook: all random numbers of a rollout are drawn before it begins, each answer's from a generator
of its own. So an answer does not depend on the batch around it, on when its prompt was let in, or on how often.

Shape letters: A answers, N rows that are decoding, D hidden.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from data_types import Completion
from model.attention import KVCache
from model.linear import packed_weights
from qwen2_llm import Qwen2ForCausalLM
from rollout.decode_graph import cuda_capture
from rollout.decoding import Answers, decode, prefill_prompts, stop_string_end, stop_tail
from rollout.sampling import SamplingParams, sample
from tokenizer import Tokenizer

logger = logging.getLogger(__name__)
T = TypeVar("T")


def generate(
    model: Qwen2ForCausalLM,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    tokenizer: Tokenizer,
    seed: int = 0,
    max_rows: int = 512,
    share_prompt: bool = True,
    pack_weights: bool = True,
    graphs: bool | None = None,
    only: range | None = None,
    must_be_finite: bool = True,
) -> list[Completion]:
    """Sample `params.n` answers to each prompt; those of prompt i stand at [i * n, (i + 1) * n).

    Args:
        prompts: texts, or token ids that are used as they are.
        max_rows: decode at most so many answers at a time, fewer where memory does not hold them; it does not change
            them. Prompts that do not fit wait until answers have ended.
        share_prompt: attend to a prompt's keys once a group; False is the slow twin of everything here: a row has its
            own copy, pieces of max_rows decode to their last row's end, and each step looks at every row.
        pack_weights: lay bf16 weights out for the CPU's matrix unit first; False multiplies by them as they are.
        graphs: record decode steps as CUDA graphs; None does so on a GPU, False runs every step.
        only: answer these prompts alone, as they would be answered among all the others; None: all.
        must_be_finite: False ends an answer whose logits are not finite there, with the finish reason "not_finite".

    Raises ValueError for an empty prompt, for one that leaves no room for max_new_tokens in the model's context, and
    where the model's logits are not finite (and must be).
    """
    ids = [tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
    check_room(ids, params.max_new_tokens, model.config.max_position_embeddings)
    graphs = (model.device.type == "cuda") if graphs is None else graphs
    if graphs and model.device.type != "cuda":
        raise ValueError(f"graphs=True, but the model is on {model.device}; only CUDA records its work")
    only = range(len(ids)) if only is None else only
    ids, uniforms = [ids[i] for i in only], uniform_numbers(ids, params, seed, only)
    if not ids:
        return []
    decode_rows = decode if share_prompt else decode_plainly
    was_training = model.training
    model.eval()

    def all_answers(rows: int) -> Answers:
        with packed_weights(model, min(rows, len(uniforms))) if pack_weights else contextlib.nullcontext():
            return decode_rows(model, ids, uniforms, params, tokenizer, rows, cuda_capture() if graphs else None)

    rows = min(max_rows, rows_that_fit(model, max(map(len, ids)) + params.max_new_tokens))
    answers = halve_when_out_of_memory(all_answers, rows)
    model.train(was_training)
    return _completions(ids, answers, params, tokenizer, only, must_be_finite)


def rows_that_fit(model: Qwen2ForCausalLM, tokens: int) -> int:
    """Rows of so many tokens whose keys and values fill half of a GPU's free memory, or a quarter of a computer's."""
    c = model.config
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize * tokens
    if model.device.type == "cuda":
        memory = torch.cuda.mem_get_info(model.device)[0] // 2
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return max(1, memory // row)


def halve_when_out_of_memory(work: Callable[[int], T], size: int) -> T:
    """work(size); where memory runs out, from the start with half the size, down to 1. `work` must not depend on it."""
    while True:
        try:
            return work(size)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size //= 2
            logger.warning("out of memory; again with pieces of at most %d", size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # outside the except clause: the error's traceback holds on to tensors


def is_out_of_memory(error: BaseException) -> bool:
    """torch's own error on a GPU; on a CPU its allocator raises a RuntimeError that only its text tells."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def check_room(ids: list[list[int]], new_tokens: int, context: int) -> None:
    for i, prompt in enumerate(ids):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; expected at least one token")
        if len(prompt) + new_tokens > context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, and {new_tokens} new ones do not fit the model's context of "
                f"{context}; shorten the prompt or lower max_new_tokens"
            )


def uniform_numbers(ids: list[list[int]], params: SamplingParams, seed: int, only: range | None = None) -> Tensor:
    """[prompts * n, max_new_tokens] numbers in [0, 1), each row from a generator seeded by (seed, prompt, sample)."""
    seen: Counter[tuple[int, ...]] = Counter()
    rows = []
    for i, prompt in enumerate(ids):
        for answer in range(params.n if only is None or i in only else 0):
            key = f"{seed}/{prompt}/{seen[tuple(prompt)]}/{answer}".encode()
            row_seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
            generator = torch.Generator().manual_seed(row_seed)
            rows.append(torch.rand(params.max_new_tokens, generator=generator, dtype=torch.float64))
        seen[tuple(prompt)] += 1
    return torch.stack(rows) if rows else torch.empty(0, params.max_new_tokens)


def _completions(
    ids: list[list[int]], answers: Answers, params: SamplingParams, tokenizer: Tokenizer, only: range,
    must_be_finite: bool,
) -> list[Completion]:  # fmt: skip
    completions = []
    for row, (length, stopped) in enumerate(zip(answers.lengths.tolist(), answers.stopped.tolist())):
        response, logprobs = answers.sampled[row, :length].tolist(), answers.logprobs[row, :length]
        prompt = row // params.n
        broken = bool(logprobs.isnan().any())
        first = int(logprobs.isnan().int().argmax())
        if broken and must_be_finite:
            raise ValueError(
                f"the model's logits are not finite at token {first} of an answer to prompt {only[prompt]}: its "
                "weights hold NaN or infinity, or overflow; go back to an earlier checkpoint"
            )
        if broken:
            response, logprobs = response[: first + 1], logprobs[: first + 1]
        at_stop_id = response[-1] in tokenizer.eos_token_ids
        text = tokenizer.decode(response[:-1] if at_stop_id else response)
        finish = "not_finite" if broken else "stop" if stopped else "length"
        completions.append(Completion(only[prompt], ids[prompt], response, logprobs.tolist(), text, finish))
    return completions


# ---------------------------------------------------------------------------------------------------------------------
# The slow twin


@torch.inference_mode()
def decode_plainly(
    model: Qwen2ForCausalLM, prompts: Sequence[list[int]], uniforms: Tensor, params: SamplingParams,
    tokenizer: Tokenizer, rows: int, capture: None = None,
) -> Answers:  # fmt: skip
    """What `decode` does, as in a textbook: pieces of the prompts one after the other, a copy of the prompt's keys and
    values for every row, and all rows to the end of the longest."""
    size = max(1, rows // params.n)
    pieces = []
    for start in range(0, len(prompts), size):
        u = uniforms[start * params.n : (start + size) * params.n]
        pieces.append(_decode_piece(model, prompts[start : start + size], u, params, tokenizer))
    return Answers(*(torch.cat(tables) for tables in zip(*pieces)))


def _decode_piece(model, prompts, uniforms: Tensor, params: SamplingParams, tokenizer: Tokenizer) -> Answers:
    hidden, prefill = prefill_prompts(model, prompts)
    hidden, cache = hidden.repeat_interleave(params.n, dim=0), KVCache.from_prefill(prefill, params.n, len(uniforms[0]))
    sampled, logprobs, lengths = [], [], torch.full((len(uniforms),), params.max_new_tokens)
    stopped = torch.zeros(len(uniforms), dtype=torch.bool)
    for t, u in enumerate(uniforms.T):
        token, logprob = sample(model.logits(hidden), u.to(hidden.device), params, tokenizer.vocab_size)
        sampled.append(token.cpu())
        logprobs.append(logprob.cpu())
        ends = torch.tensor([_ends(ids, params.stop, tokenizer) for ids in torch.stack(sampled, dim=1).tolist()])
        lengths = torch.where(ends & ~stopped, t + 1, lengths)
        stopped |= ends
        if stopped.all() or t + 1 == params.max_new_tokens:
            break
        hidden = model.hidden_states(token, cache.positions().flatten(), cache.attend)
        cache.advance()
    return Answers(_padded(sampled, uniforms), _padded(logprobs, uniforms), lengths, stopped)


def _ends(ids: list[int], stop: tuple[str, ...], tokenizer: Tokenizer) -> bool:
    if ids[-1] in tokenizer.eos_token_ids:
        return True
    return bool(stop) and stop_string_end(ids[-stop_tail(stop) :], 1, stop, tokenizer) is not None


def _padded(columns: list[Tensor], like: Tensor) -> Tensor:
    """Columns as a table of like's width."""
    table = torch.stack(columns, dim=1)
    return torch.nn.functional.pad(table, (0, like.shape[1] - len(columns)))
