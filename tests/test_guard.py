"""The guard: what a plug-in breaks is named, undone where something was made, and hides nothing."""

import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from support.backends.scripted import INTERNAL, Scripted, changed
from support.frames import assert_no_secret, frames_of
from support.importing import AES, OAEP1, OAEP256, PKCS1, SM2PKE, SM4, spec_of

from hsmwrap import guard
from hsmwrap.backend import (
    MAX_REFERENCE_LENGTH,
    Custody,
    Exposure,
    FailedTrial,
    HasKeySets,
    ListsKeySets,
    Mac,
    PrivateKeyRef,
    ReapsWrappingKeys,
    ReSealsKeys,
)
from hsmwrap.errors import (
    BackendClosed,
    HsmError,
    HsmUnavailable,
    InvalidCiphertext,
    InvalidImportToken,
    InvalidKeyMaterial,
    InvalidMac,
    KeyNotFound,
    UnsupportedOperation,
)
from hsmwrap.guard import Guarded, GuardedBackend, guard_all, guarded, plugin_ref
from hsmwrap.observe import observed
from hsmwrap.testing.clients import pyca_encrypt
from hsmwrap.testing.memory import MemoryBackend

LATER = datetime(2030, 1, 1, tzinfo=UTC)
MATERIAL = bytes(range(32))


class Case:
    """A guarded memory backend with a script, and a key in it."""

    def __init__(self, **settings):
        self.script = Scripted(**settings)
        self.backend = GuardedBackend(self.script, "acme")
        self.pair = self.generate()
        self.key = self.bring().key
        self.sealed = replace(self.key, custody=Custody.HSM_ENCRYPTED_DATABASE, data=self.seal())
        self.message = self.backend.encrypt(self.key, b"message", b"context")
        self.mac = self.backend.mac(b"data")
        self.script.calls.clear()
        self.before = dict(self.script.store)

    def seal(self):
        return self.script.ability(MemoryBackend).seal("1", AES, MATERIAL)

    def generate(self, algorithm=OAEP1):
        return self.backend.generate_wrapping_key(spec_of(algorithm), algorithm, expires_at=LATER)

    def bring(self, ciphertext=None, algorithm=OAEP1, private_key=None, key_spec=AES, **more):
        if ciphertext is None:
            ciphertext = pyca_encrypt(OAEP1, self.pair.public_key, MATERIAL)
        private_key = private_key or self.pair.private_key
        return self.backend.unwrap_material(
            private_key, algorithm, ciphertext, key_spec=key_spec, **more
        )


@pytest.fixture
def case():
    return Case()


CALLS = {
    "capabilities": (lambda case: case.backend.capabilities(), "Capabilities"),
    "generate_wrapping_key": (lambda case: case.generate(), "WrappingKey"),
    "discard_wrapping_key": (
        lambda case: case.backend.discard_wrapping_key(case.pair.private_key),
        "None",
    ),
    "unwrap_material": (lambda case: case.bring(), "ImportedKey"),
    "encrypt": (lambda case: case.backend.encrypt(case.key, b"message"), "bytes"),
    "decrypt": (lambda case: case.backend.decrypt(case.key, case.message, b"context"), "bytes"),
    "destroy_key": (lambda case: case.backend.destroy_key(case.key), "None"),
    "mac": (lambda case: case.backend.mac(b"data"), "Mac"),
    "verify_mac": (lambda case: case.backend.verify_mac(b"data", case.mac), "None"),
    "reap": (lambda case: ReapsWrappingKeys.of(case.backend).reap(LATER), "ReapReport"),
    "current_key_set": (lambda case: HasKeySets.of(case.backend).current_key_set(), "str"),
    "key_set_ids": (lambda case: ListsKeySets.of(case.backend).key_set_ids(), "tuple"),
    "key_set_of": (
        lambda case: ReSealsKeys.of(case.backend).key_set_of(case.sealed),
        "str or None",
    ),
    "reseal": (lambda case: ReSealsKeys.of(case.backend).reseal(case.sealed), "KeyRef"),
    "close": (lambda case: case.backend.close(), "None"),
}
each_call = pytest.mark.parametrize("name", CALLS)


@each_call
def test_an_answer_of_another_type_is_an_error_that_names_the_plug_in(case, name):
    call, due = CALLS[name]
    wrong = b"0123456789abcdef" if "None" in due else None
    case.script.changing[name] = lambda _answer: wrong
    got = "bytes" if "None" in due else "None"
    with pytest.raises(HsmError) as caught:
        call(case)
    assert str(caught.value) == f"backend plug-in acme: {name} returned {got} where {due} is due"


