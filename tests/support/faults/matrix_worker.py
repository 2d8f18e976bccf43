"""Runs operations of the backend against every fault, in a process of its own.

Usage: python -m support.faults.matrix_worker
           SHIM_DIRECTORY SETTINGS_JSON SO_PIN_FILE OPERATION

Prints one JSON object a line: the cases of one operation. It is a process of its own because the
shim and a backend that loads SoftHSM directly would share one SoftHSM.

If an operation calls a function many times, different codes are injected at different calls.
"""

import json
import secrets
import sys
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.customer import encrypt_key_material
from hsmwrap.errors import HsmwrapError
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding.returncodes import RECOVERY
from hsmwrap.pkcs11.keysets import admin
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.testing.faults import CKR, Vendor
from support.faults.shim import fault_shim

AES = KeySpec.ALIYUN_AES_256
# Functions that may make an object although they answer an error. Not C_OpenSession: a session
# whose handle is lost can only be closed together with the module.
CREATORS = {"C_GenerateKeyPair", "C_UnwrapKey", "C_CreateObject", "C_DeriveKey"}
NOT_OURS = {"C_GetFunctionList", "C_GetInfo"}
NEVER = {"function": "C_SeedRandom", "code": CKR.DEVICE_ERROR}
MANY_CALLS = {
    *("capabilities", "keys_init", "keys_rotate", "keys_retire"),
    *("keys_backup", "keys_restore"),
}
# With a vendor's SM2, which is played, and its profile.
VENDOR = {"vendor_issue_sm2", "vendor_import_sm2"}
# They do the same as those before them, but for a few calls: a sixth of the cases.
THIN = {"keys_backup", "keys_restore", *VENDOR}
BACKUP_KEY = secrets.token_bytes(32)


def encrypt(key, material):
    return encrypt_key_material(key.algorithm, key.public_key, material)


@dataclass
class Prepared:
    key: object
    ciphertext: bytes
    check_value: bytes = b""
    reference: object = None
    message: bytes = b""


