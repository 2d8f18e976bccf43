"""The load on some backends, in phases, and the checks at its end."""

from __future__ import annotations

import faulthandler
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from hsmwrap.errors import ServiceUnavailable
from hsmwrap.pkcs11.wrapping.reaper import GRACE
from soak.faults import Watch
from soak.load import REAPER_MIX, HeldKey, LoadTarget, Results, Worker, require_message

SAMPLE = 200
"""Keys per backend that are tried at the end."""
WINDOWS = 5
LEAST_ANSWERS = 10
"""Right answers in each window, so that a busy machine does not decide the speed by chance."""
TICK = 0.05
REPORT_EVERY = 5.0
MOST_WRONG = 100
"""Wrong answers after which a soak ends."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how hard.

    Attributes:
        seconds: Length of the load, with the phases without faults.
        seed: Of the fault schedule and of what each thread does.
        threads: Threads of the load.
        patience: Seconds in which each thread has to end an operation, and in which every backend
            has to answer again after the last fault.
        least_speed: The speed after the last fault, as a part of that before the first.
    """

    seconds: float
    seed: int
    threads: int = 16
    patience: float = 60.0
    least_speed: float = 0.7

    @property
    def quiet(self) -> float:
        """Least seconds of each phase without faults: warm-up, measurement, end."""
        return min(10.0, self.seconds / 8)


@dataclass(slots=True)
class Outcome:
    """What a soak found; it passed if ``failures`` is empty."""

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
            f"{self.generation} initialisations of the module, "
            f"{self.keys_tried} keys tried at the end, {self.speed:.0%} of the speed before"
        )


class Stuck(Exception):
    """An operation takes too long, a backend does not recover, or too many answers are wrong."""


