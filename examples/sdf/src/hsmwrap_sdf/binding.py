"""The SDF library, called by ctypes: functions, structures and codes of GM/T 0018.

``simulator/sdf.h`` declares the same in C. Nothing here knows what the calls are for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from hsmwrap.errors import ConfigurationError, HsmError, InvalidKeyMaterial
from hsmwrap.sm2 import Sm2Ciphertext

SGD_SM4_ECB = 0x00000401
SGD_SM4_CBC = 0x00000402
SGD_SM2_ENCRYPTION = 0x00020800

SDR_NOTSUPPORT = 0x01000002

CODES = {
    0x01000001: "SDR_UNKNOWERR",
    0x01000002: "SDR_NOTSUPPORT",
    0x01000003: "SDR_COMMFAIL",
    0x01000004: "SDR_HARDFAIL",
    0x01000005: "SDR_OPENDEVICE",
    0x01000006: "SDR_OPENSESSION",
    0x01000007: "SDR_PARDENY",
    0x01000008: "SDR_KEYNOTEXIST",
    0x01000009: "SDR_ALGNOTSUPPORT",
    0x0100000A: "SDR_ALGMODNOTSUPPORT",
    0x0100000B: "SDR_PKOPERR",
    0x0100000C: "SDR_SKOPERR",
    0x0100000F: "SDR_SYMOPERR",
    0x01000010: "SDR_STEPERR",
    0x01000014: "SDR_KEYTYPEERR",
    0x01000015: "SDR_KEYERR",
    0x01000016: "SDR_ENCDATAERR",
    0x01000017: "SDR_RANDERR",
    0x01000018: "SDR_PRKRERR",
    0x0100001C: "SDR_NOBUFFER",
    0x0100001D: "SDR_INARGERR",
    0x0100001E: "SDR_OUTARGERR",
}
"""Names of the codes of appendix A that the functions here can answer."""

FIELD, COORDINATE, HASH = 32, 64, 32
BLOCK = 16
_PADDING = bytes(COORDINATE - FIELD)
_ROOM = 512  # for C, and for a wrapped key: more than the standard's structures need


class SdfError(Exception):
    """A function of the library answered another code than 0. Does not leave this package."""

    def __init__(self, function: str, code: int) -> None:
        super().__init__(f"{function} answered {code:#010x} ({CODES.get(code, 'of the vendor')})")
        self.function = function
        self.code = code


class _PublicKey(ctypes.Structure):
    _fields_ = (
        ("bits", ctypes.c_uint),
        ("x", ctypes.c_ubyte * COORDINATE),
        ("y", ctypes.c_ubyte * COORDINATE),
    )


class _Cipher(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_ubyte * COORDINATE),
        ("y", ctypes.c_ubyte * COORDINATE),
        ("m", ctypes.c_ubyte * HASH),
        ("length", ctypes.c_uint),
        ("c", ctypes.c_ubyte * _ROOM),
    )


class _DeviceInfo(ctypes.Structure):
    _fields_ = (
        ("issuer", ctypes.c_char * 40),
        ("name", ctypes.c_char * 16),
        ("serial", ctypes.c_char * 16),
        ("version", ctypes.c_uint),
        ("standard", ctypes.c_uint),
        ("abilities", ctypes.c_uint * 5),
    )


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a device says it is.

    Attributes:
        issuer: Who made it.
        name: Its model.
        version: Of its software.
        standard: Of the interface: 2 is the edition of 2023.
    """

    issuer: str
    name: str
    version: int
    standard: int


@dataclass(frozen=True, slots=True)
class Point:
    """A public key: coordinates of 32 bytes each."""

    x: bytes
    y: bytes

    @classmethod
    def read(cls, key: _PublicKey) -> Self:
        """From the library's structure."""
        return cls(bytes(key.x)[-FIELD:], bytes(key.y)[-FIELD:])

    def write(self) -> _PublicKey:
        """As the library's structure."""
        return _PublicKey(8 * FIELD, _wide(self.x), _wide(self.y))


