"""What error answers recommend: row by row, and one text for every InvalidKeyMaterial."""

import base64
import os
import re

import pytest
from support.documents import ROOT, section_of
from support.kms.fakes import AES_MATERIAL, Client, import_request

from hsmwrap.errors import HsmError, HsmwrapError, InvalidKeyMaterial
from hsmwrap.http import errors as http_errors
from hsmwrap.kms import Caller, Permissions
from hsmwrap.kms import errors as kms_errors
from hsmwrap.kms.blobs import CiphertextBlob
from hsmwrap.kms.recommend import ELSE, HINTS, SILENT, recommend

UNKNOWN_KEY = "8a8e3a5f-0000-4000-8000-000000000000"
IMPORT = {"KeyId": UNKNOWN_KEY, "ImportToken": "aGVsbG8=", "EncryptedKeyMaterial": "aGVsbG8="}
USE = {"KeyId": UNKNOWN_KEY, "Plaintext": "aGVsbG8="}
BLOB = base64.b64encode(CiphertextBlob(UNKNOWN_KEY, b"x").to_bytes()).decode()
MOVED = {"CiphertextBlob": BLOB, "DestinationKeyId": UNKNOWN_KEY}
PEM = "-----BEGIN MESSAGE-----\naGVsbG8=\n-----END MESSAGE-----\n"

# Action, what is wrong in its parameters, and the recommendation.
MISTAKES = [
    *(
        ("ImportKeyMaterial", IMPORT | {"KeyMaterialExpireUnix": value}, text)
        for value, text in (
            ("1893456000000", "KeyMaterialExpireUnix is in milliseconds? It takes seconds since"),
            ("2030-01-01T00:00:00Z", "KeyMaterialExpireUnix is a date? It takes seconds since"),
            ("1893456000.0", "KeyMaterialExpireUnix has a fraction: it takes whole seconds."),
            ("-1", "KeyMaterialExpireUnix: is not a whole number from 0 to 253402300799"),
        )
    ),
    *(
        (action, rest | {parameter: value}, f"{parameter} {text}")
        for action, rest, parameter in (
            ("ImportKeyMaterial", IMPORT, "EncryptedKeyMaterial"),
            ("ImportKeyMaterial", IMPORT, "ImportToken"),
            ("Encrypt", USE, "Plaintext"),
            ("Decrypt", {}, "CiphertextBlob"),
        )
        for value, text in (
            (PEM, "is PEM? It takes base64 of the bytes, without the lines around it."),
            ("aGVs\nbG8=\n", "contains line breaks: write base64 in one line."),
            ("aGVs\r\nbG8=", "contains line breaks: write base64 in one line."),
            ("a Vsb G8=", "contains blanks: + is percent-encoded as %2B in a query or a form."),
            ("aGVsbG8%3D", "is percent-encoded twice?"),
            ("_-_-", "is base64url? It takes base64 with + and /."),
            ("0a1B2c", "is hexadecimal? It takes base64."),
            ("aGVsbG8", "is cut off, or lacks = at its end."),
        )
    ),
    *(
        (action, rest | {parameter: "{'a': 'b'}"}, f"{parameter} has single quotes: JSON takes")
        for action, rest, parameter in (
            ("Encrypt", USE, "EncryptionContext"),
            ("ReEncrypt", MOVED, "SourceEncryptionContext"),
            ("ReEncrypt", MOVED, "DestinationEncryptionContext"),
        )
    ),
    ("Encrypt", USE | {"EncryptionContext": "[]"}, "EncryptionContext: is not a JSON object of"),
    ("Decrypt", {"CiphertextBlob": "aGVsbG8="}, "Send the whole CiphertextBlob, and the"),
    ("ImportKeyMaterial", IMPORT | {"ImportToken": "????"}, "Send the ImportToken that"),
    ("DescribeKey", {"KeyId": f"{UNKNOWN_KEY}\n"}, "KeyId contains blanks or line breaks."),
    ("DescribeKey", {"KeyId": "acs:kms:a:1:key/x"}, "The ARN is of another region or account?"),
    ("DescribeKey", {"KeyId": UNKNOWN_KEY}, "ListKeys answers the keys that exist."),
    ("DescribeKey", {"KeyId": "alias/x"}, "ListAliases answers the aliases that exist."),
    ("DeleteKeyMaterial", {"KeyId": "alias/x"}, "Send the KeyId; DescribeKey answers it for an"),
    ("DescribeKey", {}, "KeyId is needed but was not given"),
    ("DescribeKey", {"keyid": "x"}, "keyid: KeyId is meant?"),
    ("DescribeKey", {"Secret of mine": "x"}, "(14 characters): Served are KeyId."),
    ("ListAlias", {}, "ListAliases is meant?"),
    ("describekey", {}, "DescribeKey is meant?"),
    ("Launch", {}, "Served are CreateKey, DescribeKey,"),
    (
        "GetParametersForImport",
        {"KeyId": UNKNOWN_KEY, "WrappingKeySpec": "RSA_1024", "WrappingAlgorithm": "SM2PKE"},
        "WrappingKeySpec: RSA_1024 is none of RSA_2048, EC_SM2",
    ),
    ("Encrypt", {"KeyId": UNKNOWN_KEY, "Plaintext": "_-_-", "DryRun": "true"}, "Plaintext is base"),
    ("Encrypt", {"DryRun": "true"}, "KeyId is needed but was not given"),
]