@each_call
def test_a_foreign_exception_is_an_error_that_names_the_plug_in_and_the_place(case, name):
    case.script.failing[name] = KeyError("0123456789abcdef")
    with pytest.raises(HsmError) as caught:
        CALLS[name][0](case)
    text = str(caught.value)
    assert text.startswith(f"backend plug-in acme: {name} raised KeyError (scripted.py:")
    assert text.endswith(", in _forward)")
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)


@each_call
def test_an_error_of_the_contract_is_passed_on(case, name):
    case.script.failing[name] = HsmUnavailable("unavailable")
    with pytest.raises(HsmUnavailable, match="unavailable"):
        CALLS[name][0](case)


@each_call
def test_an_error_keeps_no_frames_of_the_plug_in(case, name):
    case.script.failing[name] = HsmUnavailable("unavailable")
    with pytest.raises(HsmUnavailable) as caught:
        CALLS[name][0](case)
    assert_no_secret(caught.value, {"the material": MATERIAL})
    files = {frame.f_code.co_filename for frame in frames_of(caught.value)}
    assert not [file for file in files if file.endswith(("scripted.py", "memory.py"))]


# --- closing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"close"}))
def test_every_call_is_closed_after_close(case, name):
    case.backend.close()
    with pytest.raises(BackendClosed):
        CALLS[name][0](case)
    assert case.script.calls == ["close"]


def test_close_waits_for_running_calls_and_closes_the_plug_in_once(case):
    inside, go_on = threading.Event(), threading.Event()

    def slow(mac):
        inside.set()
        assert go_on.wait(60)
        return mac

    case.script.changing["mac"] = slow
    with ThreadPoolExecutor(3) as threads:
        running = threads.submit(case.backend.mac, b"data")
        assert inside.wait(60)
        closing = [threads.submit(case.backend.close) for _ in range(2)]
        assert case.backend.health().facts["in_flight"] == 1
        assert not closing[0].done()
        assert "close" not in case.script.calls
        go_on.set()
        running.result(60)
        for each in closing:
            each.result(60)
    case.backend.close()
    assert case.script.calls.count("close") == 1


def test_health_of_a_closed_backend_is_not_ready_whatever_the_plug_in_says(case):
    assert case.backend.health().ready
    case.backend.close()
    assert (case.backend.health().ready, case.backend.health().detail) == (False, "closed")


@pytest.mark.parametrize("health", [lambda: None, lambda: 1 / 0])
def test_health_of_a_plug_in_that_cannot_tell_is_not_ready(case, health):
    case.script.health = health
    case.script.health.__name__ = "health"
    state = case.backend.health()
    assert not state.ready
    assert state.detail.startswith("backend plug-in acme: health r")


# --- what is asked ------------------------------------------------------------------------------


def refused(case, error, call):
    with pytest.raises(error):
        call()
    assert case.script.calls == []
    assert case.script.store == case.before


def test_what_is_not_listed_does_not_reach_the_plug_in():
    case = Case(algorithms=[OAEP1, SM2PKE], key_specs=[AES])
    for algorithm in (PKCS1, OAEP256):
        refused(case, UnsupportedOperation, lambda a=algorithm: case.generate(a))
        refused(case, UnsupportedOperation, lambda a=algorithm: case.bring(algorithm=a))
    refused(case, UnsupportedOperation, lambda: case.bring(key_spec=SM4))
    sm4 = replace(case.key, key_spec=SM4)
    refused(case, UnsupportedOperation, lambda: case.backend.encrypt(sm4, b""))
    refused(case, UnsupportedOperation, lambda: case.backend.decrypt(sm4, case.message))


def test_a_key_that_is_kept_but_not_usable_is_not_used():
    case = Case(usable=[AES])
    sm4 = replace(case.key, key_spec=SM4)
    refused(case, UnsupportedOperation, lambda: case.backend.encrypt(sm4, b""))
    refused(case, UnsupportedOperation, lambda: case.backend.decrypt(sm4, case.message))


def test_a_key_of_another_backend_does_not_reach_the_plug_in(case):
    other = replace(case.key, backend="other")
    for call in (
        lambda: case.backend.encrypt(other, b""),
        lambda: case.backend.decrypt(other, case.message),
        lambda: case.backend.destroy_key(other),
    ):
        refused(case, KeyNotFound, call)


