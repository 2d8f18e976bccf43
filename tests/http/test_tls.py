"""``hsmwrap serve`` with TLS: a client that checks the certificate, before and after reloads."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import time
from contextlib import contextmanager

import pytest
from support.certificates import Certificate
from support.http.gunicorn_runner import DEADLINE, running

from hsmwrap.software import KeyringFile

CONFIG = """\
port = 0
metrics_address = "127.0.0.1:0"
database_url = "sqlite:///{here}/kms.db"
access_key_file = "{here}/access.toml"
audit_file = "{here}/audit.log"
tls_certificate_file = "{here}/certificate.pem"
tls_key_file = "{here}/key.pem"

[backends.SOFTWARE]
plugin = "software"
settings = {{ keyring_file = "{here}/keyring" }}
"""
ACCESS = '[[access_key]]\nid = "me"\nsecret = "x"\nallow = [{ actions = ["*"], keys = ["*"] }]\n'
ASK = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    here = tmp_path_factory.mktemp("tls")
    KeyringFile(here / "keyring").create()
    (here / "access.toml").write_text(ACCESS)
    (here / "access.toml").chmod(0o400)
    (here / "server.toml").write_text(CONFIG.format(here=here))
    first = Certificate()
    first.write(here)
    serve = ["-m", "hsmwrap.cli", "serve", "--config", str(here / "server.toml")]
    with running(serve, here / "log") as process:
        process.here, process.certificate = here, first
        yield process
        assert process.stop() == 0


@contextmanager
def connected(process, trusted):
    """A client that trusts this certificate only."""
    context = ssl.create_default_context(cadata=trusted.certificate.decode())
    plain = socket.create_connection(("127.0.0.1", process.port), timeout=DEADLINE)
    with plain, context.wrap_socket(plain, server_hostname="localhost") as client:
        yield client


def ask(client) -> bytes:
    client.sendall(ASK)
    return client.recv(65536)


def trusts(process, certificate) -> bool:
    try:
        with connected(process, certificate) as client:
            return b" 200 OK" in ask(client)
    except ssl.SSLCertVerificationError:
        return False


def wait_for(condition) -> None:
    give_up = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def logged(process, event) -> list[dict]:
    lines = [json.loads(line) for line in process.log_text().splitlines()]
    return [line for line in lines if line["message"] == event]


def test_a_client_that_checks_the_certificate(served):
    assert trusts(served, served.certificate)
    assert not trusts(served, Certificate())


def test_old_versions_of_tls_are_refused(served):
    context = ssl.create_default_context(cadata=served.certificate.certificate.decode())
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE) as plain,
        pytest.raises((ssl.SSLError, ConnectionResetError)),
    ):
        context.wrap_socket(plain, server_hostname="localhost")


def test_metrics_are_plain(served):
    answer = served.exchange(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n", served.metrics_port)
    assert b" 200 OK" in answer


def test_changed_files_are_taken_and_open_connections_stay(served):
    before, after = served.certificate, Certificate()
    with connected(served, before) as client:
        assert b" 200 OK" in ask(client)
        after.write(served.here)
        wait_for(lambda: trusts(served, after))
        assert not trusts(served, before)
        assert b" 200 OK" in ask(client)
    served.certificate = after


def test_a_failed_reload_keeps_the_certificate_and_says_so(served):
    """By itself, and on SIGHUP, which then replaces no worker."""
    Certificate().write(served.here, served.certificate.key)
    event = "changed TLS files are refused: what they held before stays in use"
    wait_for(lambda: logged(served, event))
    assert "is not the key of the first certificate" in logged(served, event)[-1]["why"]
    assert trusts(served, served.certificate)
    booted = served.log_text().count("Booting worker")
    served.popen.send_signal(signal.SIGHUP)
    wait_for(lambda: logged(served, "the configuration is refused: that of before stays in use"))
    assert trusts(served, served.certificate)
    assert served.log_text().count("Booting worker") == booted
    assert "Worker exiting" not in served.log_text()


def test_sighup_takes_changed_files(served):
    after = Certificate()
    after.write(served.here)
    served.popen.send_signal(signal.SIGHUP)
    wait_for(lambda: trusts(served, after))
    served.certificate = after
