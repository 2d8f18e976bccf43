"""Backends that each break one promise, and the tests of the kit that have to notice."""

import base64
import hashlib
import itertools
import logging
import secrets
import string
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hsmwrap.backend import (
    Custody,
    Exposure,
    ImportedKey,
    KeyRef,
    Mac,
    PrivateKeyRef,
    WrappingKey,
)
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.checkvalue import check_value
from hsmwrap.errors import (
    ConfigurationError,
    HsmError,
    InvalidImportToken,
    InvalidKeyMaterial,
    InvalidMac,
    KeyNotFound,
)
from hsmwrap.oaep import mgf1
from hsmwrap.sm2 import encode_point, encode_spki, parse, sm2_kdf, sm3
from hsmwrap.sm2.kdf import xor
from hsmwrap.software.rsa import RsaScheme, load
from hsmwrap.testing._conformance.points import G, multiples_of, multiply
from hsmwrap.testing.memory import MemorySettings
from support.backends.honest import HonestBackend

SEALED, RESIDENT = Custody.HSM_ENCRYPTED_DATABASE, Custody.HSM_INTERNAL
OAEP1, SM2PKE = WrappingAlgorithm.RSAES_OAEP_SHA_1, WrappingAlgorithm.SM2PKE

AT_FIRST = "test_no_bad_ciphertext_becomes_a_key_at_first"
ONE_ERROR = "test_every_bad_ciphertext_is_the_same_error"
SHOWN = "test_neither_reference_nor_check_value_shows_the_material"
BECOMES = "test_material_becomes_a_key"
ASKED_FOR = "test_a_wrapping_key_is_what_was_asked_for_and_hides_its_private_part"
SECRETS = "test_no_secret_in_logs_reprs_and_errors"
LENGTHS = "test_only_the_exact_length_is_accepted"
CLOSED = "test_everything_is_closed_after_close"
KEY_SET = "test_a_sealed_wrapping_key_names_the_current_key_set"
DAMAGED = "test_a_damaged_wrapping_key_reference_is_no_import_token"


@dataclass(frozen=True)
class Mutant:
    """A broken backend, the finding that it stands for, and the test that has to fail.

    ``repaired``: the guard makes it harmless, so the test has to fail without the guard only.
    """

    finding: str
    backend: type
    test: str
    custody: Custody = SEALED
    counts: bool = True
    repaired: bool = False

    def __str__(self):
        return f"{self.finding}-{self.backend.__name__}"


MUTANTS = []


def mutant(finding, test, custody=SEALED, *, counts=True, repaired=False) -> Callable[[type], type]:
    def register(backend):
        MUTANTS.append(Mutant(finding, backend, test, custody, counts, repaired))
        return backend

    return register


def sealed_material(backend, material, key_spec):
    return backend.seal(backend.current_key_set(), key_spec, material)


# --- B1 and B13: no integrity, no curve ------------------------------------------------------


class _Scheme:
    """Replaces one of the software backend's schemes; the rest is as it was."""

    def __init__(self, whole):
        self.whole = whole

    def __getattr__(self, name):
        return getattr(self.whole, name)


class _WithScheme(HonestBackend):
    scheme = None

    def __init__(self, settings):
        super().__init__(settings)
        algorithm = self.scheme.algorithm
        self.schemes[algorithm] = self.scheme(self.schemes[algorithm])


class _Sm2WithoutC3(_Scheme):
    algorithm = SM2PKE

    def decrypt(self, secret, ciphertext, material_length):
        parsed = parse(ciphertext, material_length, self.whole._layouts)
        shared = multiply(int.from_bytes(secret[:32]), multiples_of((parsed.x, parsed.y)))
        x2, y2 = (number.to_bytes(32) for number in shared)
        return xor(parsed.c2, sm2_kdf(x2, y2, material_length))


@mutant("B1", AT_FIRST)
class IgnoresC3(_WithScheme):
    scheme = _Sm2WithoutC3


class _OaepWithoutHash(_Scheme):
    algorithm = OAEP1

    def decrypt(self, secret, ciphertext, material_length):
        numbers = load(secret).private_numbers()
        n = numbers.public_numbers.n
        encoded = pow(int.from_bytes(ciphertext), numbers.d, n).to_bytes(256)
        seed = xor(encoded[1:21], mgf1(encoded[21:], 20, "sha1"))
        block = xor(encoded[21:], mgf1(seed, 235, "sha1"))
        padding, separator, material = block[20:].partition(b"\x01")
        if encoded[0] or any(padding) or not separator or len(ciphertext) != 256:
            raise InvalidKeyMaterial
        return material


