"""What an HSM token is tried for, where its answer is what matters."""

import pytest
from pkcs11 import exceptions as ck

from hsmwrap.errors import ConfigurationError
from hsmwrap.pkcs11.binding.trials import refuses_changed
from hsmwrap.pkcs11.keysets import admin, needs
from hsmwrap.pkcs11.settings import Pkcs11Settings

BLOB = bytes(range(24))


class Module:
    """Unwraps the blob; answers an error, or nothing, to one that differs in these bytes."""

    def __init__(self, answer, *refused):
        self.answer, self.refused, self.asked = answer, refused, []

    def unwrap(self, blob):
        self.asked.append(blob)
        differs = [at for at in range(len(BLOB)) if blob[at] != BLOB[at]]
        if set(differs) & set(self.refused):
            raise self.answer


@pytest.mark.parametrize("answer", [ck.WrappedKeyInvalid(), ck.KeySizeRange(), ck.GeneralError()])
def test_what_authenticates_refuses_a_change_at_either_end(answer):
    module = Module(answer, 0, 23)
    assert refuses_changed(BLOB, module.unwrap)
    assert module.asked.count(BLOB) == 2
    assert len(module.asked) == 4
    for noticed in ((0,), (23,), (8,), ()):  # as CBC with padding does
        assert not refuses_changed(BLOB, Module(answer, *noticed).unwrap)


def test_it_is_the_change_that_is_refused():
    def fail(_blob):
        raise ck.GeneralError

    with pytest.raises(ck.GeneralError):
        refuses_changed(BLOB, fail)


def test_a_lost_connection_is_not_a_refusal():
    with pytest.raises(ck.DeviceRemoved):
        refuses_changed(BLOB, Module(ck.DeviceRemoved(), 0, 23).unwrap)


def test_an_hmac_that_answers_the_same_to_everything_is_none(softhsm, monkeypatch):
    settings = Pkcs11Settings.from_mapping(softhsm.bare_settings())
    with admin.connected(settings) as connection:

        def tried():
            return connection.run(lambda pooled: needs.needs_of(pooled.session, None))

        assert tried().roles
        monkeypatch.setattr(needs._Trials, "_signs", lambda *_: False)
        with pytest.raises(ConfigurationError, match="its answer is wrong"):
            tried()
