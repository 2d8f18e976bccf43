"""The ``Recommend`` of error answers: what this server can tell a client about its mistake.

It depends on the error and on what the client sent, and on nothing else. InvalidKeyMaterial has one
text, whatever was sent, because every difference is an oracle (Design invariant 7). A value is
quoted only where it looks like a name: another one may be a secret in the wrong place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from hsmwrap.catalog import loggable
from hsmwrap.errors import HsmwrapError, InvalidKeyMaterial, InvalidParameter, MissingParameter
from hsmwrap.kms.api import OPERATIONS
from hsmwrap.kms.errors import AccessDeniedError, InvalidAction, ValidationError

ELSE = "Look for the RequestId in the log of this service."
"""Where this server knows nothing better."""


@dataclass(frozen=True, slots=True)
class Hint:
    """A row of the table.

    Attributes:
        code: The error's code.
        text: What is recommended.
        parameter: The parameter at fault; empty: any, or none.
        pattern: Regular expression for the whole value as it was sent; empty: any.
    """

    code: str
    text: str
    parameter: str = ""
    pattern: str = ""


_EXPIRE = "KeyMaterialExpireUnix"
_BASE64 = (
    ("InvalidParameter", "EncryptedKeyMaterial"),
    ("InvalidParameter", "Plaintext"),
    ("InvalidParameter", "CiphertextBlob"),
    ("InvalidImportToken", "ImportToken"),
)
_BASE64_MISTAKES = (
    (r"\s*-----BEGIN.*", "{} is PEM? It takes base64 of the bytes, without the lines around it."),
    (r".*[\r\n].*", "{} contains line breaks: write base64 in one line."),
    (r".* .*", "{} contains blanks: + is percent-encoded as %2B in a query or a form."),
    (r".*%(2[BF]|3D).*", "{} is percent-encoded twice?"),
    (r".*[-_].*", "{} is base64url? It takes base64 with + and /."),
    (r"(?:[0-9a-fA-F]{2})+", "{} is hexadecimal? It takes base64."),
    (r"(?!(?:.{4})*\Z).*", "{} is cut off, or lacks = at its end."),
)

HINTS: tuple[Hint, ...] = (
    Hint(
        "InvalidParameter",
        "KeyMaterialExpireUnix is in milliseconds? It takes seconds since 1970.",
        _EXPIRE,
        r"[0-9]{13}",
    ),
    Hint(
        "InvalidParameter",
        "KeyMaterialExpireUnix is a date? It takes seconds since 1970.",
        _EXPIRE,
        r"[0-9]{4}-.*",
    ),
    Hint(
        "InvalidParameter",
        "KeyMaterialExpireUnix has a fraction: it takes whole seconds.",
        _EXPIRE,
        r"[0-9]+\.[0-9]*",
    ),
    *(
        Hint(code, text.format(parameter), parameter, pattern)
        for code, parameter in _BASE64
        for pattern, text in _BASE64_MISTAKES
    ),
    *(
        Hint(
            "InvalidParameter",
            f"{parameter} has single quotes: JSON takes double ones.",
            parameter,
            r"\s*\{\s*'.*",
        )
        for parameter in (
            "EncryptionContext",
            "SourceEncryptionContext",
            "DestinationEncryptionContext",
        )
    ),
    Hint(
        "InvalidParameter",
        "Send the whole CiphertextBlob, and the EncryptionContext that it was encrypted with.",
        "CiphertextBlob",
    ),
    Hint(
        "InvalidImportToken",
        "Send the ImportToken that GetParametersForImport answered for this KeyId, or ask for a "
        "new one.",
    ),
    Hint(
        "ExpiredImportToken",
        "Call GetParametersForImport again, and encrypt the key material with the new PublicKey.",
    ),
    Hint(
        "Forbidden.KeyNotFound",
        "KeyId contains blanks or line breaks.",
        "KeyId",
        r".*\s.*",
    ),
    Hint(
        "Forbidden.KeyNotFound",
        "The ARN is of another region or account? ListKeys answers the ARNs of this service.",
        "KeyId",
        r"acs:.*",
    ),
    Hint("Forbidden.KeyNotFound", "ListKeys answers the keys that exist."),
    Hint("Forbidden.KeyVersionNotFound", "DescribeKey answers the version: PrimaryKeyVersion."),
    Hint("Forbidden.AliasNotFound", "ListAliases answers the aliases that exist."),
    Hint("AliasAlreadyExists", "UpdateAlias gives the alias to another key."),
    Hint("Unsupported.Alias", "Send the KeyId; DescribeKey answers it for an alias."),
    Hint("Unsupported.Origin", "Only a key that was created with Origin=EXTERNAL takes imports."),
    Hint("Rejected.Disabled", "Call EnableKey first."),
    Hint("Rejected.PendingDeletion", "Call CancelKeyDeletion first."),
    Hint(
        "Rejected.PendingImport",
        "Import key material first: GetParametersForImport, then ImportKeyMaterial.",
    ),
    Hint("Rejected.StateModifiedFailed", "DescribeKey answers the state of the key: KeyState."),
    Hint("Forbidden.NoPermission", "Ask the operator of this service for a grant."),
    Hint("InvalidAccessKeyId.NotFound", "Ask the operator of this service for an access key."),
    Hint("IllegalTimestamp", "Set the clock of the client, and send the time in UTC."),
    Hint("SignatureNonceUsed", "Sign each request anew, with a nonce of its own."),
    Hint(
        "SignatureDoesNotMatch",
        "Compare the server's string to sign with that of the client. If they are equal, the "
        "secret is wrong; if the Host differs, a proxy has changed it.",
    ),
    Hint("ServiceUnavailableTemporary", "Send the request again later."),
)
"""The table, in the order in which it is searched; docs/errors.md has it too."""

SILENT = (
    "Encrypt the key material with the PublicKey that came with this ImportToken, by the "
    "WrappingAlgorithm that it was asked for."
)
"""For every InvalidKeyMaterial."""


def recommend(error: HsmwrapError, action: str, given: Mapping[str, str]) -> str:
    """What to recommend to the client that caused an error.

    Args:
        error: The error.
        action: The API's action, as it was sent.
        given: The parameters of the operation, as they were sent.
    """
    if isinstance(error, InvalidKeyMaterial):
        return SILENT
    if isinstance(error, ValidationError | AccessDeniedError):  # a dry run: the error without one
        error = error.__cause__ if isinstance(error.__cause__, HsmwrapError) else error
    if isinstance(error, InvalidAction):
        return _nearest(action, OPERATIONS)
    name = error.name if isinstance(error, InvalidParameter | MissingParameter) else ""
    known = OPERATIONS[action].parameters if action in OPERATIONS else {}
    for unknown in given.keys() - known.keys():
        if known and loggable(unknown) == name:
            return f"{name}: {_nearest(unknown, known)}"
    for hint in HINTS:
        value = given.get(hint.parameter, "")
        if (
            hint.code == error.code
            and (hint.parameter == name or not name)
            and re.fullmatch(hint.pattern or ".*", value, re.DOTALL)
        ):
            return hint.text
    return str(error) if name else ELSE


def _nearest(text: str, known: Mapping[str, object]) -> str:
    meant = get_close_matches(text[:64], known, 1)
    return f"{meant[0]} is meant?" if meant else f"Served are {', '.join(known)}."
