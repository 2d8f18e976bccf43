"""Run one operation on a KMS and die by SIGKILL at a step. Arguments: one JSON object."""

import json
import os
import signal
import sys
from functools import partial

from hsmwrap.registry import open_backend
from support.kms.fakes import ADMIN, Client, Clock, DirectoryBackend, build_kms

OPENERS = {"file": DirectoryBackend.from_settings, "pkcs11": partial(open_backend, "pkcs11")}


def main(*, url, backend, audit_file, die_at, sweep_days, action, parameters):
    clock = Clock()
    reached = []

    def step(name):
        reached.append(name)
        if name == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    kms = build_kms(url, OPENERS[backend[0]](backend[1]), audit_file, clock, step=step)
    if sweep_days:
        clock.advance(days=sweep_days)
        kms.sweep()
    else:
        Client(kms, ADMIN)(action, **parameters)
    kms.close()
    sys.stdout.write(json.dumps(reached))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
