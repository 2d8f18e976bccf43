"""The software backend: pyca/cryptography for RSA, AES and SM4, libcrypto for SM2."""

from hsmwrap.software._backend import SoftwareBackend
from hsmwrap.software._keyring import Keyring
from hsmwrap.software._keyring_file import KeyringFile

__all__ = ["Keyring", "KeyringFile", "SoftwareBackend"]
