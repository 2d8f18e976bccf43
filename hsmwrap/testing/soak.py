"""A soak: many threads issue, import and use keys while the HSM fails at random under them.

``scripts/soak --seconds N --seed S`` runs it on a private SoftHSM token behind the fault shim,
with two backends in one process: one keeps imported keys as sealed blobs, the other one keeps
everything in the HSM token. What has to hold:

* no wrong answer; a valid call ends well, or in an error that says 'try later' or names a CKR;
* what was acknowledged is there at the end and is the right key;
* at rest there are no session objects, no more sessions than the pools', and exactly the token
  objects that were acknowledged; after closing, nothing;
* no thread stops for long; after the last fault the speed is what it was before the first;
* the module is never misused (a session in two threads, C_Finalize under a call).
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pkcs11.constants import Attribute
from pkcs11.exceptions import PKCS11Error

from hsmwrap.errors import ServiceUnavailable
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.sessions.connection import Connection
from hsmwrap.pkcs11.sessions.pool import PooledSession
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.wrapping.reaper import GRACE
from hsmwrap.testing._soakfaults import Rest, Weather
from hsmwrap.testing._soakload import (
    UPKEEP,
    Arena,
    Held,
    Tally,
    Worker,
    require_message,
)
from hsmwrap.testing.faults import FaultShim

SAMPLE = 200
"""Keys per backend that are tried at the end."""
WINDOWS = 5
TICK = 0.05
REPORT_EVERY = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how hard.

    Attributes:
        seconds: Length of the load, with its calm beginning and end.
        seed: Of all that comes at random.
        threads: Threads of the load.
        patience: Seconds within which each thread has to end an operation, and within which the
            backends have to be back after the last fault.
        least_speed: Of the speed before the first fault, what has to be there after the last.
    """

    seconds: float
    seed: int
    threads: int = 16
    patience: float = 60.0
    least_speed: float = 0.7

    @property
    def calm(self) -> float:
        """Seconds of each phase without faults: to warm up, then to measure, and at the end."""
        return min(10.0, self.seconds / 8)


