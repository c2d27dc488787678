"""`relay send`: every exit code, every way across, receivers that behave and receivers that do not."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pty
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import forked
import peers
import pytest
from peers import PATIENCE, accept, assert_same, payload, receive_all, refused_address, tcp_listener

from relay.endpoints.digest import new_digest
from relay.errors import UsageError
from relay.sending.sending import send

MIB = 1 << 20
RELAY = [sys.executable, "-m", "relay"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of 3 MiB and a bit, which no pipe holds."""
    path = tmp_path / "data.bin"
    path.write_bytes(payload(7, 3 * MIB + 4567))
    return path


def relay(*words: str | Path, **options: object) -> subprocess.CompletedProcess[bytes]:
    """`relay send` in a process of its own, run to its end."""
    options.setdefault("stdin", subprocess.DEVNULL)
    return peers.run([*RELAY, "send", *words], **options)


class Receivers:
    """Threads that each take connections on a listener of their own and keep what arrives, in order."""

    def __init__(self, count: int, connections: int = 1) -> None:
        self.streams: list[list[bytes]] = [[] for _ in range(count)]
        self.addresses: list[str] = []
        self._stack = contextlib.ExitStack()
        self._threads: list[threading.Thread] = []
        for streams in self.streams:
            listener, address = self._stack.enter_context(tcp_listener())
            self.addresses.append(address)
            wanted = (listener, connections, streams)
            self._threads.append(threading.Thread(target=self._receive, args=wanted, daemon=True))
            self._threads[-1].start()

    def _receive(self, listener: socket.socket, connections: int, streams: list[bytes]) -> None:
        for _ in range(connections):
            with accept(listener) as sock:
                streams.append(receive_all(sock))

    def __enter__(self) -> Receivers:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(PATIENCE)
        self._stack.close()

    @property
    def options(self) -> list[str]:
        """`--to ADDRESS` for each."""
        return [word for address in self.addresses for word in ("--to", address)]


@contextlib.contextmanager
def thread(function: Callable[[], None]) -> Iterator[None]:
    """`function` beside the block, joined at its end; what it raises is raised there."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failed.append(error)

    beside = threading.Thread(target=run, daemon=True)
    beside.start()
    yield
    beside.join(PATIENCE)
    assert not beside.is_alive()
    if failed:
        raise failed[0]


def reset(sock: socket.socket) -> None:
    """Closes with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# --- delivered --------------------------------------------------------------------------------------------


def test_a_file_arrives_whole_and_its_result_says_how(data: Path) -> None:
    """One file to one receiver: exit 0, the same bytes, one line with bytes, rate and method on stdout."""
    with Receivers(1) as to:
        ended = relay(data, *to.options)
    assert ended.returncode == 0, ended.stderr
    assert_same(to.streams[0][0], data.read_bytes())
    (line,) = ended.stdout.decode().splitlines()
    size = data.stat().st_size
    assert re.search(rf"{size} bytes in \d+\.\d\d s \(.*/s, sendfile\), delivered$", line), line


def test_an_empty_file_arrives_as_an_empty_stream(tmp_path: Path) -> None:
    """A file without bytes is a connection that ends cleanly, and exit 0."""
    (tmp_path / "empty").touch()
    with Receivers(1) as to:
        assert send([str(tmp_path / "empty")], to.addresses) == 0
    assert to.streams == [[b""]]


def test_a_stdin_without_bytes_arrives_as_an_empty_stream() -> None:
    """No FILE means stdin; /dev/null there is an empty stream."""
    with Receivers(2) as to:
        assert relay(*to.options).returncode == 0
    assert to.streams == [[b""], [b""]]


