"""Key sets and profiles of an HSM that has SM2 and SM4 of its vendor's and no AES, played."""

import json
import secrets
from pathlib import Path

import pytest
from pkcs11.constants import Attribute
from pkcs11.mechanisms import KeyType
from support import forked
from support.faults.shim import fault_shim
from support.importing import (
    AES,
    MATERIAL,
    OAEP1,
    OAEP256,
    PKCS1,
    RSA_ALGORITHMS,
    SM2PKE,
    SM4,
    flip,
)
from support.pkcs11.holder import lent_session
from support.pkcs11.sm4_importing import told
from support.pkcs11.sm4_vendors import KEY_WRAP, KEYS, MODES, table
from support.pkcs11.sm_only import WITH_AES, WITH_RSA, bring, issue, played
from support.pkcs11.vendors import by_officer

from hsmwrap import registry
from hsmwrap.backend import Custody, Exposure, HasKeySets, ReSealsKeys
from hsmwrap.catalog import WrappingKeySpec
from hsmwrap.checkvalue import METHOD_SM4_ECB, check_value
from hsmwrap.errors import (
    ConfigurationError,
    HsmError,
    InvalidKeyMaterial,
    KeyNotFound,
    UnsupportedOperation,
)
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding.profiles import by_number
from hsmwrap.pkcs11.binding.templates import secret_key, stored
from hsmwrap.pkcs11.keysets import needs
from hsmwrap.pkcs11.keysets.cloning import WrappedSets
from hsmwrap.pkcs11.keysets.keys import Role
from hsmwrap.pkcs11.keysets.wrapped import Proof, WrappedSet
from hsmwrap.pkcs11.wrapping import probe
from hsmwrap.pkcs11.wrapping.material import parse_key_ref
from hsmwrap.testing._conformance.base import tomorrow
from hsmwrap.testing.clients import pyca_encrypt
from hsmwrap.testing.softhsm import SoftHsm

SEALED, RESIDENT = Custody.HSM_ENCRYPTED_DATABASE, Custody.HSM_INTERNAL
SM4_TYPE = by_number(KeyType, KEYS["key_type"])
WITHOUT_WRAP = table(**KEYS, **MODES)
WITHOUT_CBC = {name: number for name, number in MODES.items() if name != "cbc"}


@pytest.fixture(scope="module")
def play(shim, softhsm, tmp_path_factory):
    """Settings for the HSM, with a key set under a prefix that is given."""

    def of(prefix, sm4=None, **more):
        directory = tmp_path_factory.mktemp("profile")
        return played(shim, directory, softhsm, prefix, sm4, **more)

    return of


# --- key sets -------------------------------------------------------------------------------------


def test_a_key_moves_to_the_next_set_and_the_old_one_is_retired(play, softhsm):
    settings, material = play("moved"), secrets.token_bytes(16)
    with registry.open_backend("pkcs11", settings) as opened:
        imported = bring(opened, issue(opened), material)
        message = opened.encrypt(imported.key, b"message")
    by_officer("rotate", settings, softhsm)
    with registry.open_backend("pkcs11", settings) as opened:
        reseals, wrong = ReSealsKeys.of(opened), flip(imported.check_value, 100)
        with pytest.raises(HsmError, match="check value"):
            reseals.reseal(imported.key, expected_check_value=wrong)
        moved = reseals.reseal(imported.key, expected_check_value=imported.check_value)
        assert (parse_key_ref(imported.key)[0], parse_key_ref(moved)[0]) == (1, 2)
        assert opened.decrypt(moved, message) == b"message"
    Pkcs11Backend.retire_keys(settings, "1")
    with registry.open_backend("pkcs11", settings) as opened:
        assert opened.decrypt(moved, message) == b"message"
        with pytest.raises(KeyNotFound):
            opened.decrypt(imported.key, message)


