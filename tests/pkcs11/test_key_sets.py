"""Making, rotating and retiring key sets when something goes wrong, or runs meanwhile."""

import itertools
import json
import os
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from pkcs11.constants import Attribute, ObjectClass, TokenFlag
from pkcs11.exceptions import (
    FunctionFailed,
    MechanismInvalid,
    ObjectHandleInvalid,
    SessionHandleInvalid,
)
from pkcs11.mechanisms import KeyType
from support.pkcs11.attacker import OAEP1, Attacker, bring, issue
from support.services.softhsm import ROOT, make_softhsm

from hsmwrap.errors import ConfigurationError, InvalidImportToken, PinError, TokenSelectionError
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding.host import ModuleHost
from hsmwrap.pkcs11.binding.profiles import by_number
from hsmwrap.pkcs11.binding.templates import HsmAttributeMapper
from hsmwrap.pkcs11.keysets import admin, keys
from hsmwrap.pkcs11.keysets.keys import ROLES, KeySets, Role
from hsmwrap.pkcs11.sessions.connecting import PAUSES
from hsmwrap.pkcs11.sessions.connection import Connection
from hsmwrap.pkcs11.sessions.session import PooledSession
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.wrapping import rsa, sm2
from hsmwrap.pkcs11.wrapping.custody import WrappingKeyStore, parse_ref

SCENARIOS = "support.pkcs11.key_set_scenarios"
DEADLINE = 300


@pytest.fixture
def prefix():
    return f"sets-{secrets.token_hex(4)}"


@pytest.mark.parametrize(
    "scenario",
    [
        "failed_making",
        "failed_making_untrusted",
        "failed_cleaning_up",
        "partial_retirement",
        "faults_while_reading",
    ],
)
def test_key_sets_behind_the_fault_shim(softhsm, tmp_path, prefix, scenario):
    settings = softhsm.bare_settings(key_prefix=prefix, initial_backoff=0.0, max_backoff=0.0)
    command = [sys.executable, "-m", SCENARIOS, scenario, tmp_path / "shim", json.dumps(settings)]
    so_pin_file = softhsm.environment["HSMWRAP_SO_PIN_FILE"]
    subprocess.run([*command, so_pin_file], check=True, timeout=DEADLINE)


# --- leftovers of a killed process


def leave(settings, number, *roles, trusted=False):
    """Keys of a set that was never finished."""
    made = KeySets(settings["key_prefix"])
    connection = Connection(Pkcs11Settings.from_mapping(settings))
    for role in roles:
        connection.run(
            lambda pooled, role=role: made.create(
                pooled.session, role, number, "killed", trusted=trusted
            )
        )
    connection.close()


def current(settings):
    with Pkcs11Backend.from_settings(settings) as backend:
        issue(backend, OAEP1)
        return backend.mac(b"").key_set


def test_rotation_goes_round_an_unfinished_set(softhsm, prefix):
    settings = softhsm.settings(prefix, trusted=False)
    leave(settings, 2, Role.WRAPPING_UNWRAP, Role.MATERIAL_AES)
    assert Pkcs11Backend.rotate_keys(settings).key_set == "3"
    assert current(settings) == "3"


def test_init_goes_round_an_unfinished_set(softhsm, prefix):
    settings = softhsm.bare_settings(key_prefix=prefix)
    leave(settings, 1, Role.WRAPPING_UNWRAP)
    with pytest.raises(ConfigurationError, match="keys init"):
        Pkcs11Backend.rotate_keys(settings)
    assert Pkcs11Backend.initialise_keys(settings).key_set == "2"
    assert current(settings) == "2"


def test_an_unfinished_set_can_be_retired(softhsm, prefix):
    settings = softhsm.settings(prefix, trusted=False)
    leave(settings, 7, Role.MATERIAL_SM4)
    assert [each.key_set for each in Pkcs11Backend.list_keys(settings)] == ["1", "7"]
    Pkcs11Backend.retire_keys(settings, "7")
    assert [each.key_set for each in Pkcs11Backend.list_keys(settings)] == ["1"]
    with pytest.raises(ConfigurationError, match=r"no key set 7; it has 1$"):
        Pkcs11Backend.retire_keys(settings, "7")


