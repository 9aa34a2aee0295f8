"""Functions that run a stranger's file in a child process, with limits on processor time and memory.

A chat template is a program, and the regular expressions of a tokenizer can be as slow as one. In this process neither
could be stopped: a loop inside C code does not look at signals, and a failed allocation inside the Rust library ends
the process. So such calls run in one child process. It is started at the first call, answers call after call, and is
killed when a call exceeds a limit. The next call starts a new one.

    text = call_limited("model.chat_template:render_template", source, variables)  # LimitedError: no value

Arguments and values are JSON, one line each way. While this process waits for a reply, it looks at the child's
processor time and memory several times a second (psutil), on every system. On Linux the system limits the memory as
well, so that not even a short peak exceeds it. If this process is killed, the child ends: with the pipe, or in the
middle of a call by the system's limit on processor time (not on Windows).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import psutil

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

CPU_S = 2.0  # seconds of processor time for a call; an honest one takes milliseconds
WALL_S = 60.0  # seconds; a busy machine may be slow, so this is long
MEMORY_MIB = 96  # beyond what the child holds before the call; an honest one takes ten times its text
POLL_S = 0.05
ROOT = str(Path(__file__).resolve().parent.parent)
CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from model.limited import serve; serve()"


class LimitedError(Exception):
    """A call without a value: the function raised an exception, or a limit ended it. The text is one line."""


class _Child:
    """One child process and the two pipes to it."""

    def __init__(self) -> None:
        self.parent = os.getpid()
        path = [ROOT, *(entry for entry in sys.path if entry)]
        # A session of its own: Ctrl-C in the terminal is for the parent only.
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE, json.dumps(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.close = weakref.finalize(self, _end, self.process, self.parent)
        self.used = psutil.Process(self.process.pid)
        self.replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self.process.stdout, self.replies), daemon=True).start()

    def call(self, request: bytes, cpu_s: float, memory: int) -> Any:
        """The reply to one request. Raises LimitedError, with the child killed, if there is none."""
        reason = None
        try:
            rss = self.used.memory_info().rss
            assert self.process.stdin is not None
            self.process.stdin.write(request)
            self.process.stdin.flush()
            reason, reply = self._wait(cpu_s, rss + memory, memory)
        except (OSError, psutil.Error):  # the child has ended
            reply = b""
        except BaseException:  # Ctrl-C: the reply that is still to come must not answer the next call
            self.close()
            raise
        if reply.endswith(b"\n"):
            return json.loads(reply.decode("utf-8", "surrogatepass"))
        self.close()
        raise LimitedError(reason or f"it ended the process that ran it (exit status {self.process.returncode})")

    def _wait(self, cpu_s: float, max_rss: int, memory: int) -> tuple[str | None, bytes]:
        """The reply, or the limit that the call has exceeded. Most replies come before the first look."""
        start, cpu_before = time.monotonic(), None
        while True:
            with contextlib.suppress(queue.Empty):
                return None, self.replies.get(timeout=POLL_S)
            cpu = sum(self.used.cpu_times()[:2])
            cpu_before = cpu if cpu_before is None else cpu_before
            if cpu - cpu_before > cpu_s:
                return f"it took more than {cpu_s:g} s of processor time", b""
            if self.used.memory_info().rss > max_rss:
                return f"it took more than {memory >> 20} MiB of memory", b""
            if time.monotonic() - start > WALL_S:
                return f"it took more than {WALL_S:g} s", b""


def _read(pipe: Any, replies: queue.SimpleQueue[bytes]) -> None:
    """Runs in a thread, as a pipe cannot be read with a deadline on every system. b"" stands for the end."""
    with pipe:
        for line in pipe:
            replies.put(line)
    replies.put(b"")


def _end(process: subprocess.Popen, parent: int) -> None:
    if os.getpid() != parent:  # a fork, which must leave its parent's child alone
        return
    process.kill()
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):  # what was not yet written has no reader any more
            process.stdin.close()


_lock = threading.Lock()
_child: _Child | None = None


def call_limited(target: str, *arguments: Any, cpu_s: float | None = None, memory_mib: int = MEMORY_MIB) -> Any:
    """The value of the function `target` ("module:function") for these arguments.

    cpu_s: seconds of processor time, CPU_S if it is None.
    memory_mib: MiB beyond the child's memory before the call.
    Raises LimitedError. Raises TypeError, ValueError or RecursionError if the arguments are not JSON data.
    """
    global _child
    cpu_s = CPU_S if cpu_s is None else cpu_s
    request = _line({"target": target, "arguments": arguments, "cpu_s": cpu_s, "memory": memory_mib << 20})
    with _lock:
        # After a fork the pipes are the parent's: this process needs a child of its own.
        if _child is None or not _child.close.alive or _child.parent != os.getpid():
            _child = _Child()
        reply = _child.call(request, cpu_s, memory_mib << 20)
    if "error" in reply:
        raise LimitedError(reply["error"])
    return reply["value"]


def _line(message: dict[str, Any]) -> bytes:
    """One line of JSON. Letters stay as they are: escaped, a Chinese text would be twice as long."""
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


# --- in the child


def serve() -> None:
    """Answer calls until the parent closes the pipe. A function that prints cannot disturb the replies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows, Ctrl-C reaches this process as well
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        message = json.loads(line.decode("utf-8", "surrogatepass"))
        _limit(message["cpu_s"], message["memory"])
        module, _, name = message["target"].partition(":")
        try:
            value = getattr(importlib.import_module(module), name)(*message["arguments"])
            reply = _line({"value": value})
        except BaseException as error:  # also a panic of the Rust library, which is no Exception
            text = f"{type(error).__name__}: {' '.join(str(error)[:1000].split())}"
            reply = _line({"error": text[:300].removesuffix(": ")})
        replies.write(reply)
        replies.flush()


def _limit(cpu_s: float, memory: int) -> None:
    """Limits of the system, counted from what this process has used. That of processor time is the last resort."""
    if resource is None:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _set_soft(resource.RLIMIT_CPU, int(sum(os.times()[:2]) + cpu_s) + 2)
    statm = Path("/proc/self/statm")
    if statm.exists():  # Linux: the limit is one of address space
        _set_soft(resource.RLIMIT_AS, int(statm.read_text().split()[0]) * resource.getpagesize() + memory)


def _set_soft(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
