"""The PKCS#11 backend: wrapping keys and imported keys inside an HSM token."""

from hsmwrap.pkcs11.backend import Pkcs11Backend

__all__ = ["Pkcs11Backend"]
