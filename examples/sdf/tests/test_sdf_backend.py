"""The plug-in over the simulated device: an import from end to end, and what goes wrong."""

import multiprocessing
import secrets
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import simulated

from hsmwrap import Cmk, Deployment, ImportService, KeySpec, ProtectionLevel, open_backend
from hsmwrap.backend import (
    CountsObjects,
    Custody,
    DescribesHsm,
    Exposure,
    KeyRef,
    Mac,
    Outcome,
    ReSealsKeys,
)
from hsmwrap.errors import (
    CombinationRefused,
    ConfigurationError,
    HsmError,
    HsmUnavailable,
    InvalidImportToken,
    InvalidKeyMaterial,
    InvalidMac,
    KeyNotFound,
    PinError,
    SelfTestFailed,
    TooManyWrappingKeys,
    UnsupportedOperation,
)
from hsmwrap.guard import guarded
from hsmwrap.registry import load
from hsmwrap.sm2 import decode_spki, decrypt_with_point, open_engine, sm3
from hsmwrap.sm2.known_answer import CIPHERTEXT, MESSAGE, PRIVATE, PUBLIC
from hsmwrap.testing.clients import decrypt_message, openssl_encrypt
from hsmwrap_sdf import SdfBackend
from hsmwrap_sdf.backend import SM2PKE
from hsmwrap_sdf.binding import COORDINATE, FIELD, Library, Point, SdfError
from hsmwrap_sdf.keysets import KeySets, mac_under
from hsmwrap_sdf.settings import SdfSettings

pytestmark = pytest.mark.slow

SM4 = KeySpec.ALIYUN_SM4
RIGHT, EXCHANGE = "SDF_GetPrivateKeyAccessRight", "SDF_ExchangeDigitEnvelopeBaseOnECC"
OF_A_VENDOR = 0x0101ABCD
COMMFAIL, PRKRERR, ENCDATAERR = 0x01000003, 0x01000018, 0x01000016


def tomorrow():
    return datetime.now(UTC) + timedelta(hours=24)


def wrapping_key(backend):
    return backend.generate_wrapping_key(*SM2PKE, expires_at=tomorrow())


def bring(backend, material=None, key=None):
    """Import key material as a client does."""
    key = key or wrapping_key(backend)
    ciphertext = openssl_encrypt(key.algorithm, key.public_key, material or secrets.token_bytes(16))
    return unwrap(backend, key, ciphertext)


def unwrap(backend, key, ciphertext):
    return backend.unwrap_material(key.private_key, key.algorithm, ciphertext, key_spec=SM4)


# --- what it does


def test_it_is_found_by_its_entry_point():
    assert load("sdf") is SdfBackend


def test_an_sm4_key_is_imported_into_the_device_and_used(sdf_settings, device):
    with open_backend("sdf", sdf_settings) as sdf:
        service = ImportService({ProtectionLevel.HSM: sdf}, Deployment.of_region("cn-hangzhou"))
        cmk = Cmk("key-1", SM4, ProtectionLevel.HSM)
        parameters = service.get_parameters_for_import(cmk, "EC_SM2", "SM2PKE")
        ciphertext = openssl_encrypt(parameters.algorithm, parameters.public_key, bytes(range(16)))
        imported = service.import_key_material(cmk, ciphertext, parameters.import_token).imported
        assert imported.exposure is Exposure.IN_HSM
        message = sdf.encrypt(imported.key, b"attack at dawn", b"context")
        assert sdf.decrypt(imported.key, message, b"context") == b"attack at dawn"
        assert (message[0], device.keys) == (2, 0)


