"""docs/embedding.md: its programs serve imports from an HSM token, under gunicorn and asyncio."""

import base64
import contextlib
import http.client
import json
import os
import re
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.documents import ROOT, text_of

from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.customer import encrypt_key_material, read_parameters

DEADLINE = 60
OAEP256 = WrappingAlgorithm.RSAES_OAEP_SHA_256
FILES = dict(
    re.findall(
        r"^```python\n# (\S+)\n(.*?)^```$",
        text_of(ROOT / "docs" / "embedding.md"),
        re.MULTILINE | re.DOTALL,
    )
)


@pytest.fixture
def place(softhsm, tmp_path):
    """The files of the page, and the environment that they need."""
    softhsm.settings()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    environment = os.environ | softhsm.environment | {"KMS_DATABASE": str(tmp_path / "kms.db")}
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    return tmp_path, environment | {"PYTHONPATH": path}


class Server:
    """A process, and what it printed to standard error."""

    def __init__(self, place, command, ready):
        directory, self.environment = place
        self.log = directory / "log"
        with self.log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", *command],
                cwd=directory,
                env=self.environment,
                stdout=stderr,
                stderr=stderr,
            )
        self.ready = ready

    def wait(self):
        deadline = time.monotonic() + DEADLINE
        while not (found := re.search(self.ready, self.text())):
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)
        self.port = int(found[1])

    def text(self):
        return self.log.read_text()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE)


@contextlib.contextmanager
def server(place, command, ready):
    running = Server(place, command, ready)
    try:
        running.wait()
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait(DEADLINE)


class WsgiClient:
    def __init__(self, port):
        self.port = port

    def __call__(self, action, **arguments):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        with contextlib.closing(connection):
            connection.request("POST", f"/{action}", json.dumps(arguments))
            return json.load(connection.getresponse())

    def status(self, method, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        with contextlib.closing(connection):
            connection.request(method, path)
            with connection.getresponse() as answer:
                return answer.status


class LineClient:
    def __init__(self, port):
        self.port = port

    def __call__(self, action, **arguments):
        with socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE) as connection:
            connection.sendall(json.dumps({"Action": action} | arguments).encode() + b"\n")
            with connection.makefile() as answers:
                return json.loads(answers.readline())


GUNICORN = ["-m", "gunicorn", "--preload", "--workers", "2", "--threads", "4"]
SERVERS = {
    "WSGI": (
        [*GUNICORN, "--bind", "127.0.0.1:0", "kms_wsgi:application"],
        r"Listening at: http://127\.0\.0\.1:(\d+)",
        WsgiClient,
    ),
    "asyncio": (["kms_asyncio.py"], r"(?m)^ready (\d+)$", LineClient),
}


def bring_in(call, key_id, material, **more):
    answer = call("parameters", key_id=key_id, spec="RSA_2048", algorithm=OAEP256)
    parameters = read_parameters(json.dumps(answer))
    encrypted = encrypt_key_material(OAEP256, parameters.public_key, material)
    return call(
        "import_material",
        key_id=key_id,
        encrypted=base64.b64encode(encrypted).decode(),
        token=parameters.import_token,
        **more,
    )


def works(call, key_id):
    plaintext = base64.b64encode(secrets.token_bytes(40)).decode()
    message = call("encrypt", key_id=key_id, plaintext=plaintext)
    return call("decrypt", key_id=key_id, ciphertext=message["Ciphertext"])["Plaintext"] == (
        plaintext
    )


@pytest.mark.parametrize("kind", SERVERS)
def test_the_program_serves(place, kind):
    command, ready, client = SERVERS[kind]
    with server(place, command, ready) as running:
        call, material = client(running.port), secrets.token_bytes(32)
        assert call("create", key_id="key-1") == {"KeyId": "key-1"}
        assert call("encrypt", key_id="key-1", plaintext="AA==")["Code"] == "Forbidden.KeyNotFound"
        assert bring_in(call, "key-1", material) == {"Exposure": "host"}
        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(lambda _: works(call, "key-1"), range(24)))

        refused = bring_in(call, "key-1", secrets.token_bytes(32))
        assert refused == {"Code": "InvalidKeyMaterial", "Message": "key material is invalid."}
        assert works(call, "key-1")
        in_an_hour = int(time.time()) + 3600
        assert "Exposure" in bring_in(call, "key-1", material, expire_unix=in_an_hour)
        assert works(call, "key-1")
        if kind == "WSGI":
            assert call.status("GET", "/ready") == 200
            assert call.status("POST", "/close") == 404

        expire(place)
        assert call("encrypt", key_id="key-1", plaintext="AA==")["Code"] == "Forbidden.KeyNotFound"
        assert sweep(place) == {"Deleted": ["key-1"]}
        assert bring_in(call, "key-1", secrets.token_bytes(32))["Code"] == "InvalidKeyMaterial"
        assert "Exposure" in bring_in(call, "key-1", material)
        assert works(call, "key-1")
        assert running.stop() == 0
    assert '{"call": "unwrap_material", "outcome": "ok", "seconds": ' in running.text()
    assert '{"call": "unwrap_material", "outcome": "InvalidKeyMaterial"' in running.text()
    assert "Traceback" not in running.text()


def expire(place):
    """What time would do."""
    with contextlib.closing(sqlite3.connect(place[1]["KMS_DATABASE"])) as database, database:
        database.execute("UPDATE cmk SET expires_at = 1")


def sweep(place):
    directory, environment = place
    done = subprocess.run(
        [sys.executable, "-W", "error", "kms_core.py"],
        cwd=directory,
        env=environment,
        capture_output=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_of_two_first_imports_the_second_is_refused(place):
    """Whatever they do at the same time: one key material stays."""
    command, ready, client = SERVERS["WSGI"]
    with server(place, command, ready) as running:
        call, together = client(running.port), threading.Barrier(4)
        call("create", key_id="key-1")
        materials = [secrets.token_bytes(32) for _ in range(4)]
        answers = [
            call("parameters", key_id="key-1", spec="RSA_2048", algorithm=OAEP256)
            for _ in materials
        ]

        def send(material, answer):
            parameters = read_parameters(json.dumps(answer))
            encrypted = encrypt_key_material(OAEP256, parameters.public_key, material)
            together.wait(DEADLINE)
            return call(
                "import_material",
                key_id="key-1",
                encrypted=base64.b64encode(encrypted).decode(),
                token=parameters.import_token,
            )

        with ThreadPoolExecutor(4) as threads:
            sent = list(threads.map(send, materials, answers))
        won = [m for m, answer in zip(materials, sent, strict=True) if "Exposure" in answer]
        assert len(won) == 1
        assert [answer.get("Code") for answer in sent].count("InvalidKeyMaterial") == 3
        for material in materials:
            again = bring_in(call, "key-1", material)
            assert ("Exposure" in again) is (material in won)
        assert running.stop() == 0


def test_each_file_is_run():
    assert FILES.keys() == {"kms_core.py", "kms_wsgi.py", "kms_asyncio.py"}
