"""One table of HSM tokens with quirks: what the report says of each, and that it holds."""

import pytest
from pkcs11.exceptions import DeviceError
from support.faults.shim import nothing_left
from support.importing import AES, MATERIAL, OAEP1, SM4, spec_of
from support.pkcs11.quirks import CARD, NETWORK_HSM, ONE_SESSION_CARD, QUIRKS, Quirk, R
from support.pkcs11.vendors import SM_ONLY

from hsmwrap import registry
from hsmwrap.backend import Exposure, ReSealsKeys
from hsmwrap.catalog import WrappingKeySpec
from hsmwrap.checkvalue import check_value
from hsmwrap.ckr import answered
from hsmwrap.errors import InvalidKeyMaterial
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.testing._conformance.base import tomorrow
from hsmwrap.testing.clients import openssl_encrypt, pyca_encrypt


@pytest.fixture
def backend(request, softhsm, shim):
    quirk = request.param
    prefix = f"quirk{QUIRKS.index(quirk) if quirk in QUIRKS else hash(quirk.restrictions.value)}"
    settings = quirk.play(shim, softhsm, key_prefix=prefix)
    made = Pkcs11Backend.initialise_keys(settings)
    assert made.detail.split(" ", 1)[0] == str(quirk.own_keys)
    with nothing_left(shim), registry.open_backend("pkcs11", settings) as opened:
        yield opened, quirk


@pytest.mark.parametrize(
    "backend", [*QUIRKS, NETWORK_HSM, CARD, ONE_SESSION_CARD], indirect=True, ids=str
)
def test_what_the_report_says_is_what_happens(backend):
    backend, quirk = backend
    try:
        raise DeviceError("the caller's")  # noqa: TRY301  # handled at once
    except DeviceError:  # a caller may ask while it handles an error of its own
        report = backend.capabilities()
    assert {w.algorithm: (w.exposure, w.custody) for w in report.wrapping} == quirk.rows
    _check_reasons(report)
    told = _everything_told(report)
    assert str(InvalidKeyMaterial()) not in told
    assert [each for each in quirk.says if each not in told] == []
    assert report.key_for(AES).usable == quirk.usable

    for row in report.wrapping:
        key = backend.generate_wrapping_key(row.spec, row.algorithm, expires_at=tomorrow())
        for key_spec in (AES, SM4):
            _import(backend, row, key, key_spec)
        backend.discard_wrapping_key(key.private_key)
    backend.verify_mac(b"token", backend.mac(b"token"))


def _check_reasons(report):
    host = [w.algorithm for w in report.wrapping if w.exposure is Exposure.HOST and not w.reason]
    assert host == []
    served = {(w.spec, w.algorithm) for w in report.wrapping}
    missing = {(m.spec, m.algorithm) for m in report.missing if m.reason}
    assert served | missing == {(spec_of(a), a) for a in type(report.wrapping[0].algorithm)}
    assert not served & missing


def _everything_told(report):
    tried = [t for each in (*report.wrapping, *report.missing) for t in each.tried]
    answers = [
        answered(t.code, t.function, t.mechanism) if t.code else t.wrong
        for t in (*tried, *report.failed)
    ]
    reasons = [each.reason for each in (*report.wrapping, *report.missing)]
    return "\n".join([*answers, *reasons, *(t.consequence for t in report.failed), *report.notes])


def _import(backend, row, key, key_spec):
    material = MATERIAL[key_spec]
    encrypt = openssl_encrypt if key.public_key[:2] == b"\x30\x59" else pyca_encrypt

    def bring_in(data):
        ciphertext = encrypt(row.algorithm, key.public_key, data)
        arguments = (key.private_key, row.algorithm, ciphertext)
        return backend.unwrap_material(*arguments, key_spec=key_spec)

    imported = bring_in(material)
    assert imported.check_value == check_value(material)
    assert imported.exposure is row.exposure
    if backend.capabilities().key_for(key_spec).usable:
        assert backend.decrypt(imported.key, backend.encrypt(imported.key, b"hello")) == b"hello"
    backend.destroy_key(imported.key)
    with pytest.raises(InvalidKeyMaterial):
        bring_in(material + b"x")


@pytest.mark.parametrize("quirk", [Quirk(R.KEY_WRAP_PAD_ONLY), Quirk(R.KEY_WRAP_KWP_ONLY)], ids=str)
def test_keys_move_under_either_number_of_aes_key_wrap(softhsm, shim, quirk):
    settings = quirk.play(shim, softhsm, key_prefix=f"moves-{quirk}")
    so_pin_file = softhsm.environment["HSMWRAP_SO_PIN_FILE"]
    made = Pkcs11Backend.initialise_keys(settings, so_pin_file=so_pin_file)
    assert "cannot move" not in made.detail
    with registry.open_backend("pkcs11", settings) as backend:
        key = backend.generate_wrapping_key(WrappingKeySpec.RSA_2048, OAEP1, expires_at=tomorrow())
        ciphertext = openssl_encrypt(OAEP1, key.public_key, MATERIAL[AES])
        old = backend.unwrap_material(key.private_key, OAEP1, ciphertext, key_spec=AES).key
        message = backend.encrypt(old, b"hello")
    Pkcs11Backend.rotate_keys(settings, so_pin_file=so_pin_file)
    with registry.open_backend("pkcs11", settings) as backend:
        moved = ReSealsKeys.of(backend).reseal(old)
        assert ReSealsKeys.of(backend).key_set_of(moved) == "2"
        assert backend.decrypt(moved, message) == b"hello"


def test_every_restriction_is_in_the_table():
    played = SM_ONLY.restrictions
    for quirk in QUIRKS:
        played |= quirk.restrictions
    assert [each for each in R if each not in played] == []
