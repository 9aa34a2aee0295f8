"""Scrub through training, in the page of a run with ten snapshots: every frame is PyTorch's model of that step."""

from __future__ import annotations

import shutil

import pytest
import torch
from browser_pages import covered, opened

import explain
from qwen2_llm import Qwen2ForCausalLM
from run import snapshots
from study import anatomy
from study.live import two_characters

pytest_plugins = ["explain_fixtures", "browser_fixtures"]
STEPS = [0, 8, 17, 25, 33, 42, 50, 58, 67, 75]


def weights_of(model, step: int) -> dict[str, torch.Tensor]:
    """The model's weights, as far from it as a run might be at that step."""
    generator = torch.Generator().manual_seed(step)
    return {n: w + 1e-4 * step * torch.randn(w.shape, generator=generator) for n, w in model.state_dict().items()}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny, trained):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    shutil.copytree(trained, folder / "checkpoints" / "step-000075")
    (folder / "checkpoints" / "step-000075" / "trainer_state.json").write_text("{}")
    (folder / "checkpoints" / "latest").write_text("step-000075\n")
    for step in STEPS:
        snapshots.write(folder, step, weights_of(tiny[0], step))
    return folder


@pytest.fixture(scope="module")
def scrub_file(run_folder):
    assert explain.main(["--after", str(run_folder), "--out", str(run_folder / "page.html")]) == 0
    return run_folder / "page.html"


@pytest.fixture(scope="module")
def page(browser, scrub_file):
    return opened(browser, scrub_file)


def models_of(run_folder, tiny) -> list[Qwen2ForCausalLM]:
    """PyTorch's model of each frame."""
    _, start, changes = snapshots.read(run_folder)
    found = []
    for weights in [start, *(snapshots.restore(start, change) for change in changes.values())]:
        model = Qwen2ForCausalLM(tiny[0].config)
        model.load_state_dict(weights)
        found.append(model.eval())
    return found


def test_every_frames_logits_are_pytorchs_to_1e4(page, run_folder, tiny):
    ids = tiny[1].encode("<|im_start|>user\n[17, 3, 5, 2] = 13<|im_end|>\n<|im_start|>assistant\n<think>\n17-3=14,")
    models = models_of(run_folder, tiny)
    assert page.evaluate("SNAPSHOTS.steps") == STEPS
    assert len(models) == len(STEPS)
    for n, model in enumerate(models):
        found = page.evaluate(
            """([n, ids]) => {
                const cache = frame(n).newCache();
                return ids.map((id) => Array.from(frame(n).step(id, cache).logits));
            }""",
            [n, ids],
        )
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(found), model(torch.tensor([ids]))[0], atol=1e-4, rtol=1e-4)


def test_a_frames_weights_are_pytorchs_to_the_last_bit(page, run_folder, tiny):
    name = "model.layers.2.mlp.down_proj.weight"
    for n, model in enumerate(models_of(run_folder, tiny)):
        found = page.evaluate("([n, name]) => Array.from(frame(n).weights[name].slice(0, 500))", [n, name])
        assert torch.equal(torch.tensor(found), model.get_parameter(name).flatten()[:500]), n


def test_frames_are_near_the_runs_own_weights(run_folder, tiny):
    """12 bits of the change: the logits of the run's true weights differ by little."""
    ids = torch.tensor([tiny[1].encode("[17, 3, 5, 2] = 13")])
    for step, model in zip(STEPS, models_of(run_folder, tiny)):
        true = Qwen2ForCausalLM(tiny[0].config)
        true.load_state_dict(weights_of(tiny[0], step))
        with torch.no_grad():
            assert (true(ids) - model(ids)).abs().max() < 0.02


def test_ten_snapshots_add_less_than_twenty_megabytes(scrub_file, page_file):
    assert scrub_file.stat().st_size - page_file.stat().st_size < 20e6


