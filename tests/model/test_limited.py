"""limited.py: values and errors of calls in the child process, its limits, and its end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from model import limited
from model.limited import LimitedError, call_limited

ROOT = Path(__file__).parents[2]


def child_pid() -> int:
    """A call makes sure that there is a child."""
    call_limited("operator:add", 1, 1)
    assert limited._child is not None
    return limited._child.process.pid


def test_values_and_exceptions_come_back():
    assert call_limited("operator:add", [1, "é\n"], [None]) == [1, "é\n", None]
    with pytest.raises(LimitedError, match=r"^ZeroDivisionError: division by zero$"):
        call_limited("operator:truediv", 1, 0)
    with pytest.raises(LimitedError, match=r"^ModuleNotFoundError: "):
        call_limited("no_such_module:f")
    with pytest.raises(LimitedError, match=r"^SystemExit: 3$"):
        call_limited("sys:exit", 3)


def test_one_child_answers_call_after_call():
    assert child_pid() == child_pid() != os.getpid()


def test_output_of_the_function_does_not_disturb_the_reply():
    assert call_limited("builtins:print", "{}") is None
    assert call_limited("os:system", "echo hello") == 0
    assert call_limited("operator:add", 1, 2) == 3


def test_large_arguments_and_values_pass():
    text = "é" * 5_000_000
    assert call_limited("operator:add", text, "!") == text + "!"


def test_memory_is_limited():
    pid = child_pid()
    with pytest.raises(LimitedError, match=r"MemoryError|MiB of memory"):
        call_limited("operator:mul", "a", 10**9)
    assert (child_pid() == pid) == (sys.platform == "linux")  # a failed allocation there, and an end elsewhere
    assert call_limited("operator:mul", "a", 3 * 10**6) == "a" * 3_000_000


def test_processor_time_is_limited_for_each_call():
    for _ in range(2):
        with pytest.raises(LimitedError, match=r"more than 0\.3 s of processor time"):
            call_limited("builtins:pow", 3, 10**9, cpu_s=0.3)
    pid = child_pid()
    for _ in range(5):  # together more than the limit of one call
        call_limited("builtins:eval", "sum(range(3 * 10**6))", cpu_s=0.3)
    assert child_pid() == pid


def test_elapsed_time_is_limited(monkeypatch):
    monkeypatch.setattr(limited, "WALL_S", 0.5)
    start = time.perf_counter()
    with pytest.raises(LimitedError, match=r"more than 0\.5 s"):
        call_limited("time:sleep", 100)
    assert time.perf_counter() - start < 20
    monkeypatch.undo()
    assert call_limited("operator:add", 1, 2) == 3


def test_a_crash_of_the_child_is_told_and_a_new_one_starts():
    with pytest.raises(LimitedError, match=r"ended the process .*exit status 7"):
        call_limited("os:_exit", 7)
    with pytest.raises(LimitedError, match=r"ended the process .*exit status"):
        call_limited("os:abort")
    assert call_limited("operator:add", 1, 2) == 3


def test_a_child_that_was_killed_from_outside_costs_one_error():
    psutil.Process(child_pid()).kill()
    with pytest.raises(LimitedError, match="ended the process"):
        call_limited("operator:add", 1, 2)
    assert call_limited("operator:add", 1, 2) == 3


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarm on this system")
def test_an_interrupt_leaves_no_reply_behind():
    """CHECKLIST 69: The reply of the call that Ctrl-C ended must not become the value of the next one."""
    child_pid()

    def interrupt(*_):
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            call_limited("time:sleep", 1.0)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert call_limited("operator:add", 1, 2) == 3


WITHOUT_RESOURCE = """if True:
    import sys
    import psutil  # which needs the module itself on Linux
    sys.modules["resource"] = None  # as on Windows: the import fails
    from model import limited
    limited.CODE = limited.CODE.replace("from model", "import psutil; sys.modules['resource'] = None; from model")
    assert limited.call_limited("operator:add", 1, 2) == 3
    assert limited.call_limited("builtins:eval", "__import__('model.limited').limited.resource is None")
    assert limited.resource is None
    for target, argument in (("operator:mul", 10**9), ("operator:mul", 10**10)):
        try:
            limited.call_limited(target, "a", argument)
        except limited.LimitedError as error:
            print(error)
    assert limited.call_limited("operator:add", 1, 2) == 3
"""


def test_limits_hold_without_the_module_resource():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RESOURCE], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"it took more than {limited.MEMORY_MIB} MiB of memory"] * 2


def test_no_module_of_one_system_is_needed():
    """Imports that Windows lacks stand inside a `try`, and the child is started, not forked."""
    text = Path(limited.__file__).read_text(encoding="utf-8")
    assert not re.findall(r"(?m)^(?:import|from) (?:resource|fcntl|pwd|pty|termios)", text)
    assert "preexec_fn" not in text
    assert "os.fork" not in text


PARENT = """
import os, sys, threading, time
import psutil
from model import limited
limited.call_limited("operator:add", 1, 2)
print(limited._child.process.pid, flush=True)
if sys.argv[1] == "killed":
    psutil.Process().kill()
if sys.argv[1] == "killed in a call":
    threading.Thread(target=limited.call_limited, args=("builtins:pow", 3, 10**9), kwargs={"cpu_s": 0.5}).start()
    time.sleep(0.2)
    psutil.Process().kill()
if sys.argv[1] == "forked" and os.fork() == 0:
    assert limited.call_limited("operator:add", 1, 3) == 4
    print(limited._child.process.pid, flush=True)
    sys.exit()
if sys.argv[1] == "forked":
    assert os.wait()[1] == 0
    assert limited.call_limited("operator:add", 1, 4) == 5
"""


FORKS = ("killed in a call", "forked")  # the limit on processor time is missing on the same system
NO_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.mark.parametrize("how", ["ended", "killed", *(pytest.param(how, marks=NO_FORK) for how in FORKS)])
def test_no_child_outlives_its_parent(how):
    """And a process that is forked gets a child of its own, as the pipes are its parent's."""
    done = subprocess.run(
        [sys.executable, "-c", PARENT, how], cwd=ROOT, capture_output=True, text=True, timeout=60
    )  # fmt: skip
    pids = [int(line) for line in done.stdout.split()]
    assert (done.returncode == 0) == ("killed" not in how), done.stderr
    assert len(set(pids)) == (2 if how == "forked" else 1)
    until = time.monotonic() + 60
    while any(is_child(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.05)


def is_child(pid: int) -> bool:
    try:
        return any("model.limited" in word for word in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False
