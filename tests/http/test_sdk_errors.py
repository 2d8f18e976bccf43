"""Each error that a caller of an SDK can cause, as the SDK's own exception."""

from __future__ import annotations

import base64
import os
from contextlib import ExitStack
from unittest import mock

import pytest
from support.http import material_clients as clients
from support.http.kms_over_http import running_kms
from support.http.sdk_clients import DEFAULT_SDKS, SDK_WARNINGS, SDKS, Credentials, NewSdk, SdkError

from hsmwrap.catalog import ManagedHsm
from hsmwrap.errors import HsmError, HsmUnavailable
from hsmwrap.policy import Deployment
from hsmwrap.registry import open_backend

pytestmark = SDK_WARNINGS


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with running_kms(
        tmp_path_factory.mktemp("kms"), open_backend("software", {"serve_hsm_level": True})
    ) as server:
        yield server


ANYBODYS = {"IllegalTimestamp", "InvalidAccessKeyId.NotFound"}


class Api:
    """One SDK against one server; ``refused`` returns the error that a call raises."""

    def __init__(self, sdk, server) -> None:
        self.sdk, self.server = sdk, server
        self.credentials = server.credentials

    def call(self, action, /, **parameters):
        return self.sdk.call(self.credentials, action, **parameters)

    def refused(self, action, /, **parameters) -> tuple[str, int]:
        with pytest.raises(SdkError) as raised:
            self.call(action, **parameters)
        # The RequestId of each error is in the audit log, except errors that any client can cause.
        audited = raised.value.request_id in self.server.audit_file.read_text()
        assert audited == (raised.value.code not in ANYBODYS)
        return raised.value.code, raised.value.status

    def key(self, **more) -> str:
        wanted = {"Origin": "EXTERNAL", "ProtectionLevel": "HSM", **more}
        return self.call("CreateKey", **wanted)["KeyMetadata"]["KeyId"]

    def parameters(self, key_id, **more):
        wanted = {"WrappingKeySpec": "RSA_2048", "WrappingAlgorithm": "RSAES_OAEP_SHA_256"}
        return self.call("GetParametersForImport", KeyId=key_id, **{**wanted, **more})

    def import_arguments(self, key_id, material=None, **more):
        issued = self.parameters(key_id)
        public_key = base64.b64decode(issued["PublicKey"])
        encrypted = clients.pyca_oaep_sha256(public_key, material or os.urandom(32))
        return {
            "KeyId": key_id,
            "ImportToken": issued["ImportToken"],
            "EncryptedKeyMaterial": base64.b64encode(encrypted).decode(),
            **more,
        }

    def imported(self) -> str:
        key_id = self.key()
        self.call("ImportKeyMaterial", **self.import_arguments(key_id))
        return key_id


@pytest.fixture(params=DEFAULT_SDKS)
def api(request, running):
    return Api(SDKS[request.param], running)


ENCRYPT = {"Plaintext": "aGVsbG8="}


def test_unsupported_origin(api):
    key_id = api.key(Origin="Aliyun_KMS", ProtectionLevel="SOFTWARE")
    wanted = {"WrappingKeySpec": "RSA_2048", "WrappingAlgorithm": "RSAES_OAEP_SHA_256"}
    assert api.refused("GetParametersForImport", KeyId=key_id, **wanted) == (
        "Unsupported.Origin",
        400,
    )


def test_invalid_key_material(api):
    arguments = api.import_arguments(api.key(), material=os.urandom(31))
    assert api.refused("ImportKeyMaterial", **arguments) == ("InvalidKeyMaterial", 400)
    arguments["EncryptedKeyMaterial"] = base64.b64encode(bytes(256)).decode()
    assert api.refused("ImportKeyMaterial", **arguments) == ("InvalidKeyMaterial", 400)


def test_invalid_import_token(api):
    arguments = api.import_arguments(api.key())
    for token in (api.parameters(api.key())["ImportToken"], "AAAA", "no base64"):
        arguments["ImportToken"] = token
        assert api.refused("ImportKeyMaterial", **arguments) == ("InvalidImportToken", 400)


def test_expired_import_token(api):
    arguments = api.import_arguments(api.key())
    with api.server.kms_clock.shifted(hours=24, seconds=1):
        assert api.refused("ImportKeyMaterial", **arguments) == ("ExpiredImportToken", 400)


@pytest.mark.parametrize("sdk", DEFAULT_SDKS)
def test_unsupported_protection_level(sdk, tmp_path):
    deployment = Deployment(ManagedHsm.NONE)
    with running_kms(
        tmp_path, open_backend("software", {"serve_hsm_level": True}), deployment
    ) as server:
        api = Api(SDKS[sdk], server)
        wanted = {"Origin": "EXTERNAL", "ProtectionLevel": "HSM"}
        assert api.refused("CreateKey", **wanted) == ("Unsupported.ProtectionLevel", 400)


def test_unsupported_alias(api):
    assert api.refused("DeleteKeyMaterial", KeyId="alias/mine") == ("Unsupported.Alias", 400)


