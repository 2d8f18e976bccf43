"""python-pkcs11's exceptions, return codes and their names."""

import os
import re
import subprocess
import sys
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path

import pkcs11
import pytest
from pkcs11 import exceptions as ck
from pkcs11.constants import Attribute, MechanismFlag, ObjectClass
from pkcs11.mechanisms import KeyType, Mechanism
from support.services import nss
from support.services.opencryptoki import opencryptoki

from hsmwrap.ckr import CKR
from hsmwrap.errors import HsmError, HsmUnavailable, PinError
from hsmwrap.pkcs11.binding import objects
from hsmwrap.pkcs11.binding.client_errors import attribute_reads
from hsmwrap.pkcs11.binding.mechanisms import noted
from hsmwrap.pkcs11.binding.returncodes import (
    _FUNCTIONS,
    RECOVERY,
    CryptokiError,
    HsmLost,
    answer_of,
    code_name,
    is_vendor_defined,
    return_code,
    said,
    typed_error,
)
from hsmwrap.pkcs11.binding.templates import secret_key
from hsmwrap.pkcs11.sessions.connection import Connection
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.token.selection import find_token
from hsmwrap.testing.softhsm import find_module

DEADLINE = 60

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
    assert str(CryptokiError("C_Login", 0xA0)) == "C_Login answered CKR_PIN_INCORRECT (0xA0)"
    assert str(CryptokiError("C_Login", 0x8000000A)) == "C_Login answered 0x8000000A"
    by_mechanism = CryptokiError("C_UnwrapKey", 0xD1, Mechanism.RSA_PKCS_OAEP)
    assert (
        said(by_mechanism)
        == "C_UnwrapKey(CKM_RSA_PKCS_OAEP) answered CKR_TEMPLATE_INCONSISTENT (0xD1)"
    )
    assert said(CryptokiError("C_Decrypt", 0x40, 0x8000C0DE)).startswith("C_Decrypt(0x8000C0DE) ")


def test_one_mapping_from_return_code_to_error():
    for code, row in RECOVERY.items():
        assert type(typed_error(CryptokiError("C_Sign", code))) is row.error
    assert type(typed_error(ck.PinLocked())) is PinError
    assert type(typed_error(ck.DeviceRemoved())) is HsmUnavailable
    error = typed_error(ck.GeneralError())
    assert (type(error), str(error)) == (HsmError, "the HSM answered CKR_GENERAL_ERROR (0x5)")


# --- one form for what an HSM said ----------------------------------------------------------------


def test_what_is_no_answer_of_an_hsm_is_not_called_one():
    lost = HsmLost("two tokens match", ck.DeviceRemoved())
    ours = ck.UserNotLoggedIn("no login covers the session any more")
    for error in (lost, HsmLost("two tokens match"), ours, ck.NoSuchKey()):
        assert answer_of(error) is None
        assert "answered" not in said(error)
    assert (code_name(lost), return_code(lost)) == ("DEVICE_REMOVED", None)
    assert type(typed_error(lost)) is HsmUnavailable
    assert str(typed_error(lost)) == "two tokens match"


@pytest.fixture
def session(softhsm):
    settings = Pkcs11Settings.from_mapping(softhsm.bare_settings())
    connection = Connection(settings)
    holder = ExitStack()
    host = holder.enter_context(closing(connection))._host
    module, _ = holder.enter_context(host.inside(5))
    with holder, find_token(module, settings.selector).open(rw=True) as opened:
        yield opened


