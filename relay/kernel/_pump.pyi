"""The compiled C core, for type checkers: cffi's objects carry no static types."""

from typing import Any

ffi: Any
lib: Any
