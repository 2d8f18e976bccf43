"""A soak of key sets: imported keys move to a new one under load, and the old one is retired.

``scripts/soak moves --keys N`` imports N keys (AES and SM4, levels HSM and SOFTWARE, sealed and
resident) on a private SoftHSM token and a keyring file. Two processes then use them and import more
while ``hsmwrap keys`` rotates, re-seals and retires. What has to hold:

* no call fails, and no key is imported again;
* every key opens at the end, and is the same;
* no key needs the old key sets, which ``retire`` destroys without ``--force``.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from sqlalchemy import update
from support import rsa_pairs
from support.kms.fakes import Client, import_request

from hsmwrap.kms import Kms, StaticAccessKeys, load_config, open_kms
from hsmwrap.kms.database import Database
from hsmwrap.kms.schema import KeySetSeen
from hsmwrap.pkcs11.keysets import keys as key_sets
from soak.runner import say

T = TypeVar("T")
Key = dict[str, str]
"""Id of a key, and a ciphertext under it; empty if it cannot be used."""

AES, SM4 = "Aliyun_AES_256", "Aliyun_SM4"
LENGTH = {AES: 32, SM4: 16}
KINDS = [("HSM", AES)] * 5 + [("HSM", SM4)] * 2 + [("SOFTWARE", AES)] * 2 + [("SOFTWARE", SM4)]
RESIDENT = 10
"""One in so many keys of level HSM is resident, up to :data:`MOST_RESIDENT`."""
MOST_RESIDENT = 200
"""SoftHSM reads all objects at each search, so more of them would be all that is measured."""
PROCESSES, THREADS = 2, 3
PLAINTEXT = base64.b64encode(b"attack at dawn").decode()


# --- a process of the KMS -------------------------------------------------------------------------


class Worker:
    """One process of the KMS: it imports keys, and uses those of all processes."""

    def __init__(self, kms: Kms, pause: float) -> None:
        self.kms = kms
        self.pause = pause
        self.calls: Counter[str] = Counter()
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._made: list[Key] = []

    def call(self, action: str, **parameters: str) -> dict[str, Any] | None:
        """One call, counted; None if it failed, which is remembered."""
        self.calls[action] += 1
        try:
            answer: dict[str, Any] = Client(self.kms)(action, **parameters)
        except Exception as error:  # whatever it is, a call failed
            self.errors.append(f"{action}: {type(error).__name__}: {error}")
            return None
        return answer

    def import_one(self, number: int) -> Key | None:
        """Import a key of the kind that its number says; its facts, or None if a call failed."""
        level, spec = KINDS[number % len(KINDS)]
        named = {"Origin": "EXTERNAL", "ProtectionLevel": level, "KeySpec": spec}
        created = self.call("CreateKey", **named)
        parameters = created and self.call(
            "GetParametersForImport",
            KeyId=created["KeyMetadata"]["KeyId"],
            WrappingKeySpec="RSA_2048",
            WrappingAlgorithm="RSAES_OAEP_SHA_256",
        )
        if not parameters:
            return None
        request = import_request(parameters, secrets.token_bytes(LENGTH[spec]))
        if self.call("ImportKeyMaterial", **request) is None:
            return None
        key_id, usable = parameters["KeyId"], (level, spec) != ("HSM", SM4)
        # SoftHSM keeps SM4 keys and cannot use them: that they open shows when they move.
        blob = usable and self.call("Encrypt", KeyId=key_id, Plaintext=PLAINTEXT)
        return {"key_id": key_id, "blob": blob["CiphertextBlob"] if blob else ""}

    def use_one(self, key: Key) -> None:
        if not key["blob"]:
            answer = self.call("DescribeKey", KeyId=key["key_id"])
            right = answer and answer["KeyMetadata"]["KeyState"] == "Enabled"
        else:
            answer = self.call("Decrypt", CiphertextBlob=key["blob"])
            right = answer and answer["Plaintext"] == PLAINTEXT
        if answer and not right:
            self.errors.append(f"wrong answer for key {key['key_id']}")

    def provide(self, first: int, last: int, seconds: float) -> tuple[list[Key], list[str]]:
        """Import keys until ``seconds`` are over; the keys, and the errors if there were any."""
        until = time.monotonic() + seconds
        made: list[Key] = []

        def import_one(number: int) -> Key | None:
            return self.import_one(number) if time.monotonic() < until else None

        with ThreadPoolExecutor(THREADS) as threads:
            for key in threads.map(import_one, range(first, last)):
                made += [key] if key else []
                if key and not len(made) % 500:
                    say(f"{len(made)} of {last - first} imported by process {os.getpid()}")
        return made, self.errors

    def load(self, keys: list[Key], seed: int) -> None:
        """Begin to use the keys, and to import more, until :meth:`stop`."""

        def use(each: int) -> None:
            chosen = random.Random(seed + each)  # repeatable, not secret
            while not self._stop.is_set():
                self.use_one(chosen.choice(keys))
                self._stop.wait(self.pause)

        def bring_in() -> None:
            number = 0
            while not self._stop.is_set():
                if key := self.import_one(number):
                    self._made.append(key)
                    self.use_one(key)
                number += 1
                self._stop.wait(10 * self.pause)

        calls: list[Callable[[], None]] = [partial(use, each) for each in range(THREADS - 1)]
        calls.append(bring_in)
        self._threads = [threading.Thread(target=call) for call in calls]
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[Key]:
        """End the load; returns the keys that it imported."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return self._made

    def check(self, keys: list[Key]) -> None:
        """Each key is there and the same."""
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(self.use_one, keys))

    def report(self) -> dict[str, Any]:
        return {"calls": dict(self.calls), "failed": len(self.errors), "errors": self.errors[:5]}


