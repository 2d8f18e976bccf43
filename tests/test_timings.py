"""The statistics and the judgement of scripts/timing; no time is measured here."""

import random

import pytest
from timings.classes import AGAIN, GOOD, classes
from timings.judge import Comparison, Expectation, Expected, Verdict
from timings.statistics import Apart, apart

from hsmwrap import registry
from hsmwrap.catalog import KeySpec, WrappingAlgorithm
from hsmwrap.errors import InvalidKeyMaterial
from hsmwrap.imports import Cmk, ImportService
from hsmwrap.policy import Deployment

pytestmark = pytest.mark.slow

PKCS1, OAEP1, OAEP256, SM2PKE = WrappingAlgorithm
ROUNDS = 400


def times(seed, slower=0.0):
    """Milliseconds with the noise and the outliers of a machine."""
    draw = random.Random(seed)
    return [
        (1 + slower + draw.gauss(0, 0.02) + (draw.random() < 0.02) * draw.random()) / 1000
        for _ in range(ROUNDS)
    ]


# --- statistics ---------------------------------------------------------------------------------


def test_what_is_known_by_hand():
    found = apart([1e-3, 2e-3, 3e-3], [2e-3, 3e-3, 4e-3], 0.95)
    # Of the nine pairs the other is slower in six and equal in two.
    assert (found.rounds, round(found.auc, 6)) == (3, round(7 / 9, 6))
    assert found.microseconds == pytest.approx(1000)


def test_all_slower_is_one_and_all_faster_is_zero():
    assert apart(times(1), times(2, slower=9), 0.999).auc == 1
    assert apart(times(2, slower=9), times(1), 0.999).auc == 0


def test_an_auc_and_its_mirror_add_up_to_one():
    one, other = times(1), times(2, slower=0.01)
    assert apart(one, other, 0.99).auc + apart(other, one, 0.99).auc == pytest.approx(1)


def test_the_interval_holds_the_auc_and_is_as_wide_as_it_is_known_to_be():
    found = apart(times(1), times(2), 0.95)
    assert found.low < found.auc < found.high
    # Normal approximation: a standard error of 1/√(6·rounds) where nothing differs.
    assert found.high - found.low == pytest.approx(2 * 1.96 / (6 * ROUNDS) ** 0.5, rel=0.3)


def test_a_rising_load_of_the_machine_is_no_difference():
    drift = [number / ROUNDS / 1000 for number in range(ROUNDS)]
    one = [a + b for a, b in zip(times(1), drift, strict=True)]
    other = [a + b for a, b in zip(times(2), drift, strict=True)]
    assert abs(apart(one, other, 0.999).microseconds) < 5


def test_the_same_times_have_the_same_interval_each_time():
    one, other = times(1), times(2)
    assert apart(one, other, 0.999) == apart(one, other, 0.999)


def test_equal_times_tell_nothing():
    assert apart([1.0] * 50, [1.0] * 50, 0.999) == Apart(50, 0.0, 0.0, 0.5, 0.5, 0.5)


# --- judgement ----------------------------------------------------------------------------------

EXPECTED = Expected(
    margin=0.05,
    confidence=0.999,
    rows=(
        Expectation(Verdict.MUST_DIFFER, "control", other=GOOD),
        Expectation(Verdict.MAY_DIFFER, "known", backend="pkcs11", other="length 1*"),
    ),
)


def comparison(other, low, high, backend="pkcs11"):
    found = Apart(ROUNDS, 1.0, 1.0, (low + high) / 2, low, high)
    return Comparison(backend, "http", "RSAES_PKCS1_V1_5", "first", other, found)


@pytest.mark.parametrize(
    ("other", "low", "high", "finding"),
    [
        ("padding", 0.46, 0.54, None),
        ("padding", 0.50, 0.90, None),  # not known well enough to be a difference
        ("padding", 0.551, 0.60, "NEW DIFFERENCE"),
        ("padding", 0.40, 0.449, "NEW DIFFERENCE"),
        ("length 16", 0.9, 1.0, None),
        (AGAIN, 0.6, 0.7, "NEW DIFFERENCE"),
        (GOOD, 0.9, 1.0, None),
        (GOOD, 0.0, 0.1, None),
        (GOOD, 0.46, 0.54, "NOT SEEN"),
    ],
)
def test_a_difference_that_is_not_expected_is_a_finding(other, low, high, finding):
    found = list(EXPECTED.findings([comparison(other, low, high)]))
    assert [each.split(":")[0] for each in found] == ([finding] if finding else [])


def test_a_row_speaks_of_its_own_backend_only():
    assert list(EXPECTED.findings([comparison("length 16", 0.9, 1.0, "software")]))


def test_a_padding_oracle_is_found_in_noise():
    """A fifth of a standard deviation, in 400 rounds."""
    found = apart(times(1), times(2, slower=0.03), EXPECTED.confidence)
    assert EXPECTED.differs(Comparison("b", "o", "a", "first", "padding", found))
    found = apart(times(1), times(3), EXPECTED.confidence)
    assert not EXPECTED.differs(Comparison("b", "o", "a", "first", "padding", found))


# --- the data, and the classes that it speaks of --------------------------------------------------


@pytest.fixture(scope="module")
def issued():
    with registry.open_backend("software", {"serve_hsm_level": True}) as backend:
        service = ImportService({"HSM": backend}, Deployment(), max_failed_imports=10**6)
        cmk = Cmk("timed", KeySpec.ALIYUN_AES_256, "HSM")

        def of(algorithm):
            spec = "EC_SM2" if algorithm is SM2PKE else "RSA_2048"
            parameters = service.get_parameters_for_import(cmk, spec, algorithm)
            made = classes(algorithm, parameters.public_key, bytes(32))

            def bring_in(ciphertext, known=None):
                known = Cmk("timed", KeySpec.ALIYUN_AES_256, "HSM", check_value=known)
                return service.import_key_material(known, ciphertext, parameters.import_token)

            return made, bring_in

        yield of


@pytest.mark.parametrize("algorithm", WrappingAlgorithm)
def test_every_class_but_the_control_is_refused(issued, algorithm):
    made, bring_in = issued(algorithm)
    known = bring_in(made[GOOD]()).imported.check_value
    for name, make in made.items():
        if name == GOOD:
            bring_in(make(), known)
            continue
        with pytest.raises(InvalidKeyMaterial):
            bring_in(make(), known)
        assert make() != make()


def test_every_row_of_the_data_speaks_of_a_class(issued):
    expected = Expected.read()
    found = [
        Comparison(backend, over, str(algorithm), "first", other, Apart(1, 0, 0, 0.5, 0.5, 0.5))
        for backend in ("software", "pkcs11")
        for over in ("in process", "http")
        for algorithm in WrappingAlgorithm
        for other in issued(algorithm)[0]
    ]
    assert [row for row in expected.rows if not any(row.fits(each) for each in found)] == []
    assert all(row.why for row in expected.rows)
    assert {expected.of(each) for each in found if each.other == AGAIN} == {Verdict.SAME}
    assert {expected.of(each) for each in found if each.other == GOOD} == {Verdict.MUST_DIFFER}


def test_no_fault_of_padding_may_differ(issued):
    expected = Expected.read()
    for algorithm in (PKCS1, OAEP1, OAEP256):
        for name in issued(algorithm)[0]:
            if name.startswith("padding"):
                row = comparison(name, 0.4, 0.6)
                assert expected.of(row) is Verdict.SAME, name
