"""The page of explain.py in a headless browser: its model is PyTorch's, and every control works."""

from __future__ import annotations

import pytest
import torch
from browser_pages import covered, opened, shades

import explain
from math_task import CountdownTask
from rollout.generation import generate
from rollout.sampling import SamplingParams
from run.pretrained import load_pretrained, locate_pretrained
from study import anatomy
from study.live import telling_problem
from tokenizer import Tokenizer

pytest_plugins = ["explain_fixtures", "browser_fixtures"]
TEXTS = [
    "[3, 5, 2] = 13",
    "<|im_start|>user\n[7, 7] = 49<|im_end|>\n<think>",
    "  two  blanks\n\n and lines \r\n",
    "don't WE'LL it's",
    "naïve café ½ ²",
    "Привет, мир! 你好世界 🙂👍🏽",
    "a\u0301 b\ufeffc\u00a0d",
    "x" * 50,
    "",
    "<answer></answer><|endoftext|>>",
    "1234567",
]


@pytest.fixture(scope="module")
def page(browser, page_file):
    return opened(browser, page_file)


def test_the_page_asks_nobody_for_anything(page, page_file):
    assert page.requests == [page_file.as_uri()]
    assert not page.troubles


def test_the_pages_tokenizer_gives_the_same_ids(page):
    tokenizer = Tokenizer.from_pretrained(locate_pretrained("countdown-tiny"))
    for text in TEXTS:
        ids = page.evaluate("text => BPE_TOKENIZER.encode(text)", text)
        assert ids == tokenizer.encode(text), text
        assert page.evaluate("ids => BPE_TOKENIZER.decode(ids)", ids) == tokenizer.decode(
            ids, skip_special_tokens=False
        )


@pytest.mark.parametrize("number", [0, 1])
def test_the_pages_logits_are_pytorchs(page, tiny, trained, number):
    model = (tiny[0], load_pretrained(trained, torch.float32)[0])[number]
    ids = tiny[1].encode("<|im_start|>user\n[17, 3, 5, 2] = 13<|im_end|>\n<|im_start|>assistant\n<think>\n17-3=14,")
    script = """([number, ids]) => {
        const model = MODELS[number], cache = model.newCache();
        return ids.map((id) => Array.from(model.step(id, cache).logits));
    }"""
    logits = torch.tensor(page.evaluate(script, [number, ids]))
    torch.testing.assert_close(logits, model(torch.tensor([ids]))[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"temperature": 1.7, "top_k": 3}, {"top_p": 0.8},
     {"temperature": 0.7, "top_k": 9, "top_p": 0.6}],
)  # fmt: skip
def test_the_page_draws_from_the_same_probabilities(page, settings):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 2
    names = {"temperature": "temperature", "top_k": "topK", "top_p": "topP"}
    asked = {names[k]: v for k, v in settings.items()}
    p = page.evaluate("([logits, asked]) => filtered(logits, asked, 48)", [logits.tolist(), asked])
    expected = anatomy.probabilities(logits[None], SamplingParams(**settings), 48)[0]
    torch.testing.assert_close(torch.tensor(p), expected, atol=1e-5, rtol=1e-4)


def test_the_page_draws_each_token_as_often_as_it_is_likely(page):
    script = """() => {
        const random = uniforms(3), counts = [0, 0, 0, 0];
        for (let i = 0; i < 20000; i++) counts[draw([0.5, 0, 0.3, 0.2], random())] += 1;
        return counts;
    }"""
    counts = page.evaluate(script)
    assert counts[1] == 0
    assert [c / 20000 for c in counts] == pytest.approx([0.5, 0, 0.3, 0.2], abs=0.02)


def test_the_page_opens_with_finished_responses(page, tiny, trained):
    """The first one shows something: the model is least sure at the chosen token, and both answers are there."""
    page.reload()
    verdicts = page.locator(".thinker .verdict").all_inner_texts()
    assert len(verdicts) == 2
    assert all("right" in said or "answer" in said or "target" in said for said in verdicts)
    models = [tiny[0], load_pretrained(trained, torch.float32)[0]]
    problem = telling_problem(models, tiny[1])
    assert page.input_value("#question") == problem.messages[-1]["content"]
    prompt = tiny[1].render_chat(problem.messages) + problem.response_prefix
    greedy = SamplingParams(n=1, max_new_tokens=240, temperature=0.0)
    for model, text in zip(models, page.evaluate("THINKERS.map((thinker) => thinker.response())")):
        ids = generate(model, [prompt], greedy, tokenizer=tiny[1])[0].response_ids
        ids = ids[:-1] if ids[-1] in tiny[1].eos_token_ids else ids
        assert text == tiny[1].decode(ids, skip_special_tokens=False)


