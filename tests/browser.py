"""A headless Chromium that is told what to do over a pipe (the DevTools protocol): a page as it really looks."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers import PATIENCE, program, wait_for

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--no-first-run",
    "--disable-background-networking",
    "--remote-debugging-pipe",
    "--window-size=1280,900",
)


class Browser:
    """One page. `requests` are the addresses it loaded, `complaints` what its console said."""

    def __init__(self, to: int, back: int) -> None:
        self._to = to
        self._back = back
        self._rest = b""
        self._number = 0
        self._session = ""
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def begin(self) -> None:
        """Opens an empty page."""
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.tell(f"{domain}.enable")

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            got = self._next()
            if got.get("id") == number:
                assert "error" not in got, got
                return dict(got["result"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            wait_for(self._back, patience=3 * PATIENCE)
            piece = os.read(self._back, 1 << 16)
            assert piece, "the browser ended"
            self._rest += piece
        raw, _nul, self._rest = self._rest.partition(b"\0")
        got: dict[str, Any] = json.loads(raw)
        given = got.get("params", {})
        match got.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(given["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(given["entry"]["text"])
            case "Runtime.exceptionThrown" | "Page.javascriptDialogOpening":
                self.complaints.append(str(given))
        return got

    def open(self, url: str) -> None:
        """Loads a page, to its end."""
        self.tell("Page.navigate", url=url)
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def ask(self, expression: str) -> Any:
        """What a line of script says about the page; what the page allows itself does not bind it."""
        answer = self.tell("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def shot(self) -> bytes:
        """The page as a PNG."""
        return base64.b64decode(self.tell("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium of its own, ended at the end; skips the test, naming the package, where there is none."""
    path = program("chromium")
    reads, to = os.pipe()
    back, writes = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:

        def wire() -> None:
            first, second = os.dup(reads), os.dup(writes)  # neither of the two may be in the other's place
            os.dup2(first, 3)
            os.dup2(second, 4)

        process = subprocess.Popen(
            [path, *FLAGS, f"--user-data-dir={home}"],
            preexec_fn=wire,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": home},
            cwd=Path(home),
        )
        os.close(reads)
        os.close(writes)
        try:
            one = Browser(to, back)
            one.begin()
            yield one
            one._session = ""
            with contextlib.suppress(AssertionError):
                one.tell("Browser.close")
        finally:
            os.close(to)
            os.close(back)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
