"""The known attacks on PKCS#11 (Clulow 2003; Bortolozzo et al. 2010; Bardou et al. 2012), played.

Each fails against what the backend makes, and succeeds against a naive key.
"""

import json
import os
import secrets
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap_with_padding
from pkcs11 import exceptions as ck
from pkcs11.constants import Attribute, ObjectClass
from pkcs11.mechanisms import KDF, KeyType, Mechanism
from support.pkcs11.attacker import (
    ACTION_PROHIBITED,
    AES,
    KEY_FUNCTION_NOT_PERMITTED,
    KNOWN,
    KWP,
    OAEP1,
    OAEP256,
    PKCS1,
    RESIDENT,
    SEALED,
    SHA1_OAEP,
    SM2,
    SM4,
    Scenes,
    bring,
    issue,
    readable,
)
from support.pkcs11.careless_officer import BACKUP_KEY

from hsmwrap import registry
from hsmwrap.backend import HasKeySets, ReSealsKeys
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding.templates import secret_key, stored
from hsmwrap.pkcs11.keysets import keys as keys_module
from hsmwrap.pkcs11.keysets.keys import ROLES, UNWRAPPED, Role
from hsmwrap.pkcs11.keysets.movability import ONLY_UNDER_TRUSTED
from hsmwrap.pkcs11.wrapping import material as material_module
from hsmwrap.pkcs11.wrapping.custody import WrappingKeyStore, intermediate
from hsmwrap.testing.softhsm import SoftHsmError

SECRET, PRIVATE = ObjectClass.SECRET_KEY, ObjectClass.PRIVATE_KEY
SEALED_ROLES = (
    Role.WRAPPING_UNWRAP,
    Role.WRAPPING_DECRYPT,
    Role.MATERIAL_AES,
    Role.MATERIAL_SM4,
)
RSA_SECRETS = (
    Attribute.PRIVATE_EXPONENT,
    Attribute.PRIME_1,
    Attribute.PRIME_2,
    Attribute.EXPONENT_1,
    Attribute.EXPONENT_2,
    Attribute.COEFFICIENT,
)
IV = bytes(16)


@pytest.fixture(scope="module")
def scenes(softhsm):
    made = Scenes(softhsm)
    yield made
    made.close()


@pytest.fixture
def attacker(scenes):
    yield scenes.attacker
    scenes.attacker.clean_up()


@pytest.fixture(params=[True, False], ids=["trusted", "untrusted"])
def trusted(request):
    return request.param


@pytest.fixture(params=[SEALED, RESIDENT])
def scene(scenes, trusted, request):
    return scenes.get(trusted, request.param)


@pytest.fixture
def sealed(scenes, trusted):
    return scenes.get(trusted, SEALED)


@pytest.fixture
def resident(scenes, trusted):
    return scenes.get(trusted, RESIDENT)


# --- unwrapping a sealed blob ---------------------------------------------------------------------


def test_a_blob_under_a_naive_key_unwraps_into_a_readable_object(attacker):
    target, value = attacker.known_key(EXTRACTABLE=True)
    kek = attacker.naive_key()
    blob = kek.wrap_key(target, mechanism=KWP)
    assert attacker.unwrap(kek, blob, readable(SECRET, KeyType.AES))[Attribute.VALUE] == value
    _, private = attacker.naive_pair(EXTRACTABLE=True)
    blob = kek.wrap_key(private, mechanism=KWP)
    read = attacker.unwrap(kek, blob, readable(PRIVATE, KeyType.RSA))
    assert all(read[name] for name in RSA_SECRETS)


@pytest.mark.parametrize("role", SEALED_ROLES)
def test_a_blob_does_not_unwrap_into_a_readable_object(sealed, attacker, role):
    asked = sealed.becomes(role)
    wanted = readable(asked[Attribute.CLASS], asked[Attribute.KEY_TYPE])
    for template in (wanted, asked | wanted):
        with attacker.refused(ck.TemplateInconsistent):
            attacker.unwrap(sealed.kek(role), sealed.blob(role), template)


