"""A `docker` for documents: podman with the image of this tree, as tests/containers.py has it.

Containers and volumes get names of this process's own. Nothing is published: a container is in the network of who
starts it, where its ports are what `-p` would make them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from containers import TAG, image, podman, settings

NAME = "camera"  # what documents call their container; the volume is NAME-data

SCRIPT = """\
#!{python}
import os, sys
words, mine = iter(sys.argv[1:]), ["podman"]
box, tag, left = {box!r}, {tag!r}, 1
for word in words:
    if word == "-p":
        next(words)
    elif word == {name!r} or word.partition(":")[0] == {name!r} + "-data":
        mine.append(word.replace({name!r}, box, 1))
    elif word == "relay" and "run" in mine and left:
        left = 0
        mine.append(tag)
    else:
        mine.append(word)
        mine += ["--network=host"] if word == "run" and len(mine) == 2 else []
os.execvp("podman", mine)
"""


@contextlib.contextmanager
def docker(scratch: Path) -> Iterator[dict[str, str]]:
    """Puts it into `scratch`; what the environment needs beside a PATH that begins there. Skips where there can be no
    image."""
    image()
    box = f"relay-docs-{os.getpid()}"
    command = scratch / "docker"
    command.write_text(SCRIPT.format(python=sys.executable, box=box, tag=TAG, name=NAME))
    command.chmod(0o755)
    try:
        yield {key: value for key, value in settings().items() if key.startswith("CONTAINERS_")}
    finally:
        podman("rm", "-f", "-v", "-i", box)
        podman("volume", "rm", "-f", f"{box}-data", check=False)  # there is none when the document removed it
