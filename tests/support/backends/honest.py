"""An honest plug-in over the software backend, for mutants to spoil one thing of.

Its "HSM" is a directory with one file for each object, so that every instance and every process
on the same directory has the same objects, and every process can count them.
"""

import os
import secrets
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from hsmwrap.backend import (
    Backend,
    Capabilities,
    Custody,
    KeyRef,
    PrivateKeyRef,
    ReapReport,
)
from hsmwrap.catalog import KeySpec, WrappingAlgorithm
from hsmwrap.errors import ConfigurationError, InvalidImportToken, KeyNotFound, UnsupportedOperation
from hsmwrap.software import SoftwareBackend

INTERNAL = Custody.HSM_INTERNAL
NEVER = datetime.fromtimestamp(0, UTC)


class HonestBackend(Backend):
    contract_version = 1
    algorithms = (WrappingAlgorithm.RSAES_OAEP_SHA_1, WrappingAlgorithm.SM2PKE)
    key_specs = tuple(KeySpec)
    sm2_layouts = ("C1C3C2", "C1C3C2_BARE", "DER")

    def __init__(self, directory, custody):
        self.inner = SoftwareBackend.from_settings(
            {"keyring_file": f"{directory}/keyring", "sm2_layouts": list(self.sm2_layouts)}
        )
        self.directory = Path(directory)
        self.custody = Custody(custody)

    @classmethod
    def from_settings(cls, settings):
        if unknown := settings.keys() - {"directory", "custody"}:
            raise ConfigurationError(f"unknown: {unknown}")
        return cls(**settings)

    @property
    def name(self):
        return "honest"

    @property
    def resident(self):
        return self.custody is INTERNAL

    def capabilities(self):
        report = self.inner.capabilities()
        return Capabilities(
            backend=self.name,
            protection_levels=report.protection_levels,
            wrapping=tuple(
                replace(w, custody=self.custody)
                for w in report.wrapping
                if w.algorithm in self.algorithms
            ),
            keys=tuple(
                replace(k, custody=self.custody)
                for k in report.keys
                if k.key_spec in self.key_specs
            ),
        )

    # --- wrapping keys -----------------------------------------------------------------------

    def generate_wrapping_key(self, spec, algorithm, *, expires_at):
        if self.capabilities().wrapping_for(spec, algorithm) is None:
            raise UnsupportedOperation(f"{algorithm} with {spec} is not served")
        key = self.inner.generate_wrapping_key(spec, algorithm, expires_at=expires_at)
        if not self.resident:
            return key
        object_id = self.store(secrets.token_bytes(16), key.private_key.data, expires_at)
        return replace(key, private_key=PrivateKeyRef(INTERNAL, object_id))

    def discard_wrapping_key(self, private_key):
        self.capabilities()
        if self.resident:
            self.path(private_key.data).unlink(missing_ok=True)

    def unwrap_material(
        self,
        private_key,
        algorithm,
        encrypted_material,
        *,
        key_spec,
        expected_check_value=None,
        object_id=None,
    ):
        if self.capabilities().key_for(key_spec) is None:
            raise UnsupportedOperation(f"{key_spec} keys are not imported")
        inner_key = self.fetch(private_key)
        imported = self.inner.unwrap_material(
            inner_key,
            algorithm,
            encrypted_material,
            key_spec=key_spec,
            expected_check_value=expected_check_value,
        )
        data = imported.key.data
        if self.resident:
            data = self.store(object_id or secrets.token_bytes(16), data)
        return replace(imported, key=KeyRef(self.name, key_spec, self.custody, data))

    def fetch(self, private_key):
        if not self.resident:
            return private_key
        try:
            data = self.path(private_key.data).read_bytes()
        except OSError:
            raise InvalidImportToken("the wrapping key is gone") from None
        return PrivateKeyRef(Custody.HSM_ENCRYPTED_DATABASE, data)

    # --- imported keys -----------------------------------------------------------------------

    def encrypt(self, key, plaintext, additional_data=b""):
        return self.inner.encrypt(self.inner_key(key), plaintext, additional_data)

    def decrypt(self, key, ciphertext, additional_data=b""):
        return self.inner.decrypt(self.inner_key(key), ciphertext, additional_data)

    def inner_key(self, key):
        self.capabilities()
        data = key.data
        if self.resident:
            try:
                data = self.path(key.data).read_bytes()
            except OSError:
                raise KeyNotFound("the key is gone") from None
        return KeyRef(self.inner.name, key.key_spec, Custody.HSM_ENCRYPTED_DATABASE, data)

    def destroy_key(self, key):
        self.capabilities()
        if self.resident:
            self.path(key.data).unlink(missing_ok=True)

    # --- the rest ----------------------------------------------------------------------------

    def mac(self, data):
        return self.inner.mac(data)

    def verify_mac(self, data, mac):
        return self.inner.verify_mac(data, mac)

    def reap(self, now):
        self.capabilities()
        for path in self.objects():
            expiry = path.stat().st_mtime
            if expiry and expiry < now.timestamp():
                path.unlink(missing_ok=True)
        return ReapReport()

    def health(self):
        return self.inner.health()

    def close(self):
        self.inner.close()

    # --- its HSM -----------------------------------------------------------------------------

    def store(self, object_id, data, expires_at=NEVER):
        path = self.path(object_id)
        path.write_bytes(data)
        os.utime(path, (0, expires_at.timestamp()))
        return object_id

    def path(self, object_id):
        return self.directory / f"{object_id.hex()}.object"

    def objects(self):
        return list(self.directory.glob("*.object"))


class Sm4Only(HonestBackend):
    """A backend of few talents is right too."""

    algorithms = (WrappingAlgorithm.SM2PKE,)
    key_specs = (KeySpec.ALIYUN_SM4,)
