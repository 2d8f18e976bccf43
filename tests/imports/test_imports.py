"""Issue and import over both built-in backends, with clients that share no code with them."""

import base64
import re
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from support.backends.scripted import Scripted
from support.importing import (
    AES,
    HSM,
    MATERIAL,
    OAEP1,
    OAEP256,
    SM2PKE,
    each_algorithm,
    each_key_spec,
    flip,
    spec_of,
    wrap,
)

from hsmwrap import tokens
from hsmwrap.catalog import WrappingKeySpec
from hsmwrap.errors import (
    ExpiredImportToken,
    InvalidImportToken,
    InvalidKeyMaterial,
    InvalidParameter,
)
from hsmwrap.imports import TOKEN_LIFETIME, Cmk, ImportService
from hsmwrap.policy import Deployment
from hsmwrap.testing.clients import decrypt_message

# --- from the table to a usable key -------------------------------------------------------------


@each_algorithm
@each_key_spec
def test_import_and_use(desk, algorithm, key_spec):
    cmk, material = desk.cmk(key_spec=key_spec), MATERIAL[key_spec]
    parameters = desk.issue(algorithm, cmk)
    imported = desk.bring_in(parameters, wrap(parameters, material), cmk).imported
    capabilities = desk.backend.capabilities()
    assert imported.key.key_spec is key_spec
    assert imported.exposure is capabilities.wrapping_for(spec_of(algorithm), algorithm).exposure
    if capabilities.key_for(key_spec).usable:
        message = desk.backend.encrypt(imported.key, b"message", b"context")
        assert decrypt_message(key_spec, material, message, b"context") == b"message"


