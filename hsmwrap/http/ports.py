"""The interfaces that the HTTP layer needs; :mod:`hsmwrap.kms` implements them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Protocol

from hsmwrap.backend import Health
from hsmwrap.kms.access import AccessKeys, Caller


class KmsPort(Protocol):
    """The KMS as the HTTP layer uses it. Called from several threads at a time."""

    def execute(
        self, action: str, parameters: Mapping[str, str], caller: Caller, request_id: str
    ) -> dict[str, Any]:
        """Run an operation; raise a :class:`hsmwrap.errors.HsmwrapError` that is the answer."""

    def record_refusal(self, action: str, caller: Caller, request_id: str, code: str) -> None:
        """Audit a request that the protocol refused for an existing access key.

        ``code`` is the error's code, or the number of refusals that were not audited
        (:data:`hsmwrap.http.refusals.LEFT_OUT`); ``caller`` may be only a claim.
        """

    def health(self) -> Health:
        """Report the state without waiting for a lost HSM; the log gets ``facts``."""


class NonceStore(Protocol):
    """Used nonces, shared by all processes that serve the same access keys."""

    def use(self, access_key_id: str, nonce: str, expires_at: datetime) -> bool:
        """Mark the nonce as used, atomically; False if it was used before and has not expired."""


__all__ = ["AccessKeys", "Caller", "Health", "KmsPort", "NonceStore"]
