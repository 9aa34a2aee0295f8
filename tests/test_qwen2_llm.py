"""qwen2_llm.py: parity with transformers, padding, RoPE, gradient checkpointing, loading, saving."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_config, make_model, randomize
from emulated_cuda import EmulatedCuda
from safetensors.torch import load_file, save_file

from model import linear
from model.attention import EagerAttention, PackedAttention
from model.layout import Layout
from qwen2_llm import Qwen2ForCausalLM, RMSNorm, RotaryEmbedding, apply_rope

ROOT = Path(__file__).parents[1]
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 1000.0,
}  # fmt: skip
SIZES = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
FAMILIES = {
    "qwen2-tied": (transformers.Qwen2Config, {**PLAIN, "tie_word_embeddings": True}),
    "qwen2-untied": (transformers.Qwen2Config, {**PLAIN, "tie_word_embeddings": False}),
    "qwen2-mha": (transformers.Qwen2Config, {**PLAIN, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2-one-kv-head": (transformers.Qwen2Config, {**PLAIN, "num_key_value_heads": 1}),
    "llama3-scaled": (transformers.LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biased": (transformers.LlamaConfig, {**PLAIN, "attention_bias": True, "head_dim": 12}),
    "qwen3": (transformers.Qwen3Config, {**PLAIN, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-untied": (transformers.Qwen3Config, {**PLAIN, "head_dim": 6, "tie_word_embeddings": False}),
}


def reference_model(name: str) -> transformers.PreTrainedModel:
    kind, changes = FAMILIES[name]
    model = transformers.AutoModelForCausalLM.from_config(kind(**SIZES | changes), attn_implementation="eager")
    return randomize(model.float().eval(), seed=1)


def random_ids(*shape: int, high: int = 101, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


# --- parity


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_equal_transformers(name, tmp_path):
    """CHECKLIST 26. All biases and norm weights are random. Every parameter's gradient is compared as well."""
    theirs = reference_model(name)
    theirs.save_pretrained(tmp_path)
    ours = Qwen2ForCausalLM.from_pretrained(tmp_path)
    ids, weights = random_ids(3, 90), torch.randn(3, 90, 101, generator=torch.Generator().manual_seed(2))
    expected, logits = theirs(input_ids=ids).logits, ours(ids)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    (expected * weights).mean().backward()
    (logits * weights).mean().backward()
    expected_grads = {n: p.grad for n, p in theirs.named_parameters()}
    assert set(expected_grads) == {n for n, _ in ours.named_parameters()}
    for parameter_name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_grads[parameter_name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("shard_size", ["100MB", "20KB"], ids=["one-file", "index-of-shards"])
def test_transformers_folders_are_read_whole(shard_size, tmp_path):
    """CHECKLIST 26. One file, or shards with an index: every tensor arrives unchanged."""
    theirs = reference_model("qwen2-untied")
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    ours = dict(Qwen2ForCausalLM.from_pretrained(tmp_path).named_parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.pop(name), parameter)
    assert not ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_opens_what_is_saved(name, dtype, tmp_path):
    """CHECKLIST 26. Equal weights in the dtype they were saved in, and (in fp32) equal logits."""
    reference_model(name).save_pretrained(tmp_path / "theirs")
    ours = Qwen2ForCausalLM.from_pretrained(tmp_path / "theirs", dtype=dtype)
    ours.save_pretrained(tmp_path / "ours")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.dtype == dtype
    for parameter_name, parameter in again.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(parameter_name))
    if dtype == torch.float32:
        ids = random_ids(2, 60)
        torch.testing.assert_close(again(input_ids=ids).logits, ours(ids), atol=1e-5, rtol=0)


def test_a_folder_may_be_saved_over_the_one_it_was_loaded_from(tmp_path):
    """Loaded tensors must not be views of the file that saving truncates."""
    make_model().save_pretrained(tmp_path)
    model = Qwen2ForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert torch.equal(saved[name], before[name])


# --- the parts


