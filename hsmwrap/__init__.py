"""hsmwrap: the pluggable key backend behind a KMS's bring-your-own-key import.

What an embedding KMS needs is importable from here. ``hsmwrap.keypool`` (wrapping key pairs made
ahead), ``hsmwrap.observe``, ``hsmwrap.metrics`` and ``hsmwrap.kms`` are imported by name. Importing
this package loads no cryptographic library, no PKCS#11 module and no database.
"""

from hsmwrap.backend import Backend, Capabilities, Exposure, Health, ImportedKey, KeyRef
from hsmwrap.catalog import (
    KeySpec,
    ManagedHsm,
    Origin,
    ProtectionLevel,
    WrappingAlgorithm,
    WrappingKeySpec,
)
from hsmwrap.coredumps import forbid_core_dumps
from hsmwrap.errors import (
    BackendClosed,
    BackendLoadError,
    CombinationRefused,
    ConfigurationError,
    ExpiredImportToken,
    HsmError,
    HsmResourceExhausted,
    HsmUnavailable,
    HsmwrapError,
    InvalidCiphertext,
    InvalidImportToken,
    InvalidKeyMaterial,
    InvalidMac,
    InvalidParameter,
    KeyNotFound,
    MissingParameter,
    PinError,
    PoolTimeout,
    SelfTestFailed,
    ServiceUnavailable,
    TokenSelectionError,
    TooManyWrappingKeys,
    UnsupportedOperation,
    UnsupportedOrigin,
    UnsupportedProtectionLevel,
)
from hsmwrap.guard import guarded
from hsmwrap.imports import (
    Cmk,
    FailedImports,
    ImportParameters,
    ImportResult,
    ImportService,
    MemoryFailedImports,
    MemoryResidentKeys,
    MemoryUsedTokens,
    ResidentBounds,
    ResidentKeys,
    UsedTokens,
)
from hsmwrap.policy import Deployment
from hsmwrap.registry import open_backend

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BackendClosed",
    "BackendLoadError",
    "Capabilities",
    "Cmk",
    "CombinationRefused",
    "ConfigurationError",
    "Deployment",
    "ExpiredImportToken",
    "Exposure",
    "FailedImports",
    "Health",
    "HsmError",
    "HsmResourceExhausted",
    "HsmUnavailable",
    "HsmwrapError",
    "ImportParameters",
    "ImportResult",
    "ImportService",
    "ImportedKey",
    "InvalidCiphertext",
    "InvalidImportToken",
    "InvalidKeyMaterial",
    "InvalidMac",
    "InvalidParameter",
    "KeyNotFound",
    "KeyRef",
    "KeySpec",
    "ManagedHsm",
    "MemoryFailedImports",
    "MemoryResidentKeys",
    "MemoryUsedTokens",
    "MissingParameter",
    "Origin",
    "PinError",
    "PoolTimeout",
    "ProtectionLevel",
    "ResidentBounds",
    "ResidentKeys",
    "SelfTestFailed",
    "ServiceUnavailable",
    "TokenSelectionError",
    "TooManyWrappingKeys",
    "UnsupportedOperation",
    "UnsupportedOrigin",
    "UnsupportedProtectionLevel",
    "UsedTokens",
    "WrappingAlgorithm",
    "WrappingKeySpec",
    "__version__",
    "forbid_core_dumps",
    "guarded",
    "open_backend",
]
