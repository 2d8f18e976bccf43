"""The PKCS#11 backend's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Self

from hsmwrap.backend import Custody
from hsmwrap.errors import ConfigurationError, strip_tracebacks
from hsmwrap.pkcs11.binding import profiles
from hsmwrap.pkcs11.binding.profiles import VendorSm2, VendorSm4
from hsmwrap.pkcs11.binding.traits import STANDARD, Traits
from hsmwrap.pkcs11.token.pin import SOURCES, PinSource
from hsmwrap.pkcs11.token.pin import from_settings as pin_from_settings
from hsmwrap.pkcs11.token.selection import SETTING_NAMES, TokenSelector, selector_from
from hsmwrap.pkcs11.token.uri import Pkcs11Uri, parse
from hsmwrap.settings import (
    HEX,
    NAME,
    SWITCH,
    TEXT,
    Kind,
    Settings,
    choice,
    integer,
    seconds,
    setting,
)
from hsmwrap.sm2.formats import DEFAULT_LAYOUTS, LAYOUTS, Layout


class WrappingCustody(StrEnum):
    """How private wrapping keys are kept: a :class:`hsmwrap.backend.Custody`, or AUTO.

    AUTO: HSM_ENCRYPTED_DATABASE where the HSM token can, as probed; HSM_INTERNAL otherwise.
    """

    AUTO = "auto"
    HSM_INTERNAL = Custody.HSM_INTERNAL.value
    HSM_ENCRYPTED_DATABASE = Custody.HSM_ENCRYPTED_DATABASE.value


@dataclass(frozen=True, slots=True)
class Pkcs11Settings(Settings):
    """The checked settings of the PKCS#11 backend.

    Attributes that are not settings themselves:
        selector: Which HSM token, from the URI, the ``token_`` settings and ``slot_id``.
        pin: The one PIN source, from the URI or the ``pin_`` settings; None where none is given.
        vendor: The vendor's SM2, from the profile.
        sm4: The vendor's SM4, from the profile.
        profile_told: Name of the profile, or the summary of the file; empty without either.
        traits: What the profile says of the module's calls.
    """

    component: ClassVar[str] = "PKCS#11 backend"

    uri: str | None = setting(
        TEXT, "RFC 7512 URI: module-path, token selection, pin-source.", show=False
    )
    module: str = setting(
        TEXT, "Path of the PKCS#11 module; required, here or as module-path in the URI."
    )
    library_parameters: str | None = setting(
        TEXT, "pReserved of C_Initialize; NSS softokn needs it."
    )
    library_parameters_hex: bytes | None = setting(
        HEX, "The same for a module that takes a structure, as bytes in hex."
    )
    token_label: str | None = setting(TEXT, "Label of the HSM token.")
    token_serial: str | None = setting(TEXT, "Serial number of the HSM token.")
    token_manufacturer: str | None = setting(TEXT, "Manufacturer of the HSM token.")
    token_model: str | None = setting(TEXT, "Model of the HSM token.")
    slot_id: int | None = setting(
        Kind("a slot number", integer(0, 2**64 - 1).read),
        "Slot of the HSM token; some modules renumber their slots.",
    )
    pin_file: PinSource | None = setting(
        SOURCES["pin_file"], "Private file with the PIN: mode 0400, owned by this user or root."
    )
    pin_env: PinSource | None = setting(
        SOURCES["pin_env"], "Environment variable that holds the PIN."
    )
    pin_command: PinSource | None = setting(
        SOURCES["pin_command"], "Program that prints the PIN; run without a shell."
    )
    pin_callback: PinSource | None = setting(
        SOURCES["pin_callback"], "Function that returns the PIN, for embedders."
    )
    allow_pin_value: bool = setting(SWITCH, "Accept pin-value in the URI.", default=False)
    force_login: bool = setting(
        SWITCH,
        "Log in although one more wrong PIN may lock the HSM token; check the PIN before.",
        default=False,
    )
    sessions: int = setting(integer(1, 1024), "Size of the session pool.", 8)
    session_wait: float = setting(seconds(), "How long a call waits for a session.", 10.0)
    opened_keys: int = setting(
        integer(0, 1024),
        "Sealed keys that each session keeps open for up to a minute; 0: each use unwraps its key.",
        0,
    )
    lazy: bool = setting(SWITCH, "Start although the HSM is unavailable.", default=False)
    initial_backoff: float = setting(
        seconds(), "Wait before a lost HSM is tried again; doubles up to max_backoff.", 0.5
    )
    max_backoff: float = setting(seconds(), "Longest wait between two tries.", 30.0)
    wrapping_custody: WrappingCustody = setting(
        choice(WrappingCustody),
        "Private wrapping keys: encrypted in the import token (HsmEncryptedDatabase), or objects "
        "in the HSM token (HsmInternal); auto: HsmEncryptedDatabase where the HSM token can.",
        WrappingCustody.AUTO,
    )
    material_custody: Custody = setting(
        choice(Custody),
        "Imported keys: encrypted blobs that the caller keeps (HsmEncryptedDatabase), or objects "
        "in the HSM token (HsmInternal).",
        Custody.HSM_ENCRYPTED_DATABASE,
    )
    sm2_layouts: tuple[Layout, ...] = setting(
        LAYOUTS, "SM2 ciphertext layouts that are accepted.", DEFAULT_LAYOUTS
    )
    require_implicit_rejection: bool = setting(
        SWITCH,
        "Refuse RSAES_PKCS1_V1_5 where the HSM token answers wrong padding with an error, not with "
        "random bytes (tried).",
        default=False,
    )
    require_trusted_keys: bool = setting(
        SWITCH, "Use only key sets that the security officer made trusted.", default=False
    )
    profile: str | None = setting(
        NAME,
        "Vendor profile; `hsmwrap profiles list` has those that there are. All backends of a "
        "process on one module need the same, `[sm4]` included.",
    )
    profile_file: str | None = setting(TEXT, "File with a vendor profile of your own (TOML).")
    name: str = setting(NAME, "Name of the backend in import tokens and key references.", "pkcs11")
    key_prefix: str = setting(
        NAME, "Start of the labels of the backend's objects in the HSM token.", "hsmwrap"
    )

    selector: TokenSelector = field(init=False)
    pin: PinSource | None = field(init=False)
    vendor: VendorSm2 | None = field(init=False)
    sm4: VendorSm4 | None = field(init=False)
    profile_told: str = field(init=False)
    traits: Traits = field(init=False)

    @property
    def reserved(self) -> str | bytes | None:
        """``pReserved`` of C_Initialize, in either form."""
        return self.library_parameters or self.library_parameters_hex

    @classmethod
    @strip_tracebacks
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """As :meth:`hsmwrap.settings.Settings.from_mapping`, over the profile's settings."""
        named = [mapping.get(each) for each in ("profile", "profile_file")]
        chosen = None
        if all(each is None or isinstance(each, str) for each in named):
            chosen = profiles.chosen(*named)
        presets = (chosen and chosen.settings) or {}
        return super(Pkcs11Settings, cls).from_mapping({**presets, **mapping})

    def __post_init__(self) -> None:
        """Check the values, and put what the URI says beside them.

        Raises:
            ConfigurationError: A value is wrong or contradicts another; the text says which.
        """
        Settings.__post_init__(self)
        if self.initial_backoff > self.max_backoff:
            raise ConfigurationError("initial_backoff exceeds max_backoff")
        if self.library_parameters is not None and self.library_parameters_hex is not None:
            raise ConfigurationError(
                "library_parameters and library_parameters_hex: give one of them"
            )
        uri = parse(self.uri, allow_pin_value=self.allow_pin_value) if self.uri else Pkcs11Uri()
        chosen = profiles.chosen(self.profile, self.profile_file)
        derived = {
            "module": self._module(uri),
            "selector": selector_from(
                {name: getattr(self, name) for name in SETTING_NAMES.values()}, uri
            ),
            "pin": self._pin_source(uri),
            "vendor": chosen.sm2 if chosen is not None else None,
            "traits": chosen.traits if chosen is not None else STANDARD,
            "sm4": chosen.sm4 if chosen is not None else None,
            "profile_told": self.profile or (chosen and f"file: {chosen.summary}") or "",
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _module(self, uri: Pkcs11Uri) -> str:
        module = self.module or uri.module_path
        if module is None:
            raise ConfigurationError(
                "module: give the module's path, here or as the URI's module-path"
            )
        if uri.module_path not in {None, module}:
            raise ConfigurationError(
                f"module is {module!r}, but the PKCS#11 URI says {uri.module_path!r}; "
                "give one of them"
            )
        return module

    def _pin_source(self, uri: Pkcs11Uri) -> PinSource | None:
        given = {name: getattr(self, name, None) for name in SOURCES} | uri.pin_settings()
        if all(source is None for source in given.values()):
            return None
        return pin_from_settings(given)
