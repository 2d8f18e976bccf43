"""Secrets that can be recognised go through a whole run, with crashes; then everything is searched.

The KMS runs in processes of its own, at debug level, with its HSM in another process, and allows
core dumps: otherwise its memory could be read by root alone. The client is this one. What was found
is compared with what SECURITY.md says. test_core_dumps.py shows that none is written by default.
"""

import base64
import json
import secrets
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.canaries import Canary, Search
from support.http.gunicorn_runner import running
from support.http.rpc_signing import encode_all, v1_parameters, v1_signature
from support.services.p11kit import p11kit_server
from support.services.softhsm import make_softhsm

from hsmwrap.software import KeyringFile
from hsmwrap.testing.clients import pyca_encrypt

SERVER = ["-m", "support.careless_server", "--workers", "1"]
CONFIG = """\
port = 0
metrics_address = "127.0.0.1:0"
database_url = "{database_url}"
access_key_file = "{directory}/access-keys.toml"
audit_file = "{directory}/audit.log"
core_dumps = true

[backends.HSM]
plugin = "pkcs11"
settings = {settings}

[backends.SOFTWARE]
plugin = "software"
settings = {{ keyring_file = "{directory}/keyring" }}
"""
ACCESS_KEYS = """\
# secret = 'not this one'
[[access_key]]
id = "testid"
secret = "{secret}"
allow = [{{ actions = ["*"], keys = ["*"] }}]
"""
LETTERS = 24
UNWRAPS_IN_HOST = "capability: through this p11-kit the HSM does not unwrap material by itself"


def words():
    return secrets.token_urlsafe(LETTERS)


class Kms:
    """The server, its HSM, and a client of both."""

    def __init__(self, directory, cluster):
        self.directory = directory
        self.canaries = {
            "access-key secret": words().encode(),
            "database password": words().encode(),
        }
        self.canaries |= {"material": secrets.token_bytes(32), "plaintext": words().encode()}
        self.canaries |= {"planted": words().encode(), "client only": words().encode()}
        self.output = []
        self.token = make_softhsm(directory / "token", "canaries")
        for name, variable in (("PIN", "HSMWRAP_PIN_FILE"), ("SO PIN", "HSMWRAP_SO_PIN_FILE")):
            self.canaries[name] = Path(self.token.environment[variable]).read_bytes()
        self._write_files(cluster)

    def _write_files(self, cluster):
        put = self._put
        KeyringFile(self.directory / "keyring").create()
        put("planted", self.canaries["planted"].decode())
        put(
            "access-keys.toml",
            ACCESS_KEYS.format(secret=self.canaries["access-key secret"].decode()),
        )
        password = self.canaries["database password"].decode()
        url = cluster.new_database().replace("hsmwrap@", f"hsmwrap:{password}@")
        self._config = {"directory": self.directory, "database_url": url}

    def _put(self, name, text):
        file = self.directory / name
        file.write_text(text)
        file.chmod(0o600)
        return file

    @contextmanager
    def serving(self, server):
        module = server.settings("canaries", initial_backoff=0.02, max_backoff=0.1)
        settings = ", ".join(f"{name} = {json.dumps(value)}" for name, value in module.items())
        config = self._put(
            "hsmwrap.toml", CONFIG.format(**self._config, settings=f"{{ {settings} }}")
        )
        with running([*SERVER, "--config", str(config)], self.directory / "log") as self.process:
            yield

    def call(self, action, *, secret=None, in_query=False, **parameters):
        """Returns status and answer."""
        method = "GET" if in_query else "POST"
        parameters = v1_parameters(action, datetime.now(UTC), **parameters)
        secret = secret or self.canaries["access-key secret"].decode()
        parameters["Signature"] = v1_signature(method, parameters, secret)
        text = encode_all(parameters)
        head = f"{method} /{'?' + text if in_query else ''} HTTP/1.1\r\nHost: h\r\n"
        head += "Connection: close\r\n"
        body = "" if in_query else text
        head += (
            f"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {len(body)}\r\n"
        )
        answer = self.process.exchange(f"{head}\r\n{body}".encode())
        return int(answer.split()[1]), json.loads(answer.partition(b"\r\n\r\n")[2])

    def succeed(self, action, **parameters):
        status, answer = self.call(action, **parameters)
        assert status == 200, answer
        return answer

    def import_material(self, key_id):
        algorithm = "RSAES_PKCS1_V1_5"
        wrapping = {"WrappingKeySpec": "RSA_2048", "WrappingAlgorithm": algorithm}
        status, issued = self.call("GetParametersForImport", KeyId=key_id, **wrapping)
        if status != 200:
            return status, issued
        public_key = base64.b64decode(issued["PublicKey"])
        encrypted = pyca_encrypt(algorithm, public_key, self.canaries["material"])
        return self.call(
            "ImportKeyMaterial",
            KeyId=key_id,
            ImportToken=issued["ImportToken"],
            EncryptedKeyMaterial=base64.b64encode(encrypted).decode(),
        )

    def pids(self):
        """The server's own process and its workers."""
        pid = self.process.popen.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert children
        return [pid, *map(int, children)]

    @contextmanager
    def breaking(self):
        self._put("break", "")
        yield
        (self.directory / "break").unlink()


