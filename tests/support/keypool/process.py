"""A process with a pool on a PKCS#11 token: takes SM2 pairs, says which, and waits to be ended.

Arguments: the backend's settings as JSON, how many pairs to take. Ends when stdin does.
"""

import json
import sys
from datetime import UTC, datetime, timedelta

from hsmwrap import registry
from hsmwrap.keypool import KeyPool, PoolSettings
from support.keypool.fakes import SM2, wait_for

settings, count = json.loads(sys.argv[1]), int(sys.argv[2])
backend = registry.open_backend("pkcs11", settings)
with backend, KeyPool(PoolSettings(high_water=4, low_water=3)) as pool:
    pool.prepare(backend, [SM2])
    wait_for(pool, lambda p: p.facts()[0].level == 4)
    wanted = datetime.now(UTC) + timedelta(hours=24)
    for _ in range(count):
        print(pool(backend, *SM2, wanted).public_key.hex())
    wait_for(pool, lambda p: p.facts()[0].level == 4)
    print("full", flush=True)
    sys.stdin.read()
