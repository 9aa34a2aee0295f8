"""What explain.py says is what the model does; and the page's JavaScript is the same model."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from test_activations import make_model

import anatomy
import explain
from attention import KVCache, PrefillAttention
from generation import SamplingParams
from pretrained import load_pretrained, locate_pretrained
from tokenizer import Tokenizer

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
def tiny():
    return load_pretrained(locate_pretrained("countdown-tiny"), torch.float32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A second checkpoint: the bundled one, a little further on."""
    folder = tmp_path_factory.mktemp("after") / "after"
    shutil.copytree(locate_pretrained("countdown-tiny"), folder)
    model, _ = load_pretrained(folder, torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def page_file(tmp_path_factory, trained):
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert explain.main(["--after", str(trained), "--out", str(path)]) == 0
    return path


# ---------------------------------------------------------------------------------------------------------------------
# The facts


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"model_type": "qwen3", "qk_norm": True, "attention_bias": False},
     {"model_type": "llama", "attention_bias": False}],
)  # fmt: skip
def test_the_parts_hold_every_parameter_once(changes):
    model = make_model(**changes)
    rows = anatomy.parts(model.config, 7, element_size=4)
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.parameters())
    assert all(row["bytes"] == 4 * row["parameters"] for row in rows)


def test_flops_of_a_product_are_twice_its_weights_times_tokens():
    rows = {row["name"]: row for row in anatomy.parts(make_model().config, 7, element_size=4)}
    assert rows["down_proj"]["flops"] == 2 * 7 * rows["down_proj"]["parameters"]
    c = make_model().config
    looked_at = sum(range(1, 8))  # token i looks at i + 1 tokens; scores and values, a head at a time
    assert rows["attention"]["flops"] == (c.num_hidden_layers * looked_at * 2 * 2 * c.num_attention_heads * c.head_dim)


def test_the_facts_of_a_text(tiny):
    model, tokenizer = tiny
    ids = tokenizer.encode("[3, 5, 2] = 13")
    facts = anatomy.look(model, tokenizer, ids, layers=[1, 3], heads=[0, 2])
    assert [t["id"] for t in facts["tokens"]] == ids
    assert set(facts["attention"]) == {"1.0", "1.2", "3.0", "3.2"}
    for rows in facts["attention"].values():
        assert [len(row) for row in rows] == list(range(1, len(ids) + 1))
        assert all(math.isclose(sum(row), 1, abs_tol=0.02) for row in rows)
    with torch.no_grad():
        p = model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].softmax(-1)
    first = facts["next"][0]
    assert first["id"] == int(p.argmax())
    assert math.isclose(first["p"]["T = 1"], float(p.max()), rel_tol=1e-3)
    text, share = facts["lens"][-1]["last"][0]
    assert (text, share) == (first["text"], pytest.approx(first["p"]["T = 1"], rel=1e-3))


def test_the_cache_grows_by_the_bytes_it_says(tiny):
    model, _ = tiny
    prefill = PrefillAttention([5])
    model.hidden_states(torch.arange(5), torch.arange(5), prefill)
    cache = KVCache.from_prefill(prefill, 1, 0)
    assert anatomy.cache_growth(model.config, 5, 4)["at"][0]["bytes"] == cache.k.nbytes + cache.v.nbytes


def test_norms_are_root_mean_squares_of_what_enters(tiny):
    model, _ = tiny
    seen = []
    block = model.model.layers[2]
    handle = block.post_attention_layernorm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    trace = anatomy.record(model, range(6))
    handle.remove()
    found = next(n for n in anatomy.norms(model, trace) if n["layer"] == 2 and n["norm"].startswith("post"))
    rms = seen[0].pow(2).mean(-1).sqrt()
    assert found["mean"] == pytest.approx(float(rms.mean()), rel=1e-3)
    assert found["last"] == pytest.approx(float(rms[-1]), rel=1e-3)


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen3", "qk_norm": True, "attention_bias": False}])
def test_rope_turns_before_into_after_by_the_angle(changes):
    model = make_model(**changes)
    for r in anatomy.rope(model, anatomy.record(model, range(9)), 1, [0, 3]):
        (a, b), cos, sin = r["before"], math.cos(r["angle"]), math.sin(r["angle"])
        assert r["after"] == pytest.approx([a * cos - b * sin, b * cos + a * sin], abs=2e-2)
        assert r["angle"] == pytest.approx(r["position"] * 2 * math.pi / r["turn"], rel=1e-3)


