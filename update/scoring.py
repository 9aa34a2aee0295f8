"""Scores of sampled tokens under a policy: log-probabilities, entropies, hidden states, tokens of high entropy.

    logp, entropy = score(model, micro)                 # a micro-batch, with a gradient
    scores = score_episodes(model, episodes)            # whole episodes, without one

Shape letters: M response tokens of a micro-batch, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_types import Episode
from model.attention import PackedAttention
from model.head_logprobs import token_logprobs
from model.memory import halve_when_out_of_memory
from parallel.distributed import gather_each, in_lockstep, rank
from parallel.sharding import is_sharded
from qwen2_llm import Qwen2ForCausalLM
from update import losses
from update.packing import MicroBatch, Scores, Step


def score(model: Qwen2ForCausalLM, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """Log-probability of every response token, and entropy of the distribution at its position: [M] and [M], fp32."""
    return score_states(model, micro, response_states(model, micro))


def response_states(model: Qwen2ForCausalLM, micro: MicroBatch) -> Tensor:
    """Last hidden states [M, D] that predict the response tokens."""
    return model.hidden_states(micro.ids, micro.positions, PackedAttention(micro.layout))[micro.predicting_rows]


def score_states(model: Qwen2ForCausalLM, micro: MicroBatch, hidden_MD: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `score`, from hidden states that are already computed."""
    inputs = hidden_MD, model.head_weight, micro.targets, micro.temperature, micro.vocab_size
    return token_logprobs(*inputs) if micro.kept is None else token_logprobs(*inputs, kept_MK=micro.kept)


@torch.no_grad()
def score_episodes(
    model: Qwen2ForCausalLM, episodes: Sequence[Episode], *, keep_hidden: bool = False,
    micro_batch_tokens: int = 16384, groups: set[int] | None = None,
) -> list[Scores]:  # fmt: skip
    """Scores of each episode's tokens under the model, without a gradient and without dropout.

    keep_hidden: also return the hidden states.
    micro_batch_tokens: most tokens in one forward pass. It is halved if memory runs out.
    groups: ids of the groups to score. None: all. Episodes of other groups get empty scores.
    """
    step = Step(episodes, model.device, groups=groups, lockstep=is_sharded(model))
    nothing = Scores(torch.zeros(0), torch.zeros(0, model.config.hidden_size) if keep_hidden else None)
    scores = [nothing] * len(episodes)

    def score_all(max_tokens: int) -> None:
        for micro in step.micro_batches(max_tokens):
            hidden = response_states(model, micro)
            logp, _ = score_states(model, micro, hidden)
            sizes = micro.lengths.tolist()
            hiddens = hidden.cpu().split(sizes) if keep_hidden else [None] * len(sizes)
            for number, *pair in zip(micro.numbers, logp.cpu().split(sizes), hiddens):
                scores[number] = Scores(*pair)

    was_training = model.training
    model.eval()
    try:
        halve_when_out_of_memory(in_lockstep(score_all) if is_sharded(model) else score_all, micro_batch_tokens)
    finally:
        model.train(was_training)
    return scores


@torch.no_grad()
def top_entropy_masks(
    model: Qwen2ForCausalLM, micro_batches: list[MicroBatch], share: float
) -> Sequence[Tensor | None]:
    """For each micro-batch, a mask [M] of the tokens among the step's `share` of highest entropy. None: all tokens."""
    if share == 1:
        return [None] * len(micro_batches)
    entropies = [score(model, micro)[1] for micro in micro_batches]
    parts = gather_each(torch.cat([torch.zeros(0), *(e.cpu() for e in entropies)]))
    mask = losses.top_entropy_mask(torch.cat(parts), share).split([len(part) for part in parts])[rank()]
    return list(mask.to(model.device).split([len(e) for e in entropies]))
