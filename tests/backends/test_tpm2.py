"""tpm2-pkcs11: a token that cannot serve, and is told why before anything is made in it."""

import pytest
from support.services.tpm2 import tpm2

from hsmwrap import registry
from hsmwrap.errors import ConfigurationError
from hsmwrap.pkcs11 import Pkcs11Backend


@pytest.fixture
def settings(tmp_path, monkeypatch):
    with tpm2(tmp_path, monkeypatch) as token:
        yield token.settings()


def test_why_it_cannot_serve_is_said_with_function_and_code(settings):
    with pytest.raises(ConfigurationError) as refused:
        Pkcs11Backend.initialise_keys(settings)
    text = str(refused.value)
    assert "cannot authenticate import tokens" in text
    for key_type in ("CKK_GENERIC_SECRET", "CKK_SHA256_HMAC"):
        assert f"with a {key_type} key: C_GenerateKey" in text
    assert "answered CKR_FUNCTION_NOT_SUPPORTED (0x54)" in text
    assert Pkcs11Backend.list_keys(settings) == ()


def test_a_backend_on_it_says_that_there_are_no_keys(settings):
    with (
        registry.open_backend("pkcs11", settings) as backend,
        pytest.raises(ConfigurationError, match="hsmwrap keys init"),
    ):
        backend.capabilities()