def live(kms, server):
    """All that is done to the KMS."""
    plaintext = base64.b64encode(kms.canaries["plaintext"]).decode()
    in_hsm, in_software = (
        kms.succeed("CreateKey", Origin=origin, ProtectionLevel=level)["KeyMetadata"]["KeyId"]
        for origin, level in (("EXTERNAL", "HSM"), ("Aliyun_KMS", "SOFTWARE"))
    )
    assert kms.import_material(in_hsm)[0] == 200
    encrypt = {"KeyId": in_software, "Plaintext": plaintext}
    blobs = [
        kms.succeed("Encrypt", in_query=in_query, **encrypt)["CiphertextBlob"]
        for in_query in (False, True)
    ]
    for blob in blobs:
        assert kms.succeed("Decrypt", CiphertextBlob=blob)["Plaintext"] == plaintext
    kms.succeed("GenerateDataKey", KeyId=in_software)
    # p11-kit 0.24 (Debian 12) does not carry AES-GCM.
    assert kms.call("Encrypt", KeyId=in_hsm, Plaintext=plaintext)[0] in {200, 400}

    unknown = kms.canaries["client only"].decode()
    refused = kms.call("Encrypt", **encrypt, secret=unknown)[1]
    assert refused["Code"] == "SignatureDoesNotMatch"
    assert kms.call("Encrypt", **encrypt, Nonsense=plaintext)[0] == 400
    assert kms.call("Encrypt", KeyId=in_software, Plaintext=f"{plaintext}!")[0] == 400
    with kms.breaking():
        assert kms.call("Encrypt", **encrypt)[0] == 500
        assert kms.call("Decrypt", CiphertextBlob=blobs[0])[0] == 500
        assert kms.import_material(in_hsm)[0] >= 500
    server.kill()
    assert kms.import_material(in_hsm)[0] == 503
    server.start()
    for _ in range(300):
        if kms.import_material(in_hsm)[0] == 200:
            break
    else:
        pytest.fail("the HSM is not found again")
    kms.succeed("DisableKey", KeyId=in_software)
    assert kms.call("Encrypt", **encrypt)[0] == 409
    kms.succeed("DeleteKeyMaterial", KeyId=in_hsm)
    for _ in range(20):
        kms.succeed("ListKeys")


@pytest.fixture(scope="module")
def searched(tmp_path_factory, postgres_cluster):
    """What was found in what, after the whole run."""
    directory = tmp_path_factory.mktemp("canaries")
    kms = Kms(directory, postgres_cluster)
    printed = kms.token.run_keys("init", "canaries")
    search = Search([Canary(*each) for each in kms.canaries.items()])
    search.bytes(printed.encode(), "keys")
    with p11kit_server(kms.token, directory) as server, kms.serving(server):
        live(kms, server)
        metrics = b"GET /metrics HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
        search.bytes(kms.process.exchange(metrics, kms.process.metrics_port), "metrics")
        for pid in kms.pids():
            search.memory(pid, "memory")
    for name in ("log", "audit.log"):
        search.file(directory / name)
    text = (directory / "log").read_text()
    assert "ZeroDivisionError" in text
    search.material_was_in_host = "Exposure.HOST" in text
    return search


def found_in(search, *places):
    return {name for name, _, place in search.found if place in places}


def test_the_search_sees_what_was_planted(searched):
    assert "planted" in found_in(searched, "log")
    assert "planted" in found_in(searched, "memory")


def test_logs_audit_log_and_metrics_have_no_secret(searched):
    assert found_in(searched, "log", "audit.log", "metrics", "keys") == {"planted"}, searched.found


def test_a_core_dump_has_no_secret_of_an_access_key_and_no_so_pin(searched):
    """What passes through, and what is used all the time, may be there: SECURITY.md says so.

    So may the PIN: p11-kit's client keeps messages that it has sent. That hsmwrap has no copy of it
    is shown in test_pin.py.
    """
    known = {"planted", "plaintext", "database password", "material", "PIN"}
    assert found_in(searched, "memory") <= known, searched.found


def test_a_core_dump_has_no_material_that_the_hsm_unwrapped(searched):
    if searched.material_was_in_host:
        pytest.skip(UNWRAPS_IN_HOST)
    assert "material" not in found_in(searched, "memory")