def test_a_set_whose_mac_key_is_gone_can_be_retired(softhsm, attacker, prefix):
    """As an interrupted retirement of hsmwrap 0.1 left it."""
    settings = softhsm.settings(prefix, trusted=False)
    Pkcs11Backend.rotate_keys(settings)
    attacker.ours(LABEL=f"{prefix}:{Role.MAC}:1").destroy()
    Pkcs11Backend.retire_keys(settings, "1")
    assert len(attacker.own_keys(prefix)) == len(ROLES)


def test_an_unfinished_trusted_set_takes_nothing_from_an_untrusted_one(softhsm, prefix):
    """While the first rotation with the SO PIN is under way, or if it failed."""
    settings = softhsm.settings(prefix, trusted=False)
    softhsm.run_keys("rotate", prefix)
    attacker = Attacker(softhsm)
    attacker.ours(LABEL=f"{prefix}:{Role.MAC}:2").destroy()
    attacker.close()
    assert current(settings) == "1"
    listed = Pkcs11Backend.list_keys(settings)
    assert [(each.key_set, each.current) for each in listed] == [("1", True), ("2", False)]


# --- two at once


def test_a_key_that_another_process_makes_meanwhile_ends_the_rotation(
    softhsm, attacker, prefix, monkeypatch
):
    settings = softhsm.settings(prefix, trusted=False)
    create, others = KeySets.create, []

    def collide(self, session, role, number, *rest, **named):
        if not others:
            others.append(attacker.plant_lookalike(prefix, Role.MATERIAL_AES, number))
        create(self, session, role, number, *rest, **named)

    monkeypatch.setattr(KeySets, "create", collide)
    with pytest.raises(ConfigurationError, match="exactly one key of each kind"):
        Pkcs11Backend.rotate_keys(settings)
    left = {key.handle for key in attacker.own_keys(prefix)}
    assert len(left) == len(ROLES) + 1
    assert others[0].handle in left
    assert current(settings) == "1"


def test_a_second_mac_key_ends_the_rotation(softhsm, attacker, prefix, monkeypatch):
    settings = softhsm.settings(prefix, trusted=False)
    create = KeySets.create

    def collide(self, session, role, number, *rest, **named):
        create(self, session, role, number, *rest, **named)
        if role is Role.MAC:
            attacker.plant_lookalike(prefix, Role.MAC, number)

    monkeypatch.setattr(KeySets, "create", collide)
    with pytest.raises(ConfigurationError, match="exactly one key of each kind"):
        Pkcs11Backend.rotate_keys(settings)
    assert len(attacker.own_keys(prefix)) == len(ROLES) + 1


def test_rotations_at_the_same_time_end_with_one_good_set(softhsm, prefix):
    settings = softhsm.settings(prefix)
    command = [sys.executable, "-m", "hsmwrap.cli", "keys", "rotate", "--key-prefix", prefix]

    def rotate(_):
        return subprocess.run(
            command,
            env=os.environ | softhsm.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(rotate, range(3)))
    assert all("Traceback" not in each.stderr for each in done)
    sets = json.loads(softhsm.run_keys("list", prefix))["key_sets"]
    newest = next(each["key_set"] for each in sets if each["current"])
    assert all("6 keys" in each["detail"] for each in sets)
    assert len(sets) == 1 + sum(each.returncode == 0 for each in done)
    assert current(settings) == newest


def test_there_is_a_highest_number(softhsm, attacker, prefix):
    settings = softhsm.settings(prefix, trusted=False)
    # SoftHSM overlooks what another process made before an object was made here (field note 42).
    assert len(attacker.own_keys(prefix)) == len(ROLES)
    attacker.plant_lookalike(prefix, Role.MATERIAL_AES, keys.HIGHEST_NUMBER)
    with pytest.raises(ConfigurationError, match="the highest that there can be"):
        Pkcs11Backend.rotate_keys(settings)


# --- running processes


@pytest.mark.parametrize("first", ["mac", "issue", "import"])
def test_a_running_process_goes_on_after_a_retirement(softhsm, prefix, first):
    """Within the minute in which it does not look for a new key set."""
    settings = softhsm.settings(prefix)
    with Pkcs11Backend.from_settings(settings) as backend:
        assert backend.mac(b"data").key_set == "1"
        bring(backend, issue(backend, OAEP1), secrets.token_bytes(32))
        softhsm.run_keys("rotate", prefix)
        softhsm.run_keys("retire", prefix, "1", "--force")
        if first == "mac":
            assert backend.mac(b"data").key_set == "2"
        key = issue(backend, OAEP1)
        assert parse_ref(key.private_key)[1] == 2
        assert bring(backend, key, secrets.token_bytes(32)).check_value
        assert backend.mac(b"data").key_set == "2"