@dataclass(slots=True)
class Outcome:
    """What a soak found; it held if ``failures`` is empty."""

    seed: int
    seconds: float
    operations: int = 0
    imports: int = 0
    keys_tried: int = 0
    speed_before: float = 0.0
    speed_after: float = 0.0
    refused: Mapping[str, int] = field(default_factory=dict)
    recoveries: Mapping[str, int] = field(default_factory=dict)
    generation: int = 0
    faults: Mapping[str, int] = field(default_factory=dict)
    injected: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Speed after the last fault as a part of that before the first."""
        return self.speed_after / self.speed_before if self.speed_before else 0.0

    def summary(self) -> str:
        """One line."""
        failed = [failure.splitlines()[0] for failure in self.failures]
        verdict = f"FAILED: {failed[0]} (of {len(failed)} failures)" if failed else "held"
        return (
            f"soak {verdict}; seed {self.seed}, {self.seconds:.0f} s: {self.operations} operations "
            f"right, {self.imports} imports acknowledged, {sum(self.refused.values())} refused, "
            f"{self.injected} faults injected, {sum(self.recoveries.values())} recoveries, "
            f"{self.generation} lives of the module, {self.keys_tried} keys tried at the end, "
            f"{self.speed:.0%} of the speed before"
        )


class Stuck(Exception):
    """A thread has not ended an operation for too long, or a backend does not come back."""


class Soak:
    """A load on some backends, in phases.

    Attributes:
        arenas: The backends, and what they acknowledged.
        tally: What came of the operations.
        workers: The threads of the load.
    """

    def __init__(self, arenas: Sequence[Arena], plan: Plan) -> None:
        """Take open backends; nothing runs yet."""
        self.arenas, self.plan, self.tally = arenas, plan, Tally()
        self.workers = [
            Worker(f"{plan.seed}.{index}", arenas, self.tally) for index in range(plan.threads)
        ]
        self._reaper = Worker(f"{plan.seed}.reaper", arenas, self.tally, UPKEEP, pause=0.5)
        self._started = self._reported = time.monotonic()

    def run(self, weather: Callable[[Rest], None]) -> Outcome:
        """Calm, then faults (``weather`` is called again and again), then calm; then the books.

        The backends stay open.
        """
        plan = self.plan
        outcome = Outcome(plan.seed, plan.seconds)
        try:
            with self.load():
                self.rest(plan.calm)
                outcome.speed_before = self.speed(plan.calm)
                end = time.monotonic() + plan.seconds - 3 * plan.calm
                while time.monotonic() < end:
                    weather(self.rest)
                self.wait_until_well()
                outcome.speed_after = self.speed(plan.calm)
            outcome.failures += self.open_books()
            outcome.keys_tried = self.try_keys(outcome.failures)
        except Stuck as stuck:
            outcome.failures.append(str(stuck))
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if outcome.speed < plan.least_speed:
            outcome.failures.append(f"only {outcome.speed:.0%} of the speed before the faults")
        outcome.failures[:0] = self.tally.wrong
        self._fill_in(outcome)
        return outcome

    @contextmanager
    def load(self) -> Iterator[None]:
        """Run the threads for the length of a ``with`` block.

        Raises:
            Stuck: A thread does not end.
        """
        crew = [*self.workers, self._reaper]
        for worker in crew:
            worker.start()
        try:
            yield
        finally:
            for worker in crew:
                worker.stop()
        for worker in crew:
            worker.join(self.plan.patience)
            if worker.is_alive():
                raise Stuck(f"thread {worker.name} does not end")

    def rest(self, seconds: float) -> None:
        """Wait, watch the threads, and report.

        Raises:
            Stuck: A thread has not moved for too long.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, TICK))
            now = time.monotonic()
            for worker in self.workers:
                if now - worker.moved > self.plan.patience:
                    raise Stuck(
                        f"thread {worker.name} has not moved for {now - worker.moved:.0f} s"
                    )
            if now - self._reported > REPORT_EVERY:
                self._reported = now
                self._report()

    def speed(self, seconds: float) -> float:
        """Right answers per second: the median of some windows, as others use the machine too."""
        return statistics.median(self._window(seconds / WINDOWS) for _ in range(WINDOWS))

    def _window(self, seconds: float) -> float:
        done, started = self.tally.done, time.monotonic()
        self.rest(seconds)
        return (self.tally.done - done) / (time.monotonic() - started)

    def wait_until_well(self) -> None:
        """Wait until every backend answers again.

        Raises:
            Stuck: One does not, in time.
        """
        deadline = time.monotonic() + self.plan.patience
        waiting = list(self.arenas)
        while waiting:
            waiting = [arena for arena in waiting if not _answers(arena)]
            if time.monotonic() > deadline:
                raise Stuck(f"{waiting[0].backend.health()} after the last fault")
            self.rest(TICK)

    # --- the books ---------------------------------------------------------------------------

    def open_books(self) -> list[str]:
        """Settle what is doubtful; returns what is wrong.

        Afterwards every object in the backends is one that somebody was promised.
        """
        wrong = []
        for arena in self.arenas:
            for held in arena.doubtful:
                arena.backend.destroy_key(held.key)
            arena.doubtful.clear()
            now = datetime.now(UTC)
            arena.issued = [
                issued for issued in arena.issued if issued.parameters.expires_at >= now
            ]
            arena.backend.reap(now + GRACE)
            orphans = arena.backend.health().facts.get("orphans", 0)
            if orphans:
                wrong.append(f"{arena.backend.name}: {orphans} orphans are left after reaping")
        return wrong

    def try_keys(self, failures: list[str]) -> int:
        """Decrypt, with a sample of all acknowledged keys, what was encrypted earlier."""
        dice = random.Random(self.plan.seed)  # noqa: S311  # repeatable, not secret
        tried = 0
        for arena in self.arenas:
            usable = [held for held in arena.held if held.message]
            for held in dice.sample(usable, min(SAMPLE, len(usable))):
                failures += _lost(arena, held)
                tried += 1
        return tried

    def clear_up(self) -> None:
        """Destroy every object that was promised."""
        later = datetime.now(UTC) + timedelta(days=2)
        for arena in self.arenas:
            for held in arena.held:
                arena.backend.destroy_key(held.key)
            arena.held.clear()
            arena.issued.clear()
            arena.backend.reap(later)

    # --- reports -----------------------------------------------------------------------------

    def _fill_in(self, outcome: Outcome) -> None:
        facts = self._facts()
        outcome.operations = self.tally.done
        outcome.imports = self.tally.right["bring_in"] + self.tally.right["bring_in_again"]
        outcome.refused = dict(self.tally.refused)
        outcome.recoveries = dict(sum((Counter(f.get("recoveries")) for f in facts), Counter()))
        outcome.generation = max((f.get("generation", 0) for f in facts), default=0)

    def _facts(self) -> list[Mapping[str, Any]]:
        return [arena.backend.health().facts for arena in self.arenas]

    def _report(self) -> None:
        elapsed = time.monotonic() - self._started
        recoveries = sum(sum(f.get("recoveries", {}).values()) for f in self._facts())
        say(
            f"{elapsed:4.0f} s: {self.tally.done} right, {len(self.tally.wrong)} wrong, "
            f"refused {dict(self.tally.refused)}, recoveries {recoveries}, "
            f"keys {[len(arena.held) for arena in self.arenas]}"
        )


