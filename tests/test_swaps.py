"""docs/swaps.py: the positions that are swapped, the tokens put there, and the share of the gain that is recovered."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from run.pretrained import load_pretrained
from study import anatomy

pytest_plugins = ["explain_fixtures"]
SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "swaps.py"


@pytest.fixture(scope="module")
def swaps():
    spec = importlib.util.spec_from_file_location("swaps", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def writer(swaps, tiny, trained):
    model, tokenizer = tiny
    task = swaps.task_from_config(swaps.load_config(swaps.preset_for(swaps.BUNDLED_CKPT)))
    prompts = [tokenizer.encode(tokenizer.render_chat(p.messages) + p.response_prefix) for p in task.test_problems(5)]
    return swaps.Writer(model, load_pretrained(trained, torch.float32)[0], tokenizer, prompts)


@pytest.fixture(scope="module")
def written(writer):
    return writer.go_on(writer.before, [[] for _ in writer.prompts], seed=0)


def test_choices_are_those_of_one_text_at_a_time(writer, written):
    """Padding to one length changes nothing: KL and both preferred tokens are those of the comparison."""
    for prompt, text, (kl, own, preferred) in zip(writer.prompts, written, writer.choices(written)):
        ids = prompt + text
        expected = anatomy.compare(writer.before, writer.after, writer.tokenizer, ids)["kl"]
        assert kl.tolist() == pytest.approx(expected[len(prompt) - 1 : -1], rel=2e-3, abs=1e-4)
        for model, tokens in ((writer.before, own), (writer.after, preferred)):
            with torch.no_grad():
                logits = model(torch.tensor([ids]))[0, len(prompt) - 1 : -1, : writer.tokenizer.vocab_size]
            assert tokens.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("way", ["most", "random", "own"])
def test_one_swap_keeps_the_text_before_it_and_puts_the_right_token_there(writer, written, way):
    choices = writer.choices(written)
    for before, after, (kl, own, preferred) in zip(written, writer.swapped(written, 1, way, seed=3), choices):
        same = next(
            (i for i, pair in enumerate(zip(before, after)) if pair[0] != pair[1]), min(len(before), len(after))
        )
        wanted = own if way == "own" else preferred
        if way == "random":
            assert same == len(before) or any(after[i] == wanted[i] for i in range(same + 1))
            continue
        at = int(kl.argmax())
        assert same >= at
        assert after[at] == wanted[at]


def test_several_swaps_come_from_left_to_right_and_end_with_the_text(swaps, writer, written):
    calls = []
    real = writer.go_on
    writer.go_on = lambda model, texts, seed: calls.append([len(t) for t in texts]) or real(model, texts, seed)
    try:
        texts = writer.swapped(written, 4, "random", seed=1)
    finally:
        del writer.go_on
    assert len(calls) == 4
    for row in zip(*calls):
        assert sorted(row) == list(row)  # each swap stands behind the one before it
    assert all(len(text) <= swaps.NEW_TOKENS for text in texts)


def test_a_share_of_the_gain_by_hand(swaps):
    before, after = [0.0] * 6 + [1.0] * 2, [1.0] * 6 + [0.0] * 2  # .25 -> .75
    found = swaps.recovered(before, after, [1.0] * 4 + [0.0] * 4)
    assert found["solved"] == 0.5
    assert found["share"] == pytest.approx(0.5)
    assert found["low"] <= 0.5 <= found["high"]


def test_the_script_writes_its_figure_from_its_file(swaps, tmp_path, trained, capsys):
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    shutil.copytree(trained, checkpoint)
    (checkpoint / "trainer_state.json").write_text("{}")
    out = tmp_path / "swaps.json"
    swaps.main(["--after", str(checkpoint), "--problems", "4", "--swaps", "1", "--out", str(out)])
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert found["problems"] == 4
    assert set(found["swaps"]) == {"most", "random", "own"}
    assert 0 <= found["positions"]["prefer_another_token"] <= 1
    (tmp_path / "swaps.png").unlink()
    swaps.main(["--draw", "--out", str(out)])
    assert (tmp_path / "swaps.png").stat().st_size > 10_000
