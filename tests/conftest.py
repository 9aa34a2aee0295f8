"""Fixtures that the tests share: a tiny Qwen2 in which every weight matters, and a byte-level tokenizer for it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import settings

from model.qwen2_config import Qwen2Config
from qwen2_llm import Qwen2ForCausalLM
from tokenizer import Tokenizer

torch.set_num_threads(1)
settings.register_profile("same every time", derandomize=True, deadline=None)
settings.load_profile("same every time")

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in dir(signal)]  # Windows has two
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 256, 257, 258


def make_config(**changes) -> Qwen2Config:
    """A Qwen2 with grouped heads whose head size is not hidden / heads, and 16 embedding rows no token uses."""
    settings = {
        "vocab_size": 275,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 1000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    return Qwen2Config(**(settings | changes))


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter a random value, biases and norm weights too: one that is not used then shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + 1 if "norm" in name else noise)
    return model


def make_model(config: Qwen2Config | None = None, seed: int = 0) -> Qwen2ForCausalLM:
    return randomize(Qwen2ForCausalLM(config or make_config()), seed)


def write_tokenizer(folder: str | Path, eos_token_ids=(258, 256), chat_template: str = CHAT_TEMPLATE) -> Path:
    """A tokenizer folder: a token a byte (ids 0 to 255 in the order of byte-level BPE), and the three of ChatML."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL_TOKENS)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": chat_template}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(eos_token_ids)}))
    return folder


def message_of(error: pytest.ExceptionInfo) -> str:
    """The error's text, which must be one line."""
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


@pytest.fixture(autouse=True)
def _signal_handlers():
    """train.py takes Ctrl-C over. Give it back."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def tiny_config() -> Qwen2Config:
    return make_config()


@pytest.fixture
def tiny_model() -> Qwen2ForCausalLM:
    """Fresh for each test, so that a test may train it."""
    return make_model()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder) -> Tokenizer:
    """Vocabulary of 259 ids, stops at 256 and 258."""
    return Tokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def checkpoint_folder(tiny_model, tokenizer, tmp_path) -> Path:
    """A whole checkpoint: weights, config and tokenizer."""
    folder = tmp_path / "tiny"
    tiny_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
