"""Which connections are paced."""

from __future__ import annotations

import socket

import pytest
from peers import accept, tcp_listener

from relay.endpoints import pacing
from relay.endpoints.pacing import unpace, within


def congestion(sock: socket.socket) -> str:
    """Which control a connection uses."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def use(sock: socket.socket, control: str) -> None:
    """Sets it; skips where the kernel has none of that name, or lets nobody have it."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control.encode())
    except OSError as error:
        pytest.skip(f"tcp congestion control {control}: {error.strerror} (modprobe tcp_{control})")


@pytest.mark.parametrize(
    ("host", "answer"), [("127.0.0.2", True), ("::1", True), ("10.0.0.1", False), ("x", False)]
)
def test_what_is_within_the_machine(host: str, answer: bool) -> None:
    """Loopback addresses are; nothing is known of others."""
    assert within(host) == answer


@pytest.mark.parametrize(("host", "control"), [("127.0.0.1", "reno"), ("10.0.0.1", "bbr")])
def test_only_connections_within_the_machine_are_not_paced(
    monkeypatch: pytest.MonkeyPatch, host: str, control: str
) -> None:
    """BBR gives way to reno for a loopback address, and stays for any other."""
    monkeypatch.setattr(pacing, "paced", lambda: True)
    with socket.socket() as sock:
        use(sock, "bbr")
        unpace(sock, host)
        assert congestion(sock) == control


def test_whoever_connects_to_a_loopback_address_is_not_paced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is accepted there has the listener's control, so the listener has reno in place of BBR."""
    monkeypatch.setattr(pacing, "paced", lambda: True)
    with tcp_listener() as (listener, _), socket.socket() as sock:
        use(listener, "bbr")
        unpace(listener, "127.0.0.1")
        sock.connect(listener.getsockname())
        with accept(listener) as accepted:
            assert congestion(accepted) == "reno"
