"""The secret of an access key signs, and is in no form that shows it."""

import hmac
import pickle

import pytest
from support.frames import frames_of
from support.http.rpc_signing import hmac_by, sm3

from hsmwrap.errors import ConfigurationError
from hsmwrap.kms import access
from hsmwrap.kms.signing import SigningSecret

SECRET = "Zx9-4711-QQ"


@pytest.mark.parametrize("length", [0, 1, 30, 62, 63, 64, 65, 200])
def test_it_signs_as_the_secret_does(length):
    secret, text = bytes(range(1, length + 1)), b"string to sign"
    signing = SigningSecret(bytearray(secret))
    assert signing.mac("sha256", text) == hmac.digest(secret, text, "sha256")
    assert signing.mac("sha1&", text) == hmac.digest(secret + b"&", text, "sha1")
    assert signing.mac("sm3", text) == hmac_by(sm3, 64, secret, text)
    assert signing.mac("sha256", text) == hmac.digest(secret, text, "sha256")


def test_what_it_was_made_of_is_overwritten():
    secret = bytearray(SECRET.encode())
    SigningSecret(secret)
    assert secret == bytes(len(SECRET))


def test_it_shows_nothing():
    signing = SigningSecret(SECRET)
    assert f"{signing} {signing!r}" == " ".join(["<SigningSecret>"] * 2)
    assert signing == SigningSecret(SECRET)
    assert signing != SigningSecret(SECRET + "x")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="not serialised"):
            pickle.dumps(signing, protocol)
    with pytest.raises(TypeError):
        hash(signing)


def entry(line, name="it"):
    return f'[[access_key]]\nid = "{name}"\n{line}\n'


USUAL = [
    f'secret = "{SECRET}"',
    f"secret = '{SECRET}' # the secret",
    f"\t secret\t=\t'{SECRET}'\nallow = []",
    f"# secret = 'an older one'\nsecret='{SECRET}'",
    f"secret = '{SECRET}'\nallow = [{{ actions = ['*'], keys = ['secret = \"no\"', '#'] }}]",
]
UNUSUAL = [f'"secret" = "{SECRET}"', f"secret = '''{SECRET}'''", 'secret = "Zx9\\u002d4711-QQ"']


@pytest.mark.parametrize("line", USUAL + UNUSUAL)
def test_a_file_s_secrets_are_those_that_are_written(line):
    content = bytearray((entry(line) + entry("secret = 'other'", "other")).encode())
    keys = access._parse(content)
    assert keys.lookup("it").signing == SigningSecret(SECRET)
    assert keys.lookup("other").signing == SigningSecret("other")


@pytest.mark.parametrize("line", USUAL)
def test_a_secret_in_a_usual_form_never_becomes_a_text(line):
    content = bytearray(entry(line).encode())
    secret = access._document(content)["access_key"][0]["secret"]
    assert isinstance(secret, bytearray)
    assert SECRET.encode() not in content
    access.parse_access_keys({"access_key": [{"id": "it", "secret": secret}]})
    assert secret == bytes(len(SECRET))


@pytest.mark.parametrize("text", ["access_key = 7", "access_key = [7]", "secret = 'x'", "= ="])
def test_a_wrong_file_is_refused_as_before(text):
    with pytest.raises(ConfigurationError) as caught:
        access._parse(bytearray(text.encode()))
    assert SECRET not in str(caught.value)
    assert not [f for f in frames_of(caught.value) if "secret" in f.f_locals]