def serve(config: str, lifetime: float | None, pause: float) -> None:
    """One request a line: a method of :class:`Worker` and its arguments; one answer a line."""
    rsa_pairs.use(preload=False)
    if lifetime is not None:
        key_sets.CURRENT_SET_LIFETIME = lifetime
    with open_kms(load_config(Path(config)), access_keys=StaticAccessKeys(())) as kms:
        worker = Worker(kms, pause)
        for line in sys.stdin:
            do, arguments = json.loads(line)
            print(json.dumps(getattr(worker, do)(*arguments)), flush=True)


class Process:
    """The parent's end of a worker."""

    def __init__(self, config: Path, options: argparse.Namespace) -> None:
        arguments = json.dumps([str(config), options.lifetime, options.pause])
        command = [sys.executable, "-m", "soak.moves", arguments]
        self._process = subprocess.Popen(
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin
        assert self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout

    def ask(self, do: str, *arguments: Any) -> Self:
        """Send a request; :meth:`answer` waits for what comes of it."""
        self._in.write(json.dumps([do, arguments]) + "\n")
        self._in.flush()
        return self

    def answer(self) -> Any:
        return json.loads(self._out.readline())

    def end(self) -> None:
        self._in.close()
        self._process.wait(60)
        self._out.close()


# --- the soak -------------------------------------------------------------------------------------


class Moves:
    """One run, in a directory of its own, on the token that the environment names."""

    def __init__(self, directory: str, options: argparse.Namespace) -> None:
        self.directory, self.options = Path(directory), options
        self.config = self._config("server", "HsmEncryptedDatabase")
        self.measured: dict[str, float] = {}
        self._hsmwrap("init", "--level", "SOFTWARE")
        self._hsmwrap("init", "--level", "HSM")

    def _config(self, name: str, custody: str) -> Path:
        settings = {
            "module": os.environ["HSMWRAP_PKCS11_MODULE"],
            "token_label": os.environ["HSMWRAP_TOKEN_LABEL"],
            "pin_file": os.environ["HSMWRAP_PIN_FILE"],
            "key_prefix": "moves",
            "material_custody": custody,
        }
        file = self.directory / f"{name}.toml"
        file.write_text(
            f'database_url = "sqlite:///{self.directory}/kms.db"\n'
            f'audit_file = "{self.directory}/audit.log"\nsweep_interval = 1\n'
            '[backends.SOFTWARE]\nplugin = "software"\n'
            f'settings.keyring_file = "{self.directory}/keyring"\n'
            '[backends.HSM]\nplugin = "pkcs11"\n[backends.HSM.settings]\n'
            + "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        )
        return file

    def _hsmwrap(self, action: str, *arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "hsmwrap.cli", "keys", action, *arguments]
        done = subprocess.run(
            [*command, "--config", str(self.config), "--json"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        printed: dict[str, Any] = json.loads(done.stdout)
        return printed

    def _timed(self, what: str, call: Callable[..., T], *arguments: str) -> T:
        began = time.monotonic()
        answer = call(*arguments)
        self.measured[what] = round(time.monotonic() - began, 1)
        say(f"{what}: {self.measured[what]} s")
        return answer

    def run(self) -> dict[str, Any]:
        """The summary; ``failures`` is what did not hold."""
        keys = self._timed("imported", self._provide)
        workers = [Process(self.config, self.options) for _ in range(PROCESSES)]
        for number, worker in enumerate(workers):
            worker.ask("load", keys, 1000 * number).answer()
        old = {level: self._timed(f"moved {level}", self._move, level) for level in LEVELS}
        for worker in workers:
            keys += worker.ask("stop").answer()
        for number, worker in enumerate(workers):
            worker.ask("check", keys[number::PROCESSES])
        self._timed("checked", lambda: [worker.answer() for worker in workers])
        reports = [worker.ask("report").answer() for worker in workers]
        for worker in workers:
            worker.end()
        failures = [error for report in reports for error in report["errors"]]
        failures += self._still_needed(old, len(keys))
        calls = sum((Counter(report["calls"]) for report in reports), Counter())
        failed = sum(report["failed"] for report in reports)
        return {
            "keys": len(keys),
            "calls": dict(calls),
            "failed calls": failed,
            "seconds": self.measured,
            "failures": failures,
        }

    def _provide(self) -> list[Key]:
        """Import the keys by two processes; the resident ones come from a server of their own."""
        self.resident = min(self.options.keys // RESIDENT, MOST_RESIDENT)
        made: list[Key] = []
        kept = Process(self._config("resident", "HsmInternal"), self.options)
        asked = [kept.ask("provide", 0, self.resident, 10_000)]
        workers = [Process(self.config, self.options) for _ in range(PROCESSES)]
        share = -(-(self.options.keys - self.resident) // PROCESSES)
        for number, worker in enumerate(workers):
            first = self.resident + number * share
            last = min(first + share, self.options.keys)
            asked.append(worker.ask("provide", first, last, self.options.import_seconds))
        for each in asked:
            keys, errors = each.answer()
            made += keys
            each.end()
            if errors:
                raise SystemExit(f"soak: imports before the load failed: {errors[:5]}")
        return made

    def _move(self, level: str) -> str:
        """Rotate, re-seal until nothing needs the old set, retire it; returns its id."""
        at = ("--level", level)
        (old,) = (str(each["key_set"]) for each in self._hsmwrap("list", *at)["key_sets"])
        self._hsmwrap("rotate", *at)
        # For so long a process may seal under the set that it knows.
        settled = (
            time.monotonic() + (60 if self.options.lifetime is None else self.options.lifetime) + 2
        )
        while True:
            moved = self._timed(f"re-sealed {level}", self._hsmwrap, "reseal", *at, *FAST)
            say(f"{level}: {moved}")
            if moved["failed"]:
                raise SystemExit(f"soak: {moved['failed']} keys did not move")
            if time.monotonic() >= settled and not moved["moved"]:
                break
            time.sleep(min(5.0, max(0.1, settled - time.monotonic())))
        self._let_tokens_expire()
        self._hsmwrap("retire", old, *at)
        return old

    def _let_tokens_expire(self) -> None:
        """The database thinks that the rotation was two days ago: clients import at once here."""
        database = Database(f"sqlite:///{self.directory}/kms.db")
        superseded = KeySetSeen.superseded_at.is_not(None)
        ago = datetime.now(UTC) - timedelta(days=2)
        with database.write() as transaction:
            transaction.execute(update(KeySetSeen).where(superseded).values(superseded_at=ago))
        database.close()

    def _still_needed(self, old: dict[str, str], count: int) -> list[str]:
        failures: list[str] = []
        sealed = 0
        for level, key_set in old.items():
            sets = self._hsmwrap("list", "--level", level)["key_sets"]
            if len(sets) != 1 or sets[0]["key_set"] == key_set:
                failures.append(f"level {level}: not one new key set is left: {sets}")
            sealed += sum(each["keys"] for each in sets)
        resident = sum(KINDS[n % len(KINDS)][0] == "HSM" for n in range(self.resident))
        if sealed != count - resident:
            failures.append(f"{sealed} sealed keys of {count - resident}")
        return failures


LEVELS = ("HSM", "SOFTWARE")
FAST = ("--rate", "1000000")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak moves", description=__doc__)
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument(
        "--lifetime",
        type=float,
        help="seconds in which processes use the key set that they know; default: as it is (60)",
    )
    parser.add_argument(
        "--import-seconds",
        type=float,
        default=86_400.0,
        help="go on with those keys that are there after so long",
    )
    parser.add_argument(
        "--pause", type=float, default=0.0, help="seconds between the calls of a thread"
    )
    options = parser.parse_args(arguments)
    rsa_pairs.use(preload=True)
    with tempfile.TemporaryDirectory(prefix="hsmwrap-moves-") as directory:
        done = Moves(directory, options).run()
    print(json.dumps(done, indent=2))
    return 1 if done["failures"] or done["failed calls"] else 0


if __name__ == "__main__":
    serve(*json.loads(sys.argv[1]))
