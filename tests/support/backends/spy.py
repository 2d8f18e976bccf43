"""A backend that serves everything, makes nothing of worth, and notes what it was asked.

``failing`` raises, by call; ``pair_differs`` and ``key_differs`` change what it answers.
"""

import hmac
from dataclasses import replace

from hsmwrap.backend import (
    Backend,
    Capabilities,
    Custody,
    Exposure,
    Health,
    ImportedKey,
    KeyCapability,
    KeyRef,
    Mac,
    PrivateKeyRef,
    ReapReport,
    WrappingCapability,
    WrappingKey,
)
from hsmwrap.catalog import COMPATIBILITY_TABLE, KeySpec, ProtectionLevel
from hsmwrap.errors import InvalidMac

INTERNAL = Custody.HSM_INTERNAL


class SpyBackend(Backend):
    contract_version = 1
    name = "spy"

    def __init__(self, exposure=Exposure.HOST, levels=ProtectionLevel):
        self.calls = []
        self.failing = {}
        self.exposure = exposure
        self.pair_differs = {}
        self.key_differs = {}
        self.report = Capabilities(
            backend=self.name,
            protection_levels=frozenset(levels),
            wrapping=tuple(
                WrappingCapability(row.spec, row.algorithm, exposure, INTERNAL, "spy")
                for row in COMPATIBILITY_TABLE
            ),
            keys=tuple(KeyCapability(spec, usable=True, custody=INTERNAL) for spec in KeySpec),
        )

    @classmethod
    def from_settings(cls, settings):
        return cls(**settings)

    def _note(self, call):
        self.calls.append(call)
        if call in self.failing:
            raise self.failing[call]

    def capabilities(self):
        if "capabilities" in self.failing:
            raise self.failing["capabilities"]
        return self.report

    def generate_wrapping_key(self, spec, algorithm, *, expires_at):
        self._note("generate")
        number = len(self.calls).to_bytes(4)
        pair = WrappingKey(spec, algorithm, number, PrivateKeyRef(INTERNAL, number))
        return replace(pair, **self.pair_differs)

    def discard_wrapping_key(self, private_key):
        self._note("discard")

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
        self._note("unwrap")
        made = {"backend": self.name, "key_spec": key_spec, "custody": INTERNAL, "data": b""}
        made |= {"exposure": self.exposure, **self.key_differs}
        exposure = made.pop("exposure")
        self.made = ImportedKey(KeyRef(**made), b"\x01", exposure)
        return self.made

    def mac(self, data):
        self._note("mac")
        return Mac("1", hmac.digest(b"spy", data, "sha256"))

    def verify_mac(self, data, mac):
        if not hmac.compare_digest(hmac.digest(b"spy", data, "sha256"), mac.tag):
            raise InvalidMac

    def encrypt(self, key, plaintext, additional_data=b""):
        raise NotImplementedError

    def decrypt(self, key, ciphertext, additional_data=b""):
        raise NotImplementedError

    def destroy_key(self, key):
        assert key == self.made.key
        self._note("destroy")

    def reap(self, now):
        return ReapReport()

    def health(self):
        return Health(ready=True, detail="ready")

    def close(self):
        pass
