"""The page of a run says what the run's files say, whatever stands in them, and asks nobody for anything."""

from __future__ import annotations

import json
import math
import shutil

import matplotlib.figure
import pytest

import report
from run.config import Config, save_yaml
from study.intervals import share_interval, wilson_interval
from train import main as train_main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "</script><img src=x onerror=alert(1)> \x1b[2J \ud800 & <b>"


def sample(step, group, i, by_token=True, **changes):
    record = {
        "step": step, "group_id": group, "problem": f"problem {group}", "prompt": "p", "response": f"answer {i}",
        "reward": float(i), "reward_parts": {"format": 1.0, "answer": float(i)}, "advantage": i - 0.5,
        "finish_reason": "stop", "response_tokens": 2,
    }  # fmt: skip
    if by_token:
        record |= {
            "tokens": ["answer", f" {i}"],
            "token_logprobs": [-0.1, -2.0],
            "token_ids": [1, 2],
            "prompt_ids": [3],
        }
    return record | changes


def write_run(folder, metrics=None, samples=None, **config):
    folder.mkdir()
    save_yaml(Config(prompts_per_step=2, group_size=2, eval_problems=50, **config), folder / "config.yaml")
    metrics = metrics or [
        {"step": 0, "eval_solved": 0.2, "eval_greedy_solved": 0.3},
        {"step": 1, "reward": 0.1, "solved": 0.25, "rewards/format/mean": 0.9, "entropy": 1.0},
        {"step": 2, "reward": 0.5, "solved": 0.75, "entropy": None, "eval_solved": 0.6, "rewards/format/mean": 1.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    if samples is None:
        samples = [sample(s, g, i) for s in (1, 2) for g in (s * 10, s * 10 + 1) for i in (0, 1)]
    held_out = [sample(0, 7, 0), sample(1, 8, 0), sample(2, 7, 1)]
    for name, records in (("samples", samples), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def facts_of(*folders):
    return report.facts([report.read_run(folder) for folder in folders])


def test_curves_are_the_metrics_without_what_is_missing(tmp_path):
    charts = {c["title"]: c["lines"] for c in facts_of(write_run(tmp_path / "a"))["charts"]}
    assert [(line["metric"], line["x"], line["y"]) for line in charts["Reward"]] == [("reward", [1, 2], [0.1, 0.5])]
    assert charts["Entropy (nats)"][0]["x"] == [1]
    assert [line["metric"] for line in charts["Parts of the reward"]] == ["rewards/format/mean"]
    assert "Divergence (nats)" not in charts


def test_the_band_is_the_interval_of_as_many_answers_as_there_were_problems(tmp_path):
    charts = {c["title"]: c["lines"] for c in facts_of(write_run(tmp_path / "a", eval_samples=4, samples=[]))["charts"]}
    lines = {line["metric"]: line for line in charts["Solved"]}
    low, high = wilson_interval(0.6 * 50, 50)
    assert (lines["eval_solved"]["low"][1], lines["eval_solved"]["high"][1]) == (low, high)
    assert lines["solved"]["high"][0] == wilson_interval(0.25 * 2, 2)[1]
    assert "low" not in charts["Reward"][0]


def test_the_band_of_a_step_with_all_its_samples_is_of_the_spread_between_problems(tmp_path):
    """Step 1 is whole, its problems solved by half and by none; of step 2 one answer of four was not kept."""
    right = [(1, 10, 1), (1, 10, 0), (1, 11, 0), (1, 11, 0), (2, 20, 1), (2, 20, 0), (2, 21, 1)]
    samples = [sample(step, group, i) for step, group, i in right]
    charts = {c["title"]: c["lines"] for c in facts_of(write_run(tmp_path / "a", samples=samples))["charts"]}
    line = next(line for line in charts["Solved"] if line["metric"] == "solved")
    assert (line["low"][0], line["high"][0]) == share_interval([0.5, 0.0])
    assert (line["low"][1], line["high"][1]) == wilson_interval(0.75 * 2, 2)


def test_the_summary_has_first_and_last(tmp_path):
    other = write_run(tmp_path / "b", metrics=[{"step": 3, "eval_solved": 0.5}])
    rows = {row["metric"]: row["runs"] for row in facts_of(write_run(tmp_path / "a"), other)["summary"]}
    assert rows["eval_solved"] == [{"first": (0, 0.2), "last": (2, 0.6)}, {"first": (3, 0.5), "last": (3, 0.5)}]
    assert rows["reward"] == [{"first": (1, 0.1), "last": (2, 0.5)}, None]


def test_runs_of_one_name_keep_their_own_samples(tmp_path):
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
    one = write_run(tmp_path / "x" / "tiny", samples=[sample(1, 1, 0, response="of x")])
    two = write_run(tmp_path / "y" / "tiny", samples=[sample(1, 1, 0, response="of y")])
    facts = facts_of(one, two)
    assert facts["names"] == ["x/tiny", "y/tiny"]
    assert [facts["groups"][name][0]["answers"][0]["response"] for name in facts["names"]] == ["of x", "of y"]


def test_every_chart_as_a_picture(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a", "b$_^")]
    out = ["--out", str(tmp_path / "page.html"), "--png", str(tmp_path / "pictures")]
    assert report.main([*map(str, folders), *out]) == 0
    made = {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert {"solved.png", "reward.png", "entropy-nats.png"} <= made.keys()
    assert len(made) == len(facts_of(*folders)["charts"])
    assert all(png.startswith(b"\x89PNG") for png in made.values())


def test_a_picture_has_every_line_and_the_bands_of_what_is_right():
    figure = matplotlib.figure.Figure()
    axis = figure.subplots()
    line = {"run": 0, "metric": "eval_solved", "x": [0, 1], "y": [0.2, 0.4], "low": [0.1, 0.3], "high": [0.3, 0.5]}
    plain = {"run": 0, "metric": "eval_reward", "x": [0, 1], "y": [0.5, 0.6]}
    report.draw_chart(axis, {"title": "Solved", "lines": [line, plain]}, ["a"])
    assert [list(drawn.get_ydata()) for drawn in axis.lines] == [[0.2, 0.4], [0.5, 0.6]]
    (band,) = axis.collections
    assert band.get_datalim(axis.transData).get_points().tolist() == [[0, 0.1], [1, 0.5]]


def test_held_out_problems_stand_side_by_side(tmp_path):
    pairs = facts_of(write_run(tmp_path / "a"))["held_out"]["a"]
    assert [(p["problem"], p["before"]["response"], p["after"]["response"]) for p in pairs] == [
        ("problem 7", "answer 0", "answer 1")
    ]


def test_groups_are_whole_and_of_the_first_and_the_last_step(tmp_path):
    groups = facts_of(write_run(tmp_path / "a"))["groups"]["a"]
    assert [(g["step"], g["problem"], len(g["answers"])) for g in groups] == [
        (1, "problem 10", 2), (1, "problem 11", 2), (2, "problem 20", 2), (2, "problem 21", 2),
    ]  # fmt: skip


def test_groups_with_tokens_come_first(tmp_path):
    samples = [sample(1, 1, 0, by_token=False), sample(1, 2, 0)]
    groups = facts_of(write_run(tmp_path / "a", samples=samples))["groups"]["a"]
    assert [g["problem"] for g in groups] == ["problem 2", "problem 1"]


def test_settings_in_which_runs_differ(tmp_path):
    a, b = write_run(tmp_path / "a", lr=1e-5, run_dir="x"), write_run(tmp_path / "b", lr=2e-5, run_dir="y")
    assert facts_of(a, b)["differences"] == [{"setting": "lr", "values": ["1.0e-05", "2.0e-05"]}]
    alone = {d["setting"]: d["values"] for d in facts_of(a)["differences"]}
    assert alone["group_size"] == ["8", "2"]
    assert "beta" not in alone


def test_a_run_that_is_killed_in_the_middle_of_a_line(tmp_path):
    folder = write_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    assert [r["step"] for r in report.read_run(folder)["metrics"]] == [0, 1, 2]


def test_what_a_model_wrote_never_becomes_markup(tmp_path):
    samples = [sample(1, 1, 0, problem=EVIL, response=EVIL, tokens=[EVIL, EVIL])]
    folder = write_run(tmp_path / "a", samples=samples, ckpt="<img src=y>")
    assert report.main([str(folder)]) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<img src=" not in page
    start = page.index('id="data" type="application/json">') + len('id="data" type="application/json">')
    found = json.loads(page[start : page.index("</script>", start)])
    assert found["groups"]["a"][0]["answers"][0]["response"] == EVIL


def test_numbers_that_json_cannot_write_are_none():
    assert report._finite({"a": [math.nan, (math.inf, 1.0)], "b": "x"}) == {"a": [None, [None, 1.0]], "b": "x"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: None, "holds no metrics.jsonl"),
        (lambda f: (f.mkdir(), (f / "metrics.jsonl").touch()), "no step yet"),
        (lambda f: (write_run(f) / "samples.jsonl").write_text('{"step": 1}\n'), "of step 1 has no 'advantage'"),
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


def test_a_run_named_twice_is_refused(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    assert report.main([str(folder), f"{folder}/../a"]) == 2
    assert "named twice" in capsys.readouterr().err


def test_a_ratio_needs_a_checkpoint(tmp_path, capsys):
    assert report.main([str(write_run(tmp_path / "a")), "--ratio"]) == 2
    assert "no checkpoint in" in capsys.readouterr().err


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """Two real steps of the bundled model, with a checkpoint after the first and the last."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    flags = "--steps 2 --eval-every 1 --save-every 1 --eval-problems 4 --prompts-per-step 2 --max-new-tokens 24"
    assert train_main([*flags.split(), "--run-dir", str(folder)]) == 0
    return folder


def test_ratios_are_those_of_the_last_checkpoint_to_the_sampler(real_run):
    run = report.read_run(real_run)
    groups = report.groups(run)
    report.add_ratios(run, groups)
    last = [g for g in groups if g["step"] == 2 and "tokens" in g["answers"][0]]
    assert last
    for answer in last[0]["answers"]:
        assert len(answer["ratios"]) == len(answer["tokens"]) == len(answer["token_logprobs"])
        assert all(0.5 < ratio < 2 for ratio in answer["ratios"])  # one update of lr 2e-4 away
    assert any(ratio != 1 for answer in last[0]["answers"] for ratio in answer["ratios"])


def test_a_run_keeps_what_the_page_shows(real_run):
    run = report.read_run(real_run)
    pairs = report.held_out(run)
    assert len(pairs) == 4
    assert all((p["before"]["step"], p["after"]["step"]) == (0, 2) for p in pairs)
    with_tokens = [s for s in run["samples"] if "tokens" in s]
    assert len(with_tokens) == 2 * 8  # the first group of each step
    assert all("".join(s["tokens"]).startswith(s["response"]) for s in with_tokens)


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, file):
    """A page that remembers what it complained about and what it asked for."""
    page = browser.new_page()
    page.troubles, page.requests = [], []
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on("console", lambda message: page.troubles.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(file.as_uri())
    return page


@pytest.fixture(scope="module")
def page(browser, real_run):
    assert report.main([str(real_run), "--ratio"]) == 0
    return opened(browser, real_run / "report.html")


def test_a_comparison_names_each_run_and_each_metric_once_and_runs_nothing_it_is_given(browser, tmp_path):
    evil = [sample(1, 1, 0, problem=EVIL, response=EVIL, tokens=[EVIL, EVIL]), sample(1, 1, 1, response=EVIL)]
    names = ["<b>x<img src=x onerror=alert(1)>", "b"]  # plotly knows <b>
    folders = [write_run(tmp_path / name, samples=evil) for name in names]
    assert report.main([*map(str, folders), "--out", str(tmp_path / "page.html")]) == 0
    page = opened(browser, tmp_path / "page.html")
    page.on("dialog", lambda dialog: page.troubles.append("a dialog"))
    titles = page.locator("#charts > div .gtitle").all_text_contents()
    legend = page.locator("#charts > div").nth(titles.index("Solved")).locator(".legendtext").all_text_contents()
    assert legend == [*names, "solved", "eval_solved", "eval_greedy_solved"]
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
    y = page.evaluate("byId('charts').children[0].data[0].y")
    page.check("#smooth")
    assert page.evaluate("byId('charts').children[0].data[0].y") == pytest.approx([y[0], (y[0] + y[1]) / 2])
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


@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_fits_its_window(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(1000)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
