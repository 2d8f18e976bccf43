"""Refusals before anything is generated or unwrapped, and foreign tokens."""

import itertools
from contextlib import nullcontext
from dataclasses import replace

import pytest
from support.backends.scripted import Scripted, changed
from support.importing import (
    AES,
    HSM,
    MATERIAL,
    OAEP1,
    OAEP256,
    PKCS1,
    SM2PKE,
    SOFTWARE,
    Clock,
    Desk,
    open_pkcs11,
    open_software,
    wrap,
)

from hsmwrap import policy, tokens
from hsmwrap.backend import Exposure
from hsmwrap.catalog import (
    KeySpec,
    ManagedHsm,
    Origin,
    ProtectionLevel,
    WrappingAlgorithm,
    WrappingKeySpec,
)
from hsmwrap.errors import (
    CombinationRefused,
    ConfigurationError,
    HsmUnavailable,
    HsmwrapError,
    InvalidImportToken,
    InvalidParameter,
    MissingParameter,
    UnsupportedOrigin,
    UnsupportedProtectionLevel,
)
from hsmwrap.imports import Cmk, ImportService
from hsmwrap.policy import Deployment

# --- policy and refusals before anything is generated -------------------------------------------


DEPLOYMENTS = [
    Deployment(managed_hsm, dedicated=dedicated)
    for managed_hsm in ManagedHsm
    for dedicated in (False, True)
]
_BY_POLICY = (CombinationRefused, UnsupportedProtectionLevel)
PRODUCT = list(itertools.product(WrappingKeySpec, WrappingAlgorithm, ProtectionLevel, Origin))


@pytest.mark.slow
@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=str)
@pytest.mark.parametrize("required", [None, *Exposure])
@pytest.mark.parametrize("exposure", Exposure)
def test_nothing_is_generated_for_what_is_refused(deployment, required, exposure):
    for spec, algorithm, level, origin in PRODUCT:
        desk = Desk(Scripted(exposure=exposure))
        service = desk.service(deployment=deployment, required_exposure=required)
        demand = level is HSM and (required, exposure) == (Exposure.IN_HSM, Exposure.HOST)
        allowed = policy.check(spec, algorithm, level, deployment).allowed
        allowed = allowed and origin is Origin.EXTERNAL and not demand
        refusal = UnsupportedOrigin if origin is not Origin.EXTERNAL else _BY_POLICY
        expected = nullcontext() if allowed else pytest.raises(refusal)
        with expected:
            service.get_parameters_for_import(desk.cmk(level=level, origin=origin), spec, algorithm)
        assert desk.backend.calls == (["generate_wrapping_key", "mac"] if allowed else [])


@pytest.mark.parametrize(
    ("spec", "algorithm", "error"),
    [
        ("RSA_4096", "RSAES_OAEP_SHA_256", InvalidParameter),
        ("RSA_2048", "RSAES_OAEP_SHA_512", InvalidParameter),
        ("rsa_2048", "RSAES_OAEP_SHA_256", InvalidParameter),
        ("", "RSAES_OAEP_SHA_256", MissingParameter),
        ("RSA_2048", None, MissingParameter),
    ],
)
def test_unknown_words_generate_nothing(spied, spec, algorithm, error):
    with pytest.raises(error):
        spied.service().get_parameters_for_import(spied.cmk(), spec, algorithm)
    assert spied.backend.calls == []


def test_words_are_taken_as_the_api_spells_them(spied):
    service = spied.service()
    for spec in ("EC_SM2", "SM2"):
        parameters = service.get_parameters_for_import(spied.cmk(), spec, "SM2PKE")
        assert (parameters.spec, parameters.algorithm) == (WrappingKeySpec.EC_SM2, SM2PKE)


@pytest.mark.parametrize("missing", ["wrapping", "keys"])
def test_what_the_backend_does_not_serve_generates_nothing(spied, missing):
    spied.backend.changing["capabilities"] = changed(**{missing: ()})
    with pytest.raises(CombinationRefused) as caught:
        spied.issue(OAEP1)
    assert caught.value.rule == "backend-capability"
    assert spied.backend.calls == []


