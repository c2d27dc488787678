"""Urgent data (tcp) on one-way routes: left out, as by a reader who does not ask for it, and in nobody's way."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from peers import accept, receive_exactly, tcp_listener
from relays import Relay

from relay.endpoints.address import Address


@pytest.mark.parametrize("method", ["zero-copy", "copy"])
@pytest.mark.parametrize("mirrored", [False, True], ids=["alone", "beside a tee"])
def test_what_is_around_urgent_data_arrives(method: str, mirrored: bool) -> None:
    """Splice stops before an urgent byte and says that the socket is empty; what follows it comes all the same."""
    with tcp_listener() as (listening, address):
        route: dict[str, Any] = {"source": "tcp://127.0.0.1:0", "sink": address, "method": method}
        if mirrored:
            route["stages"] = [{"tee": {"to": "null:"}}]
        with Relay(route) as relay:
            to = Address.parse(relay.bound[0])
            with socket.create_connection((to.host, to.port)) as client, accept(listening) as receiver:
                for round_ in range(20):
                    client.sendall(b"before")
                    client.send(b"!", socket.MSG_OOB)
                    client.sendall(b"after")
                    assert receive_exactly(receiver, 11) == b"beforeafter", round_
