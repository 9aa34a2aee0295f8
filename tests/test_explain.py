"""The numbers of explain.py are those of the model, and the page's JavaScript is the same model."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from conftest import make_config, make_model

import explain
from math_task import CountdownTask
from model.attention import KVCache, PrefillAttention
from rollout.generation import generate
from rollout.sampling import SamplingParams
from run.pretrained import load_pretrained, locate_pretrained
from study import anatomy
from study.live import countdown_form, telling_problem, why_not_live

pytest_plugins = ["explain_fixtures"]


# ---------------------------------------------------------------------------------------------------------------------
# The facts


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"model_type": "qwen3", "qk_norm": True, "attention_bias": False},
     {"model_type": "llama", "attention_bias": False}, {"model_type": "llama", "attention_bias": True}],
)  # fmt: skip
def test_the_parts_hold_every_parameter_once(changes):
    model = make_model(make_config(**changes))
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
    first = facts["next"][-1][0]
    assert first["id"] == int(p.argmax())
    assert math.isclose(first["p"]["T = 1"], float(p.max()), rel_tol=1e-3)
    text, share = facts["lens"][-1]["last"][0]
    assert (text, share) == (first["text"], pytest.approx(first["p"]["T = 1"], rel=1e-3))


def test_next_tokens_of_every_position_and_the_least_sure_one(tiny):
    model, tokenizer = tiny
    ids = tokenizer.encode("[3, 5, 2] = 13 5*2=10")
    facts = anatomy.look(model, tokenizer, ids, start=6)
    p = model(torch.tensor([ids]))[0, :, : tokenizer.vocab_size].softmax(-1)
    assert [rows[0]["id"] for rows in facts["next"]] == p.argmax(-1).tolist()
    entropy = -(p * p.log()).sum(-1)
    assert facts["shown"] == 6 + int(entropy[6:].argmax())


def test_a_long_text_has_the_tables_of_its_end(tiny):
    model, tokenizer = tiny
    ids = tokenizer.encode("1+2=3," * 20)
    facts = anatomy.look(model, tokenizer, ids, start=2)
    assert len(facts["next"]) == anatomy.LENS_TOKENS < len(ids)
    assert len(ids) - anatomy.LENS_TOKENS <= facts["shown"] < len(ids)
    moved = anatomy.compare(model, model, tokenizer, ids, start=2)
    assert len(moved["next"]) == anatomy.LENS_TOKENS


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
    assert found["by_token"] == pytest.approx(rms.tolist(), rel=1e-3)


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen3", "qk_norm": True, "attention_bias": False}])
def test_rope_turns_before_into_after_by_the_angle(changes):
    model = make_model(make_config(**changes))
    for r in anatomy.rope(model, anatomy.record(model, range(9)), 1, [0, 3]):
        assert len(r["before_by_token"]) == len(r["after_by_token"]) == 9
        for position, (before, after) in enumerate(zip(r["before_by_token"], r["after_by_token"])):
            turned = complex(*before) * complex(math.cos(angle := position * r["frequency"]), math.sin(angle))
            assert after == pytest.approx([turned.real, turned.imag], abs=2e-2)
        (a, b), cos, sin = r["before"], math.cos(r["angle"]), math.sin(r["angle"])
        assert r["after"] == pytest.approx([a * cos - b * sin, b * cos + a * sin], abs=2e-2)
        assert r["angle"] == pytest.approx(r["position"] * 2 * math.pi / r["turn"], rel=1e-3)


def test_filters_are_those_of_the_sampler():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    p = logits.softmax(-1)
    torch.testing.assert_close(anatomy.probabilities(logits, SamplingParams(), 4), p)
    torch.testing.assert_close(
        anatomy.probabilities(logits, SamplingParams(temperature=0.5), 4), (2 * logits).softmax(-1)
    )
    kept = anatomy.probabilities(logits, SamplingParams(top_k=2), 4)
    torch.testing.assert_close(kept, torch.tensor([[p[0, 0], p[0, 1], 0, 0]]) / (p[0, 0] + p[0, 1]))
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
    old, new = old.detach(), new.detach()
    kl = (new.exp() * (new - old)).sum(-1)
    assert moved["kl"] == pytest.approx(kl.tolist(), rel=1e-2, abs=1e-4)
    assert moved["mean_kl"] == pytest.approx(float(kl[4:].mean().detach()), rel=1e-2)
    assert moved["rise"][3] == pytest.approx(float((new - old)[2, ids[3]].detach()), rel=1e-2, abs=1e-4)
    assert moved["shown"] == 4 + int(kl[4:].argmax())
    change = (new.exp() - old.exp())[moved["shown"]]
    rows = moved["next"][moved["shown"]]
    assert rows[0]["after"] - rows[0]["before"] == pytest.approx(float(change.max()), rel=1e-2)
    assert rows[-1]["after"] - rows[-1]["before"] == pytest.approx(float(change.min()), rel=1e-2)
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
     (["--raw", "--prompt", ""], "the prompt is empty"), (["--layrs", "1"], "the nearest known one is --layers"),
     (["--heads", "one"], "--heads"), (["--prompt"], "--prompt"), (["--after", "no/such"], "no/such"),
     (["--out", "no/folder/x.html"], "no folder no/folder"), (["--prompt", "What is 3 + 5?"], "never seen 'W' 'h' 'a'"),
     (["--prompt", "[3, 5, 2] = 1\u0663"], "never seen '\\u0663'"), (["--prompt", "<|im_end|>"], "--raw")],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(argv, said, tmp_path, capsys):
    assert explain.main(["--out", str(tmp_path / "x.html"), *argv]) == 2
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


def test_text_only_writes_no_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert explain.main(["--text", "--new-tokens", "2"]) == 0
    assert "logit lens" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_bundled_model_reads_the_prompt_it_was_trained_on_wherever_it_lies(tiny, trained):
    """By name or by folder, a Countdown problem or one's own: the short form, and the thought is opened."""
    for ckpt in ("countdown-tiny", str(trained)):
        own = explain.prompt_pieces(explain.Options(ckpt=ckpt, prompt="[3, 5, 2] = 13"), tiny[1], [tiny[0]])
        given = explain.prompt_pieces(explain.Options(ckpt=ckpt), tiny[1], [tiny[0]])
        assert (own[0], own[2]) == (given[0], given[2])
        task = CountdownTask(prompt_style="short")
        problem = task.problem([3, 5, 2], 13)
        assert "".join(own) == tiny[1].render_chat(problem.messages) + problem.response_prefix