@pytest.mark.parametrize("role", SEALED_ROLES)
def test_a_blob_unwraps_with_no_attribute_changed_or_left_out(sealed, attacker, role):
    """Sensitive, extractable, copyable, modifiable, private, and each use; one at a time."""
    kek, blob, asked = sealed.kek(role), sealed.blob(role), sealed.becomes(role)
    attacker.unwrap(kek, blob, asked).destroy()
    keeps = {Attribute.CLASS, Attribute.KEY_TYPE, Attribute.TOKEN}
    for name in asked.keys() - keeps:
        with attacker.refused(ck.TemplateInconsistent):
            attacker.unwrap(kek, blob, asked | {name: not asked[name]})
        if name is not Attribute.PRIVATE:  # SoftHSM's default, and python-pkcs11's, is true
            with attacker.refused(ck.TemplateInconsistent):
                attacker.unwrap(kek, blob, {k: v for k, v in asked.items() if k is not name})
    bare = {name: asked[name] for name in keeps}
    with attacker.refused(ck.TemplateInconsistent):
        attacker.unwrap(kek, blob, bare)


@pytest.mark.parametrize("role", SEALED_ROLES)
def test_a_blob_does_not_unwrap_as_another_kind_of_key(sealed, attacker, role):
    kek, blob, asked = sealed.kek(role), sealed.blob(role), sealed.becomes(role)
    kinds = [(SECRET, kind) for kind in (KeyType.AES, KeyType.DES3, KeyType.GENERIC_SECRET)]
    kinds += [(PRIVATE, KeyType.RSA), (PRIVATE, KeyType.EC)]
    kinds.remove((asked[Attribute.CLASS], asked[Attribute.KEY_TYPE]))
    for object_class, key_type in kinds:
        changed = {Attribute.CLASS: object_class, Attribute.KEY_TYPE: key_type}
        with attacker.refused(ck.TemplateInconsistent):
            attacker.unwrap(kek, blob, asked | changed)


@pytest.mark.parametrize("role", [Role.WRAPPING_UNWRAP, Role.WRAPPING_DECRYPT])
def test_an_unsealed_wrapping_key_cannot_be_stored(sealed, attacker, role):
    """Or it would outlive the retirement of the key set."""
    with attacker.refused(ck.TemplateInconsistent):
        stored = UNWRAPPED[role] | {Attribute.TOKEN: True}
        attacker.unwrap(sealed.kek(role), sealed.blob(role), stored)


@pytest.mark.parametrize("role", SEALED_ROLES)
def test_no_other_role_opens_a_blob(sealed, attacker, role):
    for other in UNWRAPPED.keys() & set(ROLES) - {role}:
        with attacker.refused(ck.GeneralError):
            attacker.unwrap(sealed.kek(other), sealed.blob(role), sealed.becomes(other))


# --- decrypting a sealed blob ---------------------------------------------------------------------


def unwrapped_by_ecb(key, blob):
    """RFC 3394, section 2.2.2, with C_Decrypt by AES-ECB as the block cipher."""
    a, *r = (blob[at : at + 8] for at in range(0, len(blob), 8))
    for step in range(6 * len(r), 0, -1):
        at = (step - 1) % len(r)
        mixed = (int.from_bytes(a, "big") ^ step).to_bytes(8, "big") + r[at]
        plain = key.decrypt(mixed, mechanism=Mechanism.AES_ECB)
        a, r[at] = plain[:8], plain[8:]
    return b"".join(r)


def test_a_naive_key_decrypts_what_it_wrapped(attacker):
    target, value = attacker.known_key(EXTRACTABLE=True)
    kek = attacker.naive_key()
    assert unwrapped_by_ecb(kek, kek.wrap_key(target, mechanism=KWP)) == value


@pytest.mark.parametrize("role", SEALED_ROLES)
def test_a_key_encryption_key_only_wraps_and_unwraps(sealed, attacker, role):
    kek, blob = sealed.kek(role), sealed.blob(role)
    with attacker.refused(KEY_FUNCTION_NOT_PERMITTED):
        unwrapped_by_ecb(kek, blob)
    for mechanism, parameter in ((Mechanism.AES_CBC, IV), (Mechanism.AES_CBC_PAD, IV), (KWP, None)):
        with attacker.refused(KEY_FUNCTION_NOT_PERMITTED):
            kek.decrypt(blob, mechanism=mechanism, mechanism_param=parameter)
        with attacker.refused(KEY_FUNCTION_NOT_PERMITTED):
            kek.encrypt(blob, mechanism=mechanism, mechanism_param=parameter)
    with attacker.refused(KEY_FUNCTION_NOT_PERMITTED):
        kek.sign(blob, mechanism=Mechanism.AES_CMAC)
    own, _ = attacker.known_key(EXTRACTABLE=True)
    for mechanism, parameter in ((Mechanism.AES_CBC, IV), (Mechanism.AES_KEY_WRAP, None)):
        with attacker.refused(ck.MechanismInvalid):
            kek.wrap_key(own, mechanism=mechanism, mechanism_param=parameter)


