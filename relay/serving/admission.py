"""Who may connect: limits of a listening source, and refusals that are counted and logged at a bounded rate."""

from __future__ import annotations

import logging
from collections import Counter
from ipaddress import IPv6Address, ip_address

from relay.endpoints.options import Limits
from relay.journal.seldom import Seldom

log = logging.getLogger("relay.serve")

BETWEEN = 1.0  # seconds between two log lines about refusals of one route


def host_of(peer: str) -> str:
    """The host in a peer's name: `1.2.3.4:5` and `[::1]:5` without port; other names as they are."""
    if peer.startswith("["):
        return peer[1 : peer.index("]")]
    host, colon, _port = peer.rpartition(":")
    return host if colon and not peer.startswith("pid:") else peer


class Admission:
    """Counts the connections of one route, and those of each host where these are limited. Lives on the route's home
    engine."""

    def __init__(self, route: str, limits: Limits) -> None:
        self._route = route
        self._limits = limits
        self._limited = bool(limits.allow or limits.deny or limits.connections or limits.per_peer)
        self._open = 0
        self._of_host: Counter[str] = Counter()
        self._expected = 0  # connected, and nobody knows yet for whom
        self.refused = 0
        self._told = Seldom(BETWEEN)

    @property
    def connections(self) -> int:
        """How many are admitted and not gone yet."""
        return self._open + self._expected

    def expect(self, peer: str) -> bool:
        """Whether there is room for a connection that has yet to say for whom it comes; it counts until `expected`."""
        if reason := self._full():
            self.refuse(peer, reason)
            return False
        self._expected += 1
        return True

    def expected(self) -> None:
        """It has said so, and asks to be admitted, or it is gone."""
        self._expected -= 1

    def admit(self, peer: str) -> bool:
        """Whether a connection from `peer` may come in; if so it counts until `leave`."""
        if self._limited and (reason := self._refusal(host_of(peer))):
            self.refuse(peer, reason)
            return False
        self._open += 1
        if self._limits.per_peer is not None:
            self._of_host[host_of(peer)] += 1
        return True

    def refuse(self, peer: str, reason: str) -> None:
        """Counts a connection that is turned away, and says so now and then."""
        self.refused += 1
        if count := self._told():
            log.warning(
                "%s: %s refused: %s (%d refused so far)",
                self._route,
                peer,
                reason,
                self.refused,
                extra={
                    "event": "refused",
                    "route": self._route,
                    "peer": peer,
                    "reason": reason,
                    "count": count,
                },
            )

    def leave(self, peer: str) -> None:
        """A connection that was admitted is gone."""
        self._open -= 1
        if self._limits.per_peer is not None:
            host = host_of(peer)
            self._of_host[host] -= 1
            if self._of_host[host] <= 0:
                del self._of_host[host]

    def _refusal(self, host: str) -> str:
        limits = self._limits
        if limits.allow or limits.deny:
            reason = self._by_network(host)
            if reason:
                return reason
        if reason := self._full():
            return reason
        if limits.per_peer is not None and self._of_host[host] >= limits.per_peer:
            return f"{limits.per_peer} connections from {host} are open already (limits.per_peer)"
        return ""

    def _full(self) -> str:
        most = self._limits.connections
        if most is not None and self.connections >= most:
            return f"{most} connections are open already (limits.connections)"
        return ""

    def _by_network(self, host: str) -> str:
        try:
            address = ip_address(host.partition("%")[0])
        except ValueError:
            return ""  # a unix peer has no address
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        for network in self._limits.deny:
            if address.version == network.version and address in network:
                return f"{network} is denied (limits.deny)"
        if self._limits.allow and not any(
            address.version == network.version and address in network for network in self._limits.allow
        ):
            return "it is in no network of limits.allow"
        return ""
