"""A process that ends while its threads use the module, without having closed the backend.

Usage: python -m support.pkcs11.leaving SETTINGS; prints how many calls were inside at the end.
"""

import atexit
import json
import sys
import threading
import time

inside = set()


@atexit.register  # before hsmwrap's, and so called after them
def report():
    time.sleep(0.1)
    print(len(inside))


def use_the_module(backend):
    def operation(pooled):
        inside.add(threading.get_ident())
        pooled.session.generate_random(64)
        time.sleep(0.05)
        pooled.session.generate_random(64)
        inside.discard(threading.get_ident())

    while True:
        backend._connection.run(operation)


if __name__ == "__main__":
    from hsmwrap.pkcs11 import Pkcs11Backend

    opened = Pkcs11Backend.from_settings(json.loads(sys.argv[1]))
    for _ in range(6):
        threading.Thread(target=use_the_module, args=(opened,), daemon=True).start()
    while len(inside) < 6:
        time.sleep(0.01)
