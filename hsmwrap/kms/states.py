"""Key states, and which operations they allow, as a table.

docs/key-states.md has the same table, the states afterwards, the sources, and what the
documentation leaves to us.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from hsmwrap.errors import HsmwrapError
from hsmwrap.kms.errors import (
    RejectedDisabled,
    RejectedPendingDeletion,
    RejectedPendingImport,
    StateModifiedFailed,
)


class KeyState(StrEnum):
    """The state of a CMK, in the API's spelling."""

    ENABLED = "Enabled"
    DISABLED = "Disabled"
    PENDING_DELETION = "PendingDeletion"
    PENDING_IMPORT = "PendingImport"


_Answers = Mapping[KeyState, type[HsmwrapError]]

_ALWAYS: _Answers = MappingProxyType({})
_USE: _Answers = MappingProxyType(
    {
        KeyState.DISABLED: RejectedDisabled,
        KeyState.PENDING_DELETION: RejectedPendingDeletion,
        KeyState.PENDING_IMPORT: RejectedPendingImport,
    }
)
_UNLESS_PENDING_DELETION: _Answers = MappingProxyType(
    {KeyState.PENDING_DELETION: RejectedPendingDeletion}
)
_NOT_PENDING_DELETION: _Answers = MappingProxyType({KeyState.PENDING_DELETION: StateModifiedFailed})
_ONLY_USABLE: _Answers = MappingProxyType(
    dict.fromkeys((KeyState.PENDING_DELETION, KeyState.PENDING_IMPORT), StateModifiedFailed)
)
_ONLY_PENDING_DELETION: _Answers = MappingProxyType(
    dict.fromkeys(
        (KeyState.ENABLED, KeyState.DISABLED, KeyState.PENDING_IMPORT), StateModifiedFailed
    )
)

STATE_MATRIX: Mapping[str, _Answers] = MappingProxyType(
    {
        "DescribeKey": _ALWAYS,
        "DescribeKeyVersion": _ALWAYS,
        "ListKeyVersions": _ALWAYS,
        "UpdateKeyDescription": _UNLESS_PENDING_DELETION,
        "GetParametersForImport": _ALWAYS,
        "ImportKeyMaterial": _NOT_PENDING_DELETION,
        "DeleteKeyMaterial": _ALWAYS,
        "Encrypt": _USE,
        "Decrypt": _USE,
        "GenerateDataKey": _USE,
        "GenerateDataKeyWithoutPlaintext": _USE,
        "ReEncrypt": _USE,
        "EnableKey": _ONLY_USABLE,
        "DisableKey": _ONLY_USABLE,
        "ScheduleKeyDeletion": _NOT_PENDING_DELETION,
        "CancelKeyDeletion": _ONLY_PENDING_DELETION,
        "CreateAlias": _NOT_PENDING_DELETION,
        "UpdateAlias": _UNLESS_PENDING_DELETION,
        "DeleteAlias": _ALWAYS,
        "ListAliasesByKeyId": _ALWAYS,
    }
)
"""Operation → state → error. A state that is not listed allows the operation."""


def require(operation: str, state: KeyState) -> None:
    """Raise the error that :data:`STATE_MATRIX` lists, if any."""
    error = STATE_MATRIX[operation].get(state)
    if error is not None:
        raise error(f"{operation} is not allowed in key state {state}")
