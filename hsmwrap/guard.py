"""The guard: what is the same for every backend, done once around a plug-in's calls.

:func:`guarded` puts it there; :func:`hsmwrap.registry.open_backend` and the import service do so by
themselves. A plug-in is foreign code: its answers are checked, and one that breaks the contract is
a :class:`hsmwrap.errors.HsmError` that names the plug-in.

A private key's reference is bound to its algorithm by its first byte. Clients cannot change that
byte: the import token's MAC covers the reference.

Every failure of a client's ciphertext is the same error. One of a length that no honest client
sends does not reach the plug-in and fails sooner, which tells the client the length of its own
message and nothing else.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from hsmwrap.backend import (
    CHECK_VALUE_LENGTH,
    MAX_REFERENCE_LENGTH,
    MESSAGE_VERSION,
    MESSAGE_VERSION_CCM,
    NONCE_LENGTH,
    TAG_LENGTH,
    Ability,
    Backend,
    Capabilities,
    Custody,
    Health,
    ImportedKey,
    KeyCapability,
    KeyRef,
    Mac,
    PrivateKeyRef,
    ReSealsKeys,
    WrappingCapability,
    WrappingKey,
)
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.checkvalue import METHODS, OWN_METHODS
from hsmwrap.composition import Composition, Declared
from hsmwrap.errors import (
    BackendLoadError,
    HsmError,
    HsmwrapError,
    InvalidCiphertext,
    InvalidImportToken,
    InvalidKeyMaterial,
    InvalidMac,
    KeyNotFound,
    UnsupportedOperation,
    strip_tracebacks,
)
from hsmwrap.gate import Gate

OBJECT_ID_LENGTH = 16
MAX_NAME_LENGTH = 32
"""Most characters of a backend's name, and of a key set's id."""
MAC_LENGTH = 32

_SPKI_LENGTH = {WrappingKeySpec.RSA_2048: 294, WrappingKeySpec.EC_SM2: 91}
_VERSIONS = frozenset({MESSAGE_VERSION, MESSAGE_VERSION_CCM})
_MESSAGE_OVERHEAD = 1 + NONCE_LENGTH + TAG_LENGTH
_RSA_LENGTH = 256
# DER is both the shortest and the longest layout: head of the SEQUENCE, INTEGERs of 1 to 33 bytes,
# the hash, head of the OCTET STRING with C2.
_SM2_OVERHEAD = range(2 + 2 * (2 + 1) + (2 + 32) + 2, 3 + 2 * (2 + 33) + (2 + 32) + 2 + 1)

# Codes in references to private keys: never reused, never renumbered.
_ALGORITHMS = (
    WrappingAlgorithm.RSAES_PKCS1_V1_5,
    WrappingAlgorithm.RSAES_OAEP_SHA_1,
    WrappingAlgorithm.RSAES_OAEP_SHA_256,
    WrappingAlgorithm.SM2PKE,
)

_P = ParamSpec("_P")
_T = TypeVar("_T")
_A = TypeVar("_A")
_K = TypeVar("_K")

_log = logging.getLogger(__name__)


class Guarded(Ability):
    """What :class:`GuardedBackend` is, whatever is around it."""


def guarded(backend: Backend) -> Backend:
    """``backend`` with a guard around it; ``backend`` itself if there is one already.

    Raises:
        BackendLoadError: Its name does not fit import tokens.
    """
    return backend if Guarded.of(backend) else GuardedBackend(backend)


def guard_all(backends: Mapping[_K, Backend]) -> dict[_K, Backend]:
    """Each backend with a guard around it; one that occurs twice has one guard."""
    guards = {id(backend): guarded(backend) for backend in backends.values()}
    return {key: guards[id(backend)] for key, backend in backends.items()}


class GuardedBackend(Composition, Guarded):
    """A backend that keeps the contract, or says by which call the plug-in broke it."""

    def __init__(self, backend: Backend, plugin: str | None = None) -> None:
        """Guard ``backend``; ``plugin`` is what errors call it (default: its name).

        Raises:
            BackendLoadError: Its name does not fit import tokens.
        """
        super().__init__(backend)
        self._name = backend.name
        if not _is_id(self._name):
            raise BackendLoadError(
                f"backend plug-in {plugin or type(backend).__name__}: its name has to be 1 to "
                f"{MAX_NAME_LENGTH} ASCII characters, for import tokens and key references"
            )
        self._plugin = plugin or self._name
        self._gate = Gate(f"{self._name} backend")
        self._unclosed = [backend]
        self._looked_at: Capabilities | None = None

    def __repr__(self) -> str:
        return f"<guarded {self._backend!r} {self._gate}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a backend does not pickle or copy: it holds keys")

    @property
    def name(self) -> str:
        """The backend's name, as it was when the backend was opened."""
        return self._name

    @strip_tracebacks
    def _forward(
        self, asked: object, declared: Declared[_P, _T], *arguments: _P.args, **named: _P.kwargs
    ) -> _T:
        with self._gate.enter():
            call = getattr(asked, declared.__name__)
            return checked(self._plugin, declared, call, *arguments, **named)

    @strip_tracebacks
    def ability(self, kind: type[_A]) -> _A | None:
        """The plug-in's ability, guarded as its calls of the contract are."""
        inner = ReSealsKeys.of(self._backend) if kind is ReSealsKeys else None
        if inner is None:
            return super().ability(kind)
        resealing: Any = _GuardedResealing(inner, self._plugin, self._gate, self._require_ours)
        return resealing  # type: ignore[no-any-return]

    def _broken(self, declared: Callable[..., object], how: str) -> HsmError:
        return _broken(self._plugin, declared, how)

    # --- capabilities ------------------------------------------------------------------------

    @strip_tracebacks
    def capabilities(self) -> Capabilities:
        """The plug-in's report."""
        with self._gate.enter():
            return self._report()

    def _report(self) -> Capabilities:
        report = checked(self._plugin, Backend.capabilities, self._backend.capabilities)
        if report.backend != self._name:
            raise self._broken(
                Backend.capabilities,
                f"speaks of a backend {str(report.backend)[:32]!r}; the class's name is "
                f"{self._name!r}",
            )
        if report is not self._looked_at:  # most plug-ins keep theirs
            if misfit := _misfit(report, Capabilities, ""):
                raise self._broken(Backend.capabilities, f"returned a report in which {misfit}")
            self._looked_at = report
        return report

    def _require_usable(self, key: KeyRef) -> None:
        self._require_ours(key)
        capability = self._report().key_for(key.key_spec)
        if capability is None or not capability.usable:
            raise UnsupportedOperation(
                f"backend {self._name} keeps {key.key_spec} keys but cannot encrypt with them"
            )

    def _require_ours(self, key: KeyRef) -> None:
        if key.backend != self._name:
            raise KeyNotFound(f"the key is one of backend {key.backend!r}, not of {self._name!r}")

    # --- wrapping keys -----------------------------------------------------------------------

    @strip_tracebacks
    def generate_wrapping_key(
        self, spec: WrappingKeySpec, algorithm: WrappingAlgorithm, *, expires_at: datetime
    ) -> WrappingKey:
        """A wrapping key that is what was asked for, bound to its algorithm."""
        with self._gate.enter():
            capability = self._report().wrapping_for(spec, algorithm)
            if capability is None:
                raise UnsupportedOperation(
                    f"backend {self._name} does not serve {algorithm} with {spec}"
                )
            declared = Backend.generate_wrapping_key
            key = checked(
                self._plugin,
                declared,
                self._backend.generate_wrapping_key,
                spec,
                algorithm,
                expires_at=expires_at,
            )
            if wrong := next(_wrong_with_pair(key, capability), None):
                self._undo(Backend.discard_wrapping_key, key.private_key, "discard a wrapping key")
                raise self._broken(declared, f"{wrong}; the key pair was discarded")
            return replace(key, private_key=bound(key.private_key, algorithm))

    @strip_tracebacks
    def discard_wrapping_key(self, private_key: PrivateKeyRef) -> None:
        """Have a resident wrapping key destroyed."""
        with self._gate.enter():
            if private_key.custody == Custody.HSM_INTERNAL:
                inner = plugin_ref(private_key)
                checked(
                    self._plugin,
                    Backend.discard_wrapping_key,
                    self._backend.discard_wrapping_key,
                    inner,
                )

    # --- import ------------------------------------------------------------------------------

    @strip_tracebacks
    def unwrap_material(
        self,
        private_key: PrivateKeyRef,
        algorithm: WrappingAlgorithm,
        encrypted_material: bytes,
        *,
        key_spec: KeySpec,
        expected_check_value: bytes | None = None,
        object_id: bytes | None = None,
    ) -> ImportedKey:
        """The imported key, if it is what the capabilities promise and the one expected."""
        if object_id is not None and len(object_id) != OBJECT_ID_LENGTH:
            raise ValueError(f"object_id takes {OBJECT_ID_LENGTH} bytes")
        with self._gate.enter():
            report = self._report()
            served = [w for w in report.wrapping if w.algorithm == algorithm]
            if not served:
                raise UnsupportedOperation(f"backend {self._name} does not serve {algorithm}")
            promised = report.key_for(key_spec)
            if promised is None:
                raise UnsupportedOperation(f"backend {self._name} does not import {key_spec} keys")
            inner = _unbound(private_key, algorithm)
            if not _is_possible(algorithm, len(encrypted_material), key_spec.material_length):
                raise InvalidKeyMaterial
            object_id = object_id or secrets.token_bytes(OBJECT_ID_LENGTH)
            try:
                imported = checked(
                    self._plugin,
                    Backend.unwrap_material,
                    self._backend.unwrap_material,
                    inner,
                    algorithm,
                    encrypted_material,
                    key_spec=key_spec,
                    expected_check_value=expected_check_value,
                    object_id=object_id,
                )
            except InvalidKeyMaterial:
                # A new one: the plug-in's may have a type, an attribute or a note that says why.
                raise InvalidKeyMaterial from None
            if wrong := self._wrong_with_key(imported, promised, served[0], object_id):
                self._undo(
                    Backend.destroy_key, imported.key, "destroy a key that is not as promised"
                )
                raise self._broken(Backend.unwrap_material, f"{wrong}; the key was destroyed")
            if expected_check_value is not None and not hmac.compare_digest(
                expected_check_value, imported.check_value
            ):
                self._undo(Backend.destroy_key, imported.key, "destroy a key that is not the same")
                raise InvalidKeyMaterial
            return imported

    def _wrong_with_key(
        self,
        imported: ImportedKey,
        promised: KeyCapability,
        path: WrappingCapability,
        object_id: bytes,
    ) -> str | None:
        key = imported.key
        made = key.backend, key.key_spec, key.custody, imported.exposure
        due = self._name, promised.key_spec, promised.custody, path.exposure
        if made != due:
            return (
                f"made a key of {', '.join(map(str, made))}; its capabilities promise "
                f"{', '.join(map(str, due))}"
            )
        if promised.custody is Custody.HSM_INTERNAL and key.data != object_id:
            return "made a key object under another id than the one that it was given"
        if not _are_bytes(key.data, imported.check_value):
            return "made a key whose data or check value are not bytes"
        if len(imported.check_value) != CHECK_VALUE_LENGTH:
            length = len(imported.check_value)
            return f"made a check value of {length} bytes; {CHECK_VALUE_LENGTH} are due"
        if (method := imported.check_value[0]) not in METHODS and method < OWN_METHODS:
            known = ", ".join(map(str, METHODS))
            return (
                f"made a check value of method {method}; there are {known}, and {OWN_METHODS} to "
                "255 for a plug-in's own"
            )
        return None

    def _undo(self, declared: Declared[[_T], None], made: _T, what: str) -> None:
        try:
            checked(self._plugin, declared, getattr(self._backend, declared.__name__), made)
        except HsmwrapError as error:
            extra = {"backend": self._name, "error": type(error).__name__}
            _log.warning("could not %s", what, extra=extra)

    # --- use ---------------------------------------------------------------------------------

    @strip_tracebacks
    def encrypt(self, key: KeyRef, plaintext: bytes, additional_data: bytes = b"") -> bytes:
        """A message in the contract's format."""
        with self._gate.enter():
            self._require_usable(key)
            declared = Backend.encrypt
            encrypt = self._backend.encrypt
            message = checked(self._plugin, declared, encrypt, key, plaintext, additional_data)
            if len(message) != len(plaintext) + _MESSAGE_OVERHEAD or message[0] not in _VERSIONS:
                raise self._broken(declared, "returned what is not version ‖ nonce ‖ sealed text")
            return message

    @strip_tracebacks
    def decrypt(self, key: KeyRef, ciphertext: bytes, additional_data: bytes = b"") -> bytes:
        """The plaintext of a message."""
        with self._gate.enter():
            self._require_usable(key)
            if len(ciphertext) < _MESSAGE_OVERHEAD or ciphertext[0] not in _VERSIONS:
                raise InvalidCiphertext
            declared = Backend.decrypt
            decrypt = self._backend.decrypt
            return checked(self._plugin, declared, decrypt, key, ciphertext, additional_data)

    @strip_tracebacks
    def destroy_key(self, key: KeyRef) -> None:
        """Have an imported key's object destroyed."""
        with self._gate.enter():
            self._require_ours(key)
            if key.custody == Custody.HSM_INTERNAL:
                checked(self._plugin, Backend.destroy_key, self._backend.destroy_key, key)

    # --- import tokens -----------------------------------------------------------------------

    @strip_tracebacks
    def mac(self, data: bytes) -> Mac:
        """A MAC in the contract's form."""
        with self._gate.enter():
            mac = checked(self._plugin, Backend.mac, self._backend.mac, data)
            if not _is_mac(mac):
                raise self._broken(
                    Backend.mac,
                    f"returned what is not {MAC_LENGTH} bytes and the id of a key set, of 1 to "
                    f"{MAX_NAME_LENGTH} ASCII characters",
                )
            return mac

    @strip_tracebacks
    def verify_mac(self, data: bytes, mac: Mac) -> None:
        """Return if ``mac`` is right for ``data``."""
        with self._gate.enter():
            if not _is_mac(mac):
                raise InvalidMac(f"a MAC has {MAC_LENGTH} bytes, and names its key set")
            checked(self._plugin, Backend.verify_mac, self._backend.verify_mac, data, mac)

    # --- life --------------------------------------------------------------------------------

    @strip_tracebacks
    def health(self) -> Health:
        """The plug-in's state, not ready where it does not tell or is closed."""
        try:
            health = checked(self._plugin, Backend.health, self._backend.health)
        except HsmwrapError as error:
            return Health(ready=False, detail=str(error))
        facts = {**health.facts, "in_flight": self._gate.in_flight}
        if health.ready and self._gate.closed:
            return Health(ready=False, detail="closed", facts=facts)
        return replace(health, facts=facts)

    @strip_tracebacks
    def close(self) -> None:
        """Wait for running calls, then have everything freed. Safe to call again."""
        self._gate.close()
        with suppress(IndexError):  # closed before, or now by another thread
            checked(self._plugin, Backend.close, self._unclosed.pop().close)


