"""Swap one token, in the page of two checkpoints: the token that is taken, the text after it, and the marks."""

from __future__ import annotations

import pytest
import torch
from browser_pages import covered, opened

from rollout.generation import generate
from rollout.sampling import SamplingParams
from run.pretrained import load_pretrained
from study import anatomy

pytest_plugins = ["explain_fixtures", "browser_fixtures"]
WRITTEN = "SWAPPED.tokens.map((t) => t.id)"


@pytest.fixture(scope="module")
def page(browser, page_file):
    return opened(browser, page_file)


@pytest.fixture(scope="module")
def after(trained):
    return load_pretrained(trained, torch.float32)[0]


def write_a_sampled_text(page) -> None:
    """A text at temperature 1, which has tokens that the trained model would not take. It goes on at temperature 0."""
    page.evaluate("""() => {
        byId("temperature").value = 1;
        if (restart()) finish();
        byId("temperature").value = 0;
    }""")


@pytest.fixture(autouse=True)
def from_the_start(page):
    write_a_sampled_text(page)


def greedy(model, tokenizer, ids: list[int], new_tokens: int = 240) -> list[int]:
    """`ids` and the model's response after them, without the stop token."""
    params = SamplingParams(n=1, max_new_tokens=new_tokens, temperature=0.0)
    response = generate(model, [ids], params, tokenizer=tokenizer)[0].response_ids
    return [*ids, *(i for i in response if i not in tokenizer.eos_token_ids)]


def test_disagreement_is_the_divergence_of_both_models(page, tiny, after):
    ids = page.evaluate(WRITTEN)
    kl = anatomy.compare(tiny[0], after, tiny[1], ids)["kl"]
    first = page.evaluate("SWAPPED.promptLength")
    found = page.evaluate("SWAPPED.positions().map((i) => SWAPPED.disagreement(i))")
    assert found == pytest.approx(kl[first - 1 :], rel=2e-3, abs=1e-4)
    marked = page.evaluate("[...SWAPPED.list.children].flatMap((li, i) => li.classList.contains('most') ? [i] : [])")
    largest = sorted(range(first - 1, len(kl)), key=lambda i: -kl[i])[:5]
    assert sorted(marked) == sorted(i + 1 for i in largest)


def test_a_swap_takes_the_trained_models_token_and_the_other_model_goes_on(page, tiny, after):
    model, tokenizer = tiny
    ids = page.evaluate(WRITTEN)
    first = page.evaluate("SWAPPED.promptLength")
    with torch.no_grad():
        wanted = after(torch.tensor([ids]))[0, :, : tokenizer.vocab_size].argmax(-1).tolist()
    at = next(i for i in range(first + 2, len(ids)) if wanted[i - 1] != ids[i])
    page.locator("#swap-list li button").nth(at).click()
    assert page.evaluate("CHOSEN.text === SWAPPED && CHOSEN.index") == at
    said = page.locator("#swap-said").inner_text()
    assert said.startswith(f"Position {at}: countdown-tiny wrote")
    page.click("#swap-take")
    room = 240 - (at + 1 - first)
    assert page.evaluate(WRITTEN) == greedy(model, tokenizer, [*ids[:at], wanted[at - 1]], room)
    assert page.locator("#swap-list li.swapped").count() == 1
    assert "1 swap." in page.locator("#swap-verdict").inner_text()
    assert "was swapped for" in page.locator("#swap-said").inner_text()
    page.click("#swap-undo")
    assert page.evaluate(WRITTEN) == ids
    assert page.locator("#swap-list li.swapped").count() == 0
    assert not page.troubles


def test_the_largest_disagreement_is_one_click_and_the_cache_stays_true(page, tiny):
    page.evaluate(
        """() => {
            for (let n = 0; n < 4 && SWAPPED.differMost() !== undefined; n++) SWAPPED.swap(SWAPPED.differMost());
        }"""
    )
    ids = page.evaluate(WRITTEN)
    with torch.no_grad():
        expected = tiny[0](torch.tensor([ids]))[0]
    found = torch.tensor(page.evaluate("SWAPPED.steps.map((step) => Array.from(step.logits))"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)  # after several cuts, both caches agree with ids
    first = page.evaluate("SWAPPED.promptLength")
    kl = page.evaluate("SWAPPED.positions().map((i) => [i, SWAPPED.changes(i), SWAPPED.disagreement(i)])")
    could = [(value, i) for i, changes, value in kl if changes]
    assert page.evaluate("SWAPPED.differMost()") == (max(could)[1] if could else None)
    assert all(i >= first for i, _, _ in kl)


def test_the_trained_model_may_end_the_response_or_go_on(page):
    """The position behind the last token is a choice like the others, and the stop token can be taken anywhere."""
    page.locator("#swap-list li.end button").click()
    end = page.evaluate("SWAPPED.tokens.length")
    assert page.locator("#swap-said").inner_text().startswith(f"Position {end}: countdown-tiny wrote the end")
    page.evaluate("SWAPPED.preferred = (i) => LIVE.stop[0]")
    first = page.evaluate("SWAPPED.promptLength")
    page.locator("#swap-list li button").nth(first + 3).click()
    page.click("#swap-take")
    assert page.evaluate("SWAPPED.tokens.length") == first + 3
    assert "no answer" in page.locator("#swap-verdict").inner_text()
    page.evaluate("delete SWAPPED.preferred")
    page.click("#swap-again")


def test_the_keyboard_and_a_phone_reach_everything(browser, page_file):
    page = opened(browser, page_file, 390, "dark")
    write_a_sampled_text(page)
    assert not covered(page, "#swap button, #swap h2, #swap p")
    page.locator("#swap-most").focus()
    page.keyboard.press("Enter")
    assert page.locator("#swap-list li.swapped").count() == 1
    assert page.evaluate("document.activeElement.id") == "swap-most"
    page.locator("#swap-list li.pointed button").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not page.troubles
    page.context.close()
