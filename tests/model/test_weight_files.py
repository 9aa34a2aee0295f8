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
    """Turn a folder's one file into two shards and an index; returns the weight map."""
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
    assert "neither model.safetensors nor" in refusal(saved, FileNotFoundError)
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


def test_an_index_that_names_a_tensor_its_shard_lacks(saved):
    weight_map = split_into_shards(saved)
    write_index(saved, {"weight_map": {**weight_map, "lm_head.weight": "part-1.safetensors"}})
    assert "lm_head.weight" in refusal(saved)
