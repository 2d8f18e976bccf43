"""Policy: the compatibility table × the deployment → allowed, or the rule that refuses.

Asked before anything is generated (design invariant 1). The question is answered from
:data:`hsmwrap.catalog.COMPATIBILITY_TABLE` alone; this module only reads it.
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
    """Where this KMS runs, as far as the compatibility table cares.

    Attributes:
        managed_hsm: Class of the managed HSM: SCA (Chinese mainland), FIPS, or NONE; a member or
            its spelling.
        dedicated: True for a dedicated KMS instance.

    Raises:
        ConfigurationError: ``managed_hsm`` names no class, or ``dedicated`` is no boolean.
    """

    managed_hsm: ManagedHsm = ManagedHsm.SCA
    dedicated: bool = False

    def __post_init__(self) -> None:
        managed_hsm = configured(ManagedHsm, "managed_hsm", self.managed_hsm)
        object.__setattr__(self, "managed_hsm", managed_hsm)
        # Every text is true, "false" as well.
        if not isinstance(self.dedicated, bool):
            raise ConfigurationError(f"dedicated: {self.dedicated!r} is neither True nor False")

    @classmethod
    def of_region(cls, region: str, *, dedicated: bool = False) -> Deployment:
        """The deployment of an Alibaba Cloud region id; one that is not listed has no HSM."""
        return cls(REGIONS.get(region, ManagedHsm.NONE), dedicated=dedicated)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer of :func:`check`: allowed, or refused with the rule that refuses.

    Attributes:
        allowed: Whether parameters may be issued.
        rule: Short name of the refusing rule; ``None`` when allowed.
        reason: What was wrong and what would be right; empty when allowed.
        parameter: The API parameter at fault; ``None`` when allowed.
    """

    allowed: bool
    rule: str | None = None
    reason: str = ""
    parameter: str | None = None

    def error(self) -> HsmwrapError:
        """The typed error of a refusal (call it on refusals only)."""
        rule, parameter = self.rule or "", self.parameter or ""
        if parameter == "ProtectionLevel" and rule == "no-managed-hsm":
            return UnsupportedProtectionLevel(rule, self.reason)
        return CombinationRefused(parameter, rule, self.reason)


ALLOWED = Verdict(allowed=True)


def check(
    spec: WrappingKeySpec,
    algorithm: WrappingAlgorithm,
    level: ProtectionLevel,
    deployment: Deployment,
) -> Verdict:
    """Say whether a CMK of ``level`` may have parameters of ``spec`` and ``algorithm`` here.

    A text counts as the member that it spells; one that spells none is refused.
    """
    # Equality and not identity throughout: a text is no member, but it has to meet every rule.
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
