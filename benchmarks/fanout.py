"""One stream to many: to 8 and 16 tcp connections, 16 pipes, 4 unix sockets, 3 files; and who does that today."""

from __future__ import annotations

import shlex
from dataclasses import replace

from .cell import GIB, Cell, Goal, lent, one_way
from .contender import (
    BASH,
    BLOCKS,
    MBUFFER,
    NC,
    PIPE_4PIPES,
    PYTHON,
    RELAY,
    SOCAT,
    TCP_4TCP,
    TEE,
    Contender,
    Part,
    Place,
    each,
    one,
    pipeline,
    python,
    tcp,
)

KIB = 1 << 10


def _netcats(place: Place) -> list[Part]:
    sends = " ".join(f"nc -N 127.0.0.1 {port} < {shlex.quote(str(place.file))} &" for port in place.ports)
    return one("bash", "-c", f"{sends} wait")


def _socat_tee_unix(place: Place) -> list[Part]:
    sends = [f"socat -u -b 1048576 - UNIX-CONNECT:{shlex.quote(str(path))}" for path in place.paths]
    branches = " ".join(f">({send})" for send in sends[:-1])
    source = f"socat -u -b 1048576 UNIX-LISTEN:{shlex.quote(str(place.listen_path))} -"
    return one("bash", "-c", f"{source} | tee {branches} | {sends[-1]}")


FILE_8TCP = (
    Contender(
        "relay send", (), lambda p: one(*RELAY, "send", p.file, *each("--to", [f"tcp://{a}" for a in tcp(p)]))
    ),
    Contender("8 nc", (NC, BASH), _netcats),
    Contender("mbuffer", (MBUFFER,), lambda p: one("mbuffer", "-q", "-i", p.file, *each("-O", tcp(p)))),
    Contender(
        "mbuffer -s 1M",
        (MBUFFER,),
        lambda p: one("mbuffer", "-q", *BLOCKS, "-i", p.file, *each("-O", tcp(p))),
    ),
    Contender(
        "Python socket.sendfile, 8 threads",
        (PYTHON,),
        lambda p: python("sendfile", str(p.file), *map(str, p.ports)),
    ),
)

UNIX_4UNIX = (
    Contender(
        "relay run",
        (),
        lambda p: one(
            *RELAY, "run", f"unix://{p.listen_path}", *each("--to", [f"unix://{path}" for path in p.paths])
        ),
    ),
    Contender("socat | tee >(socat)...", (SOCAT, TEE, BASH), _socat_tee_unix),
    Contender(
        "Python asyncio",
        (PYTHON,),
        lambda p: python("asyncio", str(p.listen_path), *map(str, p.paths)),
    ),
)

TCP_3FILES = (
    Contender(
        "relay run",
        (),
        lambda p: one(
            *RELAY,
            "run",
            f"tcp://127.0.0.1:{p.listen}",
            *each("--to", [f"file://{path}" for path in p.paths]),
        ),
    ),
    Contender(
        "socat -b 1M | tee",
        (SOCAT, TEE),
        lambda p: pipeline(
            one("socat", "-u", "-b", "1048576", f"TCP4-LISTEN:{p.listen},bind=127.0.0.1", "-"),
            one("tee", *p.paths[:-1], stdout=p.paths[-1]),
        ),
    ),
    Contender(
        "nc | tee",
        (NC, TEE),
        lambda p: pipeline(
            one("nc", "-d", "-l", "127.0.0.1", str(p.listen)),
            one("tee", *p.paths[:-1], stdout=p.paths[-1]),
        ),
    ),
    Contender(
        "mbuffer -s 1M",
        (MBUFFER,),
        lambda p: one(
            "mbuffer", "-q", *BLOCKS, "-I", str(p.listen), "-f", *each("-o", list(map(str, p.paths)))
        ),
    ),
    Contender(
        "Python asyncio",
        (PYTHON,),
        lambda p: python("asyncio", str(p.listen), *(f"file:{path}" for path in p.paths)),
    ),
)

_PIPES = next(cell for cell in one_way() if cell.name == "pipe-4pipes")
_SMALL = replace(
    _PIPES,
    name="pipe-4pipes-64k",
    title="Pipe to 4 pipes, chunks of 64 KiB, pipes of 1 MiB",
    chunk=64 * KIB,
    size=4 * GIB,
    target=None,
)
_UNIX = Cell(
    "unix-4unix",
    "unix to 4 unix, chunks of 1 MiB",
    "unix",
    "unix",
    4,
    4 * GIB,
    UNIX_4UNIX,
    goal=Goal(0.1, 8.0, (TEE, SOCAT)),
)

_BASE = (
    Cell(
        "file-8tcp",
        "File (warm page cache) to 8 tcp",
        "file",
        "tcp",
        8,
        GIB,
        FILE_8TCP,
        goal=Goal(0.7, 1.3, (MBUFFER, NC)),
    ),
    Cell("tcp-16tcp", "tcp to 16 tcp", "tcp", "tcp", 16, GIB, TCP_4TCP, goal=Goal(0.8, 1.25, (MBUFFER,))),
    _SMALL,
    Cell(
        "pipe-16pipes",
        "Pipe to 16 pipes, chunks and pipes of 1 MiB",
        "pipe",
        "fifo",
        16,
        8 * GIB,
        PIPE_4PIPES,
        goal=Goal(0.1, 8.0, (TEE, SOCAT)),
    ),
    replace(
        _SMALL,
        name="pipe-16pipes-64k",
        title="Pipe to 16 pipes, chunks of 64 KiB, pipes of 1 MiB",
        sinks=16,
        size=GIB,
    ),
    _UNIX,
    replace(_UNIX, name="unix-4unix-64k", title="unix to 4 unix, chunks of 64 KiB", chunk=64 * KIB),
    Cell(
        "tcp-3files",
        "tcp to 3 files",
        "tcp",
        "file",
        3,
        GIB,
        TCP_3FILES,
        goal=Goal(0.8, 1.1, (SOCAT, NC, TEE)),
    ),
)


def cells() -> list[Cell]:
    """Each job pinned, then not."""
    found = []
    for base in _BASE:
        unpinned = replace(
            base, name=f"{base.name}-unpinned", title=f"{base.title}, not pinned", pinned=False
        )
        found += [
            base,
            *([lent(base)] if base.name == "pipe-16pipes" else []),
            replace(unpinned, target=None),
        ]
    return found
