"""The engine behind the fault shim: outages, logins, leftovers, the probe, closing, secrets."""

import pytest
from support.pkcs11 import engine_scenarios, scenarios


@pytest.mark.parametrize("scenario", scenarios.names_of(engine_scenarios))
def test_scenario(softhsm, tmp_path, scenario):
    settings = softhsm.settings("engine", initial_backoff=0.05, max_backoff=0.1)
    scenarios.run(engine_scenarios, scenario, tmp_path, settings)
