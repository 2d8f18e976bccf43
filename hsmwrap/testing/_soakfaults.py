"""The weather of a soak: faults that come at random, the same ones for the same seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from hsmwrap.pkcs11.binding.returncodes import RECOVERY, Remedy
from hsmwrap.testing.ckr import CKR
from hsmwrap.testing.faults import FaultControl

_T = TypeVar("_T")

CODES = tuple(CKR[name] for name, row in RECOVERY.items() if row.remedy is not Remedy.STOP)
"""Every code of the recovery table, without those that rightly stop a backend for good."""
FUNCTIONS = (
    *("C_Initialize", "C_GetSlotList", "C_GetSlotInfo", "C_GetTokenInfo"),
    *("C_OpenSession", "C_CloseSession", "C_GetSessionInfo", "C_Login"),
    *("C_FindObjectsInit", "C_FindObjects", "C_FindObjectsFinal", "C_GetAttributeValue"),
    *("C_CreateObject", "C_DestroyObject", "C_GenerateKeyPair"),
    *("C_WrapKey", "C_UnwrapKey", "C_DeriveKey"),
    *("C_EncryptInit", "C_Encrypt", "C_DecryptInit", "C_Decrypt", "C_SignInit", "C_Sign"),
)
"""Every function that the backend calls, but for C_Finalize: that fails once at a time. A module
that cannot be finalised at all keeps what it has, and nobody can free it."""
CREATORS = ("C_CreateObject", "C_GenerateKeyPair", "C_UnwrapKey", "C_DeriveKey")
"""Where the call may have worked and only its answer was lost. Not C_OpenSession: a session whose
handle nobody has can only go with the module."""

_NOT_TRUE = frozenset({CKR.SESSION_HANDLE_INVALID, CKR.SESSION_CLOSED})
"""What C_CloseSession does not answer while the session is there: nobody could ever close it."""

Rest = Callable[[float], None]
"""Waits so many seconds, and watches the load meanwhile."""


class Weather:
    """Faults of one seed, through one shim.

    Attributes:
        happened: How often each kind came.
    """

    def __init__(self, shim: FaultControl, seed: int) -> None:
        self.happened: Counter[str] = Counter()
        self._shim = shim
        self._dice = random.Random(seed)  # noqa: S311  # repeatable, not secret

    def change(self, rest: Rest) -> None:
        """Let one kind of fault come, last and go."""
        name = self._dice.choices(tuple(_KINDS), tuple(_KINDS.values()))[0]
        self.happened[name] += 1
        getattr(self, name)(rest)
        self._shim.clear()
        self._shim.restore_device()
        rest(self._dice.uniform(0.0, 0.2))

    def storm(self, rest: Rest) -> None:
        """Many functions fail now and then, each with any code."""
        probability, codes = self._dice.choice((0.005, 0.02, 0.08)), self._some(CODES, 3, 16)
        for function in self._some(FUNCTIONS, 1, len(FUNCTIONS)):
            seed = self._dice.getrandbits(64)
            answers = _truthful(function, codes)
            self._shim.random([function], answers, probability=probability, seed=seed)
        rest(self._dice.uniform(0.2, 1.0))

    def lost_answers(self, rest: Rest) -> None:
        """Objects are made, and nobody learns their handles."""
        for function in self._some(CREATORS, 1, len(CREATORS)):
            code = self._dice.choice(CODES)
            self._shim.fail(function, code, every=self._dice.randint(2, 10), after=True)
        rest(self._dice.uniform(0.2, 0.6))

    def single_fault(self, rest: Rest) -> None:
        """One call fails."""
        function = self._dice.choice((*FUNCTIONS, "C_Finalize"))
        code = self._dice.choice(_truthful(function, CODES))
        self._shim.fail(function, code, nth=self._dice.randint(1, 5))
        rest(self._dice.uniform(0.05, 0.3))

    def steady_fault(self, rest: Rest) -> None:
        """One function never works."""
        function = self._dice.choice(FUNCTIONS)
        code = self._dice.choice(_truthful(function, CODES))
        self._shim.fail(function, code, always=True)
        rest(self._dice.uniform(0.05, 0.3))

    def slow(self, rest: Rest) -> None:
        """Some functions take their time."""
        for function in self._some(FUNCTIONS, 1, 8):
            self._shim.latency(function, self._dice.randint(100, 20_000))
        rest(self._dice.uniform(0.1, 0.5))

    def removal(self, rest: Rest) -> None:
        """The HSM is pulled out and put back."""
        self._shim.remove_device()
        rest(self._dice.uniform(0.0, 0.6))

    def sticky_removal(self, rest: Rest) -> None:
        """The same, and the module has to be initialised again."""
        self._shim.remove_device(sticky=True)
        rest(self._dice.uniform(0.0, 0.6))

    def _some(self, choices: Sequence[_T], least: int, most: int) -> list[_T]:
        return self._dice.sample(choices, self._dice.randint(least, min(most, len(choices))))


def _truthful(function: str, codes: Sequence[int]) -> list[int]:
    return [code for code in codes if function != "C_CloseSession" or code not in _NOT_TRUE]


_KINDS: Mapping[str, int] = MappingProxyType(
    {
        "storm": 5,
        "lost_answers": 3,
        "single_fault": 4,
        "steady_fault": 3,
        "slow": 2,
        "removal": 2,
        "sticky_removal": 2,
    }
)
"""Kinds of faults (methods of :class:`Weather`), and how often they come."""
