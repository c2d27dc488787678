"""Gives a route its stream in blocks of shared memory: a hundred arrays that are made where they are read.

relay run shared:///tmp/frames.sock --to frames.bin   or, in a route: source: {shared: "unix:///tmp/frames.sock"}
python examples/produce.py /tmp/frames.sock
"""

from __future__ import annotations

import socket
import sys

import relay

ROWS, COLUMNS = 480, 640


def main(path: str) -> None:
    """Connects to relay at `path`, sends one stream, ends it."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    with relay.ShareSink(sock, slots=4, slot_size=4 * ROWS * COLUMNS) as sink:
        for number in range(100):
            with sink.slot((ROWS, COLUMNS), "f4") as frame:
                frame[:] = number
                del frame
        with relay.share(b"the end") as final:  # never changed again, so relay passes it on by reference
            sink.send(final)
        sink.flush()  # relay has all of it
    print(f"{100 * 4 * ROWS * COLUMNS + 7} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
