"""Certificates that are made for a test; each signs itself."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

DAY = timedelta(days=1)
NAMES = [x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))]


class Certificate:
    """PEM of a certificate for ``localhost`` and 127.0.0.1, and of its key."""

    def __init__(self, begins: timedelta = -DAY, ends: timedelta = DAY, key=None) -> None:
        key = key or ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        now = datetime.now(UTC)
        self._key = key
        made = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
            .add_extension(x509.SubjectAlternativeName(NAMES), critical=False)
            .sign(key, hashes.SHA256())
        )
        self.certificate = made.public_bytes(Encoding.PEM)
        self.der = made.public_bytes(Encoding.DER)
        self.key = self.key_under(None)

    def key_under(self, passphrase: bytes | None) -> bytes:
        how = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)

    def write(self, directory: Path, key: bytes | None = None) -> tuple[Path, Path]:
        """Both files, each replaced at once."""
        files = directory / "certificate.pem", directory / "key.pem"
        for file, content in zip(files, (self.certificate, key or self.key), strict=True):
            beside = file.with_suffix(".new")
            beside.write_bytes(content)
            beside.chmod(0o400)
            beside.replace(file)
        return files
