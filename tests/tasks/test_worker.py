"""The worker process: deadlines, everything that a function started, replies by number, and systems without POSIX."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from tasks.worker import MARK, Worker, WorkerError

ROOT = Path(__file__).resolve().parents[2]

STARTS = """
import os, subprocess, sys, threading, time

SLEEP = [sys.executable, "-c", "import time; time.sleep(100)"]


def tell(file, *pids):
    with open(file, "a") as out:
        out.write("".join(f"{pid}\\n" for pid in pids))


def maker():
    return start


def start(how, file, then):
    if how == "session":  # a child that is in no group of the worker
        tell(file, subprocess.Popen(SLEEP, start_new_session=True).pid)
    elif how == "grandchild":
        code = f"import subprocess; print(subprocess.Popen({SLEEP!r}, start_new_session=True).pid, flush=True)"
        code += "; import time; time.sleep(100)"
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
        tell(file, child.pid, int(child.stdout.readline()))
    elif how == "daemon":  # its parent is gone, so it is no descendant of the worker any more
        options = "stdout=s.DEVNULL, stderr=s.DEVNULL, start_new_session=True"
        code = f"import subprocess as s; print(s.Popen({SLEEP!r}, {options}).pid)"
        tell(file, int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout))
    elif how == "fork":
        pid = os.fork()
        if not pid:
            os.setsid()
            time.sleep(100)
        tell(file, pid)
    elif how == "thread":
        threading.Thread(target=time.sleep, args=(100,)).start()
        tell(file, os.getpid())
    if then == "hang":
        time.sleep(100)
    if then == "exit":
        os._exit(1)
    return how


def late():
    return answer_late


def answer_late(seconds, value):
    '''A forked process answers the first request a second time, after the second one was sent.'''
    out = max(fd for fd in range(3, 20) if fd_is_pipe(fd))
    if value == "first" and not os.fork():
        time.sleep(seconds)
        os.write(out, b'{"number": 2, "value": "late"}\\n')
        os._exit(0)
    time.sleep(2 * seconds if value == "second" else 0)
    return value


def fd_is_pipe(fd):
    import stat
    try:
        return stat.S_ISFIFO(os.fstat(fd).st_mode)
    except OSError:
        return False


def reader():
    return lambda: [sys.stdin.read(), print("noise"), os.write(1, b"more noise\\n")][0]


def mistaken():
    from tasks.worker import RefusedError

    def refuse():
        raise RefusedError("never right")

    return refuse
"""


@pytest.fixture
def starts(tmp_path, monkeypatch):
    (tmp_path / "starts.py").write_text(STARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def told(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def all_end(pids: list[int]) -> bool:
    until = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.parametrize("then", ["hang", "exit", "return"])
@pytest.mark.parametrize("how", ["session", "grandchild", "daemon", "fork"])
def test_every_process_that_a_function_started_ends_with_the_worker(starts, how, then):
    """CHECKLIST 63."""
    if how == "fork" and not hasattr(os, "fork"):
        pytest.skip("no fork")
    worker = Worker("starts:maker", deadline_s=2.0)
    file = starts / "pids"
    if then == "return":
        assert worker.call(how, str(file), then) == how
        assert all(map(alive, told(file)))  # a function may leave work for its next call
        worker.close()
    else:
        with pytest.raises(WorkerError, match="deadline" if then == "hang" else "died"):
            worker.call(how, str(file), then)
    assert len(told(file)) == (2 if how == "grandchild" else 1)
    assert all_end(told(file))


def test_other_processes_are_left_alone(starts):
    mine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    other = Worker("starts:maker")
    worker = Worker("starts:maker", deadline_s=0.5)
    with pytest.raises(WorkerError, match="deadline"):
        worker.call("none", str(starts / "pids"), "hang")
    assert mine.poll() is None
    assert other.call("none", "", "") == "none"
    mine.kill()
    mine.wait()


def test_processes_of_a_worker_end_if_the_training_process_is_killed(starts):
    """The child sees the end of its input, and ends what it started."""
    file = starts / "pids"
    code = f"""
    import os, sys
    sys.path[:0] = [{str(ROOT)!r}, {str(starts)!r}]
    from tasks.worker import Worker
    worker = Worker("starts:maker", deadline_s=20)
    worker.call("session", {str(file)!r}, "return")
    worker.call("thread", {str(file)!r}, "return")
    os.kill(os.getpid(), 9)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert len(told(file)) == 2
    assert all_end(told(file))


