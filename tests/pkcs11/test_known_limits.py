"""What the holder of the PIN can do on SoftHSM2 all the same: each limit of SECURITY.md, shown."""

import hashlib
import re
import secrets
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap_with_padding
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pkcs11 import GCMParams
from pkcs11.constants import Attribute, ObjectClass
from pkcs11.exceptions import GeneralError
from pkcs11.mechanisms import KeyType, Mechanism
from support.pkcs11.attacker import (
    AES,
    KWP,
    OAEP1,
    OAEP256,
    PKCS1,
    RESIDENT,
    SEALED,
    SHA1_OAEP,
    SM2,
    Scenes,
    bring,
    issue,
    readable,
)

from hsmwrap import oaep, tokens
from hsmwrap.backend import Custody, PrivateKeyRef
from hsmwrap.catalog import Origin, ProtectionLevel, WrappingKeySpec
from hsmwrap.customer import encrypt_key_material
from hsmwrap.guard import bound, plugin_ref
from hsmwrap.imports import Cmk, ImportService
from hsmwrap.pkcs11.keysets.keys import ROLES, UNWRAPPED, Role
from hsmwrap.pkcs11.keysets.movability import ONLY_UNDER_TRUSTED
from hsmwrap.pkcs11.wrapping import material as material_module
from hsmwrap.pkcs11.wrapping.custody import intermediate
from hsmwrap.pkcs11.wrapping.sm2 import derive_x
from hsmwrap.policy import Deployment
from hsmwrap.sm2 import decrypt_with_x2, parse

SECRET = ObjectClass.SECRET_KEY
READABLE_AES = readable(SECRET, KeyType.AES)
SECURITY = Path(__file__).parents[2] / "SECURITY.md"


@pytest.fixture(scope="module")
def scenes(softhsm):
    made = Scenes(softhsm)
    yield made
    made.close()


@pytest.fixture
def attacker(scenes):
    yield scenes.attacker
    scenes.attacker.clean_up()


@pytest.fixture
def prefix():
    return f"limits-{secrets.token_hex(4)}"


def test_security_md_lists_these_limits_and_no_others():
    text = SECURITY.read_text(encoding="utf-8")
    listed = re.findall(r"^### `([a-z0-9-]+)`$", text.split("## Known limits")[1], re.MULTILINE)
    start = "test_known_limit_"
    shown = [name.removeprefix(start).replace("_", "-") for name in globals() if start in name[:17]]
    assert listed == shown


def test_known_limit_sealed_wrapping_keys_unwrap_into_readable_objects(scenes, attacker):
    scene = scenes.get(True, SEALED)
    for algorithm, how in ((OAEP1, (Mechanism.RSA_PKCS_OAEP, SHA1_OAEP)), (PKCS1, PKCS1_HOW)):
        private, ciphertext = scene.wrapping_key(algorithm), scene.ciphertexts[algorithm]
        read = attacker.unwrap(private, ciphertext, READABLE_AES, *how)
        assert read[Attribute.VALUE] == scene.materials[AES]


PKCS1_HOW = (Mechanism.RSA_PKCS, None)


@pytest.mark.parametrize("custody", [SEALED, RESIDENT])
def test_known_limit_where_exposure_is_host_the_pin_decrypts(scenes, attacker, custody):
    scene = scenes.get(True, custody)
    raw = scene.wrapping_key(OAEP256).decrypt(
        scene.ciphertexts[OAEP256], mechanism=Mechanism.RSA_X_509
    )
    assert oaep.decode(raw.rjust(256, b"\0"), "sha256") == scene.materials[AES]
    ciphertext = parse(scene.ciphertexts[SM2], 32)
    x2 = derive_x(scene.wrapping_key(SM2), ciphertext.c1)
    assert decrypt_with_x2(ciphertext, x2) == scene.materials[AES]


def test_known_limit_sealed_blobs_open_until_their_key_set_is_retired(scenes, attacker, prefix):
    backend = scenes.open(prefix, trusted=True)
    expired = backend.generate_wrapping_key(
        WrappingKeySpec.RSA_2048, OAEP1, expires_at=datetime.now(UTC) - timedelta(days=1)
    )
    deleted = bring(backend, issue(backend, OAEP1), secrets.token_bytes(32)).key
    backend.destroy_key(deleted)
    for role, blob in (
        (Role.WRAPPING_UNWRAP, plugin_ref(expired.private_key).data[4:]),
        (Role.MATERIAL_AES, deleted.data[3:]),
    ):
        moves = ONLY_UNDER_TRUSTED if role is Role.MATERIAL_AES else {}
        kek = attacker.ours(LABEL=f"{prefix}:{role}:1")
        attacker.unwrap(kek, blob, UNWRAPPED[role] | moves)


def test_known_limit_the_pin_uses_imported_keys(scenes, attacker):
    for custody in (SEALED, RESIDENT):
        scene = scenes.get(True, custody)
        message = scene.backend.encrypt(scene.imported[AES].key, b"message", b"aad")
        opened = scene.imported_key(AES).decrypt(
            message[13:],
            mechanism=Mechanism.AES_GCM,
            mechanism_param=GCMParams(message[1:13], b"aad", 128),
        )
        assert opened == b"message"


def test_known_limit_guesses_of_key_material_can_be_confirmed(scenes, attacker):
    """By digest, and because AES key wrap is deterministic."""
    scene = scenes.get(True, SEALED)
    guess = scene.materials[AES]
    digest = attacker.session.digest(scene.imported_key(AES), mechanism=Mechanism.SHA256)
    assert digest == hashlib.sha256(guess).digest()
    idle = dict.fromkeys(
        (Attribute.WRAP, Attribute.UNWRAP, Attribute.SIGN, Attribute.VERIFY), False
    )
    own = attacker.session.create_object(READABLE_AES | idle | {Attribute.VALUE: guess})
    blob = scene.kek(Role.MATERIAL_AES).wrap_key(own, mechanism=KWP)
    assert blob == scene.blob(Role.MATERIAL_AES)