class _GuardedResealing(ReSealsKeys):
    """Answers for resident keys, and checks what the plug-in made of a sealed one."""

    def __init__(
        self, inner: ReSealsKeys, plugin: str, gate: Gate, require_ours: Callable[[KeyRef], None]
    ) -> None:
        self._inner, self._plugin, self._gate = inner, plugin, gate
        self._require_ours = require_ours

    @strip_tracebacks
    def key_set_of(self, key: KeyRef) -> str | None:
        with self._gate.enter():
            self._require_ours(key)
            if key.custody == Custody.HSM_INTERNAL:
                return None
            declared = ReSealsKeys.key_set_of
            key_set = checked(self._plugin, declared, self._inner.key_set_of, key)
            if not _is_id(key_set):
                raise _broken(self._plugin, declared, "named no key set for a sealed key")
            return key_set

    @strip_tracebacks
    def reseal(self, key: KeyRef, *, expected_check_value: bytes | None = None) -> KeyRef:
        with self._gate.enter():
            self._require_ours(key)
            if key.custody == Custody.HSM_INTERNAL:
                return key
            declared, call, expected = ReSealsKeys.reseal, self._inner.reseal, expected_check_value
            sealed = checked(self._plugin, declared, call, key, expected_check_value=expected)
            if replace(sealed, data=key.data) != key or not _are_bytes(sealed.data):
                raise _broken(self._plugin, declared, "returned a key of another kind")
            return sealed


