"""A failing print changes neither the files of a run nor an exit code. Text of others cannot steer the terminal."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_train import SMALL, metrics_of, wait_for

import evaluate
import train
from parallel import distributed
from run import terminal
from run.checkpoint import find_checkpoint, verify_checkpoint
from run.config import Config
from run.progress import LiveProgress
from run.run_log import RunLog
from run.terminal import printable, write_error

if os.name == "nt":
    pytest.skip("closed handles and full devices are made with a POSIX shell", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
TINY = [*SMALL, "--task", "arithmetic", "--entropy-coef", "0.01"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*words: object) -> list[str]:
    return [str(word) for word in (sys.executable, ROOT / words[0], *words[1:])]


def run_without_reader(*words: object, until: str | None = None) -> tuple[int, str]:
    """A program whose standard output is closed at once, or after a line with `until`. (exit code, standard error)"""
    with subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        try:
            if until:
                wait_for(process, until)
            process.stdout.close()
            error = process.stderr.read()
            return process.wait(timeout=120), error
        finally:
            process.kill()


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def code_with(faults: str, *words: object) -> int:
    """The exit code of a program under faults such as "stdout full, stderr closed"."""
    redirections = ""
    if "stdout closed" in faults:
        redirections += " >&-"
    if "stderr closed" in faults:
        redirections += " 2>&-"
    if "stdin closed" in faults:
        redirections += " <&-"
    with contextlib.ExitStack() as stack:
        streams = {}
        for stream in ("stdout", "stderr"):
            if f"{stream} full" in faults:
                streams[stream] = stack.enter_context(open("/dev/full", "w"))
            if f"{stream} dead" in faults:
                streams[stream] = closed_pipe()
                stack.callback(os.close, streams[stream])
        return subprocess.run(
            ["sh", "-c", f'exec "$@"{redirections}', "sh", *command(*words)],
            **streams, cwd=ROOT, env=ENVIRONMENT, timeout=300, check=False,
        ).returncode  # fmt: skip


FAULTS = ["stdout full, stderr full", "stdout closed, stderr closed, stdin closed", "stdout dead, stderr dead"]


# --- a run


@pytest.mark.parametrize("until", [None, "a step takes"])
def test_a_run_goes_on_to_its_end_and_says_once_that_nobody_reads(checkpoint_folder, tmp_path, until):
    run_dir = tmp_path / "run"
    words = ["--ckpt", checkpoint_folder, "--run-dir", run_dir, "--steps", 30, "--save-every", 5, *TINY]
    code, error = run_without_reader("train.py", *words, until=until)
    assert code == 0, error
    assert "Traceback" not in error
    assert "Exception ignored" not in error
    told = [line for line in error.splitlines() if "standard output" in line]
    assert len(told) == 1 or (until and not told)  # a slow machine may close the pipe when all was said
    assert [row["step"] for row in metrics_of(run_dir)] == list(range(31))
    assert find_checkpoint("latest", run_dir).name == "step-000030"
    verify_checkpoint(find_checkpoint("latest", run_dir))

    code, error = run_without_reader("report.py", run_dir)
    assert (code, error) == (0, "")
    assert (run_dir / "report.html").stat().st_size > 100_000


@pytest.mark.parametrize("faults", [*FAULTS, "stderr full"])
def test_a_run_saves_the_same_whatever_becomes_of_its_streams(checkpoint_folder, tmp_path, faults):
    """Both streams, from the first line on. A metric file must not be written by a print to a closed handle."""
    run_dir = tmp_path / "run"
    words = ["--ckpt", checkpoint_folder, "--run-dir", run_dir, "--steps", 3, "--save-every", 1, *TINY]
    assert code_with(faults, "train.py", *words) == 0
    assert [row["step"] for row in metrics_of(run_dir)] == [0, 1, 2, 3]
    verify_checkpoint(find_checkpoint("latest", run_dir))
    assert find_checkpoint("latest", run_dir).name == "step-000003"


PRINTS = """
from dataclasses import dataclass
from data_types import Problem, Reward
from tasks.task_base import Task