def test_rms_norm_is_the_formula_in_fp32():
    norm, x = RMSNorm(6, eps=0.1), torch.randn(5, 6, dtype=torch.bfloat16)
    norm.weight.data = torch.randn(6).to(torch.bfloat16)
    for row, out in zip(x, norm(x), strict=True):
        size = math.sqrt(sum(float(value) ** 2 for value in row) / 6 + 0.1)
        unit = torch.tensor([float(value) / size for value in row]).to(torch.bfloat16)
        assert torch.equal(out, unit * norm.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_on_a_gpu_is_the_formula_rounded_once(dtype):
    norm, x = RMSNorm(6, eps=0.1), torch.randn(5, 2, 6).to(dtype)
    norm.weight.data = torch.randn(6).to(dtype)
    wide = x.double()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight.double()
    with EmulatedCuda():
        found = norm.to("cuda")(x.to("cuda")).cpu()
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_rope_turns_each_pair_by_its_angle():
    config = make_config(head_dim=6, rope_theta=100.0)
    x, positions = torch.randn(4, 2, 6), torch.tensor([0, 1, 7, 300])
    out = apply_rope(x, *RotaryEmbedding(config)(positions))
    for n, position in enumerate(positions.tolist()):
        for i in range(3):
            angle = position * 100.0 ** (-2 * i / 6)
            pair = torch.view_as_complex(torch.stack([x[n, :, i], x[n, :, i + 3]], dim=-1))
            turned = pair * complex(math.cos(angle), math.sin(angle))
            torch.testing.assert_close(out[n, :, i], turned.real, atol=1e-4, rtol=0)
            torch.testing.assert_close(out[n, :, i + 3], turned.imag, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16().float()])
def test_rope_angles_stay_fp32_when_the_model_is_cast(cast):
    """Rounded to bf16, an angle at position 300 would be off by more than half a radian."""
    positions, models = torch.arange(400), [make_model(), make_model()]
    models[1].model.rope(positions)  # cast once after it was used, and once before
    for model in [*map(cast, models), Qwen2ForCausalLM.from_config(make_config(), torch.bfloat16)]:
        for mine, expected in zip(model.model.rope(positions), RotaryEmbedding(make_config())(positions), strict=True):
            assert mine.dtype == torch.float32
            assert torch.equal(mine, expected)


# --- padding


@pytest.mark.parametrize("attention", [PackedAttention, lambda layout: EagerAttention(layout.mask())])
def test_flat_rows_equal_each_text_alone(attention):
    """CHECKLIST 10."""
    model, lengths = make_model(), [5, 1, 9]
    texts = [random_ids(n, seed=n) for n in lengths]
    layout = Layout.causal(lengths)
    logits = model.logits(model.hidden_states(torch.cat(texts), layout.positions(), attention(layout)))
    for text, part in zip(texts, logits.split(lengths), strict=True):
        torch.testing.assert_close(part, model(text[None])[0], atol=1e-5, rtol=0)


def test_padding_on_either_side_with_any_ids_changes_nothing():
    """CHECKLIST 10. Logits and every gradient equal those of the texts one by one, also with a row of padding only."""
    lengths, width = [4, 7, 1, 0], 7
    texts = [random_ids(n, seed=n) for n in lengths]
    weights = [torch.randn(n, 275, generator=torch.Generator().manual_seed(n)) for n in lengths]
    alone = make_model()
    expected = [alone(text[None])[0] if len(text) else torch.zeros(0, 275) for text in texts]
    sum((e * w).sum() for e, w in zip(expected, weights, strict=True)).backward()
    for left in (True, False):
        for garbage in (0, 256, 274):
            ids, mask = torch.full((4, width), garbage), torch.zeros(4, width, dtype=torch.long)
            for row, text in enumerate(texts):
                place = slice(width - len(text), width) if left else slice(len(text))
                ids[row, place], mask[row, place] = text, 1
            model = make_model()
            logits = model(ids, mask)
            assert torch.isfinite(logits).all()
            assert torch.equal(logits[mask == 0], torch.zeros_like(logits[mask == 0]))
            for row in range(4):
                torch.testing.assert_close(logits[row][mask[row] == 1], expected[row], atol=1e-5, rtol=0)
            sum((logits[row][mask[row] == 1] * weights[row]).sum() for row in range(4)).backward()
            for ours, reference in zip(model.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, reference.grad, atol=1e-4, rtol=1e-4)


