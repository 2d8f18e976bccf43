"""Vendor profiles: files that say what a family of modules does in its own way."""

import re

import pytest
from pkcs11.constants import Attribute
from pkcs11.mechanisms import KeyType, Mechanism

from hsmwrap.cli import main
from hsmwrap.errors import ConfigurationError
from hsmwrap.pkcs11.binding import profiles
from hsmwrap.pkcs11.binding.returncodes import Remedy
from hsmwrap.pkcs11.binding.traits import STANDARD
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
    assert rows["sansec"]["sm2"] == "unwraps and decrypts"
    assert rows["ibm-ep11"]["sm2"] == "decrypts"
    assert rows["luna"]["sm2"] == "ECDH with its own key type"
    assert {rows[name]["sm4"] for name in ("generic", "sansec")} == {"kept, not used"}
    assert rows["tass"]["sm4"] == "CCM"


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


@pytest.mark.parametrize(
    ("numbers", "says"), [("gcm = 2", "GCM"), ("cbc = 2\nctr = 3", "CCM"), ("cbc=2\necb=3", "CCM")]
)
def test_sm4_is_a_table_of_its_own(own, capsys, numbers, says):
    file = own(f"{HEAD}[sm4]\nkey_type = 0x80000106\n{numbers}\n")
    used = settings(profile_file=file)
    assert used.sm4.key_type.value == 0x80000106
    assert main(["profiles", "check", file]) == 0
    assert f"SM4: {says}\n" in capsys.readouterr().out
    assert settings(profile="sansec").sm4 is None


def test_the_configuration_outranks_the_profile():
    assert settings(profile="opencryptoki").sessions == 1
    assert settings(profile="opencryptoki", sessions=4).sessions == 4
    assert settings().vendor is None


def test_nothing_is_said_of_a_module_by_default():
    assert settings().traits == settings(profile="generic").traits == STANDARD
    assert settings(profile="sansec").traits == STANDARD


def test_what_a_file_says_of_the_module_s_calls(own):
    file = own(
        f"{HEAD}[return_codes]\n0x80000123 = 'restart'\n0x42 = 'stop'\n"
        "[login]\nuser_type = 0x80000001\nofficer_type = 0x80000002\nper_session = true\n"
        "tells_wrong_pins = true\n"
        "[asked]\nkey_wraps = [0x80000170, 0x210B]\nmac_key_types = [0x2B]\n"
        "oaep_hashes = ['SHA-256']\noaep_sources = [0]\n"
        "[never]\nmechanisms = ['CKM_AES_GCM', 0x80000171]\nattributes = ['CKA_COPYABLE']\n"
    )
    said = settings(profile_file=file).traits
    assert {code: row.remedy for code, row in said.return_codes.items()} == {
        0x80000123: Remedy.RESTART,
        0x42: Remedy.STOP,
    }
    assert (said.user_type, said.officer_type) == (0x80000001, 0x80000002)
    assert said.login_per_session
    assert said.tells_wrong_pins
    (cipher,) = said.ciphers
    assert cipher.key_wraps == (0x80000170, Mechanism.AES_KEY_WRAP_KWP)
    assert said.mac_key_types == (KeyType.SHA256_HMAC,)
    assert said.oaep_hashes == (Mechanism.SHA256,)
    assert said.oaep_sources == (0,)
    assert said.never_mechanisms == {Mechanism.AES_GCM, 0x80000171}
    assert said.never_attributes == {Attribute.COPYABLE}
    assert profiles.load_file(file) == profiles.load_file(file)


def test_the_parameters_of_c_initialize_may_be_bytes(own):
    assert settings(library_parameters_hex="00fF 01").reserved == b"\0\xff\1"
    assert settings(library_parameters="a='b'").reserved == "a='b'"
    assert settings().reserved is None
    file = own(f"{HEAD}[settings]\nlibrary_parameters_hex = '0102'\n")
    assert settings(profile_file=file).reserved == b"\1\2"
    with pytest.raises(ConfigurationError, match="give one of them"):
        settings(library_parameters="a", library_parameters_hex="00")
    for wrong in ("xyz", ""):
        with pytest.raises(ConfigurationError, match="takes bytes in hex digits"):
            settings(library_parameters_hex=wrong)


