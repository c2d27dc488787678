"""Memfds: filled whole, whichever pages the system gives."""

from __future__ import annotations

import os
import resource
import signal
import socket
from pathlib import Path

import pytest
from forked import forked
from peers import payload

import relay
from relay.kernel import memfd
from relay.kernel.arena import HUGE_PAGE
from relay.sharing.slots import slot_bytes


@pytest.mark.parametrize("word", ["never", "advise", "always"])
def test_whatever_pages_the_system_gives(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shared is the same bytes, all there and final, by whichever way it was put into a memfd."""
    monkeypatch.setattr(memfd, "huge_pages", lambda: word)
    content = payload(9, (5 << 20) + 77)
    one, two = socket.socketpair()
    with one, two, relay.share(content) as shared:
        shared.send(one)
        with relay.Shared.receive(two) as received:  # type: ignore[union-attr]
            assert bytes(received) == content
        with pytest.raises(PermissionError):
            os.pwrite(shared.fileno(), b"x", 0)
    with relay.Draft(3 << 20) as draft:
        with draft.view() as view:
            view[: 1 << 20] = content[: 1 << 20]
        with draft.share() as shared:
            assert bytes(shared) == content[: 1 << 20] + bytes(2 << 20)


@pytest.mark.parametrize("size", [2 << 20, (5 << 20) + 77, 8 << 20])
def test_large_memory_begins_where_a_huge_page_can(size: int) -> None:
    """Whatever its size, memory that has huge pages is mapped where they fit, at both ends."""
    one, two = socket.socketpair()
    draft = relay.Draft(size)
    assert memfd.address(draft._pages) % HUGE_PAGE == 0
    with one, two, draft.share() as shared:
        shared.send(one)
        with relay.Shared.receive(two) as received:  # type: ignore[union-attr]
            assert memfd.address(shared) % HUGE_PAGE == memfd.address(received) % HUGE_PAGE == 0


def test_a_slot_of_a_large_ring_is_of_whole_huge_pages() -> None:
    """Large slots are rounded to huge pages, small ones to pages, and blocks of the size they were made for fit."""
    assert [slot_bytes(size) for size in (1, 4096, 5000, (16 << 20) - 1, (16 << 20) + 1)] == [
        4096, 4096, 8192, 16 << 20, 18 << 20,
    ]  # fmt: skip
    one, two = socket.socketpair()
    content = payload(3, (16 << 20) + 1)
    with relay.ShareSink(one, slots=1, slot_size=len(content)) as sink, relay.ShareSource(two) as source:
        sink.send(content)
        with source.receive() as block:  # type: ignore[union-attr]
            assert block.view() == content


def test_no_memory_is_told_and_faults_nobody() -> None:
    """Where the limit of files' sizes or of memory is met while it is filled, that is an error with a hint."""

    def limited() -> str:
        memfd.huge_pages.cache_clear()
        memfd.huge_pages = lambda: "advise"
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            relay.share(bytes(4 << 20))
        except relay.RelayError as error:
            return str(error)
        return "nothing was said"

    with forked(limited) as child:
        assert "memfd of 4194304 bytes" in child.answer()


def test_the_switch_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch of a size goes before the one above it, unless it inherits; without any there are none."""
    monkeypatch.setattr(memfd, "_SWITCHES", tmp_path)
    read = memfd.huge_pages.__wrapped__
    assert read() == "never"
    (tmp_path / "shmem_enabled").write_text("always within_size [advise] never deny force")
    assert read() == "advise"
    (tmp_path / "hugepages-2048kB").mkdir()
    (tmp_path / "hugepages-2048kB" / "shmem_enabled").write_text("always [inherit] within_size never")
    assert read() == "advise"
    (tmp_path / "hugepages-2048kB" / "shmem_enabled").write_text("[always] inherit within_size never")
    assert read() == "always"
