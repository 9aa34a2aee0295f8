"""weight_files.py, and the checks of its tensors: every way a folder of weights can be broken (CHECKLIST 46)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_config, make_model, message_of
from safetensors.torch import load_file, save_file

from qwen2_llm import Qwen2ForCausalLM


@pytest.fixture
def saved(tmp_path) -> Path:
    make_model(make_config(tie_word_embeddings=False)).save_pretrained(tmp_path)
    return tmp_path


def split_into_shards(folder: Path) -> dict[str, str]:
    """Turn a folder's one file into two shards and an index. Returns the weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    write_index(folder, {"weight_map": weight_map})
    return weight_map


def write_index(folder: Path, content: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def refusal(folder: Path, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as error:
        Qwen2ForCausalLM.from_pretrained(folder)
    return message_of(error)


def test_shards_are_read_like_one_file(saved):
    expected = dict(Qwen2ForCausalLM.from_pretrained(saved).named_parameters())
    expected = {name: parameter.detach().clone() for name, parameter in expected.items()}
    split_into_shards(saved)
    for name, parameter in Qwen2ForCausalLM.from_pretrained(saved).named_parameters():
        assert torch.equal(parameter, expected.pop(name))
    assert not expected


def test_missing_files_are_named(saved):
    """CHECKLIST 46."""
    assert "nowhere" in refusal(saved / "nowhere", FileNotFoundError)
    split_into_shards(saved)
    (saved / "part-1.safetensors").unlink()
    assert "part-1.safetensors is missing" in refusal(saved, FileNotFoundError)
    (saved / "model.safetensors.index.json").unlink()
    message = refusal(saved, FileNotFoundError)
    assert "neither model.safetensors nor" in message
    assert "part-0.safetensors" in message
    (saved / "config.json").unlink()
    assert "config.json does not exist" in refusal(saved, FileNotFoundError)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_named(keep, saved):
    """CHECKLIST 46."""
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    message = refusal(saved)
    assert "model.safetensors" in message
    assert "download it again" in message


def test_a_truncated_shard_is_named(saved):
    """CHECKLIST 46."""
    split_into_shards(saved)
    path = saved / "part-1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "part-1.safetensors" in refusal(saved)


def test_wrong_shapes_missing_and_foreign_tensors_are_named(saved):
    """CHECKLIST 46."""
    path = saved / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({**tensors, name: torch.zeros(31, 32)}, path)
    message = refusal(saved)
    assert name in message
    assert "(31, 32)" in message
    assert "(32, 32)" in message
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    assert f"lacks 1 tensors, the first is '{name}'" in refusal(saved)
    save_file({**tensors, "model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}, path)
    assert "model.layers.2.mlp.up_proj.weight" in refusal(saved)


def test_an_index_may_not_leave_its_folder(saved):
    """A downloaded index must not make the loader read files elsewhere."""
    weight_map = split_into_shards(saved)
    for shard in ("../part-0.safetensors", str(saved / "part-0.safetensors"), "sub/part-0.safetensors"):
        write_index(saved, {"weight_map": {**weight_map, "model.norm.weight": shard}})
        assert repr(shard) in refusal(saved)


@pytest.mark.parametrize("content", [[], {}, {"weight_map": 3}, {"weight_map": ["a"]}, "x", None])
def test_a_broken_index_is_named(content, saved):
    split_into_shards(saved)
    write_index(saved, content)
    assert "model.safetensors.index.json" in refusal(saved)


def test_a_tensor_that_the_index_forgets_is_read_as_in_transformers(saved):
    weight_map = split_into_shards(saved)
    write_index(saved, {"weight_map": {key: value for key, value in weight_map.items() if "norm" not in key}})
    assert not any(parameter.is_meta for parameter in Qwen2ForCausalLM.from_pretrained(saved).parameters())


def test_a_tensor_in_two_shards_is_refused(saved):
    weight_map = split_into_shards(saved)
    head = torch.zeros(275, 32)
    for shard in ("part-0.safetensors", "part-1.safetensors"):
        save_file({**load_file(saved / shard), "lm_head.weight": head}, saved / shard)
    write_index(saved, {"weight_map": weight_map})
    assert "'lm_head.weight' twice" in refusal(saved)


# --- other kinds of weights: the kind is named, and the remedy fits

Q = "model.layers.0.self_attn.q_proj."
QUANTIZED = {
    "GPTQ": {Q + "qweight": torch.zeros(4, 64, dtype=torch.int32), Q + "g_idx": torch.zeros(32, dtype=torch.int32)},
    "AWQ": {Q + "qweight": torch.zeros(32, 8, dtype=torch.int32), Q + "scales": torch.ones(1, 64).half()},
    "AWQ scales": {Q + "scales": torch.ones(1, 64).half()},
    "bitsandbytes, 4 bits": {Q + "weight": torch.zeros(1024, 1, dtype=torch.uint8)},
    "bitsandbytes, 8 bits": {Q + "weight": torch.zeros(64, 32, dtype=torch.int8), Q + "SCB": torch.ones(64)},
    "fp8": {Q + "weight": torch.zeros(64, 32).to(torch.float8_e4m3fn), Q + "weight_scale_inv": torch.ones(1, 1)},
    "fp8 scales": {Q + "weight_scale": torch.ones(1)},
    "compressed-tensors": {Q + "weight_packed": torch.zeros(64, 4, dtype=torch.int32)},
    "MLX": {Q + "weight": torch.zeros(64, 4).to(torch.uint32), Q + "biases": torch.ones(64, 1).bfloat16()},
    "integers of the right shape": {"model.norm.weight": torch.zeros(32, dtype=torch.int8)},
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_are_called_quantized(kind, saved):
    """Also without a quantization_config. A download that is repeated would bring the same file."""
    tensors = load_file(saved / "model.safetensors")
    if not kind.endswith("scales"):
        tensors.pop(Q + "weight")
    save_file({**tensors, **QUANTIZED[kind]}, saved / "model.safetensors")
    message = refusal(saved)
    assert "quantized" in message
    assert "damaged" not in message
    assert "download it again" not in message


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["pytorch_model.bin"], ["pytorch_model.bin", "pickled", "save_pretrained"]),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], ["pickled", "save_pretrained"]),
        (["consolidated.00.pth"], ["pickled"]),
        (["model-q4_k_m.gguf"], ["model-q4_k_m.gguf", "llama.cpp"]),
        (["adapter_model.safetensors", "adapter_config.json"], ["adapter of 'some/base'", "merge_and_unload"]),
        (["adapter_model.bin", "adapter_config.json"], ["adapter of 'some/base'", "merge_and_unload"]),
        (["model-00001-of-00002.safetensors"], ["model-00001-of-00002.safetensors", "index"]),
        (["tf_model.h5"], ["tf_model.h5", "safetensors"]),
        ([], ["no weights", "converted"]),
    ],
)
def test_a_folder_with_other_weights_says_which_and_what_to_do(names, words, saved):
    (saved / "model.safetensors").unlink()
    for name in names:
        (saved / name).write_bytes(b'{"base_model_name_or_path": "some/base"}')
    message = refusal(saved, FileNotFoundError)
    assert all(word in message for word in words), message
    assert "download it again" not in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("score.weight", "classification or reward model"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "LoRA adapter"),
        ("model.layers.0.mlp.experts.0.up_proj.weight", "mixture of experts"),
        ("visual.blocks.0.attn.qkv.weight", "reads images"),
        ("module.model.norm.weight", "training program"),
        ("_orig_mod.model.norm.weight", "torch.compile"),
        ("something.else", "config.json"),
    ],
)
def test_a_foreign_tensor_is_named_with_the_likely_reason(name, words, saved):
    save_file({**load_file(saved / "model.safetensors"), name: torch.zeros(2)}, saved / "model.safetensors")
    message = refusal(saved)
    assert repr(name) in message
    assert words in message


def test_an_index_that_names_a_tensor_its_shard_lacks(saved):
    weight_map = split_into_shards(saved)
    write_index(saved, {"weight_map": {**weight_map, "lm_head.weight": "part-1.safetensors"}})
    assert "lm_head.weight" in refusal(saved)
