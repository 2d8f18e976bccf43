"""Fault injection for PKCS#11: a shim in front of any module, which fails on command.

For authors of backends, on the HSM or the software token of their choice (needs gcc)::

    shim = FaultShim("/usr/lib/softhsm/libsofthsm2.so", tmp_path)
    backend = MyBackend(module=shim.path)               # loads the shim instead of the module
    before = shim.counters()
    shim.fail("C_UnwrapKey", CKR.DEVICE_ERROR)          # the next call only
    with pytest.raises(HsmUnavailable):
        backend.unwrap_material(...)
    assert shim.counters().held == before.held          # no session and no object left behind
    assert not shim.counters().violations

The module can also be made poorer than it is, and so play other HSM tokens (:class:`Restriction`),
and it can play an HSM with a vendor's own mechanisms (:class:`Vendor`)::

    shim.restrict(Restriction.NO_AES_ECB, Restriction.ONE_SESSION)
    shim.play(Vendor.SANSEC)                            # an HSM with a vendor's SM2

Everything can be changed while the module runs, by any thread, and from other processes through
:class:`FaultControl`; only one process at a time should change it. The shim works in forked
children of its host. It stays loaded: dlclose does not unload it.

``python -m hsmwrap.testing.faults build DIRECTORY`` builds it and prints the library's path;
``python -m hsmwrap.testing.faults play sansec DIRECTORY`` prints that of a module that plays a
vendor's HSM in front of SoftHSM2, for ``HSMWRAP_PKCS11_MODULE``; ``--restrict NO_AES`` leaves out
what it does not have.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Flag, IntEnum, auto
from functools import reduce
from operator import or_
from pathlib import Path

from hsmwrap.ckr import CKR
from hsmwrap.testing import _control
from hsmwrap.testing._control import FUNCTIONS, Control, FunctionControl
from hsmwrap.testing._shimbuild import LIBRARY_NAME, ShimBuildError, build
from hsmwrap.testing.softhsm import SoftHsmNotInstalledError, find_module

__all__ = [
    "CKR",
    "FUNCTIONS",
    "Counters",
    "FaultControl",
    "FaultShim",
    "Restriction",
    "ShimBuildError",
    "Vendor",
    "Violations",
    "build",
]

_CONTROL_NAME = "faultshim.control"


class Restriction(Flag):
    """What the module cannot do, or does otherwise, while it plays another HSM token.

    Those of EC points and of key wrap were tried with SoftHSM2 as the real module, which has DER
    points and CKM_AES_KEY_WRAP_PAD.
    """

    NO_SESSION_OBJECTS = auto()
    """Every object that is made has to be a token object."""
    NO_EXTRACTABLE_PRIVATE_KEYS = auto()
    """Private keys with EXTRACTABLE are refused."""
    NO_READABLE_KEYS = auto()
    """Keys with SENSITIVE false are refused, as in FIPS mode."""
    NO_SECRET_KEY_CREATION = auto()
    """C_CreateObject makes no secret keys."""
    NO_HARDENING = auto()
    """UNWRAP_TEMPLATE, ALLOWED_MECHANISMS, COPYABLE and MODIFIABLE are unknown."""
    NO_AES_ECB = auto()
    NO_AES_CBC = auto()
    NO_AES_CTR = auto()
    NO_AES_GCM = auto()
    NO_AES_KEY_WRAP = auto()
    """Neither CKM_AES_KEY_WRAP_PAD nor CKM_AES_KEY_WRAP_KWP."""
    KEY_WRAP_PAD_ONLY = auto()
    """AES key wrap with padding under 0x210A only."""
    KEY_WRAP_KWP_ONLY = auto()
    """AES key wrap with padding under 0x210B only."""
    NO_RSA_UNWRAP = auto()
    """C_UnwrapKey takes no RSA mechanism."""
    NO_RSA_DECRYPT = auto()
    """C_Decrypt takes no RSA mechanism with padding."""
    NO_RAW_RSA = auto()
    """No CKM_RSA_X_509."""
    NO_ECDH = auto()
    """No CKM_ECDH1_DERIVE."""
    OAEP_SOURCE_ZERO = auto()
    """The source field of OAEP parameters has to be 0."""
    HMAC_KEYS_ONLY = auto()
    """CKM_SHA256_HMAC takes keys of type CKK_SHA256_HMAC only, no generic secrets."""
    ONE_SESSION = auto()
    """A process has one session at a time."""
    LOGIN_PER_SESSION = auto()
    """C_Login covers the session that it is called with only."""
    BLANK_LABEL = auto()
    """The token's label is blank."""
    PIN_PAD = auto()
    """The PIN is typed at the token: C_Login takes none (protected authentication path)."""
    EC_POINT_RAW = auto()
    """CKA_EC_POINT is 04 ‖ x ‖ y, without DER."""
    EC_POINT_XY = auto()
    """CKA_EC_POINT is x ‖ y."""
    EC_POINT_BIT_STRING = auto()
    """CKA_EC_POINT is a DER BIT STRING."""
    UNWRAP_IGNORES_PROTECTION = auto()
    """C_UnwrapKey makes keys with SENSITIVE false and EXTRACTABLE true, whatever it is told."""
    UNWRAP_TEMPLATE_IGNORED = auto()
    ALLOWED_MECHANISMS_IGNORED = auto()
    COPYABLE_IGNORED = auto()
    MODIFIABLE_IGNORED = auto()
    WRAP_WITH_TRUSTED_IGNORED = auto()
    """These attributes are taken, and have no effect."""
    NO_TRUST = auto()
    """UNWRAP_TEMPLATE, TRUSTED, WRAP_WITH_TRUSTED and ALLOWED_MECHANISMS are unknown."""
    NO_AES = auto()
    """Neither keys of type CKK_AES nor a mechanism of AES."""
    NO_RSA = auto()
    """No mechanism of RSA."""
    TRUSTED_ASKS_FOR_LOGIN = auto()
    """A key with TRUSTED is USER_NOT_LOGGED_IN, by which the officer's login is meant."""