def test_the_slider_changes_table_colours_map_and_weights(page, run_folder, tiny):
    models, (_, tokenizer) = models_of(run_folder, tiny), tiny
    ids = page.evaluate("CHOSEN.text.tokens.map((t) => t.id)")
    at, first = page.evaluate("[CHOSEN.index, CHOSEN.text.promptLength]")
    for n in (0, 4, 9):
        page.locator("#frame").fill(str(n))
        assert page.locator("#frame-value").inner_text() == f"step {STEPS[n]} of 75"
        with torch.no_grad():
            logp = models[n](torch.tensor([ids]))[0, :, : tokenizer.vocab_size].log_softmax(-1)
        top = page.locator("#frame-table tbody tr").first
        word = top.locator("th").inner_text()
        token = next(i for i in range(tokenizer.vocab_size) if page.evaluate("(i) => visible(wordOf(i))", i) == word)
        share = float(logp[at, token].exp())
        assert top.locator("td").nth(1).inner_text() == page.evaluate("(p) => percent(p)", share)
        own = [float(logp[i - 1, ids[i]]) for i in range(first, len(ids))]
        said = page.locator("#frame-mean").inner_text().split(": ")[1]
        assert float(said.split(" ")[0]) == pytest.approx(sum(own) / len(own), rel=2e-3, abs=1e-4)
        weights = anatomy.record(models[n], ids)["model.layers.0.self_attn.weights"][0]
        found = page.evaluate("(n) => READ.steps[n].map((step) => step.weights[0][0])", n)
        for row, expected in zip(found, weights):
            assert row == pytest.approx(expected[: len(row)].tolist(), abs=1e-4)
        moved = page.evaluate("(n) => Object.fromEntries(movedIn(n).map((w) => [w.name, w.relative]))", n)
        for name, before in models[0].named_parameters():
            change = float((models[n].get_parameter(name) - before).norm() / before.norm())
            assert moved[name] == pytest.approx(change, rel=1e-3, abs=1e-7)
    assert not page.troubles


def test_the_slider_follows_the_chosen_token_and_head(page):
    page.locator("#frame").fill("3")
    page.locator("#frame-text button").nth(20).click()
    assert page.evaluate("CHOSEN.index") == 20
    assert page.locator("#scrub .place").inner_text().startswith("token 20,")
    page.locator("#looks button").nth(7).click()
    assert page.locator("#frame-map-title").inner_text() == "Layer 1, head 3"


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1400, "light")])
def test_the_keyboard_moves_the_slider_and_nothing_is_covered(browser, scrub_file, width, scheme):
    page = opened(browser, scrub_file, width, scheme)
    assert page.locator("#frame-value").inner_text() == "step 75 of 75"
    page.locator("#frame").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.locator("#frame-value").inner_text() == "step 8 of 75"
    page.locator("#frame-later").focus()
    page.keyboard.press("Enter")
    assert page.locator("#frame-value").inner_text() == "step 17 of 75"
    assert page.evaluate("document.activeElement.id") == "frame-later"
    page.keyboard.press("End")
    page.locator("#frame").fill("9")
    page.locator("#frame-later").focus()
    page.keyboard.press("Enter")  # at the last snapshot it stays
    assert page.locator("#frame-value").inner_text() == "step 75 of 75"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not covered(page, "#scrub h2, #scrub h3, .scrubber > *")
    assert page.requests == [scrub_file.as_uri()]
    assert not page.troubles
    page.context.close()


def test_numbers_of_twelve_bits_are_two_letters():
    assert two_characters(torch.tensor([-2048, -1, 0, 2047], dtype=torch.int16)) == "AAf/gA//"


def test_a_run_without_snapshots_has_no_slider(page_file):
    assert 'id="scrub"' not in page_file.read_text()


def test_a_checkpoint_of_the_run_has_the_slider_too(run_folder, tmp_path):
    checkpoint = run_folder / "checkpoints" / "step-000075"
    facts = explain.explain(explain.Options(after=str(checkpoint), new_tokens=1))
    assert facts["live"]["snapshots"]["steps"] == STEPS


def test_snapshots_of_another_model_are_one_line(run_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run_folder / "checkpoints", folder / "checkpoints")
    shutil.copytree(run_folder / "snapshots", folder / "snapshots")
    (folder / "snapshots" / "step-000008.safetensors").write_bytes(b"cut")
    assert explain.main(["--after", str(folder), "--out", str(tmp_path / "x.html")]) == 2
    error = capsys.readouterr().err
    assert "step-000008.safetensors" in error
    assert error.count("\n") == 1
