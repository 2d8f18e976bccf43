"""Keys that the holder of the PIN plants under the backend's labels, to be sealed with."""

import hmac
import secrets
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from pkcs11.constants import Attribute, MechanismFlag, ObjectClass
from pkcs11.mechanisms import KeyType, Mechanism
from support.pkcs11.attacker import KWP, OAEP1, WAYS_TO_A_KNOWN_VALUE, Scenes, bring, issue

from hsmwrap.backend import HasKeySets, ReapsWrappingKeys
from hsmwrap.errors import ConfigurationError, HsmUnavailable, HsmwrapError, InvalidMac
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.keysets.keys import ROLES, Role
from hsmwrap.pkcs11.wrapping.custody import parse_ref


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


@pytest.fixture
def prefix(request):
    return f"planted-{secrets.token_hex(4)}"


def key_sets(softhsm, prefix):
    return [
        (each.key_set, each.current)
        for each in Pkcs11Backend.list_keys(softhsm.bare_settings(key_prefix=prefix))
    ]


def sets_used(backend):
    """Numbers of the key sets that seal what is made now: wrapping key, material, import token."""
    backend = backend.ability(Pkcs11Backend)
    key = issue(backend, OAEP1)
    imported = bring(backend, key, secrets.token_bytes(32))
    sealed = {parse_ref(key.private_key)[1], int.from_bytes(imported.key.data[1:3], "big")}
    assert key.key_set == HasKeySets.of(backend).current_key_set()
    return sealed | {int(key.key_set), int(backend.mac(b"").key_set)}


def test_a_set_of_known_keys_is_ignored(scenes, attacker, prefix, trusted):
    running = scenes.open(prefix, trusted=trusted)
    for role in ROLES:
        attacker.plant_known(prefix, role, 2)
    assert key_sets(scenes.softhsm, prefix) == [("1", True)]
    assert sets_used(running) == sets_used(scenes.open(prefix, trusted=trusted)) == {1}
    with pytest.raises(InvalidMac):
        running.verify_mac(b"data", attacker.known_mac(prefix, 2, b"data"))


DERIVATIONS = {n: way for n, way in WAYS_TO_A_KNOWN_VALUE.items() if n in Mechanism.__members__}
# SoftHSM lists these; python-pkcs11 has no name for the mechanism that makes a base key for them.
SINGLE_DES = {"DES_ECB_ENCRYPT_DATA", "DES_CBC_ENCRYPT_DATA"}


@pytest.fixture(params=WAYS_TO_A_KNOWN_VALUE.values(), ids=WAYS_TO_A_KNOWN_VALUE)
def way(request):
    return request.param


def test_sets_of_keys_that_became_known_in_any_way_are_ignored(scenes, attacker, prefix, trusted):
    running = scenes.open(prefix, trusted=trusted)
    forged = []
    for number, way in enumerate(WAYS_TO_A_KNOWN_VALUE.values(), start=2):
        values = {role: attacker.planted(way, prefix, role, number)[1] for role in ROLES}
        forged.append(attacker.known_mac(prefix, number, b"data", values[Role.MAC]))
    assert key_sets(scenes.softhsm, prefix) == [("1", True)]
    assert sets_used(running) == sets_used(scenes.open(prefix, trusted=trusted)) == {1}
    for mac in forged:
        with pytest.raises(InvalidMac):
            running.verify_mac(b"data", mac)


@pytest.mark.usefixtures("no_restart")
def test_a_mac_key_that_became_known_does_not_take_the_place_of_ours(
    scenes, attacker, prefix, trusted
):
    backends = [scenes.open(prefix, trusted=trusted) for _ in range(2)]
    backends[0].mac(b"data")
    attacker.ours(LABEL=f"{prefix}:{Role.MAC}:1").destroy()
    for way in WAYS_TO_A_KNOWN_VALUE.values():
        key, value = attacker.planted(way, prefix, Role.MAC, 1)
        for backend in backends:
            with pytest.raises((InvalidMac, HsmUnavailable)):
                backend.verify_mac(b"data", attacker.known_mac(prefix, 1, b"data", value))
        key.destroy()


