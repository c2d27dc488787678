"""The package: what importing it loads, and where its names lead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import relay


def test_import_is_lazy() -> None:
    """`import relay` loads neither the C core, NumPy, nor anything else of relay, and names what it has."""
    code = (
        "import sys, relay; print([m for m in sys.modules if m.startswith('relay.') or m == 'numpy']);"
        "assert {'Arena', 'share', 'splice'} <= set(dir(relay)); relay.Arena; print('numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(relay.__file__).parent.parent)},
    )  # fmt: skip
    assert done.stdout.split("\n")[:2] == ["[]", "False"]
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = relay.nonsense  # type: ignore[attr-defined]


def test_every_public_name_leads_somewhere() -> None:
    """Each name in relay.__all__ can be had, and has a docstring."""
    for name in relay.__all__:
        found = getattr(relay, name)
        assert name == "__version__" or found.__doc__, name
