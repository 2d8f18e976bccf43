"""What several files of these tests use."""

import pytest
from support.pkcs11.attacker import Attacker
from support.pkcs11.searches import search_of

from hsmwrap.pkcs11.binding.host import ModuleHost
from hsmwrap.pkcs11.sessions import recovery, session
from hsmwrap.pkcs11.sessions._breaker import Breaker
from hsmwrap.pkcs11.sessions._reconnector import Reconnector


@pytest.fixture
def attacker(softhsm):
    made = Attacker(softhsm)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def made_up_sessions(monkeypatch):
    """Let searches run through the sessions that tests make up, too."""
    monkeypatch.setattr(session, "SearchIter", search_of)


@pytest.fixture
def no_restart(monkeypatch):
    """Let a lost HSM be looked for without a restart of the module, and each call anew.

    The attacker's session is one of this process.
    """
    monkeypatch.setattr(ModuleHost, "restart", lambda *_: None)
    monkeypatch.setattr(recovery, "PAUSES", ())
    monkeypatch.setattr(Breaker, "failed", lambda *_: None)
    monkeypatch.setattr(Reconnector, "start", lambda _: None)
