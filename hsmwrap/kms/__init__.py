"""The reference KMS: a small, complete example of embedding hsmwrap (extra ``server``).

:class:`Kms` runs the operations of the KMS API 2016-01-20 on a database and the backends;
``hsmwrap.http`` serves :meth:`Kms.execute` over HTTP.
"""

from __future__ import annotations

from hsmwrap.kms.access import AccessKey, AccessKeys, Caller, Grant, Permissions, StaticAccessKeys
from hsmwrap.kms.config import ServerConfig, load_config
from hsmwrap.kms.errors import (
    AccessKeyNotFound,
    InvalidAction,
    NoPermission,
    RejectedDisabled,
    RejectedPendingDeletion,
    RejectedPendingImport,
    StateModifiedFailed,
    UnsupportedAlias,
)
from hsmwrap.kms.opening import open_kms
from hsmwrap.kms.service import Kms

__all__ = [
    "AccessKey",
    "AccessKeyNotFound",
    "AccessKeys",
    "Caller",
    "Grant",
    "InvalidAction",
    "Kms",
    "NoPermission",
    "Permissions",
    "RejectedDisabled",
    "RejectedPendingDeletion",
    "RejectedPendingImport",
    "ServerConfig",
    "StateModifiedFailed",
    "StaticAccessKeys",
    "UnsupportedAlias",
    "load_config",
    "open_kms",
]