# --- wrapping, copying, changing, reading ---------------------------------------------------------


def ways_to_wrap(attacker):
    """Keys of one's own, secret and public, by every mechanism that the token wraps with."""
    own, _ = attacker.known_key()
    public, _ = attacker.naive_pair()
    return (
        (own, KWP, None),
        (own, Mechanism.AES_KEY_WRAP, None),
        (own, Mechanism.AES_CBC, IV),
        (public, Mechanism.RSA_PKCS, None),
        (public, Mechanism.RSA_PKCS_OAEP, SHA1_OAEP),
    )


def test_a_naive_key_can_be_wrapped_copied_changed_and_read(attacker):
    naive, value = attacker.known_key(EXTRACTABLE=True, SENSITIVE=True)
    assert attacker.stolen(naive) == value
    for own, mechanism, parameter in ways_to_wrap(attacker):
        assert own.wrap_key(naive, mechanism=mechanism, mechanism_param=parameter)
    naive[Attribute.LABEL] = "mine"
    naive.copy({Attribute.DECRYPT: True, Attribute.TOKEN: True}).destroy()
    open_key, value = attacker.known_key(EXTRACTABLE=True, SENSITIVE=False)
    assert open_key[Attribute.VALUE] == value


def unwrappable(target):
    """What the token answers: keys of a movable set are extractable, but not for these."""
    return ck.KeyNotWrappable if target[Attribute.EXTRACTABLE] else ck.KeyUnextractable


def moves(scene, target):
    """An imported key that was sealed under a trusted set: the backend seals it again."""
    if not scene.trusted or target[Attribute.CLASS] is not SECRET:
        return False
    return not (target[Attribute.WRAP] or target[Attribute.SIGN])


def test_nothing_that_the_backend_keeps_can_be_wrapped(scene, attacker):
    with scene.everything() as targets:
        for own, mechanism, parameter in ways_to_wrap(attacker):
            for target in targets:
                with attacker.refused(unwrappable(target)):
                    own.wrap_key(target, mechanism=mechanism, mechanism_param=parameter)
        for role in SEALED_ROLES:
            for target in (each for each in targets if not moves(scene, each)):
                with attacker.refused(unwrappable(target)):
                    scene.kek(role).wrap_key(target, mechanism=KWP)


# --- keys that move to another key set ------------------------------------------------------------


@pytest.fixture
def moving(scenes):
    return scenes.get(True, SEALED)


@pytest.fixture
def made_by_officer(softhsm, attacker):
    """Makes trusted keys in a process of its own, and destroys them at the end."""
    labels = []

    def make(kind):
        labels.append(f"{kind}-{secrets.token_hex(4)}")
        run = [sys.executable, "-m", "support.pkcs11.careless_officer", labels[-1], kind]
        subprocess.run(run, env=os.environ | softhsm.environment, check=True)
        return attacker.ours(LABEL=labels[-1])

    yield make
    for label in labels:
        attacker.ours(LABEL=label).destroy()


@pytest.fixture
def careless(made_by_officer):
    """A trusted key-encryption key that pins what it unwraps, but not what it wraps."""
    return made_by_officer("kek")


def opened(moving, attacker, kek, blob):
    return attacker.unwrap(kek, blob, moving.becomes(Role.MATERIAL_AES))


@pytest.mark.parametrize("victim", [*SEALED_ROLES, Role.MAC])
def test_a_key_encryption_key_under_a_careless_one_decrypts(moving, attacker, careless, victim):
    """The control of the next test: blobs of this set would open in the host."""
    blob = careless.wrap_key(moving.kek(victim), mechanism=KWP)
    key = opened(moving, attacker, careless, blob)
    if victim is Role.MATERIAL_AES:
        read = unwrapped_by_ecb(key, moving.blob(victim))
        assert read == moving.materials[AES]


@pytest.mark.parametrize("victim", [*SEALED_ROLES, Role.MAC])
def test_no_key_of_a_key_set_is_wrapped_by_another(moving, attacker, victim):
    for role in SEALED_ROLES:
        with attacker.refused(ck.KeyNotWrappable):
            moving.kek(role).wrap_key(moving.kek(victim), mechanism=KWP)


