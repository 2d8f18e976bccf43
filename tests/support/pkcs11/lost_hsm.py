"""Scenarios of an HSM that becomes unavailable, and of a module that cannot lock.

Usage: python -m support.pkcs11.lost_hsm SCENARIO SHIM_DIRECTORY SETTINGS
"""

import contextlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import HsmUnavailable, TokenSelectionError
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.testing.faults import CKR
from support.faults.shim import fault_shim


def unavailable(backend):
    try:
        backend.mac(b"data")
    except HsmUnavailable:
        return True
    return False


def wait_until_back(backend):
    for _ in range(1000):
        if not unavailable(backend):
            return
        time.sleep(0.01)
    raise AssertionError("the backend did not come back")


def comes_back(shim, settings, *, sticky=False):
    backend = Pkcs11Backend.from_settings(settings)
    mac = backend.mac(b"data")
    generation = backend.health().facts["generation"]
    shim.remove_device(sticky=sticky)
    assert unavailable(backend)
    before = shim.counters()
    assert unavailable(backend)  # fails fast: the breaker is open, nothing is called
    assert shim.counters().calls_since(before) == {}
    assert not backend.health().ready
    shim.restore_device()
    wait_until_back(backend)
    backend.verify_mac(b"data", mac)
    assert backend.health().facts["generation"] > generation
    assert backend.health().ready
    backend.close()
    assert shim.counters().held == (0, 0, 0), shim.counters().held


def sticky(shim, settings):
    comes_back(shim, settings, sticky=True)


def lazy_start(shim, settings):
    shim.remove_device()
    with contextlib.suppress(TokenSelectionError):
        Pkcs11Backend.from_settings(settings)
        raise AssertionError("started without an HSM, which was not configured")
    backend = Pkcs11Backend.from_settings(settings | {"lazy": True})
    assert not backend.health().ready
    assert unavailable(backend)
    shim.restore_device()
    wait_until_back(backend)
    backend.close()


def logged_out(shim, settings):
    """Another program logs the application out: private objects are then not found, not refused."""
    backend = Pkcs11Backend.from_settings(settings)
    capabilities = backend.capabilities()
    mac = backend.mac(b"data")
    connection = backend._connection
    backend._keys._current = None
    connection.run(log_out)
    backend.verify_mac(b"data", mac)
    assert backend.capabilities() == capabilities
    assert backend.health().facts["recoveries"]["USER_NOT_LOGGED_IN"] >= 1
    backend.close()


def cannot_lock(shim, settings):
    """Then SoftHSM itself locks nothing, and threads inside it at once crash it."""
    shim.fail("C_Initialize", CKR.CANT_LOCK)
    with Pkcs11Backend.from_settings(settings | {"sessions": 8}) as backend:
        assert backend.health().facts["one_at_a_time"]
        backend.capabilities()

        def work(_):
            for _ in range(25):
                issue(backend)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(8)))
    counted = shim.counters()
    assert counted.initialized_without_locking == 1
    assert counted.initialized_with_locking == 0
    assert counted.concurrent_high_water == 1


def issue(backend):
    key = backend.generate_wrapping_key(
        WrappingKeySpec.EC_SM2,
        WrappingAlgorithm.SM2PKE,
        expires_at=datetime.now(UTC) + timedelta(hours=1),
    )
    backend.discard_wrapping_key(key.private_key)


def log_out(pooled):
    import ctypes

    host = ctypes.CDLL(str(shim.path))
    pointer = ctypes.POINTER(ctypes.c_void_p)()
    host.C_GetFunctionList(ctypes.byref(pointer))
    logout = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong)(pointer[1 + 19])
    assert logout(pooled.session.handle) == 0
    pooled.tainted = True


if __name__ == "__main__":
    settings = json.loads(sys.argv[3])
    shim = fault_shim(settings["module"], sys.argv[2])
    globals()[sys.argv[1]](shim, settings | {"module": str(shim.path)})
