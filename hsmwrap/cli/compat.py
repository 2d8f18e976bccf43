"""``hsmwrap compat``: print the compatibility table as the policy applies it."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

from hsmwrap import policy
from hsmwrap.catalog import ManagedHsm, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.cli import tables
from hsmwrap.cli.arguments import Subparsers, add_json_option
from hsmwrap.policy import Deployment, Verdict

Combination = tuple[WrappingKeySpec, WrappingAlgorithm, ProtectionLevel]


def combinations() -> Iterator[Combination]:
    """Every wrapping key spec × wrapping algorithm × protection level, in the catalogue's order."""
    return itertools.product(WrappingKeySpec, WrappingAlgorithm, ProtectionLevel)


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "compat",
        help="print the compatibility table",
        description="For every wrapping key spec, wrapping algorithm and protection level, print "
        "whether parameters for import may be issued, or which rule refuses. Without a region "
        "or a class of managed HSM: for all deployments.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--region", help="an Alibaba Cloud region id, such as cn-hangzhou")
    where.add_argument(
        "--managed-hsm",
        type=str.upper,
        choices=[hsm.value for hsm in ManagedHsm],
        help="the certification of the region's managed HSM",
    )
    parser.add_argument("--dedicated", action="store_true", help="a dedicated KMS instance")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table of the chosen deployments."""
    deployments = _deployments(args)
    if args.json:
        print(tables.to_json({"rows": [_facts(*row) for d in deployments for row in _rows(d)]}))
    else:
        print("\n\n".join(_section(deployment) for deployment in deployments))
    return 0


def _deployments(args: argparse.Namespace) -> list[Deployment]:
    if args.region is not None:
        return [Deployment.of_region(args.region, dedicated=args.dedicated)]
    if args.managed_hsm is not None:
        return [Deployment(ManagedHsm(args.managed_hsm), dedicated=args.dedicated)]
    kinds = (True,) if args.dedicated else (False, True)
    return [Deployment(hsm, dedicated=kind) for hsm in ManagedHsm for kind in kinds]


def _rows(deployment: Deployment) -> Iterator[tuple[Deployment, Combination, Verdict]]:
    for combination in combinations():
        yield deployment, combination, policy.check(*combination, deployment)


def _facts(
    deployment: Deployment, combination: Combination, verdict: Verdict
) -> dict[str, str | bool | None]:
    spec, algorithm, level = combination
    return {
        "managed_hsm": deployment.managed_hsm,
        "dedicated": deployment.dedicated,
        "wrapping_key_spec": spec,
        "wrapping_algorithm": algorithm,
        "protection_level": level,
        "allowed": verdict.allowed,
        "rule": verdict.rule,
        "code": None if verdict.allowed else verdict.error().code,
        "parameter": verdict.parameter,
        "reason": verdict.reason or None,
    }


def _section(deployment: Deployment) -> str:
    kind = "dedicated KMS" if deployment.dedicated else "shared KMS"
    hsm = (
        "no managed HSM"
        if deployment.managed_hsm is ManagedHsm.NONE
        else f"managed HSM of class {deployment.managed_hsm}"
    )
    table = tables.render(
        ("wrapping key spec", "wrapping algorithm", "level", "verdict", "rule", "reason"),
        [
            (
                *combination,
                "allowed" if verdict.allowed else "refused",
                verdict.rule or "-",
                verdict.reason or "-",
            )
            for _, combination, verdict in _rows(deployment)
        ],
    )
    return f"{kind}, {hsm}\n\n{table}"
