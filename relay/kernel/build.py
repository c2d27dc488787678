"""Compiles the C core into relay.kernel._pump: cffi API mode, stable ABI, warnings are errors.

`python relay/kernel/build.py` builds it in place, for work in a checkout.
`RELAY_SANITIZE=1` adds AddressSanitizer and UndefinedBehaviorSanitizer (tests/sanitized runs it so).
"""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SOURCES = (
    "pump.c",
    "intake.c",
    "pieces.c",
    "gate.c",
    "outflow.c",
    "loads.c",
    "ring.c",
    "scatter.c",
    "duplex.c",
    "direction.c",
    "dial.c",
    "loop.c",
    "ferry.c",
    "feed.c",
    "memory.c",
    "heap.c",
    "confine.c",
)
# what Python sees; each may name what those before it have
FACE = ("pump.h", "duplex.h", "feed.h", "confine.h")
HEADERS = (*FACE, "calls.h", "pass.h", "direction.h")

# hidden: what the files of the core share is nobody else's to call or to replace
flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing", "-fvisibility=hidden"]
links: list[str] = []
if os.environ.get("RELAY_SANITIZE"):
    sanitizers = [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
    ]
    flags += [*sanitizers, "-g", "-O1"]
    links += sanitizers

builder = FFI()
builder.cdef("".join((HERE / name).read_text() for name in FACE))
builder.set_source(
    "relay.kernel._pump",
    "".join(["#include <stdint.h>\n", *(f'#include "{name}"\n' for name in FACE)]),
    sources=[os.path.relpath(HERE / name, ROOT) for name in SOURCES],
    include_dirs=[os.path.relpath(HERE, ROOT)],
    depends=[os.path.relpath(HERE / name, ROOT) for name in HEADERS],
    extra_compile_args=flags,
    extra_link_args=links,
    py_limited_api=True,
    define_macros=[("Py_LIMITED_API", "0x030b0000")],
)

if __name__ == "__main__":
    os.chdir(ROOT)
    builder.compile(verbose=False)