def test_processes_of_a_busy_worker_end_at_once_if_the_training_process_is_killed(starts):
    file = starts / "pids"
    code = f"""
    import os, sys, threading, time
    sys.path[:0] = [{str(ROOT)!r}, {str(starts)!r}]
    from tasks.worker import Worker
    worker = Worker("starts:maker", deadline_s=60)
    worker.call("thread", {str(file)!r}, "return")
    threading.Thread(target=worker.call, args=("session", {str(file)!r}, "hang"), daemon=True).start()
    while len(open({str(file)!r}).read().split()) < 2:
        time.sleep(0.05)
    os.kill(os.getpid(), 9)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert len(told(file)) == 2
    assert all_end(told(file))


def test_a_reply_with_the_number_of_an_earlier_request_is_not_taken(starts):
    """The number of the first request is 2, because making the function is the first exchange."""
    worker = Worker("starts:late", deadline_s=20)
    assert worker.call(0.3, "first") == "first"
    assert worker.call(0.3, "second") == "second"
    assert worker.call(0.0, "third") == "third"


def test_the_function_has_no_input_and_its_output_is_no_reply(starts):
    worker = Worker("starts:reader")
    assert [worker.call() for _ in range(3)] == ["", "", ""]


def test_a_mistake_of_the_program_is_told_from_a_failure(starts):
    with pytest.raises(WorkerError, match="refused: never right") as error:
        Worker("starts:mistaken").call()
    assert (error.value.kind, error.value.detail) == ("refused", "never right")


def test_a_worker_starts_again_after_its_process_was_killed(starts):
    worker = Worker("starts:maker")
    psutil.Process(worker._process.pid).kill()
    with pytest.raises(WorkerError, match="died"):
        worker.call("none", "", "")
    assert worker.call("none", "", "") == "none"


@pytest.mark.parametrize(("deadline_s", "memory_gib"), [(0, 1), (1, 0), (-1, 1)])
def test_limits_must_be_above_zero(deadline_s, memory_gib):
    with pytest.raises(ValueError, match="expected numbers above 0"):
        Worker("json:loads", (), deadline_s, memory_gib)


# What Windows does not have. `psutil` keeps its own way to end a process.
WITHOUT_POSIX = """
import builtins, os, signal, subprocess, sys, types

real_import, HIDDEN = builtins.__import__, ("resource", "fcntl", "termios", "pwd", "grp")
import psutil
psutil.signal = types.SimpleNamespace(**{name: getattr(signal, name) for name in dir(signal) if name.startswith("SIG")})


def without(name, *rest):
    if name in HIDDEN and "psutil" not in str(rest[0].get("__name__", "") if rest and rest[0] else ""):
        raise ImportError(f"No module named {name!r}")
    return real_import(name, *rest)


builtins.__import__ = without
for name in HIDDEN:
    sys.modules.pop(name, None)
for name in ("killpg", "setsid", "getpgid", "sysconf", "fork"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGALRM", "alarm", "setitimer", "SIGHUP"):
    if hasattr(signal, name):
        delattr(signal, name)
real_popen = subprocess.Popen.__init__


def popen(self, *arguments, **options):
    assert not options.get("pass_fds"), "pass_fds not supported on Windows."
    assert options.get("preexec_fn") is None
    real_popen(self, *arguments, **options)


subprocess.Popen.__init__ = popen
"""


def test_a_worker_needs_nothing_of_posix(starts):
    """Parent and child run without the modules and calls that Windows does not have."""
    (starts / "sitecustomize.py").write_text(WITHOUT_POSIX)
    code = """
    import json, time
    from tasks.sandbox import SandboxedTask
    from tasks.worker import Worker, WorkerError
    worker = Worker("starts:maker", deadline_s=1.0)
    found = [worker.call("none", "", ""), worker.memory_limited]
    try:
        worker.call("session", "pids", "hang")
    except WorkerError as error:
        found.append(error.kind)
    found.append(worker.call("none", "", ""))
    worker.close()
    print(json.dumps(found))
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(starts), str(ROOT)])}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, cwd=starts, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == ["none", False, "deadline", "none"]
    assert all_end(told(starts / "pids"))


def test_nothing_of_a_worker_is_left_after_the_program(starts):
    code = "from tasks.worker import Worker; w = Worker('starts:maker'); w.call('session', 'pids', 'return')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(starts), str(ROOT)])}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=starts, check=True)
    assert all_end(told(starts / "pids"))
    assert not any(name.startswith(MARK) for name in os.environ)