def _answers(arena: Arena) -> bool:
    try:
        arena.backend.seal(b"well?")
    except ServiceUnavailable:
        return False
    return True


def _lost(arena: Arena, held: Held) -> list[str]:
    try:
        require_message(arena, held)
    except Exception as error:  # noqa: BLE001  # whatever it is, the key is lost
        return [f"{arena.backend.name}: an acknowledged key is lost: {error!r}"]
    return []


# --- on SoftHSM, behind the fault shim ------------------------------------------------------------


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
    kept: dict[str, Any] = {"material_custody": "HsmInternal", "wrapping_custody": "resident"}
    return [
        common | {"name": "soak-sealed", "key_prefix": "soak-sealed"},
        common | {"name": "soak-kept", "key_prefix": "soak-kept"} | kept,
    ]


def _soak_behind(shim: FaultShim, settings: Sequence[dict[str, Any]], plan: Plan) -> Outcome:
    before = shim.counters()
    arenas = [Arena(Pkcs11Backend.from_settings(each)) for each in settings]
    soak, weather = Soak(arenas, plan), Weather(shim, plan.seed)
    outcome = soak.run(weather.change)
    outcome.faults = dict(weather.happened)
    outcome.injected = sum(shim.counters().injected.values())
    if any(worker.is_alive() for worker in soak.workers):
        return outcome  # closing would wait for them
    base = before.token_objects_delta
    idle = sum(1 + arena.backend.health().facts["sessions_idle"] for arena in arenas)
    open_sessions, session_objects, _ = shim.counters().held
    # A session that died since its last loan is found out at its next.
    if open_sessions > idle or session_objects:
        outcome.failures.append(
            f"at rest, {open_sessions} sessions (of {idle} that the pools know) and "
            f"{session_objects} session objects"
        )
    for arena, each in zip(arenas, settings, strict=True):
        outcome.failures += _mismatches(arena, each)
    soak.clear_up()
    for arena in arenas:
        arena.backend.close()
    outcome.failures += _leaks(shim, "after closing", (0, 0, base))
    if violations := shim.counters().violations:
        outcome.failures.append(f"the module was misused: {violations}")
    return outcome


def _mismatches(arena: Arena, settings: Mapping[str, Any]) -> list[str]:
    """Promised objects that are not in the HSM token, and the reverse, by their ids."""
    checked = Pkcs11Settings.from_mapping(settings)
    connection = Connection(checked)
    try:
        present = connection.run(lambda pooled: _object_ids(pooled, checked.key_prefix))
    finally:
        connection.close()
    promised = arena.object_ids()
    missing, surplus = promised - present, present - promised
    if missing or surplus:
        return [f"{arena.backend.name}: {len(missing)} objects lost, {len(surplus)} left over"]
    return []


def _object_ids(pooled: PooledSession, prefix: str) -> set[bytes]:
    """Ids of the wrapping keys and imported keys of one backend."""
    ids = set()
    for key in pooled.find({Attribute.TOKEN: True}):
        attributes = key.get_attributes([Attribute.LABEL, Attribute.ID])
        if attributes[Attribute.LABEL].startswith((f"{prefix}:wrapping:", f"{prefix}:material:")):
            ids.add(attributes[Attribute.ID])
    return ids


def _leaks(shim: FaultShim, when: str, expected: tuple[int, int, int]) -> list[str]:
    held = shim.counters().held
    if held == expected:
        return []
    return [f"{when}, sessions, session objects and token objects are {held}, not {expected}"]


# --- the command ----------------------------------------------------------------------------------


def say(line: str) -> None:
    """Tell whoever waits."""
    sys.stderr.write(f"soak: {line}\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 only if all held."""
    parser = argparse.ArgumentParser(prog="python -m hsmwrap.testing.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--least-speed", type=float, default=0.7)
    parser.add_argument("--json", action="store_true", help="the outcome as JSON")
    options = parser.parse_args(arguments)
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
    sys.stdout.flush()
    return 1 if outcome.failures else 0


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Hush python-pkcs11, which ends a search that could not begin, and says so if that fails."""
    if not isinstance(unraisable.exc_value, PKCS11Error):
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    code = main()
    os._exit(code)  # a thread that is stuck in the module must not keep the process
