"""A function in a process of its own, with a deadline and a memory limit.

A reward that hangs, raises, forks or uses all memory must not end the run. A signal handler in the training process
would not stop a loop in C, and a thread cannot be killed at all. So the function runs in a child process. If a call
passes its deadline, the child is killed with every process that it started, and the next call starts a new one.

    worker = Worker("tasks.dataset_tasks:math_checker", deadline_s=3.0)
    worker.call("1/2", "0.5")                          # -> True, or raises WorkerError("deadline", ...)

The child is started as a program of its own, not forked: a process with threads or a GPU must not be forked, and
multiprocessing's spawn would run the user's script a second time. Requests and replies go through the pipes of its
standard input and output, which every system has. A request and its reply have the same number, so a late reply of an
earlier call is never taken for the next one's.

The worker contains accidents, not attacks: the child has the rights of the user. The memory limit works on Linux only.
If the training process is killed, the child ends itself and its processes. A C function that holds Python's lock can
delay that, at most until its deadline.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import math
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil

from tasks.messages import first_line

START_DEADLINE_S = 120.0  # for the imports of the child: a user's task may import torch from a cold disk
MAX_REPLY_BYTES = 1 << 20
POLL_S = 0.05  # how often a waiting parent looks whether the child still lives
MARK = "NANOGRPO_WORKER_"  # an environment variable that all processes of a worker inherit


class RefusedError(ValueError):
    """A mistake in the program of a function that every call would repeat, such as a reserved name."""


class WorkerError(Exception):
    """A call without a value. `kind`: "deadline", "died", "raised", "refused", or "start" if there is no child."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


class Worker:
    """Calls one function in a child process. The child starts now, and again after it was killed.

    `target` is "module:maker". The child calls maker(*arguments) once and gets the function for every call. Arguments
    of calls are pickled, values come back as JSON. `deadline_s` is for one call. `memory_gib` is the memory that the
    child may allocate beyond its memory after its imports. `memory_limited` says whether the system can limit it.
    Raises ValueError if the child cannot make its function.
    """

    def __init__(self, target: str, arguments: tuple = (), deadline_s: float = 10.0, memory_gib: float = 4.0):
        if deadline_s <= 0 or memory_gib <= 0:
            raise ValueError(f"deadline_s is {deadline_s} and memory_gib {memory_gib}; expected numbers above 0")
        self.deadline_s, self.memory_limited = deadline_s, False
        self._setup = {"target": target, "arguments": arguments, "memory_gib": memory_gib, "path": sys.path}
        self._process: subprocess.Popen | None = None
        self._close: Callable[[], object] | None = None
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._number = 0
        try:
            self._start()
        except WorkerError as error:
            raise ValueError(f"{target} in its worker: {error}") from error

    def call(self, *arguments: Any) -> Any:
        """The function's value. Raises WorkerError. After "deadline" and "died" the child's processes are killed."""
        process = self._process or self._start()
        try:
            return self._exchange(process, arguments, self.deadline_s)
        except WorkerError as error:
            if error.kind in ("deadline", "died"):
                self.close()
            raise

    def close(self) -> None:
        """Kill the child and every process that it started."""
        if self._close is not None:
            self._close()
        self._process = self._close = None

    def _start(self) -> subprocess.Popen:
        root, mark = Path(__file__).resolve().parent.parent, MARK + uuid.uuid4().hex
        # The function's prints cannot fail.
        code = "import sys; sys.path.insert(0, sys.argv[1]); from run.terminal import replace_streams; "
        code += "replace_streams(); from tasks.worker import main; main()"
        # A session (Windows: a process group) of its own: Ctrl-C is for the parent only.
        self._process = process = subprocess.Popen(
            [sys.executable, "-c", code, str(root), mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, mark: "1"},
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        self._replies = queue.SimpleQueue()
        threading.Thread(target=_read_replies, args=(process.stdout, self._replies), daemon=True).start()
        self._close = weakref.finalize(self, _end, process, psutil.Process(process.pid), mark)
        try:
            self.memory_limited = self._exchange(process, (self._setup,), START_DEADLINE_S)
        except WorkerError as error:
            self.close()
            raise WorkerError("start", str(error)) from error
        return process

    def _exchange(self, process: subprocess.Popen, arguments: tuple, deadline_s: float) -> Any:
        """Send a request and wait for its reply."""
        self._number += 1
        try:
            data = pickle.dumps(arguments)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise WorkerError("refused", f"the problem cannot be sent to a worker ({first_line(error)})") from error
        assert process.stdin is not None
        try:
            process.stdin.write(pickle.dumps((self._number, math.ceil(deadline_s) + 1, data)))
            process.stdin.flush()
        except OSError as error:
            raise WorkerError("died", f"the worker is gone ({type(error).__name__})") from error
        reply = self._reply(process, time.monotonic() + deadline_s, deadline_s)
        if "error" in reply:
            raise WorkerError(reply["kind"], reply["error"])
        return reply["value"]

    def _reply(self, process: subprocess.Popen, until: float, deadline_s: float) -> dict[str, Any]:
        """The reply with the number of the last request."""
        while True:
            dead = process.poll() is not None  # before the look at the replies: the last one may still come
            try:
                line = self._replies.get(timeout=max(POLL_S if dead else 0.0, min(POLL_S, until - time.monotonic())))
            except queue.Empty:
                # A forked grandchild may hold the pipe open after the child's death, so there may be no end of file.
                if dead:
                    raise WorkerError("died", f"the worker ended with exit status {process.returncode}") from None
                if time.monotonic() >= until:
                    raise WorkerError("deadline", f"no value within {deadline_s:g} s") from None
                continue
            if not line.endswith(b"\n"):
                why = f"a reply is longer than {MAX_REPLY_BYTES} bytes" if line else "the worker closed its output"
                raise WorkerError("died", why)
            with contextlib.suppress(ValueError, TypeError, KeyError):  # not a reply
                reply = json.loads(line)
                if reply["number"] == self._number:
                    return reply


def _read_replies(stream: IO[bytes], replies: queue.SimpleQueue[bytes]) -> None:
    """Runs in a thread, because no system call waits for a pipe with a timeout on every system."""
    with stream:
        while line := stream.readline(MAX_REPLY_BYTES):
            replies.put(line)
    replies.put(b"")


def _end(process: subprocess.Popen, known: psutil.Process, mark: str) -> None:
    end_processes(known, mark)
    process.wait()
    with contextlib.suppress(OSError):  # the pipe may hold a request that nobody read
        if process.stdin:
            process.stdin.close()


def end_processes(root: psutil.Process, mark: str) -> None:
    """Kill `root` with all its descendants, and all processes that inherited `mark` in their environment. Not this one.

    A process in a session of its own is still a descendant. A daemon, whose parent has ended, still has the mark. Only
    a daemon that also clears its environment stays. `root` knows its start time: a new process with its number is safe.
    """
    empty = 0
    for _ in range(20):  # a process may start another one while it is being killed
        found = [process for process in _processes(root, mark) if process.pid != os.getpid()]
        if not found:
            empty += 1
            if empty == 2:
                return
            time.sleep(POLL_S)  # a process that has just begun a program shows no environment for a moment
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs([process for process in found if process != root], timeout=0.2)


def _processes(root: psutil.Process, mark: str) -> set[psutil.Process]:
    """The living ones. A zombie only waits for its parent to ask for its exit status."""
    found = set()
    with contextlib.suppress(psutil.Error):
        if root.is_running():
            found = {root, *root.children(recursive=True)}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if mark in process.environ():
                found.add(process)
    alive = set()
    for process in found:
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.add(process)
    return alive


# --- inside the child


def main() -> None:
    """Runs in the child: answer until the parent closes the pipe."""
    mark = sys.argv[-1]
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # the function reads nothing ...
    try:
        os.dup2(2, 1)  # ... and its prints go to standard error
    except OSError:  # which may be closed
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
    waiting: queue.SimpleQueue[tuple[int, int, bytes]] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests, waiting, mark), daemon=True).start()
    serve(waiting, replies)


