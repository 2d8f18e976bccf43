"""One operation on a KMS in a process of its own, which dies by SIGKILL at a step."""

import json
import os
import signal
import sys
from functools import partial

from hsmwrap.registry import open_backend
from support import forked, rsa_pairs
from support.kms.fakes import ADMIN, Client, Clock, DirectoryBackend, build_kms

OPENERS = {"file": DirectoryBackend.from_settings, "pkcs11": partial(open_backend, "pkcs11")}


def run_elsewhere(arguments):
    """The ended process; ``arguments`` are those of :func:`perform`."""
    return forked.run(__name__, **arguments)


def perform(*, url, backend, audit_file, die_at, sweep_days, action, parameters):
    rsa_pairs.use(preload=False)
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
