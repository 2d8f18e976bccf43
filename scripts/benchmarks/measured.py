"""The measured backend: a backend, an import service over it, and the measured operations."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any
from unittest import mock

from cryptography.hazmat.primitives.asymmetric import rsa as pyca_rsa

from benchmarks import clients
from benchmarks.timing import Side, search
from hsmwrap import registry, tokens
from hsmwrap.backend import Backend, ReapsWrappingKeys, WrappingKey
from hsmwrap.catalog import KeySpec, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import ConfigurationError
from hsmwrap.imports import (
    TOKEN_LIFETIME,
    Cmk,
    ImportParameters,
    ImportService,
    KeySource,
    ResidentBounds,
    generate_inline,
)
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.wrapping import rsa as pkcs11_rsa
from hsmwrap.policy import Deployment
from hsmwrap.tokens import ImportTokenClaims

KEY_SPEC = KeySpec.ALIYUN_AES_256
LEVEL = ProtectionLevel.HSM
MOST_THREADS = 16
NO_BOUND = 10**9
"""Of failed imports and resident wrapping keys: more than are measured."""


@dataclass(frozen=True, slots=True)
class Issued:
    """Parameters for import, and key material encrypted to them."""

    cmk: Cmk
    parameters: ImportParameters
    claims: ImportTokenClaims
    material: bytes
    ciphertext: bytes


class MeasuredBackend:
    """One backend, serving CMKs of protection level HSM."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.service = self.service_with(generate_inline)

    def service_with(self, source: KeySource) -> ImportService:
        """An import service that takes its wrapping keys from ``source``."""
        return ImportService(
            {LEVEL: self.backend},
            Deployment(),
            key_source=source,
            resident_bounds=ResidentBounds(NO_BOUND, NO_BOUND),
        )

    def issue_side(self, spec: WrappingKeySpec, algorithm: WrappingAlgorithm) -> Side:
        """GetParametersForImport, with inline key generation."""
        call = partial(self.service.get_parameters_for_import, new_cmk(), spec, algorithm)
        return Side(call, self.discard)

    def import_side(self, issued: Issued) -> Side:
        """ImportKeyMaterial, always with the same import token."""
        token, ciphertext = issued.parameters.import_token, issued.ciphertext
        return Side(partial(self.service.import_key_material, issued.cmk, ciphertext, token))

    def issue(self, spec: WrappingKeySpec, algorithm: WrappingAlgorithm) -> Issued:
        """Issue parameters and encrypt key material to them."""
        cmk = new_cmk()
        parameters = self.service.get_parameters_for_import(cmk, spec, algorithm)
        return self.encrypted(cmk, parameters)

    def encrypted(self, cmk: Cmk, parameters: ImportParameters) -> Issued:
        """Encrypt key material to these parameters."""
        material = secrets.token_bytes(KEY_SPEC.material_length)
        ciphertext = clients.encrypt(parameters.algorithm, parameters.public_key, material)
        return Issued(cmk, parameters, self.claims(parameters), material, ciphertext)

    def claims(self, parameters: ImportParameters) -> ImportTokenClaims:
        """The claims of the import token."""
        return tokens.decode(parameters.import_token, self.backend.verify_mac)

    def discard(self, parameters: ImportParameters) -> None:
        """Remove a resident wrapping key."""
        self.backend.discard_wrapping_key(self.claims(parameters).private_key)

    def reap_all(self) -> None:
        """Remove all resident wrapping keys, as if they had expired."""
        if reaper := ReapsWrappingKeys.of(self.backend):
            reaper.reap(datetime.now(UTC) + 2 * TOKEN_LIFETIME)


def cycling(keys: Iterable[WrappingKey]) -> KeySource:
    """A key source that reuses a few pairs.

    Generating 100,000 RSA pairs takes hours. The import tokens over these few are still distinct:
    token id, CMK and MAC differ.
    """
    following = itertools.cycle(keys)
    return lambda *_args, **_kwargs: next(following)


def new_cmk() -> Cmk:
    """A CMK with a random id."""
    return Cmk(f"bench-{secrets.token_hex(8)}", KEY_SPEC, LEVEL)


def token_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """Settings for the HSM token of softhsm/init-token; makes a key set if there is none.

    Raises:
        ConfigurationError: The environment describes no token.
    """
    names = ("HSMWRAP_PKCS11_MODULE", "HSMWRAP_TOKEN_LABEL", "HSMWRAP_PIN_FILE")
    if missing := [name for name in names if not environment.get(name)]:
        raise ConfigurationError(f"no HSM token: {', '.join(missing)} not set; run scripts/bench")
    module, label, pin_file = (environment[name] for name in names)
    settings = {"module": module, "token_label": label, "pin_file": pin_file}
    if not Pkcs11Backend.list_keys(settings):
        so_pin_file = environment.get("HSMWRAP_SO_PIN_FILE")
        Pkcs11Backend.initialise_keys(settings, so_pin_file=so_pin_file)
    return {**settings, "sessions": MOST_THREADS}


@contextmanager
def open_measured_backends(
    settings: Mapping[str, Any],
) -> Iterator[tuple[MeasuredBackend, MeasuredBackend]]:
    """Open both backends, software first; from now on prime searches are timed separately."""
    with ExitStack() as stack:
        _time_searches(stack.enter_context)
        software = registry.open_backend("software", {"serve_hsm_level": True})
        hsm = registry.open_backend("pkcs11", settings)
        yield (
            MeasuredBackend(stack.enter_context(software)),
            MeasuredBackend(stack.enter_context(hsm)),
        )


def _time_searches(enter: Callable[[Any], Any]) -> None:
    for module, name in ((pkcs11_rsa, "generate"), (pyca_rsa, "generate_private_key")):
        enter(mock.patch.object(module, name, search(getattr(module, name))))
