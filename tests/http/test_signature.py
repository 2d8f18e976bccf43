from __future__ import annotations

import logging
import re
from datetime import timedelta
from urllib.parse import parse_qsl, quote

import pytest
from support.http.fakes import NOW
from support.http.rpc_signing import (
    acs3_headers,
    encode_all,
    fresh_nonce,
    stamp,
    v1_parameters,
    v1_query,
    v1_signature,
)

from hsmwrap.http.canonical import percent_encode
from hsmwrap.http.errors import IncompleteSignature
from hsmwrap.http.message import RpcMessage
from hsmwrap.http.signature import read_claim
from hsmwrap.kms.signing import SigningSecret


def code(response):
    return response.get_json()["Code"]


def lower(headers):
    return {name.lower(): value for name, value in headers.items()}


# --- known answers: the worked examples of Alibaba Cloud's own documentation


def test_v1_known_answer():
    """ECS API reference, "Request signatures"."""
    query = (
        "Timestamp=2016-02-23T12:46:24Z&Format=XML&AccessKeyId=testid&Action=DescribeRegions"
        "&SignatureMethod=HMAC-SHA1&SignatureNonce=3ee8c1b8-83d3-44af-a94f-4e0ad82fd6cf"
        "&Version=2014-05-26&SignatureVersion=1.0&Signature=OLeaidS1JvxuMvnyHOwuJ%2BuX5qY%3D"
    )
    claim = read_claim(RpcMessage("GET", dict(parse_qsl(query))))
    assert claim.string_to_sign == (
        "GET&%2F&AccessKeyId%3Dtestid%26Action%3DDescribeRegions%26Format%3DXML"
        "%26SignatureMethod%3DHMAC-SHA1"
        "%26SignatureNonce%3D3ee8c1b8-83d3-44af-a94f-4e0ad82fd6cf"
        "%26SignatureVersion%3D1.0%26Timestamp%3D2016-02-23T12%253A46%253A24Z"
        "%26Version%3D2014-05-26"
    )
    assert claim.is_signed_with(SigningSecret("testsecret"))
    assert not claim.is_signed_with(SigningSecret("testsecreT"))


def test_acs3_known_answer():
    """OpenAPI documentation, "V3 request syntax and signature method"."""
    headers = {
        "host": "ecs.cn-shanghai.aliyuncs.com",
        "x-acs-action": "RunInstances",
        "x-acs-content-sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "x-acs-date": "2023-10-26T10:22:32Z",
        "x-acs-signature-nonce": "3156853299f313e23d1673dc12e1703d",
        "x-acs-version": "2014-05-26",
    }
    headers["authorization"] = (
        "ACS3-HMAC-SHA256 Credential=YourAccessKeyId,SignedHeaders="
        + ";".join(sorted(headers))
        + ",Signature=06563a9e1b43f5dfe96b81484da74bceab24a1d853912eee15083a6f0f3283c0"
    )
    query = {
        "ImageId": "win2019_1809_x64_dtc_zh-cn_40G_alibase_20230811.vhd",
        "RegionId": "cn-shanghai",
    }
    claim = read_claim(RpcMessage("POST", query, headers=headers))
    assert claim.string_to_sign == (
        "ACS3-HMAC-SHA256\n7ea06492da5221eba5297e897ce16e55f964061054b7695beedaac1145b1e259"
    )
    assert claim.is_signed_with(SigningSecret("YourAccessKeySecret"))
    assert not claim.is_signed_with(SigningSecret("YourAccessKeySecreT"))


# --- what is accepted


def test_v1_over_get(bench):
    response = bench.get(v1_query(KeyId="k-1"))
    assert response.status_code == 200
    assert bench.kms.calls[0][:3] == ("DescribeKey", {"KeyId": "k-1"}, "testid")


def test_v1_signs_query_and_form_together(bench):
    parameters = v1_parameters("Encrypt", Plaintext="a+b/c= d~*é", KeyId="k-1")
    signature = v1_signature("POST", parameters)
    form = {n: parameters.pop(n) for n in ("Plaintext", "KeyId")}
    query = encode_all({**parameters, "Signature": signature})
    assert bench.post(query, data=form).status_code == 200
    assert bench.kms.calls[0][1] == form


