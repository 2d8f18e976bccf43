"""An attacker with the user PIN, and what they can reach: sealed blobs, ciphertexts, objects.

An attack is a function that returns the secret or raises what the HSM token answers. Each runs
against what the backend made, and against a naive key, where it has to succeed: otherwise the
test could not fail.
"""

import ctypes
import functools
import hmac
import secrets
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap_with_padding
from pkcs11 import KDF, _pkcs11
from pkcs11.constants import Attribute, MechanismFlag, ObjectClass
from pkcs11.exceptions import PKCS11Error
from pkcs11.mechanisms import MGF, KeyType, Mechanism
from pkcs11.util.ec import encode_named_curve_parameters

from hsmwrap import registry
from hsmwrap.backend import Custody, Mac
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.customer import encrypt_key_material
from hsmwrap.guard import plugin_ref
from hsmwrap.pkcs11.binding.host import ModuleHost
from hsmwrap.pkcs11.binding.templates import USES, HsmAttributeMapper, for_unwrap
from hsmwrap.pkcs11.keysets.keys import ROLES, UNWRAPPED, Role
from hsmwrap.pkcs11.keysets.movability import ONLY_UNDER_TRUSTED
from hsmwrap.pkcs11.token.pin import Pin
from hsmwrap.pkcs11.wrapping.custody import parse_ref
from support.pkcs11.objects import handles

PKCS1, OAEP1, OAEP256, SM2 = (
    WrappingAlgorithm.RSAES_PKCS1_V1_5,
    WrappingAlgorithm.RSAES_OAEP_SHA_1,
    WrappingAlgorithm.RSAES_OAEP_SHA_256,
    WrappingAlgorithm.SM2PKE,
)
AES, SM4 = KeySpec
SEALED, RESIDENT = "sealed", "resident"
KNOWN = bytes(range(32))
"""The value of every planted key."""
KWP = Mechanism.AES_KEY_WRAP_PAD
SHA1_OAEP = (Mechanism.SHA_1, MGF.SHA1, None)
# Return codes that python-pkcs11 has no exception for (PKCS#11 v2.40, header file).
ACTION_PROHIBITED, KEY_FUNCTION_NOT_PERMITTED = "0x1b", "0x68"
_EVERY_USE = (
    _pkcs11.EncryptMixin,
    _pkcs11.DecryptMixin,
    _pkcs11.SignMixin,
    _pkcs11.WrapMixin,
    _pkcs11.UnwrapMixin,
    _pkcs11.DeriveMixin,
)
_WRAPPING_ROLE = {PKCS1: Role.WRAPPING_UNWRAP, OAEP256: Role.WRAPPING_DECRYPT}
_MATERIAL_ROLE = {AES: Role.MATERIAL_AES, SM4: Role.MATERIAL_SM4}


def _data(key):
    """The sealed blob without its head, or the id of the object."""
    return key.data if key.custody is Custody.HSM_INTERNAL else key.data[3:]


def answered(error):
    """What tells one return code from another: an exception class, or the bare code."""
    bare = type(error) is PKCS11Error
    return str(error).removeprefix("Unmapped error code ") if bare else type(error)


def force(key):
    """The same object with every operation; python-pkcs11 hides those that it does not allow."""
    kind = _pkcs11._CLASS_MAP[key[Attribute.CLASS]]
    return type("Forced", (kind, *_EVERY_USE, _pkcs11.Object), {})(key.wrapper)


def _named(attributes):
    return {Attribute[name]: value for name, value in attributes.items()}


def readable(object_class, key_type, **uses):
    """The template of an attacker who wants to read the key."""
    return {
        Attribute.CLASS: object_class,
        Attribute.KEY_TYPE: key_type,
        Attribute.TOKEN: False,
        Attribute.PRIVATE: True,
        Attribute.SENSITIVE: False,
        Attribute.EXTRACTABLE: True,
        **uses,
    }


class _Mapper(HsmAttributeMapper):
    """Also accepts labels that are not text."""

    def __init__(self):
        super().__init__()
        decode = self.attribute_types[Attribute.LABEL][1]
        self.register_handler(
            Attribute.LABEL, lambda v: v if isinstance(v, bytes) else v.encode(), decode
        )


