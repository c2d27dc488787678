"""PROXY headers to and from HAProxy, nginx and curl."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from duplexes import Duplex, connected
from peers import PATIENCE, accept, eventually, program, receive_all, receive_exactly, running, tcp_listener
from proxied import behind, name_of, peer_of, trusting

from relay.endpoints.address import Address

TELLS = '"%[src]:%[src_port] %[dst]:%[dst_port]"'


@contextlib.contextmanager
def haproxy(directory: Path, body: str, *listening: socket.socket) -> Iterator[None]:
    """HAProxy with that configuration; it inherits the sockets, `fd@{0}` and so on in it."""
    config = directory / "haproxy.cfg"
    head = "global\n  maxconn 50\ndefaults\n  timeout client 20s\n  timeout server 20s\n"
    config.write_text(f"{head}  timeout connect 20s\n{body.format(*(sock.fileno() for sock in listening))}\n")
    argv = [program("haproxy"), "-db", "-f", str(config)]
    fds = [sock.fileno() for sock in listening]
    for fd in fds:
        os.set_inheritable(fd, True)
    with running(argv, pass_fds=fds, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL):
        yield


def asked(address: str) -> tuple[str, str, str]:
    """The body of a GET, and both ends of the connection it was asked over."""
    with connected(address) as client:
        ends = name_of(client), peer_of(client)
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return receive_all(client).rpartition(b"\r\n\r\n")[2].decode(), *ends


def is_answered(address: str) -> bool:
    """Whether the server behind `address` is at work."""
    try:
        return bool(asked(address)[0])
    except ConnectionResetError:
        return False


@pytest.mark.parametrize("version", ["send-proxy", "send-proxy-v2"])
def test_from_haproxy(version: str, tmp_path: Path) -> None:
    """HAProxy in front sends a header of either version: relay names the client that connected to HAProxy."""
    with tcp_listener() as (front, address), behind(trusting()) as (duplex, listening):
        to = Address.parse(duplex.address)
        body = (
            f"listen l\n  mode tcp\n  bind fd@{{0}}\n  server s {to.host}:{to.port} {version}"
            + " proxy-v2-options unique-id\n  unique-id-format %[uuid()]" * (version == "send-proxy-v2")
        )
        with haproxy(tmp_path, body, front), connected(address) as client:
            own = name_of(client)
            client.sendall(b"question")
            with accept(listening) as server:
                assert receive_exactly(server, 8) == b"question"
                server.sendall(b"answer")
            assert receive_all(client) == b"answer"
            client.close()
            assert duplex.record().peer == own


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_to_haproxy(version: str, tmp_path: Path) -> None:
    """HAProxy behind accepts the header of either version: it knows who connected to relay, and where."""
    with tcp_listener() as (back, address):
        body = (
            "frontend f\n  mode http\n  bind fd@{0} accept-proxy\n"
            f"  http-request return status 200 content-type text/plain lf-string {TELLS}"
        )
        sink = {"connect": address, "proxy_protocol": version}
        with haproxy(tmp_path, body, back), Duplex("tcp://127.0.0.1:0", sink) as duplex:
            told, client, service = asked(duplex.address)
            assert told == f"{client} {service}"


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_between_two_haproxies(version: str, tmp_path: Path) -> None:
    """HAProxy, relay, HAProxy: the last one knows the client of the first, and where that had connected to."""
    with tcp_listener() as (front, first), tcp_listener() as (back, address):
        sink = {"connect": address, "proxy_protocol": version}
        with Duplex(trusting(), sink) as duplex:
            to = Address.parse(duplex.address)
            body = (
                "frontend f\n  mode http\n  bind fd@{1} accept-proxy\n"
                f"  http-request return status 200 content-type text/plain lf-string {TELLS}\n"
                f"listen l\n  mode tcp\n  bind fd@{{0}}\n  server s {to.host}:{to.port} send-proxy-v2"
            )
            with haproxy(tmp_path, body, front, back):
                told, client, service = asked(first)
                assert told == f"{client} {service}"
                assert duplex.record().peer == client


def test_from_curl(tmp_path: Path) -> None:
    """curl sends a header of version 1, relay one of version 2: HAProxy behind knows where curl's connection is."""
    with tcp_listener() as (back, address):
        body = (
            "frontend f\n  mode http\n  bind fd@{0} accept-proxy\n"
            f"  http-request return status 200 content-type text/plain lf-string {TELLS}"
        )
        with haproxy(tmp_path, body, back):
            with Duplex(trusting(), {"connect": address, "proxy_protocol": "v2"}) as duplex:
                to = Address.parse(duplex.address)
                argv = [program("curl"), "-sS", "--haproxy-protocol", f"http://{to.host}:{to.port}/"]
                ran = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=True)
                record = duplex.record()
                assert ran.stdout == f"{record.peer} {to.host}:{to.port}"


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_to_nginx(version: str, tmp_path: Path) -> None:
    """nginx behind, on a unix socket: it knows who connected to relay, and where."""
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid; error_log stderr;\nevents {{}}\nhttp {{\n"
        f"  access_log off; client_body_temp_path {tmp_path}; proxy_temp_path {tmp_path};\n"
        f"  fastcgi_temp_path {tmp_path}; uwsgi_temp_path {tmp_path}; scgi_temp_path {tmp_path};\n"
        f"  server {{ listen unix:{tmp_path}/s proxy_protocol;\n"
        '    return 200 "$proxy_protocol_addr:$proxy_protocol_port '
        '$proxy_protocol_server_addr:$proxy_protocol_server_port"; } }\n'
    )
    argv = [program("nginx"), "-p", str(tmp_path), "-c", str(config)]
    sink = {"connect": f"unix://{tmp_path}/s", "proxy_protocol": version}
    with running(argv, stderr=subprocess.DEVNULL), Duplex("tcp://127.0.0.1:0", sink) as duplex:
        eventually(lambda: is_answered(duplex.address), "nginx listens")
        told, client, service = asked(duplex.address)
        assert told == f"{client} {service}"
