"""How many descriptors, pipes and pipe pages each part of a pipeline takes.

Facts (man 7 pipe; fs/pipe.c): a pipe has two descriptors and is charged, by its capacity in pages, to the
user who made it.

What this means here: each function names the class whose descriptors it counts; a test compares.
"""

from __future__ import annotations

from dataclasses import dataclass

from relay.endpoints.address import Address
from relay.endpoints.options import OnSlow
from relay.endpoints.settings import SinkSettings
from relay.kernel.exchange import PIPES
from relay.kernel.pipe import DEFAULT_CAPACITY, LARGEST_CAPACITY
from relay.kernel.probe import Machine
from relay.log.segment import segment_size

PAGE = 4096
FRESH = 64 * 1024  # bytes of a pipe nobody enlarged


@dataclass(frozen=True)
class Need:
    """What something takes while it is open. `at_most`: what it meets decides when it is opened."""

    descriptors: int = 0
    pipes: int = 0
    pages: int = 0
    at_most: bool = False

    def __add__(self, other: Need) -> Need:
        return Need(
            self.descriptors + other.descriptors,
            self.pipes + other.pipes,
            self.pages + other.pages,
            self.at_most or other.at_most,
        )

    def times(self, count: int) -> Need:
        """For `count` of them."""
        return Need(self.descriptors * count, self.pipes * count, self.pages * count, self.at_most)


NOTHING = Need()
PROCESS = Need(
    5, 1, FRESH // PAGE
)  # stdin, stdout, stderr, and the pipe by which signals wake the main thread
ENGINE = Need(3)  # epoll, its wake-up, /dev/null
BACKLOG = 8 << 20  # bytes a subscriber may be behind, beside `buffer` and `burst`: one memory for all
RESERVE = 8 << 20  # bytes that come while it is found out whether a full subscriber is slow
THREADED = ("file", "shared")  # ends that a thread serves: what it is handed is a backlog of two pipes
CLIENTS = 16  # who may talk at the admin sockets at a time
WAITING = Need(1)  # a connection that waits for its turn


def granted(wanted: int, machine: Machine) -> int:
    """Bytes that a pipe gets when it asks for `wanted`, while its user is within the budget of pages."""
    if machine.privileged:
        return wanted
    fresh = min(FRESH, machine.pipe_max)
    while wanted > max(machine.pipe_max, fresh):
        wanted //= 2
    return max(wanted, fresh)


def pipe(wanted: int, machine: Machine) -> Need:
    """A pipe of relay's own."""
    return Need(2, 1, granted(wanted, machine) // PAGE)


def node(machine: Machine) -> Need:
    """One node of a chain (chain.Node)."""
    return pipe(DEFAULT_CAPACITY, machine)


def has_backlog(sink: SinkSettings, slow: OnSlow) -> bool:
    """Whether a tee's sink has a pipe in front of it: where a policy stands, and where it could hold its neighbours."""
    if slow.policy != "block" or sink.proxy_protocol:
        return True
    return not (slow.buffer or sink.address.scheme in (*THREADED, "null"))


def passes_backlog(sink: SinkSettings, slow: OnSlow) -> bool:
    """Whether its bytes go past that pipe while it is empty."""
    return slow.policy != "spill" and not slow.buffer and sink.address.scheme not in THREADED


def ferry(machine: Machine) -> Need:
    """Two pipes and two eventfds (endpoints.ferry.Ferry): before a file, a checksum, whatever may block."""
    return pipe(LARGEST_CAPACITY, machine).times(2) + Need(2)


def subscriber() -> Need:
    """One subscriber of a broadcast: its socket (subscribers.Member); the ring is memory."""
    return Need(1)


def backlog(slow: OnSlow, burst: int) -> int:
    """By how many bytes a subscriber may be behind before it is full; it begins a burst behind.

    A broadcast's log is its ring, which is memory: a spill's `max` makes it larger.
    """
    spilled = slow.max or 0 if slow.policy == "spill" else 0
    return BACKLOG + slow.buffer + spilled + burst


def listener(address: Address) -> Need:
    """A listening socket; a name may stand for an address of each family."""
    named = bool(address.host) and not address.host.replace(".", "").isdigit() and ":" not in address.host
    return Need(2, at_most=True) if address.scheme == "tcp" and named else Need(1)


def exchange(spliced: bool, machine: Machine) -> Need:
    """Pipes that duplex sessions borrow while bulk passes through them (kernel.exchange.Exchange), on every engine."""
    count = machine.cpus * PIPES if spliced else 0
    return pipe(DEFAULT_CAPACITY, machine).times(count) + Need(at_most=spliced)


def source(address: Address, machine: Machine) -> Need:
    """An open source."""
    match address.scheme:
        case "null":
            return NOTHING
        case "fifo":
            return _given_pipe(machine)
        case "stdio" | "fd":
            return Need(1, 1, _given_pipe(machine).pages, at_most=True)
    return Need(1)


def sink(settings: SinkSettings, machine: Machine) -> Need:
    """An open sink; one that listens without its listeners and subscribers."""
    if settings.verb == "listen":
        return NOTHING
    match settings.address.scheme:
        case "file":
            return ferry(machine) + Need(1)
        case "shared":  # the socket and the ring's memfd
            return ferry(machine) + Need(2)
        case "fifo":
            return _given_pipe(machine)
        case "stdio" | "fd":  # a file needs a ferry, a pipe or a socket one descriptor
            most = ferry(machine)
            return Need(most.descriptors, most.pipes, most.pages, at_most=True)
    return Need(1)


def log(slow: OnSlow, machine: Machine) -> Need:
    """A spill's log, or a buffer, with the ferry before it and the reader behind it (spill.SpillSink, log.Log).

    On disk: the segment that is written and the mapped cursor. In memory: every segment that is kept.
    """
    bound = (slow.max or 0) if slow.policy == "spill" else slow.buffer
    kept = 2 if slow.directory is not None else bound // segment_size(bound, in_memory=True) + 2
    return ferry(machine) + Need(kept + 1, at_most=True)


def admin(*addresses: Address | None) -> Need:
    """The admin sockets that are named there, and their clients (admin.listeners.Listeners)."""
    found = NOTHING
    for address in addresses:
        if address is not None:
            found += listener(address)
    return found + Need(1 + CLIENTS, at_most=True) if found.descriptors else found


def _given_pipe(machine: Machine) -> Need:
    """One end of a pipe that is not relay's own, enlarged; its pages count for whoever made it."""
    return Need(1, 1, granted(LARGEST_CAPACITY, machine) // PAGE)
