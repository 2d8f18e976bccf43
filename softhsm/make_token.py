#!/usr/bin/env python3
"""Make the SoftHSM token that init-token describes in the environment, unless it is there.

``softhsm2-util`` takes PINs from its command line, which every process can read, or from a
terminal. These few PKCS#11 calls take them from files, and the standard library is enough for them.
"""

import ctypes
import os
from collections.abc import Iterator
from ctypes import byref, c_char, c_ubyte, c_ulong
from pathlib import Path

# PKCS #11 v2.40, base specification, sections 3.2 and 5
CKU_SO = 0
CKF_RW_SESSION = 0x2
CKF_SERIAL_SESSION = 0x4
CKF_USER_PIN_INITIALIZED = 0x8
CKF_TOKEN_INITIALIZED = 0x400
LABEL_LENGTH = 32


class TokenInfo(ctypes.Structure):
    """CK_TOKEN_INFO."""

    _fields_ = (
        ("label", c_char * LABEL_LENGTH),
        ("manufacturer_id", c_char * 32),
        ("model", c_char * 16),
        ("serial_number", c_char * 16),
        ("flags", c_ulong),
        ("limits", c_ulong * 10),
        ("versions", c_ubyte * 4),
        ("utc_time", c_char * 16),
    )


class Module:
    """SoftHSM's PKCS#11 module, initialised for the life of this process."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._call("C_Initialize", None)

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            raise SystemExit(f"init-token: {function} answered {code:#x}")

    def tokens(self) -> Iterator[tuple[c_ulong, TokenInfo]]:
        """Yield each slot with what its token says of itself."""
        count = c_ulong()
        self._call("C_GetSlotList", c_ubyte(1), None, byref(count))
        slots = (c_ulong * count.value)()
        self._call("C_GetSlotList", c_ubyte(1), slots, byref(count))
        for slot in slots:
            info = TokenInfo()
            self._call("C_GetTokenInfo", c_ulong(slot), byref(info))
            yield c_ulong(slot), info

    def initialise(self, slot: c_ulong, label: bytes, pin: bytes, so_pin: bytes) -> None:
        """Make an empty token in the slot; ``label`` is padded with blanks to 32 bytes."""
        self._call("C_InitToken", slot, so_pin, c_ulong(len(so_pin)), label)
        session = c_ulong()
        flags = c_ulong(CKF_RW_SESSION | CKF_SERIAL_SESSION)
        self._call("C_OpenSession", slot, flags, None, None, byref(session))
        self._call("C_Login", session, c_ulong(CKU_SO), so_pin, c_ulong(len(so_pin)))
        self._call("C_InitPIN", session, pin, c_ulong(len(pin)))


def main() -> None:
    """Leave a whole token of that label as it is; make it in its own slot or in the free one."""
    label = os.environ["HSMWRAP_TOKEN_LABEL"].encode().ljust(LABEL_LENGTH)
    if len(label) > LABEL_LENGTH:
        raise SystemExit(f"init-token: a token's label has at most {LABEL_LENGTH} bytes")
    module = Module(os.environ["HSMWRAP_PKCS11_MODULE"])
    free = []
    for slot, info in module.tokens():
        if info.label == label and info.flags & CKF_USER_PIN_INITIALIZED:
            return
        if info.label == label or not info.flags & CKF_TOKEN_INITIALIZED:
            free.append(slot)
    pin = Path(os.environ["HSMWRAP_PIN_FILE"]).read_bytes().strip()
    so_pin = Path(os.environ["HSMWRAP_SO_PIN_FILE"]).read_bytes().strip()
    module.initialise(free[0], label, pin, so_pin)


if __name__ == "__main__":
    main()