def test_a_session_that_knows_the_mac_key_alone_goes_on_after_a_retirement(softhsm, prefix):
    settings = softhsm.settings(prefix)
    with Pkcs11Backend.from_settings(settings) as backend:
        backend.capabilities()
        assert backend.mac(b"data").key_set == "1"
        for session in backend._connection._connector.connected.pool._state.idle:
            del session.objects[f"{prefix}:{Role.WRAPPING_UNWRAP}:1"]
        softhsm.run_keys("rotate", prefix)
        softhsm.run_keys("retire", prefix, "1", "--force")
        assert parse_ref(issue(backend, OAEP1).private_key)[1] == 2


def test_an_import_goes_on_after_a_retirement(softhsm, prefix):
    """Of a resident wrapping key, which no key set seals; its material is sealed under the new."""
    settings = softhsm.settings(prefix, wrapping_custody="HsmInternal")
    with Pkcs11Backend.from_settings(settings) as backend:
        key = issue(backend, OAEP1)
        bring(backend, key, secrets.token_bytes(32))
        softhsm.run_keys("rotate", prefix)
        softhsm.run_keys("retire", prefix, "1", "--force")
        imported = bring(backend, key, secrets.token_bytes(32)).key
        assert int.from_bytes(imported.data[1:3], "big") == 2
        backend.discard_wrapping_key(key.private_key)


# --- the security officer's PIN


