"""What others wrote on top of the SDKs, unmodified, against ``hsmwrap serve`` over TLS."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.certificates import Certificate
from support.documents import ROOT
from support.http.gunicorn_runner import DEADLINE, running

from hsmwrap.software import KeyringFile

# The clients' own: a deprecated constant of the module ssl, connections that they leave open.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}Warning")
    for kind in ("Deprecation", "PendingDeprecation", "Resource", "Syntax")
]

CONFIG = """\
port = 0
database_url = "sqlite:///{here}/kms.db"
access_key_file = "{here}/access.toml"
audit_file = "{here}/audit.log"
tls_certificate_file = "{here}/certificate.pem"
tls_key_file = "{here}/key.pem"

[backends.SOFTWARE]
plugin = "software"
settings = {{ keyring_file = "{here}/keyring" }}
"""
ACCESS = """\
[[access_key]]
id = "testid"
secret = "testsecret"
allow = [{ actions = ["*"], keys = ["*"] }]
"""
CLIENTS = ROOT / "tests" / "clients"
NODE_MODULES = Path(sys.prefix) / "node" / "node_modules"
"""Where ``scripts/test`` has npm install the client."""


class Service:
    """A server, and what its clients know of it."""

    def __init__(self, here, port) -> None:
        self.here, self.port = here, port
        self.certificate = str(here / "certificate.pem")

    def call(self, action, **parameters):
        """By aliyun-python-sdk-kms, as the clients below."""
        from aliyunsdkcore.client import AcsClient
        from aliyunsdkcore.request import CommonRequest

        request = CommonRequest(
            domain=f"127.0.0.1:{self.port}", version="2016-01-20", action_name=action
        )
        for name, value in parameters.items():
            request.add_query_param(name, value)
        request.set_method("POST")
        request.set_protocol_type("https")
        client = AcsClient("testid", "testsecret", "cn-hangzhou")
        return json.loads(client.do_action_with_exception(request))

    def key(self):
        return self.call("CreateKey")["KeyMetadata"]

    def audited(self, *keys):
        lines = map(json.loads, (self.here / "audit.log").read_text().splitlines())
        return [line["action"] for line in lines if line["key_id"] in keys]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    here = tmp_path_factory.mktemp("clients")
    KeyringFile(here / "keyring").create()
    (here / "access.toml").write_text(ACCESS)
    (here / "access.toml").chmod(0o400)
    (here / "server.toml").write_text(CONFIG.format(here=here))
    Certificate().write(here)
    serve = ["-m", "hsmwrap.cli", "serve", "--config", str(here / "server.toml")]
    with running(serve, here / "log") as process:
        yield Service(here, process.port)
        assert process.stop() == 0


@pytest.fixture
def service(served, monkeypatch):
    """Where the clients in Python find it: as their users configure another endpoint."""
    pytest.importorskip("aliyunsdkkms", reason="capability: aliyun-python-sdk-kms is missing")
    from aliyunsdkcore.profile import region_provider

    region_provider.add_endpoint("Kms", "cn-hangzhou", f"127.0.0.1:{served.port}")
    monkeypatch.setenv("ALIBABA_CLOUD_CA_BUNDLE", served.certificate)
    yield served
    gc.collect()  # the connections that the clients leave open, while their warnings are ignored


def test_client_side_encryption_of_oss2(service):
    """Object data is encrypted under a data key; the KMS encrypts that and the start value."""
    crypto = pytest.importorskip("oss2.crypto", reason="capability: oss2 is not installed")
    from oss2.utils import AESCTRCipher

    key_id = service.key()["KeyId"]
    service.call("CreateAlias", KeyId=key_id, AliasName="alias/oss")
    for named in (key_id, "alias/oss"):
        provider = crypto.AliKMSProvider(
            "testid", "testsecret", "cn-hangzhou", named, passphrase="in the context"
        )
        material = provider.create_content_material()
        sealed = material.cipher.encrypt(b"object data")
        opening = AESCTRCipher()
        opening.initialize(
            provider.decrypt_encrypted_key(material.encrypted_key),
            provider.decrypt_encrypted_iv(material.encrypted_iv),
        )
        assert opening.decrypt(sealed) == b"object data"
    assert service.audited(key_id) == [
        *("CreateKey", "CreateAlias"),
        *["GenerateDataKey", "Encrypt", "Decrypt", "Decrypt"] * 2,
    ]


def test_the_encryption_sdk(service):
    """A message for two keys; each of them opens it."""
    sdk = pytest.importorskip(
        "aliyun_encryption_sdk.client", reason="capability: the Encryption SDK is not installed"
    )
    from aliyun_encryption_sdk.kms import AliyunConfig
    from aliyun_encryption_sdk.provider.default import DefaultDataKeyProvider

    first, second = service.key(), service.key()
    client = sdk.AliyunCrypto(AliyunConfig("testid", "testsecret"))
    both = DefaultDataKeyProvider(first["Arn"], keys=[second["Arn"]])
    sealed, _ = client.encrypt(both, b"hello", {"tenant": "1"})
    service.call("DisableKey", KeyId=first["KeyId"])
    opened, _ = client.decrypt(DefaultDataKeyProvider(second["Arn"]), sealed)
    assert opened == b"hello"
    used = service.audited(first["KeyId"], second["KeyId"])
    assert "ReEncryptFrom" in used
    assert "ReEncryptTo" in used


def test_the_sdk_for_node(service):
    node = shutil.which("node")
    if node is None or not NODE_MODULES.is_dir():
        pytest.skip("capability: node, or npm to install its client, is missing")
    key_id = service.key()["KeyId"]
    done = subprocess.run(
        [node, CLIENTS / "node_client.js", f"127.0.0.1:{service.port}", key_id],
        env=os.environ
        | {"NODE_EXTRA_CA_CERTS": service.certificate, "NODE_PATH": str(NODE_MODULES)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "described": key_id,
        "same": True,
        "hidden": 16,
        "versions": 1,
        "aliases": ["alias/node"],
        "description": "by node",
        "code": "Forbidden.AliasNotFoundError",  # this SDK appends Error to every code
    }
