"""HTTP with one client of the admin sockets: one request, one answer, then it is closed.

The parsing is the standard library's (http.server). What it does not bound is bounded here: a request's head and body
have a size, the listener cuts off who takes too long. What changes something is a POST over the unix socket, whose
mode says who may; over tcp there are only answers. A name in `Host` that is not this machine's own is refused on tcp:
a page in a browser could have had it pointed here.
"""

from __future__ import annotations

import io
import json
import logging
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qs, urlsplit

from relay.admin.desk import Desk, NotDone
from relay.admin.listeners import Client
from relay.admin.status import plain
from relay.journal.secrets import hidden

log = logging.getLogger("relay.admin")

LARGEST = 16 << 10  # bytes of a request's head, and of its body
TEXT = "text/plain; charset=utf-8"
JSON = "application/json"
HTML = "text/html; charset=utf-8"
# nothing is loaded from anywhere, nothing runs, nobody frames it
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


class TooLarge(Exception):
    """The head of a request is longer than it may be."""


class BoundedReader(io.RawIOBase):
    """Reads from a socket's file, LARGEST bytes in all."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._left = LARGEST

    def readline(self, size: int | None = -1, /) -> bytes:
        """A line; TooLarge when the head is too long."""
        line: bytes = self._file.readline(self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise TooLarge
        return line

    def body(self, size: int) -> bytes:
        """What follows the head."""
        found: bytes = self._file.read(size)
        return found

    def close(self) -> None:
        """Closes the file; the socket is the client's."""
        self._file.close()
        super().close()


class Conversation(BaseHTTPRequestHandler):
    """One request of `client`, answered from `desk`."""

    def __init__(self, client: Client, desk: Desk) -> None:
        self._client = client
        self._desk = desk
        super().__init__(client.sock, ("", 0), None)  # type: ignore[arg-type] # it is not asked for anything

    def setup(self) -> None:
        """Bounds what is read."""
        super().setup()
        self._reader = BoundedReader(self.rfile)
        self.rfile = self._reader  # type: ignore[assignment] # all that is used of a file

    def handle(self) -> None:
        """One request."""
        try:
            super().handle()
        except TooLarge:
            self.requestline, self.request_version, self.command = "", "HTTP/1.0", "GET"
            self._say(431, f"the head of a request may have {LARGEST} bytes")

    def do_GET(self) -> None:
        """What there is to see."""
        self._client.asked()
        path = urlsplit(self.path).path
        if not self._may_be_asked():
            return
        show = {
            "/": self._page,
            "/livez": self._live,
            "/readyz": self._ready,
            "/metrics": self._metrics,
            "/api/v1/status": self._status,
            "/api/v1/routes": self._routes,
        }.get(path)
        if show is not None:
            show()
        elif path in ORDERS:
            self._say(405, f"{path} takes POST, over the unix socket", Allow="POST")
        else:
            self._say(404, f"there is nothing at {path}")

    do_HEAD = do_GET  # noqa: N815 - the library's name for it

    def do_POST(self) -> None:
        """What changes something."""
        path = urlsplit(self.path).path
        order = ORDERS.get(path)
        if order is None:
            self._say(404 if path != "/" else 405, f"nothing can be told to {path}")
        elif not self._client.local:
            self._say(403, "what changes something is told over the unix socket alone")
        elif "Origin" in self.headers or "Sec-Fetch-Site" in self.headers:
            self._say(403, "no page may tell a relay what to do")
        else:
            given = self._body()
            if given is not None:
                self._client.asked()
                self._order(order[0], given)

    def _order(self, order: str, given: dict[str, Any]) -> None:
        takes = ORDERS[f"/api/v1/{order}"][1]
        if set(given) != takes:
            self._say(400, f"'{order}' does not take {', '.join(sorted(given)) or 'nothing'}")
            return
        try:
            answer = getattr(self._desk, order)(**given)
        except NotDone as error:
            self._answer(error.status, JSON, _encoded({"ok": False, **error.data}))
        else:
            self._answer(200, JSON, _encoded({"ok": True, **answer}))

    def _body(self) -> dict[str, Any] | None:
        """The mapping that was sent, {} for none; None when that was refused."""
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not length.isdigit():
            self._say(411, "a body has a Content-Length")
            return None
        if len(length) > 9 or int(length) > LARGEST:
            self._say(413, f"a body may have {LARGEST} bytes")
            return None
        raw = self._reader.body(int(length))
        if len(raw) < int(length):
            return None  # it went away
        try:
            given = json.loads(raw or b"{}")
        except ValueError:
            given = None
        if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
            self._say(400, "the body is no JSON object")
            return None
        return given

    def _may_be_asked(self) -> bool:
        """Whether the request means this relay, and no name that somebody had pointed here."""
        if self._client.local or self._desk.remote:
            return True
        host = self.headers.get("Host", "")
        name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
        try:
            known = name in ("", "localhost") or ip_address(name) is not None
        except ValueError:
            known = False
        if not known:
            self._say(403, "ask by address, or as localhost")
        return known

    # -- what there is to see

    def _live(self) -> None:
        good, words = self._desk.live()
        self._say(200 if good else 503, words)

    def _ready(self) -> None:
        good, words = self._desk.ready()
        self._say(200 if good else 503, words)

    def _page(self) -> None:
        wanted = parse_qs(urlsplit(self.path).query, max_num_fields=8).get("route", [""])
        self._answer(200, HTML, self._desk.page(wanted[0]).encode(errors="replace"))

    def _metrics(self) -> None:
        body, kind = self._desk.metrics(self.headers.get("Accept", ""))
        self._answer(200, kind, body)

    def _status(self) -> None:
        self._answer(200, JSON, _encoded(plain(self._desk.status())))

    def _routes(self) -> None:
        self._answer(200, JSON, _encoded({"routes": plain(self._desk.status().routes)}))

    # -- answers

    def _say(self, code: int, words: str, **headers: str) -> None:
        self._answer(code, TEXT, f"{words}\n".encode(errors="replace"), **headers)

    def _answer(self, code: int, kind: str, body: bytes, **headers: str) -> None:
        self._client.answered()
        body = hidden(body.decode(errors="replace")).encode()
        self.close_connection = True
        self.send_response(code)
        told = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Connection": "close",
            **headers,
        }
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        """Who answers."""
        return "relay"

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses, in the same form."""
        self.command = getattr(self, "command", None) or "GET"
        self.request_version = "HTTP/1.0"  # one that could not be read is no older than that
        self._say(code, message or HTTPStatus(code).phrase)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are no news."""
        log.debug("admin: %s", format % arguments)


# what can be told: the desk's method, and what it takes
ORDERS: dict[str, tuple[str, set[str]]] = {
    "/api/v1/reload": ("reload", set()),
    "/api/v1/drain": ("drain", set()),
    "/api/v1/set": ("set", {"route", "stage", "values"}),
}


def _encoded(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False).encode(errors="replace") + b"\n"
