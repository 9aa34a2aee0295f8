"""Every activation by name, and a change on the way: equal to values computed by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_qwen2_llm import make_config, random_ids

from model.attention import EagerAttention
from model.layout import Layout
from model.lora import add_lora
from qwen2_llm import Qwen2ForCausalLM
from rollout.generation import generate
from rollout.sampling import SamplingParams
from run.pretrained import load_pretrained, locate_pretrained
from study.activations import edit, names, record


def make_model(**changes) -> Qwen2ForCausalLM:
    model = Qwen2ForCausalLM.from_config(make_config(**changes), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():  # zero biases and unit norms would hide missing terms
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


IDS = random_ids(1, 9)[0]
ATTENTION = "model.layers.1.self_attn"


def test_the_logits_are_those_of_the_model():
    model = make_model()
    torch.testing.assert_close(record(model, IDS)["logits"], model(IDS[None])[0], atol=1e-5, rtol=1e-5)


def test_every_name_is_recorded_and_no_other():
    model = make_model()
    assert set(record(model, IDS)) == set(names(model))


def test_attention_by_hand_from_the_recorded_tensors():
    """z = softmax(q k^T / sqrt(K)) v a head, and the block adds o_proj(z) and down_proj(act) to the residual stream."""
    model = make_model()
    t, a = record(model, IDS), ATTENTION
    q, k, v, w, z = (t[f"{a}.{x}"] for x in ("q", "k", "v", "weights", "z"))
    mask = torch.ones(len(IDS), len(IDS)).tril().bool()
    for head in range(q.shape[1]):
        group = head // (q.shape[1] // k.shape[1])
        scores = q[:, head] @ k[:, group].T / q.shape[-1] ** 0.5
        by_hand = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        torch.testing.assert_close(w[head], by_hand)
        torch.testing.assert_close(z[:, head], by_hand @ v[:, group])
    block = model.model.layers[1]
    x = t["model.layers.0"] + block.self_attn.o_proj(z.flatten(1))
    act = F.silu(t["model.layers.1.mlp.gate_proj"]) * t["model.layers.1.mlp.up_proj"]
    torch.testing.assert_close(t["model.layers.1.mlp.act"], act)
    torch.testing.assert_close(t["model.layers.1"], x + block.mlp.down_proj(act))
    torch.testing.assert_close(t["logits"], model.logits(t["model.norm"]))


def test_silencing_a_head_is_zeroing_its_columns_of_o_proj():
    model, K = make_model(), make_config().head_dim

    def silence(z):
        z = z.clone()
        z[:, 2] = 0
        return z

    with edit(model, f"{ATTENTION}.z", silence):
        edited = record(model, IDS)["logits"]
        fast = model(IDS[None])[0]
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 2 * K : 3 * K] = 0
    expected = model(IDS[None])[0]
    torch.testing.assert_close(edited, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["q", "k", "v", "z", "weights"])
def test_patching_one_layer_of_another_text_changes_that_layer_only(name):
    model, full = make_model(), f"{ATTENTION}.{name}"
    here, there = record(model, IDS), record(model, random_ids(1, 9, seed=5)[0])
    with edit(model, full, lambda _: there[full]):
        patched = record(model, IDS)
    assert torch.equal(patched[full], there[full])
    assert torch.equal(patched["model.layers.0"], here["model.layers.0"])
    assert not torch.allclose(patched["model.layers.1"], here["model.layers.1"])


def test_patching_the_residual_stream_hands_over_everything_after_it():
    model = make_model()
    there = record(model, random_ids(1, 9, seed=5)[0])
    with edit(model, "model.layers.1", lambda _: there["model.layers.1"]):
        assert torch.equal(record(model, IDS)["logits"], there["logits"])


@pytest.mark.parametrize("name", [f"{ATTENTION}.q", f"{ATTENTION}.z", f"{ATTENTION}.weights", "model.layers.1.mlp.act",
                                  "model.norm", "logits"])  # fmt: skip
def test_edits_of_one_name_apply_in_order_and_the_record_sees_both(name):
    model = make_model()
    before = record(model, IDS)[name]
    with edit(model, name, lambda x: x + 1), edit(model, name, lambda x: x * 2):
        torch.testing.assert_close(record(model, IDS)[name], (before + 1) * 2)


def test_nothing_stays_behind():
    model = make_model()
    before = model(IDS[None])
    record(model, IDS)
    with pytest.raises(ZeroDivisionError), edit(model, "logits", lambda x: x / 0 if x is None else 1 / 0):
        model(IDS[None])
    with edit(model, f"{ATTENTION}.k", torch.zeros_like):
        pass
    assert torch.equal(model(IDS[None]), before)
    assert "logits" not in vars(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_edit_reaches_sampling_with_the_cache():
    """Greedy answers of the edited model equal those of a model whose weights were changed likewise."""
    model, tokenizer = load_pretrained(locate_pretrained("countdown-tiny"), torch.float32)
    greedy = SamplingParams(n=1, max_new_tokens=12, temperature=0.0)
    plain = generate(model, ["1+1="], greedy, tokenizer=tokenizer)[0].response_ids
    with edit(model, "model.layers.0.mlp.down_proj", torch.zeros_like):
        edited = generate(model, ["1+1="], greedy, tokenizer=tokenizer)[0].response_ids
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    assert edited == generate(model, ["1+1="], greedy, tokenizer=tokenizer)[0].response_ids != plain


@pytest.mark.parametrize("changes", [{"model_type": "qwen3", "qk_norm": True, "attention_bias": False},
                                     {"model_type": "llama", "attention_bias": False}])  # fmt: skip
def test_other_families(changes):
    model = make_model(**changes)
    trace = record(model, IDS)
    torch.testing.assert_close(trace["logits"], model(IDS[None])[0], atol=1e-5, rtol=1e-5)


def test_a_model_with_adapters():
    model = make_model()
    plain = record(model, IDS)
    add_lora(model, 2, 4.0, 0.0, ("q_proj",), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0.0)
    trace = record(model, IDS)
    assert not torch.allclose(trace[f"{ATTENTION}.q"], plain[f"{ATTENTION}.q"])
    torch.testing.assert_close(trace["logits"], model(IDS[None])[0], atol=1e-5, rtol=1e-5)


def test_a_wrong_name_is_answered_with_the_nearest():
    model = make_model()
    with pytest.raises(ValueError, match=r"nearest is 'model\.layers\.1\.self_attn\.weights'"):
        edit(model, "model.layers.1.self_attn.weight", torch.zeros_like).__enter__()
    with pytest.raises(KeyError, match="nearest is 'logits'"):
        record(model, IDS)["logit"]


def test_weights_cannot_be_edited_where_they_do_not_exist():
    model = make_model()
    with edit(model, f"{ATTENTION}.weights", torch.zeros_like), pytest.raises(ValueError, match="PackedAttention"):
        model(IDS[None])


def test_an_edit_of_another_shape_is_refused():
    model = make_model()
    with edit(model, "model.norm", lambda x: x[:1]), pytest.raises(ValueError, match=r"shape \(1, 32\), expected"):
        model(IDS[None])


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        record(make_model(), [])


def test_the_eager_reference_keeps_what_the_edits_made_of_its_weights():
    attend = EagerAttention(Layout.causal([3]).mask(), record=True)
    attend.on_weights.append(lambda w: w * 0)
    q = torch.randn(3, 2, 4)
    assert not attend(0, q, q, q).any()
    assert not attend.weights[0].any()
