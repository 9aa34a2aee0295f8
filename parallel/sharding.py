"""One model over several processes: each has a slice of the weights and gradients (FSDP2) and of AdamW's state.

    torchrun --nproc-per-node 8 train.py --shard-weights --ckpt Qwen2.5-7B-Instruct

    shard(model)                                        # in place: parameters become DTensors, sliced along dimension 0
    optimizer = ShardedAdamW(trainable(model), lr=1e-6) # masters and moments of this rank's slices only
    plain = whole(model)                                # every rank gets all weights, as a model without FSDP

In training, the weights of a block are gathered just before its forward pass and again before its backward pass. Its
gradients are summed and sliced at once (Rajbhandari et al. 2020, arXiv 1910.02054, stage 3). All ranks must therefore
run equally many forward and backward passes, and packing.Step pads with idle micro-batches. A rollout cannot guarantee
equal numbers of passes, and it would gather all weights again for every token. It uses a whole copy of the model, which
is freed after the rollout (benchmarks/scaling.py measures both).

Departures from the usual FSDP: gradients are summed, not averaged, because the weights of the tokens are computed for
the whole step. Checkpoints are not sharded: they are gathered into the files of a single process. A run can therefore
resume with any number of processes, sharded or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from model.lora import add_lora, lora_layers
from model.memory import halve_when_out_of_memory
from optimizer import STATE_NAMES, MemoryEfficientAdamW, gradient_norm
from parallel.distributed import (
    in_lockstep,
    is_main,
    my_groups,
    rank,
    sum_gradients,
    telling_the_others,
    world_size,
)
from qwen2_llm import Qwen2ForCausalLM


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def shard(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """Slice the model over all ranks, block by block. In a single process it stays whole. Returns the same model.

    Embedding, last norm and head stay gathered from forward to backward, because the loss uses the head after the
    forward pass of the model.
    """
    if world_size() == 1:
        return model
    mesh = init_device_mesh(model.device.type, (world_size(),))
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden_states")
    for module in _parts(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model


def _parts(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@torch.no_grad()
def whole(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """A plain copy with all weights and adapters on this rank's device. A model that is not sharded is returned itself.

    All ranks must call this. The copy is for reading: later updates do not change it.
    """
    if not is_sharded(model):
        return model
    for part in _parts(model):
        part.reshard()  # a forward pass without a backward leaves the outermost part gathered
    with torch.device("meta"):
        copy = Qwen2ForCausalLM(model.config)
    adapters = lora_layers(model)
    if adapters:
        one = next(iter(adapters.values()))
        add_lora(copy, one.rank, one.alpha, one.dropout, sorted({name.rpartition(".")[2] for name in adapters}))
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(copy.get_submodule(owner), leaf, nn.Parameter(cast(DTensor, p).full_tensor(), requires_grad=False))
    return copy


class ShardedAdamW(MemoryEfficientAdamW):
    """`MemoryEfficientAdamW` over this rank's slices of sharded parameters.

    Its parameters are plain tensors that share memory with the slices. `take_gradients` gives them their gradients.
    """

    def __init__(self, params: Iterable[nn.Parameter], *args: Any, **options: Any):
        self.sharded = list(params)
        super().__init__([nn.Parameter(_local(p).detach()) for p in self.sharded], *args, **options)

    @property
    def slices(self) -> list[nn.Parameter]:
        """The local slice of each parameter."""
        return self.param_groups[0]["params"]

    def take_gradients(self) -> None:
        """Refresh `.data` and `.grad` of every local slice. FSDP may have reallocated its shards."""
        for mine, p in zip(self.slices, self.sharded):
            mine.data = _local(p).detach()
            mine.grad = None if p.grad is None else _local(p.grad)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in (*self.sharded, *self.slices):
            p.grad = None

    def whole_state_dict(self) -> dict[str, Any]:
        """The `state_dict` of a single process, on rank 0. The others get an empty one. All ranks must call this."""
        mine = self.state_dict()
        state = {
            index: {name: _gather_rows(x, self.sharded[index]) if name in STATE_NAMES else x for name, x in one.items()}
            for index, one in mine["state"].items()
        }
        return mine | {"state": state} if is_main() else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this rank's slices of the `state_dict` of a single process."""
        self.take_gradients()
        state = {
            index: {name: self._slice(x, index) if name in STATE_NAMES else x for name, x in one.items()}
            for index, one in state_dict["state"].items()
        }
        super().load_state_dict(state_dict | {"state": state})

    def _slice(self, value: Tensor, index: int) -> Tensor:
        if index >= len(self.sharded) or value.shape != self.sharded[index].shape:
            expected = tuple(self.sharded[index].shape) if index < len(self.sharded) else "none"
            raise ValueError(f"optimizer state {index} has shape {tuple(value.shape)}, expected {expected}")
        rows = -(-len(value) // world_size())
        return value[rank() * rows : (rank() + 1) * rows]


def _local(sharded: Tensor) -> Tensor:
    """This rank's slice of a sharded tensor."""
    return cast(DTensor, sharded).to_local()


def _gather_rows(mine: Tensor, p: Tensor) -> Tensor | None:
    """Gather a tensor that is sliced as the parameter `p` is. Rank 0 returns all rows on the CPU, the others None.

    Each rank has ceil(rows / ranks) rows. The last ranks may have fewer or none."""
    rows = -(-p.shape[0] // world_size())
    padded = torch.zeros(rows, *p.shape[1:], dtype=mine.dtype)
    padded[: len(mine)] = mine.cpu()
    parts = [torch.empty_like(padded) for _ in range(world_size())] if is_main() else None
    dist.gather(padded, parts, dst=0)
    return torch.cat(parts)[: p.shape[0]] if parts is not None else None


def gradients_of_all_ranks(
    gradient: Callable[[int], Any], step: Any, model: nn.Module, optimizer: torch.optim.Optimizer, max_tokens: int
) -> tuple[Any, Tensor]:
    """Compute `gradient(max_tokens)` on every rank for its groups of `step`, and add up. Returns (totals, joint norm).

    step: update.packing.Step. It is restricted to this rank's groups here.
    gradient: adds to `.grad` and returns update.step_metrics.StepTotals. It runs again with fewer tokens if memory
        runs out. With sharded weights it cannot, and a RankError ends the run.
    """
    step.groups, step.lockstep = my_groups(step.episodes), is_sharded(model)
    together = in_lockstep if is_sharded(model) else telling_the_others
    totals = halve_when_out_of_memory(together(lambda size: gradient(size).of_all_ranks()), max_tokens)
    if step.trains:
        if isinstance(optimizer, ShardedAdamW):
            optimizer.take_gradients()  # FSDP has summed them
        else:
            sum_gradients(p for group in optimizer.param_groups for p in group["params"])
    norm = gradient_norm(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    if isinstance(optimizer, ShardedAdamW):  # each rank has a slice
        square = norm.double().square()
        dist.all_reduce(square)
        norm = square.sqrt().to(norm.dtype)
    return totals, norm


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state that rank 0 saves, of a sharded optimizer the whole. All ranks must call this."""
    return optimizer.whole_state_dict() if isinstance(optimizer, ShardedAdamW) else optimizer.state_dict()
