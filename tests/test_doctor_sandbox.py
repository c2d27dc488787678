"""`relay doctor` where a real seccomp filter denies one call after the other, and where the pipe budget is used up."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
import time
from typing import Any

import pytest
from doctored import DOCUMENTED, expected, needs, results, spent_budget, states
from forked import forked, needs_root
from jsonschema import Draft202012Validator
from seccomp import KNOWN, denying

from relay.doctor.examine import doctor
from relay.doctor.path import cells

filtered = pytest.mark.skipif(not KNOWN, reason="the filter has the call numbers of x86_64 only")

BY_FILTER = "EPERM, answered by a seccomp filter"


def examine(*calls: str, code: int = errno.EPERM) -> tuple[int, dict[str, Any]]:
    """The exit code and the document of `relay doctor --json` in a sandbox without `calls`; fails over 10 s."""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "relay", "doctor", "--json"],
        preexec_fn=denying(calls, code) if calls else None,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert time.monotonic() - begun < 30  # 10 s where nobody else is at work
    assert "Traceback" not in done.stderr
    document = json.loads(done.stdout)
    Draft202012Validator(DOCUMENTED).validate(document)
    return done.returncode, document


@filtered
@pytest.mark.parametrize(
    ("calls", "names", "needed"),
    [
        (("splice",), {"splice"}, False),
        (("tee",), {"tee"}, False),
        (("vmsplice",), {"vmsplice"}, False),
        (("sendfile",), {"sendfile"}, False),
        (("io_uring_setup",), {"io_uring"}, False),
        (("process_vm_readv",), set(), False),
        (("memfd_create",), {"memfd", "seals"}, True),
        (("epoll_create1",), {"epoll"}, True),
        (("eventfd2",), {"eventfd"}, True),
        (("socket",), {"tcp on loopback", "kernel tls"}, True),
        (("socketpair",), {"unix socket", "splice", "sendfile", "descriptors passed"}, True),
        (("pipe2",), {"pipe", "pipe size", "epoll", "splice", "tee", "vmsplice", "descriptors passed"}, True),
        (("seals",), {"seals"}, False),
        (("sendmsg",), {"descriptors passed"}, False),
        (("madvise",), set(), False),
        (("clone", "clone3"), {"thread"}, True),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_each_call_denied(calls: tuple[str, ...], names: set[str], needed: bool) -> None:
    """What is denied says no and by whom, nothing else does, and the exit code is 1 where relay cannot do without."""
    code, document = examine(*calls)
    assert document["machine"]["sandbox"] == "a seccomp filter"
    said = {one["name"]: one["said"] for one in document["abilities"] if one["state"] == "no"}
    assert said.keys() - {"kernel tls", "io_uring"} == names - {"kernel tls", "io_uring"}
    for name in names - {"pipe size", "thread", "kernel tls"}:
        assert said[name] == BY_FILTER
    assert code == int(needed)
    for row in document["matrix"]:
        assert (row["result"] == "denied") == ("why" in row)
        assert row.get("why", BY_FILTER) == BY_FILTER


@filtered
@pytest.mark.parametrize("call", ["splice", "tee", "vmsplice", "sendfile", "process_vm_readv"])
def test_the_rows_of_a_denied_call(call: str) -> None:
    """Exactly the rows that cannot be without the call are denied; the others are what they are elsewhere."""
    _code, document = examine(call)
    for cell, found in results(document).items():
        denied = needs(call, *cell)
        assert (cell, found) == (cell, "denied" if denied else result_without(call, *cell))


def result_without(call: str, source: str, to: str, way: str) -> str:
    """Without splice an origin behind a pipe or socket has copies to give, and what is teed is none of its pages."""
    if call == "splice" and way == "tee":
        return "copied"
    return expected(source, to, way)


@filtered
def test_without_seals_nothing_is_counted() -> None:
    """References are counted by sealing: where that is denied the first evidence stands alone."""
    code, document = examine("seals")
    assert code == 0
    assert {row["references"] for row in document["matrix"]} == {None}
    assert results(document) == {cell: expected(*cell) for cell in cells()}


@filtered
def test_a_call_that_is_not_there() -> None:
    """ENOSYS, as old kernels and some sandboxes answer, is no crash either."""
    _code, document = examine("vmsplice", "process_vm_readv", "memfd_create", code=errno.ENOSYS)
    assert states(document)["vmsplice"] == "no"
    why = {row["why"] for row in document["matrix"] if row["result"] == "denied"}
    assert why == {"ENOSYS: this kernel or sandbox does not have it"}


@needs_root
def test_the_whole_of_it_without_budget_and_privileges() -> None:
    """An ordinary user whose pipe budget is used up gets every row, and the two lines that say less."""

    def as_user() -> Any:
        told = io.StringIO()
        with spent_budget():
            begun = time.monotonic()
            code = doctor(as_json=True, out=told)
            took = time.monotonic() - begun
        return code, told.getvalue(), took

    doctor(as_json=True, seconds=0.0, out=io.StringIO())  # what it loads is loaded: the user may not read it
    with forked(as_user) as child:
        code, out, took = child.answer()
    assert code == 0
    document = json.loads(out)
    assert (states(document)["pipe size"], states(document)["pipe budget"]) == ("less", "less")
    rows = {cell: expected(*cell) for cell in cells()}
    rows["process", "process", "process_vm_readv"] = (
        "denied"  # who changed its user cannot be looked into (dumpable)
    )
    assert results(document) == rows
    assert {row["references"] for row in document["matrix"]} == {"held", "none", None}
    assert took < 30
