"""The device: sessions for calls, the right to use private keys, and what a lost device needs.

A session is used by one thread at a time and closed after any error of the device: with it go its
key handles and its rights. A code that is not known to be about data opens the device anew, so an
outage ends by itself, whatever its code was. In a forked child the device is opened anew as well;
what the parent opened is its own.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

from hsmwrap.errors import (
    HsmError,
    HsmResourceExhausted,
    HsmUnavailable,
    HsmwrapError,
    PinError,
    PoolTimeout,
    UnsupportedOperation,
)
from hsmwrap.sm2 import Sm2Ciphertext
from hsmwrap_sdf.binding import (
    BLOCK,
    SGD_SM4_CBC,
    SGD_SM4_ECB,
    DeviceInfo,
    Library,
    Point,
    SdfError,
)

PAUSE = 1.0
"""Seconds after a failed opening of the device in which calls fail without another try."""

LONGEST_CALL = 8192
"""Most bytes in one call of SDF_Encrypt."""

_RIGHT = "SDF_GetPrivateKeyAccessRight"
_REFUSED_RIGHT = frozenset({0x01000007, 0x01000018, 0x01000020})  # the last one: of some vendors
UNAVAILABLE = frozenset({0x01000003, 0x01000004, 0x01000005, 0x01000006})
_UNSUPPORTED = frozenset({0x01000002, 0x01000009, 0x0100000A})
_EXHAUSTED = 0x0100001C
_ABOUT_DATA = _UNSUPPORTED | {
    0x01000007,
    0x01000008,
    0x01000014,
    0x01000015,
    0x01000016,
    _EXHAUSTED,
}
"""Codes after which the device is as it was."""


class Session:
    """What a call does in one session."""

    def __init__(self, device: Device, handle: int) -> None:
        self._device = device
        self._library = device.library
        self.handle = handle

    def info(self) -> DeviceInfo:
        """What the device says it is."""
        return self._library.device_info(self.handle)

    def public_key(self, index: int) -> Point:
        """The public key of an encryption pair."""
        return self._library.public_key(self.handle, index)

    def encrypt_for(self, to: Point, data: bytes) -> Sm2Ciphertext:
        """Encrypt data for a public key."""
        return self._library.encrypt_for(self.handle, to, data)

    @contextmanager
    def right(self, index: int) -> Iterator[None]:
        """The right to use a private key, for the length of a ``with`` block.

        Raises:
            PinError: The device refused the password, now or before: it is not tried again.
        """
        with self._device.password_for(index) as password:
            self._library.call(_RIGHT, self.handle, index, password, len(password))
        try:
            yield
        finally:
            self._library.call("SDF_ReleasePrivateKeyAccessRight", self.handle, index)

    @contextmanager
    def opened(self, index: int, envelope: Sm2Ciphertext) -> Iterator[Key]:
        """The key in an envelope, for the length of a ``with`` block."""
        with self.right(index):
            handle = self._library.import_envelope(self.handle, index, envelope)
        with self._destroyed(handle):
            yield Key(self._library, self.handle, handle)

    def exchange(self, index: int, to: Point, envelope: Sm2Ciphertext) -> Sm2Ciphertext:
        """Encrypt for another public key what is encrypted for the pair under an index."""
        with self.right(index):
            return self._library.exchange(self.handle, index, to, envelope)

    def generate_under_kek(self, kek: int) -> bytes:
        """Make an SM4 key, encrypted under a key-encryption key."""
        wrapped, handle = self._library.generate_under_kek(self.handle, kek)
        with self._destroyed(handle):
            return wrapped

    @contextmanager
    def opened_under_kek(self, kek: int, wrapped: bytes) -> Iterator[Key]:
        """The key under a key-encryption key, for the length of a ``with`` block."""
        handle = self._library.import_under_kek(self.handle, kek, wrapped)
        with self._destroyed(handle):
            yield Key(self._library, self.handle, handle)

    @contextmanager
    def _destroyed(self, handle: int) -> Iterator[None]:
        self._device.keys.add((self.handle, handle))
        try:
            yield
        finally:
            self._library.call("SDF_DestroyKey", self.handle, handle)
            self._device.keys.discard((self.handle, handle))


class Key:
    """An SM4 key in the device, while its handle lives."""

    def __init__(self, library: Library, session: int, handle: int) -> None:
        self._library, self._session, self._handle = library, session, handle

    def ecb(self, blocks: bytes) -> bytes:
        """Encrypt each block by itself."""
        return self._pieces(SGD_SM4_ECB, blocks)

    def cbc(self, blocks: bytes) -> bytes:
        """Encrypt in CBC mode with an IV of zeros: the last block is the CBC-MAC."""
        return self._pieces(SGD_SM4_CBC, blocks)

    def _pieces(self, algorithm: int, blocks: bytes) -> bytes:
        """In calls of a length that each device takes."""
        out, iv = [], bytes(BLOCK)
        for at in range(0, len(blocks), LONGEST_CALL):
            piece = blocks[at : at + LONGEST_CALL]
            out.append(self._library.sm4(self._session, self._handle, algorithm, iv, piece))
            iv = out[-1][-BLOCK:]
        return b"".join(out)


class _Opening:
    """One opening of the device: its handle, its idle sessions, and how many calls use it."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.idle: list[int] = []
        self.used = 0
        self.over = False


