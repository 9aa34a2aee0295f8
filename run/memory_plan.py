"""Memory of a run, before the run: an estimate, the place of the optimizer's state, and the peak of the largest step.

    check_machine(config)                                              # before a download: device, type and place
    need = estimate(model, config, place="host")                       # by counting; nothing is computed
    place = choose_place(model, config)                                # of the optimizer's state
    print(describe(trainer))                                           # model, precision, tokens of a step, memory
    print(advice(trainer))                                             # compared with the memory that is there
    peak = dry_run(trainer)                                            # the largest possible step, GiB

The estimate counts weights, gradients, the optimizer's fp32 state, and the larger of two: the activations of a
micro-batch, and the KV cache of a rollout. If the state is on the host and the weights are on a GPU, it also counts the
pinned memory between the two.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, Protocol

import psutil
import torch

from data_types import Episode, MiniBatch
from model.head_logprobs import logits_at_once
from model.lora import add_lora, has_lora, trainable
from model.memory import device_memory, host_memory
from optimizer import MemoryEfficientAdamW, Place, pinned_bytes_of
from parallel.distributed import world_size
from parallel.sharding import is_sharded
from qwen2_llm import Qwen2ForCausalLM
from rollout.sampling import SamplingParams
from run.config import Config
from run.device import check_compiler, check_dtype, choose_device, choose_dtype
from run.flags import flag_name
from run.pretrained import peek_sizes
from tasks.task_base import Task
from tokenizer import Tokenizer

GIB = 2**30
PROMPT_TOKENS = 128  # length of a prompt in the estimate
HEAD_ROWS = 8192  # on a CPU: numbers of the LM head's chunk that are alive for one token
LORA_SHARE = 0.02  # of the weights, in adapters of rank 16


class Trainer(Protocol):
    """The parts of `GRPO` that are needed here."""

    config: Config
    model: Qwen2ForCausalLM
    reference: Qwen2ForCausalLM | None
    optimizer: torch.optim.Optimizer
    tokenizer: Tokenizer
    task: Task
    sampling: SamplingParams

    def rollout(self, batch: MiniBatch, sampling: SamplingParams) -> tuple[list[Episode], list[Episode]]: ...

    def update(self, episodes: list[Episode]) -> dict[str, float]: ...


class Need(NamedTuple):
    """GiB on the model's device, and GiB in the memory of the host beside it (0 if the device is the host)."""

    device: float
    host: float


def check_machine(config: Config) -> None:
    """Refuse a device, a type or a place that the machine does not have. Fetches no weights.

    Raises ValueError with one line.
    """
    device = choose_device(config.device)
    check_dtype(config.dtype, device)
    if config.compile:
        check_compiler(device)
    if sizes := peek_sizes(config.ckpt):  # else the download itself says why not
        dtype, _ = choose_dtype(config.dtype, device, sizes)
        try:
            with torch.device("meta"):  # shapes without storage
                model = Qwen2ForCausalLM(sizes).to(dtype)
                if config.lora_rank:
                    add_lora(model, config.lora_rank, config.lora_alpha, targets=config.lora_targets)
        except RuntimeError:  # sizes beyond 2^63 bytes; the load names the file
            return
        choose_place(model, config, device)


def estimate(model: Qwen2ForCausalLM, config: Config, place: Place, device: torch.device | None = None) -> Need:
    """Memory of the largest step. device: if another than the model's."""
    c, sizes, device = config, model.config, device or model.device
    element = model.dtype.itemsize
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in trainable(model))
    if c.lora_rank and not has_lora(model):  # a plan for adapters that are not there yet
        trained = int(LORA_SHARE * parameters)
    ranks = world_size() if c.shard_weights else 1
    weights = parameters * element * (2 if c.needs_reference and not c.lora_rank else 1) / ranks
    gradients = trained * element / ranks

    tokens = min(c.micro_batch_tokens, c.prompts_per_step * (PROMPT_TOKENS + c.group_size * c.max_new_tokens))
    layer = 12 * sizes.hidden_size * element + 5 * sizes.intermediate_size * element + 8 * sizes.hidden_size
    layers = 1 if c.gradient_checkpointing else sizes.num_hidden_layers
    activations = tokens * (layer * layers + sizes.num_hidden_layers * sizes.hidden_size * element)
    activations += _head_bytes(model, device, tokens)

    key_and_value = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim * element
    rows = min(512, c.prompts_per_step * c.group_size)
    cache = rows * (c.max_new_tokens * key_and_value + 3 * 4 * sizes.vocab_size)

    step = weights + gradients + max(activations, cache)
    if device.type == "cpu":
        return Need((step + _state_bytes(trained, element, own_master=element == 4)) / GIB, 0.0)
    state = _state_bytes(trained, element, own_master=element == 4 and place == "device") / ranks
    if place == "device":
        return Need((step + state) / GIB, 0.0)
    pinned = pinned_bytes_of(trainable(model)) if device.type == "cuda" else 0
    return Need(step / GIB, (state + pinned) / GIB)


def _state_bytes(trained: int, element: int, own_master: bool) -> int:
    """Two fp32 moments, and an fp32 master unless the weight itself is one."""
    return trained * (8 if own_master else 12)