@mutant("B1", AT_FIRST)
class IgnoresOaepHash(_WithScheme):
    scheme = _OaepWithoutHash


class _Sm2OnAnyCurve(_Scheme):
    """C1C3C2 only, with C3 checked and C1 taken as it comes."""

    algorithm = SM2PKE

    def generate(self):
        d = 1 + 6 * secrets.randbelow(2**200)
        public = encode_point(*multiply(d, multiples_of(G)))
        return encode_spki(public), d.to_bytes(32) + public

    def decrypt(self, secret, ciphertext, material_length):
        if len(ciphertext) != 97 + material_length:
            return self.whole.decrypt(secret, ciphertext, material_length)
        x, y = int.from_bytes(ciphertext[1:33]), int.from_bytes(ciphertext[33:65])
        c3, c2 = ciphertext[65:97], ciphertext[97:]
        try:
            shared = multiply(int.from_bytes(secret[:32]), multiples_of((x, y)))
            x2, y2 = (number.to_bytes(32) for number in shared)
        except (TypeError, ValueError):
            raise InvalidKeyMaterial from None
        material = xor(c2, sm2_kdf(x2, y2, material_length))
        if sm3(x2 + material + y2) != c3:
            raise InvalidKeyMaterial
        return material


@mutant("B13", "test_points_of_other_curves_are_refused")
class TakesAnyPoint(_WithScheme):
    scheme = _Sm2OnAnyCurve


@mutant("B13", "test_every_sm2_layout_is_read")
class ReadsDerOnly(HonestBackend):
    def __init__(self, settings):
        super().__init__(replace(settings, sm2_layouts=("DER",)))


# --- B2 and B3: errors that say why ----------------------------------------------------------


class _Says(HonestBackend):
    """Answers ``error()`` where the honest one answers InvalidKeyMaterial."""

    at_first_only = False

    def unwrap_material(self, *args, **kwargs):
        if self.at_first_only and kwargs.get("expected_check_value") is not None:
            return super().unwrap_material(*args, **kwargs)
        try:
            return super().unwrap_material(*args, **kwargs)
        except InvalidKeyMaterial:
            raise self.error() from self.cause()

    def error(self):
        return InvalidKeyMaterial()

    def cause(self):
        return None


@mutant("B2", AT_FIRST)
class SaysWrongPaddingAtFirst(_Says):
    at_first_only = True

    def error(self):
        return HsmError("wrong padding")


@mutant("B2", LENGTHS)
class SaysWrongLengthAtFirst(_Says):
    at_first_only = True

    def error(self):
        return HsmError("wrong length")


@mutant("B3", ONE_ERROR, repaired=True)
class SaysWhyInANote(_Says):
    def error(self):
        error = InvalidKeyMaterial()
        error.add_note("wrong padding")
        return error


@mutant("B3", ONE_ERROR, repaired=True)
class SaysWhyInAnAttribute(_Says):
    def error(self):
        error = InvalidKeyMaterial()
        error.reason = "wrong padding"
        return error


@mutant("B3", ONE_ERROR, repaired=True)
class SaysWhyInTheCause(_Says):
    def cause(self):
        return ValueError("wrong padding")


class BadPadding(InvalidKeyMaterial):
    pass


@mutant("B3", ONE_ERROR, repaired=True)
class SaysWhyInTheType(_Says):
    def error(self):
        return BadPadding()


@mutant("B3", ONE_ERROR, repaired=True)
class SaysWhyInTheContext(HonestBackend):
    def unwrap_material(self, *args, **kwargs):
        try:
            return super().unwrap_material(*args, **kwargs)
        except InvalidKeyMaterial as error:
            error.__suppress_context__ = False
            error.__context__ = ValueError("wrong padding")
            raise


@mutant("B3", ONE_ERROR)
class SaysWhyByAnotherError(_Says):
    def error(self):
        return InvalidImportToken("wrong padding")


# --- B4 and B5: secrets in what is stored ----------------------------------------------------