def test_many_files_go_to_many_addresses_in_order(tmp_path: Path) -> None:
    """Each file is a connection of its own at each address, in the order given; a line for every pair."""
    contents = [payload(seed, size) for seed, size in ((1, 5), (2, 0), (3, MIB + 1), (4, 70000))]
    files = []
    for number, content in enumerate(contents):
        files.append(tmp_path / f"{number}.bin")
        files[-1].write_bytes(content)
    with Receivers(3, connections=4) as to:
        ended = relay(*files, *to.options)
    assert ended.returncode == 0, ended.stderr
    assert to.streams == [contents] * 3
    lines = ended.stdout.decode().splitlines()
    assert len(lines) == 12
    assert len({line.split(": ")[0] for line in lines}) == 12


def test_each_address_has_its_own_pace(data: Path) -> None:
    """A receiver that does not read holds nobody: the other has the file while that one has nothing."""
    got = threading.Event()

    def quick(listener: socket.socket) -> None:
        with accept(listener) as sock:
            assert_same(receive_all(sock), data.read_bytes())
            got.set()

    def stalled(listener: socket.socket) -> None:
        with accept(listener) as sock:
            assert got.wait(PATIENCE)
            assert_same(receive_all(sock), data.read_bytes())

    with tcp_listener() as (one, fast), tcp_listener() as (two, slow):
        two.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with thread(lambda: quick(one)), thread(lambda: stalled(two)):
            assert send([str(data)], [slow, fast]) == 0


