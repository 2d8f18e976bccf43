"""Every kind of bad input and its own answer: the rows of docs/errors.md, each with attempts.

A row's ``attempts(scene)`` prepares what is good, and yields calls that have to fail. What it
prepares is imported once, so that only the one thing that the row names is wrong.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import product

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hsmwrap.backend import Exposure
from hsmwrap.catalog import KeySpec, ManagedHsm, Origin, WrappingAlgorithm
from hsmwrap.errors import (
    CombinationRefused,
    ExpiredImportToken,
    HsmwrapError,
    InvalidImportToken,
    InvalidKeyMaterial,
    InvalidParameter,
    MissingParameter,
    UnsupportedOrigin,
    UnsupportedProtectionLevel,
)
from hsmwrap.imports import ImportService, MemoryUsedTokens
from hsmwrap.policy import Deployment
from hsmwrap.sm2 import parse, recover_y
from hsmwrap.sm2.curve import P
from support.importing import (
    AES,
    HSM,
    MATERIAL,
    OAEP1,
    OAEP256,
    PKCS1,
    RSA_ALGORITHMS,
    SM2PKE,
    SOFTWARE,
    Desk,
    flip,
    wrap,
)

ROWS = []
OTHER_BACKENDS = ("software", "pkcs11", "resident", "other name", "other prefix")
SHA1, SHA256 = hashes.SHA1(), hashes.SHA256()


@dataclass(frozen=True)
class Scene:
    """The desk under test, and access to others."""

    desk: Desk
    desk_of: Callable[[str], Desk]
    name: str
    retired: Callable[[], tuple[Desk, object]]


@dataclass(frozen=True)
class Row:
    name: str
    error: type[HsmwrapError]
    attempts: Callable[[Scene], object]

    def markdown(self):
        error = self.error
        return f"| {self.name} | `{error.__name__}` | `{error.code}` | {error.http_status} |"


def bad(name, error):
    """Register attempts as the row ``name``."""

    def register(attempts):
        ROWS.append(Row(name, error, attempts))
        return attempts

    return register


def good(desk, algorithm, cmk=None):
    """Parameters, and a ciphertext that imports with them."""
    cmk = cmk or desk.cmk()
    parameters = desk.issue(algorithm, cmk)
    ciphertext = wrap(parameters, MATERIAL[cmk.key_spec])
    desk.bring_in(parameters, ciphertext, cmk)
    return parameters, ciphertext


def each(call, *arguments):
    return [partial(call, argument) for argument in arguments]


# --- asking for parameters ----------------------------------------------------------------------


@bad("unknown wrapping key spec or algorithm", InvalidParameter)
def _(scene):
    ask = partial(scene.desk.service().get_parameters_for_import, scene.desk.cmk())
    for unknown in ("RSA_4096", "rsa_2048", "EC_P256", " RSA_2048"):
        yield partial(ask, unknown, OAEP256)
    for unknown in ("RSAES_OAEP_SHA_512", "RSAES_OAEP", "SM2", "None"):
        yield partial(ask, "RSA_2048", unknown)


@bad("missing wrapping key spec or algorithm", MissingParameter)
def _(scene):
    ask = partial(scene.desk.service().get_parameters_for_import, scene.desk.cmk())
    for missing in ("", None):
        yield partial(ask, missing, OAEP256)
        yield partial(ask, "RSA_2048", missing)


@bad("key id that is empty or longer than 255 bytes", InvalidParameter)
def _(scene):
    yield from each(scene.desk.cmk, "", "x" * 256, "\N{CJK UNIFIED IDEOGRAPH-5BC6}" * 86)


@bad("argument of another type, in Python", InvalidParameter)
def _(scene):
    desk = scene.desk
    parameters, ciphertext = good(desk, OAEP1)
    bring_in = desk.service().import_key_material
    yield partial(bring_in, "key-1", ciphertext, parameters.import_token)
    yield partial(bring_in, desk.cmk(), ciphertext.hex(), parameters.import_token)
    yield partial(bring_in, desk.cmk(), ciphertext, bytearray(parameters.import_token))
    yield partial(bring_in, desk.cmk(), ciphertext, parameters.import_token, 1_900_000_000)
    yield from each(desk.cmk, 7, b"key-1")


@bad("origin other than EXTERNAL", UnsupportedOrigin)
def _(scene):
    desk = scene.desk
    parameters, ciphertext = good(desk, OAEP1)
    ours = desk.cmk(origin=Origin.ALIYUN_KMS)
    yield lambda: desk.issue(OAEP1, ours)
    yield lambda: desk.bring_in(parameters, ciphertext, ours)


@bad("algorithm that does not go with the spec", CombinationRefused)
def _(scene):
    ask = partial(scene.desk.service().get_parameters_for_import, scene.desk.cmk())
    yield partial(ask, "RSA_2048", "SM2PKE")
    for algorithm in RSA_ALGORITHMS:
        yield partial(ask, "EC_SM2", algorithm)


@bad("SM2PKE for a CMK of level SOFTWARE", CombinationRefused)
def _(scene):
    service = scene.desk_of("software").service()
    cmk = scene.desk.cmk(level=SOFTWARE)
    yield lambda: service.get_parameters_for_import(cmk, "EC_SM2", "SM2PKE")


@bad("SM2PKE where the managed HSM is not SCA-certified", CombinationRefused)
def _(scene):
    service = scene.desk.service(deployment=Deployment(ManagedHsm.FIPS))
    yield lambda: scene.desk.issue(SM2PKE, service=service)


@bad("RSAES_OAEP_SHA_1 on a dedicated KMS", CombinationRefused)
def _(scene):
    service = scene.desk.service(deployment=Deployment(dedicated=True))
    yield lambda: scene.desk.issue(OAEP1, service=service)


@bad("algorithm that the configuration refuses", CombinationRefused)
def _(scene):
    desk = scene.desk
    service = desk.service(refused_algorithms=frozenset({PKCS1}))
    parameters, ciphertext = good(desk, PKCS1)
    yield partial(desk.issue, PKCS1, service=service)
    yield partial(desk.bring_in, parameters, ciphertext, service=service)


@bad(
    "algorithm of a token that the compatibility table does not allow any more", CombinationRefused
)
def _(scene):
    desk = scene.desk
    for algorithm, deployment in (
        (SM2PKE, Deployment(ManagedHsm.FIPS)),
        (OAEP1, Deployment(dedicated=True)),
    ):
        parameters, ciphertext = good(desk, algorithm)
        yield partial(
            desk.bring_in, parameters, ciphertext, service=desk.service(deployment=deployment)
        )


@bad("material would pass through the host where `in_hsm` is demanded", CombinationRefused)
def _(scene):
    desk, service = scene.desk, scene.desk.service(required_exposure=Exposure.IN_HSM)
    for algorithm in (OAEP256, SM2PKE):
        parameters, ciphertext = good(desk, algorithm)
        yield partial(desk.issue, algorithm, service=service)
        yield partial(desk.bring_in, parameters, ciphertext, service=service)


@bad("level HSM in a region without a managed HSM", UnsupportedProtectionLevel)
def _(scene):
    service = scene.desk.service(deployment=Deployment(ManagedHsm.NONE))
    yield lambda: scene.desk.issue(OAEP1, service=service)


@bad("level that no backend is configured for", UnsupportedProtectionLevel)
def _(scene):
    parameters, ciphertext = good(scene.desk, OAEP1)
    service = ImportService({}, Deployment(), clock=scene.desk.clock)
    yield lambda: scene.desk.issue(OAEP1, service=service)
    yield lambda: scene.desk.bring_in(parameters, ciphertext, service=service)


# --- import tokens ------------------------------------------------------------------------------


def _with_tokens(desk, algorithm, change):
    parameters, ciphertext = good(desk, algorithm)
    for token in change(parameters.import_token):
        yield partial(desk.bring_in, replace(parameters, import_token=token), ciphertext)


@bad("token of another CMK", InvalidImportToken)
def _(scene):
    for algorithm in WrappingAlgorithm:
        parameters, ciphertext = good(scene.desk, algorithm)
        yield partial(scene.desk.bring_in, parameters, ciphertext, scene.desk.cmk("cmk-2"))


@bad("token of another key spec", InvalidImportToken)
def _(scene):
    """Also where the ciphertext fits the key spec that the CMK has now."""
    for spec, other in product(KeySpec, KeySpec):
        if spec != other:
            parameters, ciphertext = good(scene.desk, OAEP1, scene.desk.cmk(key_spec=spec))
            now = scene.desk.cmk(key_spec=other)
            yield partial(scene.desk.bring_in, parameters, ciphertext, now)
            yield partial(scene.desk.bring_in, parameters, wrap(parameters, MATERIAL[other]), now)


@bad("token of another protection level", InvalidImportToken)
def _(scene):
    desk = scene.desk_of("software")
    for level, other in ((SOFTWARE, HSM), (HSM, SOFTWARE)):
        parameters, ciphertext = good(desk, OAEP1, desk.cmk(level=level))
        yield partial(desk.bring_in, parameters, ciphertext, desk.cmk(level=other))


@bad("token of another backend", InvalidImportToken)
def _(scene):
    for name in set(OTHER_BACKENDS) - {scene.name}:
        parameters, ciphertext = good(scene.desk_of(name), OAEP1)
        yield partial(scene.desk.bring_in, parameters, ciphertext)


@bad("token changed by one bit anywhere", InvalidImportToken)
def _(scene):
    def changed(token):
        # A mac of SoftHSM takes longer: there the head, and a sample of the rest.
        bits = range(8 * len(token))
        sampled = bits if scene.name == "software" else [*bits[:200], *bits[200::17]]
        return [flip(token, bit) for bit in sampled]

    yield from _with_tokens(scene.desk, OAEP256, changed)


@bad("token that is cut, extended, of another version, or none at all", InvalidImportToken)
def _(scene):
    def damaged(token):
        cut = [token[:length] for length in range(0, len(token), 13)]
        return [*cut, token[:-1], token[1:], token + b"\0", token * 20, b"\x02" + token[1:]]

    yield from _with_tokens(scene.desk, SM2PKE, damaged)


@bad("token used before, where tokens are single-use", InvalidImportToken)
def _(scene):
    desk = scene.desk
    parameters, ciphertext = good(desk, OAEP1)
    service = desk.service(used_tokens=MemoryUsedTokens(desk.clock))
    desk.bring_in(parameters, ciphertext, service=service)
    yield partial(desk.bring_in, parameters, ciphertext, service=service)


@bad("token under which too many imports failed", InvalidImportToken)
def _(scene):
    desk = scene.desk
    parameters, ciphertext = good(desk, OAEP1)
    service = desk.service(max_failed_imports=1)
    with suppress(InvalidKeyMaterial):
        desk.bring_in(parameters, bytes(len(ciphertext)), service=service)
    yield partial(desk.bring_in, parameters, ciphertext, service=service)


@bad("token whose key set was retired", InvalidImportToken)
def _(scene):
    desk, retire = scene.retired()
    made = [good(desk, algorithm) for algorithm in (OAEP1, SM2PKE)]
    desk = retire()
    for parameters, ciphertext in made:
        yield partial(desk.bring_in, parameters, ciphertext)


@bad("expired token", ExpiredImportToken)
def _(scene):
    desk = scene.desk
    made = [good(desk, algorithm) for algorithm in WrappingAlgorithm]
    for parameters, ciphertext in made:
        desk.clock.now = parameters.expires_at
        yield partial(desk.bring_in, parameters, ciphertext)


@bad("expiry of the key material in the past", InvalidParameter)
def _(scene):
    parameters, ciphertext = good(scene.desk, OAEP1)
    bring_in = partial(scene.desk.bring_in, parameters, ciphertext)
    yield partial(bring_in, key_material_expire=scene.desk.clock.now)


@bad("expiry of the key material without a time zone", InvalidParameter)
def _(scene):
    parameters, ciphertext = good(scene.desk, OAEP1)
    naive = (scene.desk.clock.now + timedelta(days=1)).replace(tzinfo=None)
    yield partial(scene.desk.bring_in, parameters, ciphertext, key_material_expire=naive)


@bad("protection level, key spec or origin of a CMK that is unknown", InvalidParameter)
def _(scene):
    yield partial(scene.desk.cmk, level="hsm")
    yield partial(scene.desk.cmk, key_spec="AES_256")
    yield partial(scene.desk.cmk, origin="External")


# --- ciphertexts --------------------------------------------------------------------------------


def _with_ciphertexts(desk, algorithm, change):
    for key_spec in KeySpec:
        cmk = desk.cmk(key_spec=key_spec)
        parameters, ciphertext = good(desk, algorithm, cmk)
        for changed in change(ciphertext, parameters.public_key, cmk):
            yield partial(desk.bring_in, parameters, changed, cmk)


@bad("ciphertext of wrong length", InvalidKeyMaterial)
def _(scene):
    def resized(ciphertext, *_):
        return [b"", b"\0", ciphertext[:-1], ciphertext[1:], ciphertext + b"\0", b"\0" + ciphertext]

    for algorithm in WrappingAlgorithm:
        yield from _with_ciphertexts(scene.desk, algorithm, resized)


@bad("ciphertext for another wrapping key (PKCS#1 v1.5: on re-import)", InvalidKeyMaterial)
def _(scene):
    for algorithm in WrappingAlgorithm:
        foreign = good(scene.desk, algorithm)[1]
        yield from _on_re_import(scene.desk, algorithm, lambda *_, f=foreign: [f])


def _on_re_import(desk, algorithm, change):
    """Where the check value of the first material shows what PKCS#1 v1.5 cannot."""
    cmk = desk.cmk()
    parameters, ciphertext = good(desk, algorithm, cmk)
    first = desk.bring_in(parameters, ciphertext, cmk).imported
    known = replace(cmk, check_value=first.check_value) if algorithm is PKCS1 else cmk
    for changed in change(ciphertext, parameters.public_key, cmk):
        yield partial(desk.bring_in, parameters, changed, known)