@pytest.mark.parametrize("algorithm", [PKCS1, OAEP256, SM2PKE])
def test_a_wrapping_key_is_bound_to_its_algorithm(case, algorithm):
    refused(case, InvalidImportToken, lambda: case.bring(algorithm=algorithm))


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x04"])
def test_a_reference_that_is_bound_to_nothing_is_refused(case, data):
    # Without its first byte alone it would begin with a random one, which may be right.
    whole = data and data + case.pair.private_key.data[1:]
    ref = PrivateKeyRef(Custody.HSM_INTERNAL, whole)
    refused(case, InvalidImportToken, lambda: case.bring(private_key=ref))


@pytest.mark.parametrize("length", [0, 1, 128, 255, 257, 4096])
def test_an_rsa_ciphertext_has_the_length_of_the_modulus(case, length):
    refused(case, InvalidKeyMaterial, lambda: case.bring(bytes(length)))


@pytest.mark.parametrize("overhead", [0, 43, 110, 224])
@pytest.mark.parametrize("key_spec", [AES, SM4])
def test_an_sm2_ciphertext_has_the_length_of_a_layout(case, overhead, key_spec):
    pair = case.generate(SM2PKE)
    case.script.calls.clear()
    case.before = dict(case.script.store)
    length = key_spec.material_length + overhead
    arguments = {"algorithm": SM2PKE, "private_key": pair.private_key, "key_spec": key_spec}
    refused(case, InvalidKeyMaterial, lambda: case.bring(bytes(length), **arguments))


@pytest.mark.parametrize("overhead", [44, 96, 97, 105, 109])
def test_an_sm2_ciphertext_of_possible_length_reaches_the_plug_in(case, overhead):
    pair = case.generate(SM2PKE)
    with pytest.raises(InvalidKeyMaterial):
        case.bring(bytes(32 + overhead), SM2PKE, pair.private_key)
    assert case.script.calls[-1] == "unwrap_material"


@pytest.mark.parametrize("length", [0, 15, 17, 32])
def test_an_object_id_has_16_bytes(case, length):
    refused(case, ValueError, lambda: case.bring(object_id=bytes(length)))


def test_an_object_id_is_made_where_none_is_given(case):
    named = case.bring(object_id=b"i" * 16).key
    assert named.data == b"i" * 16
    assert len(case.bring().key.data) == 16


@pytest.mark.parametrize("message", [b"", b"\x01" * 28, b"\x02" * 28, b"\x03" * 40])
def test_what_is_no_message_does_not_reach_the_plug_in(case, message):
    refused(case, InvalidCiphertext, lambda: case.backend.decrypt(case.key, message))


@pytest.mark.parametrize(
    "mac", [Mac("", bytes(32)), Mac("é", bytes(32)), Mac("1" * 33, bytes(32)), Mac("1", bytes(31))]
)
def test_what_is_no_mac_does_not_reach_the_plug_in(case, mac):
    refused(case, InvalidMac, lambda: case.backend.verify_mac(b"data", mac))


def test_sealed_keys_are_the_caller_s_to_delete():
    sealed = "HsmEncryptedDatabase"
    case = Case(wrapping_custody=sealed, material_custody=sealed)
    case.backend.discard_wrapping_key(case.pair.private_key)
    case.backend.destroy_key(case.key)
    assert case.script.calls == []


# --- what is answered ---------------------------------------------------------------------------


PAIRS = {
    "for OAEP256": {"algorithm": OAEP256},
    "for SM2": {"spec": spec_of(SM2PKE)},
    "sealed": {"private_key": PrivateKeyRef(Custody.HSM_ENCRYPTED_DATABASE, b"x")},
    "a text": {"private_key": PrivateKeyRef(Custody.HSM_INTERNAL, "0123456789abcdef")},
    "a short public key": {"public_key": bytes(293)},
    "a public key in text": {"public_key": "x" * 294},
    "a long key set": {"key_set": "x" * 33},
    "no text for a key set": {"key_set": 1},
}


@pytest.mark.parametrize("differs", PAIRS.values(), ids=PAIRS)
def test_a_pair_that_is_not_what_was_asked_for_is_discarded(case, differs):
    case.script.changing["generate_wrapping_key"] = changed(**differs)
    with pytest.raises(HsmError, match=r"acme: generate_wrapping_key .*; the key pair was disc"):
        case.generate()
    assert case.script.calls == ["generate_wrapping_key", "discard_wrapping_key"]