@pytest.mark.usefixtures("no_restart")
def test_a_trusted_set_takes_no_other_mac_key(scenes, attacker, prefix):
    """Not even one of unknown value: what it is for is not said by the HSM token."""
    running = scenes.open(prefix, trusted=True)
    mac = running.mac(b"data")
    attacker.ours(LABEL=f"{prefix}:{Role.MAC}:1").destroy()
    lookalike = attacker.plant_lookalike(prefix, Role.MAC, 1)
    tag = bytes(lookalike.sign(b"data", mechanism=Mechanism.SHA256_HMAC))
    for backend in (running, scenes.open(prefix, trusted=True)):
        with pytest.raises((InvalidMac, HsmUnavailable)):
            backend.verify_mac(b"data", replace(mac, tag=tag))


def test_the_value_is_known_and_histories_alone_do_not_tell(attacker, prefix, way):
    """The control: without CKA_LOCAL, keys that were derived would be taken for ours."""
    mac, value = attacker.planted(way, prefix, Role.MAC, 1)
    assert bytes(mac.sign(b"data", mechanism=Mechanism.SHA256_HMAC)) == hmac.digest(
        value, b"data", "sha256"
    )
    looks_hidden = mac[Attribute.ALWAYS_SENSITIVE] and mac[Attribute.NEVER_EXTRACTABLE]
    assert looks_hidden == (way in DERIVATIONS.values())
    assert not mac[Attribute.LOCAL]


def test_every_way_of_the_token_to_derive_a_key_is_tried(attacker):
    # By name: SoftHSM leaves the flags of some mechanisms uninitialised (measured).
    listed = {str(mechanism.name) for mechanism in attacker.session.token.slot.get_mechanisms()}
    derives = {name for name in listed if name.endswith(("_DERIVE", "_ENCRYPT_DATA"))}
    assert derives - SINGLE_DES == set(DERIVATIONS)


def test_a_seed_does_not_choose_a_key(attacker):
    tags = set()
    for _ in range(2):
        attacker.session.seed_random(b"the same seed")
        key = attacker.session.generate_key(
            KeyType.GENERIC_SECRET, 256, capabilities=MechanismFlag.SIGN
        )
        tags.add(bytes(key.sign(b"data", mechanism=Mechanism.SHA256_HMAC)))
    assert len(tags) == 2


def test_a_known_twin_of_a_key_is_ignored(scenes, attacker, prefix, trusted):
    running = scenes.open(prefix, trusted=trusted)
    mac = running.mac(b"data")
    for role in ROLES:
        attacker.plant_known(prefix, role, 1)
    for backend in (running, scenes.open(prefix, trusted=trusted)):
        assert sets_used(backend) == {1}
        backend.verify_mac(b"data", mac)
        with pytest.raises(InvalidMac):
            backend.verify_mac(b"data", attacker.known_mac(prefix, 1, b"data"))


@pytest.mark.parametrize("number", [1, 2])
def test_an_untrusted_lookalike_does_not_count_beside_trusted_keys(
    scenes, attacker, prefix, number
):
    running = scenes.open(prefix, trusted=True)
    for role in set(ROLES) - {Role.MAC if number == 1 else None}:
        attacker.plant_lookalike(prefix, role, number)
    expected = [("1", True), ("2", False)][:number]
    assert key_sets(scenes.softhsm, prefix) == expected
    assert sets_used(running) == sets_used(scenes.open(prefix, trusted=True)) == {1}


@pytest.mark.usefixtures("no_restart")
def test_a_lookalike_does_not_take_the_place_of_a_trusted_key(scenes, attacker, prefix):
    running = scenes.open(prefix, trusted=True)
    key = issue(running, OAEP1)
    attacker.ours(LABEL=f"{prefix}:{Role.MATERIAL_AES}:1").destroy()
    attacker.plant_lookalike(prefix, Role.MATERIAL_AES, 1)
    for backend in (running, scenes.open(prefix, trusted=True)):
        with pytest.raises(HsmwrapError):
            bring(backend, key, secrets.token_bytes(32))