def test_filters_are_those_of_the_sampler():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    p = logits.softmax(-1)
    torch.testing.assert_close(anatomy.probabilities(logits, SamplingParams(), 4), p)
    torch.testing.assert_close(
        anatomy.probabilities(logits, SamplingParams(temperature=0.5), 4), (2 * logits).softmax(-1)
    )
    kept = anatomy.probabilities(logits, SamplingParams(top_k=2), 4)
    torch.testing.assert_close(kept, torch.tensor([p[0], p[1], 0, 0]) / (p[0] + p[1]))
    assert (anatomy.probabilities(logits, SamplingParams(), 3) > 0).sum() == 3


def test_a_model_compared_with_itself_has_not_moved(tiny):
    model, tokenizer = tiny
    same = anatomy.compare(model, model, tokenizer, [1, 2, 3])
    assert not any(same["kl"] + same["rise"])
    assert not any(w["relative"] for w in same["weights"])


def test_what_moved_between_two_checkpoints(tiny, trained):
    (model, tokenizer), (other, _) = tiny, load_pretrained(trained, torch.float32)
    ids = tokenizer.encode("[3, 5, 2] = 13")
    moved = anatomy.compare(model, other, tokenizer, ids, start=4)
    old, new = (m(torch.tensor([ids]))[0, :, : tokenizer.vocab_size].log_softmax(-1) for m in (model, other))
    kl = (new.exp() * (new - old)).sum(-1)
    assert moved["kl"] == pytest.approx(kl.tolist(), rel=1e-2, abs=1e-4)
    assert moved["mean_kl"] == pytest.approx(float(kl[4:].mean().detach()), rel=1e-2)
    assert moved["rise"][3] == pytest.approx(float(new[2, ids[3]] - old[2, ids[3]]), rel=1e-2, abs=1e-4)
    name = "model.layers.1.mlp.up_proj.weight"
    a, b = model.get_parameter(name), other.get_parameter(name)
    found = next(w["relative"] for w in moved["weights"] if w["name"] == name)
    assert found == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-3)


def test_different_models_are_not_compared(tiny):
    with pytest.raises(ValueError, match="expected two of the same model"):
        anatomy.compare(tiny[0], make_model(), tiny[1], [1])


# ---------------------------------------------------------------------------------------------------------------------
# The door


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["--layers", "9"], "the model has layers 0 to 3"), (["--ckpt", "no/such"], "no/such"),
     (["--raw", "--prompt", ""], "the prompt is empty")],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(argv, said, tmp_path, capsys):
    assert explain.main([*argv, "--out", str(tmp_path / "x.html")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_text_says_what_the_page_says(tmp_path, capsys):
    assert explain.main(["--prompt", "[1, 2] = 3", "--new-tokens", "4", "--out", str(tmp_path / "x.html")]) == 0
    said = capsys.readouterr().out
    for part in (
        "826,368 parameters",
        "gate_proj, up_proj",
        "RMSNorm",
        "RoPE",
        "attention",
        "KV cache",
        "logit lens",
        "top-p 0.9",
    ):
        assert part in said


def test_a_text_cannot_become_markup(tmp_path):
    path = tmp_path / "x.html"
    evil = "</script><img src=x onerror=alert(1)>"
    assert explain.main(["--raw", "--prompt", evil, "--new-tokens", "0", "--out", str(path)]) == 0
    page = path.read_text()
    assert "<img" not in page
    start = page.index('type="application/json">') + len('type="application/json">')
    assert json.loads(page[start : page.index("</script>", start)])["live"]["question"] == evil


# ---------------------------------------------------------------------------------------------------------------------
# The live page, in a browser


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
    expected = anatomy.probabilities(logits, SamplingParams(**settings), 48)
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


def test_a_chosen_cell_shows_its_sum(page):
    page.locator(".thinker .tokens button").nth(5).click()
    page.locator("#microscope td").nth(8).click()
    said = page.locator("#microscope .sum").inner_text()
    assert "score  = q · k / √32" in said
    assert page.locator(".tokens li.chosen").count() == 1


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
