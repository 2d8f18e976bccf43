"""Rotate, re-seal and retire on a SoftHSM token, beside a KMS that is used; and killed half-way."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from support.kms.fakes import AES_MATERIAL, SM4_MATERIAL, Client

from hsmwrap.errors import HsmError
from hsmwrap.kms import StaticAccessKeys, load_config, open_kms
from hsmwrap.pkcs11.keysets import keys

KEYS = {("Aliyun_AES_256", AES_MATERIAL): 8, ("Aliyun_SM4", SM4_MATERIAL): 4}
COUNT = sum(KEYS.values())
PREFIX = "kms-moves"


@pytest.fixture
def config(softhsm, tmp_path):
    """A server's file, over a key set of its own."""
    prefix = f"{PREFIX}-{tmp_path.name[-20:]}"
    settings = softhsm.settings(prefix)
    file = tmp_path / "server.toml"
    file.write_text(
        f'database_url = "sqlite:///{tmp_path}/kms.db"\naudit_file = "{tmp_path}/audit.log"\n'
        "sweep_interval = 0\n[backends.HSM]\nplugin = 'pkcs11'\n[backends.HSM.settings]\n"
        + "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    )
    return file


@pytest.fixture
def client(config, monkeypatch):
    """A KMS in this process, with its keys; it looks at once whether the key set was rotated."""
    monkeypatch.setattr(keys, "CURRENT_SET_LIFETIME", 0.0)
    with open_kms(load_config(config), access_keys=StaticAccessKeys(())) as kms:
        yield Client(kms)


@pytest.fixture
def aes(client):
    """Ciphertexts by key id; keys of each spec and origin are there."""
    blobs = {}
    for (spec, material), count in KEYS.items():
        for _ in range(count):
            key_id = client.create(KeySpec=spec)
            client.import_material(key_id, material)
            if material is AES_MATERIAL:
                blobs[key_id] = client.usable(key_id)
    made = client("CreateKey", ProtectionLevel="HSM")["KeyMetadata"]["KeyId"]
    blobs[made] = client.usable(made)
    return blobs


@pytest.fixture
def hsmwrap_keys(config, softhsm):
    """Run ``hsmwrap keys ACTION --config FILE --json`` in another process; returns it."""

    def start(*arguments):
        command = [sys.executable, "-m", "hsmwrap.cli", "keys", *arguments]
        return subprocess.Popen(
            [*command, "--config", str(config), "--json"],
            env=os.environ | softhsm.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def run_keys(hsmwrap_keys):
    def run(*arguments):
        with hsmwrap_keys(*arguments) as process:
            out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return json.loads(out)

    return run


def usage(run_keys):
    return [each["keys"] for each in run_keys("list")["key_sets"]]


@contextmanager
def used(client, blobs):
    """Threads that decrypt and describe all the time; yields the errors of their calls."""
    failed, done, stop = [], [], threading.Event()

    def work(call):
        while not stop.is_set():
            for key_id, blob in blobs.items():
                try:
                    call(key_id, blob)
                except Exception as error:
                    failed.append(error)
                done.append(key_id)

    def decrypts(_key_id, blob):
        assert Client(client.kms)("Decrypt", CiphertextBlob=blob)["Plaintext"] == "aGVsbG8="

    def describes(key_id, _blob):
        Client(client.kms)("DescribeKey", KeyId=key_id)

    threads = [threading.Thread(target=work, args=[call]) for call in (decrypts, describes)]
    for thread in threads:
        thread.start()
    try:
        yield failed
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(done) > len(blobs)


def test_no_call_fails_while_keys_move_and_their_set_is_retired(client, aes, run_keys):
    with used(client, aes) as failed:
        run_keys("rotate")
        assert usage(run_keys) == [COUNT + 1, 0]
        moved = run_keys("reseal", "--rate", "1000")
        assert (moved["moved"], moved["failed"]) == (COUNT + 1, 0)
        assert usage(run_keys) == [0, COUNT + 1]
        run_keys("retire", "1", "--force")
    assert failed == []
    for key_id, blob in aes.items():
        assert client("Decrypt", CiphertextBlob=blob)["Plaintext"] == "aGVsbG8="
        client.usable(key_id)
    # The same material is imported again, and is still the same.
    imported = next(iter(aes))
    client.import_material(imported)
    assert usage(run_keys) == [COUNT + 1]


def test_a_key_that_was_lost_with_its_set_says_so(client, aes, run_keys):
    """Those that the KMS made as well, which cannot be imported again."""
    run_keys("rotate")
    run_keys("retire", "1", "--force")
    for key_id, blob in aes.items():
        lost = f"{key_id}: key set 1, which sealed this key, was retired"
        with pytest.raises(HsmError, match=lost):
            client("Decrypt", CiphertextBlob=blob)


def test_a_run_that_is_killed_loses_no_key_and_is_run_again(
    client, aes, hsmwrap_keys, run_keys, config
):
    run_keys("rotate")
    audit = config.parent / "audit.log"
    with hsmwrap_keys("reseal", "--rate", "4") as process:
        deadline = time.monotonic() + 60
        while audit.read_text().count("ResealKey") < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    old, new = usage(run_keys)
    assert old + new == COUNT + 1
    assert old > 0
    assert new >= 2
    for blob in aes.values():
        assert client("Decrypt", CiphertextBlob=blob)["Plaintext"] == "aGVsbG8="
    assert run_keys("reseal")["moved"] == old
    run_keys("retire", "1", "--force")
    for blob in aes.values():
        assert client("Decrypt", CiphertextBlob=blob)["Plaintext"] == "aGVsbG8="