@pytest.mark.parametrize("key_id", ["", "x" * 256, "é" * 128, "\ud800"])
def test_a_key_id_that_no_token_can_carry_is_refused(key_id):
    with pytest.raises(InvalidParameter) as caught:
        Cmk(key_id, AES, HSM)
    assert caught.value.name == "KeyId"


def test_the_longest_key_id_fits(any_desk):
    cmk = any_desk.cmk("é" * 127 + "x")
    parameters = any_desk.issue(OAEP1, cmk)
    any_desk.bring_in(parameters, wrap(parameters, MATERIAL[AES]), cmk)


def test_imports_need_origin_external(spied):
    parameters = spied.issue(OAEP1)
    with pytest.raises(UnsupportedOrigin):
        spied.bring_in(parameters, b"", spied.cmk(origin=Origin.ALIYUN_KMS))
    assert "unwrap_material" not in spied.backend.calls


# --- the protection level decides the backend ---------------------------------------------------


def test_each_level_has_its_own_backend():
    clock, both = Clock(), {level: Scripted(protection_levels=[level]) for level in ProtectionLevel}
    service = ImportService(both, Deployment(), clock=clock)
    for level, backend in both.items():
        parameters = service.get_parameters_for_import(Cmk("k", AES, level), "RSA_2048", OAEP1)
        good = wrap(parameters, MATERIAL[AES])
        service.import_key_material(Cmk("k", AES, level), good, parameters.import_token)
        assert backend.calls == ["generate_wrapping_key", "mac", "verify_mac", "unwrap_material"]
        backend.calls.clear()
    assert [backend.calls for backend in both.values()] == [[], []]


def test_a_former_backend_that_may_not_serve_the_level_any_more_is_not_asked():
    former, current = Scripted(name="old"), Scripted(name="new")
    cmk = Cmk("k", AES, HSM)
    parameters = ImportService({HSM: former}, Deployment()).get_parameters_for_import(
        cmk, "RSA_2048", OAEP1
    )
    service = ImportService({HSM: current}, Deployment(), former_backends=[former])
    good = wrap(parameters, MATERIAL[AES])
    assert service.backend_for_import(cmk, parameters.import_token).name == "old"
    former.calls.clear()
    former.changing["capabilities"] = changed(protection_levels=frozenset({SOFTWARE}))
    with pytest.raises(HsmwrapError):
        service.import_key_material(cmk, good, parameters.import_token)
    assert former.calls == []


def test_a_level_without_a_backend_is_refused_and_never_served_by_another():
    backend = Scripted()
    service = ImportService({SOFTWARE: backend}, Deployment())
    with pytest.raises(UnsupportedProtectionLevel):
        service.get_parameters_for_import(Cmk("k", AES, HSM), "RSA_2048", OAEP1)
    with pytest.raises(UnsupportedProtectionLevel):
        service.import_key_material(Cmk("k", AES, HSM), b"", b"")
    assert backend.calls == []


def test_a_backend_that_may_not_serve_a_level_is_refused_for_it(backends):
    with pytest.raises(UnsupportedProtectionLevel, match="serves HSM, not SOFTWARE"):
        ImportService({SOFTWARE: backends("pkcs11")}, Deployment())


def test_software_may_not_serve_level_hsm_unless_it_was_told_to():
    with open_software(serve_hsm_level=False) as plain, pytest.raises(UnsupportedProtectionLevel):
        ImportService({HSM: plain}, Deployment())


def test_a_service_starts_while_its_hsm_is_away_and_asks_later():
    backend = Scripted(protection_levels=[SOFTWARE])
    backend.failing["capabilities"] = HsmUnavailable("unavailable")
    service = ImportService({HSM: backend}, Deployment())
    cmk = Cmk("k", AES, HSM)
    with pytest.raises(HsmUnavailable):
        service.get_parameters_for_import(cmk, "RSA_2048", OAEP1)
    backend.failing.clear()
    with pytest.raises(UnsupportedProtectionLevel):
        service.get_parameters_for_import(cmk, "RSA_2048", OAEP1)
    assert backend.calls == []


# --- exposure -----------------------------------------------------------------------------------