@pytest.mark.parametrize("algorithm", ["ACS3-HMAC-SHA256", "ACS3-HMAC-SM3"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_acs3(bench, algorithm, method):
    query = {"KeyId": "k-1", "Description": "a+b c~*é", "Empty": ""}
    headers = acs3_headers(method, query, algorithm=algorithm, accept="  application/json ")
    response = bench.client.open(
        "/", method=method, query_string=encode_all(query), headers=headers
    )
    assert response.status_code == 200, response.text
    assert bench.kms.calls[0][1] == query


@pytest.mark.parametrize("algorithm", ["ACS3-HMAC-SHA256", "ACS3-HMAC-SM3"])
def test_acs3_with_a_form(bench, algorithm):
    body = b"KeyId=k-1&Plaintext=a%2Bb"
    response = bench.post(data=body, headers=acs3_headers(body=body, algorithm=algorithm))
    assert response.status_code == 200, response.text
    assert bench.kms.calls[0][1] == {"KeyId": "k-1", "Plaintext": "a+b"}


def test_acs3_takes_its_action_from_what_was_signed(bench):
    query = {"Action": "DeleteKeyMaterial", "Version": "1"}
    response = bench.post(encode_all(query), headers=acs3_headers(query=query))
    assert response.status_code == 200
    assert bench.kms.calls[0][:2] == ("DescribeKey", {})


# --- tampering with each signed piece

V1_CHANGES = {
    "Action": "DeleteKeyMaterial",
    "Version": "2016-01-21",
    "Format": "XML",
    "SignatureNonce": "another",
    "Timestamp": stamp(NOW + timedelta(seconds=1)),
    "KeyId": "k-2",
    "Extra": "",
}


@pytest.mark.parametrize("name", V1_CHANGES)
def test_v1_changed(bench, name):
    parameters = v1_parameters(KeyId="k-1")
    signature = v1_signature("GET", parameters)
    query = encode_all({**parameters, name: V1_CHANGES[name], "Signature": signature})
    response = bench.get(query)
    assert response.status_code == 400
    assert "SignatureDoesNotMatch" in response.text
    assert bench.kms.calls == []
    assert bench.nonces.used == {}


@pytest.mark.parametrize("name", ["KeyId", "SignatureType"])
def test_v1_removed(bench, name):
    parameters = v1_parameters(KeyId="k-1")
    signature = v1_signature("GET", parameters)
    del parameters[name]
    assert code(bench.get(encode_all({**parameters, "Signature": signature}))) == (
        "SignatureDoesNotMatch"
    )


@pytest.mark.parametrize("at", [0, 13, 26])
def test_v1_changed_signature(bench, at):
    parameters = v1_parameters()
    signature = v1_signature("GET", parameters)
    other = "A" if signature[at] != "A" else "B"
    for changed in (signature[:at] + other + signature[at + 1 :], signature[:at], signature + "="):
        if changed:
            query = encode_all({**parameters, "Signature": changed})
            assert code(bench.get(query)) == "SignatureDoesNotMatch"


@pytest.mark.parametrize("algorithm", ["ACS3-HMAC-SHA256", "ACS3-HMAC-SM3"])
@pytest.mark.parametrize("at", [-1, -32, -64])
def test_acs3_changed_signature(bench, algorithm, at):
    headers = acs3_headers(algorithm=algorithm)
    signed = headers["Authorization"]
    cut = len(signed) + at
    other = "0" if signed[cut] != "0" else "1"
    headers["Authorization"] = signed[:cut] + other + signed[cut + 1 :]
    assert code(bench.post(headers=headers)) == "SignatureDoesNotMatch"


def test_acs3_text_after_the_signature(bench):
    headers = acs3_headers()
    headers["Authorization"] += "00"
    assert code(bench.post(headers=headers)) == "IncompleteSignature"


def test_v1_method_is_signed(bench):
    assert code(bench.post(v1_query("GET"))) == "SignatureDoesNotMatch"


ACS3_CHANGES = {
    "host": "elsewhere",
    "x-acs-action": "DeleteKeyMaterial",
    "x-acs-version": "2016-01-21",
    "x-acs-date": stamp(NOW + timedelta(seconds=1)),
    "x-acs-signature-nonce": "another",
    "x-acs-content-sha256": "0" * 64,
    "content-type": "application/x-www-form-urlencoded; charset=latin-1",
    "accept": "text/xml",
}


@pytest.mark.parametrize("algorithm", ["ACS3-HMAC-SHA256", "ACS3-HMAC-SM3"])
@pytest.mark.parametrize("name", ACS3_CHANGES)
def test_acs3_changed_header(bench, name, algorithm):
    headers = acs3_headers(body=b"A=b", accept="application/json", algorithm=algorithm)
    assert bench.post(data=b"A=b", headers=headers).status_code == 200
    headers = acs3_headers(body=b"A=b", accept="application/json", algorithm=algorithm)
    headers[name] = ACS3_CHANGES[name]
    assert code(bench.post(data=b"A=b", headers=headers)) == "SignatureDoesNotMatch"
    assert len(bench.kms.calls) == 1


def test_acs3_changed_body(bench):
    headers = acs3_headers(body=b"KeyId=k-1")
    assert code(bench.post(data=b"KeyId=k-2", headers=headers)) == "SignatureDoesNotMatch"


def test_acs3_signed_digest_of_another_body(bench):
    """The header is signed, but does not match the body."""
    lie = acs3_headers(body=b"KeyId=k-1", x_acs_content_sha256="0" * 64)
    assert code(bench.post(data=b"KeyId=k-1", headers=lie)) == "SignatureDoesNotMatch"


def test_acs3_changed_query(bench):
    headers = acs3_headers(query={"KeyId": "k-1"})
    assert code(bench.post("KeyId=k-2", headers=headers)) == "SignatureDoesNotMatch"


def test_acs3_method_is_signed(bench):
    assert code(bench.get(headers=acs3_headers("POST"))) == "SignatureDoesNotMatch"


@pytest.mark.parametrize(
    "name",
    [
        "host",
        "x-acs-action",
        "x-acs-version",
        "x-acs-date",
        "x-acs-signature-nonce",
        "x-acs-content-sha256",
        "content-type",
        "x-acs-security-token",
    ],
)
def test_acs3_unsigned_header(bench, name):
    headers = acs3_headers(body=b"A=b", x_acs_security_token="token", drop=(name,))
    response = bench.post(data=b"A=b", headers=headers)
    assert code(response) == "IncompleteSignature"
    assert name in response.get_json()["Message"]


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Basic dGVzdA==",
        "ACS3-HMAC-SHA256",
        "ACS3-HMAC-SHA256 Credential=testid",
        "ACS3-HMAC-SHA1 Credential=testid,SignedHeaders=host,Signature=" + "0" * 64,
        "ACS3-HMAC-SHA256 Credential=testid,SignedHeaders=host,Signature=" + "0" * 63,
        "ACS3-HMAC-SHA256 Credential=testid,SignedHeaders=host,Signature=" + "0" * 64 + "\n",
    ],
)
def test_malformed_authorization(authorization):
    headers = {**acs3_headers(), "authorization": authorization}
    with pytest.raises(IncompleteSignature):
        read_claim(RpcMessage("POST", {}, headers=headers))


