"""The sockets at which a running relay can be asked and told.

They open before the routes do and close after all of them: readiness is answered from the first moment to the last.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from relay.admin.ledger import Ledger
from relay.admin.listeners import Client, Listeners
from relay.admin.where import default_place
from relay.config.models import Admin
from relay.endpoints import tcp, unix
from relay.endpoints.address import Address
from relay.endpoints.listening import Bound
from relay.errors import EndpointError, UsageError
from relay.serving.server import Server

if TYPE_CHECKING:
    from relay.admin.desk import Desk

log = logging.getLogger("relay.admin")

MODE = 0o600  # of the unix socket: whoever may connect may tell the relay to end


@contextlib.contextmanager
def opened(server: Server, ledger: Ledger, config: str, owner: tuple[int, int] = (-1, -1)) -> Iterator[None]:
    """A desk of `server` at the sockets that its configuration names, or at the default one, until the end.

    A unix socket is given to `owner`, a user and a group by number, whom relay will be. Raises SourceError when a
    socket that is named cannot be had; the default one is done without then.
    """
    admin = server.config.admin
    bounds = _by_default(owner) if admin is None else _named(admin, owner)
    if not bounds:
        yield
        return
    if owner != (-1, -1):  # whom relay will be may not be able to read it any more
        from relay.admin import conversation, desk  # noqa: F401 - so that a client's thread has them
    desks = _Desks(server, ledger, config, remote=admin is not None and admin.remote)
    listeners = Listeners(bounds, desks.talk, partial(_anew, owner))
    listeners.start()
    for address in listeners.addresses:
        log.info("admin: listening on %s", address, extra={"event": "admin", "address": address})
    server.on_reopen = listeners.rebind
    try:
        yield
    finally:
        listeners.close()


class _Desks:
    """The desk, made when the first client comes: a relay that nobody asks does without HTTP and all that."""

    def __init__(self, server: Server, ledger: Ledger, config: str, *, remote: bool) -> None:
        self._made_of = (server, ledger, config)
        self._remote = remote
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._desk: Desk | None = None

    def talk(self, client: Client) -> None:
        """On the client's thread."""
        from relay.admin import conversation, desk

        with self._lock:
            if self._desk is None:
                self._desk = desk.Desk(*self._made_of, began=self._began, remote=self._remote)
        conversation.Conversation(client, self._desk)


def _anew(owner: tuple[int, int], bound: Bound) -> list[Bound]:
    """Listens once more where a unix socket's file was."""
    return unix.bind(Address("unix", path=bound.key[1]), mode=MODE, owner=owner[0], group=owner[1])


def _named(admin: Admin, owner: tuple[int, int]) -> list[Bound]:
    bounds: list[Bound] = []
    try:
        if admin.socket is not None:
            bounds += unix.bind(admin.socket, mode=MODE, owner=owner[0], group=owner[1])
        if admin.http is not None:
            bounds += tcp.bind(admin.http, tcp.places(admin.http))
    except EndpointError:
        for bound in bounds:
            bound.close()
        raise
    return bounds


def _by_default(owner: tuple[int, int]) -> list[Bound]:
    try:
        place: Address | None = default_place()
        if place is None:
            return []
        if place.scheme == "tcp":
            return _named(Admin(http=place), owner)
        return unix.bind(place, mode=MODE, owner=owner[0], group=owner[1])
    except (EndpointError, UsageError, ValueError) as error:
        log.warning(
            "there is no admin socket, relay goes on without: %s; give this one its own with 'admin: {socket: ...}'",
            error,
            extra={"event": "no_admin"},
        )
        return []
