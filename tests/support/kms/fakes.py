"""A backend in a directory, a clock that is set, and clients of the KMS."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import inspect

from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.errors import HsmUnavailable
from hsmwrap.kms import Caller, Kms, Permissions, StaticAccessKeys
from hsmwrap.kms.audit import AuditLog
from hsmwrap.kms.database import Database
from hsmwrap.policy import Deployment
from hsmwrap.testing import MemoryBackend
from hsmwrap.testing.clients import pyca_encrypt
from support.backends.scripted import Scripted

ADMIN = Caller("admin", Permissions.everything())
AES_MATERIAL = bytes(range(32))
SM4_MATERIAL = bytes(range(16))
OTHER_MATERIAL = bytes(32)


class DirectoryBackend(Scripted):
    """A memory backend in a directory; imported keys are objects, or sealed."""

    opens = MemoryBackend

    def __init__(
        self, directory, custody="HsmInternal", wrapping="HsmEncryptedDatabase", name="hsm"
    ):
        super().__init__(
            name=name,
            directory=str(directory),
            wrapping_custody=wrapping,
            material_custody=custody,
        )
        self.unavailable = False

    @classmethod
    def from_settings(cls, settings):
        return cls(**settings)

    def objects(self):
        """Ids of the imported keys that are objects."""
        names = [name for name in self.store if name.startswith("material-")]
        return {bytes.fromhex(name.removeprefix("material-")) for name in names}

    def put_object(self, object_id):
        self.store[f"material-{object_id.hex()}"] = b""

    def remove_object(self, object_id):
        del self.store[f"material-{object_id.hex()}"]

    def _forward(self, asked, declared, *arguments, **named):
        if self.unavailable and declared.__name__ not in QUIET:
            raise HsmUnavailable("unavailable")
        return super()._forward(asked, declared, *arguments, **named)


QUIET = {"capabilities", "mac", "verify_mac", "close"}
"""What an unavailable backend can do all the same."""


def hsm_of(kms):
    """The backend of level HSM, without its guard."""
    return kms._backends["HSM"].ability(DirectoryBackend)


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


def build_kms(url, backend, audit_file, clock=None, **more):
    """A KMS with one backend for all levels that it serves; migrates a database without schema."""
    database = Database(url, sync=False)
    if not inspect(database.engine).has_table("keys"):
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
