"""Consumes one stream from relay in blocks of shared memory, and adds its bytes up where they are.

python examples/consume.py /tmp/app.sock
relay send big.iso --to shared:///tmp/app.sock        or, in a route: sink: {shared: "unix:///tmp/app.sock"}
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import relay


def main(path: str) -> None:
    """Listens at `path`, takes one stream, ends."""
    count = total = 0
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        print(f"listening on {path}", flush=True)
        connection, _ = listener.accept()
    Path(path).unlink()
    with relay.ShareSource(connection) as source:
        for block in source:  # each is given back when the next is asked for
            array = block.array()  # NumPy, read-only, relay's own memory
            total += int(array.sum(dtype="u8"))
            count += len(block)
            del array
    print(f"{count} bytes, their sum is {total}")


if __name__ == "__main__":
    main(sys.argv[1])
