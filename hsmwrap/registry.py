"""Backends as plug-ins: found by the entry-point group ``hsmwrap.backends``.

The two built-in backends are registered the same way as a vendor's. Listing imports nothing;
loading imports the one plug-in that was asked for, so a broken one harms only itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from hsmwrap.backend import (
    CONTRACT_VERSION,
    Backend,
    BacksUpKeySets,
    ChecksSettings,
    ClonesKeySets,
    KeySetFile,
    KeySetInfo,
    ManagesKeySets,
)
from hsmwrap.catalog import ProtectionLevel
from hsmwrap.errors import (
    BackendLoadError,
    HsmwrapError,
    UnsupportedOperation,
    strip_tracebacks,
)
from hsmwrap.guard import GuardedBackend, checked, foreign
from hsmwrap.settings import did_you_mean

GROUP = "hsmwrap.backends"
"""The entry-point group; each entry names a :class:`hsmwrap.backend.Backend` subclass."""


@dataclass(frozen=True, slots=True, order=True)
class BackendEntry:
    """One registered plug-in, not yet imported.

    Attributes:
        name: What the configuration calls it.
        value: Where its class is (``package.module:Class``).
        distribution: Name and version of the installed package that registers it.
    """

    name: str
    value: str
    distribution: str

    def __str__(self) -> str:
        return f"{self.name!r} ({self.value}, of {self.distribution})"


def available() -> list[BackendEntry]:
    """List the registered plug-ins by name, without importing any."""
    return sorted(_entry(point) for point in entry_points(group=GROUP))


def load(name: str) -> type[Backend]:
    """Import the plug-in ``name`` and return its backend class.

    Raises:
        BackendLoadError: No plug-in or several have this name, its import fails, or what it
            names is not a complete :class:`Backend` of this contract version. The text names it.
    """
    entry = _only(name)
    return _accept(entry, _import(entry))


@strip_tracebacks
def open_backend(name: str, settings: Mapping[str, Any]) -> Backend:
    """Load the plug-in ``name``, open a backend from plain settings, put the guard around it.

    Raises:
        BackendLoadError: As :func:`load`, or the plug-in breaks the contract at opening.
        ConfigurationError: A setting is unknown, missing or of the wrong kind.
        HsmwrapError: What the plug-in cannot open for: ``HsmUnavailable``, for example.
    """
    plugin = load(name)
    try:
        backend = plugin.from_settings(settings)
    except HsmwrapError:
        raise
    except Exception as error:  # noqa: BLE001  # foreign code
        raise BackendLoadError(
            f"backend plug-in {name}: from_settings raised {foreign(error)}"
        ) from None
    if not isinstance(backend, Backend):
        raise BackendLoadError(
            f"backend plug-in {name}: from_settings returned {type(backend).__name__} where "
            f"{plugin.__name__} is due"
        )
    return GuardedBackend(backend, name)


@strip_tracebacks
def check_settings(name: str, settings: Mapping[str, Any]) -> frozenset[ProtectionLevel] | None:
    """Load the plug-in ``name`` and let it check plain settings, without its HSM.

    Returns:
        The protection levels that a backend with these settings may serve; None where the plug-in
        does not check settings (:class:`hsmwrap.backend.ChecksSettings`).

    Raises:
        BackendLoadError: As :func:`load`.
        ConfigurationError: A backend could not be opened with these settings; it says why.
    """
    plugin = load(name)
    if not issubclass(plugin, ChecksSettings):
        return None
    return checked(name, ChecksSettings.check_settings, plugin.check_settings, settings)


class KeySetManager:
    """The key sets of one plug-in and its settings: what ``hsmwrap keys`` works on."""

    def __init__(
        self, name: str, settings: Mapping[str, Any], plugin: type[Backend] | None = None
    ) -> None:
        """Load the plug-in; ``plugin`` is its class where it is not registered.

        Raises:
            BackendLoadError: As :func:`load`.
            UnsupportedOperation: Its key sets are not managed here.
        """
        plugin = load(name) if plugin is None else plugin
        if not issubclass(plugin, ManagesKeySets):
            raise UnsupportedOperation(f"backend plug-in {name} has no key sets to manage here")
        self._name, self._plugin, self._settings = name, plugin, settings

    @property
    def plugin(self) -> str:
        """Name of the plug-in."""
        return self._name

    @strip_tracebacks
    def list(self) -> tuple[KeySetInfo, ...]:
        """All key sets, oldest first."""
        plugin = self._plugin
        return checked(self._name, ManagesKeySets.list_keys, plugin.list_keys, self._settings)

    @strip_tracebacks
    def initialise(self, *, so_pin_file: str | None = None) -> KeySetInfo:
        """Make the first key set; see :meth:`ManagesKeySets.initialise_keys`."""
        declared, call = ManagesKeySets.initialise_keys, self._plugin.initialise_keys
        return checked(self._name, declared, call, self._settings, so_pin_file=so_pin_file)

    @strip_tracebacks
    def rotate(self, *, so_pin_file: str | None = None) -> KeySetInfo:
        """Make another key set and make it current."""
        declared, call = ManagesKeySets.rotate_keys, self._plugin.rotate_keys
        return checked(self._name, declared, call, self._settings, so_pin_file=so_pin_file)

    @strip_tracebacks
    def retire(self, key_set: str) -> None:
        """Destroy a key set that is not current."""
        declared, call = ManagesKeySets.retire_keys, self._plugin.retire_keys
        checked(self._name, declared, call, self._settings, key_set)

    @strip_tracebacks
    def make_transport_key(self, *, so_pin_file: str | None = None) -> KeySetFile:
        """Make a key that key sets of another HSM are wrapped for."""
        declared, call = (
            ClonesKeySets.make_transport_key,
            self._cloning().make_transport_key,
        )
        return checked(self._name, declared, call, self._settings, so_pin_file=so_pin_file)

    @strip_tracebacks
    def export(
        self, transport_key: str, fingerprint: str, *, so_pin_file: str | None = None
    ) -> KeySetFile:
        """Wrap the key sets for a transport key; see :meth:`ClonesKeySets.export_keys`."""
        declared, call = ClonesKeySets.export_keys, self._cloning().export_keys
        arguments = self._settings, transport_key, fingerprint
        return checked(self._name, declared, call, *arguments, so_pin_file=so_pin_file)

    @strip_tracebacks
    def import_exported(
        self, exported: str, fingerprint: str, *, so_pin_file: str | None = None
    ) -> tuple[KeySetInfo, ...]:
        """Unwrap key sets; see :meth:`ClonesKeySets.import_keys`."""
        declared, call = ClonesKeySets.import_keys, self._cloning().import_keys
        arguments = self._settings, exported, fingerprint
        return checked(self._name, declared, call, *arguments, so_pin_file=so_pin_file)

    @strip_tracebacks
    def discard_transport_key(self, *, so_pin_file: str | None = None) -> None:
        """Destroy the transport key; see :meth:`ClonesKeySets.discard_transport_key`."""
        declared, call = ClonesKeySets.discard_transport_key, self._cloning().discard_transport_key
        checked(self._name, declared, call, self._settings, so_pin_file=so_pin_file)

    @strip_tracebacks
    def back_up(self, backup_key: bytes, *, so_pin_file: str | None = None) -> str:
        """Wrap the key sets; :func:`hsmwrap.backup.back_up` makes the key and the file."""
        declared, call = BacksUpKeySets.back_up_keys, self._backing_up().back_up_keys
        return checked(
            self._name, declared, call, self._settings, backup_key, so_pin_file=so_pin_file
        )

    @strip_tracebacks
    def restore(
        self, backup: str, backup_key: bytes, *, so_pin_file: str | None = None
    ) -> tuple[KeySetInfo, ...]:
        """Unwrap key sets; :func:`hsmwrap.backup.restore` finds the key by its shares."""
        declared, call = BacksUpKeySets.restore_keys, self._backing_up().restore_keys
        arguments = self._settings, backup, backup_key
        return checked(self._name, declared, call, *arguments, so_pin_file=so_pin_file)

    @strip_tracebacks
    def drill(
        self,
        backup: str,
        backup_key: bytes,
        examine: Callable[[Mapping[str, Any]], None],
        *,
        so_pin_file: str | None = None,
    ) -> tuple[KeySetInfo, ...]:
        """Restore on a scratch HSM; :func:`hsmwrap.backup.drill` finds the key by its shares."""
        declared, call = BacksUpKeySets.drill_keys, self._backing_up().drill_keys
        arguments = self._settings, backup, backup_key, examine
        return checked(self._name, declared, call, *arguments, so_pin_file=so_pin_file)

    def _cloning(self) -> type[ClonesKeySets]:
        if not issubclass(self._plugin, ClonesKeySets):
            raise self._lacks("does not clone key sets")
        return self._plugin

    def _backing_up(self) -> type[BacksUpKeySets]:
        if not issubclass(self._plugin, BacksUpKeySets):
            raise self._lacks("does not back up key sets")
        return self._plugin

    def _lacks(self, what: str) -> UnsupportedOperation:
        return UnsupportedOperation(
            f"backend plug-in {self._name} {what}; where it keeps them in a file, as the software "
            "backend does, a copy of that file is the backup and the clone"
        )


def load_all() -> tuple[dict[str, type[Backend]], dict[str, BackendLoadError]]:
    """Load every plug-in: the classes by name, and by name why the others did not load."""
    loaded: dict[str, type[Backend]] = {}
    failed: dict[str, BackendLoadError] = {}
    for name in dict.fromkeys(entry.name for entry in available()):
        try:
            loaded[name] = load(name)
        except BackendLoadError as error:
            failed[name] = error
    return loaded, failed


def _entry(point: EntryPoint) -> BackendEntry:
    owner = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"
    return BackendEntry(point.name, point.value, owner)


def _only(name: str) -> BackendEntry:
    registered = available()
    matching = [entry for entry in registered if entry.name == name]
    if not matching:
        known = list(dict.fromkeys(entry.name for entry in registered))
        raise BackendLoadError(
            f"no backend plug-in is called {name!r}; {did_you_mean([name], known)}"
            f"registered: {', '.join(known) or 'none'}"
        )
    if len(matching) > 1:
        owners = " and ".join(entry.distribution for entry in matching)
        raise BackendLoadError(
            f"backend plug-in {name!r} is registered by {owners}; uninstall all but one"
        )
    return matching[0]


def _import(entry: BackendEntry) -> object:
    try:
        return EntryPoint(entry.name, entry.value, GROUP).load()
    # A plug-in is foreign code: whatever its import raises, SystemExit too, is its own failure.
    except (Exception, SystemExit) as error:
        raise BackendLoadError(
            f"backend plug-in {entry} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _accept(entry: BackendEntry, candidate: object) -> type[Backend]:
    if not (isinstance(candidate, type) and issubclass(candidate, Backend)):
        raise BackendLoadError(f"backend plug-in {entry} is not a subclass of hsmwrap's Backend")
    version = getattr(candidate, "contract_version", None)
    if version != CONTRACT_VERSION:
        written_for = "none" if version is None else repr(version)
        raise BackendLoadError(
            f"backend plug-in {entry} declares contract version {written_for}; "
            f"this hsmwrap has contract version {CONTRACT_VERSION}"
        )
    if inspect.isabstract(candidate):
        missing = ", ".join(sorted(candidate.__abstractmethods__))
        raise BackendLoadError(f"backend plug-in {entry} does not implement {missing}")
    for name, why in _other_signatures(candidate):
        raise BackendLoadError(
            f"backend plug-in {entry}: {name} does not take what the contract passes: {why}"
        )
    return candidate


def _other_signatures(candidate: type[Backend]) -> Iterator[tuple[str, str]]:
    """The methods that cannot be called as the contract declares them, and why."""
    contract = [base for base in candidate.__mro__ if base.__module__ == Backend.__module__]
    names = dict.fromkeys(
        (name, base) for base in contract for name in vars(base) if not name.startswith("_")
    )
    for name, base in names:
        declared, own = (inspect.getattr_static(each, name) for each in (base, candidate))
        if not inspect.isfunction(declared) or not inspect.isfunction(own):
            continue
        passed = inspect.signature(declared).parameters.values()
        named = {each.name: None for each in passed if each.kind is each.KEYWORD_ONLY}
        try:
            inspect.signature(own).bind(*[None] * (len(passed) - len(named)), **named)
        except TypeError as error:
            yield name, str(error)
