"""The load of a soak: what its threads do to a backend, and which answers are right."""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from hsmwrap import tokens
from hsmwrap.backend import Backend, Custody, KeyRef, ReapsWrappingKeys, WrappingCapability
from hsmwrap.catalog import KeySpec, ProtectionLevel
from hsmwrap.checkvalue import check_value
from hsmwrap.customer import encrypt_key_material
from hsmwrap.errors import (
    BackendClosed,
    ExpiredImportToken,
    HsmError,
    HsmwrapError,
    InvalidImportToken,
    InvalidKeyMaterial,
    ServiceUnavailable,
)
from hsmwrap.guard import guarded, plugin_ref
from hsmwrap.imports import Cmk, ImportParameters, ImportService
from hsmwrap.pkcs11.wrapping.custody import parse_ref
from hsmwrap.pkcs11.wrapping.reaper import GRACE
from hsmwrap.policy import Deployment
from hsmwrap.testing.clients import ClientFailed, decrypt_message, encrypt_message

TOKEN_LIFETIME = timedelta(seconds=6)
"""Short, so that resident wrapping keys expire under load and the reaper has work."""
KEYS_KEPT = 48
"""More keys that are objects of the backend are destroyed: they slow searches down."""
PATIENCE = 0.01
"""Seconds that a thread waits after an error, as a client would."""
MESSAGE, CONTEXT = b"encrypted during the soak", b"additional data"


class WrongAnswer(Exception):
    """The backend gave a wrong answer."""


class NothingToDo(Exception):
    """No import token or no key is available at the moment."""


@dataclass(frozen=True, slots=True)
class Issued:
    """Parameters for import that were handed out."""

    cmk: Cmk
    parameters: ImportParameters
    capability: WrappingCapability

    @property
    def resident(self) -> bool:
        """Whether the private wrapping key is an object of the backend."""
        return self.capability.custody is Custody.HSM_INTERNAL

    def expired(self, now: datetime) -> bool:
        """Whether the import token, and a resident key with it, may be gone."""
        return self.parameters.expires_at <= now


@dataclass(frozen=True, slots=True)
class HeldKey:
    """A key whose import was acknowledged; only one thread at a time works with it."""

    key: KeyRef
    material: bytes = field(repr=False)
    message: bytes = field(repr=False)


class LoadTarget:
    """One backend under load, and everything that it has acknowledged.

    Attributes:
        issued: Parameters for import that may still be in use, or resident.
        keys: Keys whose import was acknowledged.
        unconfirmed: Keys whose destruction was not acknowledged: they may still be there.
    """

    def __init__(self, backend: Backend, level: ProtectionLevel = ProtectionLevel.HSM) -> None:
        """Take an open backend that serves ``level``."""
        self.backend = guarded(backend)
        self.level = level
        self.service = ImportService(
            {level: self.backend}, Deployment(), token_lifetime=TOKEN_LIFETIME
        )
        self.capabilities = backend.capabilities()
        self.issued: list[Issued] = []
        self.keys: list[HeldKey] = []
        self.unconfirmed: list[HeldKey] = []
        self._lock = threading.Lock()

    def reap(self, now: datetime) -> None:
        """Have wrapping keys removed that expired before ``now``."""
        reaper = ReapsWrappingKeys.of(self.backend)
        assert reaper is not None
        reaper.reap(now)

    def take(self, rng: random.Random) -> HeldKey:
        """Remove a random key from the list; :meth:`keep` puts it back."""
        with self._lock:
            if not self.keys:
                raise NothingToDo
            index = rng.randrange(len(self.keys))
            self.keys[index], self.keys[-1] = self.keys[-1], self.keys[index]
            return self.keys.pop()

    def keep(self, held: HeldKey) -> None:
        """Add a key to the list."""
        with self._lock:
            self.keys.append(held)

    def mark_unconfirmed(self, held: HeldKey) -> None:
        """Remember a key that may still be in the backend."""
        with self._lock:
            self.unconfirmed.append(held)

    def next_to_destroy(self, rng: random.Random) -> HeldKey:
        """Remove a key from the list to destroy it; unconfirmed ones first, or they add up."""
        with self._lock:
            if self.unconfirmed:
                return self.unconfirmed.pop()
        if len(self.keys) < KEYS_KEPT or not self.keeps_objects:
            raise NothingToDo
        return self.take(rng)

    @property
    def keeps_objects(self) -> bool:
        """Whether imported keys are objects of the backend."""
        return any(key.custody is Custody.HSM_INTERNAL for key in self.capabilities.keys)

    def token(self, rng: random.Random) -> Issued:
        """A random import token that is valid for another second at least."""
        soon = _now() + timedelta(seconds=1)
        with self._lock:
            valid = [issued for issued in self.issued if not issued.expired(soon)]
        if not valid:
            raise NothingToDo
        return rng.choice(valid)

    def add_token(self, issued: Issued) -> None:
        """Remember parameters for import until the reaper must have removed their resident key."""
        long_ago = _now() - 2 * TOKEN_LIFETIME
        with self._lock:
            self.issued = [each for each in self.issued if not each.expired(long_ago)]
            self.issued.append(issued)

    def object_ids(self) -> set[bytes]:
        """Ids of the objects in the HSM token that were acknowledged."""
        issued = (
            tokens.decode(each.parameters.import_token, self.backend.verify_mac).private_key
            for each in self.issued
            if each.resident
        )
        held = (held.key for held in self.keys if held.key.custody is Custody.HSM_INTERNAL)
        return {parse_ref(plugin_ref(key))[2] for key in issued} | {key.data for key in held}

    def usable(self, key: KeyRef) -> bool:
        """Whether the backend can encrypt with such keys."""
        capability = self.capabilities.key_for(key.key_spec)
        return capability is not None and capability.usable