def checked(
    plugin: str,
    declared: Callable[..., _T],
    call: Callable[..., object],
    *arguments: object,
    **named: object,
) -> _T:
    """Call a method of a plug-in; what is wrong with its answer is an error that names it.

    Args:
        plugin: What errors call the plug-in.
        declared: The method as the contract declares it; its annotation says what is returned.
        call: The plug-in's method.
        arguments: Its arguments.
        named: Its arguments by name.

    Raises:
        HsmwrapError: The plug-in raised it.
        HsmError: The plug-in raised something else, or returned what is not due.
    """
    try:
        answer = call(*arguments, **named)
    except HsmwrapError:
        raise
    except Exception as error:  # noqa: BLE001  # foreign code
        raise _broken(plugin, declared, f"raised {foreign(error)}") from None
    expected = _returns(declared)
    if not isinstance(answer, expected):
        # The type alone: the value may be a secret.
        due = " or ".join("None" if t is NoneType else t.__name__ for t in expected)
        got = "None" if answer is None else type(answer).__name__
        raise _broken(plugin, declared, f"returned {got} where {due} is due")
    fitting: _T = answer  # type: ignore[assignment]
    return fitting


def foreign(error: BaseException) -> str:
    """Type and place of an exception. Not its text, which may hold a secret."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}, in {place.name}"
    return f"{type(error).__name__} ({where})"


@cache
def _returns(declared: Callable[..., object]) -> tuple[type, ...]:
    hint = get_type_hints(declared)["return"]
    alternatives = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return tuple(get_origin(each) or each for each in alternatives)


def _misfit(value: object, hint: Any, what: str) -> str | None:
    """Where a value has another type than is declared, as a phrase; None where it has not."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is UnionType:
        misfits = [_misfit(value, each, what) for each in inner]
        return None if None in misfits else misfits[0]
    if not isinstance(value, kind):
        return f"{what} is {type(value).__name__} where {kind.__name__} is due"
    parts: Iterator[tuple[object, Any, str]] = iter(())
    if isinstance(value, tuple | frozenset):
        parts = ((each, inner[0], f"{what}[]") for each in value)
    elif is_dataclass(value):
        hints = get_type_hints(type(value))
        parts = (
            (getattr(value, name), hints[name], f"{what}.{name}".lstrip(".")) for name in hints
        )
    return next(filter(None, (_misfit(*part) for part in parts)), None)


