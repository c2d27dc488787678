"""The status page: of a real relay, in a real browser where there is one; what it says, and what it lets nobody do."""

from __future__ import annotations

import re
import signal
import socket
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from admins import SOCKET, asked, http_port, send
from browser import browser
from peers import PATIENCE, eventually, payload, tcp_listener
from relays import ROOT, serving

from relay.admin.picture import picture
from relay.admin.status import RouteStatus, SinkStatus
from relay.admin.streams import known_sinks
from relay.config.load import load
from relay.kernel.probe import machine
from relay.planning.plan import make_plan

ADMIN = f"admin: {{socket: 'unix://{SOCKET}', http: 'tcp://127.0.0.1:0'}}\n"
EVIL = "<script>alert(1)</script>"
ROUTES = """drain: 0s
routes:
  camera:
    source: {{listen: 'tcp://127.0.0.1:0'}}
    stages:
      - tee: {{to: {{file: '{{id}}.bin'}}, on_slow: spill}}
      - tee: {{to: {{connect: '{away}'}}, on_slow: {{policy: drop, after: 100ms}}}}
    sink: {{listen: 'tcp://127.0.0.1:0'}}
  "{evil}":
    source: {{listen: 'tcp://127.0.0.1:0'}}
    sink: {{file: '{evil_path}/{{id}}.bin'}}
  web:
    source: {{listen: 'tcp://127.0.0.1:0'}}
    duplex: true
    sink: {{connect: '{away}'}}
"""


def config(away: str) -> str:
    """Three routes, one of them named by somebody who means no good; `away` is where nobody listens."""
    return ADMIN + ROUTES.format(away=away, evil=EVIL, evil_path="a><img src=x onerror=alert(2)>")


def nobody() -> str:
    """An address of this machine at which nobody listens."""
    with tcp_listener() as (_sock, address):
        return address


def reset(sock: socket.socket) -> bool:
    """Whether its peer has reset it."""
    try:
        return sock.recv(1) is None
    except ConnectionResetError:
        return True


def pictures(html: str) -> list[ElementTree.Element]:
    """The pictures of a page, each read as XML."""
    return [ElementTree.fromstring(one) for one in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def words(svg: ElementTree.Element) -> str:
    """All text in a picture."""
    return " ".join(svg.itertext())


def test_the_page_shows_routes_and_sessions(tmp_path: Path) -> None:
    """Each route has a row and a picture with its hops, sinks and methods; a session that is over, with its reason."""
    with serving(config(nobody()), tmp_path) as process:
        process.said("ready")
        ports = [int(a.rpartition(":")[2]) for a in process.addresses(4)]
        camera, web = ports[1], ports[3]
        with socket.create_connection(("127.0.0.1", camera), timeout=PATIENCE) as sock:
            sock.sendall(payload(1, 3 << 20))
            html = eventually(
                lambda: (page := asked(tmp_path / SOCKET, "/")[1]) and "3.0 MiB" in page and page,
                "it has come",
            )
            drawn = {words(one).split("route ")[1].split(",")[0]: one for one in pictures(html)}
            of_camera, of_evil, of_web = drawn["camera"], drawn[EVIL], drawn["web"]
            assert "tee" in words(of_camera)
            assert "{id}.bin" in words(of_camera)
            assert "0 subscribers" in words(of_camera)
            assert "splice" in words(of_camera) or "copy" in words(of_camera)
            assert "no stream" in words(of_web)
            assert "listens on" in html
            assert EVIL in words(of_evil)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1)
        with socket.socket() as sock:
            sock.settimeout(PATIENCE)
            if not sock.connect_ex(("127.0.0.1", web)):  # else it was reset within the call
                eventually(lambda: reset(sock), "it is reset: nobody listens behind it", sock)
        process.sessions(2)
        html = eventually(
            lambda: (page := asked(tmp_path / SOCKET, "/")[1]).count("ECONNREFUSED") and page, "both are told"
        )
        assert "Last sessions" in html
        one = asked(tmp_path / SOCKET, "/?route=camera")[1]
        assert len(pictures(one)) == 1
        assert "There is no route x&lt;b&gt;" in asked(tmp_path / SOCKET, "/?route=x%3Cb%3E")[1]


