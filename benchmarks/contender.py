"""Who runs: relay and its peers, each with the command a user would type for the job.

A contender gets a `Place` (where the bytes come from and where they go) and answers with the commands of a
pipeline. Peers run with the buffer sizes that serve them best; where defaults differ much, both are in the
table.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELAY = (sys.executable, "-m", "relay")


@functools.cache
def environment() -> dict[str, str]:
    """What contenders run in: the relay that is installed, or the one of this checkout where none is.

    Contenders do not run in the checkout: its relay, not compiled there, would hide the installed one. Python may
    write down what it compiles: an installed relay was compiled when it was installed, that of a checkout is by the
    first run, which is not counted.
    """
    own = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    installed = subprocess.run(
        [sys.executable, "-c", "import relay"], capture_output=True, check=False, cwd="/"
    )
    return own if installed.returncode == 0 else {**own, "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Place:
    """The two ends of one run. A cell fills in what it has: a port or a path to listen on, a file, the sinks.

    `paths` are names for as many sinks as there are: of unix sockets that listen, or of files to be written.
    """

    listen: int = 0
    file: Path = Path("/dev/null")
    ports: tuple[int, ...] = ()
    fifos: tuple[Path, ...] = ()
    output: Path = Path("/dev/null")
    listen_path: Path = Path("/dev/null")
    paths: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Part:
    """One command of a pipeline. stdin and stdout are files to open in place of the neighbours' pipes."""

    argv: tuple[str, ...]
    stdin: Path | None = None
    stdout: Path | None = None


