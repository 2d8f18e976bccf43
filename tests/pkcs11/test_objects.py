"""Keys are made in one place, which reads back what was asked for, on tokens that heed less."""

import ast
from pathlib import Path

import pytest
from pkcs11.constants import Attribute
from pkcs11.exceptions import AttributeReadOnly, FunctionFailed, SessionHandleInvalid
from pkcs11.mechanisms import KeyType

from hsmwrap import pkcs11
from hsmwrap.errors import HsmError, ProtectionNotKept
from hsmwrap.pkcs11.binding import objects
from hsmwrap.pkcs11.binding.objects import Way
from hsmwrap.pkcs11.binding.templates import secret_key, stored

ENCRYPTS = secret_key(KeyType.AES, Attribute.ENCRYPT) | {Attribute.WRAP_WITH_TRUSTED: True}
FINAL = stored(ENCRYPTS, b"id", "label")
READABLE = {Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}
MAKERS = {"unwrap_key", "generate_key", "generate_keypair", "create_object", "copy"}
# Keys for trials, which are destroyed at once, and the public half of a transport key.
TRIALS = {
    *("cloning.py", "movability.py", "needs.py", "origin.py"),
    *("probe.py", "protections.py", "trials.py"),
}


class Key:
    """A key, and the key that it unwraps, on a token that ignores attributes."""

    def __init__(self, attributes, token):
        self.attributes, self.token = attributes, token
        self.destroyed = False
        token.keys.append(self)

    def unwrap_key(self, *, template, **_arguments):
        return Key({**template, **self.token.ignores}, self.token)

    def copy(self, changes):
        if self.token.copies_wrongly:
            changes = {}
        return Key({**self.attributes, **changes}, self.token)

    def get_attributes(self, wanted):
        self.token.reads.append(list(wanted))
        if self.token.failing:
            raise FunctionFailed
        return {a: self.attributes[a] for a in wanted if a in self.attributes}

    def __setitem__(self, attribute, value):
        if self.attributes.get(Attribute.MODIFIABLE) is False:
            raise AttributeReadOnly
        self.attributes[attribute] = value

    def destroy(self):
        self.destroyed = True


class Token:
    """What it ignores, and whether C_CopyObject ignores its template too."""

    def __init__(self, ignores=None, *, copies_wrongly=False):
        self.ignores, self.copies_wrongly = ignores or {}, copies_wrongly
        self.keys, self.reads, self.failing = [], [], False

    def unwrap(self, way):
        return objects.unwrap(Key({}, self), b"blob", FINAL, way=way)

    def create_object(self, template):
        return Key(dict(template), self)

    @property
    def left(self):
        return [key for key in self.keys[1:] if not key.destroyed]


@pytest.mark.parametrize("way", Way)
def test_a_key_as_it_was_asked_for(way):
    token = Token()
    key = token.unwrap(way)
    assert token.left == [key]
    assert {a: key.attributes[a] for a in objects.READ_BACK} == {
        a: FINAL[a] for a in objects.READ_BACK
    }
    assert len(token.reads) == 1  # all attributes at once


@pytest.mark.parametrize("attribute", objects.READ_BACK, ids=lambda each: each.name)
def test_an_attribute_that_is_ignored_is_refused_and_nothing_is_left(attribute):
    token = Token({attribute: not FINAL[attribute]}, copies_wrongly=True)
    with pytest.raises(ProtectionNotKept, match=f"CKA_{attribute.name} ") as caught:
        token.unwrap(Way.AS_ASKED)
    assert isinstance(caught.value, HsmError)
    assert token.left == []


def test_a_readable_key_is_closed_by_copying():
    token = Token(READABLE)
    key = token.unwrap(Way.COPIED)
    assert token.left == [key]
    assert key.attributes.items() >= FINAL.items()
    first = token.keys[1].attributes
    assert first[Attribute.TOKEN] is False
    assert Attribute.ID not in first


def test_a_readable_key_is_closed_by_changing_it():
    token = Token(READABLE)
    key = token.unwrap(Way.CHANGED)
    assert token.left == [key]
    assert not key.attributes[Attribute.EXTRACTABLE]
    assert [len(token.reads), token.reads[0]] == [2, token.reads[1]]


def test_what_copying_does_not_close_is_refused():
    token = Token(READABLE | {Attribute.MODIFIABLE: False}, copies_wrongly=True)
    with pytest.raises(ProtectionNotKept, match="CKA_SENSITIVE, CKA_EXTRACTABLE"):
        token.unwrap(Way.COPIED)
    assert token.left == []


def test_what_a_token_does_not_tell_is_not_taken_for_granted_but_for_uses():
    token = Token()
    token.ignores = {}
    asked = dict(FINAL)
    key = Key({a: v for a, v in asked.items() if a is not Attribute.DERIVE}, token)
    assert objects._kept(key, asked) is key
    silent = Key({a: v for a, v in asked.items() if a is not Attribute.PRIVATE}, token)
    with pytest.raises(ProtectionNotKept, match="CKA_PRIVATE "):
        objects._kept(silent, asked)


def test_a_failure_to_read_is_the_connection_s():
    token = Token()
    token.failing = True
    with pytest.raises(SessionHandleInvalid):
        token.unwrap(Way.AS_ASKED)


@pytest.mark.parametrize("way", Way)
def test_a_stand_in_takes_the_calls_that_an_unwrapped_key_takes(way):
    """Else the time of an import would tell bad padding from good."""
    unwrapping, creating = Token(READABLE if way is not Way.AS_ASKED else {}), Token()
    unwrapping.unwrap(way)
    creating.keys.append(None)  # in the place of the unwrapping key
    objects.create(creating, FINAL, bytes(32), way=way)
    assert creating.reads == unwrapping.reads
    assert len(creating.keys) == len(unwrapping.keys)


def test_no_key_is_made_elsewhere():
    found = set()
    for path in Path(pkcs11.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                receiver = node.func.value
                ours = isinstance(receiver, ast.Name) and receiver.id == "objects"
                if node.func.attr in MAKERS and not ours:
                    found.add(path.name)
    assert "objects.py" in found
    assert found - {"objects.py"} <= TRIALS