def test_a_known_number_is_the_mechanism_of_that_name(own):
    file = own(f"{HEAD}[sm2]\ngenerate = 0x1040\n")
    assert settings(profile_file=file).vendor.generate.name == "EC_KEY_PAIR_GEN"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("summary = ", r"not TOML"),
        ("", r"summary: required"),
        (f"{HEAD}[sm3]\n", r"unknown setting sm3; did you mean sm4\?"),
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
        (f"{HEAD}[return_codes]\n0x80000123 = 'restrt'\n", r"'restrt' .* did you mean restart\?"),
        (f"{HEAD}[return_codes]\n0x80000123 = 1\n", r"0x80000123: 1 is not a remedy"),
        (f"{HEAD}[return_codes]\n0x30 = 'restart'\n", r"0x30 is CKR_DEVICE_ERROR of the standard"),
        (f"{HEAD}[return_codes]\nCKR_OURS = 'restart'\n", r"'CKR_OURS' is not a return code"),
        (f"{HEAD}[login]\nuser = 1\n", r"login: unknown setting user; did you mean user_type\?"),
        (f"{HEAD}[login]\nuser_type = 'CKU_USER'\n", r"user_type: takes a whole number"),
        (f"{HEAD}[asked]\nkey_wrap = []\n", r"unknown setting key_wrap; did you mean key_wraps"),
        (f"{HEAD}[asked]\nkey_wraps = 0x210A\n", r"key_wraps: takes a list of mechanisms"),
        (f"{HEAD}[asked]\noaep_hashes = ['MD5']\n", r"oaep_hashes: takes a list of SHA-1 and"),
        (f"{HEAD}[asked]\noaep_sources = [2]\n", r"oaep_sources: takes a list of 0 and 1"),
        (
            f"{HEAD}[never]\nattributes = ['CKA_UNWRAP_TEMPLAT']\n",
            r"unknown CKA_UNWRAP_TEMPLAT; did you mean CKA_UNWRAP_TEMPLATE\?",
        ),
        (f"{HEAD}[never]\nmechanisms = ['CKM_AES_GM']\n", r"did you mean CKM_AES_GCM\?"),
        (f"quirks = 'one'\n{HEAD}", r"quirks: takes a list of texts"),
        (f"{HEAD}[sm4]\necb = 1\ncbc = 2\n", r"sm4: key_type: required"),
        (f"{HEAD}[sm4]\nkey_typ = 1\n", r"sm4: unknown setting key_typ; did you mean key_type"),
        (f"{HEAD}[sm4]\nkey_type = 1\nmode = 2\n", r"sm4: unknown setting mode"),
        (f"{HEAD}[sm4]\nkey_type = 1\necb = 2\n", r"sm4: give gcm, or cbc and one of ecb"),
        (f"{HEAD}[sm4]\nkey_type = 1\ncbc = 2\n", r"sm4: give gcm, or cbc and one of ecb"),
        (f"{HEAD}[sm4]\nkey_type = 1\ngcm = 'GCM'\n", r"gcm: takes a mechanism .* as a number"),
        (f"{HEAD}[SM2]\n", r"unknown setting SM2; did you mean sm2\?"),
        (f"{HEAD}[sm2]\ndecrypt = '0x80008200'\n", r"0x80000001; write it without quotes"),
        (f"{HEAD}[sm2]\ndecrypt = 1\nciphertext = 'der'\n", r"did you mean DER\?"),
        (f"{HEAD}[asked]\noaep_hashes = ['SHA1']\n", r"did you mean SHA-1\?"),
        (f"{HEAD}[asked]\nkey_wraps = 0x210A\n", r"by number; write it in \[ \]"),
        (f"{HEAD}[module]\nmodel = 7\n", r"list of such texts; write it in quotes"),
        # in the wrong table
        (f"model = 'HSM'\n{HEAD}", r"model; did you mean module\? One is in the table \[module\]"),
        (f"{HEAD}[sm2]\ngcm = 1\n", r"sm2: unknown setting gcm; One is in the table \[sm4\]"),
        (
            f"{HEAD}[login]\nsessions = 1\n",
            r"did you mean per_session\? One is in the table \[settings",
        ),
        (f"{HEAD}[sm2]\nquirks = []\n", r"sm2: unknown setting quirks; One is in no table, at th"),
        (f"{HEAD}[never]\nkey_type = 1\n", r"key_type; One is in the table \[sm2\] or \[sm4\]"),
        (f"{HEAD}[settings]\nmodel = 1\n", r"settings: unknown setting model; One is in the tab"),
        # without the mechanism that takes it
        (f"{HEAD}[sm2]\nciphertext = 'DER'\n", r"ciphertext: give decrypt or unwrap as well"),
        (
            f"{HEAD}[sm2]\ndecrypt = 1\nunwrap_parameter = '00'\n",
            r"_parameter: give unwrap as well",
        ),
        (f"{HEAD}[sm2]\ndecrypt = 1\nunwrap_ciphertext = 'DER'\n", r"ciphertext: give unwrap as w"),
        # one number for two things
        (
            f"{HEAD}[sm4]\nkey_type = 1\necb = 2\ncbc = 2\n",
            r"profile: sm4.ecb and sm4.cbc are both 0x2; one of them is wrong",
        ),
        (f"{HEAD}[sm2]\ngenerate = 1\nunwrap = 1\n", r"sm2.generate and sm2.unwrap are both 0x1"),
        (
            f"{HEAD}[sm2]\ndecrypt = 3\n[sm4]\nkey_type = 1\ngcm = 3\n",
            r"sm2.decrypt and sm4.gcm are both 0x3",
        ),
        (
            f"{HEAD}[sm2]\nkey_type = 4\n[sm4]\nkey_type = 4\ngcm = 3\n",
            r"sm2.key_type and sm4.key_type are both 0x4",
        ),
        (
            f"{HEAD}[sm2]\ndecrypt = 0x80008200\n[never]\nmechanisms = [0x80008200]\n",
            r"never: mechanisms: 0x80008200 is sm2.decrypt; leave one of them out",
        ),
        (
            f"{HEAD}[return_codes]\n0x80000123 = 'restart'\n2147483939 = 'stop'\n",
            r"return_codes: 2147483939 is there twice",
        ),
    ],
)
def test_a_file_that_is_wrong_is_refused(own, capsys, text, says):
    file = own(text)
    with pytest.raises(ConfigurationError, match=says):
        settings(profile_file=file)
    assert main(["profiles", "check", file]) == 2
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize(
    "numbers",
    [
        "[sm2]\ndecrypt = 3\nunwrap = 3\nciphertext = 'DER'",
        "[sm2]\nunwrap = 3\nunwrap_parameter = '00'\nciphertext = 'DER'",
        "[sm2]\nkey_type = 3\ndecrypt = 3",  # a key type and a mechanism
        "[sm4]\nkey_type = 3\ngenerate = 1\ngcm = 2\nkey_wrap = 0x210A",
        "[never]\nmechanisms = ['CKM_AES_KEY_WRAP_KWP']",
    ],
)
def test_what_only_looks_like_a_mistake_is_taken(own, numbers):
    assert main(["profiles", "check", own(f"{HEAD}{numbers}\n")]) == 0


def test_the_name_of_a_profile_is_not_a_file(capsys):
    assert main(["profiles", "check", "tass"]) == 2
    assert "this profile comes with hsmwrap, and the setting profile" in capsys.readouterr().err


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
        (("IBM", "Soft", "openCryptoki"), ("opencryptoki",)),
        (("IBM Corp.", "IBM EP11Tok", ""), ()),
        (("unknown", "", ""), ()),
    ],
)
def test_a_profile_is_proposed_by_what_a_module_calls_itself(said, fits):
    assert profiles.fitting(*said) == fits
