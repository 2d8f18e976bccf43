"""What a vendor profile says takes effect, and what it forbids does not reach the module."""

import pytest
from support.pkcs11 import profile_scenarios, scenarios
from support.services.softhsm import make_softhsm
from support.services.spy import NO_SPY, find_spy

from hsmwrap.pkcs11.binding import traits
from hsmwrap.pkcs11.binding.returncodes import CryptokiError, recovery_of


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    """One for all, as none of these leaves it in another state; its PINs are the same."""
    directory = tmp_path_factory.mktemp("profiles")
    for name in ("user.pin", "so.pin"):
        (directory / name).touch(mode=0o600)
        (directory / name).write_text("12345678")
    return make_softhsm(directory, label="profiles")


@pytest.mark.parametrize("scenario", scenarios.names_of(profile_scenarios))
def test_profile(token, tmp_path, scenario):
    if scenario == "what_the_profile_forbids" and find_spy() is None:
        pytest.skip(NO_SPY)
    settings = token.settings("profiles", trusted=False, initial_backoff=0.05, max_backoff=0.1)
    scenarios.run(profile_scenarios, scenario, tmp_path, settings, **token.environment)


def test_a_code_means_what_the_module_says_that_it_is_from():
    """Also where it is caught outside, and inside another vendor's module."""
    rows = [traits.Traits(return_codes={0x80000001: each}) for each in ("ours", "theirs")]

    def fail():
        raise CryptokiError("C_Sign", 0x80000001)

    with pytest.raises(CryptokiError) as ours, traits.inside(rows[0]):
        fail()
    with traits.inside(rows[1]):
        assert recovery_of(ours.value) == "ours"
        assert recovery_of(CryptokiError("C_Sign", 0x80000001)) == "theirs"
    assert recovery_of(CryptokiError("C_Sign", 0x80000001)) is None
