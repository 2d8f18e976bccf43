"""Material on a token without AES key wrap: its length is what the token tells, if it does."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from pkcs11.constants import Attribute

from hsmwrap.backend import Custody
from hsmwrap.catalog import KeySpec
from hsmwrap.errors import InvalidKeyMaterial
from hsmwrap.pkcs11.keysets.keys import KeySets
from hsmwrap.pkcs11.wrapping.features import TokenFeatures
from hsmwrap.pkcs11.wrapping.material import MaterialStore

CHECK = b"\x80" + bytes(16)


class Key:
    """Material that became an object; counts its destructions."""

    def __init__(self, length):
        self.told = {} if length is None else {Attribute.VALUE_LEN: length}
        self.destroyed = 0

    def get_attributes(self, _names):
        return self.told

    def destroy(self):
        self.destroyed += 1


def check_value_of(key, *, told, expected=None):
    features = TokenFeatures(value_length=told)
    store = MaterialStore("pkcs11", KeySets("p"), "p", Custody.HSM_INTERNAL, features)
    source = SimpleNamespace(make_object=lambda *_: key, check_value=lambda: CHECK, way=None)
    pooled = SimpleNamespace(session=None, tainted=False)
    try:
        return store._try_object(pooled, source, {}, KeySpec.ALIYUN_AES_256, expected)
    finally:
        assert key.destroyed == 1


def test_material_of_the_right_length_is_taken():
    assert check_value_of(Key(32), told=True) == CHECK


@pytest.mark.parametrize("length", [0, 16, 24, 31, 33, None])
def test_material_of_another_length_is_refused(length):
    with pytest.raises(InvalidKeyMaterial):
        check_value_of(Key(length), told=True)


def test_where_the_token_does_not_tell_the_host_has_looked():
    assert check_value_of(Key(None), told=False) == CHECK


@pytest.mark.parametrize("told", [True, False])
def test_other_material_is_refused(told):
    with pytest.raises(InvalidKeyMaterial):
        check_value_of(Key(32), told=told, expected=CHECK[:-1] + b"\x01")
    assert check_value_of(Key(32), told=told, expected=CHECK) == CHECK


@pytest.mark.parametrize("session_objects", [True, False])
def test_where_session_objects_are_refused_the_trial_has_the_id_of_the_key(session_objects):
    """Whatever a failed import leaves in the token is found by that id."""
    features = TokenFeatures(value_length=True, session_objects=session_objects)
    store = MaterialStore("pkcs11", KeySets("p"), "p", Custody.HSM_INTERNAL, features)
    made = []
    source = SimpleNamespace(
        make_object=lambda _session, template: made.append(template) or Key(32),
        check_value=lambda: CHECK,
        way=None,
    )
    pooled = SimpleNamespace(session=None, tainted=False, creating=lambda _pending: nullcontext())
    pending = SimpleNamespace(object_id=bytes(range(16)))
    ref, check = store._make_object(pooled, source, KeySpec.ALIYUN_AES_256, None, pending)
    assert (ref.custody, ref.data, check) == (Custody.HSM_INTERNAL, pending.object_id, CHECK)

    trial, final = made
    assert (final[Attribute.TOKEN], final[Attribute.ID]) == (True, pending.object_id)
    assert not trial[Attribute.EXTRACTABLE]
    assert bool(trial.get(Attribute.TOKEN)) is not session_objects
    assert trial.get(Attribute.ID) == (None if session_objects else pending.object_id)
