"""From settings to ends at work: which class serves which address."""

from __future__ import annotations

import socket
from collections.abc import Callable

from relay.endpoints.address import Address
from relay.endpoints.base import Sink, Source
from relay.endpoints.fifo import FifoSink, FifoSource
from relay.endpoints.file import FileSink, FileSource
from relay.endpoints.line import Writer
from relay.endpoints.null import NullSink, NullSource
from relay.endpoints.options import DEAD_AFTER
from relay.endpoints.settings import SinkSettings
from relay.endpoints.socket import SocketSource
from relay.endpoints.stdio import InheritedSource, inherited_sink
from relay.endpoints.tcp import TcpSink, TcpSource
from relay.endpoints.unix import UnixSink, UnixSource
from relay.endpoints.written import Writing
from relay.engine import Engine
from relay.errors import RelayBug
from relay.ways import Ways


def make_source(engine: Engine, address: Address, *, dead_after: float = DEAD_AFTER) -> Source:
    """The source that connects to or reads `address`; one that listens is made by its listener instead."""
    match address.scheme:
        case "tcp":
            return TcpSource(engine, address, dead_after=dead_after)
        case "unix":
            return UnixSource(engine, address)
        case "file":
            return FileSource(engine, address.path)
        case "fifo":
            return FifoSource(engine, address.path)
        case "fd":
            return InheritedSource(engine, address.number)
        case "stdio":
            return InheritedSource(engine, 0)
        case "null":
            return NullSource(engine)
    raise RelayBug(f"no source for {address}")


def accepted(
    engine: Engine, address: Address, sock: socket.socket, peer: str, local: str, ways: Ways
) -> Source:
    """The source for a connection that came in on `address`; `local` is where the peer had connected to."""
    if address.scheme == "shared":
        from relay.endpoints.shared import SharedSource  # few routes have one, and it brings a lot along

        return SharedSource(
            engine, str(address), sock, peer, spliced=ways.from_source("memfd").method == "splice"
        )
    source = SocketSource(engine, str(address), sock, peer, local)
    source.scheme = address.scheme
    return source


def make_sink(
    engine: Engine,
    settings: SinkSettings,
    path: Callable[[], str],
    *,
    in_place: bool,
    writer: Writer | None = None,
    copies: str = "",
    patience: float = 0.0,
) -> Sink:
    """The sink that connects to or writes `settings.address`; `path` is a file's, with placeholders filled.

    `in_place`: a plain path of a stream without end is not written as `.part`. `writer` is who appends to it for
    streams that take turns. `copies` says why bytes are to be copied to it. `patience`: for how many seconds a refused
    connection is tried again.
    """
    address = settings.address
    close_with_peer = settings.peer_eof == "close"
    match address.scheme:
        case "tcp":
            return TcpSink(
                engine,
                address,
                close_with_peer=close_with_peer,
                patience=patience,
                dead_after=settings.dead_after,
            )
        case "unix":
            return UnixSink(engine, address, close_with_peer=close_with_peer, patience=patience)
        case "file":
            return FileSink(
                engine,
                path,
                Writing(
                    append=settings.append,
                    writer=writer,
                    in_place=in_place and settings.rotate is None,
                    keep=bool(settings.placeholders) or settings.rotate is not None,
                    fsync_at_close=settings.fsync == "close",
                    fsync_every=settings.fsync if isinstance(settings.fsync, float) else 0.0,
                    rotate_size=(settings.rotate.size or 0) if settings.rotate else 0,
                    rotate_every=(settings.rotate.every or 0.0) if settings.rotate else 0.0,
                    direct=settings.direct,
                    copy=bool(copies),
                    sidecar=settings.sidecar or "",
                ),
            )
        case "shared":
            from relay.endpoints.shared import SharedSink  # few routes have one, and it brings a lot along

            return SharedSink(engine, address, patience=patience)
        case "fifo":
            return FifoSink(engine, address.path)
        case "fd":
            return inherited_sink(engine, address.number, copies=copies)
        case "stdio":
            return inherited_sink(engine, 1, copies=copies)
        case "null":
            return NullSink(engine)
    raise RelayBug(f"no sink for {address}")