@each_algorithm
def test_public_keys_and_tokens_have_the_documented_size(desk, algorithm, tmp_path):
    parameters = desk.issue(algorithm)
    assert len(parameters.public_key) == (91 if algorithm is SM2PKE else 294)
    file = tmp_path / "key.der"
    file.write_bytes(parameters.public_key)
    shown = subprocess.run(
        ["openssl", "pkey", "-pubin", "-inform", "DER", "-in", file, "-noout", "-text"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ("SM2" if algorithm is SM2PKE else "Exponent: 65537") in shown
    # A request line with the token in it stays below the 8 KB at which servers stop.
    assert len(parameters.import_token) < 1500


@each_algorithm
def test_no_two_calls_give_the_same_key_or_token(desk, algorithm):
    calls = [desk.issue(algorithm) for _ in range(3)]
    assert len({p.public_key for p in calls}) == len({p.import_token for p in calls}) == 3
    ids = {tokens.decode(p.import_token, desk.backend.verify_mac).token_id for p in calls}
    assert len(ids) == 3


def test_the_token_says_what_was_issued(desk):
    cmk = desk.cmk("cmk-é")
    parameters = desk.issue(OAEP256, cmk)
    claims = tokens.decode(parameters.import_token, desk.backend.verify_mac)
    assert (claims.cmk_id, claims.backend) == ("cmk-é", desk.backend.name)
    assert (claims.spec, claims.algorithm) == (WrappingKeySpec.RSA_2048, OAEP256)
    assert (claims.protection_level, claims.expires_at) == (HSM, parameters.expires_at)


def test_the_api_s_five_fields(any_desk):
    parameters = any_desk.issue(OAEP1)
    answer = parameters.to_api()
    assert set(answer) == {"KeyId", "ImportToken", "PublicKey", "TokenExpireTime", "RequestId"}
    assert answer["KeyId"] == "cmk-1"
    assert base64.b64decode(answer["ImportToken"], validate=True) == parameters.import_token
    assert base64.b64decode(answer["PublicKey"], validate=True) == parameters.public_key
    assert answer["TokenExpireTime"] == "2026-01-02T12:00:00Z"
    assert re.fullmatch(r"[0-9A-F]{8}(-[0-9A-F]{4}){3}-[0-9A-F]{12}", answer["RequestId"])
    assert parameters.to_api()["RequestId"] != answer["RequestId"]
    assert parameters.to_api("request-7")["RequestId"] == "request-7"


def test_what_a_client_sends_back_does_not_show(spied):
    parameters = spied.issue(OAEP1)
    shown = repr(parameters) + repr(spied.cmk(check_value=b"check value"))
    assert "import_token" not in shown
    assert "check_value" not in shown


def test_the_api_s_time_is_utc_whatever_the_clock_s_zone(spied):
    spied.clock.now = datetime(2026, 1, 1, 20, 0, 0, 999999, timezone(timedelta(hours=8)))
    assert spied.issue(OAEP1).to_api()["TokenExpireTime"] == "2026-01-02T12:00:00Z"


# --- re-import ----------------------------------------------------------------------------------


@each_algorithm
@each_key_spec
def test_re_import_takes_the_same_material_only(desk, algorithm, key_spec):
    cmk = desk.cmk(key_spec=key_spec)
    parameters = desk.issue(algorithm, cmk)
    first = desk.bring_in(parameters, wrap(parameters, MATERIAL[key_spec]), cmk)
    again = replace(cmk, check_value=first.imported.check_value)
    parameters = desk.issue(SM2PKE if algorithm is OAEP1 else OAEP1, again)
    second = desk.bring_in(parameters, wrap(parameters, MATERIAL[key_spec]), again)
    assert second.imported.check_value == first.imported.check_value
    before = desk.count()
    for bit in (0, 8 * key_spec.material_length - 1):
        other = wrap(parameters, flip(MATERIAL[key_spec], bit))
        with pytest.raises(InvalidKeyMaterial):
            desk.bring_in(parameters, other, again)
    assert desk.count() == before


def test_backends_agree_on_check_values(desk_of):
    values = set()
    for name in ("software", "pkcs11", "resident"):
        desk = desk_of(name)
        parameters = desk.issue(OAEP1)
        result = desk.bring_in(parameters, wrap(parameters, MATERIAL[AES]))
        values.add(result.imported.check_value)
    assert len(values) == 1


# --- time ---------------------------------------------------------------------------------------


def test_tokens_are_valid_for_24_hours_and_may_be_used_again(desk):
    parameters = desk.issue(OAEP1)
    assert parameters.expires_at == desk.clock.now + timedelta(hours=24)
    ciphertext = wrap(parameters, MATERIAL[AES])
    values = set()
    for step in ({}, {"hours": 12}, {"hours": 11, "minutes": 59, "seconds": 59, "microseconds": 9}):
        desk.clock.advance(**step)
        values.add(desk.bring_in(parameters, ciphertext).imported.check_value)
    assert len(values) == 1


@pytest.mark.parametrize("late", [timedelta(0), timedelta(microseconds=1), timedelta(days=400)])
def test_at_the_very_second_of_its_expiry_a_token_is_expired(any_desk, late):
    parameters = any_desk.issue(OAEP1)
    any_desk.clock.now = parameters.expires_at + late
    with pytest.raises(ExpiredImportToken):
        any_desk.bring_in(parameters, wrap(parameters, MATERIAL[AES]))


def test_only_an_authentic_token_is_called_expired(any_desk):
    parameters = any_desk.issue(OAEP1)
    any_desk.clock.advance(days=2)
    changed = replace(parameters, import_token=flip(parameters.import_token, 999))
    with pytest.raises(InvalidImportToken):
        any_desk.bring_in(changed, b"")
    with pytest.raises(InvalidImportToken):
        any_desk.bring_in(parameters, b"", any_desk.cmk("cmk-2"))


def test_the_lifetime_can_be_set(spied):
    parameters = spied.issue(OAEP1, service=spied.service(token_lifetime=timedelta(minutes=5)))
    assert parameters.expires_at == spied.clock.now + timedelta(minutes=5)
    assert timedelta(hours=24) == TOKEN_LIFETIME


def test_without_a_clock_the_time_is_now():
    service = ImportService({HSM: Scripted()}, Deployment())
    before = datetime.now(UTC).replace(microsecond=0)
    parameters = service.get_parameters_for_import(Cmk("k", AES, HSM), "RSA_2048", OAEP1)
    assert before <= parameters.expires_at - TOKEN_LIFETIME <= datetime.now(UTC)
    good = wrap(parameters, MATERIAL[AES])
    service.import_key_material(Cmk("k", AES, HSM), good, parameters.import_token)


@pytest.mark.parametrize("ahead", [timedelta(0), timedelta(seconds=-1), timedelta(days=-9)])
def test_material_cannot_expire_in_the_past(spied, ahead):
    parameters = spied.issue(OAEP1)
    with pytest.raises(InvalidParameter) as caught:
        spied.bring_in(parameters, b"", key_material_expire=spied.clock.now + ahead)
    assert caught.value.name == "KeyMaterialExpireUnix"
    assert "unwrap_material" not in spied.backend.calls


def test_the_material_s_expiry_is_handed_on(spied):
    parameters, later = spied.issue(OAEP1), spied.clock.now + timedelta(seconds=1)
    good = wrap(parameters, MATERIAL[AES])
    assert spied.bring_in(parameters, good, key_material_expire=later).expires_at == later
    assert spied.bring_in(parameters, good).expires_at is None