@pytest.mark.parametrize("method", ["auto", "sendfile", "splice", "vmsplice", "copy"])
@pytest.mark.parametrize("kind", ["tcp", "unix", "file", "fifo"])
def test_every_method_delivers_the_same_bytes(
    method: str, kind: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forced or not, every way to every kind of end is byte-identical; what was impossible is said."""
    got: list[bytes] = []

    def from_listener(listener: socket.socket) -> None:
        with accept(listener) as sock:
            got.append(receive_all(sock))

    with contextlib.ExitStack() as stack:
        if kind == "tcp":
            listener, address = stack.enter_context(tcp_listener())
            stack.enter_context(thread(lambda: from_listener(listener)))
        elif kind == "unix":
            listener, address = stack.enter_context(peers.unix_listener(tmp_path / "sock"))
            stack.enter_context(thread(lambda: from_listener(listener)))
        elif kind == "fifo":
            os.mkfifo(tmp_path / "fifo")
            address = f"fifo://{tmp_path}/fifo"
            stack.enter_context(thread(lambda: got.append((tmp_path / "fifo").read_bytes())))
        else:
            address = str(tmp_path / "out.bin")
        assert send([str(data)], [address], method=method) == 0
    if kind == "file":
        got.append((tmp_path / "out.bin").read_bytes())
    assert_same(got[0], data.read_bytes())
    said = capsys.readouterr().out
    if method == "sendfile" and kind == "file":
        assert ", splice)" in said
        assert "splice: sendfile takes a file straight to one socket" in said
    elif method != "auto":
        assert f", {method})" in said


@pytest.mark.parametrize("options", [{"rate": "100MB/s"}, {"on_slow": "disconnect"}, {"checksum": "xxh3"}])
def test_options_change_no_byte(options: dict[str, str], data: Path, tmp_path: Path) -> None:
    """A rate, a policy, a checksum: the file is the same."""
    assert send([str(data)], [str(tmp_path / "out")], **options) == 0  # type: ignore[arg-type]
    assert_same((tmp_path / "out").read_bytes(), data.read_bytes())


def test_a_rate_is_kept(tmp_path: Path) -> None:
    """1 MB at 2 MB/s takes no less than the rate allows, its burst of a tenth of a second apart."""
    (tmp_path / "in").write_bytes(bytes(1_000_000))
    began = time.monotonic()
    assert send([str(tmp_path / "in")], ["null:"], rate="2MB/s") == 0
    assert time.monotonic() - began > 0.35


def test_offset_and_length_choose_a_part(data: Path, tmp_path: Path) -> None:
    """`--offset` leaves out the beginning, `--length` the rest."""
    out = tmp_path / "out"
    assert send([str(data)], [str(out)], offset="1MiB", length=12345) == 0
    assert_same(out.read_bytes(), data.read_bytes()[MIB : MIB + 12345])
    assert send([str(data)], [str(out)], offset=data.stat().st_size) == 0
    assert out.read_bytes() == b""


def test_a_length_that_is_not_there_is_an_error(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Less than `--length` in a file, or an `--offset` beyond its end, fails the source; no file is made."""
    out = tmp_path / "out"
    assert send([str(data)], [str(out)], length="1GB") == 4
    assert send([str(data)], [str(out)], offset="1GB") == 4
    assert not out.exists()
    said = capsys.readouterr().out
    assert "not 1000000000; check --offset and --length" in said
    assert "beyond its end; check --offset" in said


# --- stdin ------------------------------------------------------------------------------------------------


def test_a_piped_stdin_is_teed_to_every_address(data: Path, tmp_path: Path) -> None:
    """One pass over a pipe fills two sockets and a file, and leaves the pipe's checksum in every line."""
    with Receivers(2) as to:
        out = tmp_path / "out"
        ended = relay(
            "-", *to.options, "--to", out, "--checksum", "sha256", input=data.read_bytes(), stdin=None
        )
    assert ended.returncode == 0, ended.stderr
    for got in (to.streams[0][0], to.streams[1][0], out.read_bytes()):
        assert_same(got, data.read_bytes())
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    assert ended.stdout.decode().count(f"sha256={digest}") == 3


def test_a_redirected_stdin_is_read_from_where_it_stands(data: Path, tmp_path: Path) -> None:
    """A file on stdin is sent from its position on, with `--offset` and `--length` counted from there."""
    with data.open("rb") as stream:
        os.lseek(stream.fileno(), 1000, os.SEEK_SET)
        ended = relay("--to", tmp_path / "out", "--offset", "24", "--length", "5000", stdin=stream)
    assert ended.returncode == 0, ended.stderr
    assert_same((tmp_path / "out").read_bytes(), data.read_bytes()[1024:6024])


def test_a_part_of_a_pipe_leaves_the_rest_in_it(tmp_path: Path) -> None:
    """Of a piped stdin exactly offset and length are read: what follows is for whoever reads next."""
    r, w = os.pipe()
    os.write(w, b"0123456789abcdef")
    os.close(w)
    with os.fdopen(r, "rb", buffering=0) as stream:
        ended = relay("--to", tmp_path / "out", "--offset", "3", "--length", "5", stdin=stream)
        assert (ended.returncode, stream.read(100)) == (0, b"89abcdef")
    assert (tmp_path / "out").read_bytes() == b"34567"


def test_a_pipe_that_ends_before_the_length_is_a_failing_source(tmp_path: Path) -> None:
    """Exit 4, and what came is not taken for the whole."""
    ended = relay("--to", tmp_path / "out", "--length", "100", input=b"too short", stdin=None)
    assert ended.returncode == 4
    assert b"ended 91 bytes early" in ended.stdout
    assert not (tmp_path / "out").exists()


def test_a_terminal_as_stdin_is_copied(tmp_path: Path) -> None:
    """What is typed goes out; ^D ends it."""
    master, slave = pty.openpty()
    try:
        mode = termios.tcgetattr(slave)
        mode[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, mode)
        argv = [*RELAY, "send", "--to", tmp_path / "out"]
        with peers.running(argv, stdin=slave, stdout=subprocess.PIPE) as process:
            os.write(master, b"typed\n\x04")
            said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
        assert b"copy: a terminal or device is not spliced" in said
    finally:
        os.close(master)
        os.close(slave)
    assert (tmp_path / "out").read_bytes() == b"typed\n"


@pytest.mark.parametrize("policy", ["block", "drop", "disconnect", "spill"])
def test_every_policy_delivers_to_who_keeps_pace(policy: str, data: Path) -> None:
    """Teed or not, receivers that read get every byte, whatever would happen if they did not."""
    with Receivers(2, connections=2) as to:
        ended = relay(data, "-", *to.options, "--on-slow", policy, input=data.read_bytes(), stdin=None)
    assert ended.returncode == 0, ended.stderr
    for streams in to.streams:
        assert_same(streams[0], data.read_bytes())
        assert_same(streams[1], data.read_bytes())


def test_a_spill_does_not_wait_for_ever(data: Path) -> None:
    """A receiver that refuses fails when `--wait` is over, also through a log; the other one has it all."""
    with Receivers(1) as to:
        words = ["--to", refused_address(), "--on-slow", "spill", "--wait", "300ms"]
        ended = relay(*to.options, *words, input=data.read_bytes(), stdin=None)
    assert ended.returncode == 1, ended.stderr
    assert_same(to.streams[0][0], data.read_bytes())
    assert b"ECONNREFUSED" in ended.stdout


def test_stdout_as_a_sink_moves_the_results_to_stderr(data: Path) -> None:
    """`--to -` writes the bytes and nothing else to stdout."""
    ended = relay(data, "--to", "-")
    assert ended.returncode == 0
    assert_same(ended.stdout, data.read_bytes())
    assert b"delivered" in ended.stderr


def test_a_fifo_among_the_files_is_a_stream_like_stdin(tmp_path: Path) -> None:
    """Files, a fifo and stdin in one command arrive in the order given."""
    (tmp_path / "a").write_bytes(b"first")
    os.mkfifo(tmp_path / "b")
    with Receivers(2, connections=3) as to, thread(lambda: _write(tmp_path / "b", b"second")):
        ended = relay(tmp_path / "a", tmp_path / "b", "-", *to.options, input=b"third", stdin=None)
    assert ended.returncode == 0, ended.stderr
    assert to.streams == [[b"first", b"second", b"third"]] * 2


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


# --- receivers that do not behave -------------------------------------------------------------------------


def test_a_receiver_that_resets_harms_nobody_else(data: Path) -> None:
    """One of three resets mid-file: the other two have it whole, the exit code is 1."""

    def resets(listener: socket.socket) -> None:
        sock = accept(listener)
        peers.receive_exactly(sock, 1000)
        reset(sock)

    with tcp_listener() as (listener, bad), Receivers(2) as to, thread(lambda: resets(listener)):
        ended = relay(data, *to.options, "--to", bad, "--rate", "10MB/s")
    assert ended.returncode == 1
    for stream in to.streams:
        assert_same(stream[0], data.read_bytes())
    (failed,) = [line for line in ended.stdout.decode().splitlines() if "failed" in line]
    assert bad in failed
    assert "ECONNRESET" in failed or "EPIPE" in failed


def test_a_reset_after_the_last_byte_was_sent_is_a_failure(tmp_path: Path) -> None:
    """Bytes that fit the receiver's window but were never acknowledged as read to the end do not count."""
    (tmp_path / "in").write_bytes(payload(3, 8 * MIB))

    def resets(listener: socket.socket) -> None:
        sock = accept(listener)
        peers.wait_for(sock)
        reset(sock)  # with unread bytes, long before the end was acknowledged

    with tcp_listener() as (listener, bad):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with thread(lambda: resets(listener)):
            assert send([str(tmp_path / "in")], [bad]) == 5


def test_a_program_that_stops_reading_is_a_failure(data: Path) -> None:
    """socat feeds a `head` that wants 1000 bytes and ends with the rest unread: that is no delivery."""
    argv = ["socat", "-d", "-d", "-u", "TCP-LISTEN:0,bind=127.0.0.1", "SYSTEM:head -c 1000 >/dev/null"]
    with peers.listening(argv, r"listening on AF=2 127\.0\.0\.1:(\d+)") as peer:
        ended = relay(data, "--to", peer.address, "--rate", "20MB/s")
    assert ended.returncode == 5
    assert b"failed" in ended.stdout


def test_a_unix_receiver_that_closes_unread_is_a_failure(tmp_path: Path) -> None:
    """What lies in a unix socket unread when it is closed was not delivered, however little it is."""
    (tmp_path / "in").write_bytes(b"little")

    def closes(listener: socket.socket) -> None:
        with accept(listener) as sock:
            peers.wait_for(sock)

    with peers.unix_listener(tmp_path / "sock") as (listener, address), thread(lambda: closes(listener)):
        assert send([str(tmp_path / "in")], [address]) == 5


def test_too_few_descriptors_are_named(tmp_path: Path) -> None:
    """When no descriptor is left, sinks fail with what to raise; nothing hangs."""
    (tmp_path / "in").write_bytes(b"x")
    everybody = [word for number in range(20) for word in ("--to", tmp_path / f"out{number}")]
    for words in ((tmp_path / "in",), ("-",)):
        for most in (40, 60):
            ended = relay(
                *words, *everybody,
                preexec_fn=lambda most=most: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)),
            )  # fmt: skip
            assert ended.returncode in (1, 5), ended.stderr
            assert b"raise the limit of open files (ulimit -n)" in ended.stdout + ended.stderr