@dataclass(kw_only=True)
class Mine(Task):
    def train_problem(self, index):
        return Problem(f"p{index}", [{"role": "user", "content": f"number {index}"}], index)

    test_problem = train_problem

    def reward(self, problem, response):
        print("a word about", response, flush=True)
        return Reward(float(len(response) % 5), {"mine": 1.0})
"""


@pytest.mark.parametrize("faults", FAULTS)
def test_a_reward_that_prints_is_scored_whatever_becomes_of_the_streams(checkpoint_folder, tmp_path, faults):
    """It runs in a worker, which has inherited them."""
    (tmp_path / "mine.py").write_text(PRINTS)
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", 1, *SMALL, "--no-curriculum"]
    assert code_with(faults, "train.py", *words, "--task", f"{tmp_path / 'mine.py'}:Mine") == 0
    rows = metrics_of(tmp_path / "run")
    assert all("frac_reward_missing" not in row for row in rows)
    assert rows[1]["rewards/mine/mean"] == 1.0


@pytest.mark.parametrize("faults", FAULTS)
def test_a_mistake_has_exit_code_2_whatever_becomes_of_the_streams(faults):
    assert code_with(faults, "train.py", "--ckpt", "no/such/folder/at/all") == 2


@contextlib.contextmanager
def started(*words: object, **streams):
    process = subprocess.Popen(command("train.py", *words, "--steps", 100000), cwd=ROOT, env=ENVIRONMENT, **streams)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def read_until(handle: int, text: bytes, seconds: float = 90) -> None:
    seen, deadline = b"", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([handle], [], [], 1.0)[0]:
            piece = os.read(handle, 65536)
            assert piece, seen
            seen += piece


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_into_a_pipe_whose_reader_dies_of_it_saves_the_run(checkpoint_folder, tmp_path, number):
    """CHECKLIST 45: `2>&1 | tee log` and Ctrl-C, which ends tee at once."""
    run_dir = tmp_path / "run"
    reader, writer = os.pipe()
    words = ["--ckpt", checkpoint_folder, "--run-dir", run_dir, "--save-every", 0, "--eval-every", 0, *TINY]
    with started(*words, stdout=writer, stderr=writer) as process:
        os.close(writer)
        read_until(reader, b"a step takes")
        os.close(reader)
        process.send_signal(number)
        assert process.wait(timeout=90) == 128 + number
    verify_checkpoint(find_checkpoint("latest", run_dir))
    assert find_checkpoint("latest", run_dir).name == f"step-{metrics_of(run_dir)[-1]['step']:06d}"


def test_a_terminal_that_is_closed_saves_the_run(checkpoint_folder, tmp_path):
    """CHECKLIST 45: SIGHUP comes from the kernel, and again from the shell. Every print fails with EIO."""
    run_dir = tmp_path / "run"
    words = ["--ckpt", checkpoint_folder, "--run-dir", run_dir, "--save-every", 0, "--eval-every", 0, *TINY]
    import pty  # POSIX only

    pid, terminal_end = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execve(sys.executable, command("train.py", *words, "--steps", 100000), ENVIRONMENT)
    read_until(terminal_end, b"step 2/")
    os.close(terminal_end)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGHUP)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    verify_checkpoint(find_checkpoint("latest", run_dir))


def test_a_log_on_the_full_disk_of_the_run(checkpoint_folder, tmp_path):
    """No file may grow: not the log, not a checkpoint. The run goes on to its end and says so by its exit code."""
    with open(tmp_path / "log", "w") as log:
        process = subprocess.run(
            ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh",
             *command("train.py", "--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", 60, *TINY)],
            stdout=log, stderr=log, cwd=ROOT, env=ENVIRONMENT, timeout=300, check=False,
        )  # fmt: skip
    assert process.returncode == 4
    assert (tmp_path / "log").stat().st_size == 4096
    assert 0 < len(metrics_of(tmp_path / "run")) < 60
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))


# --- the other programs


def test_an_evaluation_is_written_to_its_file(checkpoint_folder, tmp_path):
    words = ["--ckpt", checkpoint_folder, *TINY, "--samples", 2, "--json", tmp_path / "found.json"]
    assert run_without_reader("evaluate.py", *words) == (0, "")
    assert "pass@2" in json.loads((tmp_path / "found.json").read_text())["results"][str(checkpoint_folder)]


@pytest.mark.parametrize("words", [["train.py", "--help"], ["explain.py", "--text"]])
def test_the_others_end_quietly(words):
    assert run_without_reader(*words) == (0, "")


@pytest.mark.parametrize("faults", FAULTS)
@pytest.mark.parametrize(
    "words",
    [
        ["train.py", "--help"],
        ["chat.py"],
        ["explain.py", "--text"],
        ["evaluate.py", "--eval-problems", 2, "--samples", 1, "--max-new-tokens", 4],
    ],
    ids=lambda words: " ".join(words[:2]) if isinstance(words, list) else words,
)
def test_no_program_changes_its_exit_code(faults, words):
    assert code_with(faults, *words) == 0


def test_a_full_device_is_told_once_on_the_other_stream():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("explain.py", "--text"),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            check=False,
        )
    assert (done.returncode, done.stderr) == (
        0,
        "explain.py: standard output could not be written: No space left on device\n",
    )


# --- the log of a run in this process


def test_a_line_beside_the_display_may_be_the_first_that_nobody_reads(tmp_path, monkeypatch, capsys):
    """Of rich's, which would end the program."""
    with open(closed_pipe(), "w") as stdout, RunLog(tmp_path / "run", Config(), total_steps=2) as log:
        monkeypatch.setattr(sys, "stdout", stdout)
        log.say("the run will last about a week")
        log.log_step(1, {"reward": 0.5})
        log.print_summary()
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1]
    assert capsys.readouterr().err.count("standard output not written: Broken pipe") == 1


