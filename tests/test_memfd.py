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
