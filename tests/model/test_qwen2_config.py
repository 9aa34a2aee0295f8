"""qwen2_config.py: configs of old and new releases, and every config that is refused (CHECKLIST 35)."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import make_config, message_of, randomize
from safetensors.torch import save_file
from test_qwen2_llm import LLAMA3, SIZES

from model.qwen2_config import Qwen2Config
from qwen2_llm import Qwen2ForCausalLM

OLD = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 21, "max_position_embeddings": 32768,
    "hidden_act": "silu", "eos_token_id": 151645,
}  # fmt: skip
SCALING = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
THETA = {"rope_type": "default", "rope_theta": 1e6}


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
        ({"rope_theta": 0}, ["rope_theta", "0"]),
        ({"rope_theta": 10**400}, ["rope_theta", "positive"]),
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps", "positive"]),
        ({"rope_scaling": LLAMA3 | {"factor": 10**400, "rope_theta": None}}, ["factor", "positive"]),
        ({"vocab_size": 10**400}, ["vocab_size", "positive"]),
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings", "'false'", "true or false"]),
        ({"tie_word_embeddings": None}, ["tie_word_embeddings", "None"]),
        ({"model_type": "llama", "attention_bias": "yes"}, ["attention_bias", "'yes'"]),
        # RoPE: an unknown type in either place, two places that disagree, one RoPE for each layer type
        ({"rope_parameters": THETA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["yarn", "llama3"]),
        ({"rope_parameters": {**THETA, "rope_type": "longrope"}, "rope_scaling": None}, ["longrope"]),
        ({"rope_parameters": THETA, "rope_scaling": {"type": "mrope"}}, ["mrope"]),
        ({"rope_parameters": LLAMA3, "rope_scaling": {"rope_type": "dynamic"}}, ["dynamic"]),
        ({"rope_parameters": THETA, "rope_scaling": LLAMA3}, ["'default'", "'llama3'", "remove"]),
        ({"rope_scaling": {"rope_type": "default", "type": "llama3"}}, ["rope_scaling", "default", "llama3"]),
        ({"rope_parameters": SCALING, "rope_scaling": SCALING | {"factor": 4.0}}, ["factor", "8.0", "4.0"]),
        ({"rope_theta": 5000.0, "rope_parameters": THETA}, ["rope_theta", "5000.0", "1000000.0"]),
        ({"rope_scaling": {"factor": 4.0}}, ["factor", "rope_type"]),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, ["factor", "rope_type"]),
        ({"rope_scaling": SCALING | {"low_freq_factor": 4.0}}, ["low_freq_factor", "high_freq_factor"]),
        ({"rope_scaling": SCALING, "original_max_position_embeddings": 64}, ["original_max_position", "64", "32"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"rope_parameters": {"full_attention": THETA}}, ["rope_parameters", "full_attention", "layer type"]),
        ({"rope_parameters": {**THETA, "sliding_attention": THETA}}, ["sliding_attention", "layer type"]),
        # settings that change the computation
        ({"is_causal": False}, ["is_causal", "causal attention only"]),
        ({"is_causal": None}, ["is_causal"]),
        ({"layer_types": ["full_attention"] * 23 + ["linear_attention"]}, ["layer_types", "linear_attention"]),
        ({"layer_types": ["full_attention"] * 23 + ["sliding_attention"]}, ["layer_types", "sliding-window"]),
        ({"layer_types": ["full_attention"] * 23 + [None]}, ["layer_types", "None"]),
        ({"layer_types": ["full_attention"] * 23}, ["layer_types", "24 layers"]),
        ({"layer_types": []}, ["layer_types", "24 layers"]),
        ({"layer_types": "full_attention"}, ["layer_types", "24 layers"]),
        ({"use_sliding_window": True, "max_window_layers": 23}, ["sliding-window"]),
        ({"use_sliding_window": "no"}, ["use_sliding_window", "'no'"]),
        ({"per_layer_config": {"0": {"head_dim": 32}}}, ["per_layer_config"]),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ["quantized", "awq", "bits 4"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, ["quantized", "gptq"]),
        ({"quantization_config": {"load_in_4bit": True}}, ["quantized", "load_in_4bit"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantized", "fp8"]),
        ({"compression_config": {"format": "int8"}}, ["quantized", "compression_config"]),
        ({"quantization": {"group_size": 64, "bits": 4}}, ["quantized", "bits 4"]),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused_in_a_sentence(change, words, tmp_path):
    """CHECKLIST 35. The file is named too."""
    (tmp_path / "config.json").write_text(json.dumps(OLD | change))
    with pytest.raises(ValueError) as error:
        Qwen2Config.from_pretrained(tmp_path)
    message = message_of(error)
    assert all(word in message for word in [*words, "config.json"]), message


WINDOW = {"use_sliding_window": True, "sliding_window": 4, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"rope_theta": 1000.0, "rope_scaling": SCALING}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_theta": 1000.0}, "rope_theta": 1000.0, "rope_scaling": SCALING}),
        ("llama", {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3}),
        ("qwen2", {"rope_scaling": {k: v for k, v in SCALING.items() if k != "original_max_position_embeddings"},
                   "original_max_position_embeddings": 64}),
        ("llama", {"rope_scaling": {k: v for k, v in SCALING.items() if k != "original_max_position_embeddings"}}),
        ("llama", {"rope_parameters": THETA, "rope_scaling": None}),
        ("qwen2", {"rope_parameters": THETA, "rope_scaling": {}}),
        ("qwen2", {"rope_theta": 500000}),
        ("qwen2", {}),
        # windows that no layer uses
        ("qwen2", {**WINDOW, "max_window_layers": 3}),
        ("qwen2", WINDOW),  # the default of max_window_layers is 28
        ("qwen3", {**WINDOW, "layer_types": ["full_attention"] * 3, "max_window_layers": 0}),
        ("qwen3", {**WINDOW, "sliding_window": None, "max_window_layers": 0}),
        ("llama", {**WINDOW, "max_window_layers": 0}),
        # settings without an effect, and defaults of each family
        ("qwen2", {"attention_bias": False}),
        ("qwen2", {"attention_bias": None}),
        ("qwen3", {"attention_bias": True}),
        ("qwen2", {"pad_token_id": -1}),
        ("llama", {"pad_token_id": -1}),
        ("qwen3", {"head_dim": "absent"}),
        ("llama", {"head_dim": "absent", "max_position_embeddings": "absent"}),
        ("qwen2", {"is_causal": True, "quantization_config": None, "per_layer_config": None}),
    ],
)  # fmt: skip
def test_a_config_means_what_it_means_in_transformers(family, change, tmp_path):
    """CHECKLIST 35. The same numbers are read, and the same logits computed, from random weights."""
    raw = {**SIZES, "model_type": family, "head_dim": 8, **change}
    raw = {key: value for key, value in raw.items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    their_config = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = randomize(transformers.AutoModelForCausalLM.from_config(their_config, attn_implementation="eager").eval())
    save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()},
              tmp_path / "model.safetensors")  # fmt: skip
    ours, ids = Qwen2ForCausalLM.from_pretrained(tmp_path), torch.arange(80)[None] % SIZES["vocab_size"]
    torch.testing.assert_close(ours(ids), theirs(input_ids=ids).logits, atol=1e-5, rtol=0)
    assert ours.config.max_position_embeddings == their_config.max_position_embeddings
    ours.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    torch.testing.assert_close(again(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_saving_keeps_whole_numbers_whole_and_drops_the_keys_of_the_source_s_files():
    """8192 does not become 8192.0, and a saved folder does not ask for Python files or a quantizer it has not got."""
    scaling = {**SCALING, "original_max_position_embeddings": 8192, "factor": 8, "low_freq_factor": 1}
    raw = {**OLD, **SIZES, "rope_theta": 500000, "rope_scaling": scaling, "num_experts": 0, "quantization_config": None,
           "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}}  # fmt: skip
    written = Qwen2Config.from_dict(raw).to_dict(torch.bfloat16)
    numbers = [written["rope_theta"], written["rope_scaling"]["original_max_position_embeddings"]]
    numbers += [written["rope_parameters"][key] for key in ("rope_theta", "factor", "low_freq_factor")]
    assert json.dumps(numbers) == "[500000, 8192, 500000, 8, 1]"
    assert not {"auto_map", "quantization_config"} & set(written)
    assert "rope_scaling" not in Qwen2Config.from_dict({**OLD, "rope_scaling": None}).to_dict()


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