class Failing(io.RawIOBase):
    """Fails with the errors given, one a write. None: the write succeeds."""

    def __init__(self, *errors: int | None):
        self.errors, self.written = list(errors), b""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return closed_pipe()

    def write(self, data) -> int:
        number = self.errors.pop(0)
        if number is not None:
            raise OSError(number, os.strerror(number))
        self.written += bytes(data)[:1]
        return 1


def test_a_device_that_was_full_is_written_again_and_a_closed_pipe_is_not_tried_again():
    for number, tried in ((errno.ENOSPC, b"bc"), (errno.EPIPE, b""), (errno.EIO, b"")):
        raw = Failing(number, None, None)
        stream = io.TextIOWrapper(io.BufferedWriter(terminal._Outlives(raw)), write_through=True)
        print("a", end="", file=stream, flush=True)
        assert write_error(stream).errno == number
        print("bc", end="", file=stream, flush=True)
        assert raw.written == tried
        assert (write_error(stream) is None) == bool(tried)


def test_a_signal_handler_may_interrupt_a_print():
    """A print of its own would raise `RuntimeError: reentrant call` inside whatever was interrupted."""
    program = """
import signal, sys
sys.path.insert(0, sys.argv[1])
from run.terminal import replace_streams, write_now
replace_streams()
signal.signal(signal.SIGALRM, lambda *_: write_now("now\\n"))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
for _ in range(20000):
    print("x" * 50, file=sys.stderr)
signal.setitimer(signal.ITIMER_REAL, 0)
"""
    done = subprocess.run([sys.executable, "-c", program, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert "now" in done.stderr


# --- text

ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e"


def hostile_key(folder: Path) -> list[object]:
    (folder / "hostile.yaml").write_text(json.dumps({ESCAPE: 3}))
    return ["--config", folder / "hostile.yaml"]


def hostile_column(folder: Path) -> list[object]:
    (folder / "rows.jsonl").write_text(json.dumps({ESCAPE: "1", "other": "2"}) + "\n")
    return ["--task", "jsonl", "--data", folder / "rows.jsonl"]


def hostile_tensor(folder: Path) -> list[object]:
    tensors = load_file(folder / "tiny/model.safetensors")
    save_file(tensors | {ESCAPE: torch.zeros(1)}, folder / "tiny/model.safetensors")
    return []


def hostile_template(folder: Path) -> list[object]:
    text = "{{ raise_exception('" + ESCAPE + "') }}"
    for path in (folder / "tiny").glob("chat_template.jinja"):
        path.unlink()
    settings = json.loads((folder / "tiny/tokenizer_config.json").read_text())
    (folder / "tiny/tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": text}))
    return []


