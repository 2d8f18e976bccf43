from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import replace
from io import BytesIO
from xml.etree import ElementTree as ET

import pytest
from support.http.fakes import ACCESS_KEY, Bench
from support.http.rpc_signing import acs3_headers, encode_all, v1_parameters, v1_query, v1_signature

from hsmwrap import errors
from hsmwrap.http import answer, app, logs
from hsmwrap.http.app import MAX_BODY
from hsmwrap.http.message import MAX_PARAMETERS
from hsmwrap.http.refusals import LEFT_OUT, PER_MINUTE
from hsmwrap.kms.audit import AuditFailed
from hsmwrap.kms.errors import InvalidAction, NoPermission, RejectedDisabled

UUID = re.compile(r"[0-9A-F]{8}(-[0-9A-F]{4}){3}-[0-9A-F]{12}")


def code(response):
    return response.get_json()["Code"]


# --- answers


def test_success_is_the_answer_with_the_request_id(bench):
    response = bench.get(v1_query())
    (_, _, _, request_id) = bench.kms.calls[0]
    assert UUID.fullmatch(request_id)
    assert response.get_json() == {"KeyId": "k-1", "RequestId": request_id}
    assert response.headers["Content-Type"] == "application/json;charset=utf-8"
    assert response.headers["x-acs-request-id"] == request_id
    assert response.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("spelling", ["XML", "xml"])
def test_success_in_xml(bench, spelling):
    bench.kms.answer = {
        "PageNumber": 1,
        "Truncated": False,
        "Keys": {"Key": [{"KeyId": "a"}, {"KeyId": "b & <c>"}]},
        "DeleteDate": None,
    }
    response = bench.get(v1_query(Format=spelling))
    root = ET.fromstring(response.data)
    assert root.tag == "KMS"
    assert [child.tag for child in root] == ["PageNumber", "Truncated", "Keys", "RequestId"]
    assert root.findtext("Truncated") == "false"
    assert [key.findtext("KeyId") for key in root.findall("Keys/Key")] == ["a", "b & <c>"]
    assert response.headers["Content-Type"] == "text/xml;charset=utf-8"


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidKeyMaterial(),
        errors.ExpiredImportToken("old"),
        errors.InvalidParameter("WrappingKeySpec", "RSA_1 is none"),
        NoPermission("no"),
        RejectedDisabled("no"),
        errors.KeyNotFound("gone"),
        errors.HsmUnavailable("unavailable"),
        errors.HsmError("CKR_GENERAL_ERROR"),
    ],
    ids=lambda error: error.code,
)
@pytest.mark.parametrize("format_", ["JSON", "XML"])
def test_error_answers(bench, error, format_):
    bench.kms.answer = error
    response = bench.get(v1_query(Format=format_))
    if format_ == "JSON":
        fields = response.get_json()
    else:
        root = ET.fromstring(response.data)
        assert root.tag == "Error"
        fields = {child.tag: child.text for child in root}
    assert list(fields) == ["RequestId", "HostId", "Code", "Message", "Recommend"]
    assert response.status_code == error.http_status
    assert (fields["Code"], fields["Message"]) == (error.code, error.api_message)
    assert fields["RequestId"] == bench.kms.calls[0][3]
    assert fields["HostId"] == "localhost"


@pytest.mark.parametrize(
    "text", ["a\0b", "\x0b", "\ud800", "\ufffe", "]]>", "\r\n", "<&>\"'", "漢"]
)
def test_xml_takes_any_text(text):
    document = answer.to_xml("KMS", {"Description": text}).encode()
    found = ET.fromstring(document).findtext("Description")
    assert found == re.sub("[\0\x0b\ud800\ufffe]", "\ufffd", text)


def test_unknown_format_is_said_in_json(bench):
    response = bench.get(v1_query(Format="YAML"))
    assert code(response) == "InvalidParameter"
    assert '"Format"' in response.get_json()["Message"]


def test_common_parameters_do_not_reach_the_kms(bench):
    bench.get(v1_query(RegionId="cn-hangzhou", SecurityToken="t", KeyId="k", Blank=""))
    assert bench.kms.calls[0][1] == {"KeyId": "k", "Blank": ""}


# --- order: what an unauthenticated request learns


def test_missing_action_comes_first(bench):
    for response in (bench.get(), bench.post(data={"KeyId": "k"})):
        assert (response.status_code, code(response)) == (400, "MissingParameter")
        assert '"Action"' in response.get_json()["Message"]


