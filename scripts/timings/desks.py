"""Where imports are measured: an import service in this process, and a KMS over HTTP."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from benchmarks import clients
from benchmarks.kms import ServedKms, serving
from benchmarks.load import Failed
from benchmarks.measured import KEY_SPEC, LEVEL, NO_BOUND, new_cmk

from hsmwrap import registry
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import InvalidKeyMaterial
from hsmwrap.imports import ImportService
from hsmwrap.policy import Deployment

Try = Callable[[], object]
"""One import, prepared as far as a client can."""


class Wrapped(Protocol):
    """A CMK that has material, and a wrapping key for another import.

    Attributes:
        public_key: DER SubjectPublicKeyInfo.
        material: The material that the CMK has.
    """

    public_key: bytes
    material: bytes

    def prepare(self, ciphertext: bytes) -> Try:
        """The import of this ciphertext; it succeeds or fails without an exception."""


class Desk(Protocol):
    """Makes CMKs that have material."""

    def wrapped(self, algorithm: WrappingAlgorithm) -> Wrapped:
        """A new one, and a wrapping key for ``algorithm``."""


def spec_of(algorithm: WrappingAlgorithm) -> WrappingKeySpec:
    """The wrapping key spec of an algorithm."""
    sm2 = algorithm is WrappingAlgorithm.SM2PKE
    return WrappingKeySpec.EC_SM2 if sm2 else WrappingKeySpec.RSA_2048


class _InProcess:
    """An import service over a backend."""

    def __init__(self, service: ImportService, algorithm: WrappingAlgorithm) -> None:
        cmk = new_cmk()
        parameters = service.get_parameters_for_import(cmk, spec_of(algorithm), algorithm)
        self.public_key = parameters.public_key
        self.material = secrets.token_bytes(KEY_SPEC.material_length)
        self._import = partial(service.import_key_material, import_token=parameters.import_token)
        ciphertext = clients.encrypt(algorithm, self.public_key, self.material)
        imported = self._import(cmk, ciphertext).imported
        self._cmk = replace(cmk, check_value=imported.check_value)

    def prepare(self, ciphertext: bytes) -> Try:
        """The import of this ciphertext."""
        return partial(self._try, ciphertext)

    def _try(self, ciphertext: bytes) -> None:
        with suppress(InvalidKeyMaterial):
            self._import(self._cmk, ciphertext)


class _OverHttp:
    """A KMS behind ``hsmwrap serve``."""

    def __init__(self, kms: ServedKms, algorithm: WrappingAlgorithm) -> None:
        self._kms = kms
        made = {"Origin": "EXTERNAL", "KeySpec": str(KEY_SPEC), "ProtectionLevel": str(LEVEL)}
        key_id = kms.call("CreateKey", made)["KeyMetadata"]["KeyId"]
        row = {"WrappingKeySpec": str(spec_of(algorithm)), "WrappingAlgorithm": str(algorithm)}
        issued = kms.call("GetParametersForImport", {"KeyId": key_id, **row})
        self.public_key = base64.b64decode(issued["PublicKey"])
        self.material = secrets.token_bytes(KEY_SPEC.material_length)
        self._parameters = {
            "KeyId": key_id,
            "ImportToken": issued["ImportToken"],
            "KeyMaterialExpireUnix": "0",
        }
        first = self._request(clients.encrypt(algorithm, self.public_key, self.material))
        kms.call("ImportKeyMaterial", first)

    def prepare(self, ciphertext: bytes) -> Try:
        """The signed request with this ciphertext."""
        call = self._kms.prepare(0, "ImportKeyMaterial", self._request(ciphertext))
        return partial(_refused, call)

    def _request(self, ciphertext: bytes) -> dict[str, str]:
        encoded = base64.b64encode(ciphertext).decode()
        return self._parameters | {"EncryptedKeyMaterial": encoded}


def _refused(call: Try) -> None:
    try:
        call()
    except Failed as error:
        if "InvalidKeyMaterial" not in str(error):
            raise


class _LocalDesk:
    def __init__(self, service: ImportService) -> None:
        self._service = service

    def wrapped(self, algorithm: WrappingAlgorithm) -> Wrapped:
        return _InProcess(self._service, algorithm)


class _HttpDesk:
    def __init__(self, kms: ServedKms) -> None:
        self._kms = kms

    def wrapped(self, algorithm: WrappingAlgorithm) -> Wrapped:
        return _OverHttp(self._kms, algorithm)


@contextmanager
def in_process(plugin: str, settings: Mapping[str, Any]) -> Iterator[Desk]:
    """An import service over this backend."""
    with registry.open_backend(plugin, settings) as backend:
        yield _LocalDesk(ImportService({LEVEL: backend}, Deployment(), max_failed_imports=NO_BOUND))


@contextmanager
def over_http(plugin: str, settings: Mapping[str, Any]) -> Iterator[Desk]:
    """A KMS with this backend, behind ``hsmwrap serve``."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="hsmwrap-timing-")))
        ports = stack.enter_context(serving(directory, settings, 0, plugin))
        yield _HttpDesk(stack.enter_context(ServedKms(*ports, 1)))


DESKS = {"in process": in_process, "http": over_http}
