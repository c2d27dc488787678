"""A block device whose reads and writes fail when a test says so, and an ext4 on it.

Facts (man 4 fuse, 4 loop; include/uapi/linux/fuse.h; Documentation/filesystems/fuse):
- A loop device passes what its backing file answers on to whoever uses the device: EIO there is an I/O error of the
  device, in dmesg too.
- A FUSE file opened with FOPEN_DIRECT_IO is not cached: every read and write of it is a message to its server.
- The kernel ends a mount's connection when the server's descriptor of /dev/fuse is closed.

What this means here: the backing file is the one file of a FUSE mount that this module serves from a thread. The
filesystem on top is the kernel's own ext4: errors come out of it as they do when a disk dies. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from peers import program

_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _WRITE = 1, 2, 3, 14, 15, 16
_STATFS, _RELEASE, _FSYNC, _FLUSH, _INIT, _INTERRUPT, _BATCH_FORGET = 17, 18, 20, 25, 26, 36, 42
_DIRECT_IO = 1
_MOST = 128 << 10  # bytes of one message's payload

_HEADER = struct.Struct("<IIQQIIIHH")
_MOVE = struct.Struct(
    "<QQIIQII"
)  # of a read and a write: fh, offset, size, flags, lock owner, flags, padding

_libc = ctypes.CDLL(None, use_errno=True)


class Device:
    """The backing file's bytes and its server; `fails_reads` and `fails_writes` are in force at once."""

    def __init__(self, place: Path, size: int) -> None:
        self.fails_reads = False
        self.fails_writes = False
        self.refused = 0
        self._size = size
        self._bytes = os.memfd_create("device", os.MFD_CLOEXEC)
        os.ftruncate(self._bytes, size)
        self._fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fuse},rootmode=40000,user_id=0,group_id=0,max_read={_MOST}".encode()
        if _libc.mount(b"device", bytes(place), b"fuse", 6, options):  # nosuid, nodev
            code = ctypes.get_errno()
            os.close(self._fuse)
            os.close(self._bytes)
            pytest.skip(f"mounting a fuse filesystem is refused here: {os.strerror(code)}")
        self._thread = threading.Thread(target=self._serve, name="device", daemon=True)
        self._thread.start()
        self.file = place / "disk"

    def close(self) -> None:
        """Once it is unmounted: its server has ended."""
        self._thread.join(10)
        os.close(self._fuse)
        os.close(self._bytes)

    def _serve(self) -> None:
        while True:
            try:
                message = os.read(self._fuse, _MOST + 4096)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                return  # ENODEV: it was unmounted
            _length, operation, unique, node, *_ = _HEADER.unpack_from(message)
            if operation in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                continue
            try:
                answer, code = self._answer(operation, node, message[_HEADER.size :]), 0
            except OSError as error:
                answer, code = b"", error.errno or errno.EIO
            with contextlib.suppress(OSError):  # whoever asked was interrupted
                os.write(self._fuse, struct.pack("<IiQ", 16 + len(answer), -code, unique) + answer)

    def _answer(self, operation: int, node: int, body: bytes) -> bytes:
        if operation == _INIT:
            major, minor, ahead, _flags = struct.unpack_from("<IIII", body)
            told = (7, min(minor, 31), ahead, 0, 16, 12, _MOST, 1, _MOST // 4096, 0, 0)
            assert major == 7
            return struct.pack("<IIIIHHIIHHI28x", *told)
        if operation == _LOOKUP:
            if body.rstrip(b"\0") != b"disk":
                raise OSError(errno.ENOENT, "no such file")
            return struct.pack("<QQQQII", 2, 1, 1, 1, 0, 0) + self._attributes(2)
        if operation == _GETATTR:
            return struct.pack("<QII", 1, 0, 0) + self._attributes(node)
        if operation == _OPEN:
            return struct.pack("<QII", 1, _DIRECT_IO, 0)
        if operation in (_READ, _WRITE):
            return self._move(operation == _WRITE, body)
        if operation == _STATFS:
            return struct.pack("<QQQQQIIII24x", 0, 0, 0, 2, 0, 4096, 255, 4096, 0)
        if operation in (_RELEASE, _FSYNC, _FLUSH):
            return b""
        raise OSError(errno.ENOSYS, "not served")

    def _move(self, writes: bool, body: bytes) -> bytes:
        _fh, offset, size, *_ = _MOVE.unpack_from(body)
        if self.fails_writes if writes else self.fails_reads:
            self.refused += 1
            raise OSError(errno.EIO, "the device is broken")
        if not writes:
            return os.pread(self._bytes, size, offset)
        return struct.pack("<II", os.pwrite(self._bytes, body[_MOVE.size : _MOVE.size + size], offset), 0)

    def _attributes(self, node: int) -> bytes:
        kind, size = (stat.S_IFDIR | 0o755, 4096) if node == 1 else (stat.S_IFREG | 0o600, self._size)
        return struct.pack(
            "<QQQQQQIIIIIIIIII", node, size, size // 512, 0, 0, 0, 0, 0, 0, kind, 1, 0, 0, 0, 4096, 0
        )


@contextlib.contextmanager
def broken_disk(place: Path, *, size: int = 64 << 20) -> Iterator[tuple[Device, Path]]:
    """A device that is whole until the test says otherwise, and the directory where its ext4 is mounted."""
    if os.geteuid():
        pytest.skip("a loop device needs root")
    under, over = place / "device", place / "disk"
    under.mkdir()
    over.mkdir()
    device = Device(under, size)
    try:
        make = [program("mkfs.ext4"), "-q", "-F", "-O", "^has_journal", "-E", "nodiscard", str(device.file)]
        subprocess.run(make, check=True, capture_output=True)
        mount = [program("mount"), "-o", "loop,errors=continue", str(device.file), str(over)]
        made = subprocess.run(mount, capture_output=True, check=False)
        if made.returncode:
            pytest.skip(f"mounting a loop device is refused here: {made.stderr.decode().strip()}")
        try:
            yield device, over
        finally:
            device.fails_reads = device.fails_writes = False
            subprocess.run([program("umount"), str(over)], check=True)
    finally:
        subprocess.run([program("umount"), "-l", str(under)], check=True)
        device.close()
