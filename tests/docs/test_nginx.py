"""docs/deploy/nginx.conf in front of `hsmwrap serve`, beside a plain proxy_pass."""

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.certificates import Certificate
from support.documents import ROOT, text_of
from support.fast import needs_service
from support.http.gunicorn_runner import DEADLINE, running
from support.http.rpc_signing import v1_query
from support.http.sdk_clients import DEFAULT_SDKS, SDK_WARNINGS, SDKS, Credentials, SdkError

from hsmwrap.http import deadline
from hsmwrap.software import KeyringFile

pytestmark = SDK_WARNINGS

OURS = text_of(ROOT / "docs" / "deploy" / "nginx.conf")
PLAIN = """
server {{
    listen 127.0.0.1:{plain};
    access_log {directory}/hsmwrap-access.log;
    error_log {directory}/hsmwrap-error.log;
    location / {{ proxy_pass http://127.0.0.1:{upstream}; }}
}}
"""
AROUND = """\
{user}
worker_processes 1;
pid {directory}/pid;
error_log {directory}/main-error.log;
events {{}}
http {{
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    access_log {directory}/main-access.log;
    # SDKs leave connections open that are kept for them, which pytest would find.
    keepalive_timeout 0;
    include {directory}/hsmwrap.conf;
}}
"""
KMS = """\
port = 0
metrics_address = ""
database_url = "sqlite:///{directory}/kms.db"
access_key_file = "{directory}/access-keys.toml"
audit_file = "{directory}/audit.log"
[limits]
max_connections_per_address = 0
[backends.HSM]
plugin = "software"
settings = {{ serve_hsm_level = true, keyring_file = "{directory}/keyring" }}
"""
ACCESS_KEYS = """\
[[access_key]]
id = "testid"
secret = "testsecret"
allow = [{ actions = ["*"], keys = ["*"] }]
"""
LONGEST = base64.b64encode(b"\xff" * 6144).decode()


def program():
    """Debian keeps it where only root's PATH leads."""
    needs_service()
    found = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if not found:
        pytest.skip("capability: nginx is not installed")
    return found


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@dataclass
class Nginx:
    directory: Path
    plain: int
    tls: int

    @property
    def to(self):
        return Credentials(f"127.0.0.1:{self.plain}")

    def logged(self):
        """Everything that it wrote, whatever the file."""
        files = [path for path in self.directory.rglob("*") if path.suffix == ".log"]
        return "".join(path.read_text() for path in files)

    def post(self, target, body=b"", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.plain, timeout=DEADLINE)
        with contextlib.closing(connection):
            connection.request("POST", target, body, headers)
            with connection.getresponse() as answer:
                return answer.status


@contextlib.contextmanager
def nginx(directory, upstream, configuration=OURS, **changes):
    """nginx with this configuration; what it names elsewhere is in ``directory``."""
    binary = program()
    directory.mkdir(exist_ok=True)
    made = Nginx(directory, free_port(), free_port())
    if configuration is PLAIN:
        text = PLAIN.format(plain=made.plain, upstream=upstream, directory=directory)
    else:
        text = OURS
        Certificate().write(directory)
        for old, new in {
            "server 127.0.0.1:8443;": f"server 127.0.0.1:{upstream};",
            "listen 443 ssl default_server;": (
                f"listen 127.0.0.1:{made.tls} ssl default_server; "
                f"listen 127.0.0.1:{made.plain} default_server;"
            ),
            "/etc/ssl/hsmwrap": str(directory),
            "/var/log/nginx": str(directory),
            **changes,
        }.items():
            assert old in text
            text = text.replace(old, new)
    (directory / "hsmwrap.conf").write_text(text)
    user = "user root;" if os.geteuid() == 0 else ""  # who may read the directory
    (directory / "nginx.conf").write_text(AROUND.format(directory=directory, user=user))
    command = [binary, "-p", str(directory), "-c", str(directory / "nginx.conf")]
    with (directory / "stderr.log").open("wb") as stderr:
        process = subprocess.Popen([*command, "-g", "daemon off;"], stderr=stderr)
    try:
        until = time.monotonic() + DEADLINE
        while True:
            assert process.poll() is None, made.logged()
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", made.plain), timeout=DEADLINE).close()
                break
            assert time.monotonic() < until
            time.sleep(0.01)
        yield made
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(DEADLINE)


@pytest.fixture(scope="module")
def kms(tmp_path_factory):
    program()
    directory = tmp_path_factory.mktemp("kms")
    KeyringFile(directory / "keyring").create()
    (directory / "access-keys.toml").write_text(ACCESS_KEYS)
    (directory / "access-keys.toml").chmod(0o600)
    file = directory / "hsmwrap.toml"
    file.write_text(KMS.format(directory=directory))
    with running(["-m", "hsmwrap.cli", "serve", "--config", str(file)], directory / "log") as one:
        yield Served(one.port, directory / "audit.log")