def answer_of(model, tokenizer, problem):
    """The greedy response's text, and whether its answer is right."""
    prompt = tokenizer.render_chat(problem.messages) + problem.response_prefix
    greedy = SamplingParams(n=1, max_new_tokens=96, temperature=0.0)
    text = generate(model, [prompt], greedy, tokenizer=tokenizer)[0].text
    return text, CountdownTask(prompt_style="short").reward(problem, text).parts["answer"] == 1.0


def test_the_problem_to_open_with_is_solved(tiny):
    """A page opens with a finished response that shows something: sums, and a right answer."""
    text, right = answer_of(*tiny, telling_problem([tiny[0]], tiny[1]))
    assert right
    assert text.count("=") >= 2


def test_the_problem_to_open_a_comparison_with_is_solved_after_training_only(tiny, trained):
    """With the bundled model as the trained one: a problem that the other checkpoint does not solve."""
    other, tokenizer = load_pretrained(trained, torch.float32)
    problem = telling_problem([other, tiny[0]], tokenizer)
    assert not answer_of(other, tokenizer, problem)[1]
    assert answer_of(*tiny, problem)[1]


def test_only_the_bundled_models_tokenizer_says_which_problems_it_knows(tiny):
    description = json.loads((locate_pretrained("countdown-tiny") / "tokenizer.json").read_text())
    trained = countdown_form(description)
    question = telling_problem([tiny[0]], tiny[1]).messages[-1]["content"]
    assert set(question) <= set(trained["alphabet"])
    vocab = dict(list(description["model"]["vocab"].items())[:-1])
    assert countdown_form({**description, "model": {**description["model"], "vocab": vocab}}) is None


def test_a_page_that_cannot_run_its_model_says_why(static_page, capsys):
    """A checkpoint with another tokenizer or with too many parameters has a static page."""
    page = static_page.read_text()
    assert "This page is static: the model&#39;s tokenizer is of another kind" in page
    assert "Watch it think" not in page
    assert "at most 5,000,000" in why_not_live(5_000_001, {"model": {}})
    assert why_not_live(1, json.loads((locate_pretrained("countdown-tiny") / "tokenizer.json").read_text())) is None


def test_a_text_cannot_become_markup(tmp_path):
    path = tmp_path / "x.html"
    evil = "</script><img src=x onerror=alert(1)>"
    assert explain.main(["--raw", "--prompt", evil, "--new-tokens", "0", "--out", str(path)]) == 0
    page = path.read_text()
    assert "<img" not in page
    start = page.index('type="application/json">') + len('type="application/json">')
    assert json.loads(page[start : page.index("</script>", start)])["live"]["question"] == evil


@pytest.mark.parametrize(
    "evil", ["<img src=x onerror=alert(1)>", "</title><script>alert(1)<", "{{ 7 * 7 }}{% raw %}", "&lt;b&gt;"]
)
def test_a_folders_name_cannot_become_markup(tmp_path, evil):
    folder = tmp_path / evil.replace("/", "\u2215")
    shutil.copytree(locate_pretrained("countdown-tiny"), folder)
    path = tmp_path / "x.html"
    assert explain.main(["--ckpt", str(folder), "--new-tokens", "1", "--out", str(path)]) == 0
    page = path.read_text()
    assert "<img" not in page
    assert "<script>alert" not in page
    assert "49" not in page[page.index("<title>") : page.index("</title>")]


def test_a_run_stands_for_its_last_checkpoint(tmp_path, trained):
    folder = tmp_path / "run" / "checkpoints" / "step-000007"
    shutil.copytree(trained, folder)
    (folder / "trainer_state.json").write_text("{}")
    (folder.parent / "latest").write_text("step-000007\n")
    assert explain.locate_after(str(tmp_path / "run")) == folder
    assert explain.locate_after(str(trained)) == trained
