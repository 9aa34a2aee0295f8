"""Serve the page of a run on the loopback address while the run goes on: `python report.py --follow runs/NAME`.

    follow(folders, build, render, port=None)      # until Ctrl-C; the exit code

`/` is the whole page. `/update?since=VERSION` is the page without its scripts, and empty (204) if no file has changed
since. Nothing is written. Only this machine can ask: the socket is bound to 127.0.0.1, and a request by another name of
the host is refused, so no other web page can read the answers (DNS rebinding).

The files are read again after a change, but not all the time, because a training uses the same cores: after a read of
1 second the next one waits for 10 seconds. It never waits longer than 15.
Werkzeug serves (https://werkzeug.palletsprojects.com). TensorBoard needs it anyway.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from werkzeug.exceptions import Forbidden, HTTPException, MethodNotAllowed, NotFound
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from run.flags import one_line
from run.terminal import say

LOOPBACK = "127.0.0.1"
FIRST_PORT, PORTS = 8765, 20  # tried in turn if no port is asked for
SHARE, LONGEST_WAIT = 10, 15.0  # a build of 1 second is not repeated for 10 seconds, any build for 15 at most
FILES = ("config.yaml", "metrics.jsonl", "samples.jsonl", "held_out.jsonl", "machine.json")
HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
WAITING = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="3">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body { font: 16px/1.5 system-ui, sans-serif; margin: 2em; color-scheme: light dark }</style>
<title>Waiting for the run</title><h1>Waiting for the first step</h1><p>The run has logged no step yet. This page looks
again every 3 seconds.</p></html>"""


class Followed:
    """The facts of the runs as they are now. Each file is read again only if it has changed.

    build: reads the runs. Raises ValueError or OSError if there is nothing to show.
    """

    def __init__(self, folders: Sequence[Path], build: Callable[[], dict[str, Any]]):
        self.folders, self.build = folders, build
        self.facts: dict[str, Any] | None = None
        self.trouble = ""  # why the newest state of the files cannot be shown
        self._version = ""
        self._not_before = 0.0
        self._lock = threading.Lock()

    def look(self) -> dict[str, Any] | None:
        """The newest facts; None before the first step. They have `version`, which changes with the files."""
        with self._lock:
            version = self._version_now()
            if version != self._version and time.monotonic() >= self._not_before:
                started = time.monotonic()
                try:
                    self.facts = self.build() | {"version": version}
                    self.trouble = ""
                except (ValueError, OSError) as error:  # a resume cuts the files, and another program may write them
                    self.trouble = one_line(error)
                self._version = version
                now = time.monotonic()
                self._not_before = now + min(LONGEST_WAIT, SHARE * (now - started))
            return self.facts

    def _version_now(self) -> str:
        found = []
        for path in (folder / name for folder in self.folders for name in FILES):
            try:
                status = path.stat()
                found.append(f"{status.st_mtime_ns:x}.{status.st_size:x}.{status.st_ino:x}")
            except OSError:
                found.append("-")
        return "_".join(found)


def application(followed: Followed, render: Callable[[dict[str, Any], bool], str]) -> Callable[..., Any]:
    """The WSGI application. render: (facts, whether with the scripts) -> the page."""

    def answer(request: Request) -> Response:
        if request.host.rsplit(":", 1)[0] not in (LOOPBACK, "localhost"):
            raise Forbidden("this page is only for this machine")
        if request.path not in ("/", "/update"):
            raise NotFound
        if request.method not in ("GET", "HEAD"):
            raise MethodNotAllowed(["GET", "HEAD"])
        facts = followed.look()
        if request.path == "/":
            return _html(WAITING if facts is None else render(facts, True))
        if followed.trouble or facts is None:
            return Response(followed.trouble, status=503, mimetype="text/plain", headers=HEADERS)
        if request.args.get("since") == facts["version"]:
            return Response(status=204, headers=HEADERS)
        return _html(render(facts, False))

    @Request.application
    def application(request: Request) -> Response | HTTPException:
        try:
            return answer(request)
        except HTTPException as error:
            return error

    return application


def _html(text: str) -> Response:
    return Response(text.encode("utf-8", "replace"), mimetype="text/html", headers=HEADERS)


class Quiet(WSGIRequestHandler):
    """Says nothing about requests."""

    def log(self, type: str, message: str, *args: Any) -> None: ...


def listen(port: int | None) -> socket.socket:
    """A socket at the port of the loopback address; None: the first free one from FIRST_PORT on.

    Raises ValueError if the port, or every one of them, is taken.
    """
    for number in [port] if port else range(FIRST_PORT, FIRST_PORT + PORTS):
        found = socket.socket()
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((LOOPBACK, number))
            found.listen()
            return found
        except OSError as error:
            found.close()
            reason = error.strerror or str(error)
    if port:
        raise ValueError(f"--port {port}: {reason}; take another port, or leave --port out")
    raise ValueError(f"ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are taken; name a free one with --port")


def follow(
    folders: Sequence[Path], build: Callable[[], dict[str, Any]], render: Callable[[dict[str, Any], bool], str],
    port: int | None = None,
) -> int:  # fmt: skip
    """Serve until Ctrl-C. Returns 0. Raises ValueError if a folder is missing or the port is taken."""
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; expected the folder of a run, such as runs/NAME")
    with listen(port) as sock:
        app = application(Followed(folders, build), render)
        number = sock.getsockname()[1]
        server = make_server(LOOPBACK, number, app, threaded=True, request_handler=Quiet, fd=sock.fileno())
        try:
            say(f"http://{LOOPBACK}:{number}/ follows {', '.join(map(str, folders))}; Ctrl-C ends it")
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        say("ended; the run goes on by itself")
    return 0