def test_when_everybody_refuses_the_code_is_5(data: Path) -> None:
    """Two refused connections: exit 5, and each line says what to do."""
    ended = relay(data, "--to", refused_address(), "--to", refused_address())
    assert ended.returncode == 5
    assert ended.stdout.decode().count("Connection refused (ECONNREFUSED); is the receiver running") == 2
    assert b"ECONNREFUSED" in ended.stderr


def test_a_refused_stdin_with_a_checksum_does_not_read_on() -> None:
    """When every address refuses, a checksum alone is no reason to read an endless stdin."""
    with Path("/dev/zero").open("rb") as zeros:
        ended = relay("--to", refused_address(), "--checksum", "crc32c", stdin=zeros)
    assert ended.returncode == 5


def test_waiting_finds_a_receiver_that_comes_later(data: Path) -> None:
    """With `--wait` a refused connection is tried again until somebody listens."""
    address = refused_address()
    traced = ["strace", "-f", "-qq", "-e", "trace=connect"]
    argv = [*traced, *RELAY, "send", data, "--to", address, "--wait", "20s"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with peers.running(argv, bufsize=0, **pipes) as process:
        assert process.stderr is not None
        peers.read_until(process.stderr, r"ECONNREFUSED|EINPROGRESS")
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", int(address.rpartition(":")[2])))
            listener.listen()
            with accept(listener) as sock:
                assert_same(receive_all(sock), data.read_bytes())
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 0


def test_waiting_comes_to_an_end(data: Path) -> None:
    """Patience is for the time given, and once for an address, not once for a file."""
    began = time.monotonic()
    assert send([str(data)] * 20, [refused_address()], wait="300ms") == 5
    assert 0.3 <= time.monotonic() - began < 3


@pytest.mark.parametrize("options", [("-N",), ()])
def test_netcat_receives_whole(options: Sequence[str], data: Path, tmp_path: Path) -> None:
    """`nc -N -l` half-closes at once and goes on receiving: that is no failure."""
    with peers.nc_receiver(tmp_path / "got", *options) as peer:
        ended = relay(data, "--to", peer.address)
        assert ended.returncode == 0, ended.stdout
        assert peer.wait() == 0
    assert_same((tmp_path / "got").read_bytes(), data.read_bytes())


def test_ncat_receives_whole(data: Path, tmp_path: Path) -> None:
    """`ncat -l` too."""
    with (tmp_path / "got").open("wb") as out:
        port = refused_address().rpartition(":")[2]  # ncat does not say which one it took for 0
        argv = ["ncat", "-v", "-n", "-l", "127.0.0.1", port]
        said = r"Listening on 127\.0\.0\.1:(\d+)"
        with peers.listening(argv, said, stdin=subprocess.DEVNULL, stdout=out) as peer:
            assert relay(data, "--to", peer.address).returncode == 0
            assert peer.wait() == 0
    assert_same((tmp_path / "got").read_bytes(), data.read_bytes())


def test_a_receiver_that_talks_back_gets_everything(data: Path) -> None:
    """What the receiver says is read and thrown away, before, while and after the file comes."""

    def chats(listener: socket.socket) -> None:
        with accept(listener) as sock:
            sock.sendall(b"hello" * 10000)
            assert_same(receive_all(sock), data.read_bytes())
            sock.sendall(b"thanks" * 10000)

    with tcp_listener() as (listener, address), thread(lambda: chats(listener)):
        assert send([str(data)], [address]) == 0


# --- files that cannot be sent ----------------------------------------------------------------------------


def test_what_cannot_be_read_is_named_and_the_rest_is_sent(data: Path, tmp_path: Path) -> None:
    """A missing file and a directory: exit 4, each named once on stderr, and the good file arrives."""
    with Receivers(2) as to:
        ended = relay(tmp_path / "missing", tmp_path, data, *to.options)
    assert ended.returncode == 4
    for streams in to.streams:
        assert_same(streams[0], data.read_bytes())
    said = ended.stderr.decode()
    assert said.count(f"opening {tmp_path}/missing: No such file or directory (ENOENT); check the path") == 1
    assert said.count(f"opening {tmp_path}: Is a directory (EISDIR)") == 1


def test_a_missing_file_makes_nothing(tmp_path: Path) -> None:
    """When the source cannot be opened no sink is: no connection, no `.part`."""
    assert send([str(tmp_path / "missing")], [str(tmp_path / "out"), refused_address()]) == 4
    assert list(tmp_path.iterdir()) == []


@forked.needs_root
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    """EACCES is a failing source: exit 4."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    secret.chmod(0o600)
    folder = os.open(tmp_path, os.O_RDONLY)  # nobody else may pass through the folders above it

    def sends() -> int:
        os.fchdir(folder)
        forked.become(61234)
        return send(["secret"], ["null:"], progress="none")

    try:
        tmp_path.chmod(0o755)
        with forked.forked(sends) as child:
            assert child.answer() == 4
    finally:
        os.close(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: os.truncate(path, 4 * MIB), "it shrank from"),
        (lambda path: path.open("ab").write(b"more"), "it grew from"),
        (lambda path: os.utime(path), "it was written to"),
    ],
    ids=["shrinks", "grows", "written"],
)
def test_a_file_that_changes_is_a_failing_source(
    change: Callable[[Path], object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The receiver sees a reset and no clean end; the exit code is 4 and the line says what changed."""
    path = tmp_path / "in"
    path.write_bytes(payload(5, 16 * MIB))

    def receives(listener: socket.socket) -> None:
        with accept(listener) as sock:
            peers.receive_exactly(sock, 1000)
            change(path)
            with pytest.raises(ConnectionResetError):
                receive_all(sock)

    with tcp_listener() as (listener, address):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        with thread(lambda: receives(listener)):
            assert send([str(path)], [address]) == 4
    assert said in capsys.readouterr().out


def test_a_changed_file_leaves_a_part(tmp_path: Path) -> None:
    """A file sink keeps its `.part` and says so; the name is not given."""
    path = tmp_path / "in"
    path.write_bytes(bytes(3 * MIB))
    argv = [*RELAY, "send", path, "--to", tmp_path / "out", "--rate", "5MB/s"]
    with peers.running(argv, stdout=subprocess.PIPE) as process:
        peers.eventually((tmp_path / "out.part").exists, "the part")
        path.write_bytes(b"other")
        said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 4
    assert f"what was written stays in {tmp_path}/out.part".encode() in said
    assert not (tmp_path / "out").exists()


def test_a_full_disk_fails_that_sink_alone(data: Path, tmp_path: Path) -> None:
    """At the file size limit the file sink fails, names its `.part`, and the socket gets everything."""
    with Receivers(1) as to:
        ended = relay(
            data, *to.options, "--to", tmp_path / "out",
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB)),
        )  # fmt: skip
    assert ended.returncode == 1
    assert_same(to.streams[0][0], data.read_bytes())
    said = ended.stdout.decode()
    assert "File too large (EFBIG)" in said
    assert f"what was written stays in {tmp_path}/out.part" in said