class _Imports(HonestBackend):
    """Changes what an import returns."""

    def unwrap_material(self, *args, expected_check_value=None, **kwargs):
        imported = super().unwrap_material(*args, **kwargs)
        spoiled = self.spoil(imported)
        if expected_check_value not in (None, spoiled.check_value):
            raise InvalidKeyMaterial
        return spoiled

    def spoil(self, imported: ImportedKey) -> ImportedKey:
        raise NotImplementedError


class _CheckValueIs(_Imports):
    spelling = staticmethod(bytes)

    def spoil(self, imported):
        spelled = self.spelling(self.material(imported.key))
        return replace(imported, check_value=b"\x07" + spelled)


@mutant("B4", SHOWN)
class CheckValueIsTheKey(_CheckValueIs):
    pass


@mutant("B4", SHOWN)
class CheckValueIsHex(_CheckValueIs):
    spelling = staticmethod(lambda material: material.hex().encode())


@mutant("B4", SHOWN)
class CheckValueIsBase64(_CheckValueIs):
    spelling = staticmethod(base64.b64encode)


@mutant("B4", SHOWN)
class CheckValueIsHalfTheKey(_CheckValueIs):
    spelling = staticmethod(lambda material: material[: len(material) // 2])


@mutant("B4", "test_check_values_of_known_methods_are_the_documented_ones")
class CheckValueOfAnotherBlock(_Imports):
    def spoil(self, imported):
        material = self.material(imported.key)
        return replace(imported, check_value=b"\x01" + check_value(material)[:0:-1])


@mutant("B4", "test_other_material_is_refused_on_re_import")
class CheckValueIsTheSameForAll(_Imports):
    def spoil(self, imported):
        return replace(imported, check_value=b"\x80" + bytes(16))


@mutant("B5", SHOWN)
class KeyRefIsHex(_Imports):
    def spoil(self, imported):
        data = self.material(imported.key).hex().encode()
        return replace(imported, key=replace(imported.key, data=data))


class _PrivateKeyIs(HonestBackend):
    algorithm = OAEP1

    def generate_wrapping_key(self, spec, algorithm, *, expires_at):
        key = super().generate_wrapping_key(spec, algorithm, expires_at=expires_at)
        if algorithm is not self.algorithm:
            return key
        secret = self.fetch(key.private_key, algorithm)
        return replace(key, private_key=replace(key.private_key, data=self.spelling(secret)))

    spelling = staticmethod(lambda secret: b"honest\x01" + secret)


@mutant("B5", ASKED_FOR)
class PrivateKeyIsPq(_PrivateKeyIs):
    pass


@mutant("B5", ASKED_FOR)
class PrivateKeyIsPem(_PrivateKeyIs):
    @staticmethod
    def spelling(secret):
        return load(secret).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@mutant("B5", ASKED_FOR)
class PrivateKeyIsTheScalarInHex(_PrivateKeyIs):
    algorithm = SM2PKE
    spelling = staticmethod(lambda secret: secret[:32].hex().encode())


# --- B6: secrets in what is said -------------------------------------------------------------


@mutant("B6", SECRETS)
class LogsTheMaterial(_Imports):
    def spoil(self, imported):
        extra = {"material": self.material(imported.key).hex()}
        logging.getLogger("acme").debug("imported", extra=extra)
        return imported


@mutant("B6", SECRETS)
class PrintsTheMaterial(_Imports):
    def spoil(self, imported):
        print(list(self.material(imported.key)))
        return imported


@mutant("B6", SECRETS)
class ShowsTheMaterialInItsRepr(_Imports):
    last = b""

    def spoil(self, imported):
        self.last = self.material(imported.key)
        return imported

    def __repr__(self):
        return f"<Acme {self.last!r}>"


@mutant("B6", SECRETS, repaired=True)
class RaisesWithTheMaterial(HonestBackend):
    def unwrap_material(self, *args, expected_check_value=None, **kwargs):
        imported = super().unwrap_material(*args, **kwargs)
        if expected_check_value not in (None, imported.check_value):
            error = InvalidKeyMaterial()
            error.__context__ = ValueError(f"not {self.material(imported.key)!r}")
            raise error from None
        return imported


@mutant("B6", SECRETS)
class LogsTheMessage(HonestBackend):
    def encrypt(self, key, plaintext, additional_data=b""):
        logging.getLogger("acme").info("encrypting %s", base64.b64encode(plaintext))
        return super().encrypt(key, plaintext, additional_data)


# --- B7 and B8: not what was asked for -------------------------------------------------------


class _Pairs(HonestBackend):
    """Changes what it says of a wrapping key."""

    def generate_wrapping_key(self, spec, algorithm, *, expires_at):
        return self.spoil(super().generate_wrapping_key(spec, algorithm, expires_at=expires_at))

    def spoil(self, key: WrappingKey) -> WrappingKey:
        raise NotImplementedError


@mutant("B7", ASKED_FOR)
class LiesAboutTheWrappingKeysCustody(_Pairs):
    def spoil(self, key):
        return replace(key, private_key=PrivateKeyRef(RESIDENT, key.private_key.data))


@mutant("B7", ASKED_FOR)
class ForAnotherAlgorithm(_Pairs):
    def spoil(self, key):
        return replace(key, algorithm=WrappingAlgorithm.RSAES_OAEP_SHA_256)


@mutant("B7", ASKED_FOR)
class ForAnotherSpec(_Pairs):
    def spoil(self, key):
        return replace(key, spec=WrappingKeySpec.RSA_2048)


@mutant("B7", BECOMES)
class LiesAboutTheKeysCustody(_Imports):
    def spoil(self, imported):
        return replace(imported, key=replace(imported.key, custody=RESIDENT))


@mutant("B7", BECOMES)
class NamesAnotherBackend(_Imports):
    def spoil(self, imported):
        return replace(imported, key=replace(imported.key, backend="software"))


@mutant("B7", BECOMES)
class LiesAboutTheKeySpec(_Imports):
    def spoil(self, imported):
        return replace(imported, key=replace(imported.key, key_spec=KeySpec.ALIYUN_SM4))


@mutant("B7", BECOMES)
class LiesAboutTheExposure(_Imports):
    def spoil(self, imported):
        return replace(imported, exposure=Exposure.IN_HSM)


@mutant("B7", "test_a_pair_that_is_not_served_inside_the_hsm_says_why")
class DoesNotSayWhyInTheHost(HonestBackend):
    def capabilities(self):
        report = super().capabilities()
        return replace(report, wrapping=tuple(replace(w, reason="") for w in report.wrapping))


@mutant("B7", "test_a_wrapping_key_is_where_its_custody_says")
class SealsAndKeepsAnObject(_Pairs):
    def spoil(self, key):
        self.store[f"left-{secrets.token_hex(8)}"] = b""
        return key


@mutant("B8", "test_what_is_not_served_is_refused", repaired=True)
class ServesWhatItDoesNotList(HonestBackend):
    def generate_wrapping_key(self, spec, algorithm, *, expires_at):
        return super().generate_wrapping_key(spec, algorithm, expires_at=expires_at)


@mutant("B8", "test_a_key_spec_that_is_not_listed_is_refused", repaired=True)
class ImportsWhatItDoesNotList(HonestBackend):
    def capabilities(self):
        report = super().capabilities()
        return replace(report, keys=report.keys[:1])


# --- B9 and B10: life and leaks --------------------------------------------------------------


@mutant("B9", CLOSED, repaired=True)
class GeneratesAfterClose(HonestBackend):
    def generate_wrapping_key(self, spec, algorithm, *, expires_at):
        return super().generate_wrapping_key(spec, algorithm, expires_at=expires_at)


@mutant("B9", "test_discarding_is_closed_after_close", repaired=True)
class DiscardsAfterClose(HonestBackend):
    def discard_wrapping_key(self, private_key):
        pass


@mutant("B10", "test_a_wrapping_key_is_where_its_custody_says", RESIDENT)
class DiscardsNothing(HonestBackend):
    def discard_wrapping_key(self, private_key):
        pass


@mutant("B10", "test_a_discarded_resident_wrapping_key_is_gone", RESIDENT)
class RemembersWhatIsDiscarded(HonestBackend):
    def __init__(self, settings):
        super().__init__(settings)
        self.copies = {}

    def generate_wrapping_key(self, spec, algorithm, *, expires_at):
        key = super().generate_wrapping_key(spec, algorithm, expires_at=expires_at)
        self.copies[key.private_key.data] = super().fetch(key.private_key, algorithm)
        return key

    def fetch(self, private_key, algorithm):
        return self.copies.get(private_key.data) or super().fetch(private_key, algorithm)


@mutant("B10", "test_a_discarded_resident_wrapping_key_is_gone", RESIDENT)
class AnotherErrorAfterDiscard(HonestBackend):
    def fetch(self, private_key, algorithm):
        try:
            return super().fetch(private_key, algorithm)
        except InvalidImportToken:
            raise KeyNotFound("gone") from None


@mutant("B10", "test_an_import_leaves_its_key_and_nothing_else", RESIDENT)
class LeaksOnSuccess(_Imports):
    def spoil(self, imported):
        self.store[f"left-{secrets.token_hex(8)}"] = b""
        return imported


@mutant("B10", "test_a_destroyed_object_is_not_found", RESIDENT)
class DestroysNothing(HonestBackend):
    def destroy_key(self, key):
        pass


@mutant("B12", "test_an_import_leaves_its_key_and_nothing_else", RESIDENT, counts=False)
class CountsNothing(HonestBackend):
    pass


# --- B11 -------------------------------------------------------------------------------------


class _CountedNonces(HonestBackend):
    """Nonces from a counter: unique only where the counter is."""

    def __init__(self, settings):
        super().__init__(settings)
        self.counter = itertools.count()

    def encrypt(self, key, plaintext, additional_data=b""):
        nonce = self.start() + next(self.counter).to_bytes(4)
        gcm = AESGCM(self.material(key))
        return b"\x01" + nonce + gcm.encrypt(nonce, plaintext, additional_data)


@mutant("B11", "test_no_nonce_twice_across_instances")
class NoncesRestart(_CountedNonces):
    key_specs = (KeySpec.ALIYUN_AES_256,)

    def start(self):
        return bytes(8)


@mutant("B11", "test_no_nonce_twice_across_a_fork")
class NoncesFork(_CountedNonces):
    key_specs = (KeySpec.ALIYUN_AES_256,)

    def __init__(self, settings):
        super().__init__(settings)
        self.instance = secrets.token_bytes(8)

    def start(self):
        return self.instance


class _TakesLength(HonestBackend):
    length = 0

    def unwrap_material(self, private_key, algorithm, encrypted_material, **kwargs):
        try:
            return super().unwrap_material(private_key, algorithm, encrypted_material, **kwargs)
        except InvalidKeyMaterial:
            secret = self.fetch(private_key, algorithm)
            material = self.schemes[algorithm].decrypt(secret, encrypted_material, self.length)
            if len(material) != self.length:
                raise
            key_spec = kwargs["key_spec"]
            data = sealed_material(self, material, key_spec)
            key = KeyRef(self.name, key_spec, SEALED, data)
            return ImportedKey(key, b"\x07", Exposure.HOST)


for _length in (0, 20, 30, 48, 100):
    mutant("B11", LENGTHS)(type(f"Takes{_length}Bytes", (_TakesLength,), {"length": _length}))


@mutant("B11", "test_no_two_wrapping_keys_are_the_same")
class RecyclesTwoPairs(HonestBackend):
    def __init__(self, settings):
        super().__init__(settings)
        self.made = {}

    def generate_wrapping_key(self, spec, algorithm, *, expires_at):
        made = self.made.setdefault(algorithm, [])
        if len(made) < 2:
            made.append(super().generate_wrapping_key(spec, algorithm, expires_at=expires_at))
            return made[-1]
        made.reverse()
        return made[0]


@mutant("B11", "test_a_mac_has_the_contract_s_form")
class LongKeySetId(HonestBackend):
    def mac(self, data):
        return replace(super().mac(data), key_set="9" * 60)


@mutant("B11", "test_a_mac_has_the_contract_s_form")
class ShortTag(HonestBackend):
    def mac(self, data):
        mac = super().mac(data)
        return Mac(mac.key_set, mac.tag[:16])


@mutant("B11", "test_a_mac_holds_for_its_data_only")
class ComparesHalfTheTag(HonestBackend):
    def verify_mac(self, data, mac):
        if super().mac(data).tag[:16] != mac.tag[:16]:
            raise InvalidMac


@mutant("B11", "test_a_mac_holds_for_its_data_only")
class VerifiesByABoolean(HonestBackend):
    def verify_mac(self, data, mac):
        return super().mac(data) == mac


@mutant("B11", "test_a_mac_of_an_unknown_key_set_does_not_hold")
class KnowsEveryKeySet(HonestBackend):
    def verify_mac(self, data, mac):
        if mac.key_set == self.current_key_set():
            super().verify_mac(data, mac)


@mutant("B11", KEY_SET)
class NamesAnotherKeySet(_Pairs):
    def spoil(self, key):
        return replace(key, key_set="2")


@mutant("B11", KEY_SET)
class NamesNoKeySet(_Pairs):
    def spoil(self, key):
        return replace(key, key_set=None)


@mutant("B11", "test_a_cut_mac_does_not_hold", repaired=True)
class TakesTheEmptyTag(HonestBackend):
    def verify_mac(self, data, mac):
        if mac.tag:
            super().verify_mac(data, mac)


@mutant("B11", "test_a_cut_mac_does_not_hold", repaired=True)
class TakesCutTags(HonestBackend):
    def verify_mac(self, data, mac):
        whole = super().mac(data)
        same_key = whole.key_set == mac.key_set
        if not (same_key and len(mac.tag) > 3 and whole.tag.startswith(mac.tag)):
            raise InvalidMac


@mutant("B11", "test_a_wrapping_key_serves_its_own_algorithm_only", repaired=True)
class ServesEveryAlgorithm(HonestBackend):
    algorithms = (OAEP1, WrappingAlgorithm.RSAES_OAEP_SHA_256)

    def unwrap_material(self, private_key, algorithm, encrypted_material, **kwargs):
        try:
            return super().unwrap_material(private_key, algorithm, encrypted_material, **kwargs)
        except InvalidImportToken:
            issued_for = next(a for a in self.algorithms if a is not algorithm)
            secret = self.fetch(private_key, issued_for)
            material = RsaScheme(algorithm).decrypt(secret, encrypted_material, 0)
            key_spec = kwargs["key_spec"]
            data = sealed_material(self, material, key_spec)
            key = KeyRef(self.name, key_spec, SEALED, data)
            return ImportedKey(key, check_value(material), Exposure.HOST)


@mutant("B11", "test_an_unknown_setting_is_refused")
class TakesEverySetting(HonestBackend):
    @classmethod
    def from_settings(cls, settings):
        known = {name: value for name, value in settings.items() if name != "no_such_setting"}
        return super().from_settings(known)


# --- protection ------------------------------------------------------------------------------


@mutant("protection", "test_the_holder_of_the_pin_does_not_read_the_key", RESIDENT)
class LeavesKeysReadable(HonestBackend):
    """As an HSM that ignores CKA_SENSITIVE."""

    def keep(self, material, key_spec, object_id):
        self.readable[object_id] = material
        return super().keep(material, key_spec, object_id)


# --- B14 -------------------------------------------------------------------------------------


@mutant("B14", "test_a_token_for_the_longest_cmk_id_fits")
class BigReferences(_Pairs):
    def spoil(self, key):
        data = key.private_key.data + bytes(3700)
        return replace(key, private_key=replace(key.private_key, data=data))


@mutant("B14", DAMAGED)
class CallsDamageAnHsmError(HonestBackend):
    def unwrap_material(self, *args, **kwargs):
        try:
            return super().unwrap_material(*args, **kwargs)
        except InvalidImportToken:
            raise HsmError("CKR_WRAPPED_KEY_INVALID") from None


@mutant("B14", DAMAGED)
class CallsDamageInvalidKeyMaterial(HonestBackend):
    def unwrap_material(self, *args, **kwargs):
        try:
            return super().unwrap_material(*args, **kwargs)
        except InvalidImportToken:
            raise InvalidKeyMaterial from None


@mutant("B14", "test_another_instance_honours_import_tokens")
class KnowsItsOwnPairsOnly(HonestBackend):
    def __init__(self, settings):
        super().__init__(settings)
        self.mine = set()

    def generate_wrapping_key(self, spec, algorithm, *, expires_at):
        key = super().generate_wrapping_key(spec, algorithm, expires_at=expires_at)
        self.mine.add(key.private_key.data)
        return key

    def fetch(self, private_key, algorithm):
        if private_key.data not in self.mine:
            raise InvalidImportToken("not mine")
        return super().fetch(private_key, algorithm)


@mutant("B14", "test_another_instance_honours_import_tokens")
class HasAMacKeyOfItsOwn(HonestBackend):
    def __init__(self, settings):
        super().__init__(settings)
        self.own = secrets.token_bytes(16)

    def mac(self, data):
        return super().mac(self.own + data)

    def verify_mac(self, data, mac):
        return super().verify_mac(self.own + data, mac)


# --- keys that move to another key set -------------------------------------------------------


@mutant("moves", "test_a_key_moves_to_the_current_key_set")
class KeepsTheKeyWhereItIs(HonestBackend):
    def reseal(self, key, *, expected_check_value=None):
        return key


@mutant("moves", "test_a_key_that_moved_is_the_same_key")
class MovesAnotherKey(HonestBackend):
    def material(self, key):
        material = super().material(key)
        return material if self.key_set_of(key) == "1" else bytes(len(material))


@mutant("moves", "test_another_check_value_is_refused")
class DoesNotCompareCheckValues(HonestBackend):
    def reseal(self, key, *, expected_check_value=None):
        return super().reseal(key)


@mutant("moves", "test_a_changed_reference_does_not_move")
class LooksAtTheKeySetOnly(HonestBackend):
    def reseal(self, key, *, expected_check_value=None):
        try:
            return super().reseal(key, expected_check_value=expected_check_value)
        except KeyNotFound:
            return key


@mutant("moves", "test_a_resident_key_needs_no_key_set", repaired=True)
class NamesAKeySetForEachKey(HonestBackend):
    def key_set_of(self, key):
        return "1"


@mutant("moves", "test_keys_of_another_backend_do_not_move", repaired=True)
class MovesKeysOfOthers(HonestBackend):
    def reseal(self, key, *, expected_check_value=None):
        return replace(key, backend=self.name)


# --- what the kit itself relies on -----------------------------------------------------------


@mutant("counts", "test_a_wrapping_key_is_where_its_custody_says", RESIDENT)
class CountsAlwaysTheSame(HonestBackend):
    def count_objects(self):
        return 7


# --- key sets that move to another HSM -------------------------------------------------------

CLONED = "test_a_cloned_key_set_does_what_it_did"
RESTORED = "test_a_restored_key_set_does_what_it_did"
CHANGED = "test_a_changed_backup_restores_nothing_else"


def fingerprint_of(text):
    return hashlib.sha256(bytes.fromhex(text)).hexdigest()


def store_of(settings):
    return MemorySettings.from_mapping(settings).open_store()


@mutant("HSM", "test_nothing_is_exported_for_a_transport_key_that_was_not_confirmed")
class ExportsForAnyTransportKey(HonestBackend):
    @classmethod
    def export_keys(cls, settings, transport_key, fingerprint, *, so_pin_file=None):
        return super().export_keys(settings, transport_key, fingerprint_of(transport_key))


@mutant("HSM", "test_a_changed_transport_key_is_refused")
class TakesAChangedTransportKey(HonestBackend):
    @classmethod
    def export_keys(cls, settings, transport_key, fingerprint, *, so_pin_file=None):
        digits = "".join(each if each in string.hexdigits else "0" for each in transport_key)
        return super().export_keys(settings, digits, fingerprint_of(digits))


@mutant("HSM", "test_key_sets_that_were_not_confirmed_are_refused")
class ImportsWhatWasNotConfirmed(HonestBackend):
    @classmethod
    def import_keys(cls, settings, exported, fingerprint, *, so_pin_file=None):
        return super().import_keys(settings, exported, fingerprint_of(exported))


@mutant("HSM", "test_a_changed_file_of_key_sets_is_refused")
class ImportsAChangedFile(HonestBackend):
    """Without integrity, a changed file brings changed keys."""

    @classmethod
    def import_keys(cls, settings, exported, fingerprint, *, so_pin_file=None):
        try:
            return super().import_keys(settings, exported, fingerprint)
        except ConfigurationError:
            store_of(settings)["key-set-1"] = secrets.token_bytes(32)
            return cls.list_keys(settings)


@mutant("HSM", "test_a_file_for_another_transport_key_is_refused")
class KeepsEveryTransportKey(HonestBackend):
    @classmethod
    def make_transport_key(cls, settings, *, so_pin_file=None):
        store = store_of(settings)
        if "transport" not in store:
            return super().make_transport_key(settings)
        before = store["transport"]
        made = super().make_transport_key(settings)
        store["transport"] = before
        return made


@mutant("HSM", CLONED)
class ExportsTheCurrentSetAlone(HonestBackend):
    @classmethod
    def wrap_key_sets(cls, store, key):
        current = max(name for name in store if name.startswith("key-set-"))
        return super().wrap_key_sets({current: store[current]}, key)


class _BringsOtherKeys(HonestBackend):
    @classmethod
    def unwrap_key_sets(cls, store, wrapped, key):
        before = set(store)
        super().unwrap_key_sets(store, wrapped, key)
        for name in set(store) - before:
            store[name] = secrets.token_bytes(32)


@mutant("HSM", CLONED)
class ImportsOtherKeys(_BringsOtherKeys):
    pass


@mutant("HSM", RESTORED)
class RestoresOtherKeys(_BringsOtherKeys):
    pass


@mutant("HSM", "test_cloning_again_changes_nothing")
class ImportsTheSameSetAgain(HonestBackend):
    @classmethod
    def unwrap_key_sets(cls, store, wrapped, key):
        again = f"key-set-{len(store)}" if "key-set-1" in store else None
        super().unwrap_key_sets(store, wrapped, key)
        if again:
            store[again] = secrets.token_bytes(32)


class _ReplacesSets(HonestBackend):
    @classmethod
    def unwrap_key_sets(cls, store, wrapped, key):
        for name in [name for name in store if name.startswith("key-set-")]:
            del store[name]
        super().unwrap_key_sets(store, wrapped, key)


@mutant("HSM", "test_a_clone_leaves_another_key_set_of_the_same_id_alone")
class ImportsOverAnotherSet(_ReplacesSets):
    pass


@mutant("HSM", "test_a_restored_backup_leaves_another_key_set_of_the_same_id_alone")
class RestoresOverAnotherSet(_ReplacesSets):
    pass


@mutant("HSM", CHANGED)
class CountsHalfASet(HonestBackend):
    """Fails in the middle, and leaves what it had made by then."""

    @classmethod
    def unwrap_key_sets(cls, store, wrapped, key):
        try:
            super().unwrap_key_sets(store, wrapped, key)
        except HsmError:
            store["key-set-1"] = secrets.token_bytes(32)
            raise


@mutant("HSM", CHANGED)
class RestoresAChangedBackup(HonestBackend):
    @classmethod
    def restore_keys(cls, settings, backup, backup_key, *, so_pin_file=None):
        try:
            return super().restore_keys(settings, backup, backup_key)
        except (ConfigurationError, HsmError):
            store_of(settings)["key-set-1"] = secrets.token_bytes(32)
            return cls.list_keys(settings)


@mutant("HSM", "test_another_backup_key_restores_nothing")
class RestoresByAnyBackupKey(HonestBackend):
    @classmethod
    def back_up_keys(cls, settings, backup_key, *, so_pin_file=None):
        return super().back_up_keys(settings, bytes(32))

    @classmethod
    def restore_keys(cls, settings, backup, backup_key, *, so_pin_file=None):
        return super().restore_keys(settings, backup, bytes(32))


@mutant("HSM", "test_enough_shares_restore_a_backup_and_fewer_do_not")
class RestoresNothing(HonestBackend):
    """That too few shares open nothing is not a plug-in's work: hsmwrap combines them."""

    @classmethod
    def restore_keys(cls, settings, backup, backup_key, *, so_pin_file=None):
        return cls.list_keys(settings)


@mutant("HSM", "test_a_drill_opens_what_was_sealed_and_leaves_nothing")
class LeavesWhatItDrilled(HonestBackend):
    @classmethod
    def drill_keys(cls, settings, backup, backup_key, examine, *, so_pin_file=None):
        restored = cls.restore_keys(settings, backup, backup_key)
        examine(settings)
        return restored


@mutant("HSM", "test_a_drill_opens_what_was_sealed_and_leaves_nothing")
class DrillsWithoutLooking(HonestBackend):
    @classmethod
    def drill_keys(cls, settings, backup, backup_key, examine, *, so_pin_file=None):
        return super().drill_keys(settings, backup, backup_key, lambda _settings: None)


@mutant("HSM", "test_a_drill_that_finds_a_fault_says_so_and_leaves_nothing")
class HidesAFaultOfADrill(HonestBackend):
    @classmethod
    def drill_keys(cls, settings, backup, backup_key, examine, *, so_pin_file=None):
        def quietly(own):
            with suppress(HsmError):
                examine(own)

        return super().drill_keys(settings, backup, backup_key, quietly)


@mutant("HSM", "test_a_drill_refuses_an_hsm_in_use")
class DrillsWhereKeySetsAre(HonestBackend):
    @classmethod
    def drill_keys(cls, settings, backup, backup_key, examine, *, so_pin_file=None):
        own = cls.trial_settings(settings)
        return super().drill_keys(own, backup, backup_key, examine)
