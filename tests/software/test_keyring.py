import base64
import copy
import json
import pickle

import pytest

from hsmwrap.errors import ConfigurationError, KeyNotFound
from hsmwrap.software._keyring import Keyring

KEY = bytes(range(32))
ENCODED = base64.b64encode(KEY).decode()


def document(**changes):
    return {"version": 1, "current": "0badcafe", "keys": {"0badcafe": ENCODED}} | changes


def parse(parsed):
    return Keyring.from_json(json.dumps(parsed).encode())


def test_fresh_keyrings_differ():
    one, other = Keyring.generate(), Keyring.generate()
    assert one.key(one.current) != other.key(other.current)
    assert one.ids == (one.current,)


def test_rotation_keeps_the_old_key():
    old = Keyring.generate()
    new = old.rotated()
    assert new.ids == (old.current, new.current)
    assert new.key(old.current) == old.key(old.current) != new.key(new.current)
    assert old.ids == (old.current,)


def test_retirement_forgets_the_key():
    old = Keyring.generate()
    rest = old.rotated().retired(old.current)
    assert old.current not in rest.ids
    with pytest.raises(KeyNotFound):
        rest.key(old.current)


def test_current_and_unknown_keys_are_not_retired():
    keyring = Keyring.generate()
    with pytest.raises(ConfigurationError, match="rotate first"):
        keyring.retired(keyring.current)
    with pytest.raises(KeyNotFound):
        keyring.retired("00000000")


def test_json_round_trip():
    keyring = Keyring.generate().rotated()
    again = Keyring.from_json(keyring.to_json())
    assert (again.current, again.ids) == (keyring.current, keyring.ids)
    assert all(again.key(key_id) == keyring.key(key_id) for key_id in keyring.ids)


def test_format_stays_readable():
    assert parse(document()).key("0badcafe") == KEY
    assert json.loads(parse(document()).to_json()) == document()


@pytest.mark.parametrize(
    "parsed",
    [
        document(version=2),
        document(version=None),
        document(current="00000000"),
        document(current=["0badcafe"]),
        document(keys={}),
        document(keys=[ENCODED]),
        document(keys={"0badcafe": 7}),
        document(keys={"0badcafe": ENCODED[:-4]}),
        document(keys={"0badcafe": ENCODED + "!"}),
        document(keys={"0badcafe": ENCODED, "0BADCAFE": ENCODED}),
        document(keys={"0badcafe": ENCODED, "../../00": ENCODED}),
        document(keys={ENCODED: "0badcafe"}),
        document(current=ENCODED),
        document(version=ENCODED),
        {"version": 1},
        [],
        None,
        "",
    ],
)
def test_damaged_keyrings_are_refused_without_quoting_them(parsed):
    with pytest.raises(ConfigurationError) as caught:
        parse(parsed)
    assert ENCODED[:8] not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", ENCODED.encode()])
def test_what_is_no_json_is_refused_without_quoting_it(raw):
    with pytest.raises(ConfigurationError, match="not a keyring"):
        Keyring.from_json(raw)


def test_keys_do_not_show():
    keyring = parse(document())
    shown = repr(keyring) + str(keyring) + f"{keyring!s}"
    assert "0badcafe" in shown
    assert not any(secret in shown for secret in (ENCODED, KEY.hex(), repr(KEY)))
    assert not hasattr(keyring, "__dict__")


@pytest.mark.parametrize("leak", [pickle.dumps, copy.copy, copy.deepcopy])
def test_keyrings_do_not_pickle_or_copy(leak):
    with pytest.raises(TypeError, match="master keys"):
        leak(parse(document()))


def test_derived_keys_are_of_one_key_and_one_purpose():
    keyring = Keyring.generate()
    rotated = keyring.rotated()
    derived = {
        ring.derived(key_id, purpose)
        for ring in (keyring, rotated)
        for key_id in ring.ids
        for purpose in (b"a", b"b")
        for _ in range(2)
    }
    assert len(derived) == 4
    assert {len(key) for key in derived} == {32}
    retired = rotated.retired(keyring.current)
    with pytest.raises(KeyNotFound):
        retired.derived(keyring.current, b"a")
