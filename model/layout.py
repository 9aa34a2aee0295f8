"""How flat token rows form sequences.

The model runs on flat token rows [N, D]. A `Run` is one causal sequence in them, and a `Layout` is a list of runs. A
response is a run with a prefix: the rows of its prompt, which it shares with the other responses of its group.
Positions and masks follow from the layout. Attention (attention.py) reads it.

Shape letters: N flat tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Rows [start, start + length) are one causal sequence; rows [prefix_start, + prefix_length) stand before it."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.length)

    @property
    def prefix_rows(self) -> slice:
        return slice(self.prefix_start, self.prefix_start + self.prefix_length)


class Layout:
    """How flat token rows form sequences.

    `Layout.causal([5, 3])` is two sequences end to end. `Layout.shared_prefix([4], [[2, 3]])` is a prompt of 4 rows
    followed by its responses of 2 and 3 rows, each of which sees the prompt and itself, and not its sibling.
    """

    def __init__(self, runs: Sequence[Run]):
        self.runs = list(runs)
        self.n_rows = sum(run.length for run in self.runs)

    @classmethod
    def causal(cls, lengths: Sequence[int]) -> Layout:
        return cls.shared_prefix(lengths, [[] for _ in lengths])

    @classmethod
    def shared_prefix(cls, prompt_lengths: Sequence[int], response_lengths: Sequence[Sequence[int]]) -> Layout:
        runs, start = [], 0
        for prompt_length, lengths in zip(prompt_lengths, response_lengths, strict=True):
            prompt = Run(start, prompt_length)
            runs.append(prompt)
            start += prompt_length
            for length in lengths:
                runs.append(Run(start, length, prompt.start, prompt.length))
                start += length
        return cls(runs)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """[N] position of each row in its own text: a response goes on counting where its prompt stopped."""
        runs = [torch.arange(r.prefix_length, r.prefix_length + r.length) for r in self.runs]
        return torch.cat(runs).to(device)

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """[N, N] bool, True where row i may look at row j. Quadratic: for the eager reference only."""
        mask = torch.zeros(self.n_rows, self.n_rows, dtype=torch.bool)
        for run in self.runs:
            mask[run.rows, run.rows] = torch.ones(run.length, run.length, dtype=torch.bool).tril()
            mask[run.rows, run.prefix_rows] = True
        return mask.to(device)