def test_one_types_a_problem_and_both_models_answer(page, tiny):
    page.fill("#question", "[2, 3, 7] = 42")
    page.locator("#temperature").fill("0")
    page.click("#run")
    page.locator(".thinker .verdict").nth(1).filter(has_text="answer").or_(
        page.locator(".thinker .verdict").nth(1).filter(has_text="=")).wait_for(timeout=30_000)  # fmt: skip
    page.locator("#run", has_text="Think").wait_for(timeout=30_000)
    answers = page.evaluate("THINKERS.map((thinker) => thinker.response())")
    problem = CountdownTask(prompt_style="short").problem([2, 3, 7], 42)
    prompt = tiny[1].render_chat(problem.messages) + problem.response_prefix
    greedy = SamplingParams(max_new_tokens=240, temperature=0.0)
    ids = generate(tiny[0], [prompt], greedy, tokenizer=tiny[1])[0].response_ids
    ids = ids[:-1] if ids[-1] in tiny[1].eos_token_ids else ids
    assert answers[0] == tiny[1].decode(ids, skip_special_tokens=False)
    assert len(answers) == 2
    assert not page.troubles


@pytest.mark.parametrize(
    ("question", "found"),
    [("What is 3 + 5?", "W h a t"), ("[3, 5, 2] = 1\u0663", "\u0663"), ("<img src=x onerror=alert(1)>", "<"),
     ("[3, 5] = \u200b8", "\u25a1")],
)  # fmt: skip
def test_text_outside_the_alphabet_is_refused_with_a_line(page, question, found):
    page.evaluate("stop(), document.getElementById('question').value = LIVE.question, restart(), finish()")
    before = page.evaluate("THINKERS.map((thinker) => thinker.response())")
    page.fill("#question", question)
    for way in ("#run", "#one"):
        page.click(way)
        said = page.locator("#complaint").inner_text()
        assert said.startswith("Not run: this model has never seen")
        assert found in said
        assert page.evaluate("running") is None
    assert page.evaluate("THINKERS.map((thinker) => thinker.response())") == before
    page.fill("#question", "[3, 5, 2] = 13")
    assert page.locator("#complaint").inner_text() == ""
    page.fill("#question", "[3,5,2]=13")
    assert "a comma and a blank" in page.locator("#complaint").inner_text()
    page.fill("#question", "[3, 5, 200] = 13")
    assert "from 1 to 25" in page.locator("#complaint").inner_text()
    page.evaluate("document.getElementById('question').value = LIVE.question, restart()")


def test_the_temperature_flattens_the_table_at_once(page):
    page.evaluate("restart(), finish()")

    def largest() -> float:
        cells = page.locator("#next-table tbody td:nth-child(4)").all_inner_texts()
        return max(float(cell.strip("%")) for cell in cells if "%" in cell and "<" not in cell)

    page.locator("#temperature").fill("0")
    assert largest() == 100
    page.locator("#temperature").fill("2")
    assert largest() < 100


