"""The software backend's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hsmwrap.settings import SWITCH, TEXT, Settings, choice, setting
from hsmwrap.sm2.engine import ENGINES
from hsmwrap.sm2.formats import DEFAULT_LAYOUTS, LAYOUTS, Layout


@dataclass(frozen=True, slots=True)
class SoftwareSettings(Settings):
    """The checked settings of the software backend."""

    component: ClassVar[str] = "software backend"

    keyring_file: str | None = setting(
        TEXT,
        "Keyring file: a private file of master keys. Without it they are lost with the process.",
    )
    sm2_engine: str | None = setting(
        choice(ENGINES),
        "SM2 engine; gmssl is for development only. Without it libcrypto, and no SM2 where the "
        "distribution built libcrypto without it.",
    )
    sm2_layouts: tuple[Layout, ...] = setting(
        LAYOUTS, "SM2 ciphertext layouts that are accepted.", DEFAULT_LAYOUTS
    )
    require_implicit_rejection: bool = setting(
        SWITCH,
        "Refuse RSAES_PKCS1_V1_5 where pyca's OpenSSL answers wrong padding with an error, not "
        "with random bytes (tried).",
        default=False,
    )
    serve_hsm_level: bool = setting(
        SWITCH,
        "Development mode: serve CMKs of protection level HSM as well.",
        default=False,
    )
