"""Bad ciphertexts behind the fault shim: the same work whatever is wrong, no session lost."""

import pytest
from support.pkcs11 import ciphertext_scenarios, scenarios


@pytest.mark.parametrize("scenario", scenarios.names_of(ciphertext_scenarios))
def test_scenario(softhsm, tmp_path, scenario):
    settings = softhsm.settings("ciphertexts")
    scenarios.run(ciphertext_scenarios, scenario, tmp_path, settings)
