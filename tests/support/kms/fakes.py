"""A backend whose keys are objects (files), a settable clock, and clients of the KMS."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, Self

from hsmwrap.backend import Backend, Custody, ImportedKey, KeyRef
from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.errors import HsmUnavailable, KeyNotFound
from hsmwrap.kms import Caller, Kms, Permissions, StaticAccessKeys
from hsmwrap.kms.audit import AuditLog
from hsmwrap.kms.database import Database
from hsmwrap.policy import Deployment
from hsmwrap.software import SoftwareBackend
from hsmwrap.testing.clients import pyca_encrypt

ADMIN = Caller("admin", Permissions.everything())
AES_MATERIAL = bytes(range(32))
SM4_MATERIAL = bytes(range(16))
OTHER_MATERIAL = bytes(32)


class FileObjectsBackend(Backend):
    """The software backend with custody HsmInternal: each key is a file named by its object id."""

    contract_version: ClassVar[int] = 1

    def __init__(self, keyring_file, directory):
        self._inner = SoftwareBackend.from_settings(
            {"keyring_file": str(keyring_file), "serve_hsm_level": True}
        )
        self._directory = Path(directory)
        self._directory.mkdir(exist_ok=True)
        self.unavailable = False

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        return cls(settings["keyring_file"], settings["directory"])

    @property
    def name(self):
        return self._inner.name

    def capabilities(self):
        known = self._inner.capabilities()
        return replace(
            known,
            keys=tuple(replace(key, custody=Custody.HSM_INTERNAL) for key in known.keys),
        )

    def generate_wrapping_key(self, spec, algorithm, *, expires_at):
        self._answer()
        return self._inner.generate_wrapping_key(spec, algorithm, expires_at=expires_at)

    def unwrap_material(self, private_key, algorithm, encrypted_material, *, object_id, **more):
        self._answer()
        imported = self._inner.unwrap_material(private_key, algorithm, encrypted_material, **more)
        object_id = object_id or os.urandom(16)
        self._file(object_id).write_bytes(imported.key.data)
        key = replace(imported.key, custody=Custody.HSM_INTERNAL, data=object_id)
        return ImportedKey(key, imported.check_value, imported.exposure)

    def encrypt(self, key, plaintext, additional_data=b""):
        return self._inner.encrypt(self._sealed(key), plaintext, additional_data)

    def decrypt(self, key, ciphertext, additional_data=b""):
        return self._inner.decrypt(self._sealed(key), ciphertext, additional_data)

    def destroy_key(self, key):
        self._answer()
        self._file(key.data).unlink(missing_ok=True)

    def mac(self, data):
        return self._inner.mac(data)

    def verify_mac(self, data, mac):
        return self._inner.verify_mac(data, mac)

    def reap(self, now):
        self._answer()
        return self._inner.reap(now)

    def health(self):
        return self._inner.health()

    def close(self):
        self._inner.close()

    def objects(self):
        """Ids of the objects that exist."""
        return {bytes.fromhex(path.name) for path in self._directory.iterdir()}

    def _file(self, object_id):
        return self._directory / object_id.hex()

    def _sealed(self, key):
        self._answer()
        try:
            blob = self._file(key.data).read_bytes()
        except FileNotFoundError:
            raise KeyNotFound("no such object") from None
        return KeyRef(key.backend, key.key_spec, Custody.HSM_ENCRYPTED_DATABASE, blob)

    def _answer(self):
        if self.unavailable:
            raise HsmUnavailable("unavailable")


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self):
        self.now = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self):
        return self.now

    def advance(self, **delta):
        self.now += timedelta(**delta)
        return self.now

    def unix(self, **delta):
        return str(int((self.now + timedelta(**delta)).timestamp()))


class Client:
    """Calls one KMS as one caller, with the API's parameters as keywords."""

    def __init__(self, kms, caller=ADMIN):
        self.kms = kms
        self.caller = caller
        self._requests = 0

    def __call__(self, action, /, **parameters):
        self._requests += 1
        request_id = f"{self.caller.access_key_id}-{self._requests}"
        return self.kms.execute(action, parameters, self.caller, request_id)

    def create(self, **parameters):
        parameters = {"Origin": "EXTERNAL", "ProtectionLevel": "HSM"} | parameters
        return self("CreateKey", **parameters)["KeyMetadata"]["KeyId"]

    def parameters(self, key_id):
        return self(
            "GetParametersForImport",
            KeyId=key_id,
            WrappingKeySpec="RSA_2048",
            WrappingAlgorithm="RSAES_OAEP_SHA_256",
        )

    def import_material(self, key_id, material=AES_MATERIAL, parameters=None, **more):
        return self("ImportKeyMaterial", **import_request(
            parameters or self.parameters(key_id), material), **more)  # fmt: skip

    def state(self, key_id):
        return self("DescribeKey", KeyId=key_id)["KeyMetadata"]["KeyState"]

    def usable(self, key_id):
        """Encrypt and decrypt; returns the blob."""
        blob = self("Encrypt", KeyId=key_id, Plaintext="aGVsbG8=")["CiphertextBlob"]
        assert self("Decrypt", CiphertextBlob=blob)["Plaintext"] == "aGVsbG8="
        return blob


def import_request(parameters, material):
    """ImportKeyMaterial's parameters, with the material encrypted as a client does."""
    algorithm = WrappingAlgorithm.RSAES_OAEP_SHA_256
    encrypted = pyca_encrypt(algorithm, base64.b64decode(parameters["PublicKey"]), material)
    return {
        "KeyId": parameters["KeyId"],
        "ImportToken": parameters["ImportToken"],
        "EncryptedKeyMaterial": base64.b64encode(encrypted).decode(),
    }


def run_elsewhere(arguments):
    """Run an operation in another process, by ``support.kms.crasher``."""
    return subprocess.run(
        [sys.executable, "-m", "support.kms.crasher", json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def build_kms(url, backend, audit_file, clock=None, **more):
    """A KMS with one backend for all levels that it serves, with a migrated database."""
    database = Database(url, sync=False)
    database.migrate()
    clock = clock or (lambda: datetime.now(UTC))
    return Kms(
        database,
        dict.fromkeys(backend.capabilities().protection_levels, backend),
        Deployment(),
        access_keys=StaticAccessKeys(()),
        audit_log=AuditLog(Path(audit_file), clock),
        clock=clock,
        **more,
    )
