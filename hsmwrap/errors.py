"""Errors: flat exceptions, each with its KMS code and HTTP status.

Codes, statuses and messages are those of Alibaba Cloud KMS 2016-01-20. ``str(error)`` is for the
operator and says what was wrong and what would be right; ``api_message`` is the API's own text
for the client. Neither ever holds a secret.

One error is silent on purpose: :class:`InvalidKeyMaterial`. Whatever keeps a client's ciphertext
from becoming a key (padding, curve point, hash, length, another key than last time) raises it
with the same text, because every difference is an oracle (Bleichenbacher 1998, Manger 2001).
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterable
from typing import ClassVar, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class HsmwrapError(Exception):
    """Base of every error that hsmwrap raises on purpose.

    Attributes:
        code: The KMS error code, for example ``InvalidImportToken``.
        http_status: The HTTP status that the KMS API answers with this code.
        retryable: True where the same call may succeed later without a change.
    """

    code: ClassVar[str] = "InternalFailure"
    http_status: ClassVar[int] = 500
    retryable: bool = False
    _api_message: ClassVar[str] = "Internal Failure."

    @property
    def api_message(self) -> str:
        """The API's own message for this code (safe to send to a client)."""
        return self._api_message


# --- what the caller of the API did wrong -----------------------------------------------------


class InvalidParameter(HsmwrapError):
    """A parameter has a value that the API does not accept."""

    code = "InvalidParameter"
    http_status = 400

    def __init__(self, name: str, detail: str) -> None:
        """Name the API parameter (``WrappingKeySpec``) and say what would be right."""
        super().__init__(f"{name}: {detail}")
        self.name = name

    @property
    def api_message(self) -> str:
        """The API's message, with the parameter's name."""
        return f'The specified parameter "{self.name}" is not valid.'


class MissingParameter(HsmwrapError):
    """A parameter that the operation needs was not given."""

    code = "MissingParameter"
    http_status = 400

    def __init__(self, name: str) -> None:
        """Name the API parameter that is missing."""
        super().__init__(f"{name} is needed but was not given")
        self.name = name

    @property
    def api_message(self) -> str:
        """The API's message, with the parameter's name."""
        return f'The parameter "{self.name}" is needed but not provided.'


class CombinationRefused(InvalidParameter):
    """The compatibility table refuses this combination; ``rule`` names the row that does."""

    def __init__(self, name: str, rule: str, detail: str) -> None:
        """Name the offending API parameter, the refusing rule, and what would be right."""
        super().__init__(name, detail)
        self.rule = rule


class UnsupportedOrigin(HsmwrapError):
    """The CMK's key material is made by the KMS; only Origin EXTERNAL takes imports."""

    code = "Unsupported.Origin"
    http_status = 400
    _api_message = "This key origin is not valid for this api."


class UnsupportedProtectionLevel(HsmwrapError):
    """No key of this protection level can exist in this deployment."""

    code = "Unsupported.ProtectionLevel"
    http_status = 400
    _api_message = "This protection level is not valid for this region"

    def __init__(self, rule: str, detail: str) -> None:
        """Name the refusing rule and what would be right."""
        super().__init__(detail)
        self.rule = rule


class InvalidImportToken(HsmwrapError):
    """The import token is not one of ours, was changed, or belongs to another CMK or backend."""

    code = "InvalidImportToken"
    http_status = 400
    _api_message = "import token is invalid."


class ExpiredImportToken(HsmwrapError):
    """The import token is authentic, but its 24 hours are over: ask for new parameters."""

    code = "ExpiredImportToken"
    http_status = 400
    _api_message = "import token is expired."


class InvalidKeyMaterial(HsmwrapError):
    """The encrypted key material did not yield the key that this CMK needs. Never says why."""

    code = "InvalidKeyMaterial"
    http_status = 400
    _api_message = "key material is invalid."

    def __init__(self) -> None:
        """Take nothing: every failure to unwrap looks the same."""
        super().__init__("key material is invalid.")


class InvalidCiphertext(InvalidParameter):
    """A ciphertext does not decrypt under this key and this additional data."""

    def __init__(self) -> None:
        """Take nothing: wrong key, wrong additional data and damage look the same."""
        super().__init__("CiphertextBlob", "does not decrypt under this key and additional data")