def _tlv(tag, value):
    length = bytes([len(value)]) if len(value) < 128 else bytes([0x81, len(value)])
    return bytes([tag]) + length + value


def _sm2_layouts(x, y, c3, c2):
    """C1C3C2, the same without 04, and DER, of anything that has these lengths."""
    raw = b"\x04" + x.to_bytes(32) + y.to_bytes(32) + c3 + c2
    numbers = [_tlv(2, n.to_bytes(n.bit_length() // 8 + 1)) for n in (x, y)]
    return [raw, raw[1:], _tlv(0x30, b"".join([*numbers, _tlv(4, c3), _tlv(4, c2)]))]


def _with_sm2_parts(desk, change):
    for key_spec in KeySpec:
        cmk = desk.cmk(key_spec=key_spec)
        parameters, ciphertext = good(desk, SM2PKE, cmk)
        parts = parse(ciphertext, key_spec.material_length)
        parts = parts.x, parts.y, parts.c3, parts.c2
        for layout in _sm2_layouts(*parts):
            desk.bring_in(parameters, layout, cmk)
        for changed in change(*parts):
            for layout in _sm2_layouts(*changed):
                yield partial(desk.bring_in, parameters, layout, cmk)


@bad("SM2: C1 off the curve", InvalidKeyMaterial)
def _(scene):
    yield from _with_sm2_parts(
        scene.desk,
        lambda x, y, c3, c2: [(x ^ 1, y, c3, c2), (x, y ^ 1, c3, c2), (y, x, c3, c2)],
    )


@bad("SM2: C1 at infinity", InvalidKeyMaterial)
def _(scene):
    yield from _with_sm2_parts(scene.desk, lambda x, y, c3, c2: [(0, 0, c3, c2)])
    parameters, ciphertext = good(scene.desk, SM2PKE)
    parts = parse(ciphertext, AES.material_length)
    # Its own encoding is one byte, SEC 1, 2.3.3.
    yield partial(scene.desk.bring_in, parameters, b"\0" + parts.c3 + parts.c2)


@bad("SM2: C1 with x ≥ p or y ≥ p", InvalidKeyMaterial)
def _(scene):
    small = next(x for x in range(1, 100) if recover_y(x) is not None)
    yield from _with_sm2_parts(
        scene.desk,
        lambda x, y, c3, c2: [
            (small + P, recover_y(small), c3, c2),
            (P, y, c3, c2),
            (x, P, c3, c2),
            (2**256 - 1, 2**256 - 1, c3, c2),
        ],
    )


@bad("SM2: changed C2", InvalidKeyMaterial)
def _(scene):
    yield from _with_sm2_parts(
        scene.desk,
        lambda x, y, c3, c2: [(x, y, c3, flip(c2, bit)) for bit in range(0, 8 * len(c2), 11)],
    )


@bad("SM2: changed C3", InvalidKeyMaterial)
def _(scene):
    yield from _with_sm2_parts(
        scene.desk, lambda x, y, c3, c2: [(x, y, flip(c3, bit), c2) for bit in range(0, 256, 11)]
    )


def _encrypt(public_key, how, message):
    return load_der_public_key(public_key).encrypt(message, how)


def _oaep(digest, mgf=None, label=None):
    return padding.OAEP(padding.MGF1(mgf or digest), digest, label)


@bad("wrong padding (OAEP)", InvalidKeyMaterial)
def _(scene):
    for algorithm, right, wrong in ((OAEP1, SHA1, SHA256), (OAEP256, SHA256, SHA1)):
        ways = [_oaep(wrong), _oaep(right, wrong), _oaep(wrong, right), _oaep(right, label=b"x")]
        ways.append(padding.PKCS1v15())

        def padded(_ciphertext, public_key, cmk, ways=ways):
            return [_encrypt(public_key, way, MATERIAL[cmk.key_spec]) for way in ways]

        yield from _with_ciphertexts(scene.desk, algorithm, padded)
        yield from _with_ciphertexts(scene.desk, algorithm, changed_rsa)


def changed_rsa(ciphertext, public_key, _cmk):
    """Changed bits, and numbers that honest clients never send."""
    modulus = load_der_public_key(public_key).public_numbers().n
    numbers = [0, 1, modulus - 1, modulus, modulus + 1, 2**2048 - 1]
    return [flip(ciphertext, bit) for bit in range(0, 2048, 211)] + [
        number.to_bytes(256) for number in numbers
    ]


def wrong_pkcs1(public_key, material):
    """Encryptions of what EME-PKCS1-v1_5 (RFC 8017, 7.2.2) has to refuse, material at its end."""
    fill = b"\xa5" * (253 - len(material))
    blocks = {
        "first byte": b"\1\2" + fill + b"\0" + material,
        "block type 1": b"\0\1" + fill + b"\0" + material,
        "block type 0": b"\0\0" + fill + b"\0" + material,
        "short filling": b"\0\2" + fill[:7] + b"\0" + fill[8:] + b"\0" + material,
        "no separator": b"\0\2" + fill + b"\xa5" * (1 + len(material)),
    }
    numbers = load_der_public_key(public_key).public_numbers()
    return [
        pow(int.from_bytes(block), numbers.e, numbers.n).to_bytes(256) for block in blocks.values()
    ]


@bad("wrong padding (PKCS#1 v1.5, on re-import; else see below)", InvalidKeyMaterial)
def _(scene):
    def padded(ciphertext, public_key, cmk):
        oaep = _encrypt(public_key, _oaep(SHA1), MATERIAL[cmk.key_spec])
        wrong = wrong_pkcs1(public_key, MATERIAL[cmk.key_spec])
        return [oaep, *wrong, *changed_rsa(ciphertext, public_key, cmk)]

    yield from _on_re_import(scene.desk, PKCS1, padded)


@bad("key material of wrong length", InvalidKeyMaterial)
def _(scene):
    for algorithm, key_spec in product(WrappingAlgorithm, KeySpec):
        cmk = scene.desk.cmk(key_spec=key_spec)
        parameters, _ = good(scene.desk, algorithm, cmk)
        for length in {1, 15, 16, 17, 24, 31, 32, 33, 64} - {key_spec.material_length}:
            ciphertext = wrap(parameters, bytes(length))
            yield partial(scene.desk.bring_in, parameters, ciphertext, cmk)


@bad("other key material on re-import", InvalidKeyMaterial)
def _(scene):
    for algorithm, key_spec in product(WrappingAlgorithm, KeySpec):
        cmk = scene.desk.cmk(key_spec=key_spec)
        parameters, ciphertext = good(scene.desk, algorithm, cmk)
        first = scene.desk.bring_in(parameters, ciphertext, cmk).imported
        known = replace(cmk, check_value=first.check_value)
        for bit in (0, 8 * key_spec.material_length - 1):
            other = wrap(parameters, flip(MATERIAL[key_spec], bit))
            yield partial(scene.desk.bring_in, parameters, other, known)