def test_a_key_that_moves_stays_what_it_is(moving, attacker):
    """Wrapped again by whichever key-encryption key wraps it, it opens for no other use."""
    aes, sm4 = Role.MATERIAL_AES, Role.MATERIAL_SM4
    key = moving.imported_key(AES)
    assert moving.kek(aes).wrap_key(key, mechanism=KWP) == moving.blob(aes)
    for role in (aes, sm4):
        blob = moving.kek(role).wrap_key(key, mechanism=KWP)
        wanted = readable(SECRET, moving.becomes(role)[Attribute.KEY_TYPE])
        weaker = [wanted, moving.becomes(role) | wanted]
        weaker += [moving.becomes(role) | {name: False} for name in ONLY_UNDER_TRUSTED]
        for template in weaker:
            with attacker.refused(ck.TemplateInconsistent):
                attacker.unwrap(moving.kek(role), blob, template)
    for role in (Role.WRAPPING_UNWRAP, Role.WRAPPING_DECRYPT):
        with attacker.refused(ck.KeyNotWrappable):
            moving.kek(role).wrap_key(key, mechanism=KWP)
    # A secret that has no use becomes no key that encrypts.
    secret = moving.imported_key(SM4)
    with attacker.refused(ck.KeyNotWrappable):
        moving.kek(aes).wrap_key(secret, mechanism=KWP)


@pytest.fixture
def planted(moving, attacker):
    """A newer key set of known keys, with all attributes of a movable one but CKA_TRUSTED."""
    made = {
        role: attacker.plant_known(moving.prefix, role, 2, EXTRACTABLE=True, WRAP_WITH_TRUSTED=True)
        for role in ROLES
    }
    yield made
    for key in made.values():
        key.destroy()


def test_a_naive_key_moves_to_a_planted_set_and_is_read(attacker, planted):
    """The control of the next test."""
    naive, value = attacker.known_key(EXTRACTABLE=True, SENSITIVE=True)
    blob = planted[Role.MATERIAL_AES].wrap_key(naive, mechanism=KWP)
    assert aes_key_unwrap_with_padding(KNOWN, blob) == value


def test_no_key_moves_to_a_planted_set(scenes, moving, attacker, planted):
    """Neither by the backend, which goes on with its own set, nor by the holder of the PIN."""
    key = moving.imported[AES].key
    for backend in (moving.backend, scenes.open(moving.prefix, trusted=True)):
        assert HasKeySets.of(backend).current_key_set() == "1"
        assert ReSealsKeys.of(backend).reseal(key) == key
    opened_key = moving.imported_key(AES)
    with attacker.refused(ck.KeyNotWrappable):
        planted[Role.MATERIAL_AES].wrap_key(opened_key, mechanism=KWP)


def test_a_key_set_that_says_that_it_is_trusted_cannot_be_planted(attacker):
    """SoftHSM leaves what it refuses as a session object, without CKA_TRUSTED."""
    template = {Attribute.TRUSTED: True, **ONLY_UNDER_TRUSTED}
    kek, (known, _) = attacker.naive_key(), attacker.known_key(EXTRACTABLE=True)
    blob = kek.wrap_key(known, mechanism=KWP)
    with pytest.raises(ck.AttributeReadOnly):
        attacker.session.generate_key(KeyType.AES, 256, template=template)
    with pytest.raises(ck.AttributeReadOnly):
        attacker.unwrap(kek, blob, template | readable(SECRET, KeyType.AES))
    left = attacker.objects({Attribute.TOKEN: False, Attribute.CLASS: SECRET})
    assert not any(key[Attribute.TRUSTED] for key in left)


# --- the backup key, if it stayed in the token ----------------------------------------------------

EVERY_ROLE = (*SEALED_ROLES, Role.MAC)
AES_ROLE = Role.MATERIAL_AES


def test_a_careless_backup_key_opens_imported_keys_and_key_sets(moving, attacker, made_by_officer):
    """The control of the next two tests."""
    careless = made_by_officer("backup")
    blob = careless.wrap_key(moving.imported_key(AES), mechanism=KWP)
    assert unwrapped_by_ecb(careless, blob) == moving.materials[AES]
    for role in EVERY_ROLE:
        blob = careless.wrap_key(moving.kek(role), mechanism=KWP)
        read = attacker.unwrap(careless, blob, readable(SECRET, KeyType.AES))[Attribute.VALUE]
        assert read == aes_key_unwrap_with_padding(BACKUP_KEY, blob)
    # With a key-encryption key in the host every blob opens there.
    blob = careless.wrap_key(moving.kek(Role.MATERIAL_AES), mechanism=KWP)
    kek = aes_key_unwrap_with_padding(BACKUP_KEY, blob)
    opened = aes_key_unwrap_with_padding(kek, moving.blob(Role.MATERIAL_AES))
    assert opened == moving.materials[AES]


