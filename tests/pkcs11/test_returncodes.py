"""python-pkcs11's exceptions, return codes and their names."""

import pytest
from pkcs11 import exceptions as ck

from hsmwrap.ckr import CKR
from hsmwrap.errors import HsmError, HsmUnavailable, PinError
from hsmwrap.pkcs11.binding.returncodes import (
    RECOVERY,
    CryptokiError,
    code_name,
    is_vendor_defined,
    return_code,
    typed_error,
)

OF_NO_CODE = {
    ck.PKCS11Error,
    ck.MultipleObjectsReturned,
    ck.MultipleTokensReturned,
    ck.NoSuchKey,
    ck.NoSuchToken,
}
CLASSES = [kind for kind in vars(ck).values() if isinstance(kind, type) and kind not in OF_NO_CODE]


def test_every_exception_of_python_pkcs11_is_one_code():
    codes = [return_code(kind()) for kind in CLASSES]
    assert all(isinstance(code, CKR) for code in codes)
    assert len(set(codes)) == len(codes) > 70


@pytest.mark.parametrize("kind", [ck.NoSuchKey, ck.MultipleObjectsReturned])
def test_an_exception_for_no_code_has_its_own_name(kind):
    assert return_code(kind()) is None
    assert code_name(kind()) == kind.__name__


@pytest.mark.parametrize(
    ("text", "code", "name"),
    [
        ("Unmapped error code 0x80000007", 0x80000007, "0x80000007"),
        ("Unmapped error code 0x68", CKR.KEY_FUNCTION_NOT_PERMITTED, "KEY_FUNCTION_NOT_PERMITTED"),
        (
            "Initialisation error (not initialized). Should never see this.",
            CKR.CRYPTOKI_NOT_INITIALIZED,
            "CRYPTOKI_NOT_INITIALIZED",
        ),
    ],
)
def test_codes_that_python_pkcs11_gives_as_a_text(text, code, name):
    error = ck.PKCS11Error(text)
    assert (return_code(error), code_name(error)) == (code, name)
    assert is_vendor_defined(error) == (code >= CKR.VENDOR_DEFINED)


def test_a_call_of_our_own_names_function_and_code():
    assert str(CryptokiError("C_Login", 0xA0)) == "C_Login: PIN_INCORRECT"
    assert str(CryptokiError("C_Login", 0x80000001)) == "C_Login: 0x80000001"


def test_one_mapping_from_return_code_to_error():
    for code, row in RECOVERY.items():
        assert type(typed_error(CryptokiError("C_Sign", code))) is row.error
    assert type(typed_error(ck.PinLocked())) is PinError
    assert type(typed_error(ck.DeviceRemoved())) is HsmUnavailable
    error = typed_error(ck.GeneralError())
    assert (type(error), str(error)) == (HsmError, "the HSM answered GENERAL_ERROR")
