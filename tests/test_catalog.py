import dataclasses

import pytest

from hsmwrap.catalog import (
    COMPATIBILITY_TABLE,
    REGIONS,
    KeySpec,
    ManagedHsm,
    Origin,
    ProtectionLevel,
    WrappingAlgorithm,
    WrappingKeySpec,
    loggable,
)
from hsmwrap.errors import InvalidParameter, MissingParameter

SPELLING = {
    WrappingKeySpec: ["RSA_2048", "EC_SM2"],
    WrappingAlgorithm: ["RSAES_PKCS1_V1_5", "RSAES_OAEP_SHA_1", "RSAES_OAEP_SHA_256", "SM2PKE"],
    ProtectionLevel: ["SOFTWARE", "HSM"],
    Origin: ["Aliyun_KMS", "EXTERNAL"],
    KeySpec: ["Aliyun_AES_256", "Aliyun_SM4"],
}
EVERY_ENUM = pytest.mark.parametrize("enum", SPELLING)


@EVERY_ENUM
def test_members_are_spelled_as_the_api_spells_them(enum):
    assert [str(member) for member in enum] == SPELLING[enum]


@EVERY_ENUM
def test_every_spelling_parses_to_its_member(enum):
    assert [enum.parse(text) for text in SPELLING[enum]] == list(enum)


def test_sm2_is_an_alias_on_input_only():
    assert WrappingKeySpec.parse("SM2") is WrappingKeySpec.EC_SM2
    assert "SM2" not in list(WrappingKeySpec)


@EVERY_ENUM
@pytest.mark.parametrize("value", ["RSA_1024", "rsa_2048", " EC_SM2", "hsm", "AES_256", "0"])
def test_an_unknown_value_names_the_parameter_and_what_exists(enum, value):
    with pytest.raises(InvalidParameter) as caught:
        enum.parse(value)
    assert caught.value.name == enum.__name__
    assert all(text in str(caught.value) for text in SPELLING[enum])
    assert caught.value.api_message == (f'The specified parameter "{enum.__name__}" is not valid.')


@EVERY_ENUM
@pytest.mark.parametrize("value", [None, ""])
def test_an_absent_value_is_a_missing_parameter(enum, value):
    with pytest.raises(MissingParameter) as caught:
        enum.parse(value)
    assert caught.value.name == enum.__name__


def test_key_material_has_one_length_per_key_spec():
    assert {spec: spec.material_length for spec in KeySpec} == {
        KeySpec.ALIYUN_AES_256: 32,
        KeySpec.ALIYUN_SM4: 16,
    }


def test_no_pair_of_spec_and_algorithm_has_two_rows():
    pairs = [(row.spec, row.algorithm) for row in COMPATIBILITY_TABLE]
    assert len(pairs) == len(set(pairs))


def test_the_tables_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        COMPATIBILITY_TABLE[0].dedicated = True
    with pytest.raises(TypeError):
        REGIONS["mars-1"] = ManagedHsm.SCA


REGION_LISTING = """
    SCA  cn-beijing cn-zhangjiakou cn-hangzhou cn-shanghai cn-shenzhen
    SCA  cn-north-2-gov-1 cn-hangzhou-finance cn-shanghai-finance-1 cn-shenzhen-finance-1
    FIPS cn-hongkong ap-southeast-1 ap-southeast-2 ap-southeast-3 ap-southeast-5 us-east-1
"""


def test_regions_against_a_second_listing():
    listed = {
        region: hsm_class
        for hsm_class, *regions in map(str.split, REGION_LISTING.strip().splitlines())
        for region in regions
    }
    assert listed == REGIONS


@pytest.mark.parametrize("text", ["RSA_1", "a" * 40, "v1.0-x"])
def test_names_are_shown(text):
    assert loggable(text) == text


@pytest.mark.parametrize("text", ["a" * 41, "AAAA====", "a b", "a\n", "é", ""])
def test_of_other_text_the_length_is_shown(text):
    assert loggable(text) == f"({len(text)} characters)"


def test_the_longest_text_that_is_shown_can_be_given():
    assert loggable("abc", 3) == "abc"
    assert loggable("abcd", 3) == "(4 characters)"


@pytest.mark.parametrize(
    ("value", "shown"), [(1234, "(int)"), (b"secret", "(bytes)"), (None, "(NoneType)")]
)
def test_of_what_is_not_text_the_type_is_shown(value, shown):
    assert loggable(value) == shown
