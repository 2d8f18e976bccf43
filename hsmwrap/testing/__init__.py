"""For tests of backends (plug-in authors) and of what embeds hsmwrap.

* :class:`MemoryBackend`: a complete backend without an HSM.
* :mod:`~hsmwrap.testing.conformance`: the kit that every backend passes.
* :mod:`~hsmwrap.testing.faults`: a shim in front of any PKCS#11 module, which fails on command.
* :mod:`~hsmwrap.testing.clients`: clients that encrypt key material without hsmwrap's code.
* :mod:`~hsmwrap.testing.hostile`: forged ciphertexts.
* :mod:`~hsmwrap.testing.softhsm`: a private SoftHSM2 token; ``pytest_hsmwrap`` has the fixtures.
"""

from hsmwrap.testing.memory import MemoryBackend

__all__ = ["MemoryBackend"]
