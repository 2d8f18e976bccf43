"""Single use, and calls that fail half-way."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from support.backends.scripted import Scripted, changed
from support.importing import AES, MATERIAL, OAEP1, OAEP256, SM2PKE, Clock, wrap

from hsmwrap.backend import Custody, Exposure, PrivateKeyRef
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import (
    ConfigurationError,
    ExpiredImportToken,
    HsmError,
    HsmUnavailable,
    InvalidImportToken,
    InvalidKeyMaterial,
    InvalidParameter,
)
from hsmwrap.imports import MARK_MARGIN, MemoryUsedTokens

# --- single use ---------------------------------------------------------------------------------


def test_single_use(any_desk):
    service = any_desk.service(used_tokens=MemoryUsedTokens(any_desk.clock))
    parameters = any_desk.issue(OAEP1, service=service)
    good = wrap(parameters, MATERIAL[AES])
    for bad in (b"", good[:-1], wrap(parameters, bytes(31))):
        with pytest.raises(InvalidKeyMaterial):
            any_desk.bring_in(parameters, bad, service=service)
    any_desk.bring_in(parameters, good, service=service)
    for ciphertext in (good, b""):
        with pytest.raises(InvalidImportToken, match="used before"):
            any_desk.bring_in(parameters, ciphertext, service=service)
    fresh = any_desk.issue(OAEP1, service=service)
    any_desk.bring_in(fresh, wrap(fresh, MATERIAL[AES]), service=service)


def test_one_of_many_at_once_gets_the_token(any_desk):
    service = any_desk.service(used_tokens=MemoryUsedTokens(any_desk.clock))
    parameters = any_desk.issue(SM2PKE, service=service)
    good = wrap(parameters, MATERIAL[AES])

    def one(_number):
        try:
            any_desk.bring_in(parameters, good, service=service)
        except InvalidImportToken:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(one, range(40))) == 1


def test_two_claims_at_once_do_not_both_succeed():
    class Slow(bytes):
        """A lookup so slow that all other threads look up meanwhile."""

        def __hash__(self):
            time.sleep(0.001)
            return super().__hash__()

    used, later = MemoryUsedTokens(Clock()), Clock().now + timedelta(hours=1)
    token_id = Slow(b"token id")
    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(lambda _: used.claim(token_id, later), range(8))) == 1


def test_whatever_made_it_fail_gives_the_token_back(spied):
    service = spied.service(used_tokens=MemoryUsedTokens(spied.clock))
    parameters = spied.issue(OAEP1, service=service)
    for failure in (HsmUnavailable("unavailable"), KeyboardInterrupt()):
        spied.backend.failing["unwrap_material"] = failure
        with pytest.raises(type(failure)):
            spied.bring_in(parameters, bytes(256), service=service)
    spied.backend.failing.clear()
    spied.bring_in(parameters, wrap(parameters, MATERIAL[AES]), service=service)


def test_a_store_that_is_empty_and_falsy_is_used_all_the_same(spied):
    class Store(dict):
        def claim(self, token_id, expires_at):
            return False

    parameters = spied.issue(OAEP1)
    with pytest.raises(InvalidImportToken):
        spied.bring_in(parameters, b"", service=spied.service(used_tokens=Store()))


def test_used_tokens_are_forgotten_once_expired():
    clock = Clock()
    used, soon = MemoryUsedTokens(clock), clock.now + timedelta(hours=1)
    assert used.claim(b"a", soon)
    assert not used.claim(b"a", soon)
    used.release(b"a")
    used.release(b"unknown")
    assert used.claim(b"a", soon)
    clock.now = soon + MARK_MARGIN
    assert used.claim(b"b", clock.now + timedelta(hours=1))
    assert list(used._numbers) == [b"b"]
    assert len(used._by_expiry) == 1


def test_a_token_is_not_used_again_at_its_expiry_nor_by_a_clock_that_is_set_back():
    clock = Clock()
    start, soon = clock.now, clock.now + timedelta(hours=1)
    used = MemoryUsedTokens(clock)
    assert used.claim(b"a", soon)
    for later in (timedelta(0), timedelta(seconds=1), MARK_MARGIN - timedelta(seconds=1)):
        clock.now = soon + later
        assert not used.claim(b"a", soon)
        assert not used.claim(b"fresh", soon)
        clock.now = start
        assert not used.claim(b"a", soon)


def test_a_token_that_fails_again_and_again_takes_one_place():
    clock = Clock()
    used, soon = MemoryUsedTokens(clock), clock.now + timedelta(hours=1)
    for _ in range(100):
        assert used.claim(b"a", soon)
        used.release(b"a")
    assert (len(used._numbers), len(used._by_expiry)) == (1, 1)


def test_claims_do_not_slow_down_with_the_number_of_marks():
    """Counted and not timed: how often a claim looks at an expiry."""
    looks = []

    class Expiry(datetime):
        def __lt__(self, other):
            looks.append(1)
            return datetime.__lt__(self, other)

        def __le__(self, other):
            looks.append(1)
            return datetime.__le__(self, other)

    clock = Clock()
    used = MemoryUsedTokens(clock)
    first = Expiry.fromtimestamp(clock.now.timestamp() + 3600, UTC)
    for number in range(2000):
        assert used.claim(number.to_bytes(4), first + timedelta(seconds=number))
    assert len(looks) < 2000 * 30


def test_a_token_that_expires_while_the_hsm_is_awaited_is_not_used(spied):
    """Also during the claim of single use, which may take time before the unwrap."""

    class Waiting(MemoryUsedTokens):
        def claim(self, token_id, expires_at):
            claimed = super().claim(token_id, expires_at)
            spied.clock.now = expires_at
            return claimed

    for used_tokens in (Waiting(spied.clock), None):
        parameters, service = spied.issue(OAEP1), spied.service(used_tokens=used_tokens)
        if used_tokens is None:
            spied.backend.changing["capabilities"] = partial(_at, spied, parameters.expires_at)
        with pytest.raises(ExpiredImportToken):
            spied.bring_in(parameters, b"", service=service)
        assert "unwrap_material" not in spied.backend.calls


def _at(desk, when, report):
    desk.clock.now = when
    return report


def test_a_token_that_expired_before_it_could_be_claimed_is_called_expired(spied):
    class Late:
        def claim(self, token_id, expires_at):
            spied.clock.now = expires_at
            return False

    parameters, service = spied.issue(OAEP1), spied.service(used_tokens=Late())
    with pytest.raises(ExpiredImportToken):
        spied.bring_in(parameters, b"", service=service)


# --- nothing is left behind ---------------------------------------------------------------------


def test_a_key_is_discarded_when_no_token_can_be_issued_for_it(desk_of, monkeypatch):
    desk = desk_of("resident")
    for algorithm in WrappingAlgorithm:
        before = desk.count()
        assert desk.issue(algorithm)
        assert desk.count() == before + 1
        with monkeypatch.context() as patched:
            patched.setattr(desk.backend, "mac", _away)
            with pytest.raises(HsmUnavailable, match="while sealing"):
                desk.issue(algorithm)
        assert desk.count() == before + 1


def _away(_data):
    raise HsmUnavailable("while sealing")


def test_the_first_error_is_the_one_that_is_told(spied, caplog):
    spied.backend.failing = {
        "mac": HsmUnavailable("while sealing"),
        "discard_wrapping_key": HsmUnavailable("while discarding"),
    }
    with pytest.raises(HsmUnavailable, match="while sealing"):
        spied.issue(OAEP1)
    assert spied.backend.calls == ["generate_wrapping_key", "mac", "discard_wrapping_key"]
    assert [r.getMessage() for r in caplog.records] == ["could not discard a wrapping key"]


def test_keys_of_a_key_source_are_discarded_as_well(spied):
    def source(backend, spec, algorithm, expires_at):
        return backend.generate_wrapping_key(spec, algorithm, expires_at=expires_at)

    spied.backend.failing["mac"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        spied.issue(OAEP1, service=spied.service(key_source=source))
    assert spied.backend.calls[-1] == "discard_wrapping_key"


# --- backends that return something else than requested ------------------------------------------


@pytest.mark.parametrize(
    "differs",
    [
        {"algorithm": OAEP256},
        {"spec": WrappingKeySpec.EC_SM2},
        {"private_key": PrivateKeyRef(Custody.HSM_INTERNAL, bytes(1 << 16))},
        {"private_key": PrivateKeyRef("HsmExternal", b"")},
    ],
    ids=str,
)
def test_a_pair_that_is_not_what_was_asked_for_is_discarded(spied, differs):
    spied.backend.changing["generate_wrapping_key"] = changed(**differs)
    with pytest.raises(HsmError):
        spied.issue(OAEP1)
    assert spied.backend.calls == ["generate_wrapping_key", "discard_wrapping_key"]


@pytest.mark.parametrize(
    "differs",
    [
        {"backend": "another"},
        {"key_spec": KeySpec.ALIYUN_SM4},
        {"custody": Custody.HSM_ENCRYPTED_DATABASE},
        {"exposure": Exposure.IN_HSM},
    ],
    ids=str,
)
def test_a_key_that_is_not_as_promised_is_destroyed(spied, differs):
    service = spied.service(used_tokens=MemoryUsedTokens(spied.clock))
    parameters = spied.issue(OAEP1, service=service)
    spied.backend.changing["unwrap_material"] = changed(**differs)
    good = wrap(parameters, MATERIAL[AES])
    with pytest.raises(HsmError, match="its capabilities promise"):
        spied.bring_in(parameters, good, service=service)
    assert spied.backend.calls[-2:] == ["unwrap_material", "destroy_key"]
    assert "material" not in str(list(spied.backend.store))
    spied.backend.changing.clear()
    spied.bring_in(parameters, good, service=service)


def test_material_that_passed_the_host_against_the_promise_is_no_key(spied):
    spied.backend = Scripted(exposure=Exposure.IN_HSM)
    spied.backend.changing["unwrap_material"] = changed(exposure=Exposure.HOST)
    service = spied.service(required_exposure=Exposure.IN_HSM)
    parameters = spied.issue(OAEP1, service=service)
    with pytest.raises(HsmError, match=r"host; its capabilities promise .* in_hsm"):
        spied.bring_in(parameters, wrap(parameters, MATERIAL[AES]), service=service)
    assert spied.backend.calls[-1] == "destroy_key"


def test_a_key_that_cannot_be_destroyed_is_refused_all_the_same(spied, caplog):
    parameters = spied.issue(OAEP1)
    spied.backend.changing["unwrap_material"] = changed(backend="another")
    spied.backend.failing["destroy_key"] = HsmUnavailable("unavailable")
    with pytest.raises(HsmError, match="its capabilities promise"):
        spied.bring_in(parameters, wrap(parameters, MATERIAL[AES]))
    assert [r.getMessage() for r in caplog.records] == [
        "could not destroy a key that is not as promised"
    ]


def test_a_mac_that_fits_no_token_is_typed(spied):
    spied.backend.changing["mac"] = changed(key_set="é")
    with pytest.raises(HsmError):
        spied.issue(OAEP1)
    assert spied.backend.calls[-1] == "discard_wrapping_key"


# --- times without a time zone ------------------------------------------------------------------


def test_an_expiry_without_a_time_zone_is_refused(spied):
    parameters = spied.issue(OAEP1)
    naive = (spied.clock.now + timedelta(days=1)).replace(tzinfo=None)
    with pytest.raises(InvalidParameter, match="time zone") as caught:
        spied.bring_in(parameters, b"", key_material_expire=naive)
    assert caught.value.name == "KeyMaterialExpireUnix"


def test_a_clock_without_a_time_zone_is_refused(spied):
    parameters = spied.issue(OAEP1)
    spied.clock.now = spied.clock.now.replace(tzinfo=None)
    for call in (lambda: spied.issue(OAEP1), lambda: spied.bring_in(parameters, b"")):
        with pytest.raises(ConfigurationError, match="clock"):
            call()
    assert "unwrap_material" not in spied.backend.calls


def test_a_lifetime_that_ends_before_1970_is_refused(spied):
    service = spied.service(token_lifetime=timedelta(days=-365 * 100))
    with pytest.raises(ConfigurationError, match="lifetime"):
        spied.issue(OAEP1, service=service)
    assert spied.backend.calls[-1] == "discard_wrapping_key"
