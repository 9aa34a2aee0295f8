"""The KV cache of rollouts: a prompt's keys and values once for a group of rows, and each row's own tokens.

Attention over the prompt is one product for the whole group: the prompt's keys are read once, and not once for each
row. Attention over the row's own tokens is computed apart, and the two are merged by the log-sum-exp, which is exact
(flash_cpu.py).

Departure from the textbook: nothing is allocated while decoding. The cache has room for the largest numbers of rows,
groups and tokens. Rows [0, n_rows) and groups [0, n_groups) are in use. `arrange` moves them. A row is reused by
setting its length to 0. There are two arrangements of rows:

    packed (width=None)  only running rows, any number in a group. Attention gathers them into a rectangle
                         [groups, slots].
    fixed (width=w)      group g owns rows [g * w, (g + 1) * w), and some of them may be finished. Every shape of a
                         decode step follows from (n_groups, reach), so the step can be recorded as a CUDA graph
                         (decoding.py).

Shape letters: N rows in use, M groups in use, L layers, S tokens, H query heads, G key-value heads, R = H / G,
K head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.attention import PrefillAttention
from model.flash_cpu import attend_lse, merge_attention

if TYPE_CHECKING:
    from model.qwen2_config import Qwen2Config


class GroupCache:
    """Room for `rows` rows of `room` own tokens and `groups` prompts of `prompt_size` tokens.

    Contract: the first `lengths[i]` own tokens of row i are valid, and the first `prompt_lengths[g]` of group g's
    prompt. The numbers behind them are finite and masked: a NaN would pass through the mask. A step calls `begin`,
    `attend` in each layer, and `advance`. Before it the caller sets

        reach     the own tokens that attention reads, more than any row's length
        lockstep  True promises that every running row has reach - 1 own tokens; then no mask is needed
    """

    def __init__(
        self, config: Qwen2Config, rows: int, groups: int, prompt_size: int, room: int, width: int | None = None,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ):  # fmt: skip
        L, G, K = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        own, prompts = (L, rows, G, room, K), (L, groups, G, prompt_size, K)
        self.k, self.v = (torch.zeros(own, dtype=dtype, device=device) for _ in range(2))
        self.prompt_k, self.prompt_v = (torch.zeros(prompts, dtype=dtype, device=device) for _ in range(2))
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.prompt_lengths = torch.ones(groups, dtype=torch.long, device=device)
        self.group_of_row = torch.zeros(rows, dtype=torch.long, device=device)
        self.row_index = torch.arange(rows, device=device)
        self.width, self.n_rows, self.n_groups = width, 0, 0
        self.reach, self.lockstep = room, False
        self.prompt_sizes: list[int] = []  # `prompt_lengths` of the groups in use, readable without a wait
        self.mask: Tensor | None = None
        self.prompt_mask: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes + self.prompt_k.nbytes + self.prompt_v.nbytes

    # -----------------------------------------------------------------------------------------------------------------
    # Between steps

    def arrange(self, row_source: Sequence[int], group_of_row: Sequence[int], group_source: Sequence[int]) -> None:
        """Row i gets the tokens that row `row_source[i]` has now, group g the prompt of group `group_source[g]`.

        -1: nothing. The row has no own tokens, and the group waits for `fill` or is not used.
        """
        self.n_rows, self.n_groups = len(row_source), len(group_source)
        _move([self.k, self.v], row_source, self.reach)
        _move([self.prompt_k, self.prompt_v], group_source, self.prompt_k.shape[3])
        self.lengths[: self.n_rows] = take(self.lengths, row_source, empty=0)
        self.prompt_lengths[: self.n_groups] = take(self.prompt_lengths, group_source, empty=1)
        self.prompt_sizes = [1 if source < 0 else self.prompt_sizes[source] for source in group_source]
        self.group_of_row[: self.n_rows] = torch.tensor(group_of_row, device=self.lengths.device)
        self._lay_out(group_of_row)

    def clear(self) -> None:
        """Empty the cache. Keys of an earlier rollout may be NaN, if its weights were."""
        for tensor in (self.k, self.v, self.prompt_k, self.prompt_v, self.lengths, self.group_of_row):
            tensor.zero_()
        self.prompt_lengths.fill_(1)
        self.n_rows, self.n_groups, self.prompt_sizes = 0, 0, []

    def fill(self, groups: Sequence[int], prefill: PrefillAttention, prompts: Sequence[int]) -> None:
        """Give group `groups[i]` the keys and values of the prefill's prompt `prompts[i]`."""
        at, size = torch.tensor(groups, device=self.k.device), max(prefill.lengths)
        for cache, flat in ((self.prompt_k, prefill.keys), (self.prompt_v, prefill.values)):
            cache[:, :, :, :size][:, at] = prefill.padded(flat, size)[:, torch.tensor(prompts, device=at.device)]
        self.prompt_lengths[at] = torch.tensor([prefill.lengths[p] for p in prompts], device=self.k.device)
        for group, prompt in zip(groups, prompts):
            self.prompt_sizes[group] = prefill.lengths[prompt]

    def _lay_out(self, group_of_row: Sequence[int]) -> None:
        """The place of each row in the rectangle [groups, slots]. Empty slots repeat row 0; their result is dropped."""
        taken = [0] * self.n_groups
        for group in group_of_row:
            taken[group] += 1
        self.slots, columns = max(taken), [0] * self.n_groups
        slot_of_row: list[int] = []
        for group in group_of_row:
            slot_of_row.append(group * self.slots + columns[group])
            columns[group] += 1
        # Rows that fill the rectangle in order need no index. Recorded steps rely on it: an index is a new tensor.
        self.slot_of_row: Tensor | None = None
        self.row_of_slot: Tensor | None = None
        if slot_of_row != list(range(self.n_groups * self.slots)):
            self.slot_of_row = torch.tensor(slot_of_row, device=self.k.device)
            self.row_of_slot = torch.zeros(self.n_groups * self.slots, dtype=torch.long, device=self.k.device)
            self.row_of_slot[self.slot_of_row] = self.row_index[: self.n_rows]

    # -----------------------------------------------------------------------------------------------------------------
    # A step: nothing waits for the device, and no Python number changes while the shapes stay

    @property
    def prompt_reach(self) -> int:
        """Prompt tokens that attention reads."""
        return max(self.prompt_sizes) if self.width is None else self.prompt_k.shape[3]

    def begin(self) -> Tensor:
        """[N] positions of the tokens of this step. Also makes the masks, which its layers share."""
        lengths, prompt_lengths = self.lengths[: self.n_rows], self.prompt_lengths[: self.n_groups]
        self.mask = None if self.lockstep else _hide_behind(lengths + 1, self.reach, self.k.dtype)
        whole = self.width is None and min(self.prompt_sizes) == self.prompt_reach
        self.prompt_mask = None if whole else _hide_behind(prompt_lengths, self.prompt_reach, self.k.dtype)
        return prompt_lengths[self.group_of_row[: self.n_rows]] + lengths

    def advance(self) -> None:
        self.lengths[: self.n_rows] += 1

    def leave_out(self, rows: int, groups: int, group_of_row: Sequence[int]) -> None:
        """After `arrange`: steps use the first `rows` rows and `groups` groups. The others keep their tokens."""
        self.n_rows, self.n_groups = rows, groups
        self._lay_out(group_of_row[:rows])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, H, K], k and v [N, G, K], one token a row -> [N, H, K]."""
        n, m, n_kv = self.n_rows, self.n_groups, k.shape[1]
        own_k, own_v = self.k[layer, :n], self.v[layer, :n]
        # 1. Write the new token behind the row's own ones.
        if self.lockstep:  # all at the same place: a copy instead of a scatter
            own_k[:, :, self.reach - 1], own_v[:, :, self.reach - 1] = k, v
        else:
            at = (self.row_index[:n], slice(None), self.lengths[:n])
            own_k[at], own_v[at] = k, v
        # 2. Attend to the row's own tokens. Heads that share a key head are queries of it: no key is repeated.
        q = q.unflatten(1, (n_kv, -1))  # [N, G, R, K]
        own = attend_lse(q, own_k[:, :, : self.reach], own_v[:, :, : self.reach], self.mask)
        # 3. Attend to the prompt: all rows of a group are queries of its keys.
        q = q if self.row_of_slot is None else q[self.row_of_slot]
        q = q.unflatten(0, (m, self.slots)).transpose(1, 2)  # [M, G, slots, R, K]
        prompt_k, prompt_v = (x[layer, :m, :, : self.prompt_reach] for x in (self.prompt_k, self.prompt_v))
        in_groups = attend_lse(q.flatten(2, 3), prompt_k, prompt_v, self.prompt_mask)
        # 4. Back from the rectangle to rows, [M, G, slots * R, ...] -> [N, G, R, ...], and merge.
        shared, shared_lse = (x.unflatten(2, (self.slots, -1)).transpose(1, 2).flatten(0, 1) for x in in_groups)
        if self.slot_of_row is not None:
            shared, shared_lse = shared[self.slot_of_row], shared_lse[self.slot_of_row]
        return merge_attention(*own, shared, shared_lse)[0].flatten(1, 2).to(k.dtype)


def _hide_behind(lengths: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, size] added to scores: -inf behind the first `lengths[b]` keys, else 0.

    It is cut out of a table whose lines are multiples of 16 elements: CUDA kernels refuse lines that start elsewhere.
    """
    hidden = torch.arange(-(-size // 16) * 16, device=lengths.device) >= lengths[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device).masked_fill(hidden, -torch.inf)
    return mask[:, None, None, :size]


def _move(caches: Sequence[Tensor], source: Sequence[int], size: int) -> None:
    """caches [L, B, G, S, K]: B entry i becomes what entry `source[i]` was, its first `size` tokens."""
    moved = [(i, s) for i, s in enumerate(source) if s not in (-1, i)]
    if not moved:
        return
    to, origin = torch.tensor(moved, device=caches[0].device).T
    for cache in caches:
        for layer in cache[:, :, :, :size]:  # one at a time, because the entries are copied on their way
            layer[to] = layer[origin]


def take(x: Tensor, source: Sequence[int], empty: int) -> Tensor:
    """[len(source)] x[source[i]], and `empty` where source[i] is -1."""
    index = torch.tensor(source, dtype=torch.long, device=x.device)
    return torch.where(index < 0, empty, x[index.clamp(min=0)])
