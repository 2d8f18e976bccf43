"""Text of a client appears in the answer and in the log only if it looks like a name."""

from __future__ import annotations

import logging

import pytest
from support.http.rpc_signing import acs3_headers, v1_query

from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import InvalidParameter
from hsmwrap.kms.parameters import parse

TOKEN = "c2VjcmV0IG9m" * 100


@pytest.mark.parametrize("enum", [WrappingAlgorithm, WrappingKeySpec])
def test_a_token_in_the_wrong_parameter(enum):
    with pytest.raises(InvalidParameter, match=r"\(1200 characters\) is none of ") as raised:
        enum.parse(TOKEN)
    assert TOKEN not in str(raised.value)


def test_a_short_mistake_is_named():
    with pytest.raises(InvalidParameter, match="WrappingKeySpec: RSA_1 is none of RSA_2048, "):
        WrappingKeySpec.parse("RSA_1")


def test_unknown_parameters():
    with pytest.raises(InvalidParameter) as raised:
        parse({}, {TOKEN: ""})
    assert TOKEN not in raised.value.api_message + str(raised.value)
    with pytest.raises(InvalidParameter) as raised:
        parse({}, {"Tags": ""})
    assert raised.value.api_message == 'The specified parameter "Tags" is not valid.'


def test_parameters_that_come_twice(bench, caplog):
    with caplog.at_level(logging.DEBUG):
        response = bench.post(v1_query(**{TOKEN: ""}), data={TOKEN: ""})
    assert response.get_json()["Code"] == "InvalidParameter"
    assert TOKEN not in response.text + str(vars(caplog.records[-1]))


def test_unsigned_headers(bench):
    name = f"x-acs-{'a' * 100}"
    response = bench.post(headers={**acs3_headers(), name: ""})
    assert response.get_json()["Code"] == "IncompleteSignature"
    assert name not in response.text
