"""The distribution's OpenSSL 3 libcrypto through ctypes: prototypes, failures, and what calls own.

ctypes releases the GIL during calls. Calls share nothing that changes: each makes its own objects
and frees them on every path, so threads need no lock here; a fork waits for running calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_void_p
from types import MappingProxyType
from typing import Any, ClassVar, Final, Self

from hsmwrap.errors import ConfigurationError, HsmwrapError
from hsmwrap.locks import LIBCRYPTO

# Not ctypes.util.find_library: it needs gcc or binutils, which a server does not have.
SONAME: Final = "libcrypto.so.3"
ADVICE: Final = "for development only, the SM2 engine gmssl can be configured by name"


class Param(ctypes.Structure):
    """OSSL_PARAM (openssl/core.h)."""

    _fields_: ClassVar = [
        ("key", c_char_p),
        ("data_type", c_uint),
        ("data", c_void_p),
        ("data_size", c_size_t),
        ("return_size", c_size_t),
    ]


_TRANSFORM = (c_int, c_void_p, c_void_p, POINTER(c_size_t), c_void_p, c_size_t)

_PROTOTYPES: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {  # function: result, *arguments
        "BN_CTX_free": (None, c_void_p),
        "BN_CTX_get": (c_void_p, c_void_p),
        "BN_CTX_new": (c_void_p,),
        "BN_CTX_start": (None, c_void_p),
        "BN_bin2bn": (c_void_p, c_char_p, c_int, c_void_p),
        "BN_bn2binpad": (c_int, c_void_p, c_void_p, c_int),
        "BN_clear_free": (None, c_void_p),
        "BN_mod_exp": (c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
        "ERR_clear_error": (None,),
        "EVP_PKEY_CTX_free": (None, c_void_p),
        "EVP_PKEY_CTX_new_from_name": (c_void_p, c_void_p, c_char_p, c_char_p),
        "EVP_PKEY_CTX_new_from_pkey": (c_void_p, c_void_p, c_void_p, c_char_p),
        "EVP_PKEY_check": (c_int, c_void_p),
        "EVP_PKEY_decrypt": _TRANSFORM,
        "EVP_PKEY_decrypt_init": (c_int, c_void_p),
        "EVP_PKEY_encrypt": _TRANSFORM,
        "EVP_PKEY_encrypt_init": (c_int, c_void_p),
        "EVP_PKEY_free": (None, c_void_p),
        "EVP_PKEY_fromdata": (c_int, c_void_p, POINTER(c_void_p), c_int, POINTER(Param)),
        "EVP_PKEY_fromdata_init": (c_int, c_void_p),
        "EVP_PKEY_generate": (c_int, c_void_p, POINTER(c_void_p)),
        "EVP_PKEY_get_bn_param": (c_int, c_void_p, c_char_p, POINTER(c_void_p)),
        "EVP_PKEY_get_octet_string_param": (
            *(c_int, c_void_p, c_char_p),
            *(c_void_p, c_size_t, POINTER(c_size_t)),
        ),
        "EVP_PKEY_keygen_init": (c_int, c_void_p),
        "EVP_PKEY_pairwise_check": (c_int, c_void_p),
        "OpenSSL_version": (c_char_p, c_int),
    }
)


def _raise_on_failure(result: int | None, function: Any, _arguments: Any) -> int:
    """Every OpenSSL function here answers a positive number or a pointer if all is well."""
    if result is None or result <= 0:
        raise HsmwrapError(f"libcrypto: {function.__name__} failed")
    return result


def load() -> ctypes.CDLL:
    """Load libcrypto with every prototype declared and every failure made an exception.

    Raises:
        ConfigurationError: It is not there, or too old.
    """
    try:
        lib = ctypes.CDLL(SONAME)
        for name, (result, *arguments) in _PROTOTYPES.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
            if result in (c_int, c_void_p):
                function.errcheck = _raise_on_failure
    except (OSError, AttributeError) as error:
        raise ConfigurationError(
            f"SM2 needs the distribution's OpenSSL 3 ({error}); {ADVICE}"
        ) from error
    return lib


class Scope:
    """What one call made: freed at its end, buffers wiped, the thread's error queue emptied."""

    __slots__ = ("_ends", "_lib")

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._lib = lib
        self._ends: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def __enter__(self) -> Self:
        LIBCRYPTO.acquire_read()
        return self

    def __exit__(self, *_exc: object) -> None:
        # By hand: an ExitStack takes a tenth of the time of a decryption.
        try:
            while self._ends:
                end, arguments = self._ends.pop()
                end(*arguments)
        except BaseException:  # a signal handler's: the rest comes first
            LIBCRYPTO.acquire_read()
            self.__exit__()
            raise
        finally:
            self._lib.ERR_clear_error()
            LIBCRYPTO.release_read()

    def own(self, pointer: int, free: Callable[[int], None]) -> int:
        """Free this object at the end."""
        self._ends.append((free, (pointer,)))
        return pointer

    def out(self, free: Callable[[c_void_p], None]) -> c_void_p:
        """A place for a pointer that a function will store; freed at the end, NULL or not."""
        pointer = c_void_p()
        self._ends.append((free, (pointer,)))
        return pointer

    def buffer(self, size: int, content: bytes = b"") -> ctypes.Array[ctypes.c_char]:
        """Memory that stays valid until the end and is wiped then."""
        buffer = ctypes.create_string_buffer(content, size)
        self._ends.append((ctypes.memset, (buffer, 0, size)))
        return buffer