def test_a_backup_key_that_wraps_takes_key_sets_and_does_nothing_else(
    moving, attacker, made_by_officer
):
    backup_key = made_by_officer("backup-wrap")
    blobs = [backup_key.wrap_key(moving.kek(role), mechanism=KWP) for role in EVERY_ROLE]
    known, _ = attacker.known_key(EXTRACTABLE=True)
    for target in (moving.imported_key(AES), moving.imported_key(SM4), known):
        with attacker.refused(ck.KeyNotWrappable):
            backup_key.wrap_key(target, mechanism=KWP)
    does_nothing_else(attacker, backup_key, blobs)
    for blob in blobs:
        with attacker.refused(KEY_FUNCTION_NOT_PERMITTED):
            attacker.unwrap(backup_key, blob, readable(SECRET, KeyType.AES))


def test_a_backup_key_that_unwraps_takes_nothing_for_the_user_and_does_nothing_else(
    moving, attacker, made_by_officer
):
    """What it unwraps has to be trusted, which a user cannot ask for; weaker is refused as well."""
    wraps, backup_key = made_by_officer("backup-wrap"), made_by_officer("backup-unwrap")
    blobs = {role: wraps.wrap_key(moving.kek(role), mechanism=KWP) for role in EVERY_ROLE}
    for role, blob in blobs.items():
        use = (Attribute.SIGN,) if role is Role.MAC else (Attribute.UNWRAP,)
        kind = KeyType.GENERIC_SECRET if role is Role.MAC else KeyType.AES
        as_restored = secret_key(kind, *use) | ONLY_UNDER_TRUSTED
        for more in (readable(SECRET, kind), {}, {Attribute.DECRYPT: True}):
            with attacker.refused(ck.TemplateInconsistent):
                attacker.unwrap(backup_key, blob, as_restored | more)
        with pytest.raises(ck.AttributeReadOnly):
            attacker.unwrap(backup_key, blob, as_restored | {Attribute.TRUSTED: True})
        # SoftHSM leaves what it refuses as a session object: without a value, it opens nothing.
        for left in attacker.objects({Attribute.TOKEN: False, Attribute.CLASS: SECRET}):
            assert not left[Attribute.TRUSTED]
            with pytest.raises(ck.PKCS11Error):
                attacker.unwrap(left, moving.blob(AES_ROLE), moving.becomes(AES_ROLE))
            with pytest.raises(ck.PKCS11Error):
                attacker.stolen(left)
            left.destroy()
    does_nothing_else(attacker, backup_key, blobs.values())
    with attacker.refused(KEY_FUNCTION_NOT_PERMITTED):
        backup_key.wrap_key(moving.kek(Role.MAC), mechanism=KWP)


def does_nothing_else(attacker, backup_key, blobs):
    for blob in blobs:
        with attacker.refused(KEY_FUNCTION_NOT_PERMITTED):
            unwrapped_by_ecb(backup_key, blob)
        for use in (backup_key.encrypt, backup_key.decrypt):
            with attacker.refused(KEY_FUNCTION_NOT_PERMITTED):
                use(blob, mechanism=Mechanism.AES_CBC_PAD, mechanism_param=IV)
        with attacker.refused(KEY_FUNCTION_NOT_PERMITTED):
            backup_key.sign(blob, mechanism=Mechanism.AES_CMAC)
    with attacker.refused(ck.AttributeSensitive):
        backup_key[Attribute.VALUE]
    for weaker in (Attribute.DECRYPT, Attribute.EXTRACTABLE):
        with attacker.refused(ACTION_PROHIBITED):
            backup_key[weaker] = True
        with attacker.refused(ACTION_PROHIBITED):
            backup_key.copy({weaker: True})


# --- a copied key set and a planted one -----------------------------------------------------------


@pytest.fixture
def backed_up(softhsm, tmp_path):
    """A key set in a backup, and what restores it; another prefix plays another token."""
    made = f"copied-{secrets.token_hex(4)}"
    softhsm.run_keys("init", made)
    backup = tmp_path / "backup"
    numbers = ("--shares", "2", "--threshold", "2", "--shares-to", str(tmp_path))
    softhsm.run_keys("backup", made, *numbers, "--out", str(backup))
    shares = [f"--share-file={tmp_path / f'share-{number}'}" for number in (1, 2)]
    return made, backup, ("--file", str(backup), *shares)