@pytest.mark.parametrize("algorithm", ["ACS3-HMAC-SHA1", "ACS3-RSA-SHA256", "ACS3-HMAC-SHA256-"])
def test_an_acs3_algorithm_that_is_not_served(bench, algorithm):
    """All else is as it has to be, so nothing but the algorithm can be what is refused."""
    headers = acs3_headers()
    right = headers["Authorization"]
    headers["Authorization"] = right.replace("ACS3-HMAC-SHA256", algorithm)
    response = bench.post(headers=headers)
    assert code(response) == "IncompleteSignature"
    assert "one of ACS3-HMAC-SHA256, ACS3-HMAC-SM3" in response.get_json()["Message"]
    assert bench.post(headers=headers | {"Authorization": right}).status_code == 200


def test_an_acs3_header_that_is_signed_and_not_sent(bench):
    headers = acs3_headers(accept="application/json")
    del headers["accept"]
    response = bench.post(headers=headers)
    assert code(response) == "IncompleteSignature"
    assert "a signed header is missing" in response.get_json()["Message"]


@pytest.mark.parametrize("name", ["AccessKeyId", "Signature", "SignatureNonce", "Timestamp"])
@pytest.mark.parametrize("blank", [True, False])
def test_v1_missing_piece(bench, name, blank):
    parameters = {**v1_parameters(), "Signature": "x"}
    parameters.pop(name)
    response = bench.get(encode_all({**parameters, name: ""} if blank else parameters))
    assert code(response) == "IncompleteSignature"
    assert name in response.get_json()["Message"]