def test_keys_move_from_aes_keys_to_sm4_keys_and_back(play, softhsm, tmp_path):
    """An HSM that has both; `key_wraps` of the profile says which seal."""
    settings = play("both", hsm=WITH_AES)
    assert "key-encryption keys trusted" in Pkcs11Backend.list_keys(settings)[0].detail
    by_sm4 = tmp_path / "by-sm4.toml"
    text = Path(settings["profile_file"]).read_text()
    by_sm4.write_text(f"{text}\n[asked]\nkey_wraps = []\n")
    with registry.open_backend("pkcs11", settings) as opened:
        key = issue(opened)
        keys = [bring(opened, key, MATERIAL[spec], spec) for spec in (AES, SM4)]
        messages = [opened.encrypt(each.key, b"message") for each in keys]
    references = [each.key for each in keys]
    for number, profile in (("2", str(by_sm4)), ("3", settings["profile_file"])):
        named = {**settings, "profile_file": profile}
        by_officer("rotate", named, softhsm)
        detail = Pkcs11Backend.list_keys(named)[-1].detail
        assert ("of SM4" in detail) == (number == "2")
        with registry.open_backend("pkcs11", named) as opened:
            reseals = ReSealsKeys.of(opened)
            references = [
                reseals.reseal(reference, expected_check_value=imported.check_value)
                for reference, imported in zip(references, keys, strict=True)
            ]
            assert {reseals.key_set_of(each) for each in references} == {number}
            for reference, message in zip(references, messages, strict=True):
                assert opened.decrypt(reference, message) == b"message"
            again = bring(opened, issue(opened), MATERIAL[AES], AES)
            assert (again.check_value, again.key.custody) == (keys[0].check_value, SEALED)


def test_keys_of_an_untrusted_set_do_not_move_and_that_is_said(play):
    settings = play("stays", trusted=False)
    with registry.open_backend("pkcs11", settings) as opened:
        key = bring(opened, issue(opened)).key
    Pkcs11Backend.rotate_keys(settings)
    with (
        registry.open_backend("pkcs11", settings) as opened,
        pytest.raises(UnsupportedOperation, match="keys do not move"),
    ):
        ReSealsKeys.of(opened).reseal(key)


def settings_file(settings, file):
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    return str(file)


def test_a_clone_takes_sm4_keys_along_where_there_is_rsa(softhsm, tmp_path):
    """Two tokens of one module; what was sealed on one opens on the other."""
    tokens = {}
    for name in ("source", "target"):
        tokens[name] = SoftHsm.make(tmp_path / "both", name)
        for pin in ("user", "so"):
            named = tmp_path / f"{name}-{pin}.pin"
            (tmp_path / "both" / f"{pin}.pin").rename(named)
    shim, settings, files = fault_shim(softhsm.module, tmp_path / "shim"), {}, {}
    for name, token in tokens.items():
        token.environment["HSMWRAP_PIN_FILE"] = str(tmp_path / f"{name}-user.pin")
        settings[name] = WITH_RSA.play(shim, tmp_path, token, key_prefix="cloned")
        files[name] = settings_file(settings[name], tmp_path / f"{name}.toml")

    def command(action, *more):
        given = ["--settings", files["source"], "--so-pin-file", f"{tmp_path}/source-so.pin"]
        return run("support.pkcs11.keys_command", arguments=["keys", action, *given, *more])

    def run(module, **arguments):
        done = forked.run(module, tokens["source"].environment, **arguments)
        assert not done.returncode, done.stderr
        return done.stdout

    command("init")
    key, message = json.loads(run("support.pkcs11.sm_only", settings=settings["source"]))
    to = ("--to", files["target"], "--to-so-pin-file", f"{tmp_path}/target-so.pin")
    assert "of SM4 trusted" in command("clone", *to)
    used = {"settings": settings["target"], "key": key, "message": message}
    run("support.pkcs11.sm_only", **used)

    by_aes = {n: v for n, v in settings["target"].items() if n != "profile_file"}
    shim.play(None)
    shim.restrict()
    files["aes"] = settings_file({**by_aes, "key_prefix": "by-aes"}, tmp_path / "aes.toml")
    so_pin = f"{tmp_path}/target-so.pin"
    given = ["--settings", files["aes"], "--so-pin-file", so_pin, "--out", f"{tmp_path}/transport"]
    transport = json.loads(
        run("support.pkcs11.keys_command", arguments=["keys", "transport-key", *given, "--json"])
    )
    exported = WrappedSet(1, "word", "SM4", {Role.MAC: b"m"}, Proof(b"", bytes(32)))
    file = WrappedSets(transport["fingerprint"], (exported,))
    (tmp_path / "sets").write_text(file.to_json())
    given[-2:] = ["--file", f"{tmp_path}/sets", "--fingerprint", file.fingerprint]
    arguments = ["keys", "import", *given]
    done = forked.run(
        "support.pkcs11.keys_command", tokens["source"].environment, arguments=arguments
    )
    assert "key set 1 seals by SM4 keys, and this HSM token by AES keys" in done.stderr


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("backup", "--shares", "3", "--threshold", "2"), "a backup key is an AES key"),
        (("transport-key",), "this one has no RSA: C_GenerateKeyPair"),
    ],
)
def test_neither_backup_nor_clone_without_aes_and_rsa(play, softhsm, tmp_path, command, why):
    settings = play("leaves")
    file = settings_file(settings, tmp_path / "hsm.toml")
    arguments = ["keys", *command, "--settings", file, "--out", str(tmp_path / "new")]
    arguments += ["--so-pin-file", softhsm.environment["HSMWRAP_SO_PIN_FILE"]]
    if command[0] == "backup":
        arguments += ["--shares-to", str(tmp_path)]
    done = forked.run("support.pkcs11.keys_command", arguments=arguments)
    assert (done.returncode != 0, why in done.stderr) == (True, True), done.stderr
    assert not (tmp_path / "new").exists()
    assert len(Pkcs11Backend.list_keys(settings)) == 1


