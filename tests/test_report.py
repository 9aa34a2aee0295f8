"""The page of a run says what the run's files say, whatever stands in them, and asks nobody for anything."""

from __future__ import annotations

import json
import math

import pytest
from browser_pages import covered, opened, shades
from report_fixtures import EVIL, sample, write_run

import report
from run.machine import describe_machine
from study.run_facts import held_out
from study.run_files import read_run
from train import main as train_main

pytest_plugins = ["browser_fixtures"]


def data_of(page):
    """The facts inside a page."""
    text = page.read_text(encoding="utf-8")
    start = text.index('id="data" type="application/json">') + len('id="data" type="application/json">')
    return json.loads(text[start : text.index("</script>", start)])


def test_runs_of_one_name_keep_their_own_samples(tmp_path):
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
    one = write_run(tmp_path / "x" / "tiny", samples=[sample(1, 1, 0, response="of x")])
    two = write_run(tmp_path / "y" / "tiny", samples=[sample(1, 1, 0, response="of y")])
    assert report.main([str(one), str(two), "--out", str(tmp_path / "page.html")]) == 0
    found = data_of(tmp_path / "page.html")
    assert found["names"] == ["x/tiny", "y/tiny"]
    assert [groups[0]["answers"][0]["response"] for groups in found["groups"]] == ["of x", "of y"]


def test_groups_are_whole_and_of_the_first_and_the_last_step(tmp_path):
    groups = report.groups(read_run(write_run(tmp_path / "a")))
    assert [(g["step"], g["problem"], len(g["answers"])) for g in groups] == [
        (1, "problem 10", 2), (1, "problem 11", 2), (2, "problem 20", 2), (2, "problem 21", 2),
    ]  # fmt: skip


def test_groups_with_tokens_come_first(tmp_path):
    samples = [sample(1, 1, 0, by_token=False), sample(1, 2, 0)]
    groups = report.groups(read_run(write_run(tmp_path / "a", samples=samples)))
    assert [g["problem"] for g in groups] == ["problem 2", "problem 1"]


def test_what_a_model_wrote_never_becomes_markup(tmp_path):
    samples = [sample(1, 1, 0, problem=EVIL, response=EVIL, tokens=[EVIL, EVIL])]
    folder = write_run(tmp_path / "a", samples=samples, ckpt="<img src=y>")
    assert report.main([str(folder)]) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<img src=" not in page
    assert data_of(folder / "report.html")["groups"][0][0]["answers"][0]["response"] == EVIL