def _broken(plugin: str, declared: Callable[..., object], how: str) -> HsmError:
    return HsmError(f"backend plug-in {plugin}: {declared.__name__} {how}")


def _is_id(text: object) -> bool:
    return isinstance(text, str) and text.isascii() and 0 < len(text) <= MAX_NAME_LENGTH


def _are_bytes(*values: object) -> bool:
    return all(isinstance(value, bytes) for value in values)


def _is_mac(mac: Mac) -> bool:
    return _is_id(mac.key_set) and _are_bytes(mac.tag) and len(mac.tag) == MAC_LENGTH


def _wrong_with_pair(key: WrappingKey, asked: WrappingCapability) -> Iterator[str]:
    ref = key.private_key
    if (key.spec, key.algorithm) != (asked.spec, asked.algorithm):
        yield (
            f"made a wrapping key pair for {key.algorithm} with {key.spec} where {asked.algorithm} "
            f"with {asked.spec} was asked for"
        )
    if ref.custody != asked.custody:
        yield f"made a private key of {ref.custody}; its capabilities promise {asked.custody}"
    if not _are_bytes(ref.data, key.public_key):
        yield "made a wrapping key pair whose public key or reference are not bytes"
    if len(ref.data) > MAX_REFERENCE_LENGTH:
        yield (
            f"made a private key reference of {len(ref.data)} bytes; an import token has room for "
            f"{MAX_REFERENCE_LENGTH}"
        )
    if len(key.public_key) != _SPKI_LENGTH[key.spec]:
        yield f"made a public key that is not a SubjectPublicKeyInfo of {key.spec}"
    if key.key_set is not None and not _is_id(key.key_set):
        yield "named a key set by what is not 1 to 32 ASCII characters"


def plugin_ref(ref: PrivateKeyRef) -> PrivateKeyRef:
    """A guarded backend's reference as the plug-in made it."""
    return PrivateKeyRef(ref.custody, ref.data[1:])


def bound(ref: PrivateKeyRef, algorithm: WrappingAlgorithm) -> PrivateKeyRef:
    """A plug-in's reference as the caller gets it: bound to the algorithm."""
    return replace(ref, data=bytes([_ALGORITHMS.index(algorithm)]) + ref.data)


def _unbound(ref: PrivateKeyRef, algorithm: WrappingAlgorithm) -> PrivateKeyRef:
    if ref.data[:1] != bytes([_ALGORITHMS.index(algorithm)]):
        raise InvalidImportToken("the import token's private key is for another algorithm")
    return plugin_ref(ref)


def _is_possible(algorithm: WrappingAlgorithm, length: int, material_length: int) -> bool:
    """Whether a ciphertext of this length can hold material of that length."""
    if algorithm is not WrappingAlgorithm.SM2PKE:
        return length == _RSA_LENGTH
    return length - material_length in _SM2_OVERHEAD