def test_demanding_in_hsm_refuses_what_softhsm_does_in_the_host(desk_of):
    desk = desk_of("pkcs11")
    before = desk.count()
    service = desk.service(required_exposure=Exposure.IN_HSM)
    for algorithm in (OAEP256, SM2PKE):
        with pytest.raises(CombinationRefused) as caught:
            desk.issue(algorithm, service=service)
        assert (caught.value.rule, caught.value.name) == ("exposure", "WrappingAlgorithm")
    assert desk.count() == before
    for algorithm in (PKCS1, OAEP1):
        parameters = desk.issue(algorithm, service=service)
        result = desk.bring_in(parameters, wrap(parameters, MATERIAL[AES]), service=service)
        assert result.imported.exposure is Exposure.IN_HSM


def test_demanding_in_hsm_refuses_tokens_issued_before_as_well(any_desk):
    parameters = any_desk.issue(OAEP256)
    ciphertext = wrap(parameters, MATERIAL[AES])
    with pytest.raises(CombinationRefused):
        any_desk.bring_in(
            parameters, ciphertext, service=any_desk.service(required_exposure=Exposure.IN_HSM)
        )
    any_desk.bring_in(parameters, ciphertext)


def test_exposure_is_demanded_of_hsm_level_only(backends):
    with open_software() as backend:
        desk = Desk(backend)
        service = desk.service(required_exposure=Exposure.IN_HSM)
        assert desk.issue(OAEP256, desk.cmk(level=SOFTWARE), service)


# --- tokens of others ---------------------------------------------------------------------------


def test_a_token_of_another_cmk(any_desk):
    parameters = any_desk.issue(OAEP1)
    ciphertext = wrap(parameters, MATERIAL[AES])
    with pytest.raises(InvalidImportToken, match="another CMK"):
        any_desk.bring_in(parameters, ciphertext, any_desk.cmk("cmk-2"))


def test_a_token_of_another_protection_level(desk_of):
    desk = desk_of("software")
    for level, other in ((SOFTWARE, HSM), (HSM, SOFTWARE)):
        parameters = desk.issue(OAEP1, desk.cmk(level=level))
        with pytest.raises(InvalidImportToken):
            desk.bring_in(parameters, wrap(parameters, MATERIAL[AES]), desk.cmk(level=other))


OTHERS = [
    ("software", "pkcs11"),
    ("pkcs11", "software"),
    ("pkcs11", "other name"),
    ("other name", "pkcs11"),
    ("pkcs11", "other prefix"),
    ("other prefix", "pkcs11"),
]


@pytest.mark.parametrize(("issuer", "other"), OTHERS, ids="-to-".join)
@pytest.mark.parametrize("algorithm", [OAEP1, SM2PKE])
def test_a_token_of_another_backend(desk_of, issuer, other, algorithm):
    parameters = desk_of(issuer).issue(algorithm)
    foreign = desk_of(other)
    before = foreign.count()
    with pytest.raises(InvalidImportToken):
        foreign.bring_in(parameters, wrap(parameters, MATERIAL[AES]))
    assert foreign.count() == before


def test_backends_of_one_key_set_are_told_apart_by_the_token_and_not_the_seal(desk_of):
    token = desk_of("pkcs11").issue(SM2PKE).import_token
    assert tokens.decode(token, desk_of("other name").backend.verify_mac).backend == "pkcs11"


def test_another_service_over_the_same_keys_honours_the_token(desk_of, softhsm):
    first = desk_of("pkcs11")
    parameters = first.issue(SM2PKE)
    with open_pkcs11(softhsm, "imports") as backend:
        second = Desk(backend, clock=first.clock)
        assert second.bring_in(parameters, wrap(parameters, MATERIAL[AES])).imported.key


# --- texts for members --------------------------------------------------------------------------


def test_texts_for_members_meet_every_rule():
    """Each enum argument as a text; "HSM" once found its backend and slipped past the checks."""
    for spec, algorithm, level, managed_hsm in itertools.product(
        WrappingKeySpec, WrappingAlgorithm, ProtectionLevel, ManagedHsm
    ):
        backend = Scripted()
        service = ImportService({str(level): backend}, Deployment(str(managed_hsm)))
        cmk = Cmk("k", "Aliyun_AES_256", str(level), "EXTERNAL")
        expected = policy.check(spec, algorithm, level, Deployment(managed_hsm))
        with nullcontext() if expected.allowed else pytest.raises(_BY_POLICY):
            service.get_parameters_for_import(cmk, str(spec), str(algorithm))
        assert backend.calls == (["generate_wrapping_key", "mac"] if expected.allowed else [])