@pytest.mark.usefixtures("no_restart")
def test_a_lookalike_set_does_not_take_the_place_of_the_trusted_one(scenes, attacker, prefix):
    """As long as this process lives: the next one cannot know (SECURITY.md)."""
    running = scenes.open(prefix, trusted=True)
    assert sets_used(running) == {1}
    for key in attacker.own_keys(prefix):
        key.destroy()
    for role in ROLES:
        attacker.plant_lookalike(prefix, role, 2)
    running.ability(Pkcs11Backend)._keys._current = None  # the minute is over
    with pytest.raises(HsmUnavailable, match="lost its trusted keys"):
        issue(running, OAEP1)


def test_rotation_without_the_security_officer_does_not_lower_trust(scenes, prefix):
    scenes.open(prefix, trusted=True)
    with pytest.raises(ConfigurationError, match="rotate with the SO PIN"):
        Pkcs11Backend.rotate_keys(scenes.softhsm.bare_settings(key_prefix=prefix))
    assert key_sets(scenes.softhsm, prefix) == [("1", True)]


JUNK = ("mac", "mac:", "mac:1:", "mac:0", "mac:01", "mac:²", "mac:65536", "none:1", b"\xff")


def test_labels_of_others_stop_nothing(scenes, attacker, prefix, trusted):
    backend = scenes.open(prefix, trusted=trusted)
    for junk in JUNK:
        label = junk if isinstance(junk, bytes) else f"{prefix}:{junk}".encode()
        attacker.plant_lookalike(prefix, Role.MAC, 1, label)
    for junk in (b"\xff", f"{prefix}:wrapping:²".encode(), f"{prefix}:wrapping:{9**30}".encode()):
        attacker.naive_pair(LABEL=junk, TOKEN=True, ID=prefix.encode())
    assert key_sets(scenes.softhsm, prefix) == [("1", True)]
    assert ReapsWrappingKeys.of(backend).reap(datetime.now(UTC)).removed == ()
    for key in attacker.objects({Attribute.ID: prefix.encode()}):
        key.destroy()


def test_a_planted_key_opens_what_it_sealed(attacker, prefix):
    """The attack itself works: it needs a backend that would seal with the key."""
    kek = attacker.plant_known(prefix, Role.MATERIAL_AES, 1)
    target, value = attacker.known_key(EXTRACTABLE=True)
    template = {
        Attribute.CLASS: ObjectClass.SECRET_KEY,
        Attribute.KEY_TYPE: KeyType.AES,
        Attribute.TOKEN: False,
        Attribute.SENSITIVE: False,
        Attribute.EXTRACTABLE: True,
    }
    assert (
        attacker.unwrap(kek, kek.wrap_key(target, mechanism=KWP), template)[Attribute.VALUE]
        == value
    )
    lookalike = attacker.plant_lookalike(prefix, Role.MATERIAL_SM4, 1)
    blob = lookalike.wrap_key(target, mechanism=KWP)
    assert attacker.unwrap(lookalike, blob, template)[Attribute.VALUE] == value


def test_where_trust_is_required_nothing_else_will_do(softhsm, prefix):
    settings = softhsm.settings(prefix, trusted=False, require_trusted_keys=True)
    with (
        Pkcs11Backend.from_settings(settings) as backend,
        pytest.raises(
            ConfigurationError,
            match=r"no trusted keys .* but others; `hsmwrap keys rotate` with the SO",
        ),
    ):
        backend.mac(b"data")


def test_where_trust_is_required_trusted_keys_serve(softhsm, prefix):
    settings = softhsm.settings(prefix, require_trusted_keys=True)
    with Pkcs11Backend.from_settings(settings) as backend:
        assert sets_used(backend) == {1}
