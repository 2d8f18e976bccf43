"""A crash writes no core dump, so that no secret of this process's memory gets to a disk.

Each test has a control that allows core dumps: it writes one, with the secret in it.
"""

import os
import resource
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.canaries import Canary, Search
from support.crash import CRASHES
from support.http.gunicorn_runner import running

from hsmwrap.software import KeyringFile

PATTERN = Path("/proc/sys/kernel/core_pattern")
CONFIG = """\
port = 0
metrics_address = ""
database_url = "sqlite:///{directory}/kms.db"
access_key_file = "{directory}/access-keys.toml"
audit_file = "{directory}/audit.log"
{core_dumps}

[backends.SOFTWARE]
plugin = "software"
settings = {{ keyring_file = "{directory}/keyring" }}
"""
ACCESS_KEYS = """\
[[access_key]]
id = "testid"
secret = "a secret of an access key"
"""


@pytest.fixture(autouse=True)
def core_dumps_come_into_the_working_directory(tmp_path, monkeypatch):
    pattern = PATTERN.read_text().strip()
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if pattern.startswith("|") or "/" in pattern or hard != resource.RLIM_INFINITY:
        pytest.skip("capability: core dumps go elsewhere here, or are forbidden to this process")
    monkeypatch.chdir(tmp_path)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


@pytest.fixture
def canary():
    return Canary("planted", secrets.token_urlsafe(24).encode())


def core_dumps(directory):
    return [file for file in directory.glob("core*") if file.is_file()]


def names_in_core_dumps(directory, canary):
    search = Search([canary])
    for file in core_dumps(directory):
        search.file(file)
    return search.names()


def crashed(crash, allowed, canary):
    """How they ended: a fork, a program that was started, the process; and if with a core dump."""
    command = [sys.executable, "-m", "support.crash", crash, "allow" if allowed else "forbid"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with process.stdin, process.stdout:
        process.stdin.write(canary.value)
        process.stdin.close()
        said = process.stdout.read().decode().split()
    _, status = os.waitpid(process.pid, 0)
    process.returncode = 0  # waited for here, as subprocess drops whether there is a core dump
    children = [(int(code), dumped == "True") for code, dumped in (said[:2], said[2:])]
    return [*children, (os.WTERMSIG(status), os.WCOREDUMP(status))]


@pytest.mark.parametrize("crash", CRASHES)
def test_a_crash_writes_none_once_they_are_forbidden(crash, canary, tmp_path):
    ends = [signal.Signals[crash], signal.SIGABRT, signal.Signals[crash]]
    assert crashed(crash, allowed=False, canary=canary) == [(end, False) for end in ends]
    assert not core_dumps(tmp_path)


@pytest.mark.parametrize("crash", CRASHES)
def test_control_without_the_call_it_has_the_secret(crash, canary, tmp_path):
    ends = [signal.Signals[crash], signal.SIGABRT, signal.Signals[crash]]
    assert crashed(crash, allowed=True, canary=canary) == [(end, True) for end in ends]
    assert names_in_core_dumps(tmp_path, canary) == {"planted"}


def crash_of_the_server(directory, canary, setting):
    """Crashes a worker of ``hsmwrap serve``, then its main process."""

    def put(name, text):
        (directory / name).write_text(text)
        (directory / name).chmod(0o600)

    KeyringFile(directory / "keyring").create()
    put("access-keys.toml", ACCESS_KEYS)
    put("planted", canary.value.decode())
    put("hsmwrap.toml", CONFIG.format(directory=directory, core_dumps=setting))
    server = ["-m", "support.careless_server", "--config", str(directory / "hsmwrap.toml")]
    with running(server, directory / "log") as process:
        main = process.popen.pid
        worker = int(Path(f"/proc/{main}/task/{main}/children").read_text().split()[0])
        # The other one would end, or start a worker while the core dumps are read.
        os.kill(main, signal.SIGSTOP)
        os.kill(worker, signal.SIGSEGV)
        while Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        for file in core_dumps(directory):  # the next one has the same name
            file.rename(f"{file}-of-worker")
        os.kill(main, signal.SIGSEGV)
        os.kill(main, signal.SIGCONT)
        process.popen.communicate(timeout=60)
    assert process.popen.returncode == -signal.SIGSEGV


def test_a_crash_of_the_server_writes_none(canary, tmp_path):
    crash_of_the_server(tmp_path, canary, "")
    assert not core_dumps(tmp_path)


def test_control_with_the_setting_core_dumps_it_has_the_secret(canary, tmp_path):
    crash_of_the_server(tmp_path, canary, "core_dumps = true")
    assert len(core_dumps(tmp_path)) == 2
    assert names_in_core_dumps(tmp_path, canary) == {"planted"}