class Attacker:
    """Has the user PIN and a session."""

    def __init__(self, softhsm):
        self._host = ModuleHost.acquire(softhsm.module)
        self._module = softhsm.module
        with self._host.inside(5) as (module, _):
            token = module.get_token(token_label=softhsm.environment["HSMWRAP_TOKEN_LABEL"])
            self.session = token.open(rw=True, attribute_mapper=_Mapper())
            pin = Path(softhsm.environment["HSMWRAP_PIN_FILE"]).read_text().strip()
            module.log_in(self.session, Pin(pin))

    def close(self):
        self.session.close()
        self._host.release()

    def clean_up(self):
        """Destroy the session objects; a backend at rest has none."""
        for key in self.session.get_objects({Attribute.TOKEN: False}):
            key.destroy()

    def objects(self, attributes=None):
        return [force(key) for key in self.session.get_objects(attributes or {})]

    def own_keys(self, prefix):
        """All keys of a backend's key sets."""
        start = f"{prefix}:".encode()
        return [key for key in self.objects() if key[Attribute.ID].startswith(start)]

    def ours(self, **attributes):
        """The one object with these attributes."""
        (found,) = self.objects(_named(attributes))
        return found

    @contextmanager
    def refused(self, answer):
        """The attack must end with this return code and leave no object."""
        before = len(self.handles())
        with pytest.raises(PKCS11Error) as caught:
            yield
        assert answered(caught.value) == answer
        assert len(self.handles()) == before

    def handles(self):
        return handles(self.session, self._module)

    def known_key(self, key_type=KeyType.AES, length=32, **attributes):
        """A key whose value the attacker chose; returns the object and the value."""
        value = secrets.token_bytes(length)
        uses = (Attribute.ENCRYPT, Attribute.DECRYPT, Attribute.WRAP, Attribute.UNWRAP)
        template = {
            Attribute.CLASS: ObjectClass.SECRET_KEY,
            Attribute.KEY_TYPE: key_type,
            Attribute.TOKEN: False,
            **dict.fromkeys(uses, True),
            **_named(attributes),
            Attribute.VALUE: value,
        }
        return force(self.session.create_object(template)), value

    def naive_key(self, **attributes):
        """A key as generated without an attack in mind."""
        every = MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT
        every |= MechanismFlag.WRAP | MechanismFlag.UNWRAP | MechanismFlag.DERIVE
        return force(
            self.session.generate_key(
                KeyType.AES, 256, capabilities=every, template=_named(attributes)
            )
        )

    def naive_pair(self, **private):
        uses = MechanismFlag.DECRYPT | MechanismFlag.UNWRAP | MechanismFlag.WRAP
        return tuple(
            force(key)
            for key in self.session.generate_keypair(
                KeyType.RSA, 2048, capabilities=uses, private_template=_named(private)
            )
        )

    def plant_known(self, prefix, role, number, **attributes):
        """A key with the backend's names, and a value that the attacker knows."""
        kind = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: KeyType.AES}
        uses = (Attribute.WRAP, Attribute.UNWRAP)
        if role is Role.MAC:
            kind[Attribute.KEY_TYPE] = KeyType.GENERIC_SECRET
            uses = (Attribute.SIGN,)
        template = {
            **kind,
            Attribute.TOKEN: True,
            Attribute.PRIVATE: True,
            Attribute.SENSITIVE: True,
            Attribute.EXTRACTABLE: False,
            Attribute.ID: f"{prefix}:{role}:{number}".encode(),
            Attribute.LABEL: f"{prefix}:{role}:{number}",
            **{use: use in uses for use in USES},
            **_named(attributes),
            Attribute.VALUE: KNOWN,
        }
        return force(self.session.create_object(template))

    def planted(self, make, prefix, role, number):
        """A key with the backend's names and uses, and the value that the attacker knows.

        ``make`` is one of :data:`WAYS_TO_A_KNOWN_VALUE`.
        """
        mac = role is Role.MAC
        uses = {Attribute.SIGN} if mac else {Attribute.WRAP, Attribute.UNWRAP}
        template = {
            Attribute.CLASS: ObjectClass.SECRET_KEY,
            Attribute.KEY_TYPE: KeyType.GENERIC_SECRET if mac else KeyType.AES,
            Attribute.TOKEN: True,
            Attribute.PRIVATE: True,
            Attribute.SENSITIVE: True,
            Attribute.EXTRACTABLE: False,
            Attribute.ID: f"{prefix}:{role}:{number}".encode(),
            Attribute.LABEL: f"{prefix}:{role}:{number}",
            **{use: use in uses for use in USES},
        }
        key, value = make(self, template)
        return force(key), value

    def base_key(self, key_type=KeyType.AES, bits=256):
        """A key that derives, and encrypts what it derives from; its value is not known."""
        uses = MechanismFlag.ENCRYPT | MechanismFlag.DERIVE
        hidden = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False}
        return force(self.session.generate_key(key_type, bits, capabilities=uses, template=hidden))

    @staticmethod
    def known_mac(prefix, number, data, value=KNOWN):
        """A MAC by what :meth:`plant_known` or :meth:`planted` planted."""
        return Mac(str(number), hmac.digest(value, data, "sha256"))

    def plant_lookalike(self, prefix, role, number, label=None):
        """A key with the backend's names and attributes, but for CKA_UNWRAP_TEMPLATE."""
        mac = role is Role.MAC
        return force(
            self.session.generate_key(
                KeyType.GENERIC_SECRET if mac else KeyType.AES,
                256,
                id=f"{prefix}:{role}:{number}".encode(),
                label=label or f"{prefix}:{role}:{number}",
                store=True,
                capabilities=MechanismFlag.SIGN
                if mac
                else MechanismFlag.WRAP | MechanismFlag.UNWRAP,
                template={Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False},
            )
        )

    def create_rsa(self, private):
        """A private key that the attacker knows, as an extractable object."""
        n = private.private_numbers()
        values = {
            Attribute.MODULUS: n.public_numbers.n,
            Attribute.PUBLIC_EXPONENT: n.public_numbers.e,
            Attribute.PRIVATE_EXPONENT: n.d,
            Attribute.PRIME_1: n.p,
            Attribute.PRIME_2: n.q,
            Attribute.EXPONENT_1: n.dmp1,
            Attribute.EXPONENT_2: n.dmq1,
            Attribute.COEFFICIENT: n.iqmp,
        }
        template = readable(ObjectClass.PRIVATE_KEY, KeyType.RSA) | {
            name: value.to_bytes((value.bit_length() + 7) // 8, "big")
            for name, value in values.items()
        }
        return self.session.create_object(template)

    @staticmethod
    def unwrap(key, blob, template, mechanism=KWP, parameter=None):
        """C_UnwrapKey with exactly this template."""
        return force(
            key.unwrap_key(
                key_data=blob,
                mechanism=mechanism,
                mechanism_param=parameter,
                **for_unwrap(template),
            )
        )

    def stolen(self, target):
        """The value of a key, by wrapping it with a known key and unwrapping in Python."""
        own, value = self.known_key()
        try:
            return aes_key_unwrap_with_padding(value, own.wrap_key(target, mechanism=KWP))
        finally:
            own.destroy()


@dataclass
class Scene:
    """A backend that did its work, and what an attacker finds afterwards."""

    backend: object
    attacker: Attacker
    prefix: str
    trusted: bool
    custody: str
    wrapping: dict
    ciphertexts: dict
    imported: dict
    materials: dict

    def kek(self, role, number=1):
        return self.attacker.ours(LABEL=f"{self.prefix}:{role}:{number}")

    def becomes(self, role):
        """What the backend unwraps a blob of this role into."""
        moves = self.trusted and role in _MATERIAL_ROLE.values()
        return UNWRAPPED[role] | (ONLY_UNDER_TRUSTED if moves else {})

    def own_keys(self):
        """The backend's own keys."""
        found = self.attacker.own_keys(self.prefix)
        assert len(found) == len(ROLES)
        return found

    def blob(self, role):
        """A sealed blob that this role's key-encryption key opens."""
        for algorithm, of in _WRAPPING_ROLE.items():
            if of is role:
                return parse_ref(plugin_ref(self.wrapping[algorithm].private_key))[2]
        spec = next(spec for spec, of in _MATERIAL_ROLE.items() if of is role)
        return _data(self.imported[spec].key)

    def wrapping_key(self, algorithm):
        """The private wrapping key: the resident object, or unsealed as the backend does it."""
        role, number, data = parse_ref(plugin_ref(self.wrapping[algorithm].private_key))
        if self.wrapping[algorithm].private_key.custody is Custody.HSM_INTERNAL:
            return self.attacker.ours(CLASS=ObjectClass.PRIVATE_KEY, ID=data)
        return self.attacker.unwrap(self.kek(role, number), data, self.becomes(role))

    def imported_key(self, spec):
        """The imported key: the object, or unsealed as the backend does it."""
        data = _data(self.imported[spec].key)
        if self.imported[spec].key.custody is Custody.HSM_INTERNAL:
            return self.attacker.ours(CLASS=ObjectClass.SECRET_KEY, ID=data)
        role = _MATERIAL_ROLE[spec]
        return self.attacker.unwrap(self.kek(role), data, self.becomes(role))

    @contextmanager
    def everything(self):
        """Every object that the backend keeps, and unsealed copies of what it sealed."""
        usable = [self.wrapping_key(a) for a in self.wrapping]
        usable += [self.imported_key(spec) for spec in self.imported]
        try:
            yield usable + self.own_keys()
        finally:
            for key in usable:
                if not key[Attribute.TOKEN]:
                    key.destroy()


def _derived(base, template, mechanism, parameter):
    return base.derive_key(
        template[Attribute.KEY_TYPE],
        256,
        mechanism=mechanism,
        mechanism_param=parameter,
        store=True,
        template=template,
    )


def _created(attacker, template):
    value = secrets.token_bytes(32)
    return attacker.session.create_object({**template, Attribute.VALUE: value}), value


def _copied(attacker, template):
    key, value = _created(attacker, {**template, Attribute.TOKEN: False})
    return key.copy({Attribute.TOKEN: True}), value


def _unwrapped(attacker, template):
    known, value = attacker.known_key(EXTRACTABLE=True)
    kek = attacker.naive_key()
    blob = kek.wrap_key(known, mechanism=KWP)
    return kek.unwrap_key(key_data=blob, mechanism=KWP, **for_unwrap(template)), value


class _StringData(ctypes.Structure):
    """CK_KEY_DERIVATION_STRING_DATA (PKCS#11 v2.40, 2.42.3), which python-pkcs11 packs for AES."""

    _fields_ = (("data", ctypes.c_char_p), ("length", ctypes.c_ulong))


def _by_ecb(base, encrypt, derive, template):
    data = secrets.token_bytes(32)
    value = bytes(base.encrypt(data, mechanism=encrypt))
    parameter = data if encrypt is Mechanism.AES_ECB else bytes(_StringData(data, len(data)))
    return _derived(base, template, derive, parameter), value


def _by_cbc(base, encrypt, derive, template):
    aes = encrypt is Mechanism.AES_CBC
    data, iv = secrets.token_bytes(32), secrets.token_bytes(16 if aes else 8)
    value = bytes(base.encrypt(data, mechanism=encrypt, mechanism_param=iv))
    parameter = (iv, data) if aes else iv + bytes(_StringData(data, len(data)))
    return _derived(base, template, derive, parameter), value


def _by_aes_ecb(attacker, template):
    base = attacker.base_key()
    return _by_ecb(base, Mechanism.AES_ECB, Mechanism.AES_ECB_ENCRYPT_DATA, template)


def _by_aes_cbc(attacker, template):
    base = attacker.base_key()
    return _by_cbc(base, Mechanism.AES_CBC, Mechanism.AES_CBC_ENCRYPT_DATA, template)


def _by_des3_ecb(attacker, template):
    base = attacker.base_key(KeyType.DES3, None)
    return _by_ecb(base, Mechanism.DES3_ECB, Mechanism.DES3_ECB_ENCRYPT_DATA, template)


def _by_des3_cbc(attacker, template):
    base = attacker.base_key(KeyType.DES3, None)
    return _by_cbc(base, Mechanism.DES3_CBC, Mechanism.DES3_CBC_ENCRYPT_DATA, template)


def _by_dh(attacker, template):
    domain = attacker.session.create_domain_parameters(
        KeyType.DH,
        {Attribute.PRIME: _DH_PRIME.to_bytes(128), Attribute.BASE: b"\x02"},
        local=True,
    )
    public, private = domain.generate_keypair(capabilities=MechanismFlag.DERIVE)
    mine = secrets.randbits(512)
    theirs = int.from_bytes(public[Attribute.VALUE])
    # PKCS#11 v2.40, 2.4.7: what is too much is cut off at the front.
    value = pow(theirs, mine, _DH_PRIME).to_bytes(128)[-32:]
    point = pow(2, mine, _DH_PRIME).to_bytes(128)
    return _derived(force(private), template, Mechanism.DH_PKCS_DERIVE, point), value


def _by_ecdh(attacker, template):
    curve = attacker.session.create_domain_parameters(
        KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}, local=True
    )
    public, private = curve.generate_keypair(capabilities=MechanismFlag.DERIVE)
    mine = ec.generate_private_key(ec.SECP256R1())
    theirs = public[Attribute.EC_POINT][2:]  # DER OCTET STRING
    value = mine.exchange(
        ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), theirs)
    )
    point = mine.public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )
    parameter = (KDF.NULL, None, point)
    return _derived(force(private), template, Mechanism.ECDH1_DERIVE, parameter), value


