"""No secret in a log record, a repr or an error."""

import base64
import logging
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.importing import OAEP1, flip, wrap

from hsmwrap import tokens
from hsmwrap.errors import InvalidImportToken, InvalidKeyMaterial


def _spellings(secret):
    encoded = base64.b64encode(secret).decode()
    return {repr(secret)[2:-1], secret.hex(), secret.hex().upper(), encoded, encoded.rstrip("=")}


def _found(secrets, text):
    return [name for name, secret in secrets.items() if any(s in text for s in _spellings(secret))]


@pytest.fixture
def conversation(desk, caplog):
    """The output of a good import and some bad ones, and their secrets."""
    caplog.set_level(logging.DEBUG)
    cmk = desk.cmk()
    parameters = desk.issue(OAEP1, cmk)
    material = bytes(range(100, 132))
    ciphertext = wrap(parameters, material)
    result = desk.bring_in(parameters, ciphertext, cmk)
    again = replace(cmk, check_value=result.imported.check_value)
    errors = []
    for bad in (b"", wrap(parameters, bytes(31)), wrap(parameters, bytes(32))):
        with pytest.raises(InvalidKeyMaterial) as caught:
            desk.bring_in(parameters, bad, again)
        errors.append(caught.value)
    with pytest.raises(InvalidImportToken) as caught:
        desk.bring_in(
            replace(parameters, import_token=flip(parameters.import_token, 99)), ciphertext
        )
    errors.append(caught.value)
    claims = tokens.decode(parameters.import_token, desk.backend.verify_mac)
    secrets = {
        "material": material,
        "token": parameters.import_token,
        "wrapped private key": claims.private_key.data,
        "imported key": result.imported.key.data,
    }
    return SimpleNamespace(
        secrets=secrets,
        objects=[desk.backend, cmk, again, parameters, result, claims, claims.private_key],
        errors=errors,
    )


@pytest.fixture
def pins(softhsm):
    names = ("HSMWRAP_PIN_FILE", "HSMWRAP_SO_PIN_FILE")
    return {n: Path(softhsm.environment[n]).read_bytes().strip() for n in names}


def test_nothing_secret_is_logged(conversation, pins, caplog):
    records = caplog.get_records("setup")
    events = [record.getMessage() for record in records if record.name == "hsmwrap.imports"]
    assert events == ["issued parameters for import", "imported key material"]
    text = "".join(record.getMessage() + repr(vars(record)) for record in records)
    assert "cmk-1" in text
    assert _found(conversation.secrets | pins, text) == []


def test_nothing_secret_shows(conversation, pins):
    shown = conversation.objects + conversation.errors
    shown += [getattr(o, f.name) for o in shown if is_dataclass(o) for f in fields(o)]
    text = "".join(
        repr(thing) + str(thing) for thing in shown if not isinstance(thing, bytes | bytearray)
    )
    assert _found(conversation.secrets | pins, text) == []


def test_errors_bring_no_other_error_along(conversation):
    for error in conversation.errors:
        assert error.__cause__ is None
        assert error.__suppress_context__ or error.__context__ is None
