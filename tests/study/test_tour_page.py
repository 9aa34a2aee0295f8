"""The picture, the group and the guided tour of explain.py's page: seven stops from a prompt to a changed weight."""

from __future__ import annotations

import pytest
import torch
from browser_pages import covered, opened

from data_types import Episode
from grpo import compute_advantages
from math_task import CountdownTask
from study import anatomy

pytest_plugins = ["explain_fixtures", "browser_fixtures"]
RESPONSES = [
    "3+5=8,8*2=16 no\n</think>\n<answer>3*5-2</answer>",
    "</think>\n<answer>5+3+5</answer>",
    "</think><answer>3*5-2</answer> and more",
    "no tags",
    "</think>\n<answer>13</answer>",
    "</think>\n<answer>3*5-2</answer><answer>1</answer>",
    "<answer>3*5-2</answer>",
    "<think> again</think>\n<answer>(3*5)-2</answer>",
    "</think> <answer>3*5-2",
    "a</think>b</think><answer>3*5-2</answer>",
    "</think>\n<answer>3*5-2\n</answer>",
]


@pytest.fixture(scope="module")
def page(browser, page_file):
    return opened(browser, page_file)


def draw_group(page, question: str = "[5, 25, 22] = 2") -> None:
    page.fill("#question", question)
    page.click("#draw-group")
    page.locator("#group-table tbody tr").nth(7).wait_for(timeout=60_000)


@pytest.mark.parametrize("response", RESPONSES)
def test_rewards_are_those_of_the_task(page, response):
    task = CountdownTask(prompt_style="short", format_weight=0.1, answer_weight=1.0)
    problem = task.problem([3, 5, 2], 13)
    expected = task.reward(problem, response)
    text = response if response.lstrip().startswith("<think>") else "<think>" + response
    format_, right = page.evaluate("(text) => [formatOf(text), isRight(text, '[3, 5, 2] = 13')]", text)
    assert format_ == pytest.approx(expected.parts["format"])
    assert right == (expected.parts["answer"] == 1.0)


@pytest.mark.parametrize(
    "rewards", [[1.1, 0.1, 0.1, 0.0], [0.1] * 8, [1.1, 0.06], [0.0, 1.1, 1.1, 1.1, 0.1, 0.1, 0.1, 0.1]]
)
def test_advantages_are_those_of_training(page, rewards):
    episodes = [Episode(0, [1], [2], [0.0], "", "stop", reward=r) for r in rewards]
    expected = [episode.advantage for episode in compute_advantages(episodes)]
    assert page.evaluate("(rewards) => advantagesOf(rewards)", rewards) == pytest.approx(expected, abs=1e-9)


def test_the_push_is_autograds_step_on_the_heads_weights(page, tiny):
    """Slopes at the logits, the head's gradient, and the probabilities after a step of SGD."""
    model, tokenizer = tiny
    page.evaluate("document.getElementById('question').value = LIVE.question, restart(), finish()")
    ids = page.evaluate("THINKERS[0].tokens.map((t) => t.id)")
    at, advantage, rate = 30, -0.7, 0.003
    hidden = anatomy.record(model, ids[:at])["model.norm"][-1]
    weight = model.head_weight.detach()[: tokenizer.vocab_size].clone().requires_grad_()
    logits = weight @ hidden
    logits.retain_grad()
    (-advantage * logits.log_softmax(-1)[ids[at]]).backward()
    after = ((weight - rate * weight.grad) @ hidden).softmax(-1)
    found = page.evaluate(
        """([at, advantage, rate]) => {
            const text = THINKERS[0], { logits, trace } = text.steps[at - 1];
            const step = { logits, residual: trace.residual.at(-1) };
            const { x, coefficients, after } = push(text.model, step, text.tokens[at].id, advantage, rate);
            return { slope: coefficients[text.tokens[at].id] * x[0], coefficients, after };
        }""",
        [at, advantage, rate],
    )
    torch.testing.assert_close(torch.tensor(found["coefficients"]), logits.grad, atol=1e-5, rtol=1e-3)
    assert found["slope"] == pytest.approx(float(weight.grad[ids[at], 0]), rel=1e-3)
    torch.testing.assert_close(torch.tensor(found["after"]), after.detach(), atol=1e-4, rtol=1e-3)


def test_a_group_is_drawn_judged_and_followed_by_every_panel(page):
    draw_group(page)
    members = page.evaluate("GROUP.members.map((text) => text.response())")
    rewards = page.evaluate("GROUP.rewards")
    task = CountdownTask(prompt_style="short", format_weight=0.1, answer_weight=1.0)
    problem = task.problem([5, 25, 22], 2)
    assert rewards == pytest.approx([task.reward(problem, text).total for text in members], abs=1e-9)
    assert len(set(members)) > 1
    page.locator("#group-table button").nth(2).click()
    assert page.evaluate("CHOSEN.text === GROUP.members[2]")
    assert page.locator("#push-panel").is_visible()
    index = page.evaluate("CHOSEN.index")
    assert page.locator("#push-panel .place").inner_text().startswith(f"token {index},")
    before = page.locator("#push-sum").inner_text()
    page.locator("#rate").fill("1")
    assert page.locator("#push-sum").inner_text() != before
    assert not page.troubles


