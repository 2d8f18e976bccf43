"""The policy over the full product of all dimensions, against a listing of its own.

The listing was written from Alibaba's documentation, combination by combination, not from
``hsmwrap.catalog``: what it does not name is refused.
"""

import itertools

import pytest

from hsmwrap import policy
from hsmwrap.catalog import ManagedHsm, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import CombinationRefused, ConfigurationError, UnsupportedProtectionLevel
from hsmwrap.policy import Deployment

# spec, algorithm, protection level, class of the region's managed HSM, kind of KMS
ALLOWED_LISTING = """
    RSA_2048 RSAES_PKCS1_V1_5   SOFTWARE SCA  shared
    RSA_2048 RSAES_PKCS1_V1_5   SOFTWARE SCA  dedicated
    RSA_2048 RSAES_PKCS1_V1_5   SOFTWARE FIPS shared
    RSA_2048 RSAES_PKCS1_V1_5   SOFTWARE FIPS dedicated
    RSA_2048 RSAES_PKCS1_V1_5   SOFTWARE NONE shared
    RSA_2048 RSAES_PKCS1_V1_5   SOFTWARE NONE dedicated
    RSA_2048 RSAES_PKCS1_V1_5   HSM      SCA  shared
    RSA_2048 RSAES_PKCS1_V1_5   HSM      SCA  dedicated
    RSA_2048 RSAES_PKCS1_V1_5   HSM      FIPS shared
    RSA_2048 RSAES_PKCS1_V1_5   HSM      FIPS dedicated

    RSA_2048 RSAES_OAEP_SHA_1   SOFTWARE SCA  shared
    RSA_2048 RSAES_OAEP_SHA_1   SOFTWARE FIPS shared
    RSA_2048 RSAES_OAEP_SHA_1   SOFTWARE NONE shared
    RSA_2048 RSAES_OAEP_SHA_1   HSM      SCA  shared
    RSA_2048 RSAES_OAEP_SHA_1   HSM      FIPS shared

    RSA_2048 RSAES_OAEP_SHA_256 SOFTWARE SCA  shared
    RSA_2048 RSAES_OAEP_SHA_256 SOFTWARE SCA  dedicated
    RSA_2048 RSAES_OAEP_SHA_256 SOFTWARE FIPS shared
    RSA_2048 RSAES_OAEP_SHA_256 SOFTWARE FIPS dedicated
    RSA_2048 RSAES_OAEP_SHA_256 SOFTWARE NONE shared
    RSA_2048 RSAES_OAEP_SHA_256 SOFTWARE NONE dedicated
    RSA_2048 RSAES_OAEP_SHA_256 HSM      SCA  shared
    RSA_2048 RSAES_OAEP_SHA_256 HSM      SCA  dedicated
    RSA_2048 RSAES_OAEP_SHA_256 HSM      FIPS shared
    RSA_2048 RSAES_OAEP_SHA_256 HSM      FIPS dedicated

    EC_SM2   SM2PKE             HSM      SCA  shared
    EC_SM2   SM2PKE             HSM      SCA  dedicated
"""
ALLOWED = {tuple(line.split()) for line in ALLOWED_LISTING.splitlines() if line.strip()}

PRODUCT = list(
    itertools.product(
        ["RSA_2048", "EC_SM2"],
        ["RSAES_PKCS1_V1_5", "RSAES_OAEP_SHA_1", "RSAES_OAEP_SHA_256", "SM2PKE"],
        ["SOFTWARE", "HSM"],
        ["SCA", "FIPS", "NONE"],
        ["shared", "dedicated"],
    )
)


def check(spec, algorithm, level, managed_hsm, kind):
    return policy.check(
        WrappingKeySpec(spec),
        WrappingAlgorithm(algorithm),
        ProtectionLevel(level),
        Deployment(ManagedHsm(managed_hsm), dedicated=kind == "dedicated"),
    )


@pytest.mark.parametrize("combination", PRODUCT, ids="-".join)
def test_texts_meet_the_same_rules_as_members(combination):
    spec, algorithm, level, managed_hsm, kind = combination
    deployment = Deployment(managed_hsm, dedicated=kind == "dedicated")
    assert policy.check(spec, algorithm, level, deployment) == check(*combination)


@pytest.mark.parametrize("position", range(3))
def test_a_text_that_spells_no_member_is_refused(position):
    for combination in PRODUCT:
        texts = list(combination[:3])
        texts[position] = texts[position].lower()
        assert not policy.check(*texts, Deployment(combination[3])).allowed


