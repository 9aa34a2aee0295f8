"""The page of a run shows the numbers of the run's files, with intervals."""

from __future__ import annotations

from report_fixtures import sample, write_run

from study.intervals import share_interval, wilson_interval
from study.run_facts import facts, label
from study.run_files import read_run


def facts_of(*folders):
    return facts([read_run(folder) for folder in folders])


def test_curves_are_the_metrics_without_what_is_missing(tmp_path):
    charts = {c["title"]: c["lines"] for c in facts_of(write_run(tmp_path / "a"))["charts"]}
    assert [(line["metric"], list(line["x"]), list(line["y"])) for line in charts["Reward"]] == [
        ("reward", [1, 2], [0.1, 0.5])
    ]
    assert list(charts["Entropy (nats a token)"][0]["x"]) == [1]
    assert [line["metric"] for line in charts["Parts of the reward"]] == ["rewards/format/mean"]
    assert "Divergence (nats a token)" not in charts


def test_the_band_is_the_interval_of_as_many_answers_as_there_were_problems(tmp_path):
    charts = {c["title"]: c["lines"] for c in facts_of(write_run(tmp_path / "a", eval_samples=4, samples=[]))["charts"]}
    lines = {line["metric"]: line for line in charts["Solved"]}
    low, high = wilson_interval(0.6 * 50, 50)
    assert (lines["eval_solved"]["low"][1], lines["eval_solved"]["high"][1]) == (low, high)
    assert lines["solved"]["high"][0] == wilson_interval(0.25 * 2, 2)[1]
    assert "low" not in charts["Reward"][0]


def test_the_band_of_a_step_with_all_its_samples_is_of_the_spread_between_problems(tmp_path):
    """Step 1 is whole, its problems solved by half and by none. Of step 2 one answer of four was not kept."""
    right = [(1, 10, 1), (1, 10, 0), (1, 11, 0), (1, 11, 0), (2, 20, 1), (2, 20, 0), (2, 21, 1)]
    samples = [sample(step, group, i) for step, group, i in right]
    charts = {c["title"]: c["lines"] for c in facts_of(write_run(tmp_path / "a", samples=samples))["charts"]}
    line = next(line for line in charts["Solved"] if line["metric"] == "solved")
    assert (line["low"][0], line["high"][0]) == share_interval([0.5, 0.0])
    assert (line["low"][1], line["high"][1]) == wilson_interval(0.75 * 2, 2)


def test_the_summary_has_first_and_last(tmp_path):
    other = write_run(tmp_path / "b", metrics=[{"step": 3, "eval_solved": 0.5}])
    rows = {row["metric"]: row["runs"] for row in facts_of(write_run(tmp_path / "a"), other)["summary"]}
    assert rows["eval_solved"] == [
        {"first": (0, "20.0%"), "last": (2, "60.0%")},
        {"first": (3, "50.0%"), "last": (3, "50.0%")},
    ]
    assert rows["reward"] == [{"first": (1, "0.1"), "last": (2, "0.5")}, None]


def test_the_same_held_out_problems_before_and_after_sampled_beside_greedy(tmp_path):
    """Problem 8 was only shown in between, and problem 9 has no greedy response of the last evaluation."""
    answers = [sample(0, 7, 0), sample(1, 8, 0), sample(2, 7, 1), sample(0, 9, 0), sample(0, 9, 1), sample(2, 9, 1)]
    answers[4]["sampled"] = answers[5]["sampled"] = True
    found = facts_of(write_run(tmp_path / "a", held_out=answers))["held_out"][0]
    shown = {pair["problem"]: {way: [a["response"] for a in both] for way, both in pair["ways"].items()}
             for pair in found["pairs"]}  # fmt: skip
    assert shown == {
        "problem 7": {"greedy": ["answer 0", "answer 1"]},
        "problem 9": {"sampled": ["answer 1", "answer 1"]},
    }
    sampled, greedy = found["ways"]
    assert (sampled["right"], sampled["shown"], sampled["all"]) == ([1, 1], 1, [0.2, 0.6])
    assert (greedy["right"], greedy["shown"], greedy["all"]) == ([0, 1], 1, None)


def test_the_headline_is_the_result_and_what_was_run(tmp_path):
    (headline,) = facts_of(write_run(tmp_path / "a", ckpt="some/model", task="countdown", steps=2))["headlines"]
    assert headline["result"] == "solved 20% \u2192 60% of 50 held-out problems (sampled)"
    said = dict(headline["facts"])
    assert (said["model"], said["task"], said["machine"]) == ("model", "countdown", "two cores")
    assert said["steps"].startswith("2 of 2, each 2 prompts x 2 responses")
    assert said["duration"].startswith("2 min 06 s")


def test_the_headline_of_a_run_without_evaluations_is_its_reward(tmp_path):
    metrics = [{"step": 1, "reward": 0.25}, {"step": 2, "reward": 0.5}]
    (headline,) = facts_of(write_run(tmp_path / "a", metrics=metrics))["headlines"]
    assert headline["result"] == "mean reward 0.25 \u2192 0.5 in training"


def test_metrics_have_names_for_readers():
    assert label("eval_greedy_solved") == "held-out, greedy: solved"
    assert label("eval_mean_length") == "held-out, sampled: tokens a response"
    assert label("reward") == "training: reward"
    assert label("rewards/arithmetic/mean") == "arithmetic"
    assert label("my_own/metric") == "my_own/metric"


def test_settings_in_which_runs_differ(tmp_path):
    a, b = write_run(tmp_path / "a", lr=1e-5, run_dir="x"), write_run(tmp_path / "b", lr=2e-5, run_dir="y")
    assert facts_of(a, b)["differences"] == [{"setting": "lr", "values": ["1.0e-05", "2.0e-05"]}]
    alone = {d["setting"]: d["values"] for d in facts_of(a)["differences"]}
    assert alone["group_size"] == ["8", "2"]
    assert "beta" not in alone
