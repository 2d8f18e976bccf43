"""The server's TLS certificate and private key, read again when their files change.

The key is a private file (:mod:`hsmwrap.privatefile`). OpenSSL reads both from memory, so what was
checked is what is served, and the key is in no temporary file.
"""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from hsmwrap.errors import ConfigurationError, strip_tracebacks
from hsmwrap.privatefile import PrivateFile

if TYPE_CHECKING:
    from hsmwrap.kms.config import ServerConfig

_Stamp = tuple[int, ...]


class Tls:
    """A certificate with its key, from two PEM files; TLS 1.2 and newer."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Read both files.

        Args:
            certificate: The server's certificate, then those of the authorities between it and the
                root; PEM.
            key: Its private key, a private file; PEM, without a passphrase.

        Raises:
            ConfigurationError: A file cannot be read, the key is not the certificate's, or the
                certificate is not valid now.
        """
        self._certificate, self._key = certificate, PrivateFile(key, "tls_key_file")
        self._tried = self._seen = self._stamps()
        self._context = self._load()

    def current(self) -> ssl.SSLContext:
        """What the next connection is encrypted with; another object after a reload."""
        return self._context

    def refresh(self, *, at_once: bool = False) -> bool:
        """Read the files again if they changed; True if they did, and are in use now.

        Connections that are open go on with what they began with.

        Args:
            at_once: Without it a change counts when it is seen twice, because the two files may be
                replaced one after the other.

        Raises:
            ConfigurationError: What they hold now is wrong, as for the class: nothing changes. It
                is raised once for each change.
        """
        stamps = self._stamps()
        seen, self._seen = self._seen, stamps
        if stamps == self._tried or (stamps != seen and not at_once):
            return False
        self._tried = stamps
        self._context = self._load()
        return True

    def _stamps(self) -> tuple[_Stamp, ...]:
        return tuple(_stamp(path) for path in (self._certificate, self._key.path))

    @strip_tracebacks
    def _load(self) -> ssl.SSLContext:
        chain = self._read_chain()
        pem = self._key.read_erasable()
        try:
            self._require_key_of(chain, pem)
            return self._make_context(chain, pem)
        finally:
            pem[:] = bytes(len(pem))

    def _read_chain(self) -> bytes:
        """The certificates as PEM; the first one is valid now."""
        where = f"tls_certificate_file {self._certificate}"
        try:
            chain = self._certificate.read_bytes()
            first = x509.load_pem_x509_certificates(chain)[0]
        except OSError as error:
            raise ConfigurationError(f"{where}: {error.strerror}") from None
        except ValueError:
            raise ConfigurationError(f"{where}: is not a certificate in PEM") from None
        now = datetime.now(UTC)
        if now >= first.not_valid_after_utc:
            ended = first.not_valid_after_utc
            raise ConfigurationError(f"{where}: expired at {ended:%Y-%m-%dT%H:%M:%SZ}; renew it")
        if now < first.not_valid_before_utc:
            begins = first.not_valid_before_utc
            raise ConfigurationError(
                f"{where}: is not valid before {begins:%Y-%m-%dT%H:%M:%SZ}; is the clock right?"
            )
        return chain

    def _require_key_of(self, chain: bytes, pem: bytearray) -> None:
        try:
            key = load_pem_private_key(pem, None)
        except TypeError:
            raise ConfigurationError(
                f"{self._key}: has a passphrase; give it without one (openssl pkey -in … -out …)"
            ) from None
        except (ValueError, UnsupportedAlgorithm):
            raise ConfigurationError(f"{self._key}: is not a private key in PEM") from None
        if key.public_key() != x509.load_pem_x509_certificates(chain)[0].public_key():
            raise ConfigurationError(
                f"{self._key}: is not the key of the first certificate of {self._certificate}; the "
                "server's own certificate comes first there"
            )

    def _make_context(self, chain: bytes, pem: bytearray) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        memory = os.memfd_create("tls")
        try:
            for part in (chain, b"\n", pem):
                os.write(memory, part)
            context.load_cert_chain(f"/proc/self/fd/{memory}", password="")
        except ssl.SSLError as error:  # as a key that is too short for OpenSSL's security level
            raise ConfigurationError(
                f"tls_certificate_file {self._certificate}: OpenSSL refuses it ({error.reason})"
            ) from None
        finally:
            os.close(memory)
        return context


@strip_tracebacks
def open_tls(config: ServerConfig) -> Tls | None:
    """The configured certificate and key; None: none are.

    Raises:
        ConfigurationError: Only one of the two is given, or as :class:`Tls`.
    """
    certificate, key = config.tls_certificate_file, config.tls_key_file
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigurationError("give tls_certificate_file and tls_key_file together, or neither")
    return Tls(certificate, key)


def _stamp(path: str | os.PathLike[str]) -> _Stamp:
    """Differs after a file was replaced or changed; empty where there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116 (also of a path that is text)
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