# --- operations: each returns only if the answer was right ---------------------------------------


def issue(target: LoadTarget, rng: random.Random) -> None:
    """Parameters for import under any algorithm that the backend serves."""
    capability = rng.choice(target.capabilities.wrapping)
    spec = rng.choice((KeySpec.ALIYUN_AES_256,) * 4 + (KeySpec.ALIYUN_SM4,))
    cmk = Cmk(f"cmk-{rng.getrandbits(64):016x}", spec, target.level)
    given = target.service.get_parameters_for_import(cmk, capability.spec, capability.algorithm)
    target.add_token(Issued(cmk, given, capability))


def import_new_material(target: LoadTarget, rng: random.Random) -> None:
    """A first import gives the right key, with the exposure that was promised."""
    issued = target.token(rng)
    target.keep(_imported(target, issued, _material(issued, rng)))


def import_same_material(target: LoadTarget, rng: random.Random) -> None:
    """Another import of the same material is accepted."""
    issued = target.token(rng)
    material = _material(issued, rng)
    known = replace(issued.cmk, check_value=check_value(material))
    target.keep(_imported(target, replace(issued, cmk=known), material))


def import_other_material(target: LoadTarget, rng: random.Random) -> None:
    """Other material than before must be refused by InvalidKeyMaterial."""
    issued = target.token(rng)
    known = replace(issued.cmk, check_value=check_value(_material(issued, rng)))
    try:
        _imported(target, replace(issued, cmk=known), _material(issued, rng))
    except InvalidKeyMaterial:
        return
    raise WrongAnswer("other material was imported into the same key")


def import_by_changed_token(target: LoadTarget, rng: random.Random) -> None:
    """An import token with one changed bit must be refused."""
    issued = target.token(rng)
    changed = bytearray(issued.parameters.import_token)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    forged = replace(issued.parameters, import_token=bytes(changed))
    try:
        _imported(target, replace(issued, parameters=forged), _material(issued, rng))
    except InvalidImportToken:
        return
    raise WrongAnswer("a changed import token was accepted")


def encrypt(target: LoadTarget, rng: random.Random) -> None:
    """What the backend encrypts decrypts under the known material."""
    held = _usable(target, rng)
    try:
        message = target.backend.encrypt(held.key, MESSAGE, CONTEXT)
        if decrypt_message(held.key.key_spec, held.material, message, CONTEXT) != MESSAGE:
            raise WrongAnswer("encrypted another message")
        held = replace(held, message=message)
    except ClientFailed as failure:
        raise WrongAnswer(f"encrypted under another key: {failure}") from None
    finally:
        target.keep(held)


def decrypt(target: LoadTarget, rng: random.Random) -> None:
    """A message that was encrypted earlier decrypts."""
    held = _usable(target, rng)
    try:
        require_message(target, held)
    finally:
        target.keep(held)


def destroy(target: LoadTarget, rng: random.Random) -> None:
    """Destroy a key, so that the number of objects stays even."""
    held = target.next_to_destroy(rng)
    try:
        target.backend.destroy_key(held.key)
    except HsmwrapError:
        target.mark_unconfirmed(held)
        raise


def reap(target: LoadTarget, _rng: random.Random) -> None:
    """Remove resident wrapping keys that have expired."""
    target.reap(_now() + GRACE)


def require_message(target: LoadTarget, held: HeldKey) -> None:
    """Decrypt the message that belongs to a key.

    Raises:
        WrongAnswer: It decrypts to something else.
    """
    if target.backend.decrypt(held.key, held.message, CONTEXT) != MESSAGE:
        raise WrongAnswer("a message decrypted to another one")


