"""Batched sampling: prefill each prompt once, decode its whole group together, start waiting prompts in free slots.

    completions = generate(model, prompts, SamplingParams(n=8, max_new_tokens=256), tokenizer=tokenizer, seed=0)

decoding.py has the decoding loop, and sampling.py samples a token. Sampling and training use the same logits. Only the
stop ids of a checkpoint's generation_config.json are used.

Departure from the textbook: all random numbers of a rollout are drawn before it begins, with one generator per
response. A response therefore does not depend on the rest of the batch, on the time its prompt started, or on restarts.

Shape letters: A responses, N rows that are decoding, D hidden.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data_types import Completion, FinishReason
from model.linear import packed_weights
from model.memory import halve_when_out_of_memory, rows_that_fit
from qwen2_llm import Qwen2ForCausalLM
from rollout.decode_graph import cuda_capture, shelf
from rollout.decoding import MaskedResponses, Responses, decode
from rollout.sampling import SamplingParams
from rollout.tool_turns import Environment, Spans, decode_with_tools, with_turns
from tokenizer import Tokenizer


def generate(
    model: Qwen2ForCausalLM,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    tokenizer: Tokenizer,
    seed: int = 0,
    max_rows: int = 512,
    graphs: bool | None = None,
    only: range | None = None,
    must_be_finite: bool = True,
    environment: Environment | None = None,
) -> list[Completion]:
    """Sample `params.n` responses to each prompt. Those of prompt i are at indices [i * n, (i + 1) * n).

    Args:
        prompts: texts, or token ids that are used unchanged.
        seed: seed of the random numbers. The same seed gives the same responses.
        max_rows: decode at most this many responses at a time, fewer if memory is short. Other prompts wait until
            responses have ended. The responses do not depend on this number.
        graphs: record decode steps as CUDA graphs. None: only on a GPU. False: never.
        only: sample only for these prompts. Their responses are the same as in a call for all prompts. None: all.
        must_be_finite: False ends a response at logits that are not finite, with the finish reason "not_finite".
        environment: answers the calls of a response (tool_turns.py). `max_new_tokens` counts its tokens, too.

    Raises ValueError for an empty prompt, for a prompt and max_new_tokens that together exceed the model's context, and
    for logits that are not finite if `must_be_finite`.
    """
    if environment is not None and params.stop:
        raise ValueError(
            f"stop is {params.stop}, and the environment has stop strings of its own; expected one of the two"
        )
    ids = [tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
    check_room(ids, params.max_new_tokens, model.config.max_position_embeddings)
    graphs = (model.device.type == "cuda") if graphs is None else graphs
    if graphs and model.device.type != "cuda":
        raise ValueError(f"graphs=True, but the model is on {model.device}; only CUDA can record graphs")
    only = range(len(ids)) if only is None else only
    ids, uniforms = [ids[i] for i in only], uniform_numbers(ids, params, seed, only)
    if not ids:
        return []

    def all_responses(rows: int) -> tuple[Responses, list[Spans] | None]:
        capture = cuda_capture() if graphs else None
        with packed_weights(model, min(rows, len(uniforms))):
            if environment is None:
                return decode(model, ids, uniforms, params, tokenizer, rows, capture), None
            here = replace(environment, respond=lambda i, text: environment.respond(only[i], text))
            return decode_with_tools(model, ids, uniforms, params, tokenizer, rows, here, capture)

    was_training = model.training
    model.eval()
    tokens = max(map(len, ids)) + params.max_new_tokens
    fitting = rows_that_fit(model.config, tokens, model.dtype, model.device, reusable=shelf.nbytes(model))
    rows = min(max_rows, fitting)
    try:
        responses, given = halve_when_out_of_memory(all_responses, rows)
    finally:
        model.train(was_training)
    completions = _completions(ids, responses, params, tokenizer, only, must_be_finite)
    return completions if given is None else [with_turns(c, spans, tokenizer) for c, spans in zip(completions, given)]


def check_room(ids: list[list[int]], new_tokens: int, context: int) -> None:
    """Raises ValueError for an empty prompt, and for a prompt that with `new_tokens` more exceeds `context` tokens."""
    for i, prompt in enumerate(ids):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; expected at least one token")
        if len(prompt) + new_tokens > context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, and {new_tokens} new ones do not fit the model's context of "
                f"{context}; shorten the prompt or lower max_new_tokens"
            )


def uniform_numbers(ids: list[list[int]], params: SamplingParams, seed: int, only: range | None = None) -> Tensor:
    """Random numbers in [0, 1), [prompts * n, max_new_tokens]. A row's seed: (seed, prompt, count, sample).

    `count`: earlier equal prompts. So responses to equal prompts differ. `only`: rows of these prompts only."""
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
    ids: list[list[int]], responses: Responses, params: SamplingParams, tokenizer: Tokenizer, only: range,
    must_be_finite: bool,
) -> list[Completion]:  # fmt: skip
    completions = []
    for row, (length, stopped) in enumerate(zip(responses.lengths.tolist(), responses.stopped.tolist())):
        response, logprobs = responses.sampled[row, :length].tolist(), responses.logprobs[row, :length]
        prompt = row // params.n
        broken = bool(logprobs.isnan().any())
        first = int(logprobs.isnan().int().argmax())
        if broken and must_be_finite:
            raise ValueError(
                f"the model's logits are not finite at token {first} of a response to prompt {only[prompt]}: its "
                "weights contain NaN or infinity, or overflow; go back to an earlier checkpoint"
            )
        if broken:
            response, logprobs = response[: first + 1], logprobs[: first + 1]
        at_stop_id = response[-1] in tokenizer.eos_token_ids and not params.ignore_eos
        text = tokenizer.decode(response[:-1] if at_stop_id else response)
        finish: FinishReason = "not_finite" if broken else "stop" if stopped else "length"
        kept = responses.kept[row, : len(response)].tolist() if isinstance(responses, MaskedResponses) else None
        completions.append(Completion(only[prompt], ids[prompt], response, logprobs.tolist(), text, finish, kept=kept))
    return completions