def test_unsigned_requests_learn_nothing_of_actions_versions_and_formats(bench):
    answers = {
        code(bench.get(f"Action={action}&Version={version}&Format={format_}"))
        for action in ("DescribeKey", "Nonsense")
        for version in ("2016-01-20", "1")
        for format_ in ("JSON", "YAML")
    }
    assert answers == {"IncompleteSignature"}


def test_action_of_v1_is_the_signed_one(bench):
    """The older SDK sends the header too, and does not sign it."""
    parameters = v1_parameters()
    del parameters["Action"]
    signed = encode_all({**parameters, "Signature": v1_signature("GET", parameters)})
    response = bench.get(signed, headers={"x-acs-action": "DeleteKeyMaterial"})
    assert code(response) == "MissingParameter"
    assert bench.kms.calls == []


@pytest.mark.parametrize(
    ("version", "wanted"), [("", "MissingParameter"), ("2016-01-21", "InvalidParameter")]
)
def test_version(bench, version, wanted):
    response = bench.get(v1_query(Version=version))
    assert code(response) == wanted
    assert '"Version"' in response.get_json()["Message"]


def test_refused_signatures_are_audited(bench):
    parameters = v1_parameters(action="Decrypt")
    bench.get(encode_all({**parameters, "Signature": "wrong"}))
    ((action, access_key_id, request_id, why),) = bench.kms.refusals
    assert (action, access_key_id, why) == ("Decrypt", "testid", "SignatureDoesNotMatch")
    assert UUID.fullmatch(request_id)


def test_the_audit_gets_no_text_that_is_no_name(bench):
    parameters = v1_parameters("evil\naction")
    bench.get(encode_all({**parameters, "Signature": "wrong"}))
    assert bench.kms.refusals[0][:2] == ("(11 characters)", "testid")


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        ({"AccessKeyId": "stranger"}, "InvalidAccessKeyId.NotFound"),
        ({"Timestamp": "2026-03-01T11:00:00Z"}, "IllegalTimestamp"),
        ({"SignatureNonce": "a b"}, "InvalidParameter"),
        ({"SignatureMethod": "HMAC-MD5"}, "InvalidParameter"),
    ],
)
def test_what_anyone_can_send_is_not_audited(bench, caplog, own, wanted):
    with caplog.at_level(logging.INFO):
        assert code(bench.get(v1_query(**own))) == wanted
    assert bench.kms.refusals == []
    assert caplog.records[-1].code == wanted


@pytest.mark.parametrize(
    "own", [{"Version": ""}, {"Version": "2016-01-21"}, {"Format": "YAML"}, {"action": ""}]
)
def test_authentic_requests_that_are_not_served_are_audited(bench, own):
    for _ in range(2 * PER_MINUTE):
        response = bench.get(v1_query(**own), headers={"x-acs-action": "DescribeKey"})
        action = own.get("action", "DescribeKey")
        request_id = response.get_json()["RequestId"]
        assert bench.kms.refusals[-1] == (action, "testid", request_id, code(response))
    assert len(bench.kms.refusals) == 2 * PER_MINUTE


BELIEVED = {"X-Forwarded-For": "203.0.113.9", "X-Real-IP": "203.0.113.9", "Forwarded": "for=::1"}


def test_the_audit_gets_the_address_of_the_connection(bench):
    """A proxy's where there is one: header fields are only what a client says."""
    bench.get(v1_query(), headers=BELIEVED, environ_base={"REMOTE_ADDR": "192.0.2.7"})
    bench.get(v1_query(Version=""), headers=BELIEVED, environ_base={"REMOTE_ADDR": "192.0.2.8"})
    forged = encode_all({**v1_parameters(), "Signature": "wrong"})
    bench.get(forged, headers=BELIEVED, environ_base={"REMOTE_ADDR": "2001:db8::9"})
    bench.get(forged, environ_base={"REMOTE_ADDR": ""})
    assert bench.kms.addresses == ["192.0.2.7", "192.0.2.8", "2001:db8::9", None]


# --- refused signatures, which anyone who knows an access key's id can cause


def forged(bench, access_key_id="testid"):
    parameters = v1_parameters(AccessKeyId=access_key_id)
    query = encode_all({**parameters, "Signature": "wrong"})
    return bench.get(query, environ_base={"REMOTE_ADDR": "192.0.2.7"})