class FaultedBackend:
    """A backend behind the shim, with keys for the operations."""

    def __init__(self, shim, settings, so_pin_file):
        self.shim = shim
        self.settings = settings
        self.keys = settings | {"key_prefix": "administered"}
        self.so_pin_file = so_pin_file
        self.sets = ()  # under the prefix of self.keys
        self.made = None  # a backup of them
        self.held = None  # as settle() said, and nothing was done since
        self.backend = self.open()
        self.undisturbed = self.backend.capabilities()
        self.prepared = {
            algorithm: self.prepare(spec, algorithm)
            for spec, algorithm in (
                (WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_1),
                (WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_256),
                (WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE),
            )
        }
        self.mac = self.backend.mac(b"data")
        self.rule = NEVER
        self.arm()

    def open(self):
        return Pkcs11Backend.from_settings(self.settings)

    def open_anew(self, *, probed):
        """As an operator does; what the probe found is still true, and takes long to find."""
        known = self.backend._probed
        self.backend.close()
        self.backend = self.open()
        if probed and known is not None:
            self.backend._probed = known
            self.backend._keys = known.wrapping.keys

    # --- the fault -----------------------------------------------------------------------------

    def arm(self):
        """The next calls are those of the operation."""
        self.hit, self.begun = None, self.shim.counters()
        self.shim.fail(**self.rule)

    def begin(self, rule):
        """An operation, which has to look for its keys."""
        self.backend._connection._connector.epoch.end()
        self.rule = rule
        self.arm()

    def disarm(self):
        """What follows is not the operation any more; sees whether the fault was met."""
        if self.hit is None:
            self.hit = self.rule["function"] not in self.shim.pending()
            self.ended = self.shim.counters()
        self.shim.clear()

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
        self.disarm()
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
        self.disarm()
        self.backend.destroy_key(imported.key)
        return imported.check_value == prepared.check_value

    def import_unwrap(self):
        return self._import(WrappingAlgorithm.RSAES_OAEP_SHA_1)

    def import_raw(self):
        return self._import(WrappingAlgorithm.RSAES_OAEP_SHA_256)

    def import_sm2(self):
        return self._import(WrappingAlgorithm.SM2PKE)

    vendor_issue_sm2, vendor_import_sm2 = issue_sm2, import_sm2

    def encrypt(self):
        prepared = self.prepared[WrappingAlgorithm.SM2PKE]
        sealed = self.backend.encrypt(prepared.reference, b"other")
        self.disarm()
        return self.backend.decrypt(prepared.reference, sealed) == b"other"

    def decrypt(self):
        prepared = self.prepared[WrappingAlgorithm.SM2PKE]
        return self.backend.decrypt(prepared.reference, prepared.message) == b"message"

    def token(self):
        self.backend.verify_mac(b"data", self.mac)
        return True

    def reap(self):
        return self.backend.reap(datetime.now(UTC)).removed == ()

    def open_again(self):
        self.open_anew(probed=True)
        return self.token()

    def restart(self):
        """A MAC that finds the HSM lost; the fault then hits the recovery."""
        self.shim.clear()
        self.backend.verify_mac(b"data", self.mac)
        self.arm()
        self.shim.fail("C_SignInit", CKR.DEVICE_REMOVED)
        return self.token()

    def discard(self):
        self.shim.clear()
        key = self.backend.generate_wrapping_key(
            WrappingKeySpec.EC_SM2,
            WrappingAlgorithm.SM2PKE,
            expires_at=datetime.now(UTC) + timedelta(hours=1),
        )
        self.arm()
        try:
            self.backend.discard_wrapping_key(key.private_key)
        finally:
            self.disarm()
            self.recover()
            self.backend.discard_wrapping_key(key.private_key)
        return True

    def capabilities(self):
        """The probe, at the first call; what disturbs it must not be taken for an inability."""
        self.shim.clear()
        self.backend.close()
        self.backend = self.open()
        self.arm()
        met = None
        try:
            self.backend.capabilities()
        except HsmwrapError as error:
            met = error
        # Not while that is handled: the report has the return codes behind errors.
        self.disarm()
        self.recover(probed=False)
        assert self.backend.capabilities() == self.undisturbed
        if met is not None:
            raise met
        return True

    # --- the backend's own keys, under another prefix; with the SO PIN, so no user is logged in

    def keys_init(self):
        def act():
            Pkcs11Backend.initialise_keys(self.keys, so_pin_file=self.so_pin_file)

        return self.administer(act, before=0, after=1)

    def keys_rotate(self):
        def act():
            Pkcs11Backend.rotate_keys(self.keys, so_pin_file=self.so_pin_file)

        return self.administer(act, before=1, after=2)

    def keys_retire(self):
        def act():
            Pkcs11Backend.retire_keys(self.keys, self.sets[0].key_set)

        return self.administer(act, before=2, after=1)

    def back_up(self):
        return Pkcs11Backend.back_up_keys(self.keys, BACKUP_KEY, so_pin_file=self.so_pin_file)

    def keys_backup(self):
        return self.administer(self.back_up, before=1, after=1)

    def keys_restore(self):
        if self.made is None:
            self.shim.clear()
            self.backend.close()
            self.provide(1)
            self.made = self.back_up()

        def act():
            arguments = self.keys, self.made, BACKUP_KEY
            Pkcs11Backend.restore_keys(*arguments, so_pin_file=self.so_pin_file)

        return self.administer(act, before=0, after=1)

    def administer(self, act, *, before, after):
        """One command; if it failed, it can be repeated. ``before``, ``after``: numbers of sets."""
        self.shim.clear()
        self.backend.close()
        self.provide(before)
        self.arm()
        try:
            act()
        except HsmwrapError as error:
            self.disarm()
            self.rule = NEVER
            sets = self.require_as_before(error, before)
            if len(sets) != after:  # the error may have come last
                act()
            raise
        finally:
            self.disarm()
            self.sets = Pkcs11Backend.list_keys(self.keys)
            assert len(self.sets) == after, self.sets
            assert all("6 keys" in each.detail for each in self.sets), self.sets
            assert [each.current for each in self.sets] == [False] * (after - 1) + [True]
            self.provide(before)
        return True

    def require_as_before(self, error, before):
        """Nothing is left of a set that was not finished; returns the sets that there are.

        But after an error that speaks of the PIN: cleaning up would try it again.
        """
        sets = Pkcs11Backend.list_keys(self.keys)
        if type(error).__name__ == "PinError":
            unfinished = [each for each in sets if "NOT finished" in each.detail]
            for each in unfinished:
                Pkcs11Backend.retire_keys(self.keys, each.key_set)
            return Pkcs11Backend.list_keys(self.keys) if unfinished else sets
        assert not any("NOT finished" in each.detail for each in sets), sets
        assert len(sets) <= before, sets
        return sets

    def provide(self, count):
        """So many key sets, where there are ``self.sets`` now."""
        for each in self.sets[: max(0, len(self.sets) - count)]:
            settings = Pkcs11Settings.from_mapping(self.keys)
            made, number = admin.key_sets_of(settings), int(each.key_set)
            with admin.connected(settings) as connection:
                connection.run(lambda pooled: made.destroy(pooled, number))  # noqa: B023
            self.sets = self.sets[1:]
        for there in range(len(self.sets), count):
            make = Pkcs11Backend.rotate_keys if there else Pkcs11Backend.initialise_keys
            self.sets = (*self.sets, make(self.keys, so_pin_file=self.so_pin_file))

    # --- one case ------------------------------------------------------------------------------

    def recover(self, *, probed=True):
        """A normal call works again; a backend that a PIN error stopped is opened anew."""
        for _ in range(3):
            try:
                return self.backend.verify_mac(b"data", self.mac)
            except HsmwrapError as error:
                last = error
                if type(error).__name__ in {"PinError", "BackendClosed"}:
                    self.open_anew(probed=probed)
        raise last

    def case(self, operation, rule):
        before, violations = self.held or self.settle(), self.shim.counters().violations
        self.held = None
        self.begin(rule)
        try:
            outcome = "right" if getattr(self, operation)() else "WRONG ANSWER"
        except HsmwrapError as error:
            outcome = type(error).__name__
        except Exception as error:
            outcome = f"UNTYPED {type(error).__name__}: {traceback.format_exc(limit=-4)}"
        self.disarm()
        try:
            self.recover()
            self.held = self.settle()
            left = [now - then for now, then in zip(self.held, before, strict=True)]
        except Exception as error:
            left = f"NOT RECOVERED {type(error).__name__}: {error}"
        misuse = self.shim.counters().violations != violations
        return {"outcome": outcome, "left": left, "hit": self.hit, "misuse": misuse}

    def settle(self):
        self.backend.reap(datetime.now(UTC))  # leftovers that could not be destroyed at once
        self.backend.verify_mac(b"data", self.mac)
        return self.shim.counters().held

    def calls_of(self, operation):
        """The functions that an undisturbed operation calls, and how often."""
        self.begin(NEVER)
        assert getattr(self, operation)(), operation
        self.disarm()
        self.recover()
        called = self.ended.calls_since(self.begun)
        return {name: called[name] for name in sorted(set(called) - NOT_OURS)}