def _read_requests(requests: IO[bytes], waiting: queue.SimpleQueue, mark: str) -> None:
    """Runs in a thread, so that the end of the parent is noticed while the function is busy. Ends all processes."""
    with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):  # the parent is gone
        while True:
            waiting.put(pickle.load(requests))
    end_processes(psutil.Process(), mark)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(0)  # threads of the function do not keep the process


def serve(requests: queue.SimpleQueue[tuple[int, int, bytes]], replies: IO[bytes]) -> None:
    """Make the function, then answer one request (number, seconds, pickled arguments) after the other."""
    function: Callable[..., Any] = _make_function
    own_pid = os.getpid()
    with open(os.devnull, "w") as nothing:
        while True:
            number, limit_s, data = requests.get()
            # Ends this process if the parent was killed and nobody else will. Its thread in C works while a C function
            # holds Python's lock.
            faulthandler.dump_traceback_later(limit_s, exit=True, file=nothing)
            try:
                value = function(*pickle.loads(data))
                if function is _make_function:
                    function, value = value
                reply = json.dumps({"number": number, "value": value})
            except RefusedError as error:
                reply = _error(number, "refused", str(error))
            except (Exception, SystemExit, KeyboardInterrupt) as error:  # a user's function may raise anything
                reply = _error(number, "raised", f"{type(error).__name__}: {first_line(error)}")
            if os.getpid() != own_pid:
                os._exit(0)  # the function forked, and both processes came back
            faulthandler.cancel_dump_traceback_later()
            with contextlib.suppress(OSError):  # the parent is gone, and the other thread ends this process
                replies.write(reply.encode() + b"\n")
                replies.flush()


def _error(number: int, kind: str, text: str) -> str:
    return json.dumps({"number": number, "kind": kind, "error": text})


def _make_function(setup: dict[str, Any]) -> tuple[Callable[..., Any], bool]:
    """The function, and whether its memory is limited."""
    sys.path[:] = setup["path"]
    module, _, maker = setup["target"].partition(":")
    function = getattr(importlib.import_module(module), maker)(*setup["arguments"])
    return function, _limit_memory(setup["memory_gib"])


def _limit_memory(gib: float) -> bool:
    """Limit the memory that this process can allocate from now on. False: the system cannot do that."""
    try:
        import resource
    except ImportError:  # Windows
        return False
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return False
    # The limit is of address space, and the imports have taken a part of it.
    limit = psutil.Process().memory_info().vms + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return True