def test_a_group_of_a_foreign_problem_is_refused(page):
    page.evaluate("GROUP.members = []")
    page.fill("#question", "hello")
    page.click("#draw-group")
    assert "never seen" in page.locator("#complaint").inner_text()
    assert page.evaluate("GROUP.members.length") == 0
    page.fill("#question", "[5, 25, 22] = 2")


def test_one_zooms_from_the_picture_to_the_arithmetic_with_the_keyboard(page):
    assert page.locator("main section").first.get_attribute("id") == "picture"
    page.evaluate("restart(), finish(), zoom(null, null)")
    page.locator("[data-box='block 2']").focus()
    page.keyboard.press("Enter")
    assert page.locator("#inside h3").inner_text() == "Inside block 2"
    assert page.evaluate("document.activeElement.dataset.box") == "block 2"
    page.locator("[data-box='Attention Attention weights']").focus()
    page.keyboard.press("Enter")
    sums = page.locator("#zoomed .sum").inner_text()
    assert "score q·k/√32" in sums
    assert "layer 2" in page.locator("#zoomed .hint").inner_text()
    assert sums == page.evaluate("STAGES[4].lines.join('\\n')")
    page.click("#later")  # the sum follows the chosen token
    assert page.locator("#zoomed .sum").inner_text() != sums
    names = page.evaluate("STAGES.map((stage) => stage.name.replace(', added', ''))")
    boxes = page.evaluate("[...FLOW, ...INSIDE.flatMap(([, s]) => s)].map(([name, stage]) => [name, stage])")
    for name, stage in boxes:  # each box opens the stage of its name
        if stage is not None and name not in ("Embedding", "Head"):
            assert names[stage] == name
    for _ in range(2):
        page.locator("[data-box='block 2']").focus()
        page.keyboard.press("Escape")
    assert not page.locator("#inside").is_visible()
    assert not page.locator("#zoomed").is_visible()


def test_the_picture_of_a_static_page_leads_to_its_panels(browser, static_page):
    page = opened(browser, static_page)
    page.locator("[data-box='block 1']").click()
    page.locator("[data-box='Attention RoPE']").click()
    page.wait_for_timeout(600)
    assert page.evaluate("Math.abs(document.getElementById('rope').getBoundingClientRect().top) < 300")
    assert not page.troubles
    page.context.close()


TRIES = [
    lambda page: page.evaluate("choose(CHOSEN.text, CHOSEN.index - 3)"),
    lambda page: (page.locator("[data-box='block 1']").click(),
                  page.locator("[data-box='Attention Attention weights']").click()),
    lambda page: page.locator("#looks button").nth(5).click(),
    lambda page: page.locator("#tour-temperature").fill("1"),
    lambda page: page.click("#one"),
    lambda page: draw_group(page),
    lambda page: page.locator("#rate").fill("0.8"),
]  # fmt: skip


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1400, "light")])
def test_the_tour_has_seven_stops_with_something_to_try(browser, page_file, width, scheme):
    page = opened(browser, page_file, width, scheme)
    page.emulate_media(reduced_motion="reduce")
    page.locator("#tour-start").focus()
    page.keyboard.press("Enter")
    for number, act in enumerate(TRIES, start=1):
        assert page.locator("#tour-title").inner_text().startswith(f"{number} of 7: ")
        assert page.evaluate("document.activeElement.id") == "tour-title"
        assert page.evaluate("(i) => document.getElementById(STOPS[i].at).classList.contains('toured')", number - 1)
        assert page.locator("#tour-tried").inner_text() == "to try"
        card = page.locator("#tour").bounding_box()
        assert card["x"] >= 0
        assert card["x"] + card["width"] <= width
        assert card["height"] < 450
        act(page)
        page.locator("#tour-tried", has_text="✓ tried").wait_for(timeout=10_000)
        page.locator("#tour-title").focus()
        page.keyboard.press("ArrowRight")
    assert page.locator("#tour").is_visible()  # the last arrow stays at the last stop
    page.keyboard.press("ArrowLeft")
    assert page.locator("#tour-title").inner_text().startswith("6 of 7: ")
    page.keyboard.press("Escape")
    assert not page.locator("#tour").is_visible()
    assert page.evaluate("document.activeElement.id") == "tour-start"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not covered(page, "#group button, #push-panel h3, #diagram button")
    assert page.requests == [page_file.as_uri()]
    assert not page.troubles
    page.context.close()