def test_padded_batch_equals_transformers(tmp_path):
    """CHECKLIST 10, CHECKLIST 26. Left padding, as transformers generates with it, and right padding."""
    theirs = reference_model("qwen2-tied")
    theirs.save_pretrained(tmp_path)
    ours, ids = Qwen2ForCausalLM.from_pretrained(tmp_path), random_ids(2, 8)
    for mask in (torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8]), torch.tensor([[1] * 8, [1, 1, 1, 0, 0, 0, 0, 0]])):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = theirs(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(ours(ids, mask)[mask == 1], expected[mask == 1], atol=1e-5, rtol=0)


def test_a_real_token_with_the_id_of_padding_is_attended(tokenizer):
    """CHECKLIST 7. Without a mask no id is special. The later logits depend on a pad id in the middle."""
    model, pad = make_model(), tokenizer.pad_token_id
    ids = torch.tensor([[5, pad, 9]])
    alone = model(torch.tensor([[5, 9]]))
    assert (model(ids)[0, 2] - alone[0, 1]).abs().max() > 1e-2
    torch.testing.assert_close(model(ids), model(ids, torch.ones(1, 3)))


def test_ids_without_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"expected \[batch, time\]"):
        make_model()(torch.tensor([1, 2]))


# --- gradient checkpointing


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_checkpointing_changes_no_gradient(tied):
    """CHECKLIST 34. And it really runs each block twice."""
    ids, gradients, losses, calls = random_ids(2, 12, high=275), [], [], []
    for on in (False, True):
        model = make_model(make_config(tie_word_embeddings=tied))
        model.model.gradient_checkpointing = on
        count = []
        model.model.layers[0].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        loss = model(ids).square().mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        calls.append(len(count))
    assert losses[0] == losses[1]
    assert calls == [1, 2]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-6)
        assert gradient.abs().sum() > 0, name


# --- loading and saving