def test_refusals_are_audited_some_a_minute(bench):
    for _ in range(PER_MINUTE + 7):
        assert code(forged(bench)) == "SignatureDoesNotMatch"
    bench.clock.advance(seconds=59)
    forged(bench)
    assert len(bench.kms.refusals) == PER_MINUTE
    bench.clock.advance(seconds=1)
    request_id = forged(bench).get_json()["RequestId"]
    assert bench.kms.refusals[PER_MINUTE:] == [
        ("", "testid", request_id, f"{LEFT_OUT} 8"),
        ("DescribeKey", "testid", request_id, "SignatureDoesNotMatch"),
    ]
    # Those that are counted came from other addresses too.
    assert bench.kms.addresses[PER_MINUTE:] == [None, "192.0.2.7"]


def test_a_refusal_is_recorded_though_the_line_before_it_fails(bench, monkeypatch):
    """The KMS owes what it could not write: both lines."""
    for _ in range(PER_MINUTE + 1):
        forged(bench)
    bench.clock.advance(minutes=1)
    recorded = []

    def fail(*facts):
        recorded.append(facts[3])
        raise AuditFailed("the disk is full")

    monkeypatch.setattr(bench.kms, "record_refusal", fail)
    assert code(forged(bench)) == "InternalFailure"
    assert recorded == [f"{LEFT_OUT} 1", "SignatureDoesNotMatch"]


def test_replays_are_audited_some_a_minute(bench):
    query = v1_query()
    for _ in range(2 * PER_MINUTE):
        bench.get(query)
    assert [refusal[3] for refusal in bench.kms.refusals] == ["SignatureNonceUsed"] * PER_MINUTE


def test_refusals_of_one_access_key_hide_none_of_another():
    bench = Bench(
        access_keys=(ACCESS_KEY, replace(ACCESS_KEY, access_key_id="other", secret="testsecret"))
    )
    for access_key_id in ["testid"] * 2 * PER_MINUTE + ["other"]:
        forged(bench, access_key_id)
    assert [refusal[1] for refusal in bench.kms.refusals] == ["testid"] * PER_MINUTE + ["other"]


def test_a_minute_without_too_many_leaves_none_out(bench):
    for _ in range(3):
        for _ in range(PER_MINUTE):
            forged(bench)
        bench.clock.advance(minutes=1)
    assert {refusal[3] for refusal in bench.kms.refusals} == {"SignatureDoesNotMatch"}


def test_no_audit_no_answer(bench, monkeypatch):
    def fail(*_facts):
        raise AuditFailed("the disk is full")

    monkeypatch.setattr(bench.kms, "record_refusal", fail)
    for query in (encode_all({**v1_parameters(), "Signature": "x"}), v1_query(Version="1")):
        assert code(bench.get(query)) == "InternalFailure"


# --- ambiguity and limits


def test_a_parameter_twice(bench):
    query = v1_query(KeyId="k-1")
    for response in (
        bench.get(f"{query}&KeyId=k-2"),
        bench.post(query, data={"KeyId": "k-1"}),
        bench.post(query, data=b"A=1&A=1", content_type="application/x-www-form-urlencoded"),
    ):
        assert code(response) == "InvalidParameter"
    assert bench.kms.calls == []


@pytest.mark.parametrize("query", ["Action=%ff", "Action=\xff", "a&" * (MAX_PARAMETERS + 1)])
def test_undecodable_query(bench, query):
    response = bench.client.get("/", environ_overrides={"QUERY_STRING": query})
    assert code(response) == "InvalidParameter"


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x", ""])
def test_only_forms_are_bodies(bench, kind):
    response = bench.post(v1_query("POST"), data=b"{}", content_type=kind)
    assert code(response) == "InvalidParameter"
    assert "Content-Type" in response.get_json()["Message"]


def test_body_limit(bench):
    body = b"A=" + b"a" * (MAX_BODY - 1)
    response = bench.post(data=body, content_type="application/x-www-form-urlencoded")
    assert (response.status_code, code(response)) == (413, "RequestTooLarge")
    response = bench.post(data=body[:-1], content_type="application/x-www-form-urlencoded")
    assert code(response) == "MissingParameter"


def test_body_that_breaks_off(bench):
    response = bench.client.post(
        "/",
        input_stream=BytesIO(b"A=b"),
        content_type="application/x-www-form-urlencoded",
        environ_overrides={"CONTENT_LENGTH": "10"},
    )
    assert code(response) == "InvalidParameter"


