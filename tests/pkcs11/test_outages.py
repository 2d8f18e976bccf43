"""Outages end without a restart of the KMS, whatever return code began them."""

import pytest
from support.pkcs11 import outage_scenarios, scenarios
from support.services.softhsm import make_softhsm


@pytest.mark.parametrize("scenario", scenarios.names_of(outage_scenarios))
def test_outage(tmp_path, scenario):
    token = make_softhsm(tmp_path / "token", label="outage")
    settings = token.settings("outage", trusted=False, initial_backoff=0.05, max_backoff=0.1)
    scenarios.run(outage_scenarios, scenario, tmp_path, settings, **token.environment)
