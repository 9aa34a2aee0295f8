"""Device and dtype of a run, as the machine has them, with the reason for each choice.

    device = choose_device("auto")                                # before anything is downloaded
    check_dtype(config.dtype, device)                             # ValueError with one line
    dtype, reason = choose_dtype(config.dtype, device, sizes)     # once config.json is there

The type of the weights follows the machine. bf16 on a CPU without instructions for it takes several times as long as
fp32. A GPU of compute capability 7.x (T4, V100, RTX 20) computes in fp16 and not in bf16.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
import warnings

import torch

from model.attention import check_cuda_attention
from model.qwen2_config import Qwen2Config
from model.torch_private import has_bf16_products

logger = logging.getLogger(__name__)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TINY = 1e6  # layers * hidden^2: a model so small is not bound by memory
NO_CARD = ("no NVIDIA driver", "No CUDA GPUs", "no CUDA-capable device")  # a machine without a GPU: nothing to tell


def choose_device(name: str) -> torch.device:
    """The device for `--device`. auto: CUDA, else MPS, else the CPU; a GPU that cannot be used is reported.

    Raises ValueError if a device is asked for that is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if problem := cuda_problem():
            _warn_once(f"the GPU is not used, and the run takes the CPU: {problem}")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: {cuda_problem() or 'this machine has no CUDA GPU'}; take --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch finds no Metal GPU on this machine; take --device cpu")
    return torch.device(name)


def cuda_problem() -> str | None:
    """One line about a GPU that torch cannot use, such as a driver that is too old. None: there is no GPU."""
    if torch.version.cuda is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        sentence = " ".join(str(error).split())
        if any(words in sentence for words in NO_CARD):
            return None
        return f"{sentence[:200].rstrip('. ')} (this torch was built for CUDA {torch.version.cuda})"
    return None


def check_compiler(device: torch.device) -> None:
    """Raise ValueError, with one line, if the programs that torch.compile needs are not there."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "cl")), "g++")
    if device.type == "cpu" and not shutil.which(compiler):
        raise ValueError(f"--compile needs a C++ compiler on a CPU, and {compiler} is not there; leave --compile out")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("--compile needs Triton on a GPU (pip install triton); leave --compile out")


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def check_dtype(name: str, device: torch.device) -> None:
    """Raise ValueError, with one line, for a type that the device does not compute in.

    A CPU computes in every type. It is slow in 16 bits without instructions for them, and then a warning says so.
    """
    if name == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(
            f"--dtype bf16: {torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and bf16 "
            "begins with 8.0 (A100, RTX 30); take --dtype fp16, or auto"
        )
    if name == "bf16" and device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise ValueError("--dtype bf16: Metal computes in bf16 from macOS 14 on; take --dtype fp16, or auto")
    if device.type == "cpu" and (name == "fp16" or (name == "bf16" and not has_bf16_products())):
        _warn_once(f"--dtype {name} is slow on this CPU; --dtype fp32 takes less time for a step")


def choose_dtype(name: str, device: torch.device, sizes: Qwen2Config) -> tuple[torch.dtype, str]:
    """The type for `--dtype`, and the reason in a few words.

    Raises ValueError, with one line, if the device has no attention kernel for it.
    """
    check_dtype(name, device)
    dtype, reason = _choose(name, device, sizes)
    if device.type == "cuda":
        check_cuda_attention(dtype, sizes.head_dim, torch.cuda.get_device_capability(device))
    return dtype, reason


def _choose(name: str, device: torch.device, sizes: Qwen2Config) -> tuple[torch.dtype, str]:
    if name != "auto":
        return DTYPES[name], "as asked for"
    if sizes.num_hidden_layers * sizes.hidden_size**2 < TINY:
        return torch.float32, "a tiny model"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        number = f"compute capability {capability[0]}.{capability[1]}"
        if capability >= (8, 0):
            return torch.bfloat16, f"{number} computes in bf16"
        if capability >= (7, 0):
            return torch.float16, f"{number} computes in fp16 and not in bf16"
        return torch.float32, f"{number} has no fast 16-bit products"
    if device.type == "cpu":
        if has_bf16_products():
            return torch.bfloat16, "this CPU computes in bf16"
        return torch.float32, "this CPU has no bf16 instructions"
    if torch.backends.mps.is_macos_or_newer(14, 0):
        return torch.bfloat16, "Metal computes in bf16"
    return torch.float16, "Metal computes in bf16 from macOS 14 on"
