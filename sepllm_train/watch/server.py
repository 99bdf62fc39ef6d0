"""The server of the page: GET only, files of this package and the state of the runs it was given, nothing else."""

from __future__ import annotations

import errno
import io
import ipaddress
import json
import socketserver
import sys
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from socket import AF_INET6
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tqdm import tqdm

from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError
from sepllm_train.base.figures import COLOURS
from sepllm_train.compare.plots import axes_of
from sepllm_train.metrics.flops import CONVENTIONS
from sepllm_train.watch.connections import Connections, HeadReader, HeadTooLarge
from sepllm_train.watch.follow import CURVES, SCORED
from sepllm_train.watch.thin import SCALES
from sepllm_train.watch.watch import STATE_TYPE, Watch

# Seconds from refresh to refresh of an open page.
POLL = 2.0
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def serve(folders: Sequence[Path], host: str = "127.0.0.1", port: int = 8765, flops: str = "model") -> None:
    """Show run folders on a page until Ctrl-C, which is a normal end; `flops` is the convention chosen at first.

    Raises UserError for what is no folder, a folder given twice, and an address that cannot be served.
    """
    watch = Watch(folders)
    server = Server(watch, host, port, flops)
    stop = threading.Event()
    loader = threading.Thread(target=_load, args=(watch, stop), daemon=True)
    try:
        with server:
            if not server.loopback:
                say(f"warning: with --host {host} everyone who reaches this machine can read these runs: no password.")
            runs = "1 run" if len(folders) == 1 else f"{len(folders)} runs"
            say(f"Watching {runs} at {server.url} (Ctrl-C ends it)")
            loader.start()
            server.serve_forever()
    except KeyboardInterrupt:
        stop.set()
        if loader.is_alive():
            loader.join()
        say("")


def _load(watch: Watch, stop: threading.Event) -> None:
    """Read what the runs have so far, with a bar on a terminal."""
    with tqdm(total=watch.total, unit="B", unit_scale=True, desc="reading", disable=None, leave=False) as bar:
        watch.load(bar.update, stop)