@forked.needs_root
def test_a_full_filesystem_is_named(data: Path, tmp_path: Path) -> None:
    """ENOSPC: exit 5 when it is the only sink."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is refused: {mounted.stderr.decode().strip()}")
    try:
        ended = relay(data, "--to", small / "out")
    finally:
        subprocess.run(["umount", "-l", small], check=True)
    assert ended.returncode == 5
    assert b"No space left on device (ENOSPC); free some space" in ended.stdout


# --- checksums --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sha256", "blake3", "xxh3", "crc32c"])
@pytest.mark.parametrize("source", ["file", "stdin"])
def test_a_checksum_is_right_or_the_code_is_6(
    algorithm: str, source: str, data: Path, tmp_path: Path
) -> None:
    """The digest of what was sent is shown; given right it changes nothing, given wrong the code is 6."""
    digest = new_digest(algorithm)
    digest.update(data.read_bytes()[100:])
    right = digest.hexdigest()
    wrong = right[:-1] + ("0" if right[-1] != "0" else "1")
    words = ["--to", "null:", "--to", tmp_path / "out", "--offset", "100", "--checksum"]
    for given, code in ((algorithm, 0), (f"{algorithm}={right.upper()}", 0), (f"{algorithm}={wrong}", 6)):
        if source == "file":
            ended = relay(data, *words, given)
        else:
            ended = relay(*words, given, input=data.read_bytes(), stdin=None)
        assert ended.returncode == code, ended.stderr
        assert ended.stdout.decode().count(f"{algorithm}={right}") == 2
        if code:
            assert f"{algorithm} is {right}, but {wrong} was given" in ended.stderr.decode()


def test_a_failing_sink_is_told_before_a_wrong_checksum(data: Path) -> None:
    """5 comes before 6, and 6 before 1."""
    wrong = "crc32c=00000000"
    assert send([str(data)], [refused_address()], checksum=wrong) == 5
    assert send([str(data)], [refused_address(), "null:"], checksum=wrong) == 6


# --- usage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": ["tpc://127.0.0.1:1"]}, "did you mean 'tcp'"),
        ({"to": ["tcp://127.0.0.1:65536"]}, "port 65536 in 'tcp://127.0.0.1:65536' is out of range"),
        ({"to": ["tcp://127.0.0.1:0"]}, "port 0"),
        ({"to": ["tcp://:9000"]}, "names no host"),
        ({"to": ["out/"]}, "is a directory"),
        ({"to": ["out"]}, "2 files would all be written to out; give each a name of its own"),
        ({"to": ["a/{nmae}"]}, "did you mean 'name'"),
        ({"to": ["-", "-"]}, "is given 2 times"),
        ({"files": ["-", "-"]}, "stdin can be read only once"),
        ({"files": [""]}, "FILE is empty"),
        ({"rate": "10MB"}, "--rate"),
        ({"rate": "0"}, "--rate: must be more than 0"),
        ({"offset": "-1"}, "--offset"),
        ({"length": "many"}, "--length"),
        ({"wait": "soon"}, "--wait"),
        ({"checksum": "md5"}, "--checksum: unknown 'md5'"),
        ({"checksum": "sha265"}, "did you mean 'sha256'"),
        ({"checksum": "crc32c=xyz"}, "crc32c has 8 hexadecimal digits"),
        ({"checksum": "crc32c=00000000"}, "gives one digest, but there are 2 files"),
        ({"method": "tee"}, "--method"),
        ({"on_slow": "dorp"}, "did you mean 'drop'"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, object], said: str) -> None:
    """Every slip on the command line is a UsageError that names the option; nothing is opened."""
    wanted = {"files": ["a", "b"], "to": ["null:"], **options}
    with pytest.raises(UsageError, match=re.escape(said)):
        send(**wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("words", [("--to", "tpc://x:1"), ("--method", "teleport"), ("--rate", "fast")])
def test_usage_errors_are_code_2(words: Sequence[str]) -> None:
    """The command exits with 2 and says why on stderr."""
    ended = relay("/dev/null", *words)
    assert ended.returncode == 2
    assert ended.stderr
    assert not ended.stdout


def test_the_default_address_is_the_server_of_this_machine(data: Path) -> None:
    """Without `--to` the receiver is tcp://127.0.0.1:9000."""
    try:
        with socket.create_connection(("127.0.0.1", 9000), 1):
            pytest.skip("port 9000 is free to be refused: here somebody listens on it")
    except OSError:
        pass
    ended = relay(data)
    assert ended.returncode == 5
    assert b"connecting to tcp://127.0.0.1:9000" in ended.stdout


