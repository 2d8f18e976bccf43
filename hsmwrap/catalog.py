"""The API's enumerations in the API's spelling, and the compatibility table as data.

Source of the table: Alibaba Cloud KMS, "Import key material" and ``GetParametersForImport``
(API 2016-01-20). The decisions are made in :mod:`hsmwrap.policy`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Self, TypeVar

from hsmwrap.errors import ConfigurationError, InvalidParameter, MissingParameter

_E = TypeVar("_E", bound=StrEnum)

_IDENTIFIER = re.compile(r"[A-Za-z0-9_.-]+")


def loggable(text: object, longest: int = 40) -> str:
    """Return the text if it looks like an identifier of at most ``longest`` characters.

    Otherwise its length, and for what is not a ``str`` its type. For texts of a client in errors
    and logs: another text may be a secret in the wrong place, or fill the log.
    """
    if not isinstance(text, str):
        return f"({type(text).__name__})"
    looks_right = len(text) <= longest and _IDENTIFIER.fullmatch(text)
    return text if looks_right else f"({len(text)} characters)"


class _ApiEnum(StrEnum):
    """An enum with members in the API's spelling."""

    @classmethod
    def api_name(cls) -> str:
        """The API parameter that carries this enum."""
        return cls.__name__

    @classmethod
    def parse(cls, value: str | None) -> Self:
        """Return the member for the API's string.

        Raises:
            MissingParameter: ``value`` is None or empty.
            InvalidParameter: ``value`` is not a member; the text lists the members.
        """
        if not value:
            raise MissingParameter(cls.api_name())
        try:
            return cls(value)
        except ValueError:
            known = ", ".join(cls)
            raise InvalidParameter(
                cls.api_name(), f"{loggable(value)} is none of {known}"
            ) from None


class WrappingKeySpec(_ApiEnum):
    """The kind of key pair that key material is encrypted under."""

    RSA_2048 = "RSA_2048"
    EC_SM2 = "EC_SM2"

    @classmethod
    def _missing_(cls, value: object) -> WrappingKeySpec | None:
        # Older SDKs and the product pages write SM2 for this spec.
        return cls.EC_SM2 if value == "SM2" else None


class WrappingAlgorithm(_ApiEnum):
    """How key material is encrypted under the wrapping key.

    OAEP: MGF1 with the same hash, empty label. SM2PKE: GB/T 32918.4.
    """

    RSAES_PKCS1_V1_5 = "RSAES_PKCS1_V1_5"
    RSAES_OAEP_SHA_1 = "RSAES_OAEP_SHA_1"
    RSAES_OAEP_SHA_256 = "RSAES_OAEP_SHA_256"
    SM2PKE = "SM2PKE"


class ProtectionLevel(_ApiEnum):
    """Where a CMK's key material is kept; it selects the backend."""

    SOFTWARE = "SOFTWARE"
    HSM = "HSM"


class Origin(_ApiEnum):
    """Where a CMK's key material comes from; only EXTERNAL is imported."""

    ALIYUN_KMS = "Aliyun_KMS"
    EXTERNAL = "EXTERNAL"


class KeySpec(_ApiEnum):
    """The kind of key that key material becomes."""

    ALIYUN_AES_256 = "Aliyun_AES_256"
    ALIYUN_SM4 = "Aliyun_SM4"

    @property
    def material_length(self) -> int:
        """Length of the key material in bytes; other lengths are refused."""
        return _MATERIAL_LENGTH[self]


_MATERIAL_LENGTH: Mapping[KeySpec, int] = MappingProxyType(
    {KeySpec.ALIYUN_AES_256: 32, KeySpec.ALIYUN_SM4: 16}
)


class ManagedHsm(StrEnum):
    """The certification of a region's managed HSM; NONE: the region has no managed HSM."""

    SCA = "SCA"
    FIPS = "FIPS"
    NONE = "NONE"


def configured(kind: type[_E], setting: str, value: str) -> _E:
    """Return the member of ``kind`` for the value of a setting.

    Raises:
        ConfigurationError: ``value`` is not a member; the text lists the members.
    """
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(kind)
        raise ConfigurationError(f"{setting}: {value!r} is none of {known}") from None


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of the compatibility table: a wrapping algorithm and where it may be used.

    Attributes:
        spec: The wrapping key spec.
        algorithm: The wrapping algorithm.
        levels: Protection levels of the CMK that may use the row.
        managed_hsm: Region classes whose HSM-level CMKs may use the row.
        dedicated: True if a dedicated KMS instance offers the row too.
    """

    spec: WrappingKeySpec
    algorithm: WrappingAlgorithm
    levels: frozenset[ProtectionLevel]
    managed_hsm: frozenset[ManagedHsm]
    dedicated: bool


_BOTH = frozenset(ProtectionLevel)
_ANY_HSM = frozenset({ManagedHsm.SCA, ManagedHsm.FIPS})

COMPATIBILITY_TABLE: tuple[TableRow, ...] = (
    TableRow(
        WrappingKeySpec.RSA_2048,
        WrappingAlgorithm.RSAES_PKCS1_V1_5,
        levels=_BOTH,
        managed_hsm=_ANY_HSM,
        dedicated=True,
    ),
    TableRow(
        WrappingKeySpec.RSA_2048,
        WrappingAlgorithm.RSAES_OAEP_SHA_1,
        levels=_BOTH,
        managed_hsm=_ANY_HSM,
        dedicated=False,
    ),
    TableRow(
        WrappingKeySpec.RSA_2048,
        WrappingAlgorithm.RSAES_OAEP_SHA_256,
        levels=_BOTH,
        managed_hsm=_ANY_HSM,
        dedicated=True,
    ),
    # "Only for a CMK whose ProtectionLevel is HSM, and only with Managed HSM in the Chinese
    # mainland." The source does not mention dedicated KMS; we read that as yes.
    TableRow(
        WrappingKeySpec.EC_SM2,
        WrappingAlgorithm.SM2PKE,
        levels=frozenset({ProtectionLevel.HSM}),
        managed_hsm=frozenset({ManagedHsm.SCA}),
        dedicated=True,
    ),
)

REGIONS: Mapping[str, ManagedHsm] = MappingProxyType(
    dict.fromkeys(
        (
            "cn-beijing",
            "cn-zhangjiakou",
            "cn-hangzhou",
            "cn-shanghai",
            "cn-shenzhen",
            "cn-north-2-gov-1",
            "cn-hangzhou-finance",
            "cn-shanghai-finance-1",
            "cn-shenzhen-finance-1",
        ),
        ManagedHsm.SCA,
    )
    | dict.fromkeys(
        (
            "cn-hongkong",
            "ap-southeast-1",
            "ap-southeast-2",
            "ap-southeast-3",
            "ap-southeast-5",
            "us-east-1",
        ),
        ManagedHsm.FIPS,
    )
)
"""Regions with a managed HSM, and its class. A region that is not listed has none."""
