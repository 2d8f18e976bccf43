"""``scripts/serve``: one command to a KMS on SoftHSM that an unmodified SDK can use."""

from __future__ import annotations

import base64
import os
import re
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from support.http import material_clients as clients
from support.http.gunicorn_runner import running_command
from support.http.sdk_clients import DEFAULT_SDKS, SDK_WARNINGS, SDKS, Credentials

pytestmark = SDK_WARNINGS

SERVE = Path(__file__).resolve().parents[2] / "scripts" / "serve"
DRAWN = re.compile(r"access key id (\S+), secret (\S+)")
ROWS = [
    ("EC_SM2", "SM2PKE", clients.openssl_sm2),
    ("RSA_2048", "RSAES_OAEP_SHA_256", clients.pyca_oaep_sha256),
]


@pytest.fixture
def serve(softhsm, tmp_path):
    """Runs the script in a shell without any variable of hsmwrap."""
    del softhsm  # skips without SoftHSM2
    ours = ("HSMWRAP_", "SOFTHSM2_", "PROMETHEUS_", "COV_")
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(ours)}
    (tmp_path / "tmp").mkdir()

    def run(*arguments, **more):
        environment = {**inherited, "TMPDIR": str(tmp_path / "tmp"), **more}
        command = [str(SERVE), "--port", "0", *arguments]
        return running_command(command, tmp_path / "log", environment)

    return run


def test_help_says_more_than_the_usage():
    done = subprocess.run([SERVE, "--help"], capture_output=True, check=True, text=True)
    for word in ("--port N", "--data DIR", "HSMWRAP_DEV_ACCESS_KEY=ID:SECRET", "ready http://"):
        assert word in done.stdout
    assert "#" not in done.stdout


def import_key(call, spec, algorithm, encrypt):
    key_id = call("CreateKey", Origin="EXTERNAL", ProtectionLevel="HSM")["KeyMetadata"]["KeyId"]
    issued = call(
        "GetParametersForImport",
        KeyId=key_id,
        WrappingKeySpec=spec,
        WrappingAlgorithm=algorithm,
    )
    encrypted = encrypt(base64.b64decode(issued["PublicKey"]), os.urandom(32))
    call(
        "ImportKeyMaterial",
        KeyId=key_id,
        EncryptedKeyMaterial=base64.b64encode(encrypted).decode(),
        ImportToken=issued["ImportToken"],
    )
    return key_id


def caller(sdk, process, key_id, secret):
    to = Credentials(f"127.0.0.1:{process.port}", key_id, secret)
    return lambda action, **parameters: SDKS[sdk].call(to, action, **parameters)


def test_what_is_kept_in_the_data_directory_outlives_the_server(serve, tmp_path):
    data = str(tmp_path / "a data directory")
    sdk = DEFAULT_SDKS[0]
    with serve("--data", data) as process:
        credentials = DRAWN.search(process.log_text()).groups()
        call = caller(sdk, process, *credentials)
        messages = [
            call("Encrypt", KeyId=import_key(call, *row), Plaintext="aGVsbG8=")["CiphertextBlob"]
            for row in ROWS
        ]
        assert process.stop() == 0
    with serve("--data", data) as process:
        assert not DRAWN.search(process.log_text())
        call = caller(sdk, process, *credentials)
        assert {call("Decrypt", CiphertextBlob=m)["Plaintext"] for m in messages} == {"aGVsbG8="}
        assert process.stop() == 0


def test_without_one_nothing_is_left_and_the_access_key_may_be_given(serve, tmp_path):
    with serve(HSMWRAP_DEV_ACCESS_KEY="testid:testsecret") as process:
        assert "testsecret" not in process.log_text()
        call = caller(DEFAULT_SDKS[1], process, "testid", "testsecret")
        import_key(call, *ROWS[0])
        assert len(list(tmp_path.glob("tmp/hsmwrap.*"))) == 1
        assert process.stop() == 0
    assert list(tmp_path.glob("tmp/hsmwrap*")) == []


def environments():
    """(pid, command line, environment) of each process that we may look at."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):
                yield (
                    process.name,
                    (process / "cmdline").read_bytes(),
                    (process / "environ").read_bytes(),
                )


def test_the_given_access_key_is_in_no_environment_and_no_command_line(serve, tmp_path):
    """Of the script, its children, the server and its workers, for as long as they run."""
    with serve(HSMWRAP_DEV_ACCESS_KEY="testid:t0p-s3cret", HSMWRAP_TEST_MARK="marked") as process:
        call = caller(DEFAULT_SDKS[0], process, "testid", "t0p-s3cret")
        call("ListKeys")
        ours = [
            (name, command, environment)
            for name, command, environment in environments()
            if b"HSMWRAP_TEST_MARK=marked" in environment.split(b"\0")
        ]
        commands = b" ".join(command for _, command, _ in ours)
        assert b"scripts/serve" in commands
        assert commands.count(b"hsmwrap\0serve") >= 2  # gunicorn's parent and a worker
        for name, command, environment in ours:
            assert b"t0p-s3cret" not in environment + command, name
            assert b"HSMWRAP_DEV_ACCESS_KEY=" not in environment, name
        assert process.stop() == 0