@dataclass
class Served:
    port: int
    audit_file: Path


@pytest.fixture(scope="module")
def ours(kms, tmp_path_factory):
    with nginx(tmp_path_factory.mktemp("nginx"), kms.port) as made:
        yield made


@pytest.fixture(scope="module")
def plain(kms, tmp_path_factory):
    with nginx(tmp_path_factory.mktemp("plain"), kms.port, PLAIN) as made:
        yield made


@pytest.mark.parametrize("sdk", SDKS)
def test_a_signed_call_passes(ours, sdk):
    assert SDKS[sdk].call(ours.to, "ListKeys")["TotalCount"] >= 0


def test_a_plain_proxy_pass_breaks_signatures_with_the_host(plain):
    with pytest.raises(SdkError, match="SignatureDoesNotMatch"):
        SDKS[DEFAULT_SDKS[0]].call(plain.to, "ListKeys")


@pytest.mark.parametrize("sdk", DEFAULT_SDKS)
def test_the_longest_request_lines_pass(ours, sdk):
    description = "漢" * 8192
    key = SDKS[sdk].call(ours.to, "CreateKey", ProtectionLevel="HSM", Description=description)
    assert key["KeyMetadata"]["Description"] == description
    with pytest.raises(SdkError, match=r"^Forbidden\.KeyNotFound$"):
        SDKS[sdk].call(ours.to, "Encrypt", KeyId="none", Plaintext=LONGEST)


def test_a_plain_proxy_pass_answers_414_to_them(ours, plain):
    assert plain.post(f"/?Plaintext={LONGEST}") == 414
    assert ours.post(f"/?Plaintext={LONGEST}") == 400  # the API's own answer


def test_it_gives_up_idle_connections_before_the_server_does():
    (seconds,) = re.findall(r"^    keepalive_timeout (\d+)s;$", OURS, re.MULTILINE)
    assert int(seconds) < deadline.IDLE_SECONDS


def test_a_request_over_tls(ours):
    trusted = ssl.create_default_context(cafile=ours.directory / "certificate.pem")
    connection = http.client.HTTPSConnection(
        "127.0.0.1", ours.tls, context=trusted, timeout=DEADLINE
    )
    with contextlib.closing(connection):
        connection.request("GET", f"/?{v1_query(action='ListKeys', at=datetime.now(UTC))}")
        answer = json.load(connection.getresponse())
    assert "Code" not in answer
    assert answer["TotalCount"] >= 0


def test_nothing_of_the_query_is_logged(ours):
    assert ours.post("/?Plaintext=c2VjcmV0MQ==&Signature=c2lnbmVk") == 400
    logged = ours.logged()
    assert " POST / 400 " in logged
    assert "c2VjcmV0" not in logged
    assert "Signature" not in logged
    assert "?" not in logged


def test_the_request_id_joins_both_logs(ours, kms):
    SDKS[DEFAULT_SDKS[0]].call(ours.to, "ListKeys")
    (ours_line,) = (ours.directory / "hsmwrap-access.log").read_text().splitlines()[-1:]
    address, request_id = ours_line.split()[0], ours_line.split()[-1]
    assert address == "127.0.0.1"
    (line,) = [line for line in audited(kms) if line["request_id"] == request_id]
    assert line["action"] == "ListKeys"


def audited(kms):
    return [json.loads(line) for line in kms.audit_file.read_text().splitlines()]


def test_a_plain_proxy_pass_logs_plaintext(plain):
    plain.post("/?Plaintext=c2VjcmV0MQ==")
    assert "c2VjcmV0MQ==" in (plain.directory / "hsmwrap-access.log").read_text()


@pytest.mark.parametrize(("configuration", "logs"), [(OURS, False), (PLAIN, True)])
def test_the_error_log_repeats_the_request_line_but_at_emerg(tmp_path, configuration, logs):
    with nginx(tmp_path / "nginx", free_port(), configuration) as made:
        assert made.post("/?Plaintext=c2VjcmV0MQ==") == 502
    files = [made.directory / "hsmwrap-error.log", made.directory / "main-error.log"]
    assert ("c2VjcmV0MQ==" in "".join(file.read_text() for file in files)) is logs


@pytest.mark.parametrize(
    ("changes", "written"),
    [({}, False), ({"client_body_buffer_size 128k;": ""}, True)],
    ids=["ours", "without the setting"],
)
def test_bodies_stay_in_memory(kms, tmp_path, changes, written):
    """nginx warns when it writes one to a temporary file."""
    with nginx(tmp_path / "nginx", kms.port, **{" emerg;": " warn;"} | changes) as made:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert made.post("/", b"Plaintext=" + b"x" * 100_000, **form) == 400
    said = "a client request body is buffered to a temporary file"
    assert (said in (made.directory / "hsmwrap-error.log").read_text()) is written