def test_what_it_does_not_serve_is_refused_and_reported(sdf):
    service = ImportService({ProtectionLevel.HSM: sdf}, Deployment.of_region("cn-hangzhou"))
    aes = Cmk("key-1", KeySpec.ALIYUN_AES_256, ProtectionLevel.HSM)
    with pytest.raises((UnsupportedOperation, CombinationRefused)):
        service.get_parameters_for_import(aes, "EC_SM2", "SM2PKE")
    with pytest.raises((UnsupportedOperation, CombinationRefused)):
        service.get_parameters_for_import(aes, "RSA_2048", "RSAES_OAEP_SHA_256")
    report = sdf.capabilities()
    assert len(report.missing) == 3
    assert "AES keys are refused" in " ".join(report.notes)


def test_the_simulator_decrypts_the_standard_s_example(device, sdf_settings):
    """GM/T 0003.5, C.2, which is longer than a key: by the exchange, for the private key 1."""
    index = 3
    (device.directory / f"pair-{index}").write_bytes(PRIVATE)
    with SdfBackend.from_settings(sdf_settings)._device.session() as session:
        key = session.public_key(index)
        assert b"\x04" + key.x + key.y == PUBLIC
        g = Point(*(each.to_bytes(FIELD) for each in _generator()))
        out = session.exchange(index, g, CIPHERTEXT)
    assert decrypt_with_point(out, out.x.to_bytes(FIELD), out.y.to_bytes(FIELD)) == MESSAGE


def _generator():
    from hsmwrap.sm2.curve import GX, GY

    return GX, GY


def test_a_program_with_the_password_reads_keys_as_the_report_says(sdf, sdf_settings):
    material = secrets.token_bytes(16)
    imported = bring(sdf, material)
    engine = open_engine("libcrypto")
    ours = engine.generate()
    plugin = SdfBackend.from_settings(sdf_settings)
    with plugin._device.session() as session:
        key_set, envelope = plugin._open(session, imported.key)
        to = Point(ours.public[1 : 1 + FIELD], ours.public[1 + FIELD :])
        read = session.exchange(key_set.storage_index, to, envelope)
    plugin.close()
    assert engine.decrypt(ours.private, ours.public, read) == material
    (protection,) = sdf.capabilities().protections
    assert protection.outcome is Outcome.NOT_HONOURED


def test_the_mac_is_as_documented(sdf, sdf_settings):
    """CBC-MACs of a label and the SM3 of the data, under a key that pyca knows too."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    known, data = secrets.token_bytes(16), secrets.token_bytes(1000)
    right = b""
    for part in (b"\x01", b"\x02"):
        cbc = Cipher(algorithms.SM4(known), modes.CBC(bytes(16))).encryptor()
        right += cbc.update(b"import token\0\0\0" + part + sm3(data))[-16:]
    plugin = SdfBackend.from_settings(sdf_settings)
    with plugin._device.session() as session:
        envelope = session.encrypt_for(session.public_key(simulated.STORAGE), known)
        with session.opened(simulated.STORAGE, envelope) as key:
            assert mac_under(key, b"import token", data) == right
            assert mac_under(key, b"sealed key", data) != right
    plugin.close()


def test_long_messages_are_encrypted_in_pieces(sdf, device):
    material, plaintext = secrets.token_bytes(16), secrets.token_bytes(20000)
    key = bring(sdf, material).key
    before = device.calls("SDF_Encrypt")
    message = sdf.encrypt(key, plaintext)
    assert device.calls("SDF_Encrypt") - before == 2 + 3 + 3
    assert sdf.decrypt(key, message) == plaintext
    assert decrypt_message(SM4, material, message, b"") == plaintext


# --- replay, and planted keys


def test_a_ciphertext_of_an_earlier_import_token_is_refused(sdf_settings):
    with guarded(SdfBackend.from_settings(sdf_settings | {"pool": [10]})) as sdf:
        earlier = wrapping_key(sdf)
        captured = openssl_encrypt(earlier.algorithm, earlier.public_key, bytes(16))
        unwrap(sdf, earlier, captured)
        unwrap(sdf, earlier, captured)  # a token serves for its 24 hours
        sdf.discard_wrapping_key(earlier.private_key)
        present = wrapping_key(sdf)
        assert present.public_key == earlier.public_key
        with pytest.raises(InvalidImportToken):
            unwrap(sdf, earlier, captured)
        with pytest.raises(InvalidKeyMaterial):
            unwrap(sdf, present, captured)
        bring(sdf, key=present)


def test_a_pair_serves_one_import_token_where_pairs_are_not_reused(device, sdf_settings):
    settings = sdf_settings | {"pool": [200], "reuse_pairs": False}
    device.make_pairs(200)
    with guarded(SdfBackend.from_settings(settings)) as sdf:
        first = wrapping_key(sdf)
        sdf.discard_wrapping_key(first.private_key)
        with pytest.raises(TooManyWrappingKeys):
            wrapping_key(sdf)
        device.make_pairs(200)
        assert sdf.health().facts["pairs_used_up"] == 1
    with guarded(SdfBackend.from_settings(settings)) as sdf:
        assert wrapping_key(sdf).public_key != first.public_key


def test_a_key_that_the_device_did_not_seal_is_not_one(sdf, sdf_settings):
    """An envelope under the storage pair's public key, which each program can make, has no MAC."""
    imported = bring(sdf)
    plugin = SdfBackend.from_settings(sdf_settings)
    with plugin._device.session() as session:
        planted = session.encrypt_for(session.public_key(simulated.STORAGE), bytes(16))
        data = plugin._seal(session, plugin._key_sets.current(), SM4, planted)
    plugin.close()
    genuine = replace(imported.key, data=data)
    assert sdf.encrypt(genuine, b"m")  # the control: with a MAC it is one
    for bad in (data[:-32] + imported.key.data[-32:], data[:-1], b"\x02" + data[1:], b""):
        with pytest.raises(KeyNotFound):
            sdf.encrypt(replace(genuine, data=bad), b"m")