@pytest.fixture
def copied(softhsm, backed_up):
    """A key set that came from a backup, and what was sealed under it where it was made."""
    (made, _, restoring), copied = backed_up, f"copied-{secrets.token_hex(4)}"
    with registry.open_backend("pkcs11", softhsm.bare_settings(key_prefix=made)) as backend:
        key = bring(backend, issue(backend, OAEP1), secrets.token_bytes(32)).key
        message = backend.encrypt(key, b"message")
    softhsm.run_keys("restore", copied, *restoring)
    # Before this process writes an object, or it would not find the set (field note 93).
    assert current_set(softhsm, copied) == "1"
    return copied, key, message


def plant_a_copy(attacker, prefix, role, number):
    """As a restored key is, its histories included, but not CKA_TRUSTED; its value is known."""
    kek, (known, value) = attacker.naive_key(), attacker.known_key(EXTRACTABLE=True)
    blob = kek.wrap_key(known, mechanism=KWP)
    use = (Attribute.SIGN,) if role is Role.MAC else (Attribute.WRAP, Attribute.UNWRAP)
    kind = KeyType.GENERIC_SECRET if role is Role.MAC else KeyType.AES
    template = secret_key(kind, *use) | ONLY_UNDER_TRUSTED | {Attribute.PRIVATE: False}
    name = f"{prefix}:{role}:{number}"
    attacker.unwrap(kek, blob, stored(template, f"{name}:planted".encode(), name))
    return value


def current_set(softhsm, prefix):
    (current,) = (
        each.key_set
        for each in Pkcs11Backend.list_keys(softhsm.bare_settings(key_prefix=prefix))
        if each.current
    )
    return current


def test_a_set_that_was_planted_in_the_place_of_one_to_come_is_not_taken_for_it(
    softhsm, attacker, backed_up
):
    """Key-encryption keys without an unwrap template, by the ids in the file; the control counts.

    Imports would be sealed under them, and the attacker unwraps them into readable objects.
    """
    (_, backup, restoring), prefix = backed_up, f"copied-{secrets.token_hex(4)}"
    (key_set,) = json.loads(json.loads(backup.read_text())["content"])["key_sets"]
    for role in ROLES:
        key = attacker.plant_lookalike(prefix, role, key_set["number"])
        key[Attribute.ID] = f"{prefix}:{role}:1:{key_set['made_by']}".encode()
    assert current_set(softhsm, prefix) == "1"
    with pytest.raises(SoftHsmError, match="another key set 1"):
        softhsm.run_keys("restore", prefix, *restoring)


def test_a_planted_set_does_not_count_beside_a_copied_one(softhsm, attacker, copied, monkeypatch):
    """Of a newer number, and mixed with it; the control says of every key that it is trusted."""
    prefix, key, message = copied
    for role in ROLES:
        plant_a_copy(attacker, prefix, role, 2)
    plant_a_copy(attacker, prefix, Role.MATERIAL_AES, 1)
    assert current_set(softhsm, prefix) == "1"
    with registry.open_backend("pkcs11", softhsm.bare_settings(key_prefix=prefix)) as backend:
        assert backend.decrypt(key, message) == b"message"
        assert backend.mac(b"").key_set == "1"
        again = bring(backend, issue(backend, OAEP1), secrets.token_bytes(32)).key
        assert backend.decrypt(again, backend.encrypt(again, b"x")) == b"x"
    read = keys_module._read
    monkeypatch.setattr(
        keys_module, "_read", lambda *asked: {**read(*asked), Attribute.TRUSTED: True}
    )
    assert current_set(softhsm, prefix) == "2"


def test_nothing_that_the_backend_keeps_can_be_copied(scene, attacker):
    weaker = ({}, {Attribute.TOKEN: True}, {Attribute.SENSITIVE: False}, {Attribute.DECRYPT: True})
    with scene.everything() as targets:
        for target in targets:
            for template in weaker:
                with attacker.refused(ACTION_PROHIBITED):
                    target.copy(template)


CHANGES = {
    Attribute.SENSITIVE: False,
    Attribute.EXTRACTABLE: True,
    Attribute.WRAP_WITH_TRUSTED: False,
    Attribute.MODIFIABLE: True,
    Attribute.COPYABLE: True,
    Attribute.TRUSTED: True,
    Attribute.ENCRYPT: True,
    Attribute.DECRYPT: True,
    Attribute.SIGN: True,
    Attribute.WRAP: True,
    Attribute.UNWRAP: True,
    Attribute.DERIVE: True,
    Attribute.LABEL: "mine",
    Attribute.ID: b"mine",
    Attribute.ALLOWED_MECHANISMS: (Mechanism.AES_ECB,),
}