@pytest.mark.parametrize("path", ["/kms", "/healthz/", "//", "/%2e%2e"])
def test_other_paths(bench, path):
    response = bench.get(v1_query(), path=path)
    assert (response.status_code, code(response)) == (404, "InvalidPath.NotFound")
    assert UUID.fullmatch(response.get_json()["RequestId"])


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
@pytest.mark.parametrize("path", ["/", "/healthz"])
def test_other_methods(bench, method, path):
    response = bench.client.open(path, method=method)
    assert (response.status_code, code(response)) == (405, "UnsupportedHTTPMethod")


# --- what breaks


class Leaky(Exception):
    pass


def test_unexpected_exceptions(bench, caplog):
    secret = "UExBSU4"
    bench.kms.answer = Leaky(f"[parameters: {secret}]")
    bench.kms.answer.__cause__ = ValueError(secret)
    with caplog.at_level(logging.DEBUG):
        response = bench.get(v1_query(Plaintext=secret))
    assert (response.status_code, code(response)) == (500, "InternalFailure")
    assert response.get_json()["Message"] == "Internal Failure."
    (record,) = (r for r in caplog.records if r.name.startswith("hsmwrap"))
    line = logs.JsonFormatter().format(record)
    assert record.levelno == logging.ERROR
    assert record.request_id == response.get_json()["RequestId"]
    assert "Leaky <- builtins.ValueError" in record.exception
    assert "in execute" in record.traceback
    assert secret not in line


@pytest.mark.parametrize(
    "error", [errors.HsmError("CKR_GENERAL_ERROR"), AuditFailed("audit.log: no space")]
)
def test_errors_of_ours_are_logged_with_their_text(bench, caplog, error):
    bench.kms.answer = error
    with caplog.at_level(logging.INFO):
        assert bench.get(v1_query()).status_code == 500
    record = caplog.records[-1]
    assert (record.levelno, record.detail) == (logging.ERROR, str(error))
    assert type(error).__name__ in record.exception


@pytest.mark.parametrize(
    ("error", "retry_after"),
    [
        (errors.HsmUnavailable("the HSM is unavailable"), "2"),
        (errors.TooManyWrappingKeys("too many"), "2"),
        (errors.HsmError("CKR_GENERAL_ERROR"), None),
        (NoPermission("no"), None),
    ],
)
def test_what_may_be_tried_again_says_when(bench, error, retry_after):
    bench.kms.answer = error
    response = bench.get(v1_query())
    assert (response.status_code in {429, 503}) is (retry_after is not None)
    assert response.headers.get("Retry-After") == retry_after


def test_a_backend_that_is_away_is_no_error_of_ours(bench, caplog):
    bench.kms.answer = errors.HsmUnavailable("the HSM is unavailable")
    with caplog.at_level(logging.DEBUG):
        assert bench.get(v1_query()).status_code == 503
    assert [r.levelname for r in caplog.records if r.name.startswith("hsmwrap")] == ["INFO"]


# --- logs

SECRETS = {
    "Plaintext": "PLAINTEXT-VALUE",
    "EncryptedKeyMaterial": "MATERIAL-VALUE",
    "ImportToken": "TOKEN-VALUE",
    "CiphertextBlob": "CIPHERTEXT-VALUE",
}


def test_every_request_is_one_line_without_secrets(bench, caplog):
    with caplog.at_level(logging.DEBUG):
        answers = [
            bench.get(v1_query(**SECRETS)),
            bench.post(encode_all(SECRETS), headers=acs3_headers(query=SECRETS)),
            bench.get(encode_all({**v1_parameters(**SECRETS), "Signature": "SIGNATURE-VALUE"})),
            bench.get(encode_all(SECRETS)),
            bench.get(path="/nowhere"),
        ]
    lines = [logs.JsonFormatter().format(r) for r in caplog.records if r.message == "request"]
    for line, response in zip(lines, answers, strict=True):
        assert json.loads(line)["request_id"] == response.get_json()["RequestId"]
        assert json.loads(line)["http_status"] == response.status_code
    assert not [s for s in (*SECRETS.values(), "SIGNATURE-VALUE", "testsecret") if s in caplog.text]
    assert not [s for s in (*SECRETS.values(), "SIGNATURE", "testsecret") if s in "".join(lines)]


