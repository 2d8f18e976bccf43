"""Policy: whether the compatibility table allows a combination in a deployment.

It is checked before anything is generated (design invariant 1). The only input is
:data:`hsmwrap.catalog.COMPATIBILITY_TABLE`.
"""

from __future__ import annotations

from dataclasses import dataclass

from hsmwrap.catalog import (
    COMPATIBILITY_TABLE,
    REGIONS,
    ManagedHsm,
    ProtectionLevel,
    TableRow,
    WrappingAlgorithm,
    WrappingKeySpec,
    configured,
)
from hsmwrap.errors import (
    CombinationRefused,
    ConfigurationError,
    HsmwrapError,
    UnsupportedProtectionLevel,
)


@dataclass(frozen=True, slots=True)
class Deployment:
    """Where this KMS runs, as far as the compatibility table needs it.

    Attributes:
        managed_hsm: Class of the managed HSM: SCA (Chinese mainland), FIPS, or NONE; a member or
            its name.
        dedicated: True for a dedicated KMS instance.

    Raises:
        ConfigurationError: ``managed_hsm`` is not a class, or ``dedicated`` is not a boolean.
    """

    managed_hsm: ManagedHsm = ManagedHsm.SCA
    dedicated: bool = False

    def __post_init__(self) -> None:
        managed_hsm = configured(ManagedHsm, "managed_hsm", self.managed_hsm)
        object.__setattr__(self, "managed_hsm", managed_hsm)
        # A non-empty text is true in Python, also "false".
        if not isinstance(self.dedicated, bool):
            raise ConfigurationError(f"dedicated: {self.dedicated!r} is neither True nor False")

    @classmethod
    def of_region(cls, region: str, *, dedicated: bool = False) -> Deployment:
        """The deployment of an Alibaba Cloud region id; unknown regions have no managed HSM."""
        return cls(REGIONS.get(region, ManagedHsm.NONE), dedicated=dedicated)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of :func:`check`: allowed, or refused by a rule.

    Attributes:
        allowed: Whether parameters may be issued.
        rule: Short name of the refusing rule; ``None`` when allowed.
        reason: Why it is refused and what is allowed instead; empty when allowed.
        parameter: The API parameter at fault; ``None`` when allowed.
    """

    allowed: bool
    rule: str | None = None
    reason: str = ""
    parameter: str | None = None

    def error(self) -> HsmwrapError:
        """The error of a refusal; call it on refusals only."""
        if self.rule == "no-managed-hsm":
            return UnsupportedProtectionLevel(self.rule, self.reason)
        return CombinationRefused(self.parameter or "", self.rule or "", self.reason)


ALLOWED = Verdict(allowed=True)


def check(
    spec: WrappingKeySpec,
    algorithm: WrappingAlgorithm,
    level: ProtectionLevel,
    deployment: Deployment,
) -> Verdict:
    """Check whether a CMK of ``level`` may get parameters of ``spec`` and ``algorithm``.

    Plain strings are accepted for members; unknown ones are refused.
    """
    # Compare with == and not with `is` throughout: plain strings have to meet every rule too.
    if level == ProtectionLevel.HSM and deployment.managed_hsm == ManagedHsm.NONE:
        return _refuse(
            "no-managed-hsm",
            "ProtectionLevel",
            "this region has no managed HSM, so no CMK of protection level HSM",
        )
    row = _row(spec, algorithm)
    if row is None:
        fitting = ", ".join(r.algorithm for r in COMPATIBILITY_TABLE if r.spec == spec)
        return _refuse(
            "algorithm-of-spec",
            "WrappingAlgorithm",
            f"{algorithm} does not go with {spec}; use {fitting or 'a pair of the table'}",
        )
    return _check_row(row, level, deployment)


def _row(spec: WrappingKeySpec, algorithm: WrappingAlgorithm) -> TableRow | None:
    return next(
        (r for r in COMPATIBILITY_TABLE if r.spec == spec and r.algorithm == algorithm), None
    )


def _check_row(row: TableRow, level: ProtectionLevel, deployment: Deployment) -> Verdict:
    if level not in row.levels:
        fitting = ", ".join(sorted(row.levels))
        return _refuse(
            "protection-level",
            "WrappingKeySpec",
            f"{row.spec} is only for CMKs of protection level {fitting}, not {level}",
        )
    if level == ProtectionLevel.HSM and deployment.managed_hsm not in row.managed_hsm:
        fitting = ", ".join(sorted(row.managed_hsm))
        return _refuse(
            "hsm-certification",
            "WrappingKeySpec",
            f"{row.spec} needs a managed HSM of class {fitting}; "
            f"this region's is {deployment.managed_hsm}",
        )
    if deployment.dedicated and not row.dedicated:
        return _refuse(
            "dedicated-kms",
            "WrappingAlgorithm",
            f"{row.algorithm} is not offered by a dedicated KMS; use RSAES_OAEP_SHA_256",
        )
    return ALLOWED


def _refuse(rule: str, parameter: str, reason: str) -> Verdict:
    return Verdict(allowed=False, rule=rule, reason=reason, parameter=parameter)