class Soak:
    """A load on some backends, in phases.

    Attributes:
        targets: The backends, and what they acknowledged.
        results: The outcome of the operations.
        workers: The threads of the load.
    """

    def __init__(self, targets: Sequence[LoadTarget], plan: Plan) -> None:
        """Take open backends; nothing runs yet."""
        self.targets, self.plan, self.results = targets, plan, Results()
        self.workers = [
            Worker(f"{plan.seed}.{index}", targets, self.results) for index in range(plan.threads)
        ]
        self._reaper = Worker(f"{plan.seed}.reaper", targets, self.results, REAPER_MIX, pause=0.5)
        self._started = self._reported = time.monotonic()

    def run(self, faults: Callable[[Watch], None]) -> Outcome:
        """Run all phases, call ``faults`` again and again in the middle one, then check.

        The backends stay open.
        """
        plan = self.plan
        outcome = Outcome(plan.seed, plan.seconds)
        try:
            with self.load():
                self.speed(plan.quiet)  # warm-up
                outcome.speed_before = self.speed(plan.quiet)
                end = time.monotonic() + plan.seconds - 3 * plan.quiet
                while time.monotonic() < end:
                    faults(self.watch)
                self.wait_until_ready()
                outcome.speed_after = self.speed(plan.quiet)
            outcome.failures += self.settle()
            outcome.keys_tried = self.try_keys(outcome.failures)
        except Stuck as stuck:
            outcome.failures.append(str(stuck))
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if outcome.speed < plan.least_speed:
            outcome.failures.append(f"only {outcome.speed:.0%} of the speed before the faults")
        outcome.failures[:0] = self.results.wrong
        self._fill_in(outcome)
        return outcome

    @contextmanager
    def load(self) -> Iterator[None]:
        """Run the threads for the length of a ``with`` block.

        Raises:
            Stuck: A thread does not end.
        """
        threads = [*self.workers, self._reaper]
        for worker in threads:
            worker.start()
        try:
            yield
        finally:
            for worker in threads:
                worker.stop()
        for worker in threads:
            worker.join(self.plan.patience)
            if worker.is_alive():
                raise Stuck(f"thread {worker.name} does not end")

    def watch(self, seconds: float) -> None:
        """Wait, watch the threads, and report.

        Raises:
            Stuck: A thread has made no progress for too long, or many answers are wrong.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, TICK))
            if len(self.results.wrong) > MOST_WRONG:
                raise Stuck(f"more than {MOST_WRONG} wrong answers")
            now = time.monotonic()
            for worker in self.workers:
                if (stalled := now - worker.last_progress) > self.plan.patience:
                    raise Stuck(f"thread {worker.name} has made no progress for {stalled:.0f} s")
            if now - self._reported > REPORT_EVERY:
                self._reported = now
                self._report()

    def speed(self, seconds: float) -> float:
        """Right answers per second: the median of some windows, against other load."""
        return statistics.median(self._window(seconds / WINDOWS) for _ in range(WINDOWS))

    def _window(self, seconds: float) -> float:
        """Answers per second in a window; it lasts longer where there are few."""
        done, started = self.results.done, time.monotonic()
        self.watch(seconds)
        while self.results.done - done < LEAST_ANSWERS:
            if time.monotonic() - started > self.plan.patience:
                raise Stuck(f"{self.results.done - done} right answers in {self.plan.patience} s")
            self.watch(TICK)
        return (self.results.done - done) / (time.monotonic() - started)

    def wait_until_ready(self) -> None:
        """Wait until every backend answers again.

        Raises:
            Stuck: One does not answer in time.
        """
        deadline = time.monotonic() + self.plan.patience
        waiting = list(self.targets)
        while waiting:
            waiting = [target for target in waiting if not _answers(target)]
            if time.monotonic() > deadline:
                raise Stuck(f"{waiting[0].backend.health()} after the last fault")
            self.watch(TICK)

    def settle(self) -> list[str]:
        """Destroy what is unconfirmed and reap; returns what is wrong.

        Afterwards every object in the backends is one that was acknowledged.
        """
        wrong = []
        for target in self.targets:
            for held in target.unconfirmed:
                target.backend.destroy_key(held.key)
            target.unconfirmed.clear()
            now = datetime.now(UTC)
            target.issued = [
                issued for issued in target.issued if issued.parameters.expires_at >= now
            ]
            target.reap(now + GRACE)
            pending = target.backend.health().facts.get("pending_objects", 0)
            if pending:
                wrong.append(f"{target.backend.name}: {pending} pending objects after reaping")
        return wrong

    def try_keys(self, failures: list[str]) -> int:
        """Decrypt, with a sample of all acknowledged keys, what was encrypted earlier."""
        rng = random.Random(self.plan.seed)  # repeatable, not secret
        tried = 0
        for target in self.targets:
            usable = [held for held in target.keys if held.message]
            for held in rng.sample(usable, min(SAMPLE, len(usable))):
                failures += _lost(target, held)
                tried += 1
        return tried

    def destroy_all(self) -> None:
        """Destroy every object that was acknowledged."""
        later = datetime.now(UTC) + timedelta(days=2)
        for target in self.targets:
            for held in target.keys:
                target.backend.destroy_key(held.key)
            target.keys.clear()
            target.issued.clear()
            target.reap(later)

    def _fill_in(self, outcome: Outcome) -> None:
        facts = self._facts()
        outcome.operations = self.results.done
        outcome.imports = sum(
            self.results.right[name] for name in ("import_new_material", "import_same_material")
        )
        outcome.refused = dict(self.results.refused)
        outcome.recoveries = dict(sum((Counter(f.get("recoveries")) for f in facts), Counter()))
        outcome.generation = max((f.get("generation", 0) for f in facts), default=0)

    def _facts(self) -> list[Mapping[str, Any]]:
        return [target.backend.health().facts for target in self.targets]

    def _report(self) -> None:
        elapsed = time.monotonic() - self._started
        recoveries = sum(sum(f.get("recoveries", {}).values()) for f in self._facts())
        say(
            f"{elapsed:4.0f} s: {self.results.done} right, {len(self.results.wrong)} wrong, "
            f"refused {dict(self.results.refused)}, recoveries {recoveries}, "
            f"keys {[len(target.keys) for target in self.targets]}"
        )


def say(line: str) -> None:
    """Report progress."""
    sys.stderr.write(f"soak: {line}\n")
    sys.stderr.flush()


def _answers(target: LoadTarget) -> bool:
    try:
        target.backend.mac(b"ready?")
    except ServiceUnavailable:
        return False
    return True


def _lost(target: LoadTarget, held: HeldKey) -> list[str]:
    try:
        require_message(target, held)
    except Exception as error:  # any error: the key is lost
        return [f"{target.backend.name}: an acknowledged key is lost: {error!r}"]
    return []
