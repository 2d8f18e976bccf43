"""Base64 has one text for each value: no second one means the same token or ciphertext."""

import base64
import string

import pytest
from support.kms.fakes import AES_MATERIAL, import_request

from hsmwrap.errors import HsmwrapError, InvalidParameter
from hsmwrap.kms.parameters import binary

ALPHABET = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"


def with_ignored_bits(text):
    """The same bytes for a decoder that ignores the bits after the last one."""
    digits = text.rstrip("=")
    last = ALPHABET[ALPHABET.index(digits[-1]) + 1]
    return digits[:-1] + last + text[len(digits) :]


OTHER_TEXTS = {
    "ignored bits": with_ignored_bits,
    "no padding": lambda text: text.rstrip("="),
    "part of the padding": lambda text: text[:-1],
    "more padding": lambda text: text + "=",
    "padding twice": lambda text: text + "====",
    "line end behind": lambda text: text + "\n",
    "lines": lambda text: text[:4] + "\n" + text[4:],
    "carriage return": lambda text: text + "\r\n",
    "blank before": lambda text: " " + text,
    "blank for +": lambda text: text.replace("+", " "),
    "URL-safe alphabet": lambda text: text.replace("+", "-").replace("/", "_"),
    "more behind the padding": lambda text: text + "AAAA",
    "NUL": lambda text: text + "\0",
    "full-width =": lambda text: text.replace("=", "\uff1d"),
}
# One byte over, so that there are padding and ignored bits; + and / are in it.
VALUE = b"\xfb\xff\xbf\xfe"


@pytest.mark.parametrize("change", OTHER_TEXTS.values(), ids=OTHER_TEXTS)
def test_other_texts_of_the_same_bytes_are_refused(change):
    text = base64.b64encode(VALUE).decode()
    assert binary("X", text) == VALUE
    assert change(text) != text
    with pytest.raises(InvalidParameter):
        binary("X", change(text))


def test_every_short_text_means_itself_or_nothing():
    for first in ALPHABET:
        for second in ALPHABET:
            for end in ("==", "A=", "AA", "=", ""):
                text = first + second + end
                try:
                    value = binary("X", text)
                except InvalidParameter:
                    continue
                assert base64.b64encode(value).decode() == text


def refusal(call, *arguments, **parameters):
    with pytest.raises(HsmwrapError) as caught:
        call(*arguments, **parameters)
    return caught.value.code


def changes_of(text):
    """The changes that a text of this length and these digits can have."""
    for change in OTHER_TEXTS.values():
        if not (change is with_ignored_bits and not text.endswith("=")) and change(text) != text:
            yield change(text)


@pytest.fixture
def parameters(client):
    return import_request(client.parameters(client.create()), AES_MATERIAL)


def test_each_parameter_has_its_code(client, parameters):
    for name, code in (
        ("ImportToken", "InvalidImportToken"),
        ("EncryptedKeyMaterial", "InvalidParameter"),
    ):
        for text in changes_of(parameters[name]):
            assert refusal(client, "ImportKeyMaterial", **parameters | {name: text}) == code
    client("ImportKeyMaterial", **parameters)
    key_id = parameters["KeyId"]
    blob = client.usable(key_id)
    for text in changes_of(blob):
        assert refusal(client, "Decrypt", CiphertextBlob=text) == "InvalidParameter"
    for text in changes_of("aGVsbG8="):
        assert refusal(client, "Encrypt", KeyId=key_id, Plaintext=text) == "InvalidParameter"
