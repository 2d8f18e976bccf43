import os

import pytest

from hsmwrap.backend import Mac
from hsmwrap.errors import InvalidMac
from hsmwrap.software._keyring import Keyring
from hsmwrap.software._sealing import BlobRejected, Purpose, Sealer

SECRET = bytes(range(48))
CONTEXT = ("RSA_2048", "RSAES_OAEP_SHA_256")


@pytest.fixture
def rings():
    """The keyring in force: replace its only element to change it."""
    return [Keyring.generate()]


@pytest.fixture
def sealer(rings):
    return Sealer(lambda: rings[0])


def rejected(sealer, purpose, blob, *context):
    try:
        sealer.open(purpose, blob, *context)
    except BlobRejected:
        return True
    return False


@pytest.fixture
def blob(sealer):
    return sealer.seal(Purpose.WRAPPING_KEY, SECRET, *CONTEXT)


@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize("secret", [b"", SECRET])
def test_round_trip(sealer, purpose, secret):
    blob = sealer.seal(purpose, secret, *CONTEXT)
    assert sealer.open(purpose, blob, *CONTEXT) == secret
    assert len(blob) == 1 + 4 + 12 + len(secret) + 16
    assert blob[1:5].hex() == sealer._keyring().current


def test_blobs_of_one_secret_differ(sealer):
    assert len({sealer.seal(Purpose.KEY_MATERIAL, SECRET) for _ in range(100)}) == 100


def test_every_changed_byte_is_rejected(sealer, blob):
    for position in range(len(blob)):
        for change in (0x01, 0x80, 0xFF):
            changed = bytearray(blob)
            changed[position] ^= change
            assert rejected(sealer, Purpose.WRAPPING_KEY, bytes(changed), *CONTEXT), position


def test_every_other_length_is_rejected(sealer, blob):
    for length in range(len(blob)):
        assert rejected(sealer, Purpose.WRAPPING_KEY, blob[:length], *CONTEXT), length
    assert rejected(sealer, Purpose.WRAPPING_KEY, blob + b"\0", *CONTEXT)


@pytest.mark.parametrize("purpose", [p for p in Purpose if p is not Purpose.WRAPPING_KEY])
def test_another_purpose_is_rejected(sealer, blob, purpose):
    assert rejected(sealer, purpose, blob, *CONTEXT)


@pytest.mark.parametrize(
    "context",
    [(), CONTEXT[:1], CONTEXT[::-1], (*CONTEXT, ""), ("RSA_2048RSAES_OAEP_SHA_256",)],
)
def test_another_context_is_rejected(sealer, blob, context):
    assert rejected(sealer, Purpose.WRAPPING_KEY, blob, *context)


def test_another_keyring_is_rejected(blob):
    stranger = Keyring.generate()
    assert rejected(Sealer(lambda: stranger), Purpose.WRAPPING_KEY, blob, *CONTEXT)


def test_a_key_of_the_same_id_but_another_value_is_rejected(rings, sealer, blob):
    rings[0] = Keyring(rings[0].current, {rings[0].current: os.urandom(32)})
    assert rejected(sealer, Purpose.WRAPPING_KEY, blob, *CONTEXT)


def test_rotated_keys_open_until_retired(rings, sealer, blob):
    old = rings[0].current
    rings[0] = rings[0].rotated()
    assert sealer.open(Purpose.WRAPPING_KEY, blob, *CONTEXT) == SECRET
    newer = sealer.seal(Purpose.WRAPPING_KEY, SECRET, *CONTEXT)
    assert newer[1:5].hex() == rings[0].current
    rings[0] = rings[0].retired(old)
    assert rejected(sealer, Purpose.WRAPPING_KEY, blob, *CONTEXT)
    assert sealer.open(Purpose.WRAPPING_KEY, newer, *CONTEXT) == SECRET


def holds(sealer, data, mac):
    try:
        sealer.verify_mac(data, mac)
    except InvalidMac:
        return False
    return True


def test_macs(rings, sealer):
    mac = sealer.mac(b"claims")
    assert (mac.key_set, len(mac.tag)) == (rings[0].current, 32)
    sealer.verify_mac(b"claims", mac)
    assert not holds(sealer, b"claims.", mac)
    assert not holds(sealer, b"claims", Mac("00000000", mac.tag))
    assert not holds(sealer, b"claims", Mac("", mac.tag))
    assert not holds(sealer, b"claims", Mac(mac.key_set, mac.tag[:-1]))
    assert not holds(sealer, b"claims", Mac(mac.key_set, b""))
    for position in range(32):
        changed = bytearray(mac.tag)
        changed[position] ^= 1
        assert not holds(sealer, b"claims", Mac(mac.key_set, bytes(changed)))


def test_macs_of_rotated_keys_hold_until_retired(rings, sealer):
    mac = sealer.mac(b"claims")
    rings[0] = rings[0].rotated()
    sealer.verify_mac(b"claims", mac)
    assert sealer.mac(b"claims").key_set == rings[0].current != mac.key_set
    rings[0] = rings[0].retired(mac.key_set)
    assert not holds(sealer, b"claims", mac)