def test_nothing_that_the_backend_keeps_can_be_changed(scene, attacker):
    with scene.everything() as targets:
        for target in targets:
            for name, value in CHANGES.items():
                with attacker.refused(ACTION_PROHIBITED):
                    target[name] = value


def test_nothing_that_the_backend_keeps_can_be_read(scene, attacker):
    with scene.everything() as targets:
        for target in targets:
            rsa = target[Attribute.KEY_TYPE] is KeyType.RSA
            for name in RSA_SECRETS if rsa else (Attribute.VALUE,):
                with attacker.refused(ck.AttributeSensitive):
                    target[name]


# --- a key in transit: it has to be extractable until it is sealed --------------------------------


@pytest.fixture
def trusted_scene(scenes):
    return scenes.get(True, SEALED)


def test_a_wrapping_key_that_is_being_sealed_cannot_be_wrapped_nor_used(
    trusted_scene, attacker, monkeypatch
):
    seal, seen = WrappingKeyStore.seal, []

    def spy(store, pooled, role, private, number):
        for own, mechanism, parameter in ways_to_wrap(attacker):
            with attacker.refused(ck.KeyNotWrappable):
                own.wrap_key(private, mechanism=mechanism, mechanism_param=parameter)
        with attacker.refused(ACTION_PROHIBITED):
            private.copy({Attribute.WRAP_WITH_TRUSTED: False})
        with attacker.refused(ACTION_PROHIBITED):
            private[Attribute.DECRYPT] = True
        with attacker.refused(ck.AttributeSensitive):
            private[Attribute.PRIVATE_EXPONENT]
        assert not any(
            private[use] for use in (Attribute.UNWRAP, Attribute.DECRYPT, Attribute.SIGN)
        )
        seen.append(private)
        return seal(store, pooled, role, private, number)

    monkeypatch.setattr(WrappingKeyStore, "seal", spy)
    issue(trusted_scene.backend, OAEP1)
    assert len(seen) == 1


@pytest.mark.parametrize("algorithm", [OAEP1, OAEP256, SM2])
def test_material_that_is_being_imported_cannot_be_wrapped(
    trusted_scene, attacker, monkeypatch, algorithm
):
    check, seen = material_module._check_value, []

    def spy(method, key):
        for own, mechanism, parameter in ways_to_wrap(attacker):
            with attacker.refused(ck.KeyNotWrappable):
                own.wrap_key(key, mechanism=mechanism, mechanism_param=parameter)
        with attacker.refused(ACTION_PROHIBITED):
            key.copy({Attribute.WRAP_WITH_TRUSTED: False})
        with attacker.refused(ck.AttributeSensitive):
            key[Attribute.VALUE]
        seen.append(key)
        return check(method, key)

    monkeypatch.setattr(material_module, "_check_value", spy)
    wrapping, ciphertext = trusted_scene.wrapping[algorithm], trusted_scene.ciphertexts[algorithm]
    trusted_scene.backend.unwrap_material(wrapping.private_key, algorithm, ciphertext, key_spec=AES)
    assert len(seen) == 1


# --- a client's ciphertext and a resident wrapping key --------------------------------------------

CLIENT = {PKCS1: (Mechanism.RSA_PKCS, None), OAEP1: (Mechanism.RSA_PKCS_OAEP, SHA1_OAEP)}


@pytest.mark.parametrize("algorithm", CLIENT)
def test_a_ciphertext_for_a_naive_key_unwraps_into_a_readable_object(attacker, algorithm):
    target, value = attacker.known_key(EXTRACTABLE=True)
    public, private = attacker.naive_pair()
    mechanism, parameter = CLIENT[algorithm]
    blob = public.wrap_key(target, mechanism=mechanism, mechanism_param=parameter)
    template = readable(SECRET, KeyType.AES)
    read = attacker.unwrap(private, blob, template, mechanism, parameter)
    assert read[Attribute.VALUE] == value


@pytest.mark.parametrize("algorithm", CLIENT)
def test_a_resident_key_unwraps_a_ciphertext_only_as_the_backend_does(
    resident, attacker, algorithm
):
    private, ciphertext = resident.wrapping_key(algorithm), resident.ciphertexts[algorithm]
    made = intermediate(trusted=resident.trusted)
    changes = [{name: not made[name]} for name in made if isinstance(made[name], bool)]
    changes += [{Attribute.KEY_TYPE: kind} for kind in (KeyType.DES3, KeyType.GENERIC_SECRET)]
    changes += [{Attribute.CLASS: PRIVATE, Attribute.KEY_TYPE: KeyType.RSA}]
    changes += [readable(SECRET, KeyType.AES)]
    for change in changes:
        with attacker.refused(ck.TemplateInconsistent):
            attacker.unwrap(private, ciphertext, made | change, *CLIENT[algorithm])
    with attacker.refused(KEY_FUNCTION_NOT_PERMITTED):
        private.decrypt(
            ciphertext, mechanism=CLIENT[algorithm][0], mechanism_param=CLIENT[algorithm][1]
        )


