"""Protections are tried with a control; SoftHSM2 plays tokens that ignore or lack some."""

import pytest
from support.pkcs11 import protection_scenarios, scenarios


@pytest.mark.parametrize("scenario", scenarios.names_of(protection_scenarios))
def test_scenario(softhsm, tmp_path, scenario):
    scenarios.run(protection_scenarios, scenario, tmp_path, softhsm.settings("protections"))