Operation = Callable[[LoadTarget, random.Random], None]
MIX: Mapping[Operation, int] = MappingProxyType(
    {
        issue: 2,
        import_new_material: 9,
        import_same_material: 2,
        import_other_material: 1,
        import_by_changed_token: 1,
        encrypt: 4,
        decrypt: 4,
        destroy: 14,
    }
)
"""Operations per round of a thread, which runs them in random order: so the speed is even.
Above :data:`KEYS_KEPT`, more keys are destroyed than imported: SoftHSM gets slower with each
object, and the speeds before and after the faults have to be comparable (field note 53)."""
REAPER_MIX: Mapping[Operation, int] = MappingProxyType({reap: 1})


def _imported(target: LoadTarget, issued: Issued, material: bytes) -> HeldKey:
    parameters = issued.parameters
    try:
        result = target.service.import_key_material(
            issued.cmk,
            _encrypted(parameters, material),
            parameters.import_token,
        )
    except (InvalidImportToken, ExpiredImportToken, InvalidKeyMaterial, HsmError):
        if issued.expired(_now()):
            raise NothingToDo from None  # the reaper removed it first
        raise
    imported, spec = result.imported, issued.cmk.key_spec
    if imported.check_value != check_value(material):
        raise WrongAnswer("the check value is another key's")
    if imported.exposure is not issued.capability.exposure:
        raise WrongAnswer(f"exposure {imported.exposure} is not as promised")
    message = b""
    if target.usable(imported.key):
        message = encrypt_message(spec, material, MESSAGE, CONTEXT)
    return HeldKey(imported.key, material, message)


def _usable(target: LoadTarget, rng: random.Random) -> HeldKey:
    held = target.take(rng)
    if not held.message:
        target.keep(held)
        raise NothingToDo
    return held


def _material(issued: Issued, rng: random.Random) -> bytes:
    return rng.randbytes(issued.cmk.key_spec.material_length)


def _encrypted(parameters: ImportParameters, material: bytes) -> bytes:
    return encrypt_key_material(parameters.algorithm, parameters.public_key, material)


def _now() -> datetime:
    return datetime.now(UTC)


# --- threads --------------------------------------------------------------------------------------


class Results:
    """The outcome of all operations of all threads."""

    def __init__(self) -> None:
        self.right: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()

    @property
    def done(self) -> int:
        """Operations with a right answer."""
        with self._lock:
            return sum(self.right.values())

    def count_right(self, operation: str) -> None:
        """Count a right answer."""
        with self._lock:
            self.right[operation] += 1

    def count_error(self, operation: str, error: Exception) -> None:
        """Count an error as refused if it is allowed while the HSM fails, else as wrong."""
        with self._lock:
            if is_allowed(error):
                self.refused[type(error).__name__] += 1
            else:
                trace = "".join(traceback.format_exception(error, limit=-6))
                self.wrong.append(f"{operation}: {type(error).__name__}: {error}\n{trace}")


def is_allowed(error: Exception) -> bool:
    """Whether a valid call may raise this: 'try later', or an HSM's return code."""
    later = isinstance(error, ServiceUnavailable) and not isinstance(error, BackendClosed)
    return later or isinstance(error, HsmError)


class Worker(threading.Thread):
    """One thread of the load.

    Attributes:
        succeeded, failed: Number of its operations so far.
        last_progress: When the last one ended (``time.monotonic()``).
    """

    def __init__(
        self,
        name: str,
        targets: Sequence[LoadTarget],
        results: Results,
        mix: Mapping[Operation, int] = MIX,
        *,
        pause: float = 0.0,
    ) -> None:
        """``name`` seeds the random numbers; ``pause`` is in seconds, between two operations."""
        super().__init__(name=name, daemon=True)  # a deadlock must not keep the process
        self.succeeded = self.failed = 0
        self.last_progress = time.monotonic()
        self._targets, self._results = targets, results
        self._mix, self._pause = [op for op, count in mix.items() for _ in range(count)], pause
        self._rng = random.Random(name)  # repeatable, not secret
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End after the current operation."""
        self._stopped.set()

    def run(self) -> None:
        """Run the mix again and again, each time in another order."""
        while True:
            self._rng.shuffle(self._mix)
            for operation in self._mix:
                if self._stopped.wait(self._pause) if self._pause else self._stopped.is_set():
                    return
                self._do(operation)
                self.last_progress = time.monotonic()

    def _do(self, operation: Operation) -> None:
        try:
            operation(self._rng.choice(self._targets), self._rng)
        except NothingToDo:
            return
        except Exception as error:  # each is judged
            self.failed += 1
            self._results.count_error(operation.__name__, error)
            self._stopped.wait(PATIENCE)
        else:
            self.succeeded += 1
            self._results.count_right(operation.__name__)
