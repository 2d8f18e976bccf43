"""What an HSM token is tried for, where its answer is what matters."""

from dataclasses import replace

import pytest
from pkcs11 import exceptions as ck
from pkcs11.constants import Attribute, MechanismFlag
from pkcs11.mechanisms import KeyType, Mechanism
from support.importing import flip

from hsmwrap.errors import ConfigurationError
from hsmwrap.pkcs11.binding import traits
from hsmwrap.pkcs11.binding.profiles import by_number
from hsmwrap.pkcs11.binding.templates import secret_key
from hsmwrap.pkcs11.binding.traits import AES, BlockCipher
from hsmwrap.pkcs11.binding.trials import generate_trial_key, refuses_changed, unless_refused
from hsmwrap.pkcs11.keysets import admin, hardening, needs, origin
from hsmwrap.pkcs11.keysets.keys import Role, _generated_here
from hsmwrap.pkcs11.settings import Pkcs11Settings

BLOB = bytes(range(1, 25))


class Module:
    """Unwraps the blob; answers an error, or nothing, to one that differs in these bytes."""

    def __init__(self, answer, *refused):
        self.answer, self.refused, self.asked = answer, refused, []

    def unwrap(self, blob):
        self.asked.append(blob)
        differs = [at for at in range(len(BLOB)) if blob[at] != BLOB[at]]
        if set(differs) & set(self.refused):
            raise self.answer


@pytest.mark.parametrize("answer", [ck.WrappedKeyInvalid(), ck.KeySizeRange(), ck.GeneralError()])
def test_what_authenticates_refuses_a_change_at_either_end(answer):
    module = Module(answer, 0, 23)
    assert refuses_changed(BLOB, module.unwrap)
    assert module.asked == [flip(BLOB, 0), BLOB, flip(BLOB, 8 * 23), BLOB]
    for noticed in ((0,), (23,), (8,), ()):  # as CBC with padding does
        assert not refuses_changed(BLOB, Module(answer, *noticed).unwrap)


def test_it_is_the_change_that_is_refused():
    def fail(_blob):
        raise ck.GeneralError

    with pytest.raises(ck.GeneralError):
        refuses_changed(BLOB, fail)


def test_a_lost_connection_is_not_a_refusal():
    with pytest.raises(ck.DeviceRemoved):
        refuses_changed(BLOB, Module(ck.DeviceRemoved(), 0, 23).unwrap)


@pytest.mark.parametrize(
    ("answers", "result"),
    [
        ([b"key"], b"key"),
        ([ck.GeneralError, b"key"], b"key"),
        ([ck.GeneralError, ck.GeneralError, b"key"], None),
    ],
)
def test_what_is_refused_twice_is_refused(answers, result):
    left = iter(answers)

    def attempt():
        answer = next(left)
        if answer is ck.GeneralError:
            raise answer
        return answer

    assert unless_refused(attempt) == result
    assert list(left) == ([b"key"] if result is None else [])


class Asked:
    """A session of a module that takes any key, and notes what it is asked to generate."""

    def __init__(self):
        self.mechanisms, self.asked = [], []

    def generate_key(self, *given, mechanism, **named):
        self.mechanisms.append(mechanism)
        self.asked.append((given, named))
        raise ck.FunctionNotSupported


def test_a_key_for_a_trial_is_a_session_object_with_the_uses_of_its_template():
    session, template = Asked(), secret_key(KeyType.AES, Attribute.ENCRYPT)
    with traits.inside(traits.STANDARD), pytest.raises(ck.FunctionNotSupported):
        generate_trial_key(session, template, 32, Mechanism.AES_KEY_GEN)
    named = {"store": False, "capabilities": MechanismFlag(0), "template": template}
    assert session.asked == [((KeyType.AES, 256), named)]


@pytest.mark.parametrize("forbidden", [True, False])
def test_a_trial_asks_for_no_key_that_the_profile_forbids(forbidden):
    """Such a module may hang or crash."""
    session, never = Asked(), frozenset({Mechanism.AES_KEY_GEN} if forbidden else {})
    answer = ck.MechanismInvalid if forbidden else ck.FunctionNotSupported
    with traits.inside(replace(traits.STANDARD, never_mechanisms=never)):
        assert origin.told_by(session) == {}
        with pytest.raises(answer):
            hardening.refused_by(session, AES)
        with pytest.raises(answer):
            needs._Trials(session)._key(AES)
    assert set(session.mechanisms) == ({Mechanism.AES_KEY_GEN} - never)


SM4 = BlockCipher(
    name="SM4",
    key_type=by_number(KeyType, 0x80000106),
    generate=by_number(Mechanism, 0x8000A001),
    length=16,
    lengths=(16,),
    ecb=None,
    cbc=None,
    ctr=None,
)


def key_encryption_key(cipher, **changed):
    made = secret_key(cipher.key_type, Attribute.WRAP, Attribute.UNWRAP)
    told = {Attribute.ALWAYS_SENSITIVE: True, Attribute.NEVER_EXTRACTABLE: True}
    told |= {Attribute.LOCAL: True, Attribute.KEY_GEN_MECHANISM: cipher.generate}
    return made | told | {Attribute[name]: value for name, value in changed.items()}


@pytest.mark.parametrize("cipher", [AES, SM4], ids=["AES", "SM4"])
def test_where_a_key_is_from_is_told_of_each_type_by_itself(cipher):
    """Derived keys have the histories of their base (field note 74)."""
    other = SM4 if cipher is AES else AES
    derived = key_encryption_key(cipher, LOCAL=False)
    right = {cipher.key_type: frozenset({Attribute.LOCAL}), other.key_type: frozenset()}
    lies = {cipher.key_type: frozenset(), other.key_type: frozenset({Attribute.LOCAL})}
    with traits.inside(replace(traits.STANDARD, ciphers=(AES, SM4))):

        def accepted(attributes, told, role=Role.MATERIAL_SM4):
            return _generated_here(role, attributes, told, movable=False)

        assert accepted(key_encryption_key(cipher), right)
        assert not accepted(derived, right)
        assert accepted(derived, lies)
        for changed in ({"KEY_TYPE": KeyType.DES3}, {"DECRYPT": True}, {"EXTRACTABLE": True}):
            assert not accepted(key_encryption_key(cipher, **changed), right)
        # A MAC key is of neither type: what both tell is right of it.
        mac = secret_key(KeyType.GENERIC_SECRET, Attribute.SIGN)
        mac |= {Attribute.ALWAYS_SENSITIVE: True, Attribute.NEVER_EXTRACTABLE: True}
        both = dict.fromkeys(right, frozenset({Attribute.LOCAL}))
        for told, refused in ((both, True), (right, False), (lies, False), ({}, False)):
            assert accepted(mac | {Attribute.LOCAL: False}, told, Role.MAC) is not refused
    with traits.inside(traits.STANDARD):
        assert accepted(key_encryption_key(SM4), {}) is False


def test_an_hmac_that_answers_the_same_to_everything_is_none(softhsm, monkeypatch):
    settings = Pkcs11Settings.from_mapping(softhsm.bare_settings())
    with admin.connected(settings) as connection:

        def tried():
            return connection.run(lambda pooled: needs.needs_of(pooled.session, None))

        assert tried().roles
        monkeypatch.setattr(needs._Trials, "_signs", lambda *_: False)
        with pytest.raises(ConfigurationError, match="its answer is wrong"):
            tried()