def test_a_key_of_another_name_is_not_one(sdf, sdf_settings):
    key = replace(bring(sdf).key, backend="another")
    with guarded(SdfBackend.from_settings(sdf_settings | {"name": "another"})) as other:
        assert other.encrypt(bring(other).key, b"m")
        with pytest.raises(KeyNotFound, match="not a sealed key of this backend"):
            other.encrypt(key, b"m")


def test_an_envelope_of_another_length_is_not_sealed(sdf_settings):
    with SdfBackend.from_settings(sdf_settings) as plugin, plugin._device.session() as session:
        envelope = session.encrypt_for(session.public_key(simulated.STORAGE), bytes(17))
        with pytest.raises(HsmError, match="of another length"):
            plugin._seal(session, plugin._key_sets.current(), SM4, envelope)


def test_a_mac_key_that_was_exchanged_verifies_nothing(sdf, sdf_settings, tmp_path):
    mac = sdf.mac(b"data")
    path = tmp_path / "state" / "key-set-1.json"
    text = path.read_text()
    path.write_text(text[: text.index('"mac_key": "') + 12] + "00" * 16 + '"}')
    with guarded(SdfBackend.from_settings(sdf_settings)) as other, pytest.raises(InvalidMac):
        other.verify_mac(b"data", mac)


