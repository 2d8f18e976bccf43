"""The PKCS#11 backend: wrapping keys and imported keys inside an HSM token.

``binding`` is python-pkcs11 and all that works around it; ``token`` finds the HSM token and logs
in; ``settings`` is the table of settings; ``sessions`` lends sessions and recovers; ``keysets``
keeps the backend's own keys; ``wrapping`` makes wrapping keys and key material; ``backend`` puts
them together. Each room imports only those named before it.
"""

from hsmwrap.pkcs11.backend import Pkcs11Backend

__all__ = ["Pkcs11Backend"]