class Vendor(IntEnum):
    """An HSM with SM2 of its vendor's, played in front of SoftHSM2 with OpenSSL 3's libcrypto.

    The numbers of mechanisms and key types are those of the profile of this name; they collide.
    What the vendors' own HSMs do beyond that is not known here, and is not claimed: both generate
    pairs, decrypt and unwrap, SoftHSM2 keeps the keys, and other restrictions can be set beside.
    """

    SANSEC = 1
    """Takes C1 ‖ C3 ‖ C2 by 0x80008200 and DER by 0x80008201."""
    TASS = 2
    """Takes C1 ‖ C2 ‖ C3 by 0x80008200."""
    REMOTE = 3
    """Has no profile: generates by 0x1010 and takes C1 ‖ C3 ‖ C2 by 0x1065, which p11-kit's client
    carries to a module in another process. It carries no mechanism of a vendor."""


@dataclass(frozen=True, slots=True)
class Violations:
    """Misuse of the module by its host. False if there was none.

    Attributes:
        session_conflicts: Calls with a session that was inside another call (PKCS#11 leaves
            the outcome undefined), or C_CloseAllSessions while one was.
        finalize_conflicts: C_Finalize while calls were running, or calls begun during it.
        uninitialized_calls: Calls before C_Initialize; in a child process, before its own.
    """

    session_conflicts: int
    finalize_conflicts: int
    uninitialized_calls: int

    def __bool__(self) -> bool:
        return any((self.session_conflicts, self.finalize_conflicts, self.uninitialized_calls))


