"""For any bytes, the answer is one of the API's answers, and never a 500."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given
from support.http.fakes import Bench
from support.http.rpc_signing import acs3_headers, v1_query

CODES = {
    "IllegalTimestamp",
    "IncompleteSignature",
    "InvalidAccessKeyId.NotFound",
    "InvalidParameter",
    "MissingParameter",
    "SignatureDoesNotMatch",
}
latin1 = st.text(st.characters(max_codepoint=255))
header = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"))


def send(method="GET", query="", **environ):
    bench = Bench()
    response = bench.client.open(
        "/", method=method, environ_overrides={"QUERY_STRING": query, **environ}
    )
    assert response.get_json()["Code"] in CODES
    assert response.status_code < 500
    assert bench.kms.calls == []
    assert bench.nonces.used == {}


@given(latin1)
def test_raw_queries(query):
    send(query=query)


@given(latin1, st.integers(0, 400), st.integers(0, 20))
def test_signed_queries_with_a_splice(splice, at, cut):
    query = v1_query(KeyId="k-1")
    spliced = query[:at] + splice + query[at + cut :]
    if spliced != query:
        bench = Bench()
        response = bench.client.get("/", environ_overrides={"QUERY_STRING": spliced})
        assert response.status_code < 500
        # A splice may leave the decoded parameters as they are (an empty pair, %-case).
        assert response.status_code == 200 or response.get_json()["Code"] in CODES


@given(header)
def test_raw_authorization(authorization):
    send("POST", "Action=DescribeKey", HTTP_AUTHORIZATION=authorization)


@pytest.mark.slow
@given(st.from_regex(r"ACS3-HMAC-(SHA256|SM3) Credential=[^,]*,SignedHeaders=[^,]*,Signature=.*"))
def test_almost_authorization(authorization):
    kept = "".join(c for c in authorization if c not in "\r\n\0")
    send("POST", "Action=DescribeKey", HTTP_AUTHORIZATION=kept.encode().decode("latin-1"))


@given(
    st.sampled_from(
        ["host", "x-acs-date", "x-acs-version", "x-acs-signature-nonce", "x-acs-content-sha256"]
    ),
    header,
)
def test_any_value_in_a_signed_header(name, value):
    headers = acs3_headers()
    if headers[name] == value.strip():
        return
    environ = {f"HTTP_{n.upper().replace('-', '_')}": v for n, v in headers.items()}
    environ[f"HTTP_{name.upper().replace('-', '_')}"] = value
    send("POST", **environ)


@given(st.binary(max_size=300), latin1)
def test_raw_bodies(body, kind):
    bench = Bench()
    response = bench.client.post(
        "/", data=body, environ_overrides={"CONTENT_TYPE": kind or "application/octet-stream"}
    )
    assert response.status_code == 400
    form = bench.client.post(
        "/", data=body, headers={"Content-Type": "application/x-www-form-urlencoded"}
    )
    assert form.status_code == 400
