"""opencryptoki's soft token, with a daemon of its own.

Its paths are compiled in: configuration, token directory, socket, locks. So the daemon and the
thread that runs the tests get a mount namespace, in which directories of the test stand there, and
an IPC namespace for the daemon's shared memory. Only root can do that. POSIX shared memory is
named after the token, whose name is random.
"""

import ctypes
import grp
import os
import pwd
import secrets
import shutil
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from hsmwrap.pkcs11 import Pkcs11Backend
from support.fast import needs_service

NO_OPENCRYPTOKI = "capability: opencryptoki is not installed"
NO_NAMESPACE = "capability: opencryptoki's compiled-in paths need a mount namespace, and that root"
LABEL = "soft token"
_PLACES = ("lib/*/opencryptoki/libopencryptoki.so.0", "lib64/opencryptoki/libopencryptoki.so.0")
_DAEMON = Path("/usr/sbin/pkcsslotd")
_GROUP = "pkcs11"
_FIRST_SO_PIN, _SO_PIN, _USER_PIN = "87654321", "76543210", "12345670"
_NAMESPACES = {"mnt": 0x00020000, "ipc": 0x08000000}
_CLONE_FS = 0x00000200
_START = 20
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Opencryptoki:
    """A fresh token with both PINs."""

    module: str
    pin_file: Path
    so_pin_file: Path

    def settings(self, prefix="hsmwrap", **more):
        return {
            "module": self.module,
            "token_label": LABEL,
            "pin_file": str(self.pin_file),
            "key_prefix": prefix,
            **more,
        }

    def settings_with_keys(self, prefix, *, trusted=False, **more):
        """Settings for a backend with keys of its own."""
        settings = self.settings(prefix, **more)
        if not Pkcs11Backend.list_keys(settings):
            so_pin_file = str(self.so_pin_file) if trusted else None
            Pkcs11Backend.initialise_keys(settings, so_pin_file=so_pin_file)
        return settings


@contextmanager
def opencryptoki(directory: Path, *, daemon_runs=True):
    """A token in ``directory`` and its daemon; skips without opencryptoki or without root."""
    needs_service()
    found = sorted(path for place in _PLACES for path in Path("/usr").glob(place))
    if not (found and _DAEMON.exists()):
        pytest.skip(NO_OPENCRYPTOKI)
    pins = {"pin": _USER_PIN, "so-pin": _SO_PIN}
    for name, pin in pins.items():
        (directory / name).write_text(pin)
        (directory / name).chmod(0o400)
    with _private_namespaces():
        name = _lay_out(directory)
        token = Opencryptoki(str(found[0]), directory / "pin", directory / "so-pin")
        if not daemon_runs:
            yield token
            return
        daemon = _start_daemon()
        try:
            _initialise(daemon)
            yield token
        finally:
            daemon.terminate()
            daemon.wait()
            for segment in Path("/dev/shm").glob(f"*opencryptoki.{name}*"):
                segment.unlink()


def _start_daemon():
    """As the user that its package makes: 3.23 becomes that by itself, but then forgets ``-f``."""
    try:
        user = {"user": pwd.getpwnam("pkcsslotd").pw_uid}
    except KeyError:  # 3.8 runs as root
        user = {}
    else:
        user |= {"group": _GROUP, "extra_groups": []}
    return subprocess.Popen(
        [_DAEMON, "-f"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, **user,
    )  # fmt: skip


@contextmanager
def _private_namespaces():
    """This thread's, and what it starts, for the length of a ``with`` block."""
    before, place = {}, Path.cwd()
    try:
        for name, flag in _NAMESPACES.items():
            before[name] = os.open(f"/proc/thread-self/ns/{name}", os.O_RDONLY)
            if _libc.unshare(flag):
                pytest.skip(NO_NAMESPACE)
        yield
    finally:
        _libc.unshare(_CLONE_FS)  # no mount namespace is entered while another thread shares that
        for name, descriptor in before.items():
            assert not _libc.setns(descriptor, _NAMESPACES[name]), os.strerror(ctypes.get_errno())
            os.close(descriptor)
        os.chdir(place)


def _lay_out(directory):
    """Put directories of this test over those of the daemon; returns the token's name."""
    name = f"t{secrets.token_hex(6)}"
    private = {
        "/etc/opencryptoki": ".",
        "/var/lib/opencryptoki": f"{name}/TOK_OBJ",
        "/var/log": "opencryptoki",
        "/run": f"lock/opencryptoki/{name}",
    }
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for number, (path, inside) in enumerate(private.items()):
        root = directory / str(number)
        if path == "/etc/opencryptoki":
            shutil.copytree(path, root)
        (root / inside).mkdir(parents=True, exist_ok=True)
        for each in [root, *root.rglob("*")]:
            os.chown(each, 0, grp.getgrnam(_GROUP).gr_gid)
            each.chmod(0o770 if each.is_dir() else 0o640)  # as 3.23 demands of strength.conf
        subprocess.run(["mount", "--bind", root, path], check=True)
    Path("/etc/opencryptoki/opencryptoki.conf").write_text(
        f"version opencryptoki-3.1\nslot 0\n{{\nstdll = libpkcs11_sw.so\ntokname = {name}\n}}\n"
    )
    return name


def _initialise(daemon):
    deadline = time.monotonic() + _START
    while _pkcsconf("-t").returncode:
        assert daemon.poll() is None, "pkcsslotd ended at once"
        assert time.monotonic() < deadline, "pkcsslotd does not answer"
        time.sleep(0.05)
    for options, typed in (
        (["-I", "-S", _FIRST_SO_PIN], f"{LABEL}\n"),
        (["-P", "-S", _FIRST_SO_PIN, "-n", _SO_PIN], ""),
        (["-u", "-S", _SO_PIN, "-n", _USER_PIN], ""),
    ):
        done = _pkcsconf(*options, "-c", "0", typed=typed)
        assert done.returncode == 0, (options, done.stdout)


def _pkcsconf(*options, typed=""):
    return subprocess.run(
        ["pkcsconf", *options], input=typed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
