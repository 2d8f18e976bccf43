"""The fault schedule of a soak: random faults, the same ones for the same seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from hsmwrap.ckr import CKR
from hsmwrap.pkcs11.binding.returncodes import RECOVERY, Remedy
from hsmwrap.testing.faults import FaultControl

_T = TypeVar("_T")

CODES = tuple(code for code, row in RECOVERY.items() if row.remedy is not Remedy.STOP)
"""Every code of the recovery table but those that have to stop a backend for good."""
FUNCTIONS = (
    *("C_Initialize", "C_GetSlotList", "C_GetSlotInfo", "C_GetTokenInfo"),
    *("C_OpenSession", "C_CloseSession", "C_GetSessionInfo", "C_Login"),
    *("C_FindObjectsInit", "C_FindObjects", "C_FindObjectsFinal", "C_GetAttributeValue"),
    *("C_CreateObject", "C_DestroyObject", "C_GenerateKeyPair"),
    *("C_WrapKey", "C_UnwrapKey", "C_DeriveKey"),
    *("C_EncryptInit", "C_Encrypt", "C_DecryptInit", "C_Decrypt", "C_SignInit", "C_Sign"),
)
"""Every function that the backend calls but C_Finalize, which fails only once at a time: a module
that can never be finalised keeps its sessions for ever."""
CREATORS = ("C_CreateObject", "C_GenerateKeyPair", "C_UnwrapKey", "C_DeriveKey")
"""Functions that may make an object although they answer an error. Not C_OpenSession: a session
whose handle is unknown can only be closed together with the module."""

_IMPOSSIBLE_FOR_CLOSE = frozenset({CKR.SESSION_HANDLE_INVALID, CKR.SESSION_CLOSED})
"""What C_CloseSession does not answer while the session exists: it could never be closed."""

Watch = Callable[[float], None]
"""Waits that many seconds and watches the load meanwhile."""


class FaultSchedule:
    """Faults from one seed, given through one shim.

    Attributes:
        counts: How often each kind was used.
    """

    def __init__(self, shim: FaultControl, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self._shim = shim
        self._rng = random.Random(seed)  # repeatable, not secret

    def run_one(self, watch: Watch) -> None:
        """Run one kind of fault, then end it."""
        name = self._rng.choices(tuple(_KINDS), tuple(_KINDS.values()))[0]
        self.counts[name] += 1
        getattr(self, name)(watch)
        self._shim.clear()
        self._shim.restore_device()
        watch(self._rng.uniform(0.0, 0.2))

    def random_errors(self, watch: Watch) -> None:
        """Many functions fail now and then, each with random codes."""
        probability, codes = self._rng.choice((0.005, 0.02, 0.08)), self._some(CODES, 3, 16)
        for function in self._some(FUNCTIONS, 1, len(FUNCTIONS)):
            seed = self._rng.getrandbits(64)
            answers = _possible(function, codes)
            self._shim.random([function], answers, probability=probability, seed=seed)
        watch(self._rng.uniform(0.2, 1.0))

    def lost_answers(self, watch: Watch) -> None:
        """Objects are made, but their handles are lost."""
        for function in self._some(CREATORS, 1, len(CREATORS)):
            code = self._rng.choice(CODES)
            self._shim.fail(function, code, every=self._rng.randint(2, 10), after=True)
        watch(self._rng.uniform(0.2, 0.6))

    def single_fault(self, watch: Watch) -> None:
        """One call fails."""
        function = self._rng.choice((*FUNCTIONS, "C_Finalize"))
        code = self._rng.choice(_possible(function, CODES))
        self._shim.fail(function, code, nth=self._rng.randint(1, 5))
        watch(self._rng.uniform(0.05, 0.3))

    def steady_fault(self, watch: Watch) -> None:
        """One function always fails."""
        function = self._rng.choice(FUNCTIONS)
        code = self._rng.choice(_possible(function, CODES))
        self._shim.fail(function, code, always=True)
        watch(self._rng.uniform(0.05, 0.3))

    def slow(self, watch: Watch) -> None:
        """Some functions are slow."""
        for function in self._some(FUNCTIONS, 1, 8):
            self._shim.latency(function, self._rng.randint(100, 20_000))
        watch(self._rng.uniform(0.1, 0.5))

    def removal(self, watch: Watch) -> None:
        """The HSM is removed and restored."""
        self._shim.remove_device()
        watch(self._rng.uniform(0.0, 0.6))

    def sticky_removal(self, watch: Watch) -> None:
        """The same, and the module has to be initialised again."""
        self._shim.remove_device(sticky=True)
        watch(self._rng.uniform(0.0, 0.6))

    def _some(self, choices: Sequence[_T], least: int, most: int) -> list[_T]:
        return self._rng.sample(choices, self._rng.randint(least, min(most, len(choices))))


def _possible(function: str, codes: Sequence[int]) -> list[int]:
    return [
        code for code in codes if function != "C_CloseSession" or code not in _IMPOSSIBLE_FOR_CLOSE
    ]


_KINDS: Mapping[str, int] = MappingProxyType(
    {
        "random_errors": 5,
        "lost_answers": 3,
        "single_fault": 4,
        "steady_fault": 3,
        "slow": 2,
        "removal": 2,
        "sticky_removal": 2,
    }
)
"""Kinds of faults (methods of :class:`FaultSchedule`), and how often they come."""
