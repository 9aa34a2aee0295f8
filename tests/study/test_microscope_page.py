"""The token microscope of a page: its numbers, colours, keys, and text that never becomes markup."""

from __future__ import annotations

import json

import pytest
from browser_pages import covered, opened
from report_fixtures import sample, write_run

import report
from study.microscope import UNITS, microscope
from study.run_files import read_run
from train import main as train_main
from update.losses import POLICY_LOSSES

pytest_plugins = ["browser_fixtures"]
UPDATE = {
    "step": {"loss_type": "dapo", "tokens": 6, "responses": 2, "longest": 8}, "weight": 1 / 6, "logp": [-0.05, -1.5],
    "entropy": [0.1, 1.5], "coefficient": [-0.0876059, -0.1],
}  # fmt: skip


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """Two steps of two updates each, with ratios away from 1, clipped tokens, an entropy term and a divergence."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    flags = "--steps 2 --eval-problems 0 --prompts-per-step 2 --max-new-tokens 24 --updates-per-rollout 2 --lr 2e-3 " \
            "--entropy-coef 0.01 --beta 0.02"  # fmt: skip
    assert train_main([*flags.split(), "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def page(browser, real_run):
    assert report.main([str(real_run)]) == 0
    return opened(browser, real_run / "report.html")


def test_the_pages_numbers_are_pythons_for_every_token_and_loss(page, real_run):
    steps = microscope(read_run(real_run))["steps"]
    shown = page.evaluate(
        """() => FACTS.microscope[0].steps.map((step) => step.responses.map((response) => LOSSES.map((loss) =>
            response.tokens.map((_, i) => tokenNumbers(step, response, loss, i)))))"""
    )
    assert set(page.evaluate("LOSSES")) == set(POLICY_LOSSES)
    moved = 0
    for step, found in zip(steps, shown, strict=True):
        for response, by_loss in zip(step["responses"], found, strict=True):
            for loss, numbers in zip(page.evaluate("LOSSES"), by_loss, strict=True):
                weight, out = response["weights"][loss], "left_out" in response
                assert [n["weight"] for n in numbers] == [weight] * len(response["tokens"])
                if out:
                    assert {n["coefficient"] for n in numbers} <= {0}
                    continue
                units = response["units"][UNITS[loss]]
                expected = [weight * unit for unit in units["unit"]]
                assert [n["coefficient"] for n in numbers] == pytest.approx(expected, rel=1e-4, abs=1e-6 * weight)
                assert [n["clipped"] for n in numbers] == list(map(int, units["clipped"]))
                ratios = [units["ratio"]] * len(numbers) if loss == "gspo" else response["ratio"]
                assert [n["ratio"] for n in numbers] == ratios
                moved += sum(n["coefficient"] != 0 for n in numbers)
    assert moved > 100


def test_each_number_can_be_the_colour_and_two_losses_stand_side_by_side(page):
    for lens in ("coefficient", "advantage", "ratio", "clipped", "weight", "entropy", "drawn"):
        page.select_option("#m-colour", lens)
        texts = page.locator("#m-view .lens")
        assert texts.count() == 2
        coloured = page.locator("#m-view .lens span[style*=rgba]").count()
        assert coloured > 0 or lens == "clipped"
        assert page.locator("#m-hint").inner_text()
    for loss in POLICY_LOSSES:
        page.select_option("#m-right", loss)
        assert page.locator("#m-view .card b").last.inner_text().startswith(loss)
    assert page.locator("#m-token tbody tr").count() == 7
    assert "does not contain it" in page.locator("#m-covers").inner_text()
    assert not page.troubles


def test_a_token_is_chosen_by_a_click_or_by_keys(page):
    page.locator("#m-view .lens").first.locator("span").nth(3).click()
    assert page.locator("#m-token-name").inner_text().startswith("Token 4 of")
    assert page.locator("#m-view .chosen").count() == 2  # in both losses
    for key, number in (("ArrowRight", "5"), ("ArrowLeft", "4"), ("Home", "1"), ("ArrowLeft", "1")):
        page.locator("#m-view .lens").last.focus()
        page.keyboard.press(key)
        assert page.locator("#m-token-name").inner_text().startswith(f"Token {number} of")


def test_another_step_and_response_is_shown(page):
    before = page.locator("#m-view").inner_text()
    page.select_option("#m-step", index=1)
    assert page.locator("#m-step-facts").inner_text().startswith("Step 2:")
    assert page.locator("#m-view").inner_text() != before
    count = page.locator("#m-response option").count()
    for i in range(count):
        page.select_option("#m-response", index=i)
    assert not page.troubles


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1400, "light")])
def test_the_microscope_fits_its_window(browser, real_run, page, width, scheme):
    page = opened(browser, real_run / "report.html", width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not covered(page, "#m-body select, #m-view .card, #m-token tbody td:nth-child(-n+4)")
    assert not page.troubles
    page.close()


def test_the_page_is_at_most_5_mb_besides_the_data(tmp_path):
    folder = write_run(tmp_path / "a", samples=[])
    assert report.main([str(folder)]) == 0
    assert (folder / "report.html").stat().st_size < 5e6


def test_a_run_without_the_numbers_opens_and_says_so(browser, tmp_path):
    folder = write_run(tmp_path / "old")
    assert report.main([str(folder)]) == 0
    page = opened(browser, folder / "report.html")
    assert "This run kept no numbers of its updates" in page.locator("#m-note").inner_text()
    assert not page.locator("#m-body").is_visible()
    assert not page.troubles
    page.close()


def test_a_step_without_the_numbers_is_refused_in_one_line(tmp_path, capsys):
    assert report.main([str(write_run(tmp_path / "old")), "--step", "3"]) == 2
    said = capsys.readouterr().err
    assert "step 3 has no numbers" in said
    assert said.count("\n") == 1


def test_tokens_that_look_like_code_are_shown_as_text(browser, tmp_path):
    evil = ["</script><img src=x onerror=alert(1)>", "<svg/onload=alert(1)>\u2028${alert(1)}"]
    samples = [sample(1, 1, i, tokens=evil, problem=evil[0], update=UPDATE) for i in (0, 1)]
    folder = write_run(tmp_path / "a", samples=samples)
    assert report.main([str(folder)]) == 0
    page = opened(browser, folder / "report.html")
    assert evil[0] in page.evaluate("document.querySelector('#m-view').textContent")
    page.locator("#m-view .lens span").first.click()
    assert page.locator("#microscope :is(img, svg, script)").count() == 0
    assert not page.troubles
    assert len(page.requests) == 1
    page.close()


def test_numbers_of_any_size_do_not_stop_the_script(browser, tmp_path):
    """Logs edited by hand: the exponential of a log-probability is not finite."""
    huge = UPDATE | {"logp": [1e300, -1e300], "entropy": [-5, None], "coefficient": [1e300, 0]}
    left_out = {"step": UPDATE["step"], "weight": 0.1}
    samples = [sample(1, 1, 0, update=huge | {"entropy": [0, 1e9]}), sample(1, 1, 1, update=left_out)]
    samples += [
        sample(2, 2, 0, update=huge),
        sample(2, 2, 1, update=left_out, tokens=[], token_ids=[], token_logprobs=[]),
    ]
    folder = write_run(tmp_path / "a", samples=samples)
    assert report.main([str(folder)]) == 0
    page = opened(browser, folder / "report.html")
    for step in (0, 1):
        page.select_option("#m-step", index=step)
        for response in (0, 1):
            page.select_option("#m-response", index=response)
            for lens in ("coefficient", "ratio", "weight", "entropy"):
                page.select_option("#m-colour", lens)
    assert not page.troubles
    json.dumps(page.evaluate("FACTS.microscope"))
    page.close()