def test_a_damaged_key_set_file_says_so(sdf_settings, tmp_path):
    (tmp_path / "state" / "key-set-1.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="key set 1: its file is damaged"):
        SdfBackend.from_settings(sdf_settings)


# --- the device refuses


def test_a_wrong_password_is_tried_once(sdf_settings, device, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"another password")
    wrong.chmod(0o400)
    before = device.calls(RIGHT)
    with pytest.raises(PinError, match="index 1; it is not tried again") as refused:
        SdfBackend.from_settings(sdf_settings | {"password_file": str(wrong)})
    assert device.calls(RIGHT) - before == 1
    assert "another password" not in repr(refused.value)


def test_a_password_that_is_refused_later_is_not_tried_again(sdf, device):
    key = bring(sdf).key
    device.fail(RIGHT, PRKRERR)
    before = device.calls(RIGHT)
    for _ in range(5):
        with pytest.raises(PinError):
            sdf.encrypt(key, b"m")
    assert device.calls(RIGHT) - before == 1
    assert device.keys == 0
    assert "refused the password" in sdf.health().detail
    assert not sdf.health().ready


def test_a_wrong_ciphertext_is_the_client_s_error_and_a_failure_is_not(sdf, device):
    key = wrapping_key(sdf)
    good = openssl_encrypt(key.algorithm, key.public_key, bytes(16))
    for code, error in ((ENCDATAERR, InvalidKeyMaterial), (OF_A_VENDOR, HsmError)):
        device.fail(EXCHANGE, code)
        with pytest.raises(error) as raised:
            unwrap(sdf, key, good)
        assert type(raised.value) is error
    # The sealed envelope is the device's own, and the other calls take nothing from a client.
    for function in (RIGHT, "SDF_ReleasePrivateKeyAccessRight", "SDF_ImportKeyWithISK_ECC"):
        device.fail(function, ENCDATAERR)
        with pytest.raises(HsmError, match=rf"{function} answered 0x01000016 \(SDR_ENC"):
            unwrap(sdf, key, good)
    unwrap(sdf, key, good)
    assert device.keys == 0


FUNCTIONS = (
    "SDF_ExportEncPublicKey_ECC",
    RIGHT,
    EXCHANGE,
    "SDF_ReleasePrivateKeyAccessRight",
    "SDF_ImportKeyWithISK_ECC",
    "SDF_ImportKeyWithKEK",
    "SDF_Encrypt",
    "SDF_DestroyKey",
)


@pytest.mark.parametrize(
    ("code", "error"),
    [(COMMFAIL, "HsmUnavailable"), (OF_A_VENDOR, "HsmError"), (0x0100001C, "HsmResourceExhausted")],
)
def test_every_failure_is_typed_and_leaves_nothing(sdf, device, code, error):
    key = wrapping_key(sdf)
    ciphertext = openssl_encrypt(key.algorithm, key.public_key, bytes(16))
    for function in FUNCTIONS:
        device.fail(function, code)
        with pytest.raises(
            HsmError if error == "HsmError" else HsmUnavailable.__mro__[2]
        ) as raised:
            unwrap(sdf, key, ciphertext)
        assert (type(raised.value).__name__, function in str(raised.value)) == (error, True)
        unwrap(sdf, key, ciphertext)
        assert device.keys == 0


def test_an_outage_ends_by_itself(sdf, device):
    key = bring(sdf).key
    device.fail("SDF_OpenDevice", 0x01000005, times=2)
    device.fail("SDF_ImportKeyWithKEK", OF_A_VENDOR)
    with pytest.raises(HsmError):
        sdf.encrypt(key, b"m")
    until = time.monotonic() + 30
    saw_it = False
    while not sdf.health().ready:
        saw_it = True
        assert time.monotonic() < until
        time.sleep(0.01)
    assert saw_it
    assert sdf.decrypt(key, sdf.encrypt(key, b"m")) == b"m"


def test_a_call_to_a_lost_device_fails_at_once(sdf, device):
    key = bring(sdf).key
    device.fail("SDF_OpenDevice", 0x01000005, times=10**6)
    try:
        device.fail("SDF_ImportKeyWithKEK", COMMFAIL)
        before = device.calls("SDF_OpenDevice")
        for _ in range(20):
            with pytest.raises(HsmUnavailable):
                sdf.encrypt(key, b"m")
        assert not sdf.health().ready
        assert "SDF_OpenDevice answered 0x01000005 (SDR_OPENDEVICE)" in sdf.health().detail
    finally:
        calls = device.calls("SDF_OpenDevice") - before
        device.fail("SDF_OpenDevice", 0, times=0)
    assert calls < 15


def test_what_the_device_says_it_is_has_no_serial_number(sdf):
    description = DescribesHsm.of(sdf).describe_hsm()
    assert (description.manufacturer, description.model) == ("hsmwrap", "simulated")
    assert description.library == "SDF, version 1 of GM/T 0018"
    assert "serial" not in repr(description)


def test_a_forked_child_opens_the_device_anew(sdf_settings, device):
    """And waits for no lock that another thread of its parent held."""
    with SdfBackend.from_settings(sdf_settings) as plugin:
        key = bring(plugin).key
        before = device.calls("SDF_OpenDevice")
        ours, theirs = multiprocessing.Pipe(duplex=False)

        def use():
            message = plugin.encrypt(key, b"m")
            theirs.send((plugin.decrypt(key, message), device.calls("SDF_OpenDevice")))

        child = multiprocessing.get_context("fork").Process(target=use)
        with plugin._device._lock:
            child.start()
        try:
            assert ours.poll(30), "the child hangs"
            assert ours.recv() == (b"m", before + 1)
        finally:
            child.kill()
            child.join()
        plugin.encrypt(key, b"m")
        assert device.calls("SDF_OpenDevice") == before


def test_closing_leaves_no_session(sdf_settings, device):
    before = device.sessions
    with guarded(SdfBackend.from_settings(sdf_settings)) as sdf:
        bring(sdf)
        assert device.sessions > before
        inside = sdf.ability(SdfBackend)
    assert device.sessions == before
    with pytest.raises(HsmUnavailable, match="was closed"), inside._device.session():
        pass


# --- devices that are not as they should be


@pytest.fixture(scope="session")
def edition_2023(tmp_path_factory):
    return simulated.build(tmp_path_factory.mktemp("sdf-2023"), "-DEDITION=2023")


def test_the_edition_of_2023_says_why_nothing_is_imported(sdf_settings, edition_2023):
    with guarded(SdfBackend.from_settings(sdf_settings | {"library": str(edition_2023)})) as sdf:
        report = sdf.capabilities()
        assert (report.wrapping, report.keys) == ((), ())
        missing = {each.algorithm: each for each in report.missing}[SM2PKE[1]]
        assert "the edition of 2023 left it out" in missing.reason
        assert missing.tried[0].code == 0x01000002
        with pytest.raises(UnsupportedOperation):
            wrapping_key(sdf)
        sdf.verify_mac(b"data", sdf.mac(b"data"))


def test_a_device_that_takes_a_wrong_hash_is_refused(sdf_settings, monkeypatch):
    exchange = Library.exchange

    def forgiving(self, session, index, to, envelope):
        try:
            return exchange(self, session, index, to, envelope)
        except SdfError:
            return envelope

    monkeypatch.setattr(Library, "exchange", forgiving)
    with pytest.raises(SelfTestFailed, match="takes an envelope with a wrong hash"):
        SdfBackend.from_settings(sdf_settings)


def test_a_device_whose_refusal_looks_like_a_failure_is_refused(sdf_settings, monkeypatch):
    exchange = Library.exchange

    def unclear(self, session, index, to, envelope):
        try:
            return exchange(self, session, index, to, envelope)
        except SdfError as error:
            raise SdfError(error.function, COMMFAIL) from None

    monkeypatch.setattr(Library, "exchange", unclear)
    with pytest.raises(SelfTestFailed, match="cannot be told from a wrong ciphertext"):
        SdfBackend.from_settings(sdf_settings)


def test_a_device_whose_sm4_is_another_cipher_is_refused(sdf_settings, monkeypatch):
    monkeypatch.setattr(Library, "sm4", lambda self, session, key, algorithm, iv, blocks: blocks)
    with pytest.raises(SelfTestFailed, match="is not SM4"):
        SdfBackend.from_settings(sdf_settings)


def test_a_structure_of_another_size_does_not_fit():
    """The layout of GM/T 0018: 64 bytes for a coordinate, the length before C."""
    from hsmwrap_sdf.binding import _Cipher, _PublicKey

    assert (_PublicKey.x.offset, _PublicKey.y.offset) == (4, 4 + COORDINATE)
    assert [_Cipher.m.offset, _Cipher.length.offset, _Cipher.c.offset] == [128, 160, 164]


# --- settings


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"pool": []}, "pool: takes a list of indexes and ranges"),
        ({"pool": ["20-10"]}, "pool"),
        ({"pool": [10, "9-11"]}, "pool"),
        ({"pool": [0]}, "pool"),
        ({"pool": ["x"]}, "pool"),
        ({"pool": [simulated.STORAGE, 10]}, "index 1 is in the pool, and its pair seals keys"),
        ({"storage_index": 10}, "index 10 is in the pool, and its pair seals keys"),
        ({"library": "/nonexistent.so"}, "does not load"),
        ({"library": "libc.so.6"}, "has no SDF_OpenDevice"),
        ({"state_directory": "/nonexistent"}, "mkdir -m 700"),
        ({"reuse_pairs": None}, "reuse_pairs"),
    ],
)
def test_settings_that_do_not_fit_say_what_would(sdf_settings, changed, text):
    with pytest.raises(ConfigurationError, match=text):
        SdfBackend.from_settings(sdf_settings | changed)


