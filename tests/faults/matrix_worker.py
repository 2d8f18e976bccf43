"""Runs every operation of the backend against every fault, in a process of its own.

Usage: matrix_worker.py SHIM_DIRECTORY SETTINGS_JSON OPERATION... ; prints one JSON object a line.

In a process of its own, because the shim and a backend that loads SoftHSM directly would share
one SoftHSM.
"""

import json
import secrets
import sys
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import HsmwrapError
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.returncodes import RECOVERY
from hsmwrap.sm2 import decode_spki, open_engine
from hsmwrap.testing.faults import CKR, FaultShim

AES = KeySpec.ALIYUN_AES_256
# Where the call may have worked and only its answer was lost. Not C_OpenSession: a session whose
# handle nobody has can only go with the module.
CREATORS = {"C_GenerateKeyPair", "C_UnwrapKey", "C_CreateObject", "C_DeriveKey"}
NOT_OURS = {"C_GetFunctionList", "C_GetInfo"}


def encrypt(key, material):
    if key.spec is WrappingKeySpec.EC_SM2:
        return open_engine("libcrypto").encrypt(decode_spki(key.public_key), material).to_c1c3c2()
    sha1 = key.algorithm is WrappingAlgorithm.RSAES_OAEP_SHA_1
    digest = hashes.SHA1() if sha1 else hashes.SHA256()
    scheme = padding.OAEP(padding.MGF1(digest), digest, None)
    return load_der_public_key(key.public_key).encrypt(material, scheme)


@dataclass
class Prepared:
    key: object
    ciphertext: bytes
    check_value: bytes = b""
    reference: object = None
    message: bytes = b""


