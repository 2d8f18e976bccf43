"""Implicit rejection of PKCS#1 v1.5 is tried, told, and can be demanded."""

from dataclasses import replace

import pytest
from pkcs11.exceptions import DeviceError, GeneralError
from support.importing import AES, MATERIAL, OAEP1, PKCS1, Desk, open_pkcs11, wrap

from hsmwrap.errors import CombinationRefused
from hsmwrap.pkcs11.sessions.session import PooledSession
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.wrapping import report
from hsmwrap.pkcs11.wrapping.features import ImportPath
from hsmwrap.pkcs11.wrapping.probe import _BROKEN_CIPHERTEXTS, Probe
from hsmwrap.software.rsa import generate, load

SETTINGS = Pkcs11Settings(module="/m")


class Token:
    """A private key; ``explicit`` functions answer an error to what is not of our padding."""

    def __init__(self, *explicit, unlucky=0):
        self.key = load(generate()[1])
        self.explicit, self.unlucky, self.asked = explicit, unlucky, []

    def _answer(self, function, ciphertext):
        self.asked.append(function)
        numbers = self.key.private_numbers()
        block = pow(int.from_bytes(ciphertext), numbers.d, numbers.public_numbers.n)
        assert block.to_bytes(256)[:2] == b"\0\3"
        if function in self.explicit or len(self.asked) <= self.unlucky:
            raise GeneralError
        return b""

    def unwrap_key(self, *, key_data, **_):
        return self._answer("unwrap", key_data)

    def decrypt(self, ciphertext, **_):
        return self._answer("decrypt", ciphertext)


def rejects(token, served=("unwrap", "decrypt")):
    trials = Probe(PooledSession(None, None), None, SETTINGS, None, None)
    paths = {"unwrap": ImportPath.UNWRAP, "decrypt": ImportPath.DECRYPT}
    functions = [paths[each] for each in served]
    return trials._rejects_implicitly(token, token.key.public_key(), functions)


def test_each_function_that_serves_it_has_to_reject_implicitly():
    assert rejects(Token())
    assert not rejects(Token("unwrap"))
    assert not rejects(Token("decrypt"))
    assert rejects(Token("unwrap"), served=("decrypt",))
    assert not rejects(Token(), served=())


def test_random_bytes_of_a_length_that_is_no_key_are_tried_again():
    token = Token(unlucky=2 * _BROKEN_CIPHERTEXTS - 1)  # each is tried twice, as all of the probe
    assert rejects(token, served=("unwrap",))
    assert len(token.asked) == 2 * _BROKEN_CIPHERTEXTS


def test_a_lost_hsm_is_no_answer():
    token = Token()
    token._answer = lambda *_: (_ for _ in ()).throw(DeviceError)
    with pytest.raises(DeviceError):
        rejects(token)


@pytest.fixture(scope="module")
def desks(softhsm):
    opened = [
        Desk(open_pkcs11(softhsm, "implicit", require_implicit_rejection=demanded))
        for demanded in (False, True)
    ]
    yield opened
    for desk in opened:
        desk.backend.close()


@pytest.fixture(scope="module")
def there(desks):
    for desk in desks:
        desk.backend.capabilities()
    (found,) = {desk.backend.health().facts["implicit_rejection"] for desk in desks}
    return found


def test_it_is_refused_before_anything_is_issued(desks, there, monkeypatch):
    served, demanded = desks
    parameters = served.issue(PKCS1)
    ciphertext = wrap(parameters, MATERIAL[AES])
    served.bring_in(parameters, ciphertext)
    if there:
        demanded.bring_in(parameters, ciphertext)
        return
    generated = []
    inner = demanded.backend._backend
    monkeypatch.setattr(inner, "generate_wrapping_key", lambda *_, **__: generated.append(1))
    for call in (
        lambda: demanded.issue(PKCS1),
        lambda: demanded.bring_in(parameters, ciphertext),
    ):
        with pytest.raises(CombinationRefused, match="does not serve RSAES_PKCS1_V1_5") as refused:
            call()
        assert refused.value.rule == "backend-capability"
    assert generated == []
    monkeypatch.undo()
    parameters = demanded.issue(OAEP1)
    demanded.bring_in(parameters, wrap(parameters, MATERIAL[AES]))


@pytest.mark.parametrize(
    ("implicit", "demanded", "said"),
    [
        (True, False, "rejects implicitly (tried)"),
        (True, True, "rejects implicitly (tried)"),
        (False, False, "DOES NOT REJECT IMPLICITLY (tried)"),
        (False, True, "is refused by require_implicit_rejection"),
    ],
)
def test_the_report_says_what_is_there(desks, there, implicit, demanded, said):
    features = desks[0].backend._backend._token().features
    features = replace(features, implicit_rejection=implicit)
    settings = replace(SETTINGS, require_implicit_rejection=demanded)
    told = report.capabilities(settings, features, trusted=True, origin_told=True)
    (note,) = (each for each in told.notes if "RSAES_PKCS1_V1_5" in each)
    assert said in note
    served = {each.algorithm for each in told.wrapping}
    assert (PKCS1 in served) == (implicit or not demanded)
    assert OAEP1 in served