WAYS_TO_A_KNOWN_VALUE = {
    "created": _created,
    "copied": _copied,
    "unwrapped": _unwrapped,
    "AES_ECB_ENCRYPT_DATA": _by_aes_ecb,
    "AES_CBC_ENCRYPT_DATA": _by_aes_cbc,
    "DES3_ECB_ENCRYPT_DATA": _by_des3_ecb,
    "DES3_CBC_ENCRYPT_DATA": _by_des3_cbc,
    "DH_PKCS_DERIVE": _by_dh,
    "ECDH1_DERIVE": _by_ecdh,
}
"""Each makes a token object of a template and says its value; derivations by their mechanism."""

# RFC 2409, 6.2: the second Oakley group.
_DH_PRIME = int(
    "FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74"
    "020BBEA63B139B22514A08798E3404DDEF9519B3CD3A431B302B0A6DF25F1437"
    "4FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED"
    "EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE65381FFFFFFFFFFFFFFFF",
    16,
)


class Scenes:
    """Scenes by trust and custody, set up once per test module."""

    def __init__(self, softhsm):
        self.softhsm = softhsm
        self.attacker = Attacker(softhsm)
        self._backends = []
        self.get = functools.cache(self._make)

    def open(self, prefix, *, trusted, custody=SEALED):
        """A backend; its keys are made at the first time."""
        keeps = {"wrapping_custody": "HsmInternal", "material_custody": "HsmInternal"}
        more = keeps if custody == RESIDENT else {}
        settings = self.softhsm.settings(prefix, trusted=trusted, **more)
        self._backends.append(registry.open_backend("pkcs11", settings))
        return self._backends[-1]

    def close(self):
        self.attacker.close()
        for backend in self._backends:
            backend.close()

    def _make(self, trusted, custody):
        prefix = "attack-trusted" if trusted else "attack-plain"
        backend = self.open(prefix, trusted=trusted, custody=custody)
        scene = Scene(backend, self.attacker, prefix, trusted, custody, {}, {}, {}, {})
        for spec in KeySpec:
            scene.materials[spec] = secrets.token_bytes(spec.material_length)
        for algorithm in (PKCS1, OAEP1, OAEP256, SM2):
            key = issue(backend, algorithm)
            scene.wrapping[algorithm] = key
            scene.ciphertexts[algorithm] = encrypt_key_material(
                algorithm, key.public_key, scene.materials[AES]
            )
        for spec, material in scene.materials.items():
            scene.imported[spec] = bring(backend, scene.wrapping[OAEP1], material, spec)
        return scene


def issue(backend, algorithm):
    spec = WrappingKeySpec.EC_SM2 if algorithm is SM2 else WrappingKeySpec.RSA_2048
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    return backend.generate_wrapping_key(spec, algorithm, expires_at=tomorrow)


def bring(backend, wrapping_key, material, spec=AES):
    """Import material as a client does."""
    ciphertext = encrypt_key_material(wrapping_key.algorithm, wrapping_key.public_key, material)
    return backend.unwrap_material(
        wrapping_key.private_key, wrapping_key.algorithm, ciphertext, key_spec=spec
    )