KEYS = {
    "of another backend": {"backend": "other"},
    "for SM4": {"key_spec": SM4},
    "sealed": {"custody": Custody.HSM_ENCRYPTED_DATABASE},
    "unwrapped inside": {"exposure": Exposure.IN_HSM},
    "under another id": {"data": b"x" * 16},
    "a text": {"check_value": "0123456789abcdef"},
    "with a short check value": {"check_value": bytes(16)},
    "with a long check value": {"check_value": bytes(18)},
}


@pytest.mark.parametrize("differs", KEYS.values(), ids=KEYS)
def test_a_key_that_is_not_as_promised_is_destroyed(case, differs):
    case.script.changing["unwrap_material"] = changed(**differs)
    with pytest.raises(HsmError, match=r"acme: unwrap_material .*; the key was destroyed"):
        case.bring()
    assert case.script.calls == ["unwrap_material", "destroy_key"]


def test_another_key_than_the_expected_one_is_destroyed(case):
    expected = case.bring().check_value
    assert case.bring(expected_check_value=expected).check_value == expected
    before = dict(case.script.store)
    other = pyca_encrypt(OAEP1, case.pair.public_key, bytes(32))
    for given in (expected, b"", b"\x01"):
        with pytest.raises(InvalidKeyMaterial):
            case.bring(other, expected_check_value=given)
        assert case.script.calls[-2:] == ["unwrap_material", "destroy_key"]
    assert case.script.store == before


def test_what_cannot_be_destroyed_is_logged_and_refused_all_the_same(case, caplog):
    case.script.failing["destroy_key"] = HsmUnavailable("unavailable")
    with pytest.raises(InvalidKeyMaterial):
        case.bring(expected_check_value=bytes(17))
    assert [each.getMessage() for each in caplog.records] == [
        "could not destroy a key that is not the same"
    ]


class Why(InvalidKeyMaterial):
    reason = "wrong padding"


def test_a_failure_to_unwrap_says_nothing_more(case):
    case.script.failing["unwrap_material"] = error = Why()
    error.add_note("wrong padding")
    error.__cause__ = ValueError("wrong padding")
    with pytest.raises(InvalidKeyMaterial) as caught:
        case.bring()
    assert type(caught.value) is InvalidKeyMaterial
    assert vars(caught.value) == {}
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)


@pytest.mark.parametrize("message", [b"", bytes(36), b"\x01" * 35, b"\x01" * 37])
def test_a_message_that_is_not_in_the_format_is_an_error(case, message):
    case.script.changing["encrypt"] = lambda _message: message
    with pytest.raises(HsmError, match="acme: encrypt returned what is not version"):
        case.backend.encrypt(case.key, b"message")


@pytest.mark.parametrize(
    "differs", [{"key_set": ""}, {"key_set": "é"}, {"tag": bytes(31)}], ids=str
)
def test_a_mac_that_is_not_in_the_format_is_an_error(case, differs):
    case.script.changing["mac"] = changed(**differs)
    with pytest.raises(HsmError, match="acme: mac returned what is not 32 bytes"):
        case.backend.mac(b"data")


def test_a_report_of_another_backend_is_an_error(case):
    case.script.changing["capabilities"] = changed(backend="other")
    with pytest.raises(HsmError, match="a backend 'other'; the class's name is 'memory'"):
        case.backend.encrypt(case.key, b"message")


