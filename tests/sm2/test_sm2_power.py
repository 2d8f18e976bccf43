"""Powers modulo the SM2 prime, and SM2's KDF, against implementations that are not ours."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.x963kdf import X963KDF
from hypothesis import given
from hypothesis import strategies as st

from hsmwrap.errors import HsmwrapError
from hsmwrap.sm2 import openssl, sm2_kdf
from hsmwrap.sm2.curve import P
from hsmwrap.sm2.power import FixedPower

EXPONENT = (P + 1) // 4
edges = st.sampled_from([0, 1, 2, P - 1, P - 2, 2**32, 2**255])
bases = st.one_of(edges, st.integers(0, P - 1))

by_libcrypto = FixedPower(EXPONENT, P)
by_python = FixedPower(EXPONENT, P)
by_python.__dict__["_libcrypto"] = None


def test_libcrypto_is_used_where_it_is_there():
    assert by_libcrypto._libcrypto is not None


def test_python_stands_in_where_it_is_not(monkeypatch):
    monkeypatch.setattr(openssl, "SONAME", "libcrypto.so.none")
    power = FixedPower(EXPONENT, P)
    assert power(4) == pow(4, EXPONENT, P)
    assert power._libcrypto is None


@given(bases)
def test_power(base):
    assert by_libcrypto(base) == by_python(base) == pow(base, EXPONENT, P)


def test_threads_do_not_disturb_each_other():
    numbers = range(4, 2004)
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(by_libcrypto, numbers)) == [pow(n, EXPONENT, P) for n in numbers]


class Spy:
    """Stands before libcrypto: counts contexts, and may fail a function."""

    def __init__(self, lib, failing=None):
        self._lib, self._failing = lib, failing
        self.alive = Counter()

    def __getattr__(self, name):
        function = getattr(self._lib, name)

        def call(*arguments):
            if name == self._failing:
                raise HsmwrapError(f"libcrypto: {name} failed")
            self.alive["context"] += {"BN_CTX_new": 1, "BN_CTX_free": -1}.get(name, 0)
            return function(*arguments)

        return call


@pytest.mark.parametrize("failing", [None, "BN_CTX_get", "BN_bin2bn", "BN_mod_exp", "BN_bn2binpad"])
def test_nothing_is_left_behind(failing):
    power = FixedPower(EXPONENT, P)
    lib, *constants = power._libcrypto
    spy = Spy(lib, failing)
    power.__dict__["_libcrypto"] = (spy, *constants)
    if failing is None:
        assert power(9) == pow(9, EXPONENT, P)
    else:
        with pytest.raises(HsmwrapError, match=failing):
            power(9)
    assert spy.alive == {"context": 0}


@given(x2=st.binary(min_size=32, max_size=32), length=st.integers(1, 200))
def test_kdf_is_that_of_x963_with_sm3(x2, length):
    y2 = x2[::-1]
    assert sm2_kdf(x2, y2, length) == X963KDF(hashes.SM3(), length, None).derive(x2 + y2)
