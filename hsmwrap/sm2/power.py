"""Powers modulo a number of 256 bits: by libcrypto, or by Python without libcrypto.

libcrypto takes a quarter of the time (field note 61) and lets other threads run meanwhile. Neither
is constant time.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Final

from hsmwrap.errors import ConfigurationError
from hsmwrap.locks import LIBCRYPTO
from hsmwrap.sm2 import openssl

_BYTES: Final = 32


class FixedPower:
    """x to a fixed exponent modulo a fixed odd number; safe to share between threads."""

    def __init__(self, exponent: int, modulus: int) -> None:
        """Take both, of 256 bits at most."""
        self._exponent, self._modulus = exponent, modulus

    def __call__(self, base: int) -> int:
        """The power of a base from 0 to the modulus minus 1."""
        if self._libcrypto is None:
            return pow(base, self._exponent, self._modulus)
        lib, exponent, modulus = self._libcrypto
        output = ctypes.create_string_buffer(_BYTES)
        with LIBCRYPTO.read():
            # Not a Scope: it would take as long again as the power itself.
            work = lib.BN_CTX_new()
            try:
                lib.BN_CTX_start(work)
                # Numbers of the context: it wipes and frees them.
                number, result = lib.BN_CTX_get(work), lib.BN_CTX_get(work)
                lib.BN_bin2bn(base.to_bytes(_BYTES), _BYTES, number)
                lib.BN_mod_exp(result, number, exponent, modulus, work)
                lib.BN_bn2binpad(result, output, _BYTES)
                return int.from_bytes(output.raw)
            finally:
                lib.BN_CTX_free(work)
                ctypes.memset(output, 0, _BYTES)

    @functools.cached_property
    def _libcrypto(self) -> tuple[ctypes.CDLL, int, int] | None:
        """libcrypto, and exponent and modulus in its form, which are only read from here on."""
        try:
            lib = openssl.load()
        except ConfigurationError:
            return None
        exponent, modulus = (
            lib.BN_bin2bn(number.to_bytes(_BYTES), _BYTES, None)
            for number in (self._exponent, self._modulus)
        )
        return lib, exponent, modulus
