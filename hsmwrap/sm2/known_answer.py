"""The public-key encryption example of GM/T 0003.5-2012, Annex C.2 (also GB/T 32918.5)."""

from __future__ import annotations

from typing import Final

from hsmwrap.sm2.formats import Sm2Ciphertext

PRIVATE: Final = bytes.fromhex("3945208f7b2144b13f36e38ac6d39f95889393692860b51a42fb81ef4df7c5b8")
PUBLIC: Final = bytes.fromhex(
    "04"
    "09f9df311e5421a150dd7d161e4bc5c672179fad1833fc076bb08ff356f35020"
    "ccea490ce26775a52dc6ea718cc1aa600aed05fbf35e084a6632f6072da9ad13"
)
MESSAGE: Final = b"encryption standard"
CIPHERTEXT: Final = Sm2Ciphertext(
    x=0x04EBFC718E8D1798620432268E77FEB6415E2EDE0E073C0F4F640ECD2E149A73,
    y=0xE858F9D81E5430A57B36DAAB8F950A3C64E6EE6A63094D99283AFF767E124DF0,
    c3=bytes.fromhex("59983c18f809e262923c53aec295d30383b54e39d609d160afcb1908d0bd8766"),
    c2=bytes.fromhex("21886ca989ca9c7d58087307ca93092d651efa"),
)