def test_the_first_missing_piece_is_named(bench):
    response = bench.get("Action=DescribeKey")
    assert response.get_json()["Message"].endswith(": AccessKeyId is missing.")
    response = bench.post(headers=acs3_headers(drop=("x-acs-date", "host", "x-acs-version")))
    assert response.get_json()["Message"].endswith(": host is not among the signed headers.")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SignatureMethod", "HMAC-MD5"),
        ("SignatureVersion", "2.0"),
        ("SignatureType", "BEARERTOKEN"),
    ],
)
def test_v1_of_another_kind(bench, name, value):
    response = bench.get(v1_query(**{name: value}))
    assert code(response) == "InvalidParameter"
    assert name in response.get_json()["Message"]


# --- time and nonces


@pytest.mark.parametrize("sign", [-1, 1])
def test_window_edges(bench, sign):
    bench.clock.advance(minutes=sign * 15)
    assert bench.get(v1_query()).status_code == 200
    assert bench.post(headers=acs3_headers()).status_code == 200
    bench.clock.advance(microseconds=sign)
    assert code(bench.get(v1_query())) == "IllegalTimestamp"
    assert code(bench.post(headers=acs3_headers())) == "IllegalTimestamp"


@pytest.mark.parametrize(
    "text",
    [
        "2026-03-01T12:00:00",
        "2026-03-01 12:00:00Z",
        "2026-3-1T12:00:00Z",
        "2026-02-30T12:00:00Z",
        "٢٠٢٦-03-01T12:00:00Z",
        "1772366400",
        "0000-00-00T00:00:00Z",
    ],
)
def test_malformed_timestamp(bench, text):
    assert code(bench.get(v1_query(Timestamp=text))) == "IllegalTimestamp"


def test_a_time_out_of_the_window_uses_no_nonce(bench):
    bench.clock.advance(hours=1)
    bench.get(v1_query())
    assert bench.nonces.used == {}


def test_replay_is_refused_as_long_as_its_time_is_good(bench):
    query, headers = v1_query(), acs3_headers()
    assert bench.get(query).status_code == 200
    assert bench.post(headers=headers).status_code == 200
    for _ in range(2):
        assert code(bench.get(query)) == "SignatureNonceUsed"
        assert code(bench.post(headers=headers)) == "SignatureNonceUsed"
        bench.clock.advance(minutes=15)
    assert code(bench.get(query)) == "IllegalTimestamp"
    assert len(bench.kms.calls) == 2


def test_a_nonce_outlives_its_window_for_slow_clocks(bench):
    bench.get(v1_query())
    assert set(bench.nonces.used.values()) == {NOW + timedelta(minutes=16)}


def test_nobody_else_can_burn_a_nonce(bench):
    nonce = fresh_nonce()
    parameters = v1_parameters(SignatureNonce=nonce)
    forged = encode_all({**parameters, "Signature": v1_signature("GET", parameters, "guess")})
    assert code(bench.get(forged)) == "SignatureDoesNotMatch"
    assert bench.get(v1_query(SignatureNonce=nonce)).status_code == 200


