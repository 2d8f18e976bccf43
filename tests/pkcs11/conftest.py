"""What several files of these tests use."""

import pytest
from support.pkcs11.attacker import Attacker
from support.pkcs11.searches import search_of

from hsmwrap.pkcs11.sessions import session


@pytest.fixture
def attacker(softhsm):
    made = Attacker(softhsm)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def made_up_sessions(monkeypatch):
    """Let searches run through the sessions that tests make up, too."""
    monkeypatch.setattr(session, "SearchIter", search_of)
