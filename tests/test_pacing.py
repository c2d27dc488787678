"""Which connections are paced."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from descriptors import Descriptors
from peers import accept, tcp_listener

from relay.endpoints import pacing
from relay.endpoints.pacing import needless, unpace


def congestion(sock: socket.socket) -> str:
    """Which control a connection uses."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def use(sock: socket.socket, control: str) -> None:
    """Sets it; skips where the kernel has none of that name, or lets nobody have it."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control.encode())
    except OSError as error:
        pytest.skip(f"tcp congestion control {control}: {error.strerror} (modprobe tcp_{control})")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
def test_a_connection_within_the_machine_is_not_paced(address: str) -> None:
    """BBR gives way to reno where both ends are on this machine, by whichever of its loopback addresses."""
    with tcp_listener(address) as (listener, _), socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        use(sock, "bbr")
        sock.connect(listener.getsockname())
        with accept(listener):
            unpace(sock)
            assert congestion(sock) == "reno"


def test_whoever_connects_to_a_loopback_address_is_not_paced() -> None:
    """What is accepted there has the listener's control, so the listener has reno in place of BBR."""
    with tcp_listener() as (listener, _), socket.socket() as sock:
        use(listener, "bbr")
        unpace(listener)
        sock.connect(listener.getsockname())
        with accept(listener) as accepted:
            assert congestion(accepted) == "reno"


@pytest.mark.parametrize(
    ("host", "choice", "answer"),
    [
        ("127.0.0.1", "bbr", True),
        ("::1", "bbr", True),
        ("10.0.0.1", "bbr", False),
        ("127.0.0.1", "cubic", False),
    ],
)
def test_pacing_is_needless_only_within_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, choice: str, answer: bool
) -> None:
    """Where BBR is the machine's choice a connection to loopback does without; where nothing is known, all is left."""
    monkeypatch.setattr(pacing, "CHOICE", tmp_path / "choice")
    assert not needless(host)
    (tmp_path / "choice").write_text(f"{choice}\n")
    assert needless(host) == answer


@pytest.mark.parametrize("control", ["reno", "cubic"])
def test_what_does_not_pace_is_left_alone(fds: Descriptors, control: str) -> None:
    """A connection whose control does not pace keeps it."""
    sock, _ = fds.tcp_pair()
    use(sock, control)
    unpace(sock)
    assert congestion(sock) == control


def test_other_sockets_and_broken_ones_are_left_alone(fds: Descriptors) -> None:
    """A unix socket has no such control; one that is not connected any more is no error."""
    near, _ = fds.unix_pair()
    unpace(near)
    with socket.socket() as sock:
        use(sock, "bbr")
        unpace(sock)
        assert congestion(sock) == "bbr"