@dataclass(frozen=True, slots=True)
class Counters:
    """What happened since the control file was made, in all processes together.

    A call with a fault *after* it was performed counts by its effect: the session is open, the
    object exists.

    Attributes:
        calls: Calls per function, those that got a fault included.
        injected: Faults injected per function, without latency and a removed device.
        open_sessions: Sessions open now in running processes.
        session_objects: Session objects that exist now in running processes.
        session_high_water: The most sessions that one process had open at once.
        concurrent_high_water: The most calls that one process had inside the module at once.
        token_objects_created: Token objects made (a key pair is two).
        token_objects_destroyed: Token objects destroyed by C_DestroyObject.
        initialized_with_locking: C_Initialize with CKF_OS_LOCKING_OK that succeeded.
        initialized_without_locking: C_Initialize without it that succeeded.
        violations: Misuse of the module by its host.
    """

    calls: Mapping[str, int]
    injected: Mapping[str, int]
    open_sessions: int
    session_objects: int
    session_high_water: int
    concurrent_high_water: int
    token_objects_created: int
    token_objects_destroyed: int
    initialized_with_locking: int
    initialized_without_locking: int
    violations: Violations

    @property
    def token_objects_delta(self) -> int:
        """Token objects made and not destroyed; negative where older ones were destroyed."""
        return self.token_objects_created - self.token_objects_destroyed

    @property
    def held(self) -> tuple[int, int, int]:
        """Sessions, session objects and token objects held: equal before and after, no leak."""
        return self.open_sessions, self.session_objects, self.token_objects_delta

    def calls_since(self, earlier: Counters) -> dict[str, int]:
        """Calls per function since ``earlier``, without those that were not called."""
        delta = {name: count - earlier.calls[name] for name, count in self.calls.items()}
        return {name: count for name, count in delta.items() if count}


