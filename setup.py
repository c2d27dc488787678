"""The one thing pyproject.toml cannot say: which cffi module to compile, and that it is abi3."""

from setuptools import setup

setup(
    cffi_modules=["relay/kernel/build.py:builder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
