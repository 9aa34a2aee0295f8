"""The programs start and work on a system without POSIX modules and calls, such as Windows.

This test runs on POSIX: it hides the modules and calls from the project's own code, after the packages of others were
imported. It cannot show that those packages work on Windows, nor that paths and locks do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import SMALL, metrics_of

from run.checkpoint import find_checkpoint, verify_checkpoint

ROOT = Path(__file__).resolve().parents[2]
HIDDEN_MODULES = ["resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog"]
HIDDEN_CALLS = {
    "os": ["sysconf", "killpg", "getpgid", "setsid", "fork", "forkpty", "getuid", "geteuid", "seteuid", "getrusage",
           "O_NOCTTY", "mkfifo", "nice", "sched_getaffinity", "getloadavg", "uname", "statvfs"],
    "signal": ["SIGKILL", "SIGHUP", "SIGALRM", "SIGCHLD", "SIGPIPE", "SIGXFSZ", "alarm", "setitimer", "pthread_kill",
               "pthread_sigmask", "sigwait"],
    "socket": ["AF_UNIX"],
}  # fmt: skip
PROGRAM = """
import sys
import filelock, huggingface_hub, jinja2, psutil, pyarrow, rich.live, safetensors.torch, tokenizers, torch, tyro
import torch.distributed.fsdp, torch.distributed.tensor, torch.utils.tensorboard  # packages of others come first
import asyncio, concurrent.futures, multiprocessing.connection, subprocess, tempfile
import os, signal, socket, types
import psutil, subprocess
theirs = types.ModuleType("signal")  # for packages of others, which have code of their own for Windows
theirs.__dict__.update(vars(signal))
psutil.signal = psutil._psposix.signal = subprocess.signal = theirs
for name in {modules}:
    sys.modules[name] = None
for module, names in {calls}.items():
    for name in names:
        if hasattr(sys.modules[module], name):
            delattr(sys.modules[module], name)
sys.path.insert(0, {root})
program = __import__({program})
sys.argv[0] = {program} + ".py"
sys.exit(program.run_program(sys.argv[0], program.main))
"""


REWARD = """
def letters(response):
    return len(response) / 100
"""


def run_hidden(program: str, *words: object, text: str = "") -> subprocess.CompletedProcess:
    code = PROGRAM.format(
        modules=HIDDEN_MODULES, calls=HIDDEN_CALLS, root=repr(str(ROOT)), program=repr(program)
    )  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], input=text, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, check=False,
    )  # fmt: skip


def test_what_is_hidden_is_really_missed():
    code = PROGRAM.split("program = __import__")[0].format(
        modules=HIDDEN_MODULES, calls=HIDDEN_CALLS, root=repr(str(ROOT)), program=repr("")
    )
    for missed in ("import resource", "import os; os.sysconf", "import signal; signal.SIGKILL"):
        done = subprocess.run([sys.executable, "-c", code + missed], capture_output=True, text=True, check=False)
        assert "Error" in done.stderr.splitlines()[-1], missed


def test_a_run_and_its_resume(checkpoint_folder, tmp_path):
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", 2, "--task", "arithmetic", *SMALL]
    done = run_hidden("train", *words)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    done = run_hidden("train", "--resume", tmp_path / "run", "--steps", 3)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [0, 1, 2, 3]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(0.05 < row["memory/peak_gib"] < 100 for row in rows[1:])
    verify_checkpoint(find_checkpoint("latest", tmp_path / "run"))


def test_a_reward_in_the_sandbox(checkpoint_folder, tmp_path):
    """The parent's side: start, deadline, end of the process tree."""
    (tmp_path / "mine.py").write_text(REWARD)
    words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / "run", "--steps", 1, "--task", "arithmetic", *SMALL]
    done = run_hidden("train", *words, "--reward", f"{tmp_path / 'mine.py'}:letters")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert metrics_of(tmp_path / "run")[1]["reward"] > 0


def test_an_evaluation(checkpoint_folder):
    done = run_hidden("evaluate", "--ckpt", checkpoint_folder, *SMALL, "--task", "arithmetic", "--samples", 2)
    assert done.returncode == 0, done.stderr
    assert "pass@2" in done.stdout


@pytest.mark.parametrize("words", [[], ["--ckpt", "no/such/folder/at/all"]], ids=["a talk", "a mistake"])
def test_a_talk(words):
    done = run_hidden("chat", "--max-new-tokens", 40, *words, text="[3, 5, 2] = 13\n")
    assert done.returncode == (2 if words else 0), done.stderr
    assert done.stderr.count("\n") == (1 if words else 0), done.stderr
    assert words or len(done.stdout) > 10