def test_known_limit_the_pin_can_substitute_keys(scenes, attacker, prefix):
    """An authentic import token whose wrapping key the attacker knows."""
    backend = scenes.open(prefix, trusted=True)
    known = rsa.generate_private_key(65537, 2048)
    kek = attacker.ours(LABEL=f"{prefix}:{Role.WRAPPING_UNWRAP}:1")
    blob = kek.wrap_key(attacker.create_rsa(known), mechanism=KWP)
    public = known.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    cmk = Cmk("cmk", AES, ProtectionLevel.HSM, Origin.EXTERNAL)
    claims = tokens.ImportTokenClaims(
        token_id=secrets.token_bytes(tokens.TOKEN_ID_LENGTH),
        cmk_id=cmk.key_id,
        key_spec=cmk.key_spec,
        spec=WrappingKeySpec.RSA_2048,
        algorithm=OAEP1,
        protection_level=cmk.protection_level,
        backend=backend.name,
        public_key_sha256=hashlib.sha256(public).digest(),
        expires_at=(datetime.now(UTC) + timedelta(days=1)).replace(microsecond=0),
        private_key=bound(
            PrivateKeyRef(Custody.HSM_ENCRYPTED_DATABASE, b"\x01\x00\x00\x01" + blob), OAEP1
        ),
    )
    token = tokens.encode(claims, backend.mac)  # C_Sign with the MAC key, as the PIN allows
    service = ImportService({ProtectionLevel.HSM: backend}, Deployment())
    ciphertext = encrypt_key_material(OAEP1, public, secrets.token_bytes(32))
    assert service.import_key_material(cmk, ciphertext, token).imported.key


def test_known_limit_keys_can_be_destroyed(scenes, softhsm, prefix):
    """Even without the PIN, where they are trusted: trusted keys are public objects."""
    scenes.open(prefix, trusted=True)
    script = (
        "import os, pkcs11\n"
        "lib = pkcs11.lib(os.environ['HSMWRAP_PKCS11_MODULE'])\n"
        "token = lib.get_token(token_label=os.environ['HSMWRAP_TOKEN_LABEL'])\n"
        f"label = '{prefix}:{Role.MATERIAL_AES}:1'\n"
        "with token.open(rw=True) as session:\n"
        "    session.get_key(label=label).destroy()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    left = scenes.attacker.objects({Attribute.LABEL: f"{prefix}:{Role.MATERIAL_AES}:1"})
    assert not left


def test_known_limit_softhsm_keeps_trusted_keys_in_the_clear_on_disk(scenes, softhsm):
    """CKA_VALUE in SoftHSM's object file: type 0x11, kind 3 (bytes), length 32, all 8 bytes."""
    scene = scenes.get(True, SEALED)
    head = b"".join(number.to_bytes(8, "big") for number in (0x11, 3, 32))
    files = (path.read_bytes() for path in softhsm.directory.rglob("*.object"))
    values = [part[:32] for content in files for part in content.split(head)[1:]]

    def opened(value):
        try:
            return aes_key_unwrap_with_padding(value, scene.blob(Role.MATERIAL_AES))
        except InvalidUnwrap:
            return None

    assert scene.materials[AES] in map(opened, values)


def test_known_limit_without_trust_material_in_transit_can_be_wrapped(
    scenes, attacker, monkeypatch
):
    scene, stolen, check = scenes.get(False, SEALED), [], material_module._check_value

    def spy(method, key):
        stolen.append(attacker.stolen(key))
        return check(method, key)

    monkeypatch.setattr(material_module, "_check_value", spy)
    bring(scene.backend, scene.wrapping[OAEP1], scene.materials[AES])
    assert stolen == [scene.materials[AES]]
    # Which makes a resident wrapping key's pinned template worth nothing either.
    scene = scenes.get(False, RESIDENT)
    key = attacker.unwrap(
        scene.wrapping_key(OAEP1),
        scene.ciphertexts[OAEP1],
        intermediate(trusted=False),
        Mechanism.RSA_PKCS_OAEP,
        SHA1_OAEP,
    )
    assert attacker.stolen(key) == scene.materials[AES]


def test_known_limit_without_trust_key_sets_can_be_planted(scenes, attacker, prefix):
    scenes.open(prefix, trusted=False)
    for role in ROLES:
        attacker.plant_lookalike(prefix, role, 2)
    backend = scenes.open(prefix, trusted=False)
    material = secrets.token_bytes(32)
    blob = bring(backend, issue(backend, OAEP1), material).key.data[3:]
    kek = attacker.ours(LABEL=f"{prefix}:{Role.MATERIAL_AES}:2")
    assert attacker.unwrap(kek, blob, READABLE_AES)[Attribute.VALUE] == material


def test_known_limit_pkcs1_unwrap_is_a_padding_oracle(scenes, attacker):
    """For the holder of the PIN, whatever the key's template; on OpenSSL before 3.2."""
    scene = scenes.get(True, RESIDENT)
    private, made = scene.wrapping_key(PKCS1), intermediate(trusted=True)
    answers = set()
    for _ in range(20):
        wrong = b"\x00" + secrets.token_bytes(255)
        try:
            attacker.unwrap(private, wrong, made, *PKCS1_HOW)
        except GeneralError:
            answers.add("padding is wrong")
        else:
            answers.add("no telling")  # implicit rejection
    assert len(answers) == 1
    attacker.unwrap(private, scene.ciphertexts[PKCS1], made, *PKCS1_HOW)