def test_what_a_resident_key_unwraps_can_only_be_sealed(scenes, attacker):
    scene = scenes.get(True, RESIDENT)
    key = attacker.unwrap(
        scene.wrapping_key(OAEP1),
        scene.ciphertexts[OAEP1],
        intermediate(trusted=True),
        *CLIENT[OAEP1],
    )
    for own, mechanism, parameter in ways_to_wrap(attacker):
        with attacker.refused(ck.KeyNotWrappable):
            own.wrap_key(key, mechanism=mechanism, mechanism_param=parameter)
    key.destroy()


@pytest.mark.parametrize(("algorithm", "other"), [(OAEP1, PKCS1), (PKCS1, OAEP1)])
def test_a_resident_key_takes_its_own_mechanism_only(resident, attacker, algorithm, other):
    """C_UnwrapKey by PKCS#1 v1.5 is a padding oracle, for OAEP ciphertexts too."""
    made = intermediate(trusted=resident.trusted)
    with attacker.refused(ck.MechanismInvalid):
        attacker.unwrap(
            resident.wrapping_key(algorithm), resident.ciphertexts[algorithm], made, *CLIENT[other]
        )


# --- deriving -------------------------------------------------------------------------------------


def test_a_naive_key_derives_a_readable_key(attacker):
    _, value = attacker.known_key()
    base = attacker.session.create_object(
        readable(SECRET, KeyType.AES) | {Attribute.DERIVE: True, Attribute.VALUE: value}
    )
    derived = base.derive_key(
        KeyType.GENERIC_SECRET,
        128,
        mechanism=Mechanism.AES_ECB_ENCRYPT_DATA,
        mechanism_param=IV,
        template={Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True},
    )
    aes = Cipher(algorithms.AES(value), modes.ECB()).encryptor()
    assert derived[Attribute.VALUE] == aes.update(IV)


@pytest.mark.parametrize(
    ("mechanism", "parameter"),
    [(Mechanism.AES_ECB_ENCRYPT_DATA, IV), (Mechanism.AES_CBC_ENCRYPT_DATA, (IV, IV))],
)
def test_no_key_of_the_backend_derives_another(scene, attacker, mechanism, parameter):
    for key in (*(scene.kek(role) for role in SEALED_ROLES), scene.imported_key(AES)):
        with attacker.refused(KEY_FUNCTION_NOT_PERMITTED):
            key.derive_key(
                KeyType.GENERIC_SECRET, 128, mechanism=mechanism, mechanism_param=parameter
            )


def test_a_point_off_the_curve_is_refused(scene, attacker):
    """Biehl, Meyer, Müller 2000: such points reveal the private key, piece by piece."""
    private = scene.wrapping_key(SM2)
    for point in (b"\x04" + bytes(63) + b"\x01", b"\x04" + secrets.token_bytes(64), b"\x00"):
        with attacker.refused(ck.GeneralError):
            private.derive_key(
                KeyType.GENERIC_SECRET,
                256,
                mechanism=Mechanism.ECDH1_DERIVE,
                mechanism_param=(KDF.NULL, None, point),
            )


# --- trust ----------------------------------------------------------------------------------------


def test_only_the_security_officer_makes_a_key_trusted(scene, attacker):
    own = attacker.naive_key()
    with attacker.refused(ck.AttributeReadOnly):
        own[Attribute.TRUSTED] = True
    with attacker.refused(ck.AttributeReadOnly):
        own.copy({Attribute.TRUSTED: True})
    # SoftHSM leaves the unfinished object of a refused template behind; it is of no use.
    with pytest.raises(ck.AttributeReadOnly):
        attacker.naive_key(TRUSTED=True)
    with pytest.raises(ck.AttributeReadOnly):
        attacker.known_key(TRUSTED=True)
    trusted = {key.handle for key in attacker.objects({Attribute.TRUSTED: True})}
    assert trusted.isdisjoint(key.handle for key in attacker.objects({Attribute.TOKEN: False}))
    assert all(key[Attribute.TRUSTED] == scene.trusted for key in map(scene.kek, SEALED_ROLES))