def test_log_fields(bench, caplog):
    with caplog.at_level(logging.INFO):
        bench.get(v1_query(action="Encrypt"))
    line = json.loads(logs.JsonFormatter().format(caplog.records[-1]))
    assert (line["action"], line["access_key_id"], line["code"]) == ("Encrypt", "testid", "OK")
    assert line["level"] == "INFO"
    assert line["milliseconds"] >= 0


def test_configure_once(monkeypatch):
    logger = logging.getLogger("hsmwrap")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    monkeypatch.setattr(logger, "level", logger.level)
    logs.configure()
    logs.configure()
    assert len(logger.handlers) == 1
    assert logger.handlers[0].stream is sys.stderr


# --- the pages


@pytest.mark.parametrize(("path", "status"), [("/healthz", "alive"), ("/readyz", "ready")])
def test_pages_that_are_well_leave_no_line(bench, caplog, path, status):
    """Monitoring polls every second; and an answer without a log line has no RequestId."""
    with caplog.at_level(logging.DEBUG):
        response = bench.get(path=path)
    assert (response.status_code, response.get_json()) == (200, {"Status": status})
    assert "x-acs-request-id" not in response.headers
    assert caplog.records == []


def test_pages_that_are_refused_are_in_the_log(bench, caplog):
    bench.kms.ready = False
    with caplog.at_level(logging.INFO):
        answers = [bench.get(path="/readyz"), bench.client.post("/healthz")]
    assert [response.status_code for response in answers] == [503, 405]
    ids = [response.get_json()["RequestId"] for response in answers]
    assert [response.headers["x-acs-request-id"] for response in answers] == ids
    assert [record.request_id for record in caplog.records] == ids


def test_healthz(bench):
    bench.kms.ready = False
    response = bench.get(path="/healthz")
    assert (response.status_code, response.get_json()["Status"]) == (200, "alive")


def test_readyz(bench):
    assert bench.get(path="/readyz").status_code == 200
    bench.kms.ready = False
    response = bench.get(path="/readyz")
    assert (response.status_code, response.get_json()["Status"]) == (503, "not ready")
    assert response.headers["Retry-After"] == "2"
    assert "secret-host" not in response.text


@pytest.mark.skipif(not app._METRICS, reason="needs the extra 'metrics'")
def test_metrics(bench):
    bench.get(v1_query(action="CancelKeyDeletion"))
    bench.kms.answer = InvalidAction("no such action")
    bench.get(v1_query(action="Nonsense"))
    bench.get(encode_all({**v1_parameters("Forged"), "Signature": "x"}))
    response = bench.metrics.get("/metrics")
    assert "x-acs-request-id" not in response.headers
    text = response.text
    assert 'hsmwrap_http_requests_total{action="CancelKeyDeletion",code="OK"}' in text
    assert 'hsmwrap_http_request_seconds_count{action="CancelKeyDeletion"}' in text
    assert 'action="unknown",code="InvalidAction.NotFound"' in text
    assert "Nonsense" not in text
    assert "Forged" not in text


def test_metrics_and_the_api_are_apart(bench):
    for response in (
        bench.get(path="/metrics"),
        bench.metrics.get("/"),
        bench.metrics.get("/readyz"),
    ):
        assert (response.status_code, response.get_json()["Code"]) == (404, "InvalidPath.NotFound")
    assert bench.metrics.post("/metrics").status_code == 405
    assert "/metrics" in bench.metrics.get("/").get_json()["Message"]
    assert bench.get(path="/x").get_json()["Message"] == "The API is served at the path / only."


def test_metrics_without_the_library(bench, monkeypatch):
    monkeypatch.setattr(app, "_METRICS", None)
    response = bench.metrics.get("/metrics")
    assert response.status_code == 404
    assert "prometheus_client" in response.get_json()["Message"]
    assert bench.get(v1_query()).status_code == 200


def test_a_foreign_exception_strip_tracebacks_is_logged_with_its_place():
    from hsmwrap.errors import strip_tracebacks
    from hsmwrap.http.logs import describe

    @strip_tracebacks
    def broken():
        raise TypeError("SECRET")

    with pytest.raises(TypeError) as caught:
        broken()
    caught.value.add_note("at SECRET")
    described = describe(caught.value)
    assert re.search(r"at \S+test_protocol.py:\d+, in broken", described["traceback"])
    assert "SECRET" not in str(described)
