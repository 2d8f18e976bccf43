"""What several files of these tests use."""

import pytest
from support.pkcs11.attacker import Attacker


@pytest.fixture
def attacker(softhsm):
    made = Attacker(softhsm)
    yield made
    made.close()