def test_an_unknown_host_is_a_failing_sink(data: Path) -> None:
    """A name that nobody knows: exit 5, with the name in the message."""
    ended = relay(data, "--to", "tcp://no-such-host.invalid:9")
    assert ended.returncode == 5
    assert b"looking up 'no-such-host.invalid'" in ended.stdout


def test_files_into_a_folder_are_named_after_themselves(tmp_path: Path) -> None:
    """`{name}` is each file's own; what is there already is never overwritten."""
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    names = [str(tmp_path / "a"), str(tmp_path / "b")]
    for _ in range(2):
        assert send(names, [f"{tmp_path}/out/{{name}}"]) == 0
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert found == {"a": b"a", "b": b"b", "a-2": b"a", "b-2": b"b"}


# --- signals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_at_once(number: signal.Signals, code: int, data: Path, tmp_path: Path) -> None:
    """Mid-way: within 2 s, the receiver sees a reset, the `.part` stays and is named, 130 or 143."""
    with tcp_listener() as (listener, address):
        argv = [*RELAY, "send", data, "--to", address, "--to", tmp_path / "out", "--rate", "1MB/s"]
        with peers.running(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            with accept(listener) as sock:
                peers.receive_exactly(sock, 1000)
                part = tmp_path / "out.part"
                peers.eventually(lambda: part.exists() and part.stat().st_size, "the part has bytes")
                began = time.monotonic()
                process.send_signal(number)
                with pytest.raises(ConnectionResetError):
                    receive_all(sock)
            said, _ = process.communicate(timeout=PATIENCE)
        assert time.monotonic() - began < 2
    assert process.returncode == code
    assert f"what was written stays in {tmp_path}/out.part".encode() in said
    assert not (tmp_path / "out").exists()


def test_a_signal_ends_a_wait_for_a_receiver(data: Path) -> None:
    """Nobody listens and `--wait` is long: SIGINT ends it all the same, and what waits is not begun."""
    traced = ["strace", "-f", "-qq", "-I", "2", "-e", "trace=connect"]
    argv = [*traced, *RELAY, "send", data, data, "--to", refused_address(), "--wait", "1h"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with peers.running(argv, bufsize=0, **pipes) as process:
        assert process.stderr is not None
        peers.read_until(process.stderr, r"connect\(")
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGINT)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 130


def test_a_closed_stdout_does_not_stop_the_sending(data: Path, tmp_path: Path) -> None:
    """Whoever read the results went away: the bytes are delivered all the same, exit 0."""
    r, w = os.pipe()
    os.close(r)
    with os.fdopen(w, "wb") as stdout:
        ended = relay(data, "--to", tmp_path / "out", stdout=stdout)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert_same((tmp_path / "out").read_bytes(), data.read_bytes())