# Errors that take more than one request, or that the KMS does not raise.
RAISED = [
    (kms_errors.KeyVersionNotFound(), "DescribeKey answers the version: PrimaryKeyVersion."),
    (kms_errors.AliasAlreadyExists(), "UpdateAlias gives the alias to another key."),
    (kms_errors.RejectedDisabled(), "Call EnableKey first."),
    (kms_errors.RejectedPendingDeletion(), "Call CancelKeyDeletion first."),
    (kms_errors.RejectedPendingImport(), "Import key material first: GetParametersForImport, then"),
    (kms_errors.StateModifiedFailed(), "DescribeKey answers the state of the key: KeyState."),
    (kms_errors.AccessKeyNotFound(), "Ask the operator of this service for an access key."),
    (http_errors.IllegalTimestamp(), "Set the clock of the client, and send the time in UTC."),
    (http_errors.SignatureNonceUsed(), "Sign each request anew, with a nonce of its own."),
    (http_errors.SignatureDoesNotMatch("GET&"), "Compare the server's string to sign with"),
    (kms_errors.LeaseLost(), "Send the request again later."),
    (HsmError("C_Sign answered CKR_GENERAL_ERROR"), ELSE),
]
TEXTS = [*(text for *_, text in MISTAKES), *(text for _, text in RAISED)]


@pytest.fixture(scope="module")
def one_kms(tmp_path_factory):
    from support.kms.fakes import build_kms

    from hsmwrap.software import SoftwareBackend

    home = tmp_path_factory.mktemp("kms")
    backend = SoftwareBackend.from_settings({"serve_hsm_level": True})
    with build_kms(f"sqlite:///{home}/kms.db", backend, home / "audit.log") as kms:
        yield kms


def advice(client, action, **parameters):
    with pytest.raises(HsmwrapError) as caught:
        client(action, **parameters)
    return recommend(caught.value, action, parameters)


@pytest.mark.parametrize(("action", "parameters", "text"), MISTAKES)
def test_mistakes(one_kms, action, parameters, text):
    given = advice(Client(one_kms), action, **parameters)
    assert given.startswith(text)
    for value in parameters.values():
        assert value not in given.removeprefix(text) or len(value) < 2


@pytest.mark.parametrize(("error", "text"), RAISED)
def test_errors(error, text):
    assert recommend(error, "Encrypt", USE).startswith(text)


def test_what_takes_two_requests(client, clock):
    made_here = client("CreateKey")["KeyMetadata"]["KeyId"]
    assert advice(client, "DeleteKeyMaterial", KeyId=made_here).startswith("Only a key that was")
    parameters = client.parameters(client.create())
    request = import_request(parameters, AES_MATERIAL)
    past = advice(client, "ImportKeyMaterial", **request, KeyMaterialExpireUnix="1")
    assert past == "KeyMaterialExpireUnix: is in the past; 0 means never"
    clock.advance(days=1)
    late = advice(client, "ImportKeyMaterial", **request)
    assert late.startswith("Call GetParametersForImport again")
    unprivileged = Client(client.kms, Caller("unprivileged", Permissions()))
    for more in ({}, {"DryRun": "true"}):
        denied = advice(unprivileged, "Encrypt", **USE, **more)
        assert denied == "Ask the operator of this service for a grant."
    taken = ("Only a key", "Call GetParametersForImport", "Ask the operator of this service")
    for hint in HINTS:
        assert hint.text.startswith((*TEXTS, *taken)), f"no case for {hint}"


def test_every_invalid_key_material_says_the_same(client):
    """Wrong length, other material, damage, and another wrapping key."""
    key_id = client.create()
    client.import_material(key_id)
    parameters = client.parameters(key_id)
    wrong = [
        import_request(parameters, material)["EncryptedKeyMaterial"]
        for material in (b"", bytes(31), os.urandom(32))
    ]
    other_key = client.parameters(key_id)
    wrong.append(import_request(other_key, AES_MATERIAL)["EncryptedKeyMaterial"])
    wrong += [base64.b64encode(os.urandom(size)).decode() for size in (1, 255, 256, 300)]
    wrong.append("0a1b" * 64)
    request = {"KeyId": key_id, "ImportToken": parameters["ImportToken"]}
    for text in wrong:
        with pytest.raises(InvalidKeyMaterial) as caught:
            client("ImportKeyMaterial", **request, EncryptedKeyMaterial=text)
        more = {"EncryptedKeyMaterial": text, "KeyMaterialExpireUnix": "1893456000000"}
        for given in (request | more, {}):
            assert recommend(caught.value, "ImportKeyMaterial", given) == SILENT


@pytest.mark.parametrize("character", ["a", "+", " ", "\n", "%", "{", "=", "-", "'"])
def test_the_longest_values_are_looked_at_in_time(one_kms, character):
    """No pattern goes back over the text again and again: it would take minutes."""
    for action, parameter in (("Encrypt", "Plaintext"), ("Encrypt", "EncryptionContext")):
        advice(Client(one_kms), action, **USE | {parameter: character * 100_001})


def test_the_document_has_the_table():
    section = section_of(ROOT / "docs" / "errors.md", "What `Recommend` says")
    written = re.findall(r"\| ([^|]+) \|$", section, re.MULTILINE)
    assert written.pop(0) == "Recommend"
    shown = [
        hint.text if hint.text in written else hint.text.replace(hint.parameter, "…", 1)
        for hint in HINTS
    ]
    assert set(shown) == set(written)