class Stage:
    """A backend behind the shim, with keys to work on."""

    def __init__(self, shim, settings):
        self.shim = shim
        self.settings = settings
        self.backend = self.open()
        self.prepared = {
            algorithm: self.prepare(spec, algorithm)
            for spec, algorithm in (
                (WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_1),
                (WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_256),
                (WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE),
            )
        }
        self.seal = self.backend.seal(b"data")

    def open(self):
        return Pkcs11Backend.from_settings(self.settings)

    def prepare(self, spec, algorithm):
        expires = datetime.now(UTC) + timedelta(hours=1)
        key = self.backend.generate_wrapping_key(spec, algorithm, expires_at=expires)
        prepared = Prepared(key, encrypt(key, secrets.token_bytes(32)))
        imported = self.bring_in(prepared)
        prepared.check_value, prepared.reference = imported.check_value, imported.key
        prepared.message = self.backend.encrypt(imported.key, b"message")
        return prepared

    def bring_in(self, prepared):
        return self.backend.unwrap_material(
            prepared.key.private_key, prepared.key.algorithm, prepared.ciphertext, key_spec=AES
        )

    # --- operations: each does one public call and says whether its answer is right ------------

    def issue_sm2(self):
        key = self.backend.generate_wrapping_key(
            WrappingKeySpec.EC_SM2,
            WrappingAlgorithm.SM2PKE,
            expires_at=datetime.now(UTC) + timedelta(hours=1),
        )
        self.shim.clear()
        right = self.bring_in(Prepared(key, encrypt(key, bytes(32)))).check_value[:1] == b"\x01"
        self.backend.discard_wrapping_key(key.private_key)
        return right

    def issue_rsa(self):
        key = self.backend.generate_wrapping_key(
            WrappingKeySpec.RSA_2048,
            WrappingAlgorithm.RSAES_OAEP_SHA_1,
            expires_at=datetime.now(UTC) + timedelta(hours=1),
        )
        return len(key.public_key) == 294

    def _import(self, algorithm):
        prepared = self.prepared[algorithm]
        imported = self.bring_in(prepared)
        self.shim.clear()
        self.backend.destroy_key(imported.key)
        return imported.check_value == prepared.check_value

    def import_unwrap(self):
        return self._import(WrappingAlgorithm.RSAES_OAEP_SHA_1)

    def import_raw(self):
        return self._import(WrappingAlgorithm.RSAES_OAEP_SHA_256)

    def import_sm2(self):
        return self._import(WrappingAlgorithm.SM2PKE)

    def encrypt(self):
        prepared = self.prepared[WrappingAlgorithm.SM2PKE]
        sealed = self.backend.encrypt(prepared.reference, b"other")
        self.shim.clear()
        return self.backend.decrypt(prepared.reference, sealed) == b"other"

    def decrypt(self):
        prepared = self.prepared[WrappingAlgorithm.SM2PKE]
        return self.backend.decrypt(prepared.reference, prepared.message) == b"message"

    def token(self):
        return self.backend.check_seal(b"data", self.seal)

    def reap(self):
        return self.backend.reap(datetime.now(UTC)).removed == ()

    def open_again(self):
        self.backend.close()
        self.backend = self.open()
        return self.token()

    def restart(self):
        """A seal that finds the HSM lost; the fault then hits the recovery."""
        self.shim.fail("C_SignInit", CKR.DEVICE_REMOVED)
        return self.token()

    def discard(self):
        expires = datetime.now(UTC) + timedelta(hours=1)
        rule = self.pending_rule
        self.shim.clear()
        key = self.backend.generate_wrapping_key(
            WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE, expires_at=expires
        )
        self.shim.fail(**rule)
        try:
            self.backend.discard_wrapping_key(key.private_key)
        finally:
            self.shim.clear()
            self.recover()
            self.backend.discard_wrapping_key(key.private_key)
        return True

    # --- one case ------------------------------------------------------------------------------

    def recover(self):
        """A normal call works again; a backend that a PIN error stopped is opened anew."""
        for _ in range(3):
            try:
                if self.backend.check_seal(b"data", self.seal):
                    return
            except HsmwrapError as error:
                last = error
                if type(error).__name__ in {"PinError", "BackendClosed"}:
                    self.backend.close()
                    self.backend = self.open()
        raise last

    def case(self, operation, function, code, *, after):
        before, violations = self.settle(), self.shim.counters().violations
        self.pending_rule = {"function": function, "code": CKR[code], "after": after}
        self.shim.fail(**self.pending_rule)
        try:
            outcome = "right" if getattr(self, operation)() else "WRONG ANSWER"
        except HsmwrapError as error:
            outcome = type(error).__name__
        except Exception as error:
            outcome = f"UNTYPED {type(error).__name__}: {traceback.format_exc(limit=-4)}"
        hit = not self.shim.pending()
        self.shim.clear()
        try:
            self.recover()
            after_state = self.settle()
            left = [now - then for now, then in zip(after_state, before, strict=True)]
        except Exception as error:
            left = f"NOT RECOVERED {type(error).__name__}: {error}"
        misuse = self.shim.counters().violations != violations
        return {"outcome": outcome, "left": left, "hit": hit, "misuse": misuse}

    def settle(self):
        self.backend.reap(datetime.now(UTC))  # leftovers that could not be destroyed at once
        self.token()
        return self.shim.counters().held

    def functions_of(self, operation):
        before = self.shim.counters()
        self.pending_rule = {"function": "C_SeedRandom", "code": CKR.DEVICE_ERROR, "after": False}
        assert getattr(self, operation)(), operation
        self.shim.clear()
        called = self.shim.counters().calls_since(before)
        return sorted(set(called) - NOT_OURS)


def main():
    directory, settings, operations = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
    shim = FaultShim(settings["module"], directory)
    stage = Stage(shim, settings | {"module": str(shim.path)})
    for operation in operations:
        for function in stage.functions_of(operation):
            for code in RECOVERY:
                for after in (False, True) if function in CREATORS else (False,):
                    case = {"operation": operation, "function": function, "code": code}
                    case |= stage.case(operation, function, code, after=after) | {"after": after}
                    print(json.dumps(case), flush=True)
    stage.backend.close()
    print(json.dumps({"operation": "close", "held": shim.counters().held}), flush=True)


if __name__ == "__main__":
    main()