class FaultControl:
    """The controls of a shim that this or another process has set up in ``directory``.

    Functions have their PKCS#11 names (``"C_UnwrapKey"``); codes are :class:`CKR` members or any
    other number up to 32 bits. A function has at most one rule (:meth:`fail`), one chance
    (:meth:`random`) and one latency; setting it again replaces it. The rule is applied first.
    """

    def __init__(self, directory: str | Path) -> None:
        """Attach to the shim.

        Raises:
            FileNotFoundError: The directory has no shim.
            ValueError: Its control file is of another version of hsmwrap.
        """
        self._directory = Path(directory).resolve()
        self._control = _control.open_shared(self._directory / _CONTROL_NAME)

    def __repr__(self) -> str:
        return f"{type(self).__name__} in {self._directory}"

    @property
    def path(self) -> Path:
        """The library to load in place of the real module."""
        return self._directory / LIBRARY_NAME

    def fail(
        self,
        function: str,
        code: int,
        *,
        nth: int = 1,
        every: int | None = None,
        always: bool = False,
        after: bool = False,
    ) -> None:
        """Make calls to ``function`` answer ``code``.

        Args:
            function: PKCS#11 name.
            code: The return code; not ``CKR.OK``.
            nth: Once, at the n-th call from now (the first by default).
            every: At every n-th call from now instead, until cleared.
            always: At every call instead, until cleared.
            after: Perform the call first and lose its answer, instead of not performing it: the
                object is made or the session open, but the caller gets no handle.
        """
        mode = _control.RULE_ONCE if every is None and not always else _control.RULE_EVERY
        count = 1 if always else nth if every is None else every
        if not 1 <= count <= _control.RULE_COUNT_MAX:
            raise ValueError("calls are counted from 1")
        target = self._function(function)
        target.rule = 0
        target.rule_start = target.calls
        target.rule = _code(code) << 32 | count << 3 | after << 2 | mode

    def random(
        self,
        functions: Iterable[str],
        codes: Sequence[int],
        *,
        probability: float,
        seed: int,
        after: bool = False,
    ) -> None:
        """Make calls fail at random, the same ones for the same seed and order of calls.

        Args:
            functions: PKCS#11 names; each draws independently.
            codes: Up to 16 return codes, equally likely.
            probability: Of a fault per call, 0 to 1 (kept in steps of 1/65536).
            seed: Any 64-bit number.
            after: As in :meth:`fail`.
        """
        if not 1 <= len(codes) <= _control.CODES_MAX:
            raise ValueError(f"1 to {_control.CODES_MAX} codes, not {len(codes)}")
        chance = round(probability * _control.CHANCE_ALWAYS)
        if not 0 <= chance <= _control.CHANCE_ALWAYS:
            raise ValueError("a probability is a number from 0 to 1")
        checked = [_code(code) for code in codes]
        for target in [self._function(name) for name in functions]:
            target.chance = 0
            target.chance_start = target.calls
            target.seed = seed
            for index, code in enumerate(checked):
                target.codes[index] = code
            target.chance = len(checked) << 32 | after << 31 | chance

    def latency(self, function: str, microseconds: int) -> None:
        """Make each call to ``function`` take that much longer; 0 ends it."""
        if microseconds < 0:
            raise ValueError("a latency is not negative")
        self._function(function).latency = microseconds

    def clear(self, *functions: str) -> None:
        """End all rules, chances and latencies of these functions (of all by default)."""
        for target in [self._function(name) for name in functions or FUNCTIONS]:
            target.rule = target.chance = target.latency = 0

    def kill(self, *, call: int = 0, change: int = 0) -> None:
        """Kill a process (SIGKILL) at a call of the module; without arguments: do not any more.

        Args:
            call: At the n-th call from now, of whichever function and process, before the module
                sees it.
            change: At the n-th token object from now that is made or destroyed, right after it.
        """
        self._control.kill_calls, self._control.kill_changes = call, change

    def pending(self) -> tuple[str, ...]:
        """Functions with a once-only fault that has not happened yet."""
        rules = ((name, self._function(name).rule) for name in FUNCTIONS)
        return tuple(name for name, rule in rules if rule & 3 == _control.RULE_ONCE)

    def remove_device(self, *, sticky: bool = False) -> None:
        """Remove the HSM: every process loses its sessions, session objects and login.

        Until :meth:`restore_device`, calls with a session answer DEVICE_REMOVED, those with a
        slot TOKEN_NOT_PRESENT, and no slot lists a token; C_Initialize, C_Finalize and C_GetInfo
        work. Afterwards old sessions answer SESSION_HANDLE_INVALID and new ones can be opened.

        Args:
            sticky: Afterwards everything goes on answering DEVICE_REMOVED in a process until it
                has called C_Finalize and C_Initialize (as network HSM clients do).
        """
        count = self._control.device // _control.DEVICE_REMOVAL + 1
        sticky_bit = _control.DEVICE_STICKY if sticky else 0
        self._control.device = count * _control.DEVICE_REMOVAL | sticky_bit | _control.DEVICE_ABSENT

    def restore_device(self) -> None:
        """Restore the removed HSM."""
        self._control.device &= ~_control.DEVICE_ABSENT

    def play(self, vendor: Vendor | None) -> None:
        """Make the module play a vendor's HSM, or none; restrictions stay as they are.

        To be set while no process has the module initialised.
        """
        self._control.vendor = vendor or 0

    def restrict(self, *restrictions: Restriction, pin: str | None = None) -> None:
        """Make the module play a token with these restrictions, and no others; with none, itself.

        To be set while no process has the module initialised: keys do not change with it.

        Args:
            restrictions: What the token cannot do.
            pin: What is typed at the PIN pad, for :attr:`Restriction.PIN_PAD`.

        Raises:
            ValueError: The PIN is missing or too long.
        """
        played = reduce(or_, restrictions, Restriction(0))
        typed = (pin or "").encode()
        if (Restriction.PIN_PAD in played) != bool(typed) or len(typed) > _control.PIN_MAX:
            raise ValueError("a PIN pad needs a PIN, of at most 64 bytes, and nothing else does")
        self._control.pin = typed
        self._control.restrictions = played.value

    def counters(self) -> Counters:
        """Read all counters. Each is exact; together they are a snapshot only if no call runs.

        Raises:
            RuntimeError: More than 128 processes used the shim at once.
        """
        control = self._control
        if control.processes_refused:
            raise RuntimeError(f"more than {_control.PROCESSES_MAX} processes: counts are wrong")
        living = [share for share in control.process if share.pid and _is_alive(share.pid)]
        return Counters(
            calls={name: self._function(name).calls for name in FUNCTIONS},
            injected={name: self._function(name).injected for name in FUNCTIONS},
            open_sessions=sum(share.sessions for share in living),
            session_objects=sum(share.session_objects for share in living),
            session_high_water=control.session_high_water,
            concurrent_high_water=control.concurrent_high_water,
            token_objects_created=control.token_objects_created,
            token_objects_destroyed=control.token_objects_destroyed,
            initialized_with_locking=control.initialized_with_locking,
            initialized_without_locking=control.initialized_without_locking,
            violations=_violations(control),
        )

    def _function(self, name: str) -> FunctionControl:
        try:
            function: FunctionControl = self._control.function[FUNCTIONS.index(name)]
        except ValueError:
            raise ValueError(f"{name!r} is not a function of PKCS#11 v2.40") from None
        return function


