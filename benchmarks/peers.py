"""Peers that are a few lines of Python, as one would write them with the standard library.

    peers.py asyncio FROM TO...       streams: one connection to FROM, everything on to each TO
    peers.py sendfile FILE PORT...    socket.sendfile of the file to 127.0.0.1:PORT, a thread each

FROM is a port of 127.0.0.1 or the path of a unix socket; TO is one of these, or file:PATH. Run with -I: nothing of the
directory or the environment is looked at.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from typing import IO

PIECE = 1 << 20


def main(words: list[str]) -> int:
    """0 when all was delivered."""
    if len(words) >= 3 and words[0] == "asyncio":
        asyncio.run(relay(words[1], words[2:]))
        return 0
    if len(words) >= 3 and words[0] == "sendfile":
        return send(words[1], list(map(int, words[2:])))
    print(__doc__, file=sys.stderr)
    return 2


async def relay(source: str, sinks: list[str]) -> None:
    """Takes one connection and passes on what comes, waiting for the slowest."""
    done = asyncio.Event()
    failed: list[BaseException] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await carry(reader, sinks)
        except BaseException as error:  # told below; a callback's exception is only logged
            failed.append(error)
        finally:
            writer.close()
            done.set()

    if source.isdecimal():
        server = await asyncio.start_server(connected, "127.0.0.1", int(source), limit=PIECE)
    else:
        server = await asyncio.start_unix_server(connected, source, limit=PIECE)
    await done.wait()
    server.close()
    if failed:
        raise failed[0]


async def carry(reader: asyncio.StreamReader, sinks: list[str]) -> None:
    """Until the source ends."""
    files: list[IO[bytes]] = []
    writers: list[asyncio.StreamWriter] = []
    for to in sinks:
        if to.startswith("file:"):
            files.append(open(to.removeprefix("file:"), "wb", buffering=0))  # noqa: SIM115 - closed below
        elif to.isdecimal():
            writers.append((await asyncio.open_connection("127.0.0.1", int(to)))[1])
        else:
            writers.append((await asyncio.open_unix_connection(to))[1])
    while data := await reader.read(PIECE):
        for writer in writers:
            writer.write(data)
        for file in files:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
        for writer in writers:
            await writer.drain()
    for writer in writers:
        writer.write_eof()
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    for file in files:
        file.close()


def send(path: str, ports: list[int]) -> int:
    """The whole file to each port."""
    failed = []

    def to(port: int) -> None:
        try:
            with socket.create_connection(("127.0.0.1", port)) as sock, open(path, "rb") as file:
                sock.sendfile(file)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=to, args=(port,)) for port in ports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in failed:
        print(error, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