def test_the_operator_has_to_choose_whether_pairs_are_reused(sdf_settings):
    del sdf_settings["reuse_pairs"]
    with pytest.raises(ConfigurationError, match="reuse_pairs: required"):
        SdfBackend.from_settings(sdf_settings)


def test_a_pool_is_of_indexes_and_ranges(sdf_settings):
    settings = SdfSettings.from_mapping(sdf_settings | {"pool": ["12-14", 7, "20"]})
    assert settings.pool == (7, 12, 13, 14, 20)


def test_files_that_are_open_to_others_are_refused(sdf_settings, tmp_path):
    (tmp_path / "state").chmod(0o750)
    with pytest.raises(ConfigurationError, match="is open to others"):
        SdfBackend.check_settings(sdf_settings)
    (tmp_path / "state").chmod(0o700)
    assert SdfBackend.check_settings(sdf_settings) == {ProtectionLevel.HSM}
    (tmp_path / "password").chmod(0o444)
    with pytest.raises(ConfigurationError, match="is open to others"):
        SdfBackend.check_settings(sdf_settings)


def test_a_key_set_file_that_is_open_to_others_is_refused(sdf_settings, tmp_path):
    (tmp_path / "state" / "key-set-1.json").chmod(0o644)
    with pytest.raises(ConfigurationError, match=r"key set file .* is open to others"):
        SdfBackend.from_settings(sdf_settings)