def test_a_refused_operation_still_uses_its_nonce(bench):
    query = v1_query(Version="2016-01-21")
    assert code(bench.get(query)) == "InvalidParameter"
    assert code(bench.get(query)) == "SignatureNonceUsed"


@pytest.mark.parametrize("nonce", ["n" * 129, "a\nb", "a b", "\0", "é"])
def test_nonce_of_another_shape(bench, nonce):
    response = bench.get(v1_query(SignatureNonce=nonce))
    assert code(response) == "InvalidParameter"
    assert "SignatureNonce" in response.get_json()["Message"]


# --- access keys


@pytest.mark.parametrize("access_key_id", ["stranger", "TESTID", "testid ", "\0", "é" * 200])
def test_unknown_access_key(bench, access_key_id):
    response = bench.get(v1_query(AccessKeyId=access_key_id))
    assert (response.status_code, code(response)) == (404, "InvalidAccessKeyId.NotFound")
    assert bench.nonces.used == {}


def test_a_claim_shows_what_is_claimed_and_nothing_to_sign_with(bench):
    """It signs plaintexts too; and who has a signature can send its request."""
    shown = re.compile(r"(\w+)=").findall
    for claim in (
        read_claim(RpcMessage("GET", dict(parse_qsl(v1_query())))),
        read_claim(RpcMessage("POST", {}, headers=lower(acs3_headers()))),
    ):
        claimed = ["access_key_id", "timestamp", "nonce", "action", "version", "scheme"]
        assert shown(repr(claim)) == claimed


# --- the message of a wrong signature


def test_v1_message_holds_the_servers_string_to_sign(bench):
    """aliyun-python-sdk-core splits it at ':' and compares the second part with its own."""
    parameters = v1_parameters(KeyId="k-1")
    response = bench.get(encode_all({**parameters, "Signature": "wrong"}))
    message = response.get_json()["Message"]
    assert "server string to sign is:" in message
    own = f"GET&%2F&{encode_all({'x': encode_all(parameters)})[2:]}"
    assert message.split(":")[1] == own


def test_v1_message_hides_sensitive_values(bench):
    secrets = {
        "Plaintext": "U0VDUkVU",
        "EncryptedKeyMaterial": "TUFURVJJQUw",
        "ImportToken": "VE9LRU4",
        "CiphertextBlob": "Q0lQSEVS",
    }
    response = bench.get(encode_all({**v1_parameters(**secrets), "Signature": "wrong"}))
    assert code(response) == "SignatureDoesNotMatch"
    assert not [value for value in secrets.values() if value in response.text]


def test_acs3_message_holds_a_digest(bench):
    response = bench.post(headers=acs3_headers(secret="wrong"))
    message = response.get_json()["Message"]
    assert "server string to sign is:ACS3-HMAC-SHA256\n" in message
    assert "testsecret" not in response.text


@pytest.mark.parametrize(
    "name", ["plaintext", "Plaintxt", "PlainText", "Plaintext ", "Data", "SecurityToken", "keyid"]
)
def test_a_misspelt_parameter_is_not_disclosed(bench, name, caplog):
    """The string to sign comes back in the error's text, for SDKs to compare."""
    caplog.set_level(logging.DEBUG)
    parameters = v1_parameters(KeyId="k-1", EncryptionContext="context", **{name: "c2VjcmV0"})
    answer = bench.get(encode_all({**parameters, "Signature": "AAAA"}))
    assert code(answer) == "SignatureDoesNotMatch"
    assert name.strip() in answer.text
    for shown in ("k-1", "context", parameters["SignatureNonce"]):
        assert shown in answer.text
    logged = [str(vars(record)) for record in caplog.records if record.name.startswith("hsmwrap")]
    assert logged
    assert not [text for text in (answer.text, *logged) if "c2VjcmV0" in text]


@pytest.mark.parametrize("text", ["", "Abc19", "a-_.~", "a b+/=&%", "é²字", "²", "a*'()\n\0"])
def test_what_is_encoded_is_what_rfc_3986_says(text):
    assert percent_encode(text) == quote(text, safe="")
