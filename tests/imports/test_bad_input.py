"""Bad input gets its own answer, leaves nothing behind, and is in the table of docs/errors.md."""

import re
from pathlib import Path

import pytest
from support.bad_input import ROWS, Scene, changed_rsa, good, wrong_pkcs1
from support.importing import AES, MATERIAL, PKCS1, Desk, open_pkcs11, open_software

from hsmwrap.errors import HsmwrapError, InvalidKeyMaterial
from hsmwrap.software import KeyringFile

TABLE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
NAMES = {row.name for row in ROWS}


@pytest.fixture(params=["software", "pkcs11", "resident"])
def scene(request, desk_of):
    name = request.param

    def retired():
        return _RETIRED["software" if name == "software" else "pkcs11"](request)

    return Scene(desk_of(name), desk_of, name, retired)


def _retired_keyring(request):
    path = request.getfixturevalue("tmp_path") / "keyring.json"
    keyring = KeyringFile(path)
    old = keyring.create().current
    desk = Desk(open_software(keyring_file=str(path)))
    request.addfinalizer(desk.backend.close)

    def retire():
        keyring.rotate()
        keyring.retire(old)
        return desk

    return desk, retire


def _retired_key_set(request):
    softhsm = request.getfixturevalue("softhsm")
    prefix = f"retired-{request.node.callspec.params['scene']}"
    desk = Desk(open_pkcs11(softhsm, prefix))
    request.addfinalizer(desk.backend.close)

    def retire():
        softhsm.run_keys("rotate", prefix)
        softhsm.run_keys("retire", prefix, "1", "--force")
        return desk

    return desk, retire


_RETIRED = {"software": _retired_keyring, "pkcs11": _retired_key_set}


def outcome(attempt):
    """The error as the caller sees it; for a failed ciphertext, its complete text."""
    try:
        attempt()
    except HsmwrapError as error:
        seen = type(error), error.code, error.http_status, error.retryable
        if isinstance(error, InvalidKeyMaterial):
            alone = error.__cause__ is None and (
                error.__suppress_context__ or not error.__context__
            )
            seen += (str(error), error.api_message, error.args, vars(error), alone)
        return repr(seen)
    return "accepted"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input_has_its_own_answer(row, scene):
    attempts = list(row.attempts(scene))
    before = scene.desk.count()
    seen = {outcome(attempt) for attempt in attempts}
    error = row.error
    expected = error, error.code, error.http_status, False
    if error is InvalidKeyMaterial:
        text = "key material is invalid."
        expected += (text, text, (text,), {}, True)
    assert seen == {repr(expected)}
    assert scene.desk.count() == before


def test_what_pkcs1_cannot_detect_is_never_the_client_s_key(scene):
    """Wrong padding is refused, or with implicit rejection (OpenSSL 3.2) is some random key.

    Each answer is the same each time, so asking again tells nothing more.
    """
    desk = scene.desk
    parameters, ciphertext = good(desk, PKCS1)
    known = desk.bring_in(parameters, ciphertext).imported.check_value
    bad = wrong_pkcs1(parameters.public_key, MATERIAL[AES])
    bad += changed_rsa(ciphertext, parameters.public_key, None)
    accepted = {}
    for number, each in enumerate(bad * 2):
        try:
            value = desk.bring_in(parameters, each).imported.check_value
        except InvalidKeyMaterial:
            value = None
        assert value != known
        assert accepted.setdefault(number % len(bad), value) == value


# --- docs/errors.md -----------------------------------------------------------------------------


def _documented():
    text, heading = TABLE.read_text("utf-8"), "## Bad input, row by row"
    section = re.search(rf"^{heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"docs/errors.md has no heading {heading!r}"
    return [line for line in section[1].splitlines() if re.match(r"\| [^-]", line)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_table_has_this_row(row):
    assert row.markdown() in _documented()


def test_the_table_has_no_row_that_nothing_proves():
    header, *rows = _documented() or [None]
    assert header == "| what is wrong | error class | code | HTTP |"
    assert set(rows) == {row.markdown() for row in ROWS}


def test_rows_have_names_of_their_own():
    assert len(NAMES) == len(ROWS)