def _head_bytes(model: Qwen2ForCausalLM, device: torch.device, tokens: int) -> int:
    """The LM head's slice of logits, and fp32 numbers made from it."""
    if device.type == "cpu":
        return tokens * 2 * HEAD_ROWS * model.dtype.itemsize
    return min(logits_at_once(device), tokens * model.config.vocab_size) * (model.dtype.itemsize + 3 * 4)


def choose_place(model: Qwen2ForCausalLM, config: Config, device: torch.device | None = None) -> Place:
    """The place of the optimizer's state for `--optimizer-state`. auto: the device if the estimate fits there.

    device: if another than the model's. Raises ValueError if the device is asked for and is too small.
    """
    asked, device = config.optimizer_state, device or model.device
    if device.type != "cuda":  # a CPU has one memory; on MPS the copies are cheap
        return "device" if asked == "device" else "host"
    need, there = estimate(model, config, "device", device).device, device_memory(device) / GIB
    if asked == "device" and need > there:
        raise ValueError(
            f"--optimizer-state device: the step needs about {need:.1f} GiB with it, and {device} has {there:.1f} GiB; "
            "take --optimizer-state host, or auto"
        )
    return asked if asked != "auto" else "device" if need <= 0.9 * there else "host"


def place_of(optimizer: torch.optim.Optimizer) -> Place:
    return optimizer.place if isinstance(optimizer, MemoryEfficientAdamW) else "device"


def describe(trainer: Trainer) -> str:
    """The lines before the first step: model, precision, tokens of a step, memory."""
    config, model = trainer.config, trainer.model
    parameters, trained = (sum(p.numel() for p in some) for some in (model.parameters(), trainable(model)))
    size = f"{parameters / 1e6:.1f} M parameters"
    if trained < parameters:
        size = f"{trained / 1e6:.1f} M of {parameters / 1e6:.1f} M parameters are trained,"
    responses = config.prompts_per_step * config.group_size
    dtype = str(model.dtype).removeprefix("torch.")
    _, reason = choose_dtype(config.dtype, model.device, model.config)
    place = place_of(trainer.optimizer)
    need = estimate(model, config, place)
    processes, n = "", world_size()
    if n > 1:
        processes = f", by {n} processes with {'a slice' if is_sharded(model) else 'all'} of the weights each"
    memory = f"memory: about {need.device:.1f} of {_there(model.device):.1f} GiB on {model.device}"
    if need.host:
        memory += f", {need.host:.1f} of {host_memory() / GIB:.1f} GiB on the host (optimizer state)"
    elif model.device.type != "cpu":
        memory += " (optimizer state included)"
    return (
        f"{config.ckpt}: {size} in {dtype} ({reason}) on {model.device}; "
        f"{config.task}, {config.loss_type}\n"
        f"a step: {config.prompts_per_step} prompts x {config.group_size} responses x up to "
        f"{config.max_new_tokens} tokens, "
        f"{responses * config.max_new_tokens:,} at most{processes}; {config.steps} steps\n"
        f"{memory}"
    )


def _there(device: torch.device) -> float:
    """GiB of a device that this process may use."""
    return (device_memory(device) if device.type == "cuda" else host_memory()) / GIB


def advice(model: Qwen2ForCausalLM, config: Config, place: Place, device: torch.device | None = None) -> str:
    """One line: the estimate fits the memory that is there, or options with which it fits.

    device: if another than the model's.
    """
    device = device or model.device
    there = Need(_there(device), host_memory() / GIB)
    need = estimate(model, config, place, device)
    if need.device <= there.device and need.host <= there.host:
        return "the estimate fits the memory that is there"
    both = {str(device): (need.device, there.device), "the host": (need.host, there.host)}
    exceeded = " and ".join(f"{name} ({x:.1f} of {y:.1f} GiB)" for name, (x, y) in both.items() if x > y)
    options = ""
    for options, c, new_place in _savings(config, place, device, device_is_short=need.device > there.device):
        less = estimate(model, c, new_place, device)
        if less.device <= there.device and less.host <= there.host:
            return f"the estimate exceeds {exceeded}; it fits with {options}"
    also = f", also with {options}" if options else ""
    return f"the estimate exceeds {exceeded}{also}; take a smaller model"


def _savings(
    config: Config, place: Place, device: torch.device, device_is_short: bool
) -> Iterator[tuple[str, Config, Place]]:
    """Options that save memory, each with those before it: (flags, config, place of the optimizer's state)."""
    flags: dict[str, str] = {}

    def text() -> str:
        return " ".join(f"{name} {value}".strip() for name, value in flags.items())

    if device_is_short:
        if place == "device" and device.type == "cuda":
            place, flags["--optimizer-state"] = "host", "host"
            yield text(), config, place
        if not config.gradient_checkpointing:
            config, flags["--gradient-checkpointing"] = replace(config, gradient_checkpointing=True), ""
            yield text(), config, place
        for name, least in (("micro_batch_tokens", 2048), ("prompts_per_step", 4)):
            while getattr(config, name) > least:
                number = max(least, getattr(config, name) // 2)
                config, flags[flag_name(name)] = replace(config, **{name: number}), str(number)
                yield text(), config, place
    elif place == "host":
        yield "--optimizer-state device", config, "device"
    if not config.lora_rank:
        flags["--lora-rank"] = "16"
        yield text(), replace(config, lora_rank=16), place


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
