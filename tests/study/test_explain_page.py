"""The page of explain.py in a headless browser: its model is PyTorch's, and it does what a reader asks."""

from __future__ import annotations

import shutil

import pytest
import torch

import explain
from rollout.sampling import SamplingParams
from run.pretrained import load_pretrained, locate_pretrained
from study import anatomy
from tokenizer import Tokenizer

pytest_plugins = ["explain_fixtures"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
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
def page(page_file):
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.troubles, page.requests = [], []
        page.on("pageerror", lambda error: page.troubles.append(str(error)))
        page.on("console", lambda message: page.troubles.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(page_file.as_uri())
        yield page
        browser.close()


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


def test_one_types_a_problem_and_both_models_answer(page):
    page.fill("#question", "[2, 3] = 6")
    page.locator("#temperature").fill("0")
    page.click("#run")
    page.locator(".thinker .hint").first.filter(has_text="=").wait_for(timeout=30_000)
    page.locator("#run", has_text="Think").wait_for(timeout=30_000)
    answers = page.evaluate("THINKERS.map((thinker) => thinker.text())")
    model, tokenizer = load_pretrained(locate_pretrained("countdown-tiny"), torch.float32)
    problem = explain.CountdownTask(prompt_style="short").problem([2, 3], 6)
    prompt = tokenizer.render_chat(problem.messages) + problem.response_prefix
    greedy = SamplingParams(max_new_tokens=60, temperature=0.0)
    ids = explain.generate(model, [prompt], greedy, tokenizer=tokenizer)[0].response_ids
    assert answers[0] == tokenizer.decode(ids, skip_special_tokens=False)
    assert len(answers) == 2
    assert not page.troubles


def test_the_temperature_flattens_the_bars_at_once(page):
    def widest() -> float:
        return page.evaluate("parseFloat(document.querySelector('.bars .track span').style.width)")

    page.locator("#temperature").fill("0")
    assert widest() == 100
    page.locator("#temperature").fill("2")
    assert widest() < 100


def test_every_stage_of_the_way_is_pytorchs(page, tiny):
    """From overview to arithmetic: what the page works out for a token, layer and head is what `record` finds there."""
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
        said = page.locator(".memory").first.inner_text()
        assert said == f"KV cache: {tokens} tokens, {tokens * per_token:,} bytes"
        page.click("#one")


def test_the_bars_show_what_follows_the_chosen_token(page):
    page.evaluate("stop(), restart()")
    page.locator("#temperature").fill("1")
    page.locator(".thinker .tokens button").nth(4).click()
    assert "after 4 " in page.locator(".thinker h3").nth(1).inner_text()
    script = """() => {
        const p = filtered(THINKERS[0].steps[4].logits, settings(), LIVE.vocab_size);
        return visible(BPE_TOKENIZER.decode([p.indexOf(Math.max(...p))]));
    }"""
    assert page.locator(".bars code").first.inner_text() == page.evaluate(script)
    page.click("#one")  # and after the next token is drawn, what follows that
    assert "after 4 " not in page.locator(".thinker h3").nth(1).inner_text()


def test_a_chosen_head_and_stage_show_their_sums(page):
    page.locator(".thinker .tokens button").nth(5).click()
    page.locator("#looks button").nth(6).focus()
    page.keyboard.press("Enter")
    assert page.locator("#way-title").inner_text().endswith("layer 1, head 2")
    page.locator("#way summary").nth(4).focus()
    page.keyboard.press("Enter")
    assert "score q·k/√32" in page.locator("#way .sum").nth(4).inner_text()
    page.locator(".thinker .tokens button").nth(7).click()
    assert page.locator("#way details").nth(4).get_attribute("open") is not None  # stays open for the next token
    assert page.locator(".thinker li.chosen").count() == 1
    assert not page.troubles


def test_the_tables_follow_the_chosen_token(page, tiny):
    page.locator("#token-row button").nth(23).click()
    facts = page.evaluate("LOOK.next[23 - LOOK.tokens.length + LOOK.next.length].map((t) => t.id)")
    shown = page.locator("#next-table tbody td:nth-child(2)").all_inner_texts()
    assert [int(i) for i in shown] == facts
    assert page.locator(".place").first.inner_text().startswith("token 23")
    page.locator("#rise-row button").nth(24).click()
    moved = page.evaluate("FACTS.compare.next[23].map((t) => visible(t.text))")
    assert page.locator("#moved-next tbody th").all_inner_texts() == moved


def test_the_arrow_keys_move_over_the_attention_map(page):
    page.locator("#attention-maps canvas").first.focus()
    before = page.locator("#attention-hint").inner_text()
    page.keyboard.press("ArrowRight")
    after = page.locator("#attention-hint").inner_text()
    assert " looks at 0 " in before
    assert " looks at 1 " in after


@pytest.mark.parametrize(
    ("text", "value"),
    [("(5*2)+3", 13), ("7-2-1", 4), ("8/4/2", 1), ("2+3*4", 14), ("2+", None), ("alert(1)", None), ("((1)", None),
     ("1/0", None), ("", None)],
)  # fmt: skip
def test_the_page_reads_sums_and_nothing_else(page, text, value):
    assert page.evaluate("text => calculate(text)", text) == value


@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_fits_its_window(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
