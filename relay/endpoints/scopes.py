"""To which kinds of end each option of a source or sink applies: what a listener has, a file has not."""

from __future__ import annotations

from typing import NamedTuple


class Scope(NamedTuple):
    """To which ends an option applies, and how to say so."""

    verbs: frozenset[str]
    schemes: frozenset[str]
    words: str


UPSTREAM_KEYS = ("balance", "health", "tries", "connect_timeout")
_SOCKETS = frozenset({"tcp", "unix"})
_LISTEN = frozenset({"listen"})
LIVE = frozenset({"listen", "connect"})
_FILES = Scope(frozenset({"file"}), frozenset({"file"}), "files")
UNIX_LISTEN = Scope(_LISTEN, frozenset({"unix"}), "unix sockets that listen on a path")
_OF_BOTH = {
    "append": _FILES,
    "rotate": _FILES,
    "fsync": _FILES,
    "direct": _FILES,
    "sidecar": _FILES,
    "mode": UNIX_LISTEN,
    "owner": UNIX_LISTEN,
    "group": UNIX_LISTEN,
    "dead_after": Scope(LIVE, frozenset({"tcp"}), "tcp"),
    "peer_eof": Scope(LIVE, _SOCKETS, "tcp and unix"),
    "burst": Scope(_LISTEN, _SOCKETS, "sinks that listen"),
    "connections": Scope(_LISTEN, _SOCKETS, "sources that listen"),
    **{key: Scope(frozenset({"connect"}), _SOCKETS, "sinks that connect") for key in UPSTREAM_KEYS},
    "limits": Scope(LIVE, _SOCKETS, "sources that listen or connect"),
}
SOURCE = _OF_BOTH | {"proxy_protocol": Scope(_LISTEN, _SOCKETS, "sources that listen")}
SINK = _OF_BOTH | {
    "proxy_protocol": Scope(frozenset({"connect"}), _SOCKETS, "sinks that connect"),
    "transparent": Scope(frozenset({"connect"}), frozenset({"tcp"}), "sinks that connect to tcp"),
}
LIMITS = {
    "connections": Scope(_LISTEN, _SOCKETS, "sources that listen"),
    "rate": Scope(_LISTEN, _SOCKETS, "sources that listen"),
    "per_peer": Scope(_LISTEN, frozenset({"tcp"}), "sources that listen on tcp"),
    "allow": Scope(_LISTEN, frozenset({"tcp"}), "sources that listen on tcp"),
    "deny": Scope(_LISTEN, frozenset({"tcp"}), "sources that listen on tcp"),
}
