"""The episodes of one optimizer step as flat rows: their token weights, and their cut into micro-batches.

    step = Step(episodes, model.device, loss_options)
    for micro in step.micro_batches(max_tokens=16384): ...

Weights are computed once for the whole step, and micro-batches add up their parts. Their size changes memory,
not the gradient. The prompt of a group is in a micro-batch once, and all its responses attend to it.

A response may contain tokens that the environment gave (docs/tools.md). They are rows like those of a prompt: later
tokens attend to them, and they have no target. M, `lengths` and all scores count sampled tokens only.

Shape letters: N flat tokens of a micro-batch, M of them scored (sampled tokens), E episodes, T sampled tokens of one
response, D hidden.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from data_types import Episode
from model.layout import Layout
from parallel.distributed import gather_each
from run.options import LossOptions
from update import losses


class Scores(NamedTuple):
    """Scores of one response under a policy, on the CPU: log-probability of each token, [T] fp32.

    hidden: the last hidden states that predict the tokens, [T, D]. None: they were not asked for.
    """

    logp: Tensor
    hidden: Tensor | None = None


@dataclass
class MicroBatch:
    """Groups, or pieces of large groups, as flat rows: each prompt once, then its responses.

    The last token of a response predicts nothing and has no row.
    """

    ids: Tensor  # [N]
    positions: Tensor  # [N]
    layout: Layout
    predicting_rows: Tensor  # [M] the row whose hidden state predicts the token
    targets: Tensor  # [M]
    old_logp: Tensor  # [M] the sampler's
    weights: Tensor  # [M] the token's share in the step's loss
    mean_weights: Tensor  # [M] its share in a mean over the step's tokens: the same for every loss type
    advantages: Tensor  # [E]
    lengths: Tensor  # [E]
    answer_weight: float  # weight of a response in a mean over the step's responses
    temperature: float
    vocab_size: int | None
    kept: Tensor | None  # [M, K] the ids that each token was sampled from; -1 fills up. None: all
    numbers: list[int]  # [E] index of each episode in the step
    before: list[Scores] | None  # [E] the training code's scores with the weights before the rollout's first update


class Member(NamedTuple):
    number: int
    episode: Episode
    weights: Tensor  # [T]
    mean_weights: Tensor  # [T]


class Step:
    """The episodes of one optimizer step.

    loss: gives the weights of the tokens. Episodes of advantage 0 are left out if they have no gradient (no divergence
        and no entropy term). None: all episodes with a sampled token.
    before: scores of each episode by the training code before the rollout's first update, for losses that need them.
    groups: ids of the groups that this process computes. None: all. The weights are those of the whole step.
    lockstep: make as many micro-batches as every other rank. The last ones are idle.
    Raises ValueError for episodes sampled in different ways.
    """

    def __init__(
        self, episodes: Sequence[Episode], device: torch.device, loss: LossOptions | None = None, *,
        max_new_tokens: int | None = None, before: Sequence[Scores] | None = None, groups: set[int] | None = None,
        lockstep: bool = False,
    ):  # fmt: skip
        if len({(e.temperature, e.vocab_size) for e in episodes}) > 1:
            raise ValueError("the episodes of one update were sampled at different temperatures or vocabularies")
        self.masked = any(e.kept is not None for e in episodes)
        if self.masked and any(e.kept is None or len(e.kept) != len(e.response_ids) for e in episodes):
            raise ValueError("an episode of the update lacks a sampling mask for its tokens, and others have one")
        self.episodes, self.device, self.before = episodes, device, before
        self.groups, self.lockstep = groups, lockstep
        loss_type, masked = ("dapo", False) if loss is None else (loss.loss_type, loss.mask_truncated)
        everything = loss is None or loss.needs_equal_groups
        self.sampled_by = (episodes[0].temperature, episodes[0].vocab_size) if episodes else (1.0, None)
        lengths = torch.tensor([e.n_sampled for e in episodes], dtype=torch.long)
        kept = [n > 0 and not (masked and e.truncated) for n, e in zip(lengths.tolist(), episodes)]
        longest = max_new_tokens or max([1, *lengths.tolist()])
        keep_M = torch.tensor(kept, dtype=torch.bool).repeat_interleave(lengths)
        weights, mean_weights = (
            losses.token_weights(name, lengths, longest, keep_M).split(lengths.tolist()) for name in (loss_type, "dapo")
        )
        members = map(Member, range(len(episodes)), episodes, weights, mean_weights)
        # An episode with a NaN reward has advantage 0. With beta or an entropy term its tokens still count.
        trained = [m for m, k in zip(members, kept) if k and (everything or m.episode.advantage != 0)]
        self.trains = bool(trained)  # an episode of the whole step has a gradient
        self.trained = trained
        self.answer_weight = 1 / max(1, sum(kept))
        self.weights = weights  # of each episode, [T]
        self.denominators = {"tokens": int(keep_M.sum()), "responses": len(episodes), "longest": longest}

    def micro_batches(self, max_tokens: int) -> Iterator[MicroBatch]:
        """Pack groups in order until the next one does not fit. A group that is too large alone is cut into pieces.

        The prompt is computed once in each piece."""
        packed: list[list[list[Member]]] = []
        size = 0
        for piece in self._pieces(max_tokens):
            tokens = self._tokens(piece)
            if packed and size + tokens <= max_tokens:
                packed[-1].append(piece)
                size += tokens
            else:
                packed.append([piece])
                size = tokens
        idle = max(gather_each(len(packed))) - len(packed) if self.lockstep else 0
        for groups in packed + [[]] * idle:
            yield self._micro_batch(groups)

    def _pieces(self, max_tokens: int) -> list[list[Member]]:
        """Episodes that share the computation of a prompt. They have the same group and the same prompt ids."""
        groups = defaultdict(list)
        for member in self.trained:
            if self.groups is not None and member.episode.group_id not in self.groups:
                continue
            key = (member.episode.group_id, tuple(member.episode.prompt_ids))
            groups[key].append(member)
        pieces: list[list[Member]] = []
        for group in groups.values():
            pieces.append([])
            for member in group:
                if pieces[-1] and self._tokens([*pieces[-1], member]) > max_tokens:
                    pieces.append([])
                pieces[-1].append(member)
        return pieces

    @staticmethod
    def _tokens(piece: list[Member]) -> int:
        return len(piece[0].episode.prompt_ids) + sum(len(m.episode.response_ids) - 1 for m in piece)

    def _micro_batch(self, groups: list[list[Member]]) -> MicroBatch:
        """The micro-batch of these groups. Without a group it is idle: one row without a scored token.

        An idle micro-batch lets this rank take part when the ranks gather the sharded weights of a layer."""
        members = [member for group in groups for member in group]
        episodes = [m.episode for m in members]
        ids: list[int] = []
        rows: list[int] = []
        for group in groups:
            prompt = group[0].episode.prompt_ids
            last_prompt_row = len(ids) + len(prompt) - 1
            ids += prompt
            for _, e, *_ in group:
                before = [last_prompt_row, *range(len(ids), len(ids) + len(e.response_ids) - 1)]
                rows += [before[t] for t in e.sampled_positions]
                ids += e.response_ids[:-1]
        layout = Layout.shared_prefix(
            [len(group[0].episode.prompt_ids) for group in groups] or [1],
            [[len(m.episode.response_ids) - 1 for m in group] for group in groups] or [[]],
        )

        kept = [e.kept[t] for e in episodes if e.kept for t in e.sampled_positions]

        def on_device(numbers: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(numbers, dtype=dtype, device=self.device)

        return MicroBatch(
            ids=on_device(ids or [0], torch.long),
            positions=layout.positions(self.device),
            layout=layout,
            predicting_rows=on_device(rows, torch.long),
            targets=on_device([e.response_ids[t] for e in episodes for t in e.sampled_positions], torch.long),
            old_logp=on_device([x for e in episodes for x in e.sampled_logprobs], torch.float32),
            weights=torch.cat([torch.zeros(0), *(m.weights for m in members)]).to(self.device),
            mean_weights=torch.cat([torch.zeros(0), *(m.mean_weights for m in members)]).to(self.device),
            advantages=on_device([e.advantage for e in episodes], torch.float32),
            lengths=on_device([e.n_sampled for e in episodes], torch.long),
            answer_weight=self.answer_weight,
            temperature=self.sampled_by[0],
            vocab_size=self.sampled_by[1],
            kept=_rows_of_ids(kept).to(self.device) if self.masked else None,
            numbers=[m.number for m in members],
            before=[self.before[m.number] for m in members] if self.before is not None else None,
        )


def _rows_of_ids(rows: list[list[int]]) -> Tensor:
    """[M, K]; rows of fewer than K ids are filled up with -1."""
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.long).view(len(rows), width)