def _wide(coordinate: bytes) -> Any:
    return (ctypes.c_ubyte * COORDINATE).from_buffer_copy(_PADDING + coordinate)


def _read_cipher(cipher: _Cipher) -> Sm2Ciphertext:
    x, y = (int.from_bytes(bytes(each)) for each in (cipher.x, cipher.y))
    try:
        return Sm2Ciphertext(x, y, bytes(cipher.m), bytes(cipher.c)[: cipher.length])
    except InvalidKeyMaterial:  # an error of the device is not one of a client
        raise HsmError("the device made an envelope that is not an SM2 ciphertext") from None


def _write_cipher(ciphertext: Sm2Ciphertext) -> _Cipher:
    cipher = _Cipher(
        _wide(ciphertext.x.to_bytes(FIELD)),
        _wide(ciphertext.y.to_bytes(FIELD)),
        (ctypes.c_ubyte * HASH).from_buffer_copy(ciphertext.c3),
        len(ciphertext.c2),
    )
    ctypes.memmove(cipher.c, ciphertext.c2, len(ciphertext.c2))
    return cipher


_HANDLE, _NUMBER, _BYTES = ctypes.c_void_p, ctypes.c_uint, ctypes.c_char_p
_OUT, _LENGTH = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_uint)
_KEY, _CIPHER = ctypes.POINTER(_PublicKey), ctypes.POINTER(_Cipher)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "SDF_OpenDevice": (_OUT,),
    "SDF_CloseDevice": (_HANDLE,),
    "SDF_OpenSession": (_HANDLE, _OUT),
    "SDF_CloseSession": (_HANDLE,),
    "SDF_GetDeviceInfo": (_HANDLE, ctypes.POINTER(_DeviceInfo)),
    "SDF_GetPrivateKeyAccessRight": (_HANDLE, _NUMBER, _BYTES, _NUMBER),
    "SDF_ReleasePrivateKeyAccessRight": (_HANDLE, _NUMBER),
    "SDF_ExportEncPublicKey_ECC": (_HANDLE, _NUMBER, _KEY),
    "SDF_ImportKeyWithISK_ECC": (_HANDLE, _NUMBER, _CIPHER, _OUT),
    "SDF_GenerateKeyWithKEK": (_HANDLE, _NUMBER, _NUMBER, _NUMBER, _BYTES, _LENGTH, _OUT),
    "SDF_ImportKeyWithKEK": (_HANDLE, _NUMBER, _NUMBER, _BYTES, _NUMBER, _OUT),
    "SDF_DestroyKey": (_HANDLE, _HANDLE),
    "SDF_ExchangeDigitEnvelopeBaseOnECC": (_HANDLE, _NUMBER, _NUMBER, _KEY, _CIPHER, _CIPHER),
    "SDF_ExternalEncrypt_ECC": (_HANDLE, _NUMBER, _KEY, _BYTES, _NUMBER, _CIPHER),
    "SDF_Encrypt": (_HANDLE, _HANDLE, _NUMBER, _BYTES, _BYTES, _NUMBER, _BYTES, _LENGTH),
}
_OPTIONAL = frozenset({"SDF_ExchangeDigitEnvelopeBaseOnECC"})
"""Not in each edition: without it the call answers SDR_NOTSUPPORT."""


