"""The charts of a report as files."""

from __future__ import annotations

import matplotlib.figure
from report_fixtures import write_run

import report
from study.pictures import draw_chart
from study.run_facts import facts
from study.run_files import read_run


def test_every_chart_as_a_picture(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a", "b$_^")]
    out = ["--out", str(tmp_path / "page.html"), "--png", str(tmp_path / "pictures")]
    assert report.main([*map(str, folders), *out]) == 0
    made = {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert {"solved.png", "reward.png", "entropy-nats-a-token.png"} <= made.keys()
    assert len(made) == len(facts([read_run(folder) for folder in folders])["charts"])
    assert all(png.startswith(b"\x89PNG") for png in made.values())


def test_a_picture_has_every_line_and_the_bands_of_what_is_right():
    figure = matplotlib.figure.Figure()
    axis = figure.subplots()
    line = {
        "run": 0,
        "metric": "eval_solved",
        "label": "solved",
        "x": [0, 1],
        "y": [0.2, 0.4],
        "low": [0.1, 0.3],
        "high": [0.3, 0.5],
    }
    plain = {"run": 0, "metric": "eval_reward", "label": "$r", "x": [0, 1], "y": [0.5, 0.6]}
    draw_chart(axis, {"title": "Solved", "lines": [line, plain]}, ["a"])
    assert [list(drawn.get_ydata()) for drawn in axis.lines] == [[0.2, 0.4], [0.5, 0.6]]
    (band,) = axis.collections
    assert band.get_datalim(axis.transData).get_points().tolist() == [[0, 0.1], [1, 0.5]]