@pytest.mark.parametrize(
    ("differs", "says"),
    [
        ({"protection_levels": ["HSM"]}, "protection_levels is list where frozenset"),
        ({"protection_levels": frozenset({"HSM"})}, "protection_levels[] is str where Protec"),
        ({"keys": []}, "keys is list where tuple is due"),
        ({"notes": ("one", 2)}, "notes[] is int where str is due"),
        ({"production": None}, "production is NoneType where bool is due"),
        ({"failed": (FailedTrial("step", code="7"),)}, "failed[].code is str where int is due"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_a_report_of_other_types_is_an_error_that_says_where(case, differs, says):
    case.script.changing["capabilities"] = changed(**differs)
    with pytest.raises(
        HsmError, match=re.escape(f"capabilities returned a report in which {says}")
    ):
        case.backend.encrypt(case.key, b"message")


def test_a_report_with_names_for_members_says_which(case):
    case.script.changing["capabilities"] = lambda report: replace(
        report, keys=(replace(report.keys[0], key_spec="Aliyun_AES_256"),)
    )
    with pytest.raises(HsmError, match=r"keys\[\].key_spec is str where KeySpec is due"):
        case.backend.encrypt(case.key, b"message")


def test_a_report_that_is_kept_is_looked_at_once(case, monkeypatch):
    looked = []
    misfit = guard._misfit
    monkeypatch.setattr(guard, "_misfit", lambda *rest: looked.append(rest) or misfit(*rest))
    kept = case.backend.capabilities()
    assert looked
    case.script.changing["capabilities"] = lambda _other: kept
    looked.clear()
    case.backend.capabilities()
    assert not looked


@pytest.mark.parametrize(
    ("method", "fits"), [(0, False), (1, True), (2, True), (3, False), (127, False), (128, True)]
)
def test_a_check_value_names_a_method_that_there_is(case, method, fits):
    def answer(imported):
        return replace(imported, check_value=bytes([method]) + imported.check_value[1:])

    case.script.changing["unwrap_material"] = answer
    if fits:
        assert case.bring().check_value[0] == method
        return
    with pytest.raises(HsmError, match=f"value of method {method}; there are 1, 2, and 128 to 255"):
        case.bring()
    assert dict(case.script.store) == case.before  # the key was destroyed


@pytest.mark.parametrize("more", [0, 1])
def test_a_reference_fits_import_tokens(case, more):
    case.script.changing["generate_wrapping_key"] = lambda pair: replace(
        pair, private_key=replace(pair.private_key, data=bytes(MAX_REFERENCE_LENGTH + more))
    )
    if not more:
        assert len(case.generate().private_key.data) == MAX_REFERENCE_LENGTH + 1
        return
    with pytest.raises(HsmError, match=r"reference of 3679 bytes; .* has room for 3678"):
        case.generate()


# --- around it ----------------------------------------------------------------------------------


def test_a_backend_gets_one_guard():
    bare = MemoryBackend()
    guard = guarded(bare)
    assert Guarded.of(bare) is None
    assert guarded(guard) is guard
    watched = observed(guard, print)
    assert guarded(watched) is watched
    both = guard_all({"a": bare, "b": bare})
    assert both["a"] is both["b"]


def test_a_plug_in_s_reference_is_the_one_that_it_made(case):
    made = []
    case.script.changing["generate_wrapping_key"] = lambda pair: made.append(pair) or pair
    pair = case.generate()
    assert plugin_ref(pair.private_key) == made[0].private_key


def test_a_guarded_backend_does_not_pickle(case):
    with pytest.raises(TypeError, match="does not pickle"):
        pickle.dumps(case.backend)


def test_its_repr_says_what_it_guards(case):
    assert repr(guarded(MemoryBackend())).startswith("<guarded <MemoryBackend ")


# --- keys that move to another key set ----------------------------------------------------------


def test_a_sealed_key_moves(case):
    resealing = ReSealsKeys.of(case.backend)
    memory = case.script.ability(MemoryBackend)
    type(memory).rotate_keys({"store": memory.store})
    moved = resealing.reseal(case.sealed)
    assert (resealing.key_set_of(case.sealed), resealing.key_set_of(moved)) == ("1", "2")
    assert case.backend.decrypt(moved, case.message, b"context") == b"message"


@pytest.mark.parametrize(
    "wrong",
    [{"key_spec": SM4}, {"custody": INTERNAL}, {"backend": "other"}, {"data": "text"}],
    ids=lambda each: next(iter(each)),
)
def test_a_plug_in_that_makes_another_key_of_it_is_named(case, wrong):
    case.script.changing["reseal"] = changed(**wrong)
    with pytest.raises(HsmError, match="plug-in acme: reseal returned a key of another kind"):
        ReSealsKeys.of(case.backend).reseal(case.sealed)


@pytest.mark.parametrize("key_set", [None, "", "1" * 33, "ü"])
def test_a_plug_in_that_does_not_name_the_key_set_is_named(case, key_set):
    case.script.changing["key_set_of"] = lambda _answer: key_set
    with pytest.raises(HsmError, match="plug-in acme: key_set_of named no key set"):
        ReSealsKeys.of(case.backend).key_set_of(case.sealed)


def test_a_resident_key_does_not_reach_the_plug_in(case):
    resealing = ReSealsKeys.of(case.backend)
    assert resealing.reseal(case.key) == case.key
    assert resealing.key_set_of(case.key) is None
    assert case.script.calls == []


def test_a_backend_that_does_not_move_keys_has_not_got_the_ability():
    class Plain(MemoryBackend):
        def ability(self, kind):
            return None if kind is ReSealsKeys else super().ability(kind)

    assert ReSealsKeys.of(guarded(Plain())) is None
