"""Independent clients for the demo, the tests and plug-in authors.

They follow the documents and share no code with the backends. What a customer uses is
:mod:`hsmwrap.customer`; these are what it is compared with, and take what it refuses.

Key material is encrypted by the openssl command, and by gmssl for SM2's raw form; messages are
encrypted and decrypted by pyca/cryptography from the known key.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherAlgorithm, algorithms, modes
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hsmwrap import ccm
from hsmwrap.backend import MESSAGE_VERSION, MESSAGE_VERSION_CCM, NONCE_LENGTH, TAG_LENGTH
from hsmwrap.catalog import KeySpec, WrappingAlgorithm
from hsmwrap.customer import PADDINGS
from hsmwrap.errors import ConfigurationError, InvalidCiphertext

Encryptor = Callable[[WrappingAlgorithm, bytes, bytes], bytes]
"""(wrapping algorithm, DER SubjectPublicKeyInfo, key material) → encrypted key material."""


class ClientFailed(Exception):
    """An independent client failed, or its result differs from the backend's."""


@dataclass(frozen=True, slots=True)
class Client:
    """A client that encrypts key material for import; ``require`` raises if it is not installed."""

    name: str
    encrypt: Encryptor
    require: Callable[[], None]


_OAEP = ("rsa_padding_mode:oaep", "rsa_oaep_md:{0}", "rsa_mgf1_md:{0}")
_OPENSSL_OPTIONS: Mapping[WrappingAlgorithm, tuple[str, ...]] = MappingProxyType(
    {
        WrappingAlgorithm.RSAES_PKCS1_V1_5: ("rsa_padding_mode:pkcs1",),
        WrappingAlgorithm.RSAES_OAEP_SHA_1: tuple(o.format("sha1") for o in _OAEP),
        WrappingAlgorithm.RSAES_OAEP_SHA_256: tuple(o.format("sha256") for o in _OAEP),
        WrappingAlgorithm.SM2PKE: (),
    }
)
_SM2_POINT_LENGTH = 64


