"""The software backend: pyca/cryptography for RSA, AES and SM4, libcrypto for SM2."""

from hsmwrap.software.backend import SoftwareBackend
from hsmwrap.software.keyring import Keyring
from hsmwrap.software.keyring_file import KeyringFile

__all__ = ["Keyring", "KeyringFile", "SoftwareBackend"]
