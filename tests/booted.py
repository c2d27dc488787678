"""A machine of its own that systemd has booted: namespaces in which it is process 1, and this machine's files beneath.

What is written there is gone at the end, and so is every process. Of units there are those in /etc/systemd/system,
which is empty at first, the targets of TARGETS, and the journal's. relay is installed as /usr/local/bin/relay. It takes
root.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from peers import PATIENCE, eventually, program

ROOT = Path(__file__).resolve().parent.parent
SYSTEMD = Path("/lib/systemd/systemd")
TARGETS = (
    *("sysinit", "basic", "sockets", "timers", "paths", "slices", "local-fs", "network", "multi-user"),
    *("shutdown", "umount", "final"),
)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# As process 1 of the new process namespace. systemd makes control groups in the one that it takes for the root: a group
# of its own. Kernel settings are the whole machine's, so they stay read-only, as in any container.
BOOT = r"""
work=$1 shared=$2 python=$3 libraries=$4 source=$5
mount --make-rprivate /
mount -t tmpfs tmpfs "$work"
mkdir "$work"/{groups,upper,work,root}
mount -t cgroup2 cgroup2 "$work/groups"
group=$work/groups$(sed -n 's/^0:://p' /proc/self/cgroup)/$6
mkdir "$group"
echo 0 > "$group/cgroup.procs"
umount "$work/groups"
mount -t overlay overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/work" "$work/root"
cd "$work/root"
mount -t proc proc proc
mount --bind -o ro proc/sys proc/sys
mount -t sysfs -o ro sysfs sys
mount -t tmpfs tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty; do touch dev/$device; mount --bind /dev/$device dev/$device; done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mkdir -p "./$shared" "./$source" opt/relay/{python,libraries,source}
mount --rbind "$shared" "./$shared"
mount --rbind "$source" "./$source"
cp -r "$source/relay" opt/relay/source
chmod -R a+rX opt/relay/source
mount --rbind "$python" opt/relay/python
mount --rbind "$libraries" opt/relay/libraries
cat > usr/local/bin/relay <<'END'
#!/bin/sh
export LD_LIBRARY_PATH=/opt/relay/python/lib PYTHONPATH=/opt/relay/source:/opt/relay/libraries PYTHONDONTWRITEBYTECODE=1
exec /opt/relay/python/bin/PYTHON -m relay "$@"
END
sed -i "s/PYTHON /$7 /" usr/local/bin/relay
chmod 755 usr/local/bin/relay
rm -rf etc/systemd/system etc/systemd/system.conf.d
mkdir -p etc/systemd/system run/units/multi-user.target.wants
shift 7
for target; do printf '[Unit]\nDefaultDependencies=no\n' > "run/units/$target.target"; done
ln -s /lib/systemd/system/systemd-journald{.service,.socket,-dev-log.socket} run/units
ln -s ../systemd-journald.service run/units/multi-user.target.wants
ip link set lo up
exec unshare --cgroup bash -euc '
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    exec chroot . env -i container=relay PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/units \
        /lib/systemd/systemd --system --unit=multi-user.target --log-target=console --show-status=no'
"""

# Whether all that can be had here: in a mount namespace, so that nothing of it stays.
TRY = r"""
mount -t tmpfs tmpfs "$1"
mkdir "$1"/{groups,upper,work,root}
mount -t cgroup2 cgroup2 "$1/groups"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
"""

# What is left of control groups when all processes are gone.
TIDY = r"""
mount --make-rprivate /
mount -t cgroup2 cgroup2 "$1"
find "$1$(sed -n 's/^0:://p' /proc/self/cgroup)/$2" -depth -type d -delete
"""


def refusal(work: Path) -> str:
    """Why no such machine can be had here, or nothing; `work` is an empty directory."""
    if os.geteuid():
        return "root is missing: a machine of its own takes it"
    if not SYSTEMD.exists():
        return "systemd is missing: apt-get install systemd"
    alone = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--cgroup"]
    tried = subprocess.run(
        [*alone, "bash", "-euc", TRY, "try", work], capture_output=True, text=True, check=False
    )
    return f"a machine of its own cannot be had here: {tried.stderr.strip()}" if tried.returncode else ""


@contextlib.contextmanager
def booted(scratch: Path) -> Iterator[list[str]]:
    """In front of a command: run it on that machine, in the directory `scratch`, which is this machine's."""
    work = scratch.parent / f"{scratch.name}-machine"
    work.mkdir()
    why = refusal(work)
    if why:
        pytest.skip(why)
    group = f"relay-test-{os.getpid()}"
    boot = [
        *(program("unshare"), "--mount", "--net", "--uts", "--ipc", "--pid", "--fork"),
        *("bash", "-euc", BOOT, "boot", work, scratch, sys.base_prefix, sysconfig.get_path("purelib"), ROOT),
        *(group, f"python{sysconfig.get_python_version()}", *TARGETS),
    ]
    log = work.with_suffix(".log")
    with log.open("w") as said:
        outside = subprocess.Popen(boot, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    try:
        yield _entered(outside, scratch, log)
    finally:
        for pid in _inner(outside.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # process 1 there: it is not over before all others are
        outside.wait(PATIENCE)
        subprocess.run(["unshare", "--mount", "bash", "-euc", TIDY, "tidy", work, group], check=True)


def _inner(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in children.split()]


def _entered(outside: subprocess.Popen[bytes], scratch: Path, log: Path) -> list[str]:
    """The words that lead there, once systemd has started everything."""
    state = ""

    def running() -> list[str]:
        nonlocal state
        for pid in _inner(outside.pid):
            enter = [
                *("nsenter", "-t", str(pid)),
                *("--mount", "--net", "--uts", "--ipc", "--pid", "--cgroup", "--root"),
                *(f"--wd=/proc/{pid}/root{scratch}", "env", f"PATH={PATH}"),
            ]
            asked = subprocess.run(
                [*enter, "systemctl", "is-system-running"], capture_output=True, text=True, check=False
            )
            state = asked.stdout.strip()
            if state == "running":
                return enter
        assert outside.poll() is None, f"it has ended with {outside.returncode}"
        return []

    try:
        words: list[str] = eventually(running, "systemd has started everything")
    except AssertionError as error:
        raise AssertionError(
            f"systemd did not come up, it is {state or 'not there'}: {error}\n{log.read_text()}"
        ) from error
    return words