def test_numbers_that_json_cannot_write_are_none():
    assert report._finite({"a": [math.nan, (math.inf, 1.0)], "b": "x"}) == {"a": [None, [None, 1.0]], "b": "x"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: None, "holds no metrics.jsonl"),
        (lambda f: (f.mkdir(), (f / "metrics.jsonl").touch()), "no step yet"),
        (lambda f: (write_run(f) / "metrics.jsonl").write_text("[]\n"), "line 1: it is [], expected an object"),
        (lambda f: (write_run(f) / "config.yaml").write_text("no_such: 1\n"), "no_such"),
        (lambda f: (write_run(f) / "config.yaml").write_text("\0"), "not YAML"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, make, said):
    make(tmp_path / "a")
    assert report.main([str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_line_without_what_a_run_writes_is_left_out_and_told(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    (folder / "samples.jsonl").write_text('{"step": 1}\n')
    assert report.main([str(folder)]) == 0
    said = capsys.readouterr().err
    assert said == "report.py: samples.jsonl: 1 line was left out (line 1: it has no 'group_id')\n"
    assert "1 line was left out" in (folder / "report.html").read_text()


def test_what_a_file_says_cannot_steer_the_terminal(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    (folder / "config.yaml").write_text('"\\e[2Jx": 1\n')
    assert report.main([str(folder)]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_run_named_twice_is_refused(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    assert report.main([str(folder), f"{folder}/../a"]) == 2
    assert "named twice" in capsys.readouterr().err


def test_ratios_need_a_checkpoint(tmp_path, capsys):
    assert report.main([str(write_run(tmp_path / "a")), "--after"]) == 2
    assert "no checkpoint in" in capsys.readouterr().err


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """Two real steps of the bundled model, with a checkpoint after the first and the last."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    flags = "--steps 2 --eval-every 1 --save-every 1 --eval-problems 4 --prompts-per-step 2 --max-new-tokens 24"
    assert train_main([*flags.split(), "--run-dir", str(folder)]) == 0
    return folder


def test_ratios_are_those_of_the_last_checkpoint_to_the_sampler(real_run):
    run = read_run(real_run)
    groups = report.groups(run)
    report.add_ratios(run, groups)
    last = [g for g in groups if g["step"] == 2 and "tokens" in g["answers"][0]]
    assert last
    for answer in last[0]["answers"]:
        assert len(answer["ratios"]) == len(answer["tokens"]) == len(answer["token_logprobs"])
        assert all(0.5 < ratio < 2 for ratio in answer["ratios"])  # one update of lr 2e-4 away
    assert any(ratio != 1 for answer in last[0]["answers"] for ratio in answer["ratios"])


def test_a_run_keeps_what_the_page_shows(real_run):
    run = read_run(real_run)
    pairs = held_out(run)["pairs"]
    assert len(pairs) == 4
    for pair in pairs:
        assert {way: [a["step"] for a in both] for way, both in pair["ways"].items()} == {
            "sampled": [0, 2], "greedy": [0, 2]
        }  # fmt: skip
    assert run.machine == describe_machine()
    with_tokens = [s for s in run.samples if "tokens" in s]
    assert len(with_tokens) == 2 * 2 * 8  # all of a small step: --log-tokens
    assert all("update" in s for s in with_tokens)
    assert all("".join(s["tokens"]).startswith(s["response"]) for s in with_tokens)


@pytest.fixture(scope="module")
def page(browser, real_run):
    assert report.main([str(real_run), "--after"]) == 0
    return opened(browser, real_run / "report.html")


def test_a_comparison_names_each_run_and_each_metric_once_and_runs_nothing_it_is_given(browser, tmp_path):
    evil = [sample(1, 1, 0, problem=EVIL, response=EVIL, tokens=[EVIL, EVIL]), sample(1, 1, 1, response=EVIL)]
    names = ["<b>x<img src=x onerror=alert(1)>", "b"]  # plotly knows <b>
    folders = [write_run(tmp_path / name, samples=evil) for name in names]
    assert report.main([*map(str, folders), "--out", str(tmp_path / "page.html")]) == 0
    page = opened(browser, tmp_path / "page.html")
    titles = page.locator("#charts > div > h3").all_text_contents()
    legend = page.locator("#charts > div").nth(titles.index("Solved")).locator(".legendtext").all_text_contents()
    assert legend == [*names, "training: solved", "held-out, sampled: solved", "held-out, greedy: solved"]
    bands = page.evaluate("FACTS.charts.find((c) => c.title === 'Solved').lines.length * 3 - traces("
                          "FACTS.charts.find((c) => c.title === 'Solved')).length")  # fmt: skip
    assert bands == 2 * 2 - 3  # two training curves without a band, and three entries for the metrics
    assert page.locator("img").count() == 0
    assert "</script><img" in page.locator("#group-view").inner_text()
    assert not page.troubles
    assert len(page.requests) == 1
    page.close()


def test_smoothing_is_the_mean_of_the_last_ten(page):
    assert page.evaluate("smoothed([1, 3, 5, 7], 2)") == [1, 2, 4, 6]
    y = page.evaluate("byId('charts').children[0].lastChild.data[0].y")
    page.check("#smooth")
    assert page.evaluate("byId('charts').children[0].lastChild.data[0].y") == pytest.approx([y[0], (y[0] + y[1]) / 2])
    page.uncheck("#smooth")


def test_the_page_draws_its_curves_and_asks_nobody_for_anything(page, real_run):
    charts = page.evaluate("FACTS.charts.length")
    assert charts > 8
    assert page.locator("#charts .main-svg .lines path.js-line").count() >= charts
    assert page.requests == [(real_run / "report.html").as_uri()]
    assert not page.troubles


def test_the_page_colours_tokens_by_what_one_chooses(page):
    for colouring in ("logprob", "ratio", "advantage"):
        page.select_option("#colour", colouring)
        spans = page.locator("#group-view .answer span")
        assert spans.count() > 8
        assert "rgba" in (spans.first.get_attribute("style") or "")
    assert "p = " in spans.first.get_attribute("title")


def test_the_page_shows_another_group(page):
    before = page.locator("#group-view").inner_text()
    page.select_option("#group", "2")
    assert page.locator("#group-view").inner_text() != before


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_fits_its_window_and_nothing_is_covered(browser, real_run, page, width, scheme):
    page = opened(browser, real_run / "report.html", width, scheme)
    page.wait_for_timeout(1000)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground, ink = shades(page)
    assert (ground > 0.9 and ink < 0.3) if scheme == "light" else (ground < 0.3 and ink > 0.8)
    assert page.locator("#summary td b").count() > 6
    assert not covered(page, "#charts h3")
    assert not covered(page, "#summary td")  # on a phone, too, both values are on the screen
    assert not page.troubles
    page.close()


def test_every_way_of_the_page_is_open_to_the_keyboard(page):
    """All controls are reached with the tabulator, and a select changes with the arrow keys."""
    page.locator("h1").click()
    reached = set()
    for _ in range(200):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"smooth", "group", "colour", "A"} <= reached
    page.select_option("#colour", "logprob")
    page.locator("#colour").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("#colour").input_value() == "advantage"


def test_a_false_sum_is_marked_with_what_it_cost(browser, tmp_path):
    wrong = sample(1, 1, 0, response="3+5=9 ok", tokens=["3+5", "=9"], reward_parts={"answer": 0.0, "arithmetic": -1.0})
    held_out = [wrong | {"step": 0}, wrong | {"step": 2}]
    folder = write_run(tmp_path / "a", samples=[wrong], held_out=held_out, arithmetic_weight=0.3)
    assert report.main([str(folder)]) == 0
    page = opened(browser, folder / "report.html")
    assert page.locator("#held-out .false").all_inner_texts() == ["3+5=9", "3+5=9"]
    assert "a false sum cost 0.30" in page.locator("#held-out .verdict").first.inner_text()
    page.close()


def test_the_text_of_a_tool_is_framed(browser, tmp_path):
    called = sample(
        1, 1, 0, response="<calc>2*3</calc><b>6</b>!", tokens=["<calc>2*3</calc>", "<b>6</b>", "!"],
        token_logprobs=[-0.1, None, -0.1], token_sampled=[True, False, True],
        turns=[{"text": "<calc>2*3</calc>", "given": False}, {"text": "<b>6</b>", "given": True},
               {"text": "!", "given": False}],
    )  # fmt: skip
    held_out = [called | {"step": 0}, called | {"step": 2}]
    folder = write_run(tmp_path / "a", samples=[called], held_out=held_out)
    assert report.main([str(folder)]) == 0
    page = opened(browser, folder / "report.html")
    assert page.locator("#held-out .given").all_inner_texts() == ["<b>6</b>", "<b>6</b>"]
    assert page.locator("#group-view .given").all_inner_texts() == ["<b>6</b>"]
    page.close()


PAYLOADS = [
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg/onload=alert(1)>", "]]>",
    "<!--<script>", "<iframe srcdoc='<b>'>", '"><b onmouseover=alert(1)>', "'-alert(1)-'",
    "${alert(1)}", "{{ 7 * 7 }}{% raw %}", "\u2028alert(1)//",
    '<a href="javascript:alert(1)">', "<style>*{display:none}</style>", "<math><mi></mi></math>",
    "&lt;img src=x&gt;",
]  # fmt: skip


@pytest.mark.parametrize("payload", PAYLOADS)
def test_text_never_runs_as_code_and_is_shown_as_it_is(browser, tmp_path, payload):
    """In every text of every file of a run."""
    evil = sample(
        1, 1, 0, problem=payload, response=payload, prompt=payload, finish_reason=payload, tokens=[payload, payload],
        reward_parts={payload: 1.0, "__proto__": 1.0},
    )  # fmt: skip
    metrics = [{"step": 1, "reward": 0.5, f"rewards/{payload}/mean": 0.5}, {"step": 2, "reward": 0.6}]
    held_out = [evil | {"step": 0}, evil | {"step": 1}]
    update = {"step": {"loss_type": "dapo", "tokens": 4, "responses": 2, "longest": 8}, "weight": 0.25,
              "logp": [-0.1, -1.5], "entropy": [0.1, 1.5], "coefficient": [0.1, -0.1]}  # fmt: skip
    samples = [evil | {"update": update}]
    folder = write_run(tmp_path / "a", metrics=metrics, samples=samples, held_out=held_out, ckpt=payload, task=payload)
    (folder / "machine.json").write_text(json.dumps({"machine": payload}))
    assert report.main([str(folder)]) == 0
    page = opened(browser, folder / "report.html")
    foreign = "img, iframe, math, a[href^=java], header script, main script, main style, b b, b[onmouseover]"
    assert page.locator(foreign).count() == 0
    assert payload in page.evaluate("byId('group-view').textContent")
    assert payload in page.evaluate("byId('m-view').textContent")
    assert payload in page.evaluate("byId('m-response').textContent")
    assert payload in page.evaluate("document.querySelector('dl.facts').textContent")
    assert not page.troubles
    assert len(page.requests) == 1
    page.close()