def test_a_deployment_takes_what_it_knows_and_nothing_else():
    assert Deployment("FIPS").managed_hsm is ManagedHsm.FIPS
    assert Deployment() == Deployment(ManagedHsm.SCA, dedicated=False)
    assert Deployment.of_region("unknown") == Deployment(ManagedHsm.NONE, dedicated=False)
    for unknown in ("fips", "", "SCA ", None, 7, []):
        with pytest.raises(ConfigurationError, match=r"managed_hsm: .* is none of SCA, FIPS, NONE"):
            Deployment(unknown)
    for unknown in ("false", "true", "", 0, 1, None):
        with pytest.raises(ConfigurationError, match="dedicated"):
            Deployment(dedicated=unknown)


def test_the_listing_and_the_product_are_whole():
    dimensions = (WrappingKeySpec, WrappingAlgorithm, ProtectionLevel, ManagedHsm, (False, True))
    assert len(PRODUCT) == len(list(itertools.product(*dimensions))) == 96
    assert len(ALLOWED) == 27
    assert set(PRODUCT) >= ALLOWED


@pytest.mark.parametrize("combination", PRODUCT, ids="-".join)
def test_against_the_second_listing(combination):
    verdict = check(*combination)
    assert verdict.allowed == (combination in ALLOWED)
    assert verdict.allowed == (verdict.rule is None)
    assert verdict.allowed == (verdict.parameter is None)
    assert verdict.allowed == (verdict.reason == "")


@pytest.mark.parametrize("combination", sorted(set(PRODUCT) - ALLOWED), ids="-".join)
def test_a_refusal_is_a_typed_error_that_names_rule_and_parameter(combination):
    verdict = check(*combination)
    error = verdict.error()
    _, _, level, managed_hsm, _ = combination
    if (level, managed_hsm) == ("HSM", "NONE"):
        assert type(error) is UnsupportedProtectionLevel
        assert error.code == "Unsupported.ProtectionLevel"
    else:
        assert type(error) is CombinationRefused
        assert error.code == "InvalidParameter"
        assert error.name == verdict.parameter
    assert error.http_status == 400
    assert error.rule == verdict.rule
    assert verdict.reason in str(error)


# combination, refusing rule, parameter at fault, what the reason has to say
REFUSALS = [
    ("RSA_2048 SM2PKE SOFTWARE SCA shared", "algorithm-of-spec", "WrappingAlgorithm", "RSAES_OAEP"),
    (
        "EC_SM2 RSAES_OAEP_SHA_256 HSM SCA shared",
        "algorithm-of-spec",
        "WrappingAlgorithm",
        "SM2PKE",
    ),
    ("EC_SM2 SM2PKE SOFTWARE SCA shared", "protection-level", "WrappingKeySpec", "HSM"),
    ("EC_SM2 SM2PKE SOFTWARE NONE shared", "protection-level", "WrappingKeySpec", "HSM"),
    ("EC_SM2 SM2PKE HSM FIPS shared", "hsm-certification", "WrappingKeySpec", "SCA"),
    ("EC_SM2 SM2PKE HSM NONE shared", "no-managed-hsm", "ProtectionLevel", "no managed HSM"),
    ("RSA_2048 SM2PKE HSM NONE shared", "no-managed-hsm", "ProtectionLevel", "no managed HSM"),
    (
        "RSA_2048 RSAES_OAEP_SHA_1 HSM FIPS dedicated",
        "dedicated-kms",
        "WrappingAlgorithm",
        "RSAES_OAEP_SHA_256",
    ),
]


@pytest.mark.parametrize(("combination", "rule", "parameter", "hint"), REFUSALS)
def test_the_refusing_rule(combination, rule, parameter, hint):
    verdict = check(*combination.split())
    assert (verdict.rule, verdict.parameter) == (rule, parameter)
    assert hint in verdict.reason


@pytest.mark.parametrize(
    ("region", "managed_hsm"),
    [
        ("cn-hangzhou", ManagedHsm.SCA),
        ("cn-hongkong", ManagedHsm.FIPS),
        ("eu-central-1", ManagedHsm.NONE),
    ],
)
@pytest.mark.parametrize("dedicated", [False, True])
def test_a_region_gives_its_deployment(region, managed_hsm, dedicated):
    assert Deployment.of_region(region, dedicated=dedicated) == Deployment(
        managed_hsm, dedicated=dedicated
    )
