"""Two-way proxies between tcp connections: relay, and those that people run: how each is started."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from . import contender
from .contender import RELAY, SOCAT, Tool, environment

HAPROXY = Tool("HAProxy", "haproxy", ("haproxy", "-v"), r"HAProxy version (\S+)")
NGINX = replace(contender.NGINX, package="nginx-light libnginx-mod-stream")
STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")

Start = Callable[[Path, int, int], list[str]]


@dataclass(frozen=True)
class Proxy:
    """A contender: how it is started in a directory to relay port `listen` to port `to`, both of 127.0.0.1."""

    name: str
    tool: Tool | None
    start: Start
    bulk_only: bool = False

    def does(self, kind: str) -> bool:
        """Whether it does jobs of that kind, where it is installed."""
        return kind == "bulk" or not self.bulk_only

    def version(self) -> str | None:
        """What it says of itself, for which it is started; None where it is not installed."""
        if self.tool is not None:
            return self.tool.version() if self.tool is not NGINX or STREAM.exists() else None
        done = subprocess.run(
            [*RELAY, "--version"], capture_output=True, text=True, check=False, env=environment()
        )
        return done.stdout.strip() or None


def _relay(*more: str, engines: int = 0, options: tuple[str, ...] = ()) -> Start:
    def start(directory: Path, listen: int, to: int) -> list[str]:
        route = [
            *([f"engines: {engines}"] if engines else []),
            "routes:",
            "  proxy:",
            f'    source: {{listen: "tcp://127.0.0.1:{listen}"}}',
            "    duplex: true",
            f'    sink: {{connect: "tcp://127.0.0.1:{to}"}}',
            *(f"    {line}" for line in more),
        ]
        config = directory / "relay.yaml"
        config.write_text("\n".join(route) + "\n")
        return [*RELAY, "serve", "--log-format", "json", *options, str(config)]

    return start


def _haproxy(directory: Path, listen: int, to: int, threads: int = 1) -> list[str]:
    config = directory / "haproxy.cfg"
    config.write_text(
        f"""global
    nbthread {threads}
    maxconn 8000
    maxpipes 500
defaults
    mode tcp
    timeout connect 10s
    timeout client 1h
    timeout server 1h
    option splice-auto
listen proxy
    bind 127.0.0.1:{listen}
    server one 127.0.0.1:{to}
"""
    )
    return ["haproxy", "-db", "-f", str(config)]


def _nginx(directory: Path, listen: int, to: int, workers: int = 1, log: bool = False) -> list[str]:
    """`log`: a line a session, written in blocks of 64 KiB, as those are told to do that have many."""
    config = directory / "nginx.conf"
    said = "$remote_addr $remote_port $upstream_addr $bytes_received $bytes_sent $session_time $status"
    access = (
        f"log_format one '{said}'; access_log {directory}/access.log one buffer=64k flush=1s;" if log else ""
    )
    config.write_text(
        f"""load_module {STREAM};
daemon off;
worker_processes {workers};
worker_rlimit_nofile 20000;
pid {directory}/nginx.pid;
error_log {directory}/nginx.log;
events {{ worker_connections 16000; }}
stream {{
    {access}
    server {{
        listen 127.0.0.1:{listen} backlog=4096;
        proxy_pass 127.0.0.1:{to};
        proxy_buffer_size 64k;
        proxy_timeout 1h;
    }}
}}
"""
    )
    return ["nginx", "-p", str(directory), "-c", str(config)]


def _socat(_directory: Path, listen: int, to: int) -> list[str]:
    source = f"TCP4-LISTEN:{listen},bind=127.0.0.1,reuseaddr,fork"
    return ["socat", "-b", "1048576", source, f"TCP4:127.0.0.1:{to}"]


PROXIES = (
    Proxy("relay", None, _relay()),
    Proxy("HAProxy splice-auto", HAPROXY, _haproxy),
    Proxy("nginx stream", NGINX, _nginx),
    Proxy("socat -b 1M", SOCAT, _socat, bulk_only=True),
)
# As programs are that tell of each session, and as those that do not.
TELLING = (
    PROXIES[0],
    Proxy("relay --log-level warning", None, _relay(options=("--log-level", "warning"))),
    *PROXIES[1:3],
    Proxy("nginx stream, access_log", NGINX, partial(_nginx, log=True)),
)
# With a thread for each CPU that is there, and with one alone. The first is how relay and HAProxy come, and nginx as
# Debian configures it (worker_processes auto); by itself it has one worker.
CPUS = os.cpu_count() or 1
THREADS = (
    Proxy("relay", None, _relay()),
    Proxy("relay, engines: 1", None, _relay(engines=1)),
    Proxy(f"HAProxy, {CPUS} threads", HAPROXY, partial(_haproxy, threads=CPUS)),
    Proxy("HAProxy, 1 thread", HAPROXY, _haproxy),
    Proxy(f"nginx stream, {CPUS} workers", NGINX, partial(_nginx, workers=CPUS)),
    Proxy("nginx stream, 1 worker", NGINX, _nginx),
)
METHODS = (Proxy("relay, method: zero-copy", None, _relay("method: zero-copy"), bulk_only=True),)
