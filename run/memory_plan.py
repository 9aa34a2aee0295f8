"""Memory of a run, before the run: what it needs by an estimate, and what its largest step takes when it is run once.

    device_gib, host_gib = estimate_gib(model, config, reference)      # by counting; nothing is computed
    print(describe(trainer))                                           # model, precision, tokens of a step, memory
    peak = dry_run(trainer)                                            # the largest possible step, GiB

The estimate counts weights, gradients, the optimizer's fp32 state, and the larger of two: the activations of a
micro-batch, and the KV cache of a rollout.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Protocol

import psutil
import torch

from data_types import Episode, MiniBatch
from model.lora import trainable
from parallel.distributed import world_size
from parallel.sharding import is_sharded
from qwen2_llm import Qwen2ForCausalLM
from rollout.sampling import SamplingParams
from run.config import Config
from tasks.task_base import Task
from tokenizer import Tokenizer

GIB = 2**30
PROMPT_TOKENS = 128  # length of a prompt in the estimate
HEAD_ROWS = 8192  # numbers of the LM head's chunk that are alive for one token


class Trainer(Protocol):
    """The parts of `GRPO` that are needed here."""

    config: Config
    model: Qwen2ForCausalLM
    reference: Qwen2ForCausalLM | None
    tokenizer: Tokenizer
    task: Task
    sampling: SamplingParams

    def rollout(self, batch: MiniBatch, sampling: SamplingParams) -> tuple[list[Episode], list[Episode]]: ...

    def update(self, episodes: list[Episode]) -> dict[str, float]: ...


def estimate_gib(model: Qwen2ForCausalLM, config: Config, reference: Qwen2ForCausalLM | None) -> tuple[float, float]:
    """GiB on the model's device, and GiB in the memory of the host beside it (0 if the device is the host)."""
    c, sizes = config, model.config
    element = model.dtype.itemsize
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in trainable(model))
    on_cpu = model.device.type == "cpu"
    masters = 0 if element == 4 and on_cpu else 4  # fp32 weights on the host are their own masters
    state = trained * (8 + masters)
    weights = parameters * element * (1 if reference in (None, model) else 2)
    tokens = min(c.micro_batch_tokens, c.prompts_per_step * (PROMPT_TOKENS + c.group_size * c.max_new_tokens))
    layer = 12 * sizes.hidden_size * element + 5 * sizes.intermediate_size * element + 8 * sizes.hidden_size
    layers = 1 if c.gradient_checkpointing else sizes.num_hidden_layers
    activations = tokens * (layer * layers + 2 * HEAD_ROWS * element)
    activations += tokens * sizes.num_hidden_layers * sizes.hidden_size * element
    key_and_value = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim * element
    rows = min(512, c.prompts_per_step * c.group_size)
    cache = rows * (c.max_new_tokens * key_and_value + 3 * 4 * sizes.vocab_size)
    device = weights + trained * element + max(activations, cache)
    beside = state if c.cpu_optimizer and not on_cpu else 0
    return (device + state - beside) / GIB, beside / GIB


def describe(trainer: Trainer) -> str:
    """The lines before the first step: model, precision, tokens of a step, memory."""
    config, model = trainer.config, trainer.model
    parameters, trained = (sum(p.numel() for p in some) for some in (model.parameters(), trainable(model)))
    size = f"{parameters / 1e6:.1f} M parameters"
    if trained < parameters:
        size = f"{trained / 1e6:.1f} M of {parameters / 1e6:.1f} M parameters are trained,"
    responses = config.prompts_per_step * config.group_size
    dtype = str(model.dtype).removeprefix("torch.")
    device, host = estimate_gib(model, config, trainer.reference)
    processes, n = "", world_size()
    if n > 1:
        processes = f", by {n} processes with {'a slice' if is_sharded(model) else 'all'} of the weights each"
    return (
        f"{config.ckpt}: {size} in {dtype} on {model.device}; "
        f"{config.task}, {config.loss_type}\n"
        f"a step: {config.prompts_per_step} prompts x {config.group_size} responses x up to "
        f"{config.max_new_tokens} tokens, "
        f"{responses * config.max_new_tokens:,} at most{processes}; {config.steps} steps\n"
        f"memory: about {device:.1f} GiB" + (f" on {model.device}, {host:.1f} GiB beside it" if host else "")
    )


def dry_run(trainer: Trainer) -> float:
    """Run the largest possible step, with responses that never stop, and return its peak memory in GiB.

    The weights change, nothing is written.
    """
    problems = trainer.task.problems("train", trainer.config.prompts_per_step)
    batch = MiniBatch.from_problems(problems, trainer.tokenizer)
    episodes, _ = trainer.rollout(batch, replace(trainer.sampling, ignore_eos=True))
    for i, episode in enumerate(episodes):
        episode.advantage = 1.0 if i % 2 else -1.0
    trainer.update(episodes)
    return peak_gib(trainer.model.device)


def peak_gib(device: torch.device) -> float:
    """Peak memory so far: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    try:
        import resource  # POSIX only
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return max(memory.rss, getattr(memory, "peak_wset", 0)) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB, on macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
