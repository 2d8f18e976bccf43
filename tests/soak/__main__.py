"""The soak's command: two backends on SoftHSM, behind the fault shim."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pkcs11.constants import Attribute
from pkcs11.exceptions import PKCS11Error

import soak
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.sessions.connection import Connection
from hsmwrap.pkcs11.sessions.session import PooledSession
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.testing.faults import FaultShim
from soak import memory, moves
from soak.faults import FaultSchedule
from soak.load import LoadTarget
from soak.runner import Outcome, Plan, Soak, say


def soak_token(plan: Plan, environment: Mapping[str, str]) -> Outcome:
    """Soak the HSM token that softhsm/init-token describes in ``environment``."""
    with tempfile.TemporaryDirectory(prefix="hsmwrap-soak-") as directory:
        shim = FaultShim(environment["HSMWRAP_PKCS11_MODULE"], Path(directory, "shim"))
        settings = _settings(environment, str(shim.path))
        for each in settings:
            if not Pkcs11Backend.list_keys(each):
                Pkcs11Backend.initialise_keys(each, so_pin_file=environment["HSMWRAP_SO_PIN_FILE"])
        return _soak_behind(shim, settings, plan)


def _settings(environment: Mapping[str, str], module: str) -> list[dict[str, Any]]:
    common = {
        "module": module,
        "token_label": environment["HSMWRAP_TOKEN_LABEL"],
        "pin_file": environment["HSMWRAP_PIN_FILE"],
        "initial_backoff": 0.05,
        "max_backoff": 0.5,
    }
    kept: dict[str, Any] = {"material_custody": "HsmInternal", "wrapping_custody": "HsmInternal"}
    return [
        common | {"name": "soak-sealed", "key_prefix": "soak-sealed"},
        common | {"name": "soak-kept", "key_prefix": "soak-kept"} | kept,
    ]


def _soak_behind(shim: FaultShim, settings: Sequence[dict[str, Any]], plan: Plan) -> Outcome:
    token_objects = shim.counters().token_objects_delta
    targets = [LoadTarget(Pkcs11Backend.from_settings(each)) for each in settings]
    load, schedule = Soak(targets, plan), FaultSchedule(shim, plan.seed)
    outcome = load.run(schedule.run_one)
    outcome.faults = dict(schedule.counts)
    outcome.injected = sum(shim.counters().injected.values())
    if any(worker.is_alive() for worker in load.workers):
        return outcome  # closing would wait for them
    idle = sum(1 + target.backend.health().facts["sessions_idle"] for target in targets)
    open_sessions, session_objects, _ = shim.counters().held
    # A dead session is noticed when it is next taken from the pool.
    if open_sessions > idle or session_objects:
        outcome.failures.append(
            f"at rest, {open_sessions} sessions (of {idle} that the pools know) and "
            f"{session_objects} session objects"
        )
    for target, each in zip(targets, settings, strict=True):
        outcome.failures += _mismatches(target, each)
    load.destroy_all()
    for target in targets:
        target.backend.close()
    if (left := shim.counters().held) != (expected := (0, 0, token_objects)):
        outcome.failures.append(
            f"after closing, sessions, session objects and token objects are {left}, not {expected}"
        )
    if violations := shim.counters().violations:
        outcome.failures.append(f"the module was misused: {violations}")
    return outcome


def _mismatches(target: LoadTarget, settings: Mapping[str, Any]) -> list[str]:
    """Acknowledged objects that are not in the HSM token, and the reverse, by their ids."""
    checked = Pkcs11Settings.from_mapping(settings)
    connection = Connection(checked)
    try:
        present = connection.run(lambda pooled: _object_ids(pooled, checked.key_prefix))
    finally:
        connection.close()
    acknowledged = target.object_ids()
    missing, surplus = acknowledged - present, present - acknowledged
    if missing or surplus:
        return [f"{target.backend.name}: {len(missing)} objects lost, {len(surplus)} left over"]
    return []


def _object_ids(pooled: PooledSession, prefix: str) -> set[bytes]:
    """Ids of the wrapping keys and imported keys of one backend."""
    ids = set()
    for key in pooled.find({Attribute.TOKEN: True}):
        attributes = key.get_attributes([Attribute.LABEL, Attribute.ID])
        if attributes[Attribute.LABEL].startswith((f"{prefix}:wrapping:", f"{prefix}:material:")):
            ids.add(attributes[Attribute.ID])
    return ids


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 only if all held."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["moves"]:
        return moves.main(given[1:])
    if given[:1] == ["memory"]:
        return memory.main(given[1:])
    parser = argparse.ArgumentParser(prog="scripts/soak", description=soak.__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--least-speed", type=float, default=0.7)
    parser.add_argument("--json", action="store_true", help="the outcome as JSON")
    options = parser.parse_args(given)
    logging.getLogger("hsmwrap").setLevel(logging.CRITICAL)  # recoveries are counted
    sys.unraisablehook = _unraisable
    plan = Plan(
        options.seconds, options.seed, threads=options.threads, least_speed=options.least_speed
    )
    outcome = soak_token(plan, os.environ)
    for failure in outcome.failures:
        say(failure)
    line = json.dumps(asdict(outcome)) if options.json else outcome.summary()
    sys.stdout.write(f"{line}\n")
    return 1 if outcome.failures else 0


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Silence python-pkcs11: it ends a search that could not begin, and reports that this fails."""
    if not isinstance(unraisable.exc_value, PKCS11Error):
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a thread that is stuck in the module must not keep the process
