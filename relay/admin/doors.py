"""The sockets at which a running relay can be asked and told.

They open before the routes do and close after all of them: readiness is answered from the first moment to the last.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from relay.admin.desk import Desk
from relay.admin.ledger import Ledger
from relay.admin.listeners import Client, Listeners
from relay.admin.where import default_place
from relay.config.models import Admin
from relay.endpoints import tcp, unix
from relay.endpoints.address import Address
from relay.endpoints.listening import Bound
from relay.errors import EndpointError, UsageError
from relay.serving.server import Server

log = logging.getLogger("relay.admin")

MODE = 0o600  # of the unix socket: whoever may connect may tell the relay to end


@contextlib.contextmanager
def opened(server: Server, ledger: Ledger, config: str, owner: tuple[int, int] = (-1, -1)) -> Iterator[Desk]:
    """The desk of `server`, at the sockets that its configuration names or at the default one; closed at the end.

    A unix socket is given to `owner`, a user and a group by number, whom relay will be. Raises SourceError when a
    socket that is named cannot be had; the default one is done without then.
    """
    admin = server.config.admin
    desk = Desk(server, ledger, config, remote=admin is not None and admin.remote)
    bounds = _by_default(owner) if admin is None else _named(admin, owner)
    if not bounds:
        yield desk
        return

    if owner != (-1, -1):
        # whom relay will be may not be able to read it any more
        import relay.admin.conversation  # noqa: F401 - so that `talk` has it

    def talk(client: Client) -> None:
        # HTTP comes with it, which a relay that nobody asks does without
        from relay.admin.conversation import Conversation

        Conversation(client, desk)

    listeners = Listeners(bounds, talk)
    listeners.start()
    for address in listeners.addresses:
        log.info("admin: listening on %s", address, extra={"event": "admin", "address": address})
    try:
        yield desk
    finally:
        listeners.close()


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
