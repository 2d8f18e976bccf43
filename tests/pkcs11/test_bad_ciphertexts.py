"""Bad ciphertexts behind the fault shim: the same work whatever is wrong, no session lost."""

import logging
import traceback
from datetime import UTC, datetime, timedelta

import pytest
from support.pkcs11 import ciphertext_scenarios, scenarios

from hsmwrap import registry
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import InvalidKeyMaterial


@pytest.mark.parametrize("scenario", scenarios.names_of(ciphertext_scenarios))
def test_scenario(softhsm, tmp_path, scenario):
    settings = softhsm.settings("ciphertexts")
    scenarios.run(ciphertext_scenarios, scenario, tmp_path, settings)


def test_what_the_hsm_answered_is_in_the_log_and_nowhere_else(softhsm, caplog):
    algorithm = WrappingAlgorithm.RSAES_OAEP_SHA_1
    caplog.set_level(logging.DEBUG, "hsmwrap")
    with registry.open_backend("pkcs11", softhsm.settings("ciphertexts")) as backend:
        pair = backend.generate_wrapping_key(
            WrappingKeySpec.RSA_2048, algorithm, expires_at=datetime.now(UTC) + timedelta(hours=1)
        )
        caplog.clear()
        with pytest.raises(InvalidKeyMaterial) as caught:
            backend.unwrap_material(
                pair.private_key, algorithm, bytes(256), key_spec=KeySpec.ALIYUN_AES_256
            )
    said = [record.said for record in caplog.records if record.levelno == logging.DEBUG]
    # Twice: a client is told of a bad ciphertext when it has failed twice.
    assert said == ["C_UnwrapKey(CKM_RSA_PKCS_OAEP) answered CKR_GENERAL_ERROR (0x5)"] * 2
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []
    assert "GENERAL_ERROR" not in "".join(traceback.format_exception(caught.value))
