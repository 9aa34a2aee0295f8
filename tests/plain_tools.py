"""Reference implementation of rollouts with a tool: the whole model on the whole sequence for every sampled token.

No batch, no cache, no waiting. `generate` with an environment must give the same responses.
"""

from __future__ import annotations

import torch
from torch import Tensor

import textbook
from data_types import Completion, Turn
from rollout.tool_turns import Environment
from tokenizer import Tokenizer


@torch.no_grad()
def respond_plainly(
    model, tokenizer: Tokenizer, prompt_index: int, prompt_ids: list[int], uniforms: Tensor, temperature: float,
    environment: Environment,
) -> Completion:  # fmt: skip
    """A response to one prompt. `uniforms`: a random number for each sampled token. Their number is the cap of all
    tokens, those of the environment included."""
    cap, numbers = len(uniforms), iter(uniforms)
    ids: list[int] = []
    logprobs: list[float] = []
    sampled: list[bool] = []
    turn: list[int] = []  # sampled ids since the last observation
    texts: list[Turn] = []
    n_calls, finish = 0, "length"
    while len(ids) < cap:
        logp_V = textbook.all_logprobs(model, prompt_ids + ids, temperature or 1.0, tokenizer.vocab_size)[-1]
        cumulative_V, u = logp_V.double().exp().cumsum(dim=0), next(numbers)
        token = int((cumulative_V <= u * cumulative_V[-1]).sum() if temperature else logp_V.argmax())
        ids.append(token)
        turn.append(token)
        logprobs.append(float(logp_V[token]))
        sampled.append(True)
        text = tokenizer.decode(turn, skip_special_tokens=False)
        if any(stop in text for stop in environment.stop_strings):
            observation = None
            if len(ids) < cap and n_calls < environment.max_turns:
                observation = environment.respond(prompt_index, tokenizer.decode(ids))
                finish = "stop" if observation is None else "length"
            given = None if observation is None else tokenizer.encode(observation)
            if given is None or len(ids) + len(given) >= cap:
                break
            texts += [Turn(tokenizer.decode(turn), False), Turn(tokenizer.decode(given), True)]
            ids += given
            logprobs += [0.0] * len(given)
            sampled += [False] * len(given)
            turn = []
            n_calls += 1
        elif token in tokenizer.eos_token_ids:
            finish = "stop"
            break
        elif environment.max_turn_tokens and len(turn) == environment.max_turn_tokens:
            break
    at_stop = finish == "stop" and ids[-1] in tokenizer.eos_token_ids
    texts.append(Turn(tokenizer.decode(turn[:-1] if at_stop else turn), False))
    text = tokenizer.decode(ids[:-1] if at_stop else ids)
    return Completion(prompt_index, prompt_ids, ids, logprobs, text, finish, sampled, texts)
