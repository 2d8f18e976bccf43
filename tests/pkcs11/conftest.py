"""What several files of these tests use."""

import pytest
from support.faults.shim import fault_shim
from support.pkcs11.attacker import Attacker
from support.pkcs11.holder import lent_session
from support.pkcs11.searches import search_of
from support.pkcs11.sm4_vendors import WITH_GCM, WITHOUT_GCM
from support.pkcs11.vendors import with_keys

from hsmwrap.pkcs11.binding.host import ModuleHost
from hsmwrap.pkcs11.sessions import recovery
from hsmwrap.pkcs11.sessions import session as searching
from hsmwrap.pkcs11.sessions._breaker import Breaker
from hsmwrap.pkcs11.sessions._reconnector import Reconnector


@pytest.fixture
def attacker(softhsm):
    made = Attacker(softhsm)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shim(softhsm, tmp_path_factory):
    """The fault shim in front of SoftHSM2."""
    return fault_shim(softhsm.module, tmp_path_factory.mktemp("shim"))


@pytest.fixture
def session(backend):
    """A session of the holder of the PIN; its objects go with it."""
    with lent_session(backend) as lent:
        yield lent


@pytest.fixture(scope="module", params=[WITH_GCM, WITHOUT_GCM], ids=str)
def vendor(request):
    """An HSM with SM4 of its vendor's, played by the shim."""
    return request.param


@pytest.fixture(scope="module")
def play(vendor, shim, softhsm, tmp_path_factory):
    """Settings for the HSM that is played, with a key set under a prefix that is given."""
    directory = tmp_path_factory.mktemp("profile")

    def played(prefix, **more):
        settings = vendor.play(shim, directory, softhsm, key_prefix=f"{prefix}-{vendor}", **more)
        return with_keys(settings, softhsm)

    return played


@pytest.fixture(autouse=True)
def made_up_sessions(monkeypatch):
    """Let searches run through the sessions that tests make up, too."""
    monkeypatch.setattr(searching, "SearchIter", search_of)


@pytest.fixture
def no_restart(monkeypatch):
    """Let a lost HSM be looked for without a restart of the module, and each call anew.

    The attacker's session is one of this process.
    """
    monkeypatch.setattr(ModuleHost, "restart", lambda *_: None)
    monkeypatch.setattr(recovery, "PAUSES", ())
    monkeypatch.setattr(Breaker, "failed", lambda *_: None)
    monkeypatch.setattr(Reconnector, "start", lambda _: None)