def test_every_stage_of_the_way_is_pytorchs(page, tiny):
    """From overview to arithmetic: the page's numbers for a token, layer and head are those of `record`."""
    model, _ = tiny
    page.evaluate("stop(), restart()")
    layer, head, index, K = 2, 3, 11, model.config.head_dim
    stages = page.evaluate(
        """([layer, head, index]) => {
            const t = THINKERS[0], way = wayThrough(t.model, t.steps, t.cache, index, layer, head, () => "");
            return way.map((stage) => [stage.name, Array.from(stage.value)]);
        }""",
        [layer, head, index],
    )
    trace = anatomy.record(model, page.evaluate("THINKERS[0].steps.map((step) => step.id)"))
    block, attn, own = f"model.layers.{layer}", f"model.layers.{layer}.self_attn", slice(head * K, (head + 1) * K)
    before = trace[f"model.layers.{layer - 1}"][index]
    expected = {
        "Residual stream": before,
        "RMSNorm": trace[f"{block}.input_layernorm"][index],
        "Query": trace[f"{attn}.q_proj"][index, own],
        "RoPE": trace[f"{attn}.q"][index, head],
        "Attention weights": trace[f"{attn}.weights"][head, index, : index + 1],
        "Weighted values": trace[f"{attn}.z"][index, head],
        "o_proj, added": before + trace[attn][index],
        "RMSNorm again": trace[f"{block}.post_attention_layernorm"][index],
        "SwiGLU": trace[f"{block}.mlp.act"][index],
        "down_proj, added": trace[block][index],
        "Final norm": trace["model.norm"][index],
        "Logits": trace["logits"][index],
    }
    assert [name for name, _ in stages] == [name.removesuffix(" again") for name in expected] + ["Sampler"]
    for (name, found), tensor in zip(stages, expected.values()):
        torch.testing.assert_close(torch.tensor(found), tensor, atol=2e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_the_sum_that_is_written_out_is_a_dot_product(page):
    said = page.evaluate("worked([1, 2, 3, 4, 5], [1, -1, 2, 0.5, 10], 0.25)")
    assert said == "5.000·10.00 + 3.000·2.000 + 2.000·-1.000 + 2 smaller terms 3.000 + bias 0.2500 = 57.25"


def test_the_cache_grows_with_the_answer(page, tiny):
    page.evaluate("stop(), restart()")
    per_token = anatomy.cache_growth(tiny[0].config, 1, 4)["bytes_per_token"]
    prompt = page.evaluate("THINKERS[0].steps.length")
    for tokens in (prompt, prompt + 1):
        said = page.locator("#memory").inner_text()
        assert said == f"Now: {tokens} tokens, {tokens * per_token:,} bytes, {per_token:,} a token."
        page.click("#one")


def panels(page) -> list[str]:
    """The token that each panel says it speaks of."""
    return [
        *page.locator(".place").all_inner_texts(),
        page.locator("#way-title").inner_text().removeprefix("Token ").partition(":")[0],
    ]


def test_every_panel_speaks_of_the_one_chosen_token(page, tiny):
    """CHECKLIST 71: whichever control chooses a token, every panel shows that token and no other."""
    page.evaluate("stop(), restart(), finish()")
    count = page.evaluate("THINKERS[0].tokens.length")
    assert count > 30
    ways = {
        "a token of the second model": lambda: page.locator(".thinker").nth(1).locator("li button").nth(9).click(),
        "a token of the first": lambda: page.locator(".thinker").first.locator("li button").nth(22).click(),
        "the arrow key": lambda: page.keyboard.press("ArrowRight"),
        "the bar": lambda: page.click("#earlier"),
        "the comparison": lambda: page.locator("#rise-row li button").nth(24).click(),
        "the map": lambda: (page.locator("#attention-map").focus(), page.keyboard.press("ArrowUp"),
                            page.keyboard.press("Enter")),
    }  # fmt: skip
    for way, expected in zip(ways, [9, 22, 23, 22, 24, 23]):
        ways[way]()
        index = page.evaluate("CHOSEN.index")
        assert index == expected, way
        word = page.evaluate("labelOf(CHOSEN.text, CHOSEN.index)")
        assert {said.removeprefix("token ").split(",")[0] for said in panels(page)} == {str(index)}, way
        assert all(said.endswith(f", {word}") for said in panels(page)), way
        ids = page.evaluate("CHOSEN.text.next(CHOSEN.index).map((t) => t.id)")
        shown = page.locator("#next-table tbody td:nth-child(2)").all_inner_texts()
        assert [int(i) for i in shown] == ids, way
        # and the numbers are those of the model that owns the text
        model = page.evaluate("THINKERS.indexOf(CHOSEN.text)")
        if model == 0:
            trace = anatomy.record(tiny[0], page.evaluate("CHOSEN.text.tokens.map((t) => t.id)"))
            assert ids[0] == int(trace["logits"][index, : tiny[1].vocab_size].argmax())
        row = page.locator("#looks tbody tr").first.locator("td").count()
        assert row == index + 1, way
        assert page.locator(".thinker li.chosen").count() == 1
        moved = page.locator("#moved-next tbody th").all_inner_texts()
        assert moved == page.evaluate("comparisonOf(CHOSEN.text).next(CHOSEN.index).map((t) => visible(t.text))")


def test_a_chosen_head_and_stage_show_their_sums(page):
    page.evaluate("stop(), restart(), finish()")
    page.locator(".thinker .tokens button").nth(5).click()
    page.locator("#looks button").nth(6).focus()
    page.keyboard.press("Enter")
    assert page.locator("#way-title").inner_text().endswith("layer 1, head 2")
    assert page.locator("#map-title").inner_text() == "layer 1, head 2"
    page.locator("#way summary").nth(4).focus()
    page.keyboard.press("Enter")
    assert "score q·k/√32" in page.locator("#way .sum").nth(4).inner_text()
    page.locator(".thinker .tokens button").nth(7).click()
    assert page.locator("#way details").nth(4).get_attribute("open") is not None  # stays open for the next token
    assert page.locator(".thinker li.chosen").count() == 1
    assert not page.troubles


def test_the_comparison_is_pythons(page, tiny, trained):
    page.evaluate("stop(), restart(), finish()")
    other = load_pretrained(trained, torch.float32)[0]
    ids = page.evaluate("CHOSEN.text.tokens.map((t) => t.id)")
    expected = anatomy.compare(tiny[0], other, tiny[1], ids)
    found = page.evaluate("(({kl, rise}) => ({kl, rise}))(comparisonOf(CHOSEN.text))")
    assert found["kl"] == pytest.approx(expected["kl"], rel=2e-3, abs=1e-4)
    assert found["rise"] == pytest.approx(expected["rise"], rel=2e-3, abs=1e-4)


def test_red_has_a_legend(page):
    for section in ("#text", "#compare"):
        assert "red:" in page.locator(f"{section} .legend").first.inner_text()


def test_the_arrow_keys_move_over_the_attention_map(page):
    page.locator("#attention-map").focus()
    page.evaluate("sayWeight(5, 0)")
    page.keyboard.press("ArrowRight")
    assert " looks at 1 " in page.locator("#attention-hint").inner_text()
    page.keyboard.press("ArrowUp")
    assert page.locator("#attention-hint").inner_text().startswith("4 ")


@pytest.mark.parametrize(
    ("text", "value"),
    [("(5*2)+3", 13), ("7-2-1", 4), ("8/4/2", 1), ("2+3*4", 14), ("2+", None), ("alert(1)", None), ("((1)", None),
     ("1/0", None), ("", None)],
)  # fmt: skip
def test_the_page_reads_sums_and_nothing_else(page, text, value):
    assert page.evaluate("text => calculate(text)", text) == value


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("kind", ["live", "static"])
def test_the_page_fits_its_window_in_both_schemes(browser, page_file, static_page, kind, width, scheme):
    file = page_file if kind == "live" else static_page
    page = opened(browser, file, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground, ink = shades(page)
    assert (ground > 0.8 and ink < 0.3) if scheme == "light" else (ground < 0.2 and ink > 0.7)
    assert not covered(page, "button:not(.scroll button, .tokens button, canvas), h2, h3")
    assert page.requests == [file.as_uri()]
    assert not page.troubles
    page.context.close()


def test_a_text_in_the_page_never_runs(browser, tmp_path):
    """As a prompt and as the reader's question, in every panel that shows its tokens."""
    evil = "</script><img src=x onerror=alert(1)><svg/onload=alert(2)>&lt;b&gt;{{7*7}}"
    path = tmp_path / "x.html"
    assert explain.main(["--raw", "--prompt", evil, "--new-tokens", "3", "--out", str(path)]) == 0
    page = opened(browser, path)
    assert page.input_value("#question") == evil
    page.fill("#question", evil + "<iframe srcdoc='<script>alert(3)</script>'>")
    page.click("#one")
    page.evaluate("zoom(1, 4)")
    page.wait_for_timeout(200)
    assert page.locator("main img, main iframe, main script").count() == 0
    assert page.requests == [path.as_uri()]
    assert not page.troubles
    page.context.close()


def test_a_static_page_says_so_and_follows_one_token(browser, static_page):
    page = opened(browser, static_page)
    banner = page.locator(".banner").inner_text()
    assert banner.startswith("This page is static: ")
    assert "--prompt" in banner
    assert page.locator("#controls").count() == 0
    first = page.evaluate("TEXTS[0].first")
    page.locator("#texts ol").nth(1).locator("button").nth(first + 3).click()
    page.keyboard.press("ArrowRight")
    assert {said.split(",")[0] for said in page.locator(".place").all_inner_texts()} == {f"token {first + 4}"}
    assert page.evaluate("CHOSEN.text === TEXTS[1]")
    assert page.locator("#norm-chart circle").count() == 8
    assert page.locator("#looks tbody tr").first.locator("td").count() == first + 5
    assert not page.troubles
    page.context.close()
