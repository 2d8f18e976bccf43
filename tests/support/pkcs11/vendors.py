"""HSMs with SM2 of their vendor's, played by the fault shim in front of SoftHSM2."""

from dataclasses import dataclass

from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding import profiles
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.sm2 import Layout
from hsmwrap.testing.faults import Restriction, Vendor
from support import forked
from support.pkcs11.sm4_vendors import KEY_WRAP, KEYS, MODES, WITH_GCM, table

R = Restriction


@dataclass(frozen=True)
class SimulatedVendor:
    """An HSM and the profile that drives it: one that hsmwrap brings along, or changed in part.

    Attributes:
        vendor: What the shim plays.
        restrictions: What the HSM does not do besides, or does otherwise.
        layout: The ciphertexts that it takes, where the profile has others.
        sm4: ``[sm4]`` for the profile, where that has none.
    """

    vendor: Vendor
    restrictions: Restriction
    layout: Layout | None = None
    sm4: str = ""

    def __str__(self):
        return self.vendor.name.lower()

    @property
    def trusts(self):
        """Whether it knows unwrap templates, and what is for trusted keys."""
        return R.NO_TRUST not in self.restrictions

    @property
    def profile(self):
        """Name of the profile that hsmwrap brings along."""
        return self.vendor.name.lower()

    def play(self, shim, directory, token, **more):
        """Make the shim play the HSM; returns settings for it."""
        shim.play(self.vendor)
        shim.restrict(self.restrictions)
        named = {"profile": self.profile}
        if self.layout is not None or self.sm4:
            changes = {} if self.layout is None else {"ciphertext": self.layout}
            named = {"profile_file": self.profile_file(directory, **changes)}
        return token.bare_settings(module=str(shim.path), **named, **more)

    def profile_file(self, directory, **changes):
        """The profile with other values in its table ``[sm2]``, as a file of an operator's."""
        text = profiles.text_of(self.profile).replace("[sm2]", f"{self.sm4}\n[sm2]")
        for name, value in changes.items():
            kept = [line for line in text.splitlines() if not line.startswith(f"{name} =")]
            text = "\n".join([*kept, "" if value is None else f'{name} = "{value}"', ""])
        file = directory / f"{self.profile}-{'-'.join(changes)}.toml"
        file.write_text(text, "utf-8")
        return str(file)


def by_officer(action, settings, softhsm):
    """Make or rotate key sets in a process of its own: in this one a user may be logged in."""
    so_pin_file = softhsm.environment["HSMWRAP_SO_PIN_FILE"]
    done = forked.run(__name__, action=action, settings=settings, so_pin_file=so_pin_file)
    assert not done.returncode, done.stderr


def with_keys(settings, softhsm, *, trusted=True):
    """The settings, once the HSM has a key set: trusted, or without trust."""
    if not Pkcs11Backend.list_keys(settings):
        if trusted:
            by_officer("initialise", settings, softhsm)
        else:
            Pkcs11Backend.initialise_keys(settings)
    return settings


def perform(action, settings, so_pin_file):
    getattr(Pkcs11Backend, f"{action}_keys")(settings, so_pin_file=so_pin_file)


def vendor_of(settings):
    """The vendor's SM2 that these settings name."""
    return Pkcs11Settings.from_mapping(settings).vendor


POOR = SimulatedVendor(Vendor.SANSEC, R.NO_TRUST, sm4=WITH_GCM.sm4)
"""By the shipped profile and SM4-GCM, without the protections that it says are unknown there."""
PROTECTING = SimulatedVendor(Vendor.TASS, R.EC_POINT_XY, Layout.C1C2C3)
"""The same numbers, another layout, points as x ‖ y, SM4 without GCM, SoftHSM2's protections."""
SIMULATED = (POOR, PROTECTING)
SM_ONLY = SimulatedVendor(
    Vendor.SANSEC, R.NO_AES | R.NO_RSA, sm4=table(**KEYS, **MODES, key_wrap=KEY_WRAP)
)
"""SM2 and SM4 by the vendor's numbers, SM4 key wrap, no AES and no RSA; SoftHSM2's protections."""
