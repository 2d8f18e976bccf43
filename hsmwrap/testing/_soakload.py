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

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hsmwrap import tokens
from hsmwrap.backend import Backend, Custody, KeyRef, WrappingCapability
from hsmwrap.catalog import KeySpec, ProtectionLevel, WrappingAlgorithm
from hsmwrap.checkvalue import check_value
from hsmwrap.errors import (
    BackendClosed,
    ExpiredImportToken,
    HsmError,
    HsmwrapError,
    InvalidImportToken,
    InvalidKeyMaterial,
    ServiceUnavailable,
)
from hsmwrap.imports import Cmk, ImportParameters, ImportService
from hsmwrap.pkcs11.wrapping.custody import parse_ref
from hsmwrap.pkcs11.wrapping.reaper import GRACE
from hsmwrap.policy import Deployment
from hsmwrap.sm2 import decode_spki, open_engine
from hsmwrap.testing.clients import ClientFailed, decrypt_message, encrypt_message

TOKEN_LIFETIME = timedelta(seconds=6)
"""Short, so that resident wrapping keys expire under load and the reaper has work."""
KEYS_KEPT = 48
"""Keys that are objects of the backend are destroyed beyond this number: searches get slower."""
PATIENCE = 0.01
"""Seconds that a thread waits after an error, as a client would."""
MESSAGE, CONTEXT = b"encrypted during the soak", b"additional data"


class WrongAnswer(Exception):
    """The backend answered, and not what is right."""


class NothingToDo(Exception):
    """There is no import token or no key to work with at the moment."""


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
class Held:
    """A key whose import was acknowledged; nobody else has it while a thread works with it."""

    key: KeyRef
    material: bytes = field(repr=False)
    message: bytes = field(repr=False)


class Arena:
    """One backend under load, and everything that it has acknowledged.

    Attributes:
        issued: Parameters for import that may still be in use, or resident.
        held: Keys that are there.
        doubtful: Keys whose destruction was not acknowledged: there or not.
    """

    def __init__(self, backend: Backend, level: ProtectionLevel = ProtectionLevel.HSM) -> None:
        """Take an open backend that serves ``level``."""
        self.backend = backend
        self.level = level
        self.service = ImportService({level: backend}, Deployment(), token_lifetime=TOKEN_LIFETIME)
        self.capabilities = backend.capabilities()
        self.issued: list[Issued] = []
        self.held: list[Held] = []
        self.doubtful: list[Held] = []
        self._lock = threading.Lock()

    def take(self, dice: random.Random) -> Held:
        """Take any key out; give it back by :meth:`keep`."""
        with self._lock:
            if not self.held:
                raise NothingToDo
            index = dice.randrange(len(self.held))
            self.held[index], self.held[-1] = self.held[-1], self.held[index]
            return self.held.pop()

    def keep(self, held: Held) -> None:
        """Put a key in."""
        with self._lock:
            self.held.append(held)

    def doubt(self, held: Held) -> None:
        """Put a key aside of which nobody knows whether it is still there."""
        with self._lock:
            self.doubtful.append(held)

    def surplus(self, dice: random.Random) -> Held:
        """Take out a key to destroy: a doubtful one first, so that those do not add up."""
        with self._lock:
            if self.doubtful:
                return self.doubtful.pop()
        if len(self.held) < KEYS_KEPT or not self.keeps_objects:
            raise NothingToDo
        return self.take(dice)

    @property
    def keeps_objects(self) -> bool:
        """Whether imported keys are objects of the backend."""
        return any(key.custody is Custody.HSM_INTERNAL for key in self.capabilities.keys)

    def token(self, dice: random.Random) -> Issued:
        """Any import token that will not expire at once."""
        soon = _now() + timedelta(seconds=1)
        with self._lock:
            valid = [issued for issued in self.issued if not issued.expired(soon)]
        if not valid:
            raise NothingToDo
        return dice.choice(valid)

    def add_token(self, issued: Issued) -> None:
        """Remember parameters for import until their resident key must be gone."""
        long_ago = _now() - 2 * TOKEN_LIFETIME
        with self._lock:
            self.issued = [each for each in self.issued if not each.expired(long_ago)]
            self.issued.append(issued)

    def object_ids(self) -> set[bytes]:
        """Ids of the HSM token's objects that somebody was promised."""
        issued = (
            tokens.decode(each.parameters.import_token, self.backend.check_seal).private_key
            for each in self.issued
            if each.resident
        )
        held = (held.key for held in self.held if held.key.custody is Custody.HSM_INTERNAL)
        return {parse_ref(key)[2] for key in issued} | {key.data for key in held}

    def usable(self, key: KeyRef) -> bool:
        """Whether the backend can encrypt with such keys."""
        capability = self.capabilities.key_for(key.key_spec)
        return capability is not None and capability.usable


