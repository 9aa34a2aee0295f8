"""run/memory_plan.py: the estimate against the emulated device's count, the place of the optimizer's state, advice."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial

import pytest
import torch
from conftest import make_config, make_model, message_of
from emulated_cuda import EmulatedCuda

import train
from grpo import GRPO
from model.qwen2_config import Qwen2Config
from qwen2_llm import Qwen2ForCausalLM
from run import memory_plan, pretrained
from run.config import Config, load_config, preset_for
from run.device import DTYPES
from run.memory_plan import advice, choose_place, describe, estimate

GIB = 2**30
HALF_B = Qwen2Config(151936, 896, 4864, 24, 14, 2, 64, tie_word_embeddings=True)
T4, COLAB = 15 * GIB, int(12.7 * GIB)  # memory of the card that torch may use, and of its host


CUDA = torch.device("cuda", 0)


def meta_model(sizes: Qwen2Config, dtype: torch.dtype) -> Qwen2ForCausalLM:
    """A model of a released size, without storage."""
    with torch.device("meta"):
        return Qwen2ForCausalLM(sizes).to(dtype)


@pytest.fixture
def trainer_on(tokenizer):
    """A trainer of a tiny model on a device."""
    return partial(_trainer, tokenizer)


def _trainer(tokenizer, device: str, **options) -> GRPO:
    config = Config(device=device, prompts_per_step=2, group_size=4, max_new_tokens=24, eval_problems=0, **options)
    model = make_model(make_config(max_position_embeddings=2048)).to(device)
    return GRPO(config, model=model, tokenizer=tokenizer)


# --- the estimate


def test_a_full_fine_tuning_of_half_a_billion_fits_a_t4_and_its_host():
    """`python train.py --ckpt Qwen2.5-0.5B-Instruct` there: 16 GB with fp16 weights, 12.7 GB of host memory."""
    config = load_config(preset_for("Qwen2.5-0.5B-Instruct", "cuda"))
    with EmulatedCuda((7, 5), memory=T4):
        model = meta_model(HALF_B, torch.float16)
        place = choose_place(model, config, CUDA)
        need = estimate(model, config, place, CUDA)
    assert need.device * GIB < T4
    assert need.host * GIB < COLAB
    assert (round(need.device, 1), round(need.host, 1)) == (8.7, 5.6), "the figures of docs/performance.md"
    parameters = sum(p.numel() for p in model.parameters())
    assert need.device + need.host > 16 * parameters / GIB, "weights, gradients and state alone"


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_estimate_covers_the_largest_step_on_the_emulated_device(checkpointing, dtype, place, tokenizer):
    """The device counts every block of the largest step. The estimate is above it, and at most four times as large: it
    takes prompts for longer than they are."""
    sizes = make_config(hidden_size=128, intermediate_size=512, num_hidden_layers=6, head_dim=32, vocab_size=1200)
    config = Config(
        device="cuda", dtype=dtype, prompts_per_step=2, group_size=8, max_new_tokens=40, optimizer_state=place,
        gradient_checkpointing=checkpointing, task="countdown", prompt_style="short", numbers=(3,),
    )  # fmt: skip
    with EmulatedCuda() as gpu:
        model = make_model(sizes).to(DTYPES[dtype]).to("cuda")
        trainer = GRPO(config, model=model, tokenizer=tokenizer)
        gpu.peak = gpu.allocated
        need = estimate(model, config, place)
        peak = memory_plan.dry_run(trainer)
        assert trainer.optimizer.state_bytes("cuda" if place == "device" else "cpu") > 0
    assert peak <= need.device <= 4 * peak
    assert gpu.pinned_reserved <= need.host * GIB or place == "device"


def test_pinned_memory_is_counted():
    config = load_config(preset_for("Qwen2.5-0.5B-Instruct", "cuda"))
    with EmulatedCuda():
        model = meta_model(HALF_B, torch.bfloat16)
        parameters = sum(p.numel() for p in model.parameters())
        host = estimate(model, config, "host", CUDA).host * GIB
    assert host == 12 * parameters + 64 * 2**20


# --- the place of the optimizer's state


@pytest.mark.parametrize(("gib", "place"), [(80, "device"), (15, "host"), (12, "host")])
def test_auto_keeps_the_state_on_a_device_that_holds_it(gib, place):
    config = load_config(preset_for("Qwen2.5-0.5B-Instruct", "cuda"))
    with EmulatedCuda(memory=gib * GIB):
        assert choose_place(meta_model(HALF_B, torch.bfloat16), config, CUDA) == place


def test_a_state_that_cannot_be_on_the_device_is_refused_in_one_line():
    config = load_config(preset_for("Qwen2.5-0.5B-Instruct", "cuda"))
    config.optimizer_state = "device"
    with EmulatedCuda(memory=12 * GIB), pytest.raises(ValueError, match="--optimizer-state device") as error:
        choose_place(meta_model(HALF_B, torch.bfloat16), config, CUDA)
    assert "take --optimizer-state host" in message_of(error)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dtype", "bf16"], "compute capability 7.5"),
        (["--optimizer-state", "device"], "take --optimizer-state host"),
        (["--device", "mps"], "take --device cpu"),
    ],
)
def test_a_run_that_the_machine_cannot_do_is_refused_before_a_download(flags, words, tmp_path, monkeypatch, capsys):
    """Only config.json of the checkpoint is read. Exit code 2, one line, and no folder is left."""
    (tmp_path / "config.json").write_text(json.dumps(HALF_B.to_dict(torch.bfloat16)))
    monkeypatch.setattr(pretrained, "hf_hub_download", lambda repo, file: str(tmp_path / file))
    monkeypatch.setattr(pretrained, "snapshot_download", lambda *_, **__: pytest.fail("it was downloaded"))
    run = tmp_path / "run"
    with EmulatedCuda((7, 5), memory=8 * GIB):
        assert train.main(["--ckpt", "Qwen2.5-0.5B-Instruct", *flags, "--run-dir", str(run)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert words in line
    assert not run.exists()


def test_sizes_that_no_machine_has_are_one_line(checkpoint_folder, tmp_path, capsys):
    """The check before the download leaves them to the load, which names the file."""
    sizes = json.loads((checkpoint_folder / "config.json").read_text())
    shutil.copytree(checkpoint_folder, tmp_path / "huge")
    huge = {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 2, "head_dim": 2}
    (tmp_path / "huge" / "config.json").write_text(json.dumps(sizes | huge))
    assert train.main(["--ckpt", str(tmp_path / "huge"), "--run-dir", str(tmp_path / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert "sizes are too large" in line


@pytest.mark.parametrize("asked", ["host", "device"])
def test_an_asked_place_is_taken(asked, trainer_on):
    with EmulatedCuda():
        assert trainer_on("cuda", optimizer_state=asked).optimizer.place == asked
    assert trainer_on("cpu", optimizer_state=asked).optimizer.place == asked


# --- what the run says


def test_the_memory_line_names_both_sides(trainer_on):
    with EmulatedCuda(memory=2 * GIB):
        host, device = (describe(trainer_on("cuda", optimizer_state=place)) for place in ("host", "device"))
        assert re.search(r"memory: about [\d.]+ of 2\.0 GiB on cuda:0, [\d.]+ of [\d.]+ GiB on the host", host)
        assert re.search(r"memory: about [\d.]+ of 2\.0 GiB on cuda:0 \(optimizer state included\)", device)
    assert re.search(r"memory: about [\d.]+ of [\d.]+ GiB on cpu", describe(trainer_on("cpu")))


def test_the_first_lines_say_why_the_type_was_taken(trainer_on):
    with EmulatedCuda():
        assert "float32 (a tiny model) on cuda:0" in describe(trainer_on("cuda"))


def advice_for(gib: float, place: str, **options) -> str:
    """For the preset of a 0.5B model, on a card of that size."""
    config = load_config(preset_for("Qwen2.5-0.5B-Instruct", "cuda"))
    for name, value in options.items():
        setattr(config, name, value)
    with EmulatedCuda(memory=int(gib * GIB)):
        return advice(meta_model(HALF_B, torch.bfloat16), config, place, CUDA)


def test_a_step_that_fits_needs_no_advice():
    assert advice_for(80, "device") == "the estimate fits the memory that is there"


@pytest.mark.parametrize(
    ("gib", "place", "options", "flags"),
    [
        (12, "device", {}, "--optimizer-state host"),
        (15, "host", {"gradient_checkpointing": False}, "--gradient-checkpointing"),
        (5, "host", {}, "--micro-batch-tokens"),
        (2.2, "host", {}, "--lora-rank 16"),
    ],
)  # fmt: skip
def test_advice_names_options_that_make_it_fit(gib, place, options, flags):
    text = advice_for(gib, place, **options)
    assert "exceeds cuda:0" in text
    assert "it fits with" in text
    assert flags in text
    assert "\n" not in text


def test_advice_for_a_card_that_is_too_small_says_so():
    assert "take a smaller model" in advice_for(0.5, "host")


@pytest.mark.parametrize(("card", "flag"), [(9, "--lora-rank 16"), (80, "--optimizer-state device")])
def test_advice_looks_at_the_host_too(card, flag, monkeypatch):
    """On a host that is too small the state moves to a card that holds it. Else there is less of it."""
    monkeypatch.setattr(memory_plan, "host_memory", lambda: 4 * GIB)
    text = advice_for(card, "host")
    assert "exceeds the host" in text
    assert text.endswith(f"it fits with {flag}")


def test_a_dry_run_prints_the_comparison(tmp_path, capsys):
    flags = ["--prompts-per-step", "2", "--group-size", "2", "--max-new-tokens", "8", "--dry-run"]
    with EmulatedCuda():
        assert train.main([*flags, "--device", "cuda", "--run-dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "memory: the estimate fits the memory that is there" in said
    assert "dry run: peak memory" in said