def test_the_doctor_says_what_is_served_and_what_is_missing(play, tmp_path):
    file = settings_file(play("examined"), tmp_path / "hsm.toml")
    needed = ["--require", "EC_SM2:SM2PKE:in_hsm"]
    arguments = ["doctor", "--settings", file, *needed, "--json"]
    done = forked.run("support.pkcs11.keys_command", arguments=arguments)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert "key-encryption keys of SM4 trusted" in document["key_sets"][0]["detail"]
    examined = document["examination"]
    assert [each["wrapping_algorithm"] for each in examined["rows"] if each["served"]] == ["SM2PKE"]
    assert [each["key_spec"] for each in examined["keys"]] == ["Aliyun_SM4"]
    (failed,) = (each for each in examined["failed"] if each["step"] == "make an AES key")
    assert "Aliyun_AES_256 keys are not imported" in failed["consequence"]
    assert any("The HSM token has no AES" in each for each in examined["notes"])


# --- RSA ------------------------------------------------------------------------------------------


def test_rsa_imports_sm4_keys_and_those_alone(play):
    settings = play("rsa", hsm=WITH_RSA)
    with registry.open_backend("pkcs11", settings) as opened:
        report = opened.capabilities()
        served = {each.algorithm: each.exposure for each in report.wrapping}
        inside = dict.fromkeys((PKCS1, OAEP1, SM2PKE), Exposure.IN_HSM)
        assert served == {**inside, OAEP256: Exposure.HOST}
        assert [each.key_spec for each in report.keys] == [SM4]
        for algorithm in RSA_ALGORITHMS:
            spec = WrappingKeySpec.RSA_2048
            key = opened.generate_wrapping_key(spec, algorithm, expires_at=tomorrow())

            def import_(material, key=key):
                ciphertext = pyca_encrypt(key.algorithm, key.public_key, material)
                arguments = key.private_key, key.algorithm, ciphertext
                return opened.unwrap_material(*arguments, key_spec=SM4)

            imported = import_(MATERIAL[SM4])
            assert imported.check_value == check_value(MATERIAL[SM4], METHOD_SM4_ECB)
            assert opened.decrypt(imported.key, opened.encrypt(imported.key, b"m")) == b"m"
            for length in (8, 15, 17, 32):
                with pytest.raises(InvalidKeyMaterial):
                    import_(bytes(length))


def test_an_hsm_that_takes_sm4_keys_of_any_length_unwraps_none_by_rsa(play, monkeypatch):
    settings, import_ = play("lengths", hsm=WITH_RSA), probe.Probe._import

    def lenient(self, store, trial, key_spec, length=None):
        return True if length else import_(self, store, trial, key_spec)

    monkeypatch.setattr(probe.Probe, "_import", lenient)
    with registry.open_backend("pkcs11", settings) as opened:
        row = next(w for w in opened.capabilities().wrapping if w.algorithm is OAEP1)
    assert row.exposure is Exposure.HOST
    assert "a key of 32 bytes passes for one of 16" in row.reason