def test_a_short_password_is_refused(sdf_settings, tmp_path):
    short = tmp_path / "short"
    short.write_bytes(b"1234567\n")
    short.chmod(0o400)
    with pytest.raises(ConfigurationError, match="fewer than 8 bytes"):
        SdfBackend.check_settings(sdf_settings | {"password_file": str(short)})


# --- key sets


def test_without_a_key_set_it_says_how_to_make_one(sdf_settings, tmp_path):
    (tmp_path / "state" / "key-set-1.json").unlink()
    with pytest.raises(ConfigurationError, match="hsmwrap keys init"):
        SdfBackend.from_settings(sdf_settings)


def test_a_second_first_key_set_is_refused(sdf_settings):
    with pytest.raises(ConfigurationError, match="there are key sets already"):
        SdfBackend.initialise_keys(sdf_settings)


def test_a_key_set_takes_the_place_of_no_other(sdf_settings):
    key_sets = KeySets(SdfSettings.from_mapping(sdf_settings).key_sets())
    with pytest.raises(ConfigurationError, match="there is a key set 1"):
        key_sets.add(replace(key_sets.current(), mac_key=bytes(16)))
    assert KeySets(key_sets._directory).current() == key_sets.current()
    with pytest.raises(ConfigurationError, match="end at 65535"):
        key_sets.add(replace(key_sets.current(), number=65536))


