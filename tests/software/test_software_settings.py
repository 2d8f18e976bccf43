import pytest

from hsmwrap.errors import ConfigurationError
from hsmwrap.registry import open_backend
from hsmwrap.sm2.formats import DEFAULT_LAYOUTS
from hsmwrap.software.settings import SoftwareSettings


def test_defaults():
    settings = SoftwareSettings.from_mapping({})
    assert settings == SoftwareSettings(None, None, tuple(DEFAULT_LAYOUTS), serve_hsm_level=False)


def test_everything_set():
    given = {
        "keyring_file": "/etc/hsmwrap/keyring.json",
        "sm2_engine": "gmssl",
        "sm2_layouts": ["C1C2C3", "DER"],
        "serve_hsm_level": True,
    }
    settings = SoftwareSettings.from_mapping(given)
    assert settings.sm2_layouts == ("C1C2C3", "DER")
    assert (settings.keyring_file, settings.serve_hsm_level) == (given["keyring_file"], True)


def test_unknown_settings_are_named_beside_the_known_ones():
    with pytest.raises(ConfigurationError) as caught:
        open_backend("software", {"keyring": "x", "zone": 1, "sm2_engine": "libcrypto"})
    assert "unknown setting keyring, zone" in str(caught.value)
    for known in ("keyring_file", "sm2_engine", "sm2_layouts", "serve_hsm_level"):
        assert known in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("keyring_file", 7),
        ("keyring_file", ""),
        ("sm2_engine", ["libcrypto"]),
        ("sm2_layouts", "DER"),
        ("sm2_layouts", [1]),
        ("serve_hsm_level", "false"),
        ("serve_hsm_level", 1),
        ("serve_hsm_level", None),
    ],
)
def test_wrong_kinds_are_refused(name, value):
    with pytest.raises(ConfigurationError, match=f"{name}: takes"):
        SoftwareSettings.from_mapping({name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"sm2_engine": "openssl"},
        {"sm2_layouts": ["C3C2C1"]},
        {"sm2_layouts": []},
        {"sm2_layouts": ["C1C3C2", "C1C2C3"]},
        {"keyring_file": "/nonexistent/keyring.json"},
    ],
)
def test_what_cannot_be_used_is_refused_when_opening(settings):
    with pytest.raises(ConfigurationError):
        open_backend("software", settings)