class InvalidMac(HsmwrapError):
    """A message authentication code is not right for its data, or its key set is not known here.

    No client sees it: what carries the code (an import token) has an error of its own.
    """


class UnsupportedOperation(HsmwrapError):
    """The backend can keep this key but not do this with it; its capabilities say so as well."""

    code = "UnsupportedOperation"
    http_status = 400
    _api_message = "This operation is not supported for this key."


class TooManyWrappingKeys(HsmwrapError):
    """Too many wrapping keys are objects in the HSM already; they go when their tokens expire."""

    code = "Throttling.WrappingKeys"
    http_status = 429
    _api_message = "There are too many import tokens; wait until some have expired."


class KeyNotFound(HsmwrapError):
    """The key that this reference names is not in the backend (any more)."""

    code = "Forbidden.KeyNotFound"
    http_status = 404
    _api_message = "The specified Key is not found."


# --- what the operator has to mend ------------------------------------------------------------


class ConfigurationError(HsmwrapError):
    """The configuration cannot be used as it is; the text says what to change."""


class BackendLoadError(ConfigurationError):
    """A backend plug-in could not be found, imported or accepted; the text names it."""


class TokenSelectionError(ConfigurationError):
    """Not exactly one HSM token matches the configuration; the text lists those present.

    Retryable where none matches: its slot may list it later.
    """

    def __init__(self, detail: str, *, absent: bool = False) -> None:
        """List the HSM tokens that are there; ``absent`` says that none of them matches."""
        super().__init__(detail)
        self.retryable = absent


class PinError(HsmwrapError):
    """The HSM token refused the PIN, or one more wrong try may lock it. Never retried."""


class SelfTestFailed(HsmwrapError):
    """A known-answer test failed: this engine must not be used."""


# --- what passes by itself --------------------------------------------------------------------


class ServiceUnavailable(HsmwrapError):
    """The backend cannot answer now; the same call may succeed later."""

    code = "ServiceUnavailableTemporary"
    http_status = 503
    retryable = True
    _api_message = "Service Unavailable Temporary."


class PoolTimeout(ServiceUnavailable):
    """No session became free within the deadline: more load than the pool was sized for."""


class HsmUnavailable(ServiceUnavailable):
    """The HSM is unavailable (removed, rebooting, unreachable); calls fail until it is back."""


class HsmResourceExhausted(ServiceUnavailable):
    """The HSM has no memory or no sessions left."""


class BackendClosed(ServiceUnavailable):
    """The backend was closed; this process must open a new one."""

    retryable = False


class HsmError(HsmwrapError):
    """The HSM answered with a return code that nothing here recovers from; the text names it."""


class ProtectionNotKept(HsmError):
    """The HSM made a key that is less protected than what was asked for; it was destroyed."""

    def __init__(self, attributes: Iterable[str]) -> None:
        """Name the attributes in which it differs (``CKA_SENSITIVE``)."""
        names = ", ".join(attributes)
        super().__init__(
            f"the HSM token made a key with another {names} than was asked for, and does not "
            "change it; the key was destroyed"
        )


# --- no secret in a traceback ---------------------------------------------------------------------


def strip_tracebacks(call: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorate a call that handles secrets: an exception from it keeps none of its frames.

    A traceback holds the variables of every frame that it passed, and ``raise … from None`` still
    holds the error before it: keys and plaintext, for whatever records variables with errors. So
    the error is raised again from a frame without any. One that was not raised on purpose gets a
    note that says where it came from, since its traceback no longer does.
    """

    @functools.wraps(call)
    def guarded(*arguments: _P.args, **named: _P.kwargs) -> _T:
        try:
            return call(*arguments, **named)
        except BaseException as caught:  # noqa: BLE001  # whatever it is, it has frames
            error = _alone(caught)
        del arguments, named
        try:
            raise error
        finally:
            del error  # which refers to this frame: nothing to collect

    return guarded


def _alone(error: BaseException) -> BaseException:
    """The error without the frames that it passed and without the errors before it."""
    if not isinstance(error, HsmwrapError):
        innermost = traceback.extract_tb(error.__traceback__)[-1]
        error.add_note(f"at {innermost.filename}:{innermost.lineno}, in {innermost.name}")
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error