@dataclass(frozen=True)
class Tool:
    """A program of the system: the Debian package it is in, how to ask for its version, where that stands."""

    name: str
    package: str
    ask: tuple[str, ...]
    pattern: str

    def version(self) -> str | None:
        """What the program says of itself; None if it is not installed."""
        if shutil.which(self.ask[0]) is None:
            return None
        done = subprocess.run(self.ask, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        found = re.search(self.pattern, done.stdout + done.stderr)
        return f"{self.name} {found[1]}" if found else f"{self.name} (version unknown)"


SOCAT = Tool("socat", "socat", ("socat", "-V"), r"socat version (\S+)")
PV = Tool("pv", "pv", ("pv", "--version"), r"pv (\S+)")
MBUFFER = Tool("mbuffer", "mbuffer", ("mbuffer", "--version"), r"version (\S+)")
TEE = Tool("GNU tee", "coreutils", ("tee", "--version"), r"tee \(GNU coreutils\) (\S+)")
NC = Tool("OpenBSD nc", "netcat-openbsd", ("nc", "-h"), r"OpenBSD netcat \(Debian patchlevel (\S+)\)")
NCAT = Tool("ncat", "ncat", ("ncat", "--version"), r"Version (\S+)")
PYTHON = Tool("Python", "python3", (sys.executable, "--version"), r"Python (\S+)")
NGINX = Tool("nginx", "nginx-light", ("nginx", "-v"), r"nginx/(\S+)")
BASH = Tool("bash", "bash", ("bash", "--version"), r"version ([\d.]+)")


@dataclass(frozen=True)
class Contender:
    """A name in the table, the tools it needs, and the commands for a place. Without tools it is relay. One that
    `serves` waits at `place.listen` to be asked for the file by http, and for SIGTERM."""

    name: str
    tools: tuple[Tool, ...]
    parts: Callable[[Place], list[Part]]
    serves: bool = False

    @property
    def is_relay(self) -> bool:
        """Whether this is the program measured, as opposed to a peer."""
        return not self.tools

    def version(self) -> str:
        """The versions of all its tools; LookupError, naming the package, if one cannot be run here."""
        if self.is_relay:
            done = subprocess.run(
                [*RELAY, "--version"],
                capture_output=True,
                text=True,
                check=False,
                cwd="/",
                env=environment(),
            )
            if done.returncode != 0:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise LookupError(f"`python -m relay --version` fails with {done.returncode}: {last}")
            return done.stdout.strip()
        versions = []
        for tool in self.tools:
            version = tool.version()
            if version is None:
                raise LookupError(f"{tool.name} is not installed; its Debian package is {tool.package}")
            versions.append(version)
        return ", ".join(versions)


def one(*argv: str | Path, stdin: Path | None = None, stdout: Path | None = None) -> list[Part]:
    """A single command."""
    return [Part(tuple(map(str, argv)), stdin, stdout)]


def pipeline(*commands: list[Part]) -> list[Part]:
    """Commands with a pipe between each two."""
    return [part for parts in commands for part in parts]


def each(flag: str, values: list[str]) -> list[str]:
    """The flag before each value."""
    return [word for value in values for word in (*flag.split(), value)]


def tcp(place: Place) -> list[str]:
    """The sinks as host:port."""
    return [f"127.0.0.1:{port}" for port in place.ports]


def _socat_tee(place: Place) -> list[Part]:
    sends = [f"socat -u -b 1048576 - TCP4:{address}" for address in tcp(place)]
    branches = " ".join(f">({send})" for send in sends[:-1])
    source = f"socat -u -b 1048576 TCP4-LISTEN:{place.listen},bind=127.0.0.1 -"
    return one("bash", "-c", f"{source} | tee {branches} | {sends[-1]}")


def python(*words: str) -> list[Part]:
    """The peers that are a few lines of Python: see peers.py."""
    return one(sys.executable, "-I", ROOT / "benchmarks" / "peers.py", *words)


# mbuffer picks a block size from the system; 1 MiB blocks are what suits it and relay's chunks alike.
BLOCKS = ("-s", "1M", "-m", "16M")


def nginx_sendfile(place: Place) -> list[Part]:
    """One process, which is all there is to do for one connection; its own files stand beside its sink's name."""
    own = place.paths[0].parent
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {own}/{kind};" for kind in kinds)
    server = f"server {{ listen 127.0.0.1:{place.listen}; root {place.file.parent}; }}"
    http = f"http {{ access_log off; sendfile on; {temporary} {server} }}"
    config = f"daemon off; master_process off; pid {own}/pid; error_log stderr; events {{}} {http}"
    return one("bash", "-c", f"echo {shlex.quote(config)} > {own}/conf; exec nginx -p {own} -c {own}/conf")


FILE_TCP = (
    Contender("relay send", (), lambda p: one(*RELAY, "send", p.file, "--to", f"tcp://{tcp(p)[0]}")),
    Contender(
        "socat -b 1M",
        (SOCAT,),
        lambda p: one("socat", "-u", "-b", "1048576", f"OPEN:{p.file},rdonly", f"TCP4:{tcp(p)[0]}"),
    ),
    Contender("mbuffer", (MBUFFER,), lambda p: one("mbuffer", "-q", "-i", p.file, "-O", tcp(p)[0])),
    Contender(
        "mbuffer -s 1M",
        (MBUFFER,),
        lambda p: one("mbuffer", "-q", *BLOCKS, "-i", p.file, "-O", tcp(p)[0]),
    ),
    Contender("nginx, sendfile", (NGINX, BASH), nginx_sendfile, serves=True),
    Contender("nc", (NC,), lambda p: one("nc", "-N", "127.0.0.1", str(p.ports[0]), stdin=p.file)),
    Contender(
        "ncat", (NCAT,), lambda p: one("ncat", "--send-only", "127.0.0.1", str(p.ports[0]), stdin=p.file)
    ),
    Contender(
        "pv | socat -b 1M",
        (PV, SOCAT),
        lambda p: pipeline(
            one("pv", "-q", p.file), one("socat", "-u", "-b", "1048576", "-", f"TCP4:{tcp(p)[0]}")
        ),
    ),
    Contender(
        "Python socket.sendfile", (PYTHON,), lambda p: python("sendfile", str(p.file), str(p.ports[0]))
    ),
)

TCP_4TCP = (
    Contender(
        "relay run",
        (),
        lambda p: one(
            *RELAY, "run", f"tcp://127.0.0.1:{p.listen}", *each("--to", [f"tcp://{a}" for a in tcp(p)])
        ),
    ),
    Contender(
        "mbuffer", (MBUFFER,), lambda p: one("mbuffer", "-q", "-I", str(p.listen), *each("-O", tcp(p)))
    ),
    Contender(
        "mbuffer -s 1M",
        (MBUFFER,),
        lambda p: one("mbuffer", "-q", *BLOCKS, "-I", str(p.listen), *each("-O", tcp(p))),
    ),
    Contender("socat | tee >(socat)...", (SOCAT, TEE, BASH), _socat_tee),
    Contender("Python asyncio", (PYTHON,), lambda p: python("asyncio", str(p.listen), *map(str, p.ports))),
)

PIPE_4PIPES = (
    Contender(
        "relay run",
        (),
        lambda p: one(*RELAY, "run", "-", *each("--to", [f"fifo://{path}" for path in p.fifos])),
    ),
    Contender("tee", (TEE,), lambda p: one("tee", *p.fifos[:-1], stdout=p.fifos[-1])),
    Contender(
        "pv | tee",
        (PV, TEE),
        lambda p: pipeline(one("pv", "-q"), one("tee", *p.fifos[:-1], stdout=p.fifos[-1])),
    ),
    Contender(
        "mbuffer -s 1M",
        (MBUFFER,),
        lambda p: one("mbuffer", "-q", *BLOCKS, *each("-f -o", list(map(str, p.fifos)))),
    ),
)

TCP_FILE = (
    Contender(
        "relay run",
        (),
        lambda p: one(*RELAY, "run", f"tcp://127.0.0.1:{p.listen}", "--to", f"file://{p.output}"),
    ),
    Contender(
        "socat -b 1M",
        (SOCAT,),
        lambda p: one(
            "socat", "-u", "-b", "1048576", f"TCP4-LISTEN:{p.listen},bind=127.0.0.1", f"CREATE:{p.output}"
        ),
    ),
    Contender(
        "mbuffer", (MBUFFER,), lambda p: one("mbuffer", "-q", "-I", str(p.listen), "-f", "-o", p.output)
    ),
    Contender(
        "mbuffer -s 1M",
        (MBUFFER,),
        lambda p: one("mbuffer", "-q", *BLOCKS, "-I", str(p.listen), "-f", "-o", p.output),
    ),
    Contender("nc", (NC,), lambda p: one("nc", "-d", "-l", "127.0.0.1", str(p.listen), stdout=p.output)),
    Contender(
        "ncat",
        (NCAT,),
        lambda p: one("ncat", "-l", "--recv-only", "127.0.0.1", str(p.listen), stdout=p.output),
    ),
    Contender(
        "socat -b 1M | pv",
        (SOCAT, PV),
        lambda p: pipeline(
            one("socat", "-u", "-b", "1048576", f"TCP4-LISTEN:{p.listen},bind=127.0.0.1", "-"),
            one("pv", "-q", stdout=p.output),
        ),
    ),
    Contender("Python asyncio", (PYTHON,), lambda p: python("asyncio", str(p.listen), f"file:{p.output}")),
)


def spelled(parts: list[Part]) -> str:
    """The pipeline as one would type it into a shell."""
    words = []
    for part in parts:
        word = shlex.join(part.argv)
        word += f" < {part.stdin}" if part.stdin else ""
        word += f" > {part.stdout}" if part.stdout else ""
        words.append(word)
    return " | ".join(words)
