"""Vendor profiles: files that say what a family of modules does in its own way."""

import re

import pytest

from hsmwrap.cli import main
from hsmwrap.errors import ConfigurationError
from hsmwrap.pkcs11.binding import profiles
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.sm2 import Layout

ALL = pytest.mark.parametrize("name", profiles.names())
HEAD = 'summary = "ours"\ntried = "not yet"\n'


@pytest.fixture
def own(tmp_path):
    def write(text):
        file = tmp_path / "own.toml"
        file.write_text(text)
        return str(file)

    return write


def settings(**more):
    return Pkcs11Settings.from_mapping({"module": "/m", **more})


@ALL
def test_each_is_a_file_to_copy(name, own, capsys):
    assert main(["profiles", "show", name]) == 0
    file = own(capsys.readouterr().out)
    assert main(["profiles", "check", file]) == 0
    assert profiles.load(name).summary in capsys.readouterr().out
    assert profiles.load_file(file) == profiles.load(name)


def test_the_list_says_what_was_tried(run_json):
    status, document = run_json("profiles", "list")
    rows = {row["name"]: row for row in document["profiles"]}
    assert status == 0
    assert {*rows} == {
        *("generic", "softhsm2", "nss", "opencryptoki"),
        *("luna", "sansec", "tass", "ibm-ep11"),
    }
    unproven = {name for name, row in rows.items() if "not run on hardware" in row["tried"]}
    assert unproven == {"luna", "sansec", "tass", "ibm-ep11"}
    assert rows["sansec"]["sm2"] == "decrypts"


def test_the_list_for_people(capsys):
    assert main(["profiles", "list"]) == 0
    assert "from public headers; not run on hardware" in capsys.readouterr().out


def test_a_file_of_your_own_is_used(own):
    file = own(
        f"{HEAD}[sm2]\nkey_type = 0x80000004\ndecrypt = 0x80008201\nciphertext = 'DER'\n"
        "[settings]\nsessions = 3\n"
    )
    used = settings(profile_file=file)
    assert (used.vendor.key_type.value, used.vendor.decrypt.value) == (0x80000004, 0x80008201)
    assert (used.vendor.ciphertext, used.vendor.generate) == (Layout.DER, None)
    assert used.sessions == 3


def test_the_configuration_outranks_the_profile():
    assert settings(profile="opencryptoki").sessions == 1
    assert settings(profile="opencryptoki", sessions=4).sessions == 4
    assert settings().vendor is None


def test_a_known_number_is_the_mechanism_of_that_name(own):
    file = own(f"{HEAD}[sm2]\ngenerate = 0x1040\n")
    assert settings(profile_file=file).vendor.generate.name == "EC_KEY_PAIR_GEN"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("summary = ", r"not TOML"),
        ("", r"summary: required"),
        (f"{HEAD}[sm3]\n", r"unknown setting sm3; did you mean sm2\?"),
        (f"{HEAD}[sm2]\ndecrpyt = 1\n", r"sm2: unknown setting decrpyt; did you mean decrypt\?"),
        (f"{HEAD}[sm2]\ndecrypt = '0x80008200'\n", r"decrypt: takes a mechanism .* as a number"),
        (f"{HEAD}[sm2]\nciphertext = 'C1C2'\n", r"ciphertext: takes one of C1C3C2, "),
        (
            f"{HEAD}[module]\nlibary = 'x'\n",
            r"module: unknown setting libary; did you mean library",
        ),
        (f"{HEAD}[settings]\npin_file = '/p'\n", r"settings: unknown setting pin_file"),
        (f"{HEAD}[settings]\nsesions = 1\n", r"did you mean sessions\?"),
        (f"sm2 = 1\n{HEAD}", r"sm2: takes a table"),
        (f"quirks = 'one'\n{HEAD}", r"quirks: takes a list of texts"),
    ],
)
def test_a_file_that_is_wrong_is_refused(own, capsys, text, says):
    file = own(text)
    with pytest.raises(ConfigurationError, match=says):
        settings(profile_file=file)
    assert main(["profiles", "check", file]) == 2
    assert re.search(says, capsys.readouterr().err)


def test_a_setting_of_the_profile_is_checked_like_any_other(own):
    with pytest.raises(ConfigurationError, match="sessions: takes a whole number"):
        settings(profile_file=own(f"{HEAD}[settings]\nsessions = 'many'\n"))


def test_a_name_that_is_unknown_is_refused():
    with pytest.raises(ConfigurationError, match="did you mean sansec"):
        settings(profile="sanec")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="No such file"):
        settings(profile_file=str(tmp_path / "none.toml"))


def test_one_profile_at_a_time(own):
    with pytest.raises(ConfigurationError, match="give one of them"):
        settings(profile="tass", profile_file=own(HEAD))


@pytest.mark.parametrize(
    ("said", "fits"),
    [
        (("SoftHSM project", "SoftHSM v2", "Implementation of PKCS11"), ("softhsm2",)),
        (("IBM Corp.", "IBM SoftTok", ""), ("opencryptoki",)),
        (("IBM Corp.", "IBM EP11Tok", ""), ()),
        (("unknown", "", ""), ()),
    ],
)
def test_a_profile_is_proposed_by_what_a_module_calls_itself(said, fits):
    assert profiles.fitting(*said) == fits