def test_a_cmk_s_texts_become_members():
    cmk = Cmk("k", "Aliyun_SM4", "HSM", "Aliyun_KMS")
    assert cmk == Cmk("k", KeySpec.ALIYUN_SM4, HSM, Origin.ALIYUN_KMS)
    assert [type(getattr(cmk, n)) for n in ("key_spec", "protection_level", "origin")] == [
        KeySpec,
        ProtectionLevel,
        Origin,
    ]
    assert replace(cmk, origin="EXTERNAL").origin is Origin.EXTERNAL


@pytest.mark.parametrize(
    ("position", "name"), [(0, "KeySpec"), (1, "ProtectionLevel"), (2, "Origin")]
)
def test_a_cmk_s_unknown_texts_are_refused(position, name):
    right = ["Aliyun_AES_256", "HSM", "EXTERNAL"]
    for unknown in (right[position].swapcase(), right[position] + " ", "x", 7, [1]):
        with pytest.raises(InvalidParameter) as caught:
            Cmk("k", *right[:position], unknown, *right[position + 1 :])
        assert caught.value.name == name
    for missing in ("", None):
        with pytest.raises(MissingParameter):
            Cmk("k", *right[:position], missing, *right[position + 1 :])


def test_exposure_is_demanded_by_its_text_as_well():
    desk = Desk(Scripted(exposure=Exposure.HOST))
    service = desk.service(required_exposure="in_hsm")
    with pytest.raises(CombinationRefused) as caught:
        desk.issue(OAEP1, service=service)
    assert caught.value.rule == "exposure"
    assert desk.issue(OAEP1, service=desk.service(required_exposure="host"))


@pytest.mark.parametrize(
    "options",
    [
        {"required_exposure": "IN_HSM"},
        {"required_exposure": "inside"},
        {"required_exposure": ""},
        {"refused_algorithms": ["PKCS1"]},
        {"refused_algorithms": "RSAES_PKCS1_V1_5"},
        {"refused_algorithms": [None]},
    ],
    ids=str,
)
def test_unknown_texts_in_the_configuration_are_refused(options):
    with pytest.raises(ConfigurationError, match=f"{next(iter(options))}: .* is none of"):
        ImportService({HSM: Scripted()}, Deployment(), **options)


@pytest.mark.parametrize("level", ["hsm", "", None, 7])
def test_an_unknown_level_of_a_backend_is_refused(level):
    with pytest.raises(ConfigurationError, match=r"backends: .* is none of SOFTWARE, HSM"):
        ImportService({level: Scripted()}, Deployment())


# --- allowed when it was issued, and not any more -----------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "deployment"),
    [
        (SM2PKE, Deployment(ManagedHsm.FIPS)),
        (OAEP1, Deployment(dedicated=True)),
        (OAEP1, Deployment(ManagedHsm.NONE)),
    ],
    ids=str,
)
def test_the_policy_is_asked_at_import_as_well(spied, algorithm, deployment):
    parameters = spied.issue(algorithm)
    with pytest.raises(_BY_POLICY):
        spied.bring_in(parameters, b"", service=spied.service(deployment=deployment))
    assert "unwrap_material" not in spied.backend.calls


@pytest.mark.parametrize("refused", [{PKCS1}, ["RSAES_PKCS1_V1_5"], frozenset({PKCS1, OAEP1})])
def test_refused_algorithms_are_neither_issued_nor_imported(spied, refused):
    parameters, service = spied.issue(PKCS1), spied.service(refused_algorithms=refused)
    for call in (
        lambda: spied.issue(PKCS1, service=service),
        lambda: spied.bring_in(parameters, b"", service=service),
    ):
        with pytest.raises(CombinationRefused, match="refused_algorithms") as caught:
            call()
        assert (caught.value.rule, caught.value.name) == ("configuration", "WrappingAlgorithm")
    assert spied.backend.calls == ["generate_wrapping_key", "mac", "verify_mac"]
    parameters = spied.issue(OAEP256, service=service)
    assert spied.bring_in(parameters, wrap(parameters, MATERIAL[AES]), service=service)
