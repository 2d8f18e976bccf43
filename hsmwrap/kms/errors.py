"""Errors of the reference KMS, with the API's codes, statuses and messages.

They extend :mod:`hsmwrap.errors`: code that handles :class:`~hsmwrap.errors.HsmwrapError` handles
these too.
"""

from __future__ import annotations

from hsmwrap.errors import HsmError, HsmwrapError, ServiceUnavailable


class InvalidAction(HsmwrapError):
    """The API has no such operation."""

    code = "InvalidAction.NotFound"
    http_status = 404
    _api_message = "Specified api is not found, please check your url and method."


class NoPermission(HsmwrapError):
    """The access key lacks the permission; the error does not tell whether the key exists."""

    code = "Forbidden.NoPermission"
    http_status = 403
    _api_message = "This operation is forbidden by permission system."


class AccessKeyNotFound(HsmwrapError):
    """The access key does not exist."""

    code = "InvalidAccessKeyId.NotFound"
    http_status = 404
    _api_message = "The AccessKey ID provided does not exist in our records."


class KeyVersionNotFound(HsmwrapError):
    """The key does not have a version of this id."""

    code = "Forbidden.KeyVersionNotFound"
    http_status = 404
    _api_message = "The specified Key version is not found."


class AliasNotFound(HsmwrapError):
    """No key has this alias, or the alias is another key's meanwhile."""

    code = "Forbidden.AliasNotFound"
    http_status = 404
    _api_message = "The specified Alias is not found."


class AliasAlreadyExists(HsmwrapError):
    """A key has this alias already; UpdateAlias gives it to another key."""

    code = "AliasAlreadyExists"
    http_status = 400
    _api_message = "AliasName Already Exists."


class UnsupportedAlias(HsmwrapError):
    """This operation takes a key id or an ARN, and no alias."""

    code = "Unsupported.Alias"
    http_status = 400
    _api_message = "Alias is not valid for this api."


class StateModifiedFailed(HsmwrapError):
    """The key's state does not allow this change."""

    code = "Rejected.StateModifiedFailed"
    http_status = 409
    _api_message = "Keystate modified failed."


class RejectedDisabled(HsmwrapError):
    """The key is disabled; enable it first."""

    code = "Rejected.Disabled"
    http_status = 409
    _api_message = "The request was rejected because the key state is Disabled."


class RejectedPendingDeletion(HsmwrapError):
    """The key is scheduled for deletion; cancel that first."""

    code = "Rejected.PendingDeletion"
    http_status = 409
    _api_message = "The request was rejected because the key state is PendingDeletion."


class RejectedPendingImport(HsmwrapError):
    """The key has no material; import it first."""

    code = "Rejected.PendingImport"
    http_status = 409
    _api_message = "The request was rejected because the key state is PendingImport."


class DryRunOperationError(HsmwrapError):
    """The request would have succeeded without DryRun."""

    code = "DryRunOperationError"
    http_status = 400
    _api_message = "The request would have succeeded, but the DryRun parameter is set."


class ValidationError(HsmwrapError):
    """In a dry run: a parameter is missing or wrong; the text is that of the error without one."""

    code = "ValidationError"
    http_status = 400
    _api_message = "The parameters specified in the request are invalid."


class AccessDeniedError(HsmwrapError):
    """In a dry run: the access key lacks the permission."""

    code = "AccessDeniedError"
    http_status = 403
    _api_message = "You are not authorized to perform this operation on the KMS resource."


class KeyUnusable(HsmError):
    """The backend does not have this key, or is not configured here; the text says why."""

    code = "Rejected.Unavailable"
    http_status = 409
    _api_message = "The request was rejected because the key state is Unavailable."


class LeaseLost(ServiceUnavailable):
    """An import took longer than its lease and its object is being destroyed; import again."""


class CommitUnknown(ServiceUnavailable):
    """The database failed during the commit; the operation may have happened or not."""
