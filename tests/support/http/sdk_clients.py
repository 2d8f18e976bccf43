"""The public SDKs behind one interface: an action and its parameters, in the API's spelling.

Nothing of the SDKs is changed. What a caller of the SDK would write is written here, once.
"""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import dataclass
from typing import Any

import pytest

# alibabacloud-tea-openapi 0.4.6 stamps its requests by utcnow(), deprecated since Python 3.12; it
# runs within the call, so that as an error it would end the request.
SDK_WARNINGS = pytest.mark.filterwarnings(
    "ignore:datetime.datetime.utcnow:DeprecationWarning:alibabacloud_tea_openapi.utils"
)


@dataclass(frozen=True)
class Credentials:
    endpoint: str
    access_key_id: str = "testid"
    secret: str = "testsecret"


class SdkError(Exception):
    """An SDK's own exception (the cause), with the facts that both kinds carry."""

    def __init__(self, code: str, status: int, request_id: str) -> None:
        super().__init__(code)
        self.code, self.status, self.request_id = code, status, request_id


class NewSdk:
    """alibabacloud-kms20160120, generated from the API's description."""

    def __init__(self, algorithm: str | None) -> None:
        self._algorithm = algorithm

    def call(self, to: Credentials, action: str, /, **parameters: Any) -> dict[str, Any]:
        pytest.importorskip("alibabacloud_kms20160120")
        from alibabacloud_kms20160120 import models
        from alibabacloud_kms20160120.client import Client
        from alibabacloud_tea_openapi.exceptions import ClientException, ServerException
        from alibabacloud_tea_openapi.models import Config

        config = Config(
            access_key_id=to.access_key_id,
            access_key_secret=to.secret,
            endpoint=to.endpoint,
            protocol="http",
            signature_algorithm=self._algorithm,
        )
        fields = {_snake(name): value for name, value in parameters.items()}
        # An operation without parameters has no request.
        model = getattr(models, f"{action}Request", None)
        requests = [] if model is None else [model(**fields)]
        try:
            response = getattr(Client(config), _snake(action))(*requests)
        except (ClientException, ServerException) as error:
            raise SdkError(error.code, error.status_code, error.request_id) from error
        return response.body.to_map()


class OldSdk:
    """aliyun-python-sdk-kms, which most existing code imports."""

    def __init__(self, method: str, *, in_body: bool = False) -> None:
        self._method = method
        self._in_body = in_body

    def call(self, to: Credentials, action: str, /, **parameters: Any) -> dict[str, Any]:
        pytest.importorskip("aliyunsdkkms")
        from aliyunsdkcore.acs_exception.exceptions import ServerException
        from aliyunsdkcore.client import AcsClient

        client = AcsClient(to.access_key_id, to.secret, "cn-hangzhou", auto_retry=False)
        module = importlib.import_module(f"aliyunsdkkms.request.v20160120.{action}Request")
        request = getattr(module, f"{action}Request")()
        request.set_endpoint(to.endpoint)
        request.set_protocol_type("http")
        request.set_method(self._method)
        for name, value in parameters.items():
            text = json.dumps(value) if isinstance(value, dict) else value
            if self._in_body:
                request.add_body_params(name, text)
            else:
                getattr(request, f"set_{name}")(text)
        try:
            return json.loads(client.do_action_with_exception(request))
        except ServerException as error:
            raise SdkError(error.error_code, error.http_status, error.request_id) from error


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


SDKS = {
    "new-ACS3-SHA256": NewSdk(None),
    "new-ACS3-SM3": NewSdk("ACS3-HMAC-SM3"),
    "new-v1": NewSdk("v2"),
    "old-POST-query": OldSdk("POST"),
    "old-POST-body": OldSdk("POST", in_body=True),
    "old-GET": OldSdk("GET"),
}
DEFAULT_SDKS = ("new-ACS3-SHA256", "old-POST-query")
