"""A `docker` for documents: podman with the image of this tree, as tests/containers.py has it.

Containers and volumes get names of this process's own. Nothing is published: a container is in the network of who
starts it, where its ports are what `-p` would make them. `docker build -t relay .` builds that image, with the network
of the tests for what has to be fetched.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from containers import TAG, building, home, image, podman, settings

NAMES = ("camera", "camera-data", "relay-data")  # what documents call their containers and volumes

SCRIPT = """\
#!{python}
import os, sys
box, tag, names, left = {box!r}, {tag!r}, {names!r}, 1
if sys.argv[1] == "build":
    assert sys.argv[2:] == ["-t", "relay", "."], "this docker builds relay, here"
    os.execvp("flock", ["flock", {lock!r}, "nsenter", "--net={network}", *{building!r}])
words, mine = iter(sys.argv[1:]), ["podman"]
for word in words:
    name, colon, rest = word.partition(":")
    if word == "-p":
        next(words)
    elif name in names:
        mine.append(box + "-" + name + colon + rest)
    elif word == "relay" and "run" in mine and left:
        left = 0
        mine.append(tag)
    else:
        mine.append(word)
        mine += ["--network=host", "--label", box] if word == "run" and len(mine) == 2 else []
os.execvp("podman", mine)
"""


@contextlib.contextmanager
def docker(scratch: Path) -> Iterator[dict[str, str]]:
    """Puts it into `scratch`; what the environment needs beside a PATH that begins there. Skips where there can be no
    image."""
    image()
    box = f"relay-docs-{os.getpid()}"
    command = scratch / "docker"
    command.write_text(
        SCRIPT.format(
            python=sys.executable,
            box=box,
            tag=TAG,
            names=NAMES,
            lock=str(home() / "lock"),
            network=f"/proc/{os.getpid()}/ns/net",
            building=building(),
        )
    )
    command.chmod(0o755)
    try:
        yield {key: value for key, value in settings().items() if key.startswith("CONTAINERS_")}
    finally:
        made = podman("ps", "-aq", "--filter", f"label={box}").stdout.split()
        podman("rm", "-f", "-v", "-i", *made, f"{box}-none")
        for name in NAMES:  # those that the document did not remove
            podman("volume", "rm", "-f", f"{box}-{name}", check=False)