def test_the_officer_s_login_stops_before_it_locks_the_token(softhsm, tmp_path):
    """SoftHSM has SO_PIN_COUNT_LOW after one wrong PIN, until a right one."""
    token = make_softhsm(tmp_path / "token", "officer")
    wrong = tmp_path / "wrong"
    wrong.write_text("87654321")
    wrong.chmod(0o400)

    def init(so_pin_file, *more):
        command = [sys.executable, "-m", "hsmwrap.cli", "keys", "init", "--so-pin-file"]
        return subprocess.run(
            [*command, so_pin_file, *more],
            env=os.environ | token.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    right = token.environment["HSMWRAP_SO_PIN_FILE"]
    assert "PIN_INCORRECT" in init(wrong).stderr
    for so_pin_file in (wrong, right):
        stopped = init(so_pin_file)
        assert stopped.returncode == 1
        assert "SO_PIN_COUNT_LOW" in stopped.stderr
        assert "force_login" in stopped.stderr
    assert init(right, "--force-login").returncode == 0


@pytest.mark.parametrize("hidden", [len(PAUSES), len(PAUSES) + 1])
def test_the_officer_looks_again_for_a_token_that_a_login_hides(softhsm, monkeypatch, hidden):
    """SoftHSM writes the token's file at each login; others then see none (field note 35)."""
    settings = Pkcs11Settings.from_mapping(softhsm.bare_settings())
    looks, find = itertools.count(), admin.find_token

    def look(*arguments):
        if next(looks) < hidden:
            raise TokenSelectionError("none")
        return find(*arguments)

    monkeypatch.setattr(admin, "find_token", look)
    host = ModuleHost.acquire(settings.module)
    try:
        if hidden == len(PAUSES):
            admin._await_token(host, settings)
        else:
            with pytest.raises(TokenSelectionError):
                admin._await_token(host, settings)
    finally:
        host.release()


@pytest.mark.parametrize("flag", ["SO_PIN_COUNT_LOW", "SO_PIN_FINAL_TRY", "SO_PIN_LOCKED"])
def test_each_warning_of_the_token_stops_the_officer(flag):
    class Token:
        flags = TokenFlag[flag] | TokenFlag.USER_PIN_INITIALIZED

    with pytest.raises(PinError, match=flag):
        admin._require_safe(Token)


# --- what the HSM token has besides


class Foreign:
    """An object whose attributes are told as the HSM token tells them: in bytes."""

    handle = 4711

    def __init__(self, **attributes):
        mapper = HsmAttributeMapper()
        self._told = {
            Attribute[name]: value
            if isinstance(value, bytes)
            else mapper.pack_attribute(Attribute[name], value)
            for name, value in attributes.items()
        }

    def get_attributes(self, names):
        mapper = HsmAttributeMapper()
        told = {name: self._told[name] for name in names if name in self._told}
        return {name: mapper.unpack_attributes(name, value) for name, value in told.items()}


class Broken:
    """An object of which python-pkcs11 could read nothing, whatever the code was."""

    def get_attributes(self, _names):
        raise FunctionFailed

    def __getitem__(self, _name):
        raise FunctionFailed


class Gone(Broken):
    """An object that was destroyed after it was found."""

    handle = 4712

    def get_attributes(self, _names):
        raise ObjectHandleInvalid


class Session:
    def __init__(self, *objects, vanishing=0):
        self.objects, self.vanishing = objects, vanishing

    def generate_key(self, *_arguments, **_named):
        raise MechanismInvalid  # so nothing tells where a key came from

    def get_objects(self, _template):
        self.vanishing -= 1
        for each in self.objects:
            if self.vanishing >= 0:
                raise ObjectHandleInvalid
            yield each


def test_keys_that_others_destroy_meanwhile_stop_nothing():
    """Another backend's rotation in the same partition, for example."""
    mac = Foreign(LABEL="p:mac:1", KEY_TYPE=KeyType.GENERIC_SECRET)
    for vanishing in (0, 9):
        session = Session(mac, Gone(), vanishing=vanishing)
        assert KeySets("p").numbers(session) == {1}
    with pytest.raises(ObjectHandleInvalid):
        KeySets("p").numbers(Session(mac, vanishing=10))


class Stubborn(Broken):
    """Says that it is gone, once, and is still there."""

    def __init__(self, times):
        self.times = times

    def destroy(self):
        self.times -= 1
        if self.times >= 0:
            raise ObjectHandleInvalid


def test_what_only_seemed_to_be_gone_is_destroyed():
    assert KeySets("p").destroy(pooled(Stubborn(1)), 1) == len(Role)
    with pytest.raises(ObjectHandleInvalid):
        KeySets("p").destroy(pooled(Stubborn(2)), 1)


def pooled(*objects):
    return PooledSession(Session(*objects), lambda _session: True)


def test_a_foreign_key_of_a_vendor_s_type_stops_nothing():
    sm4 = Foreign(
        LABEL="theirs", CLASS=ObjectClass.SECRET_KEY, KEY_TYPE=by_number(KeyType, 1 << 31)
    )
    ours = Foreign(LABEL="p:mac:1", KEY_TYPE=by_number(KeyType, 1 << 31))
    assert KeySets("p").list(Session(sm4, ours)) == []


def test_key_types_round_trip():
    mapper = HsmAttributeMapper()
    for key_type in (KeyType.AES, KeyType.EC, by_number(KeyType, 0x80000004)):
        packed = mapper.pack_attribute(Attribute.KEY_TYPE, key_type)
        assert mapper.unpack_attributes(Attribute.KEY_TYPE, packed) == key_type
    packed = mapper.pack_attribute(Attribute.KEY_TYPE, KeyType.AES)
    assert mapper.unpack_attributes(Attribute.KEY_TYPE, packed) is KeyType.AES


@pytest.mark.parametrize(
    "read",
    [lambda key: KeySets("p").list(Session(key)), rsa.public_key_der, sm2.public_key_der],
    ids=["key sets", "RSA", "SM2"],
)
def test_a_failed_reading_costs_the_session(read):
    """It may be the session's fault or the device's, and is told apart by the next use."""
    with pytest.raises(SessionHandleInvalid):
        read(Broken())


# --- references


def test_discarding_a_reference_without_an_id_destroys_nothing(softhsm, attacker, prefix):
    nameless, _ = attacker.known_key(TOKEN=True, ID=b"")
    with (
        Pkcs11Backend.from_settings(softhsm.settings(prefix)) as backend,
        pytest.raises(InvalidImportToken),
    ):
        backend.discard_wrapping_key(WrappingKeyStore.resident(Role.WRAPPING_UNWRAP, b""))
    assert nameless[Attribute.ID] == b""
    nameless.destroy()