class Device:
    """Opens the device when it is first used."""

    def __init__(self, library: Library, password: bytes, sessions: int, timeout: float) -> None:
        self.library = library
        self._password = password
        self._limit = sessions
        self._timeout = timeout
        self._accepted: set[int] = set()
        self._refused: set[int] = set()
        self._start_afresh()
        itself = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _in_child(itself))

    def __repr__(self) -> str:
        return f"<Device {self.state}>"

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(self._limit)
        self._opening: _Opening | None = None
        self._failure: tuple[float, str] | None = None
        self._password_lock = threading.Lock()
        self._closed = threading.Event()
        self.keys: set[tuple[int, int]] = set()
        """Key handles that exist, with their sessions."""
        self._watching = False

    @property
    def state(self) -> str:
        """``open``, ``not open``, or what the last opening said."""
        failure = self._failure
        if failure is not None:
            return failure[1]
        return "not open" if self._opening is None else "open"

    @property
    def failed(self) -> bool:
        """Whether the device did not open when it was last tried."""
        return self._failure is not None

    def refuses_password(self, index: int) -> bool:
        """Whether it refused the password for the pair under this index."""
        return index in self._refused

    @contextmanager
    def password_for(self, index: int) -> Iterator[bytes]:
        """The password, unless the device refused it for this index before.

        Until it was right once, one thread at a time tries it: a wrong one is tried once.
        """
        refusal = PinError(
            f"the device refused the password for the pair under index {index}; it is not tried "
            "again: mend the password file, and open the backend again"
        )
        with nullcontext() if index in self._accepted else self._password_lock:
            if index in self._refused:
                raise refusal
            try:
                yield self._password
            except SdfError as error:
                if error.code not in _REFUSED_RIGHT:
                    raise
                self._refused.add(index)
                self._accepted.discard(index)
                raise refusal from None
            self._accepted.add(index)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session for one call.

        Raises:
            PoolTimeout: All were in use for too long.
            HsmUnavailable, HsmResourceExhausted, UnsupportedOperation, HsmError: By the code that a
                function answered in the ``with`` block.
        """
        if not self._free.acquire(timeout=self._timeout):
            raise PoolTimeout(f"all {self._limit} sessions of the device are in use")
        free = self._free
        try:
            opening = self._enter()
            try:
                yield from self._lend(opening)
            finally:
                self._leave(opening)
        except SdfError as error:
            raise typed(error) from None
        finally:
            free.release()

    def _lend(self, opening: _Opening) -> Iterator[Session]:
        handle: int | None = None
        try:
            with suppress(IndexError):
                handle = opening.idle.pop()
            if handle is None:
                handle = self.library.open_session(opening.handle)
            yield Session(self, handle)
        except HsmwrapError:  # the session is as it was
            if handle is not None:
                opening.idle.append(handle)
            raise
        except BaseException as error:
            if handle is not None:
                with suppress(SdfError):
                    self.library.call("SDF_CloseSession", handle)
                    gone = [each for each in tuple(self.keys) if each[0] == handle]
                    self.keys.difference_update(gone)
            if isinstance(error, SdfError) and error.code not in _ABOUT_DATA:
                self._give_up(opening, error)
            raise
        opening.idle.append(handle)

    def _enter(self) -> _Opening:
        with self._lock:
            if self._closed.is_set():
                raise HsmUnavailable("the device was closed")
            if self._opening is None:
                if self._failure is not None and time.monotonic() < self._failure[0] + PAUSE:
                    raise HsmUnavailable(self._failure[1])
                try:
                    self._opening = _Opening(self.library.open_device())
                except SdfError as error:
                    self._fail(time.monotonic(), f"the device does not open: {error}")
                    raise HsmUnavailable(f"the device does not open: {error}") from None
                self._failure = None
            self._opening.used += 1
            return self._opening

    def _leave(self, opening: _Opening) -> None:
        with self._lock:
            opening.used -= 1
            if not opening.over or opening.used:
                return
        self._close(opening)

    def _give_up(self, opening: _Opening, error: SdfError) -> None:
        """Let no further call use this opening; the last one that does closes it."""
        with self._lock:
            opening.over = True
            if self._opening is opening:
                self._opening = None
                # The next call may open it at once: the code need not mean that it is lost.
                self._fail(time.monotonic() - PAUSE, str(error))

    def _fail(self, since: float, why: str) -> None:
        """Under the lock: not ready, until a call or the watcher opens the device again."""
        self._failure = since, why
        if not self._watching:
            self._watching = True
            arguments = (self._closed,)
            threading.Thread(target=self._watch, args=arguments, daemon=True).start()

    def _watch(self, closed: threading.Event) -> None:
        """Readiness comes back without a call: while it is missing, none may come."""
        while True:
            with suppress(HsmwrapError, SdfError):
                self._leave(self._enter())
            with self._lock:
                if self._failure is None or closed.is_set():
                    self._watching = False
                    return
            closed.wait(PAUSE)

    def _close(self, opening: _Opening) -> None:
        for handle in opening.idle:
            with suppress(SdfError):
                self.library.call("SDF_CloseSession", handle)
        with suppress(SdfError):
            self.library.call("SDF_CloseDevice", opening.handle)

    def close(self) -> None:
        """Close what is open, for good."""
        self._closed.set()
        with self._lock:
            opening, self._opening = self._opening, None
        if opening is not None:
            self._close(opening)


def typed(error: SdfError) -> HsmwrapError:
    """What a caller of the backend gets for a code."""
    if error.code in UNAVAILABLE:
        return HsmUnavailable(str(error))
    if error.code == _EXHAUSTED:
        return HsmResourceExhausted(str(error))
    if error.code in _UNSUPPORTED:
        return UnsupportedOperation(f"{error}: the device does not have it")
    return HsmError(str(error))


def _in_child(device: weakref.ref[Device]) -> None:
    if (found := device()) is not None:
        found._start_afresh()  # noqa: SLF001  # of this module