def openssl_encrypt(algorithm: WrappingAlgorithm, public_key: bytes, material: bytes) -> bytes:
    """Encrypt by ``openssl pkeyutl``: RSA, or SM2 in DER form (GM/T 0009).

    The material goes through a pipe, not through the command line or a file.

    Raises:
        ClientFailed: openssl refused the public key or failed.
    """
    with tempfile.TemporaryDirectory(prefix="hsmwrap-demo-") as directory:
        key_file = Path(directory, "wrapping-key.der")
        key_file.write_bytes(public_key)
        command = [_openssl(), "pkeyutl", "-encrypt", "-pubin", "-keyform", "DER"]
        command += ["-inkey", str(key_file)]
        for option in _OPENSSL_OPTIONS[algorithm]:
            command += ["-pkeyopt", option]
        done = subprocess.run(command, input=material, capture_output=True, check=False)  # noqa: S603 (fixed words and a path made here; no shell)
    if done.returncode:
        raise ClientFailed(f"openssl: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def pyca_encrypt(algorithm: WrappingAlgorithm, public_key: bytes, material: bytes) -> bytes:
    """Encrypt by pyca/cryptography, in this process: RSA only; the material may be empty.

    Raises:
        ClientFailed: pyca has no such algorithm, or refused the public key.
    """
    scheme = PADDINGS.get(algorithm)
    if scheme is None:
        raise ClientFailed(f"pyca has no {algorithm}")
    key = load_der_public_key(public_key)
    if not isinstance(key, RSAPublicKey):
        raise ClientFailed(f"{algorithm} is for RSA keys")
    return key.encrypt(material, scheme)


def gmssl_encrypt(algorithm: WrappingAlgorithm, public_key: bytes, material: bytes) -> bytes:
    """Encrypt by gmssl's SM2: raw C1 ‖ C3 ‖ C2 without the leading 04.

    For demonstration only: gmssl takes its scalar from the Mersenne Twister.

    Raises:
        ClientFailed: gmssl gave no ciphertext.
    """
    from gmssl.sm2 import CryptSM2  # noqa: PLC0415 (optional: only the demo needs it)

    if algorithm is not WrappingAlgorithm.SM2PKE:
        raise ClientFailed(f"gmssl has no {algorithm}")
    client = CryptSM2(private_key="", public_key="", mode=1)
    # Not through the constructor, whose lstrip("04") corrupts 1 in 8 public keys.
    client.public_key = public_key[-_SM2_POINT_LENGTH:].hex()
    ciphertext = client.encrypt(material)
    if ciphertext is None:
        raise ClientFailed("gmssl gave no ciphertext")
    return bytes(ciphertext)


def encrypt_message(
    spec: KeySpec,
    key: bytes,
    plaintext: bytes,
    additional_data: bytes,
    version: int = MESSAGE_VERSION,
) -> bytes:
    """Encrypt by pyca: version ‖ nonce (12) ‖ ciphertext ‖ tag (16), GCM, or CCM by version."""
    if version == MESSAGE_VERSION_CCM:
        return ccm.encrypt(*_blocks(spec, key), plaintext, additional_data)
    nonce = secrets.token_bytes(NONCE_LENGTH)
    encryptor = Cipher(_cipher(spec, key), modes.GCM(nonce)).encryptor()
    encryptor.authenticate_additional_data(additional_data)
    body = encryptor.update(plaintext) + encryptor.finalize()
    return bytes([MESSAGE_VERSION]) + nonce + body + encryptor.tag


def decrypt_message(spec: KeySpec, key: bytes, message: bytes, additional_data: bytes) -> bytes:
    """Decrypt by pyca what a backend encrypted.

    Raises:
        ClientFailed: Wrong version, key, additional data or tag.
    """
    if message[:1] == bytes([MESSAGE_VERSION_CCM]):
        try:
            return ccm.decrypt(*_blocks(spec, key), message, additional_data)
        except InvalidCiphertext:
            raise ClientFailed("the message does not decrypt under the known key") from None
    nonce, body, tag = message[1:][:NONCE_LENGTH], message[1:-TAG_LENGTH], message[-TAG_LENGTH:]
    body = body[NONCE_LENGTH:]
    if message[:1] != bytes([MESSAGE_VERSION]):
        raise ClientFailed("the message does not have the documented version")
    decryptor = Cipher(_cipher(spec, key), modes.GCM(nonce, tag)).decryptor()
    decryptor.authenticate_additional_data(additional_data)
    try:
        return decryptor.update(body) + decryptor.finalize()
    except InvalidTag:
        raise ClientFailed("the message does not decrypt under the known key") from None


def clients_of(algorithm: WrappingAlgorithm) -> tuple[Client, ...]:
    """Return the clients that can encrypt under ``algorithm``."""
    return (OPENSSL, GMSSL) if algorithm is WrappingAlgorithm.SM2PKE else (OPENSSL,)


def _blocks(spec: KeySpec, key: bytes) -> tuple[ccm.Blocks, ccm.Blocks]:
    """ECB, and CBC with an IV of zeros, by pyca."""
    ecb, cbc = modes.ECB(), modes.CBC(bytes(ccm.BLOCK))  # noqa: S305  # CCM is made of them
    return (
        lambda blocks: Cipher(_cipher(spec, key), ecb).encryptor().update(blocks),
        lambda blocks: Cipher(_cipher(spec, key), cbc).encryptor().update(blocks),
    )


def _cipher(spec: KeySpec, key: bytes) -> CipherAlgorithm:
    return algorithms.AES(key) if spec is KeySpec.ALIYUN_AES_256 else algorithms.SM4(key)


def _openssl() -> str:
    path = shutil.which("openssl")
    if path is None:
        raise ConfigurationError("the openssl command is not on the PATH: apt-get install openssl")
    return path


def _require_openssl() -> None:
    _openssl()


def _require_gmssl() -> None:
    try:
        import gmssl.sm2  # noqa: F401, PLC0415 (only whether it is there)
    except ImportError as error:
        raise ConfigurationError(
            f"the package gmssl is needed as a second SM2 client ({error}): "
            "pip install '.[gmssl]' in a clone of hsmwrap"
        ) from None


OPENSSL = Client("openssl", openssl_encrypt, _require_openssl)
GMSSL = Client("gmssl", gmssl_encrypt, _require_gmssl)