class FaultShim(FaultControl):
    """A new shim in front of one module, and its controls."""

    def __init__(
        self,
        real_module: str | Path,
        directory: str | Path,
        *,
        library: str | Path | None = None,
    ) -> None:
        """Set up a shim in ``directory``; load :attr:`path` afterwards.

        Args:
            real_module: The PKCS#11 module to sit in front of, as ``dlopen`` takes it. Two shims
                of one process need two real modules: a file that is loaded twice is one module.
            directory: A directory without a shim, private to the test; made if missing.
            library: The library that :func:`build` made, to be copied; built here when None.

        Raises:
            FileExistsError: There is a shim in the directory.
            ShimBuildError: The library could not be built.
        """
        home = Path(directory).resolve()
        control = home / _CONTROL_NAME
        if "\n" in f"{real_module}{control}":
            raise ValueError("a path with a line feed cannot be written to the configuration")
        home.mkdir(parents=True, exist_ok=True)
        _control.create(control)
        if library is None:
            build(home)
        else:
            shutil.copyfile(library, home / LIBRARY_NAME)
        (home / f"{LIBRARY_NAME}.conf").write_text(f"{real_module}\n{control}\n")
        super().__init__(home)


def _code(code: int) -> int:
    if not CKR.OK < code < 1 << 32:
        raise ValueError(f"{code!r} is not a return code of a failure")
    return int(code)


def _violations(control: Control) -> Violations:
    return Violations(
        session_conflicts=control.session_conflicts,
        finalize_conflicts=control.finalize_conflicts,
        uninitialized_calls=control.uninitialized_calls,
    )


def _is_alive(pid: int) -> bool:
    """Whether the process still runs; a zombie holds no session any more."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in {"Z", "X"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: ``build DIRECTORY`` and ``play VENDOR DIRECTORY`` print a path."""
    parser = argparse.ArgumentParser(prog="python -m hsmwrap.testing.faults")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("build", help="build the fault shim, print its path")
    command.add_argument("directory", type=Path)
    command = commands.add_parser(
        "play", help="set up a shim that plays a vendor's HSM in front of SoftHSM2, print its path"
    )
    command.add_argument(
        "vendor", choices=["sansec", "tass"], help="whose numbers it has; a profile uses them"
    )
    command.add_argument("directory", type=Path, help="for the shim; it may be there already")
    names = [str(each.name) for each in Restriction]
    command.add_argument(
        "--restrict",
        metavar="RESTRICTION",
        nargs="+",
        default=[],
        choices=names,
        help=f"after the directory: what it does not do besides; of {', '.join(names)}",
    )
    given = parser.parse_args(arguments)
    try:
        library = _played(given) if "vendor" in given else None
        library = library or build(given.directory)
    except (ShimBuildError, SoftHsmNotInstalledError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{library}\n")
    return 0


def _played(given: argparse.Namespace) -> Path:
    there = (given.directory / _CONTROL_NAME).exists()
    shim = FaultControl(given.directory) if there else FaultShim(find_module(), given.directory)
    shim.play(Vendor[given.vendor.upper()])
    shim.restrict(*(Restriction[name] for name in given.restrict))
    return shim.path


if __name__ == "__main__":
    sys.exit(main())
