"""What holds for every test: nothing stays open, no child stays behind. And the fault shim, built once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import faults
import leaks
import peers
import pytest
from descriptors import Descriptors

import relay
from relay.engine import Engine

FIRST = (  # the files that take longest: begun last, one worker would end long after the others
    "test_sanitized.py",
    "test_container.py",
    "test_docs.py",
    "test_packaging.py",
    "test_files.py",
    "test_crossing.py",
    "test_conformance_ends.py",
    "test_attack_receivers.py",
    "test_doctor_sandbox.py",
)


def pytest_configure() -> None:
    """A shell starts what is to run in its background with SIGINT ignored, and every program would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files go to one worker each in this order, so what a module makes is made once, and the long ones begin."""
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test that leaves a descriptor open, closes somebody else's, or leaves a child unreaped.

    Being autouse it is set up first and so torn down last, after every other fixture of the test's own scope.
    """
    failed_before = request.session.testsfailed
    before = leaks.snapshot()
    yield
    peers.give_ports_back()
    found = leaks.leaks(before, foreign_closes=not request.session.testsfailed)
    # The traceback of a failed test keeps its objects alive; one message about it is enough.
    if found and request.session.testsfailed == failed_before:
        pytest.fail("the test leaks:\n  " + "\n  ".join(found), pytrace=False)


@pytest.fixture
def fds() -> Iterator[Descriptors]:
    """Makes pipes, sockets, files and epolls that are closed when the test ends, however it ends."""
    with Descriptors() as owner:
        yield owner


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine without a thread: the test turns it."""
    made = Engine("test")
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[relay.Pipe]:
    """A pipe of 1 MiB, as far as it is granted."""
    with relay.Pipe() as made:
        yield made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of 3 MiB and a bit, which no pipe holds."""
    path = tmp_path / "data.bin"
    path.write_bytes(peers.payload(7, (3 << 20) + 4567))
    return path


@pytest.fixture(params=["auto", "copy"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The routes of a test go down a chain, and once more by copying, where they can through a ring."""
    monkeypatch.setattr("conformance.METHOD", request.param)


@pytest.fixture(scope="session")
def short_counts(tmp_path_factory: pytest.TempPathFactory) -> faults.ShortCounts:
    """The LD_PRELOAD shim that makes calls come short, compiled once a session."""
    return faults.ShortCounts.build(tmp_path_factory.mktemp("short"))