def test_function_and_mechanism_of_every_call(session):
    """Through python-pkcs11, which says neither."""
    uses = MechanismFlag.WRAP | MechanismFlag.UNWRAP | MechanismFlag.DERIVE | MechanismFlag.ENCRYPT
    kek = session.generate_key(KeyType.AES, 256, capabilities=uses)
    _, pair = session.generate_keypair(KeyType.RSA, 2048, capabilities=MechanismFlag.DECRYPT)
    gone = session.generate_key(KeyType.AES, 128)
    gone.destroy()
    oaep, wrap, dh = Mechanism.RSA_PKCS_OAEP, Mechanism.AES_KEY_WRAP_PAD, Mechanism.ECDH1_DERIVE
    become = (ObjectClass.SECRET_KEY, KeyType.AES)
    point = (1, None, b"")
    calls = {
        "C_GenerateKey(CKM_AES_KEY_GEN)": lambda: objects.generate_key(
            session, secret_key(KeyType.AES), 7
        ),
        "C_GenerateKeyPair(CKM_RSA_PKCS_KEY_PAIR_GEN)": lambda: session.generate_keypair(
            KeyType.RSA, 8
        ),
        "C_CreateObject": lambda: session.create_object({Attribute.CLASS: ObjectClass.SECRET_KEY}),
        "C_WrapKey(CKM_RSA_PKCS_OAEP)": lambda: kek.wrap_key(kek, mechanism=oaep),
        "C_UnwrapKey(CKM_AES_KEY_WRAP_PAD)": lambda: kek.unwrap_key(
            *become, bytes(24), mechanism=wrap
        ),
        "C_DeriveKey(CKM_ECDH1_DERIVE)": lambda: kek.derive_key(
            KeyType.AES, 128, mechanism=dh, mechanism_param=point
        ),
        "C_EncryptInit(CKM_RSA_PKCS_OAEP)": lambda: kek.encrypt(b"", mechanism=oaep),
        "C_Decrypt(CKM_RSA_PKCS_OAEP)": lambda: pair.decrypt(bytes(256), mechanism=oaep),
        "C_DestroyObject": gone.destroy,
        "C_GetAttributeValue": lambda: gone[Attribute.LABEL],
        "C_SetAttributeValue": lambda: gone.__setitem__(Attribute.LABEL, "x"),
        "C_Login": lambda: session.token.open(user_pin="x"),
    }
    for call, fails in calls.items():
        with pytest.raises(ck.PKCS11Error) as caught, note_login(call):
            fails()
        assert said(caught.value).startswith(f"{call} answered CKR_")


def note_login(call):
    return noted("function", call) if call == "C_Login" else nullcontext()


def test_each_method_of_python_pkcs11_calls_the_function_that_is_said():
    source = Path(pkcs11.__file__).with_name("_pkcs11.pyx").read_text("utf-8")
    classes = dict(
        re.findall(
            r"^(?:cdef )?class (\w+)[^\n]*:\n(.*?)(?=^\S|\Z)", source, re.MULTILINE | re.DOTALL
        )
    )
    for name, function in _FUNCTIONS.items():
        kind, method = name.split(".")
        body = re.split(rf" {method}\(", classes[kind], maxsplit=1)[1]
        body = re.split(r"^    (?:c?def|@)", body, maxsplit=1, flags=re.MULTILINE)[0]
        assert re.search(
            rf"{function}\b|__{function[2:].lower()}_operation|self._finalize", body
        ), name


def test_a_code_that_python_pkcs11_made_up_is_not_the_hsms():
    """It turns what a module answers to C_GetAttributeValue into FUNCTION_FAILED."""
    with (
        pytest.raises(ck.SessionHandleInvalid) as caught,
        attribute_reads(),
        noted("function", "C_GetAttributeValue"),
    ):
        raise ck.FunctionFailed
    hidden = "C_GetAttributeValue failed, with a code that python-pkcs11 does not tell"
    assert said(caught.value) == hidden


@pytest.mark.slow
def test_why_softhsm_does_not_start_without_its_configuration(tmp_path):
    no_configuration = {"SOFTHSM2_CONF": "/nonexistent"}
    answer = "C_Initialize answered CKR_GENERAL_ERROR (0x5)"
    require_reason(str(find_module()), no_configuration, answer, tmp_path)


@pytest.mark.slow
def test_what_nss_is_without_library_parameters_reaches_the_user(tmp_path):
    """3.110 starts, with tokens that have no database; 3.87 does not."""
    path = nss.find_module()
    if path is None:
        pytest.skip(nss.NO_NSS)
    done = list_keys(path, {}, tmp_path)
    if done.returncode == 2:
        assert "0 of 2 tokens match token_label 'any'" in done.stderr
        assert nss.LABEL in done.stderr
    else:
        require_reason(path, {}, "C_Initialize answered CKR_ARGUMENTS_BAD (0x7)", tmp_path)


def test_why_opencryptoki_does_not_start_without_its_daemon(tmp_path):
    with opencryptoki(tmp_path, daemon_runs=False) as token:
        answer = "C_Initialize answered CKR_FUNCTION_FAILED (0x6)"
        require_reason(token.module, {}, answer, tmp_path)


def list_keys(path, environment, directory):
    pin = directory / "a-pin"
    if not pin.exists():
        pin.write_text("0000")
        pin.chmod(0o400)
    command = [sys.executable, "-m", "hsmwrap.cli", "keys", "list", "--module", path]
    return subprocess.run(
        [*command, "--token-label", "any", "--pin-file", pin],
        env=os.environ | environment,
        capture_output=True,
        check=False,
        text=True,
        timeout=DEADLINE,
    )


def require_reason(path, environment, answer, directory):
    done = list_keys(path, environment, directory)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"hsmwrap: the PKCS#11 module {os.path.realpath(path)} does not start: ")
    assert answer in last
    assert "library_parameters" in last
    assert "NOT_INITIALIZED" not in done.stderr
