"""Servers that nobody here wrote, on loopback with directories of their own: each a context that ends it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from peers import PATIENCE, eventually

PACKAGES = {
    "redis-server": "redis-server",
    "redis-benchmark": "redis-tools",
    "redis-cli": "redis-tools",
    "nginx": "nginx-light",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "scp": "openssh-client",
    "ssh-keygen": "openssh-client",
    "nghttp": "nghttp2-client",
    "h2load": "nghttp2-client",
    "initdb": "postgresql",
    "postgres": "postgresql",
    "psql": "postgresql",
    "pgbench": "postgresql",
}


def found(name: str) -> str:
    """The path of a program, be it a server's; skips the test, naming the Debian package, where it is missing."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    path = path or max(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), default=None)
    if path is None:
        pytest.skip(f"{name} is missing: apt-get install {PACKAGES.get(name, name)}")
    return path


def free_port() -> int:
    """A port that nobody listens on: given back a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def answers(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def run(*words: str | Path, patience: float = PATIENCE, **options: Any) -> str:
    """Runs a program to its end and returns what it said on stdout; fails with all it said if it fails."""
    options.setdefault("stdin", subprocess.DEVNULL)
    argv = [found(str(words[0])), *map(str, words[1:])]
    done = subprocess.run(argv, stdout=-1, stderr=-1, timeout=patience, check=False, **options)
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0, f"{argv} ended with {done.returncode}: {said[-2000:]}{done.stdout[-500:]!r}"
    return done.stdout.decode(errors="replace")


@contextlib.contextmanager
def server(
    argv: Sequence[str | Path], port: int, log: Path, says: str = "", **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a server that stays in the foreground, and waits until it listens; until it `says` so where a connection
    that asks would confuse it."""
    with log.open("wb") as said:
        process = subprocess.Popen(
            [str(word) for word in argv], stdin=subprocess.DEVNULL, stdout=said, stderr=said, **options
        )
    try:
        eventually(
            lambda: process.poll() is not None or (says in log.read_text() if says else answers(port)),
            f"{argv[0]} listens",
        )
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def redis(directory: Path, *more: str) -> Iterator[tuple[int, Path]]:
    """redis-server without persistence: its port and its unix socket."""
    port, path = free_port(), directory / "redis.sock"
    argv = [found("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--unixsocket", str(path)]
    argv += ["--save", "", "--appendonly", "no", "--dir", str(directory), "--daemonize", "no"]
    argv += ["--repl-diskless-sync-delay", "0", *more]
    with server(argv, port, directory / f"redis-{port}.log"):
        yield port, path


@contextlib.contextmanager
def nginx(directory: Path) -> Iterator[tuple[int, Path]]:
    """nginx over `directory`/www: downloads, uploads by PUT, gzip in chunks. Its port and www; the port on which it
    speaks HTTP/2 in cleartext is in www/h2."""
    path = found("nginx")
    root = directory / "www"
    root.mkdir()
    port, h2 = free_port(), free_port()
    (root / "h2").write_text(str(h2))
    common = (
        f"root {root}; dav_methods PUT; client_max_body_size 0; gzip on; gzip_types *; gzip_min_length 1;"
    )
    temporary = " ".join(
        f"{kind}_temp_path {directory}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (directory / "nginx.conf").write_text(
        f"daemon off; worker_processes 1; {user} pid {directory}/nginx.pid; error_log {directory}/nginx.err;\n"
        f"events {{ worker_connections 512; }}\n"
        f"http {{ access_log off; keepalive_requests 100000; {temporary}\n"
        f"server {{ listen 127.0.0.1:{port}; {common} }}\n"
        f"server {{ listen 127.0.0.1:{h2} http2; {common} }} }}\n"
    )
    argv = [
        path,
        "-p",
        str(directory),
        "-e",
        str(directory / "nginx.err"),
        "-c",
        str(directory / "nginx.conf"),
    ]
    with server(argv, port, directory / "nginx.log"):
        eventually(lambda: answers(h2), "it speaks HTTP/2")
        yield port, root


@contextlib.contextmanager
def postgres() -> Iterator[tuple[int, Path]]:
    """A PostgreSQL of its own, as the user postgres where this is root, who may not run it: its port, and a directory
    of that user's. Everybody on this machine is trusted."""
    initdb, binary = found("initdb"), found("postgres")
    options: dict[str, Any] = {}
    directory = Path(tempfile.mkdtemp(prefix="relay-postgres-"))
    try:
        if os.geteuid() == 0:
            try:
                who = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("there is no user postgres: apt-get install postgresql")
            os.chown(directory, who.pw_uid, who.pw_gid)
            options = {"user": who.pw_uid, "group": who.pw_gid, "extra_groups": []}
        data = directory / "data"
        argv = [initdb, "-D", data, "-A", "trust", "-U", "postgres", "--no-sync", "--no-locale", "-E", "UTF8"]
        subprocess.run(argv, check=True, stdout=-1, stderr=-1, cwd=directory, timeout=60, **options)
        port = free_port()
        argv = [binary, "-D", data, "-p", str(port), "-k", directory, "-c", "listen_addresses=127.0.0.1"]
        argv += ["-c", "fsync=off", "-c", "shared_buffers=16MB", "-c", "max_connections=40"]
        log = directory.with_suffix(".log")
        with server(argv, port, log, cwd=directory, **options):
            ask = [found("psql"), "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "-c", "select 1"]
            eventually(
                lambda: subprocess.run(ask, stdout=-1, stderr=-1, check=False).returncode == 0, "it answers"
            )
            yield port, directory
        log.unlink()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def sshd(directory: Path) -> Iterator[tuple[int, list[str]]]:
    """An sshd for whoever runs this, by a key of its own: its port, and the options that a client needs."""
    path, port = found("sshd"), free_port()
    for name in ("host", "user"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name)
    shutil.copy(directory / "user.pub", directory / "authorized")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # it insists
    (directory / "sshd.conf").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {directory}/host\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {directory}/authorized\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
        f"Subsystem sftp internal-sftp\n"
    )
    options = [
        "-i",
        f"{directory}/user",
        "-F",
        "none",
        "-o",
        "BatchMode=yes",
        "-o",
        "StrictHostKeyChecking=no",
    ]
    options += ["-o", f"UserKnownHostsFile={directory}/known", "-o", "LogLevel=ERROR"]
    with server([path, "-D", "-e", "-f", str(directory / "sshd.conf")], port, directory / "sshd.log"):
        yield port, options


__all__ = ["answers", "found", "free_port", "nginx", "postgres", "redis", "run", "server", "sshd"]