# --- operations: each returns if the answer was right ---------------------------------------------


def issue(arena: Arena, dice: random.Random) -> None:
    """Parameters for import under any algorithm that the backend serves."""
    capability = dice.choice(arena.capabilities.wrapping)
    spec = dice.choice((KeySpec.ALIYUN_AES_256,) * 4 + (KeySpec.ALIYUN_SM4,))
    cmk = Cmk(f"cmk-{dice.getrandbits(64):016x}", spec, arena.level)
    given = arena.service.get_parameters_for_import(cmk, capability.spec, capability.algorithm)
    arena.add_token(Issued(cmk, given, capability))


def bring_in(arena: Arena, dice: random.Random) -> None:
    """A first import: the right key, through the promised path."""
    issued = arena.token(dice)
    arena.keep(_imported(arena, issued, _material(issued, dice)))


def bring_in_again(arena: Arena, dice: random.Random) -> None:
    """Another import of the same material: same check value."""
    issued = arena.token(dice)
    material = _material(issued, dice)
    known = replace(issued.cmk, check_value=check_value(material))
    arena.keep(_imported(arena, replace(issued, cmk=known), material))


def bring_in_other(arena: Arena, dice: random.Random) -> None:
    """Other material than before must be refused, and nothing else must be said of it."""
    issued = arena.token(dice)
    known = replace(issued.cmk, check_value=check_value(_material(issued, dice)))
    try:
        _imported(arena, replace(issued, cmk=known), _material(issued, dice))
    except InvalidKeyMaterial:
        return
    raise WrongAnswer("other material was imported into the same key")


def bring_in_by_changed_token(arena: Arena, dice: random.Random) -> None:
    """An import token with one changed bit must be refused."""
    issued = arena.token(dice)
    changed = bytearray(issued.parameters.import_token)
    changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    forged = replace(issued.parameters, import_token=bytes(changed))
    try:
        _imported(arena, replace(issued, parameters=forged), _material(issued, dice))
    except InvalidImportToken:
        return
    raise WrongAnswer("a changed import token was accepted")


def encrypt(arena: Arena, dice: random.Random) -> None:
    """What the backend encrypts decrypts under the known material."""
    held = _usable(arena, dice)
    try:
        message = arena.backend.encrypt(held.key, MESSAGE, CONTEXT)
        if decrypt_message(held.key.key_spec, held.material, message, CONTEXT) != MESSAGE:
            raise WrongAnswer("encrypted another message")
        held = replace(held, message=message)
    except ClientFailed as failure:
        raise WrongAnswer(f"encrypted under another key: {failure}") from None
    finally:
        arena.keep(held)


def decrypt(arena: Arena, dice: random.Random) -> None:
    """A message that was encrypted earlier decrypts."""
    held = _usable(arena, dice)
    try:
        require_message(arena, held)
    finally:
        arena.keep(held)


def destroy(arena: Arena, dice: random.Random) -> None:
    """Keep the number of objects in the backend even."""
    held = arena.surplus(dice)
    try:
        arena.backend.destroy_key(held.key)
    except HsmwrapError:
        arena.doubt(held)
        raise


def reap(arena: Arena, _dice: random.Random) -> None:
    """Remove resident wrapping keys that have expired."""
    arena.backend.reap(_now() + GRACE)


def require_message(arena: Arena, held: Held) -> None:
    """Decrypt the message that belongs to a key.

    Raises:
        WrongAnswer: To something else.
    """
    if arena.backend.decrypt(held.key, held.message, CONTEXT) != MESSAGE:
        raise WrongAnswer("a message decrypted to another one")


Operation = Callable[[Arena, random.Random], None]
DECK: Mapping[Operation, int] = MappingProxyType(
    {
        issue: 2,
        bring_in: 9,
        bring_in_again: 2,
        bring_in_other: 1,
        bring_in_by_changed_token: 1,
        encrypt: 4,
        decrypt: 4,
        destroy: 14,
    }
)
"""How often a thread does what, each round in another order: the mix, and so the speed, is even.
More keys are destroyed than imported, as soon as there are :data:`KEYS_KEPT`: SoftHSM gets slower
with each object, and the speeds before and after the faults are to be compared (measured: without
any fault, 74 operations a second at 170 objects, 44 at 800)."""
UPKEEP: Mapping[Operation, int] = MappingProxyType({reap: 1})


