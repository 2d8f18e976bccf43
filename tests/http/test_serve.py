"""``hsmwrap serve`` with two worker processes, used by unmodified SDKs."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from support.http import material_clients as clients
from support.http.gunicorn_runner import DEADLINE, running
from support.http.kms_over_http import backend_settings
from support.http.rpc_signing import v1_query
from support.http.sdk_clients import DEFAULT_SDKS, SDK_WARNINGS, SDKS, Credentials, SdkError

from hsmwrap.catalog import ProtectionLevel
from hsmwrap.cli import main
from hsmwrap.software import KeyringFile

pytestmark = SDK_WARNINGS

SERVE = ["-m", "hsmwrap.cli", "serve", "--config"]
CONFIG = """\
port = 0
metrics_address = "127.0.0.1:0"
database_url = "sqlite:///{directory}/kms.db"
access_key_file = "{directory}/access-keys.toml"
audit_file = "{directory}/audit.log"
"""
BACKEND = """
[backends.{level}]
plugin = "{plugin}"
settings = {{ {settings} }}
"""
ACCESS_KEYS = """\
[[access_key]]
id = "testid"
secret = "testsecret"
allow = [{ actions = ["*"], keys = ["*"] }]
"""


@pytest.fixture(scope="module", params=["software", "pkcs11"])
def config(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("serve")
    settings = backend_settings(request.param, request)
    if request.param == "software":
        settings["keyring_file"] = str(directory / "keyring")
        KeyringFile(directory / "keyring").create()
    listed = ", ".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())
    access_keys = directory / "access-keys.toml"
    access_keys.write_text(ACCESS_KEYS)
    access_keys.chmod(0o600)
    file = directory / "hsmwrap.toml"
    file.write_text(
        CONFIG.format(directory=directory)
        + "".join(
            BACKEND.format(level=level, plugin=request.param, settings=listed)
            for level in ProtectionLevel
            if request.param == "software" or level is ProtectionLevel.HSM
        )
    )
    return file


@pytest.fixture(scope="module")
def served(config):
    with running([*SERVE, str(config), "--workers", "2"], config.with_name("log")) as process:
        yield process
        assert process.stop() == 0


@pytest.mark.parametrize("sdk", DEFAULT_SDKS)
def test_import_through_two_workers(served, sdk):
    """Parameters issued by one process are accepted by the other."""
    to = Credentials(f"127.0.0.1:{served.port}")

    def call(action, **parameters):
        return SDKS[sdk].call(to, action, **parameters)

    key_id = call("CreateKey", Origin="EXTERNAL", ProtectionLevel="HSM")["KeyMetadata"]["KeyId"]
    for _ in range(4):
        issued = call(
            "GetParametersForImport",
            KeyId=key_id,
            WrappingKeySpec="RSA_2048",
            WrappingAlgorithm="RSAES_OAEP_SHA_256",
        )
        encrypted = clients.pyca_oaep_sha256(base64.b64decode(issued["PublicKey"]), bytes(32))
        call(
            "ImportKeyMaterial",
            KeyId=key_id,
            EncryptedKeyMaterial=base64.b64encode(encrypted).decode(),
            ImportToken=issued["ImportToken"],
        )
        blob = call("Encrypt", KeyId=key_id, Plaintext="aGVsbG8=")["CiphertextBlob"]
        assert call("Decrypt", CiphertextBlob=blob)["Plaintext"] == "aGVsbG8="


@pytest.mark.parametrize("sdk", SDKS)
def test_the_longest_plaintext(served, sdk):
    """6 KiB of 0xff: 8192 times / in base64, three times that in the query of most SDKs."""
    to = Credentials(f"127.0.0.1:{served.port}")
    longest = base64.b64encode(b"\xff" * 6144).decode()
    with pytest.raises(SdkError, match=r"^Forbidden\.KeyNotFound$"):
        SDKS[sdk].call(to, "Encrypt", KeyId="none", Plaintext=longest)


@pytest.mark.parametrize("sdk", DEFAULT_SDKS)
def test_the_longest_description(served, sdk):
    to = Credentials(f"127.0.0.1:{served.port}")
    description = "漢" * 8192
    key = SDKS[sdk].call(to, "CreateKey", ProtectionLevel="HSM", Description=description)
    assert key["KeyMetadata"]["Description"] == description


def test_a_nonce_counts_in_all_workers(served):
    query = v1_query(action="ListKeys", at=datetime.now(UTC))
    raw = f"GET /?{query} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode()
    answers = [json.loads(served.exchange(raw).partition(b"\r\n\r\n")[2]) for _ in range(12)]
    codes = [answer.get("Code", "OK") for answer in answers]
    assert codes == ["OK", *["SignatureNonceUsed"] * 11]


def test_ready(served):
    raw = b"GET /readyz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    assert b"200 OK" in served.exchange(raw)


def test_the_end_of_the_audit_log_is_anchored_when_the_server_stops(config, capsys):
    with running([*SERVE, str(config)], config.with_name("log2")) as process:
        to = Credentials(f"127.0.0.1:{process.port}")
        for _ in range(5):
            SDKS[DEFAULT_SDKS[0]].call(to, "ListKeys")
        assert process.stop() == 0
    assert main(["audit", "verify", "--json", "--config", str(config)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["anchored"], found["behind"]) == (True, True, 0)
    assert found["lines"] >= 5


def test_workers_go_on_after_a_damaged_audit_log_without_a_restart(served, config, capsys):
    to = Credentials(f"127.0.0.1:{served.port}")

    def ask():
        for _ in range(4):  # both workers
            SDKS[DEFAULT_SDKS[0]].call(to, "ListKeys")

    ask()
    with config.with_name("audit.log").open("ab") as log:
        log.write(b"[" * 100_000 + b"\n")
    with pytest.raises(SdkError, match=r"^InternalFailure$"):
        ask()
    assert main(["audit", "verify", "--config", str(config)]) == 1
    assert main(["audit", "accept", "--config", str(config), "--reason", "a test"]) == 0
    ask()
    capsys.readouterr()
    assert main(["audit", "verify", "--config", str(config)]) == 0
    assert "is not a line of an audit log" in capsys.readouterr().out


def test_no_secret_in_the_log(served):
    assert "testsecret" not in served.log_text()


def test_a_wrong_configuration_says_so_and_ends(tmp_path):
    file = tmp_path / "hsmwrap.toml"
    file.write_text("prot = 1\n")
    done = subprocess.run(
        [sys.executable, *SERVE, file],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "prot" in done.stderr
    assert "Traceback" not in done.stderr