class Library:
    """The functions, as methods that return what they give out and raise :class:`SdfError`.

    Handles are integers.
    """

    def __init__(self, path: str) -> None:
        """Load it.

        Raises:
            ConfigurationError: It does not load, or a function is missing.
        """
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise ConfigurationError(f"SDF library {path} does not load: {error}") from None
        self._functions: dict[str, Callable[..., int]] = {}
        for name, arguments in _FUNCTIONS.items():
            function = getattr(library, name, None)
            if function is None:
                if name in _OPTIONAL:
                    continue
                raise ConfigurationError(
                    f"SDF library {path} has no {name}: it is not a library of GM/T 0018"
                )
            function.argtypes, function.restype = arguments, ctypes.c_uint
            self._functions[name] = function

    def call(self, function: str, *arguments: Any) -> None:
        """Call one.

        Raises:
            SdfError: It answered another code than 0.
        """
        found = self._functions.get(function)
        code = SDR_NOTSUPPORT if found is None else found(*arguments)
        if code:
            raise SdfError(function, code)

    def _handle(self, function: str, *arguments: Any) -> int:
        handle = ctypes.c_void_p()
        self.call(function, *arguments, ctypes.byref(handle))
        return handle.value or 0

    def open_device(self) -> int:
        """Open the device."""
        return self._handle("SDF_OpenDevice")

    def open_session(self, device: int) -> int:
        """Open a session."""
        return self._handle("SDF_OpenSession", device)

    def device_info(self, session: int) -> DeviceInfo:
        """What the device says it is."""
        info = _DeviceInfo()
        self.call("SDF_GetDeviceInfo", session, ctypes.byref(info))
        issuer, name = (
            each.decode("utf-8", "replace").strip() for each in (info.issuer, info.name)
        )
        return DeviceInfo(issuer, name, info.version, info.standard)

    def public_key(self, session: int, index: int) -> Point:
        """The public key of an encryption pair."""
        key = _PublicKey()
        self.call("SDF_ExportEncPublicKey_ECC", session, index, ctypes.byref(key))
        return Point.read(key)

    def import_envelope(self, session: int, index: int, envelope: Sm2Ciphertext) -> int:
        """Decrypt a key by the pair under an index; its handle."""
        cipher = ctypes.byref(_write_cipher(envelope))
        return self._handle("SDF_ImportKeyWithISK_ECC", session, index, cipher)

    def exchange(
        self, session: int, index: int, to: Point, envelope: Sm2Ciphertext
    ) -> Sm2Ciphertext:
        """Encrypt for another public key what is encrypted for the pair under an index."""
        fresh, key, old = _Cipher(), to.write(), _write_cipher(envelope)
        arguments = (ctypes.byref(each) for each in (key, old, fresh))
        function = "SDF_ExchangeDigitEnvelopeBaseOnECC"
        self.call(function, session, index, SGD_SM2_ENCRYPTION, *arguments)
        return _read_cipher(fresh)

    def encrypt_for(self, session: int, to: Point, data: bytes) -> Sm2Ciphertext:
        """Encrypt data for a public key."""
        cipher, key = _Cipher(), ctypes.byref(to.write())
        arguments = (data, len(data), ctypes.byref(cipher))
        self.call("SDF_ExternalEncrypt_ECC", session, SGD_SM2_ENCRYPTION, key, *arguments)
        return _read_cipher(cipher)

    def generate_under_kek(self, session: int, kek: int) -> tuple[bytes, int]:
        """Make an SM4 key; encrypted under a key-encryption key, and its handle."""
        wrapped, length = ctypes.create_string_buffer(_ROOM), ctypes.c_uint(_ROOM)
        handle = self._handle(
            *("SDF_GenerateKeyWithKEK", session, 8 * BLOCK, SGD_SM4_ECB, kek),
            *(wrapped, ctypes.byref(length)),
        )
        return wrapped.raw[: length.value], handle

    def import_under_kek(self, session: int, kek: int, wrapped: bytes) -> int:
        """Decrypt a key by a key-encryption key; its handle."""
        arguments = (SGD_SM4_ECB, kek, wrapped, len(wrapped))
        return self._handle("SDF_ImportKeyWithKEK", session, *arguments)

    def sm4(self, session: int, key: int, algorithm: int, iv: bytes, blocks: bytes) -> bytes:
        """Encrypt whole blocks."""
        changing = ctypes.create_string_buffer(iv, BLOCK)  # the library writes into it
        out, length = ctypes.create_string_buffer(len(blocks)), ctypes.c_uint(len(blocks))
        arguments = (changing, blocks, len(blocks), out, ctypes.byref(length))
        self.call("SDF_Encrypt", session, key, algorithm, *arguments)
        return out.raw[: length.value]