@pytest.mark.parametrize(
    ("action", "parameters"),
    [
        ("CreateKey", {"KeySpec": "Aliyun_AES_512"}),
        ("CreateKey", {"Tags": "unserved"}),
        ("Decrypt", {"CiphertextBlob": "AAAA"}),
        ("ListKeys", {"PageSize": 1000}),
    ],
)
def test_invalid_parameter(api, action, parameters):
    assert api.refused(action, **parameters) == ("InvalidParameter", 400)


@pytest.mark.parametrize(
    ("spec", "algorithm"),
    [
        ("EC_SM2", "RSAES_OAEP_SHA_256"),
        ("RSA_2048", "SM2PKE"),
        ("RSA_1", "SM2PKE"),
        ("RSA_2048", "x"),
    ],
)
def test_refused_combination(api, spec, algorithm):
    arguments = {"WrappingKeySpec": spec, "WrappingAlgorithm": algorithm}
    refused = api.refused("GetParametersForImport", KeyId=api.key(), **arguments)
    assert refused == ("InvalidParameter", 400)


def test_expiry_in_the_past(api):
    arguments = api.import_arguments(api.key(), KeyMaterialExpireUnix=1)
    assert api.refused("ImportKeyMaterial", **arguments) == ("InvalidParameter", 400)


def test_missing_parameter(api):
    assert api.refused("DescribeKey") == ("MissingParameter", 400)
    assert api.refused("Encrypt", KeyId=api.key()) == ("MissingParameter", 400)


def test_key_not_found(api):
    assert api.refused("DescribeKey", KeyId="no-such-key") == ("Forbidden.KeyNotFound", 404)


def test_unknown_action(api):
    assert api.refused("ListSecrets") == ("InvalidAction.NotFound", 404)


def test_states(api):
    pending = api.key()
    assert api.refused("Encrypt", KeyId=pending, **ENCRYPT) == ("Rejected.PendingImport", 409)
    assert api.refused("EnableKey", KeyId=pending) == ("Rejected.StateModifiedFailed", 409)
    key_id = api.imported()
    assert api.refused("CancelKeyDeletion", KeyId=key_id) == ("Rejected.StateModifiedFailed", 409)
    api.call("DisableKey", KeyId=key_id)
    assert api.refused("Encrypt", KeyId=key_id, **ENCRYPT) == ("Rejected.Disabled", 409)
    arguments = api.import_arguments(key_id)
    api.call("ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays=7)
    assert api.refused("Encrypt", KeyId=key_id, **ENCRYPT) == ("Rejected.PendingDeletion", 409)
    assert api.refused("ImportKeyMaterial", **arguments) == ("Rejected.StateModifiedFailed", 409)


def test_no_permission(api):
    key_id = api.key()
    api.credentials = Credentials(api.credentials.endpoint, "reader", "readersecret")
    api.call("DescribeKey", KeyId=key_id)
    assert api.refused("DeleteKeyMaterial", KeyId=key_id) == ("Forbidden.NoPermission", 403)
    assert api.refused("CreateKey") == ("Forbidden.NoPermission", 403)


def test_unknown_access_key(api):
    api.credentials = Credentials(api.credentials.endpoint, "stranger", "testsecret")
    assert api.refused("ListKeys") == ("InvalidAccessKeyId.NotFound", 404)


def test_wrong_secret(api):
    """The older SDK compares the strings to sign; if they are equal it reports a wrong secret."""
    api.credentials = Credentials(api.credentials.endpoint, "testid", "wrong")
    blamed = "SignatureDoesNotMatch" if isinstance(api.sdk, NewSdk) else "InvalidAccessKeySecret"
    assert api.refused("ListKeys") == (blamed, 400)
    # Not if that would repeat a plaintext.
    assert api.refused("Encrypt", KeyId="k", **ENCRYPT) == ("SignatureDoesNotMatch", 400)


@pytest.mark.parametrize("hours", [-1, 1])
def test_clock_that_is_wrong(api, hours):
    with api.server.http_clock.shifted(hours=hours):
        assert api.refused("ListKeys") == ("IllegalTimestamp", 400)


def test_nonce_that_repeats(api):
    """As from a client whose random numbers repeat (a virtual machine's snapshot)."""
    with ExitStack() as stack:
        for name in (
            "alibabacloud_tea_openapi.client.Utils.get_nonce",
            "aliyunsdkcore.utils.parameter_helper.get_uuid",
        ):
            nonce = f"repeated-{type(api.sdk).__name__}"
            stack.enter_context(mock.patch(name, return_value=nonce))
        api.call("ListKeys")
        assert api.refused("ListKeys") == ("SignatureNonceUsed", 400)


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (HsmUnavailable("the HSM is unavailable"), ("ServiceUnavailableTemporary", 503)),
        (HsmError("CKR_GENERAL_ERROR"), ("InternalFailure", 500)),
        (ZeroDivisionError(), ("InternalFailure", 500)),
    ],
)
def test_backend_that_fails(api, error, wanted):
    key_id = api.key()
    with mock.patch.object(api.server.backend, "generate_wrapping_key", side_effect=error):
        arguments = {"WrappingKeySpec": "RSA_2048", "WrappingAlgorithm": "RSAES_OAEP_SHA_256"}
        assert api.refused("GetParametersForImport", KeyId=key_id, **arguments) == wanted