class Server(ThreadingHTTPServer):
    """Listens at once; port 0 takes a free one. Raises UserError when the address cannot be had."""

    daemon_threads = True
    # Connections that come at once: of more than the usual five some would wait for a second.
    request_queue_size = 128

    def __init__(self, watch: Watch, host: str, port: int, flops: str = "model") -> None:
        self.watch = watch
        self.pages = _pages(flops)
        self.connections = Connections()
        if ":" in host:
            self.address_family = AF_INET6
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "ports are below 65536"
            raise UserError(f"Cannot serve at --host {host} --port {port}: {reason}. Choose others.") from None
        self.loopback = ipaddress.ip_address(str(self.server_address[0])).is_loopback

    def server_bind(self) -> None:
        """Bind without asking the name service for the name of the host."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def get_request(self) -> tuple[Any, Any]:
        """A new connection. Without a descriptor for it, another one makes room."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.connections.close_one()
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own."""
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        self.connections.discard(request)
        super().shutdown_request(request)

    @property
    def url(self) -> str:
        """Address for the browser."""
        name = f"[{self.server_name}]" if self.address_family == AF_INET6 else self.server_name
        return f"http://{name}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no fault; anything else is reported as usual."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers from a fixed table of paths, so that no path of a request ever reaches the filesystem."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "sepllm-train", ""
    # An answer leaves in one piece, and a silent connection is closed.
    wbufsize = -1
    timeout = 60
    # Seconds in which the head of a request must have come, and its most bytes.
    head_seconds = 10.0
    head_bytes = 16384
    server: Server

    def setup(self) -> None:
        """Read heads of requests within the limits."""
        super().setup()
        self.rfile.close()
        self._head = HeadReader(self.connection, self.timeout, self.head_seconds, self.head_bytes)
        self.rfile = io.BufferedReader(self._head)

    def handle_one_request(self) -> None:
        """Answer the next request of the connection."""
        self._head.expect()
        try:
            super().handle_one_request()
        except HeadTooLarge:
            self.close_connection = True
            self.requestline = self.request_version = self.command = ""
            self._text(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"At most {self.head_bytes:,} bytes are read.\n")
            self.wfile.flush()

    def do_GET(self) -> None:
        """Answer a request."""
        self.server.connections.asked(self.connection)
        if self.headers.get("Content-Length") or self.headers.get("Transfer-Encoding"):
            # What follows the head is not read.
            self.close_connection = True
        if self.server.loopback and not _names_loopback(self.headers.get_all("Host") or []):
            self._text(HTTPStatus.FORBIDDEN, "Only localhost is served here: open http://localhost:PORT/.\n")
            return
        try:
            url = urlsplit(self.path)
        except ValueError:
            self._text(HTTPStatus.BAD_REQUEST, "This is no address.\n")
            return
        if url.path == "/state" and not url.netloc:
            self._state(parse_qs(url.query))
        elif (page := self.server.pages.get(self.path)) is not None:
            self._answer(HTTPStatus.OK, *page)
        else:
            self._text(HTTPStatus.NOT_FOUND, "There is nothing here.\n")

    def _refuse(self) -> None:
        """Answer to every other method."""
        self.close_connection = True
        self._text(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET is served here.\n", Allow="GET")

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def _state(self, query: dict[str, list[str]]) -> None:
        """The state of the runs, or 304 when the browser has it."""
        scale = query.get("scale", ["linear"])[0]
        if scale not in SCALES:
            self._text(HTTPStatus.BAD_REQUEST, f"scale must be one of {', '.join(SCALES)}.\n")
            return
        watch = self.server.watch
        watch.refresh()
        if self.headers.get("If-None-Match") == f'"{watch.tag(scale)}"':
            self._answer(HTTPStatus.NOT_MODIFIED, None, b"", ETag=f'"{watch.tag(scale)}"')
            return
        tag, state = watch.state(scale, query.get("since", [""])[0])
        self._answer(HTTPStatus.OK, STATE_TYPE, state, ETag=f'"{tag}"')

    def _text(self, status: HTTPStatus, text: str, **headers: str) -> None:
        self._answer(status, "text/plain; charset=utf-8", text.encode(), **headers)

    def _answer(self, status: HTTPStatus, kind: str | None, content: bytes, **headers: str) -> None:
        """Send an answer; one without a `kind` has no content."""
        self.send_response(status)
        if kind is not None:
            headers |= {"Content-Type": kind, "Content-Length": str(len(content))}
        for name, value in (_HEADERS | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if kind is not None and self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests of a page that refreshes itself are no news."""


def _names_loopback(hosts: Sequence[str]) -> bool:
    """True if there is one Host header and it names this machine from inside.

    A page of a foreign name that resolves to 127.0.0.1 (DNS rebinding) would have that name in it.
    """
    if len(hosts) != 1:
        return False
    try:
        name = urlsplit(f"//{hosts[0]}").hostname
        return name == "localhost" or ipaddress.ip_address(name or "").is_loopback
    except ValueError:
        return False


def _pages(flops: str) -> dict[str, tuple[str, bytes]]:
    """Content type and content of what is served besides the state, by path."""
    folder = resources.files("sepllm_train.watch") / "page"
    pages = {
        f"/{name}": (f"{_TYPES[name.rsplit('.')[-1]]}; charset=utf-8", (folder / name).read_bytes())
        for name in ("page.html", "page.css", "page.js", "chart.js", "pointer.js", "scale.js", "table.js", "format.js")
    }
    pages["/"] = pages.pop("/page.html")
    pages["/settings"] = ("application/json", json.dumps(_settings(flops)).encode())
    return pages


def _settings(flops: str) -> dict[str, Any]:
    """Settings of the page: colours, units of the axes, conventions, columns of the curves."""
    axes = {axis.key: axis.units for convention in CONVENTIONS for axis in axes_of(convention)}
    return {
        "poll": POLL,
        "colours": COLOURS,
        "axes": axes,
        "flops": flops,
        "conventions": {key: {"label": c.label, "words": c.words} for key, c in CONVENTIONS.items()},
        "curves": {name: [*columns, "value", "mean"] for name, (_, columns) in CURVES.items()},
        "scored": [*SCORED, "value", "mean"],
    }
