"""One program per run folder: the second one is refused, with the name of the first. A kill frees the folder."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from report_fixtures import write_run
from test_train import ROOT, SMALL, metrics_of, refused, run, wait_for

import evaluate
import explain
import report
from run import run_lock
from run.checkpoint import find_checkpoint, verify_checkpoint
from run.run_lock import RunInUseError, RunLock

TINY = [*SMALL, "--task", "arithmetic", "--entropy-coef", "0.01", "--eval-every", "0"]


def start(*words: object, cwd: Path = ROOT) -> subprocess.Popen:
    command = [str(word) for word in (sys.executable, ROOT / "train.py", *words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


@pytest.fixture
def running(checkpoint_folder, tmp_path):
    """A run in another process, which has made a step: (process, run folder)."""
    run_dir = tmp_path / "run"
    words = ["--ckpt", checkpoint_folder, "--run-dir", run_dir, "--steps", 100000, "--save-every", 1, *TINY]
    with start(*words) as process:
        wait_for(process, "a step takes")
        yield process, run_dir
        process.kill()


def test_a_run_that_goes_on_is_not_resumed_and_a_killed_one_is(running, capsys):
    """In one line with the process. After `kill -9` nothing has to be cleared away."""
    process, run_dir = running
    for words in (["--resume", run_dir], ["--run-dir", run_dir], ["--resume", "auto", "--run-dir", run_dir]):
        line = refused(capsys, *words, "--steps", 3)
        assert f"{run_dir} is in use by process {process.pid} on {socket.gethostname()}, since 20" in line
    process.kill()
    process.wait()
    steps = find_checkpoint("latest", run_dir).name.removeprefix("step-")
    assert run("--resume", run_dir, "--steps", int(steps) + 2) == 0
    assert [row["step"] for row in metrics_of(run_dir)] == list(range(int(steps) + 3))
    assert not (run_dir / ".running").exists()


def test_two_runs_that_are_started_together_get_two_folders(checkpoint_folder, tmp_path):
    words = ["--ckpt", checkpoint_folder, "--steps", 3, *TINY]
    processes = [start(*words, cwd=tmp_path) for _ in range(3)]
    for process in processes:
        _, error = process.communicate(timeout=180)
        assert process.returncode == 0, error
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name[-3:] for folder in folders] == ["001", "002", "003"]
    for folder in folders:
        assert [row["step"] for row in metrics_of(folder)] == [0, 1, 2, 3]
        verify_checkpoint(find_checkpoint("latest", folder))


def test_the_next_number_is_taken_if_a_folder_appears_in_the_last_moment(checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("run.config.RUNS", tmp_path / "runs")
    make, calls = Path.mkdir, []

    def slow(path, *args, **options):
        if path.name.endswith("001") and not calls:
            calls.append(path)
            make(path, parents=True)
        return make(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", slow)
    assert run("--ckpt", checkpoint_folder, "--steps", 1, *TINY) == 0
    assert [len(list(folder.iterdir())) > 0 for folder in sorted((tmp_path / "runs").iterdir())] == [False, True]


def test_a_checkpoint_of_one_run_does_not_overwrite_another_run(checkpoint_folder, tmp_path, capsys):
    """But it may be continued in a folder of its own, which leaves the first run alone."""
    for name, seed in (("a", 1), ("b", 2)):
        words = ["--ckpt", checkpoint_folder, "--run-dir", tmp_path / name, "--steps", 3, "--save-every", 1]
        assert run(*words, "--seed", seed, *TINY) == 0
    before = files_of(tmp_path / "a") | files_of(tmp_path / "b")
    from_a = ["--resume", tmp_path / "a/checkpoints/step-000002"]
    assert "holds another run" in refused(capsys, *from_a, "--run-dir", tmp_path / "b")
    assert files_of(tmp_path / "a") | files_of(tmp_path / "b") == before
    assert run(*from_a, "--run-dir", tmp_path / "c") == 0
    assert [row["step"] for row in metrics_of(tmp_path / "c")] == [3]
    assert files_of(tmp_path / "a") | files_of(tmp_path / "b") == before
    assert metrics_of(tmp_path / "c")[-1] == metrics_of(tmp_path / "a")[-1]
    assert run(*from_a) == 0
    assert [row["step"] for row in metrics_of(tmp_path / "a")] == [0, 1, 2, 3]


def test_a_lock_belongs_to_one_and_is_free_after_it(tmp_path):
    with RunLock() as first, RunLock() as second:
        first.take(tmp_path)
        first.take(tmp_path)
        assert json.loads((tmp_path / ".running").read_text())["pid"] == os.getpid()
        with pytest.raises(RunInUseError, match=f"process {os.getpid()} on "):
            second.take(tmp_path)
        (tmp_path / ".running").write_text("no JSON")
        with pytest.raises(RunInUseError, match="in use by another program"):
            second.take(tmp_path)
        first.release()
        second.take(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] in ([".lock"], [])


def test_a_process_that_dies_frees_the_lock_though_its_child_lives_on(tmp_path):
    """Such as the worker of a reward, which is a process of its own."""
    program = (
        "import subprocess, sys; from pathlib import Path; from run.run_lock import RunLock; lock = RunLock(); "
        "lock.take(Path(sys.argv[1])); "
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True); print(child.pid, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        child = int(process.stdout.readline())
        with RunLock() as lock, pytest.raises(RunInUseError):
            lock.take(tmp_path)
        process.kill()
        process.wait()
        with RunLock() as lock:
            lock.take(tmp_path)
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("error", [NotImplementedError(), OSError(errno.ENOSYS, "not implemented")])
def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog, error):
    class NoLock:
        def __init__(self, path): ...

        def acquire(self, timeout):
            raise error

        def release(self): ...

    monkeypatch.setattr(run_lock, "FileLock", NoLock)
    with RunLock() as lock:
        lock.take(tmp_path)
    assert "has no locks: start no second program" in caplog.text


# --- folders that cannot be written


def test_a_folder_that_cannot_be_written_names_the_flag(checkpoint_folder, tmp_path, capsys):
    locked = tmp_path / "locked"
    (locked / "there").mkdir(parents=True)
    for folder in (locked / "there", locked):
        folder.chmod(0o555)
    for folder in (tmp_path, checkpoint_folder, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        lines = [
            refused(capsys, "--ckpt", checkpoint_folder, *SMALL, "--run-dir", locked / name)
            for name in ("new", "there", "new/below")
        ]
    finally:
        if root:
            os.seteuid(0)
    assert all("cannot be written" in line and "--run-dir" in line for line in lines)


@pytest.mark.parametrize("program", ["evaluate", "explain", "report"])
def test_a_file_that_cannot_be_written_is_refused_before_time_is_spent(checkpoint_folder, tmp_path, capsys, program):
    """Of root, no file is read-only: the system call is replaced."""
    run = write_run(tmp_path / "run")
    (tmp_path / "folder").mkdir()
    words = {
        "evaluate": (evaluate, ["--ckpt", checkpoint_folder, *SMALL], "--json"),
        "explain": (explain, ["--ckpt", checkpoint_folder], "--out"),
        "report": (report, [run], "--out"),
    }
    module, argv, flag = words[program]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "evaluate_checkpoint", None)  # calling it would be a TypeError
        patch.setattr(explain, "explain", None)
        patch.setattr(report, "facts", None)
        for name, said in (("folder", "is a folder"), ("none/x", "there is no folder"), ("x", "cannot be written")):
            if name == "x":
                patch.setattr(os, "access", lambda *args, **options: False)
            assert module.main([str(word) for word in (*argv, flag, tmp_path / name)]) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"{program}.py: {flag} {tmp_path / name}"), error
            assert said in error
            assert error.count("\n") == 1


def test_a_file_is_no_run_folder(checkpoint_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        line = refused(capsys, "--ckpt", checkpoint_folder, *SMALL, "--run-dir", tmp_path / name)
        assert f"{tmp_path / 'file'} is a file, expected a folder" in line
