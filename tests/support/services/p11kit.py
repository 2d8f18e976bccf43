"""A token in another process: p11-kit's server in front of SoftHSM, p11-kit's client before us."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from hsmwrap.pkcs11 import Pkcs11Backend
from support.fast import needs_service
from support.services.softhsm import SoftHsm

NO_P11_KIT = "capability: p11-kit's server and client module are not installed"
ADDRESS = "P11_KIT_SERVER_ADDRESS"
_PLACES = ("lib/*/pkcs11/p11-kit-client.so", "lib64/pkcs11/p11-kit-client.so")
_SERVERS = ("libexec/p11-kit/p11-kit-server", "lib/p11-kit/p11-kit-server")
_START = 20


class P11KitServer:
    """Serves one SoftHSM token on a socket; the process can be killed and started again."""

    def __init__(self, token: SoftHsm, socket: Path, environment, provider=None) -> None:
        self.token = token
        self._provider = provider
        self.socket = socket
        self._environment = environment
        self.module = _find(_PLACES)
        self._process = None
        if self.module is None or _find(_SERVERS) is None or shutil.which("p11-kit") is None:
            pytest.skip(NO_P11_KIT)

    @property
    def address(self):
        """For the client module, which reads it at C_Initialize."""
        return f"unix:path={self.socket}"

    def settings(self, prefix="hsmwrap", **more):
        return self.token.bare_settings(key_prefix=prefix, **more) | {"module": self.module}

    def settings_with_keys(self, prefix, **more):
        """Settings for a backend with keys of its own, made through the client."""
        settings = self.settings(prefix, **more)
        if not Pkcs11Backend.list_keys(settings):
            Pkcs11Backend.initialise_keys(settings)
        return settings

    def start(self):
        self.socket.unlink(missing_ok=True)
        command = ["p11-kit", "server", "-f", "-n", self.socket, "--provider"]
        command.append(str(self._provider or self.token.module))
        label = self.token.environment["HSMWRAP_TOKEN_LABEL"]
        self._process = subprocess.Popen(
            [*command, f"pkcs11:token={label}"],
            env=os.environ | self.token.environment | self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + _START
        while not self.socket.exists():
            assert self._process.poll() is None, "p11-kit server ended at once"
            assert time.monotonic() < deadline, "p11-kit server makes no socket"
            time.sleep(0.01)

    def kill(self):
        """SIGKILL, as a crash would, also to the children that it forked for its connections."""
        pid = self._process.pid
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP)  # no more forks
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
        self._process.kill()
        self._process.wait()


@contextmanager
def p11kit_server(token: SoftHsm, directory: Path, provider=None, **environment):
    """A running server, which this process's environment points to; it gets ``environment``.

    ``provider``: another module than SoftHSM's, to the same token.
    """
    needs_service()
    server = P11KitServer(token, directory / "socket", environment, provider)
    server.start()
    before = os.environ.get(ADDRESS)
    os.environ[ADDRESS] = server.address
    try:
        yield server
    finally:
        os.environ.pop(ADDRESS)
        if before is not None:
            os.environ[ADDRESS] = before
        server.kill()


def _find(places):
    found = (path for place in places for path in sorted(Path("/usr").glob(place)))
    return next(map(str, found), None)