def _imported(arena: Arena, issued: Issued, material: bytes) -> Held:
    parameters = issued.parameters
    try:
        result = arena.service.import_key_material(
            issued.cmk,
            _encrypted(parameters, material),
            parameters.import_token,
        )
    except (InvalidImportToken, ExpiredImportToken, InvalidKeyMaterial, HsmError):
        if issued.expired(_now()):
            raise NothingToDo from None  # the reaper was faster
        raise
    imported, spec = result.imported, issued.cmk.key_spec
    if imported.check_value != check_value(material):
        raise WrongAnswer("the check value is another key's")
    if imported.exposure is not issued.capability.exposure:
        raise WrongAnswer(f"exposure {imported.exposure} is not as promised")
    message = b""
    if arena.usable(imported.key):
        message = encrypt_message(spec, material, MESSAGE, CONTEXT)
    return Held(imported.key, material, message)


def _usable(arena: Arena, dice: random.Random) -> Held:
    held = arena.take(dice)
    if not held.message:
        arena.keep(held)
        raise NothingToDo
    return held


def _material(issued: Issued, dice: random.Random) -> bytes:
    return dice.randbytes(issued.cmk.key_spec.material_length)


def _encrypted(parameters: ImportParameters, material: bytes) -> bytes:
    algorithm = parameters.algorithm
    if algorithm is WrappingAlgorithm.SM2PKE:
        point = decode_spki(parameters.public_key)
        return open_engine("libcrypto").encrypt(point, material).to_c1c3c2()
    public = load_der_public_key(parameters.public_key)
    assert isinstance(public, rsa.RSAPublicKey)  # noqa: S101  # a wrong answer otherwise
    return public.encrypt(material, _PADDING[algorithm])


def _oaep(digest: hashes.HashAlgorithm) -> padding.AsymmetricPadding:
    return padding.OAEP(padding.MGF1(digest), digest, None)


_PADDING: Mapping[WrappingAlgorithm, padding.AsymmetricPadding] = MappingProxyType(
    {
        WrappingAlgorithm.RSAES_PKCS1_V1_5: padding.PKCS1v15(),
        WrappingAlgorithm.RSAES_OAEP_SHA_1: _oaep(hashes.SHA1()),  # noqa: S303  # the API's
        WrappingAlgorithm.RSAES_OAEP_SHA_256: _oaep(hashes.SHA256()),
    }
)


def _now() -> datetime:
    return datetime.now(UTC)


# --- threads --------------------------------------------------------------------------------------


class Tally:
    """What came of all operations of all threads."""

    def __init__(self) -> None:
        self.right: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()

    @property
    def done(self) -> int:
        """Operations that were answered, and right."""
        with self._lock:
            return sum(self.right.values())

    def count_right(self, operation: str) -> None:
        """Count an answer that was right."""
        with self._lock:
            self.right[operation] += 1

    def count_error(self, operation: str, error: Exception) -> None:
        """Count an error: one that may happen while the HSM fails, or a wrong answer."""
        with self._lock:
            if may_happen(error):
                self.refused[type(error).__name__] += 1
            else:
                trace = "".join(traceback.format_exception(error, limit=-6))
                self.wrong.append(f"{operation}: {type(error).__name__}: {error}\n{trace}")


def may_happen(error: Exception) -> bool:
    """Whether a valid call may end like this: try later, or the HSM's own return code."""
    later = isinstance(error, ServiceUnavailable) and not isinstance(error, BackendClosed)
    return later or isinstance(error, HsmError)


class Worker(threading.Thread):
    """One thread of the load.

    Attributes:
        succeeded, failed: Its operations so far.
        moved: When it last ended one (``time.monotonic()``).
    """

    def __init__(
        self,
        name: str,
        arenas: Sequence[Arena],
        tally: Tally,
        deck: Mapping[Operation, int] = DECK,
        *,
        pause: float = 0.0,
    ) -> None:
        """Take a name, which seeds its dice, what to work on, and seconds between operations."""
        super().__init__(name=name, daemon=True)  # a deadlock must not keep the process
        self.succeeded = self.failed = 0
        self.moved = time.monotonic()
        self._arenas, self._tally = arenas, tally
        self._deck, self._pause = [op for op, count in deck.items() for _ in range(count)], pause
        self._dice = random.Random(name)  # noqa: S311  # repeatable, not secret
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End after the present operation."""
        self._stopped.set()

    def run(self) -> None:
        """Do what the deck says, in ever new order."""
        while True:
            self._dice.shuffle(self._deck)
            for operation in self._deck:
                if self._stopped.wait(self._pause) if self._pause else self._stopped.is_set():
                    return
                self._do(operation)
                self.moved = time.monotonic()

    def _do(self, operation: Operation) -> None:
        try:
            operation(self._dice.choice(self._arenas), self._dice)
        except NothingToDo:
            return
        except Exception as error:  # noqa: BLE001  # all are judged
            self.failed += 1
            self._tally.count_error(operation.__name__, error)
            self._stopped.wait(PATIENCE)
        else:
            self.succeeded += 1
            self._tally.count_right(operation.__name__)