# --- what the profile does not say, or says wrongly -----------------------------------------------


@pytest.mark.parametrize(
    ("sm4", "says"),
    [
        (WITHOUT_WRAP, "no working SM4 key wrap"),
        (table(**KEYS, **MODES, key_wrap=0x8000AFFF), "no working SM4 key wrap"),
        (table(**KEYS, **WITHOUT_CBC, key_wrap=MODES["cbc"]), "no working SM4 key wrap"),
    ],
)
def test_without_key_wrap_keys_are_objects(play, sm4, says):
    settings = play(f"objects-{len(sm4)}-{sm4[-7:-1]}", sm4)
    assert "1 key," in Pkcs11Backend.list_keys(settings)[0].detail
    with registry.open_backend("pkcs11", settings) as opened:
        report = opened.capabilities()
        assert {each.custody for each in (*report.wrapping, *report.keys)} == {RESIDENT}
        assert report.wrapping[0].exposure is Exposure.IN_HSM
        assert says in told(report)
        key = issue(opened)
        imported = bring(opened, key)
        assert imported.check_value == check_value(MATERIAL[SM4], METHOD_SM4_ECB)
        assert opened.decrypt(imported.key, opened.encrypt(imported.key, b"m")) == b"m"
        opened.destroy_key(imported.key)
        opened.discard_wrapping_key(key.private_key)


def test_a_key_wrap_that_does_not_authenticate_seals_nothing(play, monkeypatch):
    settings = play("changed")
    for module in (needs, probe):
        monkeypatch.setattr(module, "refuses_changed", lambda *_: False)
    unsealed = play("unsealed", trusted=False)
    assert "1 key," in Pkcs11Backend.list_keys(unsealed)[0].detail
    with registry.open_backend("pkcs11", settings) as opened:
        report = opened.capabilities()
    assert {each.custody for each in report.keys} == {RESIDENT}
    assert any("a wrapped key unwraps that was changed" in each.wrong for each in report.failed)


def test_a_module_without_any_cipher_has_session_objects_all_the_same(play, shim):
    """What is missing is told by its name."""
    plain = play("nothing", trusted=False)
    del plain["profile_file"]
    plain["profile"] = "generic"
    made = shim.counters().token_objects_created
    Pkcs11Backend.initialise_keys({**plain, "key_prefix": "sm-less"})
    assert shim.counters().token_objects_created == made + 1
    with registry.open_backend("pkcs11", plain) as opened:
        report = opened.capabilities()
    assert (report.wrapping, report.keys) == ((), ())
    assert "make an AES key" in told(report)
    assert "make a session object" not in told(report)


def test_a_profile_that_seals_says_how_keys_are_generated(play):
    del (modes := dict(KEYS))["generate"]
    with pytest.raises(ConfigurationError, match="give generate beside key_wrap"):
        play("unread", table(**modes, **MODES, key_wrap=KEY_WRAP))


def test_a_planted_key_set_is_not_used(play):
    """Keys of known values with the labels of a newer set; the control is a set of hsmwrap's."""
    settings = play("planted", trusted=False)
    with registry.open_backend("pkcs11", settings) as opened:
        keys = opened.ability(Pkcs11Backend)._keys
        with lent_session(opened) as session:
            for role in (Role.MATERIAL_SM4, Role.MAC):
                mac = role is Role.MAC
                template = secret_key(
                    KeyType.GENERIC_SECRET if mac else SM4_TYPE,
                    *((Attribute.SIGN,) if mac else (Attribute.WRAP, Attribute.UNWRAP)),
                )
                named = stored(template, keys.key_id(role, 2, "planted"), keys.label(role, 2))
                value = secrets.token_bytes(32 if mac else 16)
                session.create_object({**named, Attribute.VALUE: value})
        assert HasKeySets.of(opened).current_key_set() == "1"
    assert [each.key_set for each in Pkcs11Backend.list_keys(settings)] == ["1"]
    Pkcs11Backend.rotate_keys(settings)
    assert Pkcs11Backend.list_keys(settings)[-1].current