def test_nothing_that_others_named_becomes_markup(tmp_path: Path) -> None:
    """Names of routes, paths and peers are escaped everywhere, and no resource is loaded from elsewhere."""
    with serving(config(nobody()), tmp_path) as process:
        process.said("ready")
        for path in ("/", f"/?route={EVIL}", "/?route=%22%3E%3Cscript%3E"):
            status, html = asked(tmp_path / SOCKET, path.replace("<", "%3C").replace(">", "%3E"))
            assert status == 200
            assert "<script" not in html
            assert "<img" not in html
            assert not re.search(r"(src|href)=[\"']?(https?:)?//", html)
            assert re.findall(r"https?://[^\"]*", html.replace("http://www.w3.org/2000/svg", "")) == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_route_can_be_drawn(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a plan has, its picture shows: no two boxes in one place, every sink's address, and sound XML."""
    for variable in re.findall(r"\$\{(\w+)\}", path.read_text()):
        monkeypatch.setenv(variable, "x")
    config = load(path)
    for plan in make_plan(config, machine()).routes:
        sinks = tuple(
            SinkStatus(name, where, policy) for name, where, policy in known_sinks(config.routes[plan.name])
        )
        status = RouteStatus(plan.name, "waiting", plan.duplex, "", (), 0, 0, 0, 0, 0, {}, sinks, (), ())
        svg = ElementTree.fromstring(picture(plan, status))
        spots = [(box.get("x"), box.get("y")) for box in svg.iter("{http://www.w3.org/2000/svg}rect")]
        assert len(set(spots)) == len(spots) >= 2
        told = words(svg)
        for sink in sinks:
            assert sink.address in told


def test_a_thousand_routes(tmp_path: Path) -> None:
    """With 1,000 routes the page is there within seconds and streams flow meanwhile; each route has its row."""
    routes = "".join(
        f"  r{number}: {{source: 'unix://@{tmp_path.name}-{number}', sink: 'null:'}}\n"
        for number in range(999)
    )
    head = ADMIN + "drain: 0s\nroutes:\n  inbox: {source: 'tcp://127.0.0.1:0', sink: {file: 'in/{id}.bin'}}\n"
    with serving(head + routes, tmp_path) as process:
        process.said("ready")
        port = process.port()
        began = time.monotonic()
        status, html = asked(tmp_path / SOCKET, "/")
        took = time.monotonic() - began
        assert status == 200
        assert html.count("<tr><td><a href=") == 1000
        assert "more routes are in the table" in html
        assert len(html) < 4 << 20
        assert took < 10, f"{took:.1f} s"
        send(port, payload(1, 1 << 20))
        assert asked(tmp_path / SOCKET, "/metrics")[0] == 200
        assert "r998" in asked(tmp_path / SOCKET, "/?route=r998")[1]
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


def test_in_a_real_browser(tmp_path: Path) -> None:
    """Chromium shows the page: pictures with their boxes where they belong, colours, no script, nothing from elsewhere,
    no complaint; and the page of one route behind its link."""
    with serving(config(nobody()), tmp_path) as process:
        process.said("ready")
        base = f"http://127.0.0.1:{http_port(process)}"
        camera = int(process.addresses(2)[1].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", camera), timeout=PATIENCE) as sock, browser() as chromium:
            sock.sendall(payload(1, 2 << 20))
            chromium.open(f"{base}/")
            assert chromium.ask("document.title") == "relay"
            assert chromium.ask("document.querySelectorAll('#routes tbody tr').length") == 3
            assert chromium.ask("document.querySelectorAll('svg.pipeline').length") == 3
            assert chromium.ask("document.scripts.length + document.images.length") == 0
            # every box is drawn inside its picture, and no two are in one place
            boxes = chromium.ask(
                "[...document.querySelectorAll('svg.pipeline')].map(s => [...s.querySelectorAll('rect')].map(r => {"
                "const a = r.getBoundingClientRect(), b = s.getBoundingClientRect();"
                "const inside = a.x >= b.x && a.right <= b.right + 1 && a.bottom <= b.bottom + 1;"
                "return [a.x, a.y, a.width, a.height, inside]}))"
            )
            for picture in boxes:
                assert len(picture) >= 2
                assert all(box[4] and box[2] > 100 and box[3] > 40 for box in picture), picture
                assert len({(box[0], box[1]) for box in picture}) == len(picture)
            # text stays within its box
            assert chromium.ask(
                "[...document.querySelectorAll('g.box')].every(g => [...g.querySelectorAll('text')].every(t =>"
                "t.getBoundingClientRect().right <= g.querySelector('rect').getBoundingClientRect().right + 2))"
            )
            stroke = "getComputedStyle(document.querySelector('.box.{} rect')).stroke"
            assert chromium.ask(stroke.format("flowing")) == "rgb(47, 143, 78)"
            chromium.open(f"{base}/?route=camera")
            assert chromium.ask("document.querySelector('h2').textContent").startswith("camera")
            assert chromium.ask("document.querySelectorAll('table.streams tbody tr').length") == 1
            assert len(chromium.shot()) > 5_000
            assert chromium.complaints == []
            assert {url.split("/?")[0].rstrip("/") for url in chromium.requests} - {"data:,"} == {base}
