"""Attention for the prefill of an observation: new tokens behind the tokens that a row of the cache already has.

    attention = ContinuedAttention(cache, rows=[4, 7], cached=[30, 12], sizes=[6, 9])
    hidden = model.hidden_states(ids, attention.positions, attention)

No earlier token is computed again. As in a decode step, attention over the prompt and over the row's own tokens is
computed apart and merged by the log-sum-exp (group_cache.py).

Shape letters: N flat new tokens, B rows, T the most new tokens of a row, H query heads, G key-value heads, R = H / G,
K head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.flash_cpu import attend_lse, merge_attention
from rollout.group_cache import GroupCache


class ContinuedAttention:
    """Attention of new tokens of some rows over the prompt, the row's own tokens, and the new ones before them.

    The new tokens' keys and values are written into the cache, behind the first `cached[b]` own tokens of row b.
    """

    def __init__(self, cache: GroupCache, rows: list[int], cached: list[int], sizes: list[int]):
        self.cache, device = cache, cache.k.device
        self.rows = torch.tensor(rows, device=device)
        groups = cache.group_of_row[self.rows]
        group_list = groups.tolist()
        first, size = (torch.tensor(x, device=device)[:, None] for x in (cached, sizes))  # [B, 1]
        offsets = torch.arange(max(sizes), device=device)  # [T]
        self.real = offsets < size  # [B, T]
        place = first + offsets.minimum(size - 1)  # [B, T] among the row's own tokens; padding repeats the last token
        self.flat = (size.cumsum(0) - size) + offsets.minimum(size - 1)  # [B, T] among the N tokens
        self.row_of_token, self.place_of_token = self.rows[:, None].expand_as(place)[self.real], place[self.real]
        self.ends, self.last = (first + size)[:, 0], size.cumsum(0)[:, 0] - 1
        self.positions = (cache.prompt_lengths[groups][:, None] + place)[self.real]  # [N]
        self.reach = max(c + s for c, s in zip(cached, sizes))
        self.prompt_reach = max(cache.prompt_sizes[group] for group in group_list)
        self.groups, self.shape = groups, place.shape
        self.visible = place + 1  # [B, T] own tokens that each new token sees
        self.mask: Tensor | None = None
        self.prompt_mask = _hide_behind(cache.prompt_lengths[groups][:, None], self.prompt_reach, cache.k.dtype)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, H, K], k and v [N, G, K] -> [N, H, K]."""
        cache, n_kv = self.cache, k.shape[1]
        for own, new in ((cache.k, k), (cache.v, v)):
            own[layer][self.row_of_token, :, self.place_of_token] = new
        q = q[self.flat].unflatten(2, (n_kv, -1)).transpose(1, 2).flatten(2, 3)  # [B, G, T * R, K]
        own_k, own_v = (x[layer][self.rows][:, :, : self.reach] for x in (cache.k, cache.v))
        prompt_k, prompt_v = (
            x[layer][self.groups][:, :, : self.prompt_reach] for x in (cache.prompt_k, cache.prompt_v)
        )
        if self.mask is None:  # the same in all layers
            visible = self.visible.repeat_interleave(q.shape[2] // self.shape[1], dim=1)
            self.mask = _hide_behind(visible, self.reach, cache.k.dtype)
        over_own = attend_lse(q, own_k, own_v, self.mask)
        over_prompt = attend_lse(q, prompt_k, prompt_v, self.prompt_mask)
        merged = merge_attention(*over_own, *over_prompt)[0]  # [B, G, T * R, K]
        merged = merged.unflatten(2, (self.shape[1], -1)).transpose(1, 2)  # [B, T, G, R, K]
        return merged[self.real].flatten(1, 2).to(k.dtype)


def _hide_behind(lengths: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """lengths [B, Q] -> [B, 1, Q, size] added to scores: -inf behind the first `lengths[b, q]` keys, else 0.

    The lines are cut out of a table whose lines are multiples of 16 elements, as CUDA kernels need them.
    """
    hidden = torch.arange(-(-size // 16) * 16, device=lengths.device) >= lengths[..., None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device).masked_fill(hidden, -torch.inf)
    return mask[:, None, :, :size]