def test_keys_move_to_another_storage_pair_inside_the_device(sdf, sdf_settings):
    imported, mac = bring(sdf), sdf.mac(b"data")
    message = sdf.encrypt(imported.key, b"m")
    SdfBackend.rotate_keys(sdf_settings | {"storage_index": simulated.NEXT_STORAGE})
    resealing = ReSealsKeys.of(sdf)
    moved = resealing.reseal(imported.key, expected_check_value=imported.check_value)
    assert [resealing.key_set_of(key) for key in (imported.key, moved)] == ["1", "2"]
    sdf.verify_mac(b"data", mac)
    SdfBackend.retire_keys(sdf_settings, "1")
    assert sdf.decrypt(moved, message) == b"m"
    with pytest.raises(KeyNotFound, match="key set 1"):
        sdf.decrypt(imported.key, message)
    with pytest.raises(InvalidMac):
        sdf.verify_mac(b"data", mac)
    with pytest.raises(ConfigurationError, match="or it is current"):
        SdfBackend.retire_keys(sdf_settings, "2")
    (left,) = SdfBackend.list_keys(sdf_settings)
    assert (left.key_set, left.current) == ("2", True)
    assert left.detail == "storage pair 2, key-encryption key 1"


def test_a_storage_pair_of_any_key_set_stays_out_of_the_pool(sdf_settings):
    SdfBackend.rotate_keys(sdf_settings | {"storage_index": simulated.NEXT_STORAGE})
    settings = sdf_settings | {"storage_index": simulated.NEXT_STORAGE, "pool": ["1", "10-20"]}
    with pytest.raises(ConfigurationError, match="index 1 is in the pool"):
        SdfBackend.from_settings(settings)


def test_a_trial_has_its_own_key_sets_and_gives_its_pairs_back(sdf, sdf_settings, tmp_path):
    mac, kept = sdf.mac(b"data"), wrapping_key(sdf)
    trial = SdfBackend.trial_settings(sdf_settings)
    SdfBackend.initialise_keys(trial)
    with guarded(SdfBackend.from_settings(trial)) as other:
        bring(other)
        with pytest.raises(InvalidMac):
            other.verify_mac(b"data", mac)
        assert CountsObjects.of(other).count_objects() == 2
    SdfBackend.end_trial(trial)
    assert CountsObjects.of(sdf).count_objects() == 1
    bring(sdf, key=kept)
    sdf.verify_mac(b"data", mac)
    assert {path.name for path in (tmp_path / "state").iterdir()} == {
        "key-set-1.json",
        "leases.sqlite",
    }
    with pytest.raises(ConfigurationError, match="not settings of a trial"):
        SdfBackend.end_trial(sdf_settings)


def test_the_first_key_set_makes_its_directory(sdf_settings, tmp_path):
    SdfBackend.initialise_keys(sdf_settings | {"state_directory": str(tmp_path / "new")})
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_a_mac_of_a_key_set_with_an_odd_name_is_not_right(sdf):
    tag = sdf.mac(b"data").tag
    for name in ("1 ", "01", "१", "-1", "../1"):
        with pytest.raises(InvalidMac):
            sdf.verify_mac(b"data", Mac(name, tag))


def test_a_reference_of_another_form_is_not_a_key(sdf):
    with pytest.raises(KeyNotFound):
        sdf.encrypt(KeyRef(sdf.name, SM4, Custody.HSM_ENCRYPTED_DATABASE, bytes(10)), b"m")


def test_the_public_key_is_the_device_s(sdf, sdf_settings):
    key = wrapping_key(sdf)
    index = int.from_bytes(key.private_key.data[1:5])
    with SdfBackend.from_settings(sdf_settings)._device.session() as session:
        point = session.public_key(index)
    assert decode_spki(key.public_key) == b"\x04" + point.x + point.y
