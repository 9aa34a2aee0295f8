"""lora.py: the formula, frozen weights, PEFT's format both ways, the merged export, and refusals."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from conftest import make_config, make_model
from safetensors.torch import load_file

from model.head_logprobs import token_logprobs
from model.linear import Linear, packed_weights
from model.lora import (
    TARGETS,
    LoraLinear,
    adapters_off,
    add_lora,
    has_lora,
    load_adapters,
    lora_layers,
    merge_lora,
    merged_state,
    save_adapters,
    trainable,
)
from optimizer import MemoryEfficientAdamW
from qwen2_llm import Qwen2ForCausalLM

IDS = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(5))


def lora_model(seed: int = 0, **options) -> Qwen2ForCausalLM:
    """A tiny model whose adapters do something: B is random too."""
    model = add_lora(make_model(seed=seed), **({"rank": 3, "alpha": 12.0} | options)).eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.2, generator=generator)
    return model


def message_of(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


# --- the formula, and what is frozen


def test_a_layer_computes_the_formula():
    layer = LoraLinear(Linear(6, 5), 2, 8.0, 0.0, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(7, 6)
    W, b, A, B = layer.weight, layer.bias, layer.lora_A, layer.lora_B
    torch.testing.assert_close(layer(x), x @ W.T + b + 8.0 / 2 * (x @ A.T) @ B.T)


def test_dropout_acts_on_the_adapters_input_in_training_only():
    layer = LoraLinear(Linear(6, 5), 2, 8.0, 0.5, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(7, 6)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.manual_seed(3)
    noisy = layer(x)
    torch.manual_seed(3)
    expected = plain + 4.0 * torch.nn.functional.dropout(x, 0.5) @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(noisy, expected)
    torch.testing.assert_close(layer.eval()(x), plain + 4.0 * x @ layer.lora_A.T @ layer.lora_B.T)


def test_new_adapters_change_nothing_and_their_draw_is_that_of_the_seed():
    model, fresh = make_model(), add_lora(make_model(), 4)
    assert torch.equal(model(IDS), fresh(IDS))
    again, other = add_lora(make_model(), 4), add_lora(make_model(), 4, seed=1)
    first, second, third = (m.model.layers[1].mlp.up_proj.lora_A for m in (fresh, again, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert 0 < first.abs().max() <= 32**-0.5  # uniform up to 1 / sqrt(in), as PEFT draws it
    assert not torch.equal(first, model.model.layers[0].mlp.up_proj.weight[:4])


def test_only_the_named_layers_get_adapters_and_only_adapters_train():
    model = add_lora(make_model(), 2, targets=["q_proj", "down_proj"])
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    kinds = ("self_attn.q_proj", "mlp.down_proj")
    expected = [f"model.layers.{i}.{kind}.lora_{x}" for i in range(2) for kind in kinds for x in "AB"]
    assert sorted(names) == sorted(expected)
    assert len(trainable(model)) == len(expected)


def test_training_gives_no_gradient_to_the_base_and_state_to_adapters_alone():
    model = lora_model()
    base = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    optimizer = MemoryEfficientAdamW(trainable(model), lr=1e-2)
    hidden = model(IDS).flatten(0, 1)[:, :32]
    logp, _ = token_logprobs(hidden, model.head_weight, torch.zeros(18, dtype=torch.long))
    logp.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == ("lora_" in name), name
    adapters = [layer.lora_A.clone() for layer in lora_layers(model).values()]
    optimizer.step()
    assert len(optimizer.state_dict()["state"]) == 2 * len(adapters) == 2 * 2 * len(TARGETS)
    for name, parameter in model.named_parameters():
        assert "lora_" in name or torch.equal(parameter, base[name])
    for layer, before in zip(lora_layers(model).values(), adapters, strict=True):
        assert not torch.equal(layer.lora_A, before)


def test_gradients_of_the_adapters_equal_those_of_the_merged_weight():
    """dL/dA = scale B^T dL/dW and dL/dB = scale dL/dW A^T, through gradient checkpointing as well."""
    model, merged = lora_model(), merge_lora(lora_model())
    model.model.gradient_checkpointing = True
    for m in (model, merged):
        m(IDS).square().mean().backward()
    for name, layer in lora_layers(model).items():
        dW = merged.get_submodule(name).weight.grad
        torch.testing.assert_close(layer.lora_A.grad, 4.0 * layer.lora_B.T @ dW, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(layer.lora_B.grad, 4.0 * dW @ layer.lora_A.T, atol=1e-6, rtol=1e-3)


def test_adapters_off_is_the_model_as_it_was():
    base, model = make_model(), lora_model()
    with_adapters = model(IDS)
    with adapters_off(model):
        assert torch.equal(model(IDS), base(IDS))
    assert torch.equal(model(IDS), with_adapters)
    assert not torch.allclose(with_adapters, base(IDS), atol=1e-2)
    with pytest.raises(RuntimeError), adapters_off(model):
        raise RuntimeError("an error inside must not leave them off")
    assert torch.equal(model(IDS), with_adapters)
    with adapters_off(base):
        base(IDS)  # a model without adapters


# --- merged


@torch.no_grad()
def test_merged_weights_are_saved_under_the_checkpoints_names(tmp_path):
    """`save_pretrained` of a model with adapters writes a plain folder. The model itself is left alone."""
    model = lora_model()
    expected, before = model(IDS), [p.clone() for p in model.parameters()]
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == dict(make_model().named_parameters()).keys()
    torch.testing.assert_close(Qwen2ForCausalLM.from_pretrained(tmp_path)(IDS), expected, atol=1e-4, rtol=1e-4)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert merged_state(model).keys() == merged_state(make_model()).keys()


def test_merge_lora_leaves_plain_trainable_layers():
    model = lora_model()
    expected = model(IDS).detach()
    merge_lora(model)
    assert not has_lora(model)
    assert len(trainable(model)) == len(list(make_model().parameters()))
    torch.testing.assert_close(model(IDS).detach(), expected, atol=1e-4, rtol=1e-4)
    add_lora(model, 2)  # and once more


def test_a_merged_bf16_weight_is_rounded_once():
    layer = LoraLinear(Linear(64, 64, dtype=torch.bfloat16), 4, 8.0, 0.0, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(layer.lora_B, std=0.05)
    exact = layer.weight.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    assert layer.lora_A.dtype == torch.bfloat16
    # fp32 sums may fall on the other side of a rounding boundary: at most a few of 4,096 elements
    assert (layer.merged_weight() != exact.to(torch.bfloat16)).sum() <= 4


@torch.no_grad()
def test_packed_weights_of_a_rollout_still_see_the_adapters():
    model = lora_model().bfloat16()
    expected = model(IDS)
    with packed_weights(model, 18):
        torch.testing.assert_close(model(IDS), expected, atol=0.15, rtol=0.05)


# --- PEFT


@pytest.fixture
def base_folder(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@torch.no_grad()
def test_peft_loads_the_adapters_with_equal_logits(base_folder, tmp_path):
    model = lora_model(targets=["q_proj", "v_proj", "down_proj"])
    save_adapters(model, tmp_path / "adapter", base_model=str(base_folder))
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(theirs(IDS).logits, model(IDS), atol=1e-5, rtol=1e-4)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")  # it finds the base by itself
    torch.testing.assert_close(found(IDS).logits, model(IDS), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_adapters_that_peft_wrote_load_with_equal_logits(base_folder, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    settings = peft.LoraConfig(r=5, lora_alpha=7, lora_dropout=0.1, target_modules=["k_proj", "gate_proj"])
    theirs = peft.get_peft_model(base, settings).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_adapters(make_model(), tmp_path / "adapter").eval()
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-5, rtol=1e-4)
    assert {layer.dropout for layer in lora_layers(model).values()} == {0.1}
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_adapters_come_back_to_the_last_bit(tmp_path):
    model = lora_model().bfloat16()
    save_adapters(model, tmp_path)
    loaded = load_adapters(make_model().bfloat16(), tmp_path)
    again = load_adapters(add_lora(make_model().bfloat16(), 3, 12.0, seed=8), tmp_path)
    for other in (loaded, again):
        for a, b in zip(lora_layers(model).values(), lora_layers(other).values(), strict=True):
            assert torch.equal(a.lora_A, b.lora_A)
            assert torch.equal(a.lora_B, b.lora_B)
            assert a.scale == b.scale


# --- refused


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError) as error:
        add_lora(make_model(), 2, targets=["q_proj", "qproj"])
    assert "'qproj'" in message_of(error)
    assert "gate_proj" in message_of(error)
    untied = make_model(make_config(tie_word_embeddings=False))
    with pytest.raises(ValueError, match="lm_head"):  # it would be read as a weight, and its adapter never asked
        add_lora(untied, 2, targets=["lm_head"])
    for rank, dropout in ((0, 0.0), (2, 1.0)):
        with pytest.raises(ValueError, match="rank of 1 or more"):
            add_lora(make_model(), rank, dropout=dropout)
    with pytest.raises(ValueError, match="already"):
        add_lora(lora_model(), 2)
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapters(make_model(), "nowhere")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 1}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"target_modules": ".*_proj"}, "list of names"),
        ({"r": 2}, "shape"),
        ({"target_modules": ["q_proj"]}, "differ in"),
    ],
)
def test_adapters_that_are_not_plain_lora_or_do_not_fit_are_refused(tmp_path, change, said):
    save_adapters(lora_model(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError) as error:
        load_adapters(make_model(), tmp_path)
    assert said in message_of(error)


def test_missing_or_broken_adapter_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_adapters(make_model(), tmp_path)
    save_adapters(lora_model(), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError) as error:
        load_adapters(make_model(), tmp_path)
    message_of(error)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        load_adapters(make_model(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="not an adapter's configuration"):
        load_adapters(make_model(), tmp_path)