def test_a_copy_of_the_tied_embedding_and_old_buffers_are_passed_over(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, tmp_path / "model.safetensors")
    ids = random_ids(1, 9)
    assert torch.equal(Qwen2ForCausalLM.from_pretrained(tmp_path)(ids), model(ids))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def both_logits(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and those of transformers, for the same ids."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    ids = random_ids(2, 20)
    return Qwen2ForCausalLM.from_pretrained(folder)(ids), theirs(input_ids=ids).logits


@pytest.mark.parametrize("change", ["every number", "one number", "the dtype"])
@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3", "llama3-scaled"])
def test_a_head_that_differs_from_the_tied_embedding_is_used(family, change, tmp_path):
    """config.json says that the two are tied, and the file has another head: transformers believes the file."""
    reference_model(family).save_pretrained(tmp_path)

    def another_head(tensors):
        head = tensors["model.embed_tokens.weight"].clone()
        if change == "the dtype":  # rounded, so that the numbers differ too
            tensors["lm_head.weight"] = head.bfloat16()
            return
        head[slice(None) if change == "every number" else 7] += 0.5
        tensors["lm_head.weight"] = head

    change_tensors(tmp_path, another_head)
    with pytest.warns(RuntimeWarning, match=r"ties the LM head .* another lm_head\.weight"):
        logits, expected = both_logits(tmp_path)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    with pytest.warns(RuntimeWarning, match="ties the LM head"):
        model = Qwen2ForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "saved")  # says that they are not tied, so no warning comes again
    logits, expected_again = both_logits(tmp_path / "saved")
    torch.testing.assert_close(logits, expected_again, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_a_head_of_another_shape_is_refused_although_it_is_tied(tmp_path):
    reference_model("qwen2-tied").save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(90, 32)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(90, 32\)"):
        Qwen2ForCausalLM.from_pretrained(tmp_path)


def test_a_tied_model_may_have_its_head_alone(tmp_path):
    """Some programs save the shared tensor under the head's name."""
    reference_model("qwen2-tied").save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    logits, expected = both_logits(tmp_path)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3"])
def test_a_base_model_without_the_prefix_is_read(family, tmp_path):
    """`AutoModel.save_pretrained` leaves out "model." and the head."""
    reference_model(family).model.save_pretrained(tmp_path)
    assert "norm.weight" in load_file(tmp_path / "model.safetensors")
    logits, expected = both_logits(tmp_path)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_a_base_model_without_a_head_of_its_own_is_refused(tmp_path):
    """transformers would draw a random head."""
    reference_model("qwen2-untied").model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight.*tie_word_embeddings"):
        Qwen2ForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "sizes", [{"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 2}, {"head_dim": 2**30, "hidden_size": 2**30}]
)
def test_sizes_that_no_memory_holds_are_refused(sizes, tmp_path):
    """CHECKLIST 46."""
    config = make_config(**sizes, num_attention_heads=2**20, num_key_value_heads=2**20)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ValueError, match=r"config\.json: the sizes are too large"):
        Qwen2ForCausalLM.from_pretrained(tmp_path)


MEASURE = """
import sys, torch
from qwen2_llm import Qwen2ForCausalLM
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
Qwen2ForCausalLM.from_pretrained(sys.argv[1])
before = peak()
model = Qwen2ForCausalLM.from_pretrained(sys.argv[2])
total = sum(p.sum().item() for p in model.parameters())  # touch every page
print((peak() - before) * 1024 / sum(p.numel() * 4 for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_never_holds_the_weights_twice(tmp_path):
    """Peak memory of a process that loads 250 MB of fp32 weights: one copy of them, and less than half a second one.

    Far more than the tens of megabytes that torch takes for itself on its first sums, which differ between machines.
    """
    big = make_config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4)
    make_model().save_pretrained(tmp_path / "small")  # so that what torch itself allocates is there before
    Qwen2ForCausalLM.from_config(big).save_pretrained(tmp_path / "big")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "big")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert 0.5 < float(done.stdout) < 1.5


def test_loading_does_not_import_the_compiler(tmp_path):
    """Drawing weights on the meta device would: four seconds before every run, for weights that are never used."""
    make_model().save_pretrained(tmp_path)
    code = "import sys; from qwen2_llm import Qwen2ForCausalLM as Q; Q.from_pretrained(sys.argv[1])\n"
    code += "print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_fresh_weights_depend_on_the_seed_alone():
    a, b, c = (dict(Qwen2ForCausalLM.from_config(make_config(), seed=seed).named_parameters()) for seed in (3, 3, 4))
    for name, parameter in a.items():
        assert torch.equal(parameter, b[name])
        assert parameter.ndim == 1 or not torch.equal(parameter, c[name])
    assert abs(a["model.layers.0.mlp.down_proj.weight"].std() * 48**0.5 - 0.8) < 0.05


def test_large_tensors_ask_for_huge_pages():
    """Importing the model switches it on, before torch makes a large one. A value that the user set stays."""
    code = "import os, qwen2_llm; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    for theirs, expected in ((None, "1"), ("0", "0")):
        environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
        environment |= {} if theirs is None else {"THP_MEM_ALLOC_ENABLE": theirs}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_memory_that_was_freed_between_pieces_in_use_goes_back_to_the_system():
    """Memory that glibc keeps on its own: 128 MiB in pieces of 64 KiB, every one between two that are still in use."""
    code = """
from model import memory
import torch
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
pieces = [torch.ones(16384) for _ in range(4096)]
del pieces[::2]
before = resident()
memory.return_free_memory()
print(before - resident(), sum(piece.sum().item() for piece in pieces))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    returned, still_there = map(float, done.stdout.split())
    assert returned > 100
    assert still_there == 2048 * 16384


def test_rollouts_return_free_memory_now_and_then(monkeypatch):
    """Every RETURN_EVERY-th packing of weights, and none where there is nothing to pack."""
    returned = []
    monkeypatch.setattr(linear, "return_free_memory", lambda: returned.append(1))
    monkeypatch.setattr(linear, "can_pack", lambda weight: weight.dtype == torch.bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight, rows: weight.detach())
    for dtype, times in ((torch.float32, 0), (torch.bfloat16, 2)):
        model = make_model().to(dtype)
        for _ in range(2 * linear.RETURN_EVERY):
            with linear.packed_weights(model, 4):
                pass
        assert len(returned) == times