def rules(operation, calls):
    """Every function by each of the codes."""
    for place, (function, count) in enumerate(calls.items()):
        own = operation in VENDOR and function in {"C_UnwrapKey", "C_GenerateKeyPair"}
        for index, code in enumerate(RECOVERY):
            thin = operation in THIN and not own
            if thin and (place + index) % 6:
                continue
            for after in (False, True) if function in CREATORS else (False,):
                nth = 1 + index * count // len(RECOVERY) if operation in MANY_CALLS else 1
                nth = count if own else nth  # the last is by the vendor's mechanism
                yield code.name, {"function": function, "code": code, "nth": nth, "after": after}


def main():
    directory, settings, so_pin_file = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    operation = sys.argv[4]
    shim = fault_shim(settings["module"], directory)
    settings |= {"module": str(shim.path)}
    if operation in VENDOR:
        shim.play(Vendor.SANSEC)
        settings |= {"profile": "sansec", "key_prefix": "vendor"}
        Pkcs11Backend.initialise_keys(settings)
    faulted = FaultedBackend(shim, settings, so_pin_file)
    for code, rule in rules(operation, faulted.calls_of(operation)):
        case = {**rule, "code": code} | faulted.case(operation, rule)
        print(json.dumps(case), flush=True)
    faulted.backend.close()
    print(json.dumps({"held_after_close": shim.counters().held}), flush=True)


if __name__ == "__main__":
    main()
