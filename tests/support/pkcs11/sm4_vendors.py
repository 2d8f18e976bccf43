"""HSMs with SM4 of their vendor's, played by the fault shim: one has GCM, one only ECB and CBC."""

from dataclasses import dataclass

from hsmwrap.pkcs11.binding import profiles
from hsmwrap.testing.faults import Vendor

MODES = {"ecb": 0x8000A100, "cbc": 0x8000A200, "ctr": 0x8000A300, "gcm": 0x8000A400}
"""Of the HSM that has all: made up, as no vendor publishes them all."""
KEYS = {"key_type": 0x80000106, "generate": 0x8000A001}
KEY_WRAP = 0x8000A500


def table(**numbers):
    """``[sm4]`` of a profile."""
    lines = [f"{name} = {number:#010x}" for name, number in numbers.items()]
    return "\n".join(["[sm4]", *lines, ""])


@dataclass(frozen=True)
class Sm4Vendor:
    """An HSM, and the cipher by which its SM4 keys encrypt.

    Attributes:
        vendor: What the shim plays.
        version: First byte of messages.
        sm4: What the profile that hsmwrap brings along says of SM4, where it says nothing.
    """

    vendor: Vendor
    version: int
    sm4: str = ""

    def __str__(self):
        return self.vendor.name.lower()

    def play(self, shim, directory, token, sm4=None, **more):
        """Make the shim play the HSM; returns settings for it, with another ``[sm4]`` if given."""
        shim.play(self.vendor)
        text = profiles.text_of(str(self))
        if sm4 is not None:
            text = "\n\n".join(part for part in text.split("\n\n") if "[sm4]" not in part)
        file = directory / f"{self}-{abs(hash(sm4))}.toml"
        file.write_text(f"{text}\n{self.sm4 if sm4 is None else sm4}", "utf-8")
        return token.bare_settings(module=str(shim.path), profile_file=str(file), **more)


WITH_GCM = Sm4Vendor(Vendor.SANSEC, 1, table(**KEYS, **MODES))
WITHOUT_GCM = Sm4Vendor(Vendor.TASS, 2)