def hostile_model_type(folder: Path) -> list[object]:
    settings = json.loads((folder / "tiny/config.json").read_text())
    (folder / "tiny/config.json").write_text(json.dumps(settings | {"model_type": ESCAPE}))
    return []


HOSTILE = [hostile_key, hostile_column, hostile_tensor, hostile_template, hostile_model_type]


@pytest.mark.parametrize("program", [train, evaluate])
@pytest.mark.parametrize("spoil", [*HOSTILE, None], ids=lambda spoil: spoil.__name__ if spoil else "a name")
def test_text_of_others_reaches_the_terminal_escaped_in_one_line(checkpoint_folder, tmp_path, capfd, program, spoil):
    """Names of keys, columns and tensors, the message of a template: shown, not obeyed."""
    words = ["--ckpt", checkpoint_folder if spoil else f"no{ESCAPE}/such/folder/here"]
    words += [*SMALL, *(spoil(tmp_path) if spoil else [])]
    words += ["--run-dir", tmp_path / "run"] if program is train else []
    assert program.main([str(word) for word in words]) == 2
    out, error = capfd.readouterr()
    assert "\x1b" not in out + error
    assert "\u202e" not in out + error
    assert error.count("\n") == 1
    assert r"\x1b]0;owned\x07" in error


def test_a_warning_and_a_traceback_are_escaped(tmp_path):
    """Of a program: standard error, for every writer of the text."""
    program = f"""
import logging, sys, warnings
sys.path.insert(0, {str(ROOT)!r})
from run.terminal import log_to_standard_error, run_program
def main(argv):
    log_to_standard_error()
    warnings.warn({ESCAPE + "one"!r})
    logging.warning({ESCAPE + "two"!r})
    raise RuntimeError({ESCAPE + "three"!r})
run_program("x.py", main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "\x1b" not in done.stderr
    positions = [done.stderr.index(rf"\x1b[2J\u202e{word}") for word in ("one", "two", "three")]
    assert positions == sorted(positions)


@given(st.text() | st.text("\x1b\x9b[]P;m0\x07\\ab\u202e\n\t\ud800"))
def test_printable_text_has_no_control_character_and_loses_nothing(text):
    shown = printable(text)
    assert all(
        c in "\n\t\u200c\u200d" or not unicodedata.category(c).startswith("C") or unicodedata.category(c) == "Cn"
        for c in shown
    )
    assert printable(shown) == shown
    plain = "".join(c for c in text if c.isprintable() or c in "\n\t")
    assert all(c in shown for c in plain)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain 3 × 5\n\tend", "plain 3 × 5\n\tend"),
        ("\x1b[1;31mred\x1b[0m", r"\x1b[1;31mred\x1b[0m"),
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("\x9b2Jx\x85y\r\0", r"\x9b2Jx\x85y\x0d\x00"),
        ("a\u200bb\u2066c\ufeff\u2028", r"a\u200bb\u2066c\ufeff\u2028"),
        ("\U000e0041 \ud800", r"\U000e0041 \ud800"),
        ("👩\u200d🚀 日本\u3000語", "👩\u200d🚀 日本\u3000語"),
    ],
)
def test_what_would_steer_the_terminal_is_shown_in_pythons_notation(text, expected):
    assert printable(text) == expected


@pytest.mark.parametrize("variable", [None, "JPY_PARENT_PID", "FORCE_COLOR"])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_display_is_redrawn_only_where_a_person_looks_at_a_terminal(tmp_path, monkeypatch, variable, terminal):
    """The cell of a notebook gives its programs a terminal, and stores every frame."""
    for name in ("JPY_PARENT_PID", "JPY_SESSION_NAME", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("TERM", "xterm-color")
    with RunLog(tmp_path, Config(log_to=()), total_steps=1) as log:
        assert isinstance(log._progress, LiveProgress) == (terminal and variable != "JPY_PARENT_PID")


def test_a_line_of_one_of_several_processes_is_escaped(capsys):
    distributed.complain(f"train.py: runs/{ESCAPE}")
    assert capsys.readouterr().err == "train.py: runs/\\x1b]0;owned\\x07\\x1b[2J\\u202e\n"
