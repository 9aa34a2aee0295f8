"""report.py --follow: a page that grows with its run, for this machine only, until Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from browser_pages import opened
from report_fixtures import EVIL, sample, write_run
from werkzeug.test import Client

import report
from study import follow

pytest_plugins = ["browser_fixtures"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def serve():
    """Starts report.py --follow; the process and its address. All of them are ended by Ctrl-C."""
    started = []

    def start(*words: object):
        command = [sys.executable, "report.py", "--follow", *map(str, words)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        line = process.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:\d+/", line)
        assert found, line + (process.stderr.read() if process.wait(5) else "")
        return process, found[0]

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)


def add_step(folder: Path, step: int, **values) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "reward": 0.7} | values) + "\n")


def said(page, text: str) -> None:
    """Wait until the page says it."""
    page.locator("#following", has_text=text).wait_for(timeout=60_000)


def client_of(folder: Path) -> Client:
    followed = follow.Followed([folder], lambda: report.gather([folder], []))
    render = lambda shown, scripts: report.page(shown, following=True, scripts=scripts)  # noqa: E731
    return Client(follow.application(followed, render))


def test_the_page_grows_keeps_what_one_chose_and_survives_a_resume(browser, tmp_path, serve):
    folder = write_run(tmp_path / "a")
    process, address = serve(folder)
    page = opened(browser, address)
    said(page, "Following: a, step 2")
    page.select_option("#group", "2")
    page.check("#smooth")
    add_step(folder, 3)
    with open(folder / "samples.jsonl", "a") as file:
        file.write(json.dumps(sample(3, 31, 1, response=EVIL, problem=EVIL)) + "\n")
    said(page, "Following: a, step 3")
    assert page.evaluate("FACTS.charts.find((c) => c.title === 'Reward').lines[0].x") == [1, 2, 3]
    assert page.evaluate("byId('charts').children[1].lastChild.data.find((d) => d.mode === 'lines').x") == [1, 2, 3]
    assert page.is_checked("#smooth")
    assert page.locator("#group").input_value() == "2"
    assert page.locator("img").count() == 0
    kept = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(kept[:2]))  # a resume from step 1 cuts the log
    said(page, "Following: a, step 1")
    (folder / "metrics.jsonl").write_text("")
    said(page, "Waiting")
    add_step(folder, 9)
    said(page, "Following: a, step 9")
    assert page.locator("#headlines").inner_text().count("9 of") == 1
    assert all(url.startswith(address) for url in page.requests)
    assert not [trouble for trouble in page.troubles if "503" not in trouble]
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "ended" in out
    assert error == ""
    said(page, "The server has ended")
    page.close()


def test_a_run_without_a_step_is_waited_for(tmp_path, serve):
    (tmp_path / "a").mkdir()
    _, address = serve(tmp_path / "a")
    with urllib.request.urlopen(address) as answer:
        assert "no step yet" in answer.read().decode()
    write_run(tmp_path / "b")
    for file in (tmp_path / "b").iterdir():
        file.rename(tmp_path / "a" / file.name)
    with urllib.request.urlopen(address) as answer:
        assert 'id="data"' in answer.read().decode()


def test_a_taken_port_is_passed_over_or_said_in_one_line(tmp_path, serve, capsys):
    folder = write_run(tmp_path / "a")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert report.main(["--follow", str(folder), "--port", str(taken)]) == 2
        error = capsys.readouterr().err
        assert f"--port {taken}" in error
        assert error.count("\n") == 1
    (_, one), (_, two) = serve(folder), serve(folder)
    assert one != two


def test_only_the_loopback_address_listens_and_only_by_its_own_name(tmp_path):
    """CHECKLIST 74: no other machine can ask, and no other web page."""
    sock = follow.listen(None)
    assert sock.getsockname()[0] == "127.0.0.1"
    sock.close()
    client = client_of(write_run(tmp_path / "a"))
    assert client.get("/", base_url="http://evil.example:8765").status_code == 403
    assert client.get("/update", base_url="http://127.0.0.1.evil.example").status_code == 403
    assert client.get("/", base_url="http://localhost:8765").status_code == 200
    assert client.post("/", base_url="http://localhost").status_code == 405
    assert client.get("/../config.yaml", base_url="http://localhost").status_code == 404
    assert client.get("/config.yaml", base_url="http://localhost").status_code == 404


def test_nothing_is_sent_if_no_file_has_changed(tmp_path):
    folder = write_run(tmp_path / "a")
    client = client_of(folder)
    text = client.get("/update", base_url="http://localhost").text
    start = text.index('id="data" type="application/json">') + len('id="data" type="application/json">')
    version = json.loads(text[start : text.index("</script>", start)])["version"]
    assert len(text) < 200_000  # without plotly
    assert client.get("/update", query_string={"since": version}, base_url="http://localhost").status_code == 204
    assert "Access-Control-Allow-Origin" not in client.get("/", base_url="http://localhost").headers


def test_files_are_read_again_for_a_share_of_the_time_only(tmp_path, monkeypatch):
    folder, built = write_run(tmp_path / "a"), []
    clock = [100.0]
    monkeypatch.setattr(follow.time, "monotonic", lambda: clock[0])

    def build():
        clock[0] += 2.0
        built.append(1)
        return {}

    followed = follow.Followed([folder], build)
    for number in range(50):
        add_step(folder, 10 + number)
        followed.look()
        clock[0] += 1.0
    assert len(built) == 4  # at 100, and each time 15 seconds after the end of the last one


@pytest.mark.parametrize("flags", [["--out", "x.html"], ["--png", "x"], ["--after"]])
def test_flags_that_write_or_load_do_not_go_with_follow(tmp_path, capsys, flags):
    assert report.main([str(write_run(tmp_path / "a")), "--follow", *flags]) == 2
    error = capsys.readouterr().err
    assert flags[0] in error
    assert error.count("\n") == 1


def test_a_folder_that_is_missing_is_said_in_one_line(tmp_path, capsys):
    assert report.main(["--follow", str(tmp_path / "no")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert report.main([str(write_run(tmp_path / "a")), "--port", "9000"]) == 2
    assert "add --follow" in capsys.readouterr().err
    for port in ("0", "65536", "x", "9" * 5000):
        assert report.main(["--follow", str(tmp_path / "a"), "--port", port]) == 2
        error = capsys.readouterr().err
        assert "expected a port from 1 to 65535" in error
        assert error.count("\n") == 1


def test_the_server_writes_nothing(tmp_path, serve):
    folder = write_run(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    _, address = serve(folder)
    urllib.request.urlopen(address).read()
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(address + "no")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["a"]
