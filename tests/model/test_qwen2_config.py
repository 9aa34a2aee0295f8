"""qwen2_config.py: what old and new releases write, and every config that is refused (CHECKLIST 35)."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import make_config, message_of
from test_qwen2_llm import LLAMA3, SIZES

from model.qwen2_config import Qwen2Config

OLD = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 21, "max_position_embeddings": 32768,
    "hidden_act": "silu", "eos_token_id": 151645,
}  # fmt: skip


def test_old_and_new_configs_say_the_same():
    """CHECKLIST 35. `rope_theta` or `rope_parameters`, `torch_dtype` or `dtype`."""
    new = {k: v for k, v in OLD.items() if k not in ("rope_theta", "torch_dtype")}
    new |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "dtype": "bfloat16"}
    new |= {"layer_types": ["full_attention"] * 24, "head_dim": None}
    a, b = Qwen2Config.from_dict(OLD), Qwen2Config.from_dict(new)
    a.raw = b.raw = {}
    assert a == b
    assert (a.rope_theta, a.head_dim, a.tie_word_embeddings, a.attention_bias) == (1e6, 64, True, True)


def test_llama3_scaling_of_old_and_new_configs_is_the_same():
    """CHECKLIST 35."""
    base = {**OLD, "model_type": "llama"}
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    a = Qwen2Config.from_dict({**base, "rope_theta": 1000.0, "rope_scaling": scaling})
    b = Qwen2Config.from_dict({k: v for k, v in base.items() if k != "rope_theta"} | {"rope_parameters": LLAMA3})
    a.raw = b.raw = {}
    assert a == b
    assert (a.rope_theta, a.rope_scaling["factor"], a.attention_bias) == (1000.0, 8.0, False)


def test_absent_rope_theta_and_tying_mean_what_transformers_means():
    """CHECKLIST 35."""
    short = {k: v for k, v in OLD.items() if k not in ("rope_theta", "tie_word_embeddings", "rms_norm_eps")}
    config, theirs = Qwen2Config.from_dict(short), transformers.Qwen2Config()
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma"}, ["model_type", "gemma", "qwen2"]),
        ({"model_type": None}, ["model_type"]),
        ({"use_sliding_window": True}, ["sliding-window", "use_sliding_window"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["sliding-window"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["yarn", "llama3"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, ["dynamic"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, ["linear"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor", "None"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling", "yarn", "object"]),
        ({"rope_parameters": ["default"]}, ["default", "object"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_size": "896"}, ["hidden_size", "'896'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"vocab_size": True}, ["vocab_size"]),
        ({"num_key_value_heads": 3}, ["14", "3"]),
        ({"head_dim": 63}, ["63", "even"]),
        ({"rms_norm_eps": -1.0}, ["rms_norm_eps"]),
        ({"rope_theta": "big"}, ["rope_theta", "big"]),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused_in_a_sentence(change, words, tmp_path):
    """CHECKLIST 35. The file is named too."""
    (tmp_path / "config.json").write_text(json.dumps(OLD | change))
    with pytest.raises(ValueError) as error:
        Qwen2Config.from_pretrained(tmp_path)
    message = message_of(error)
    assert all(word in message for word in [*words, "config.json"]), message


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_a_config_that_is_no_object_is_refused_by_name(content, tmp_path):
    """CHECKLIST 35."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json") as error:
        Qwen2Config.from_pretrained(tmp_path)
    message_of(error)


def test_saving_writes_back_the_keys_it_does_not_know(tmp_path):
    """CHECKLIST 35. The dtype is the one saved now, whichever key the file had it under."""
    raw = {**OLD, **SIZES, "eos_token_id": 7, "made_by": "someone", "dtype": "float16"}
    for dtype in (torch.bfloat16, torch.float32):
        written = Qwen2Config.from_dict(raw).to_dict(dtype)
        assert (written["eos_token_id"], written["made_by"]) == (7, "someone")
        assert {written[key] for key in ("dtype", "torch_dtype") if key in written} == {str(dtype)[6:]}
        again = Qwen2Config.from_dict(written)
        assert again.to_dict(dtype) == written


def test_a_config_of_a_billion_layers_is_refused_before_they_are_built():
    raw = make_config().to_dict() | {"num_hidden_layers": 10**9}
    with pytest.raises(
        ValueError, match="num_hidden_layers is 1000000000, expected a positive whole number below 1000"
    ):
        Qwen2Config.from_dict(raw)
