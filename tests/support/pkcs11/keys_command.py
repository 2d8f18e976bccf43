"""``hsmwrap keys`` in a process of its own, for the key sets of the tests' tokens.

A command that is what a test is about is run as a user runs it.
"""

import hsmwrap.pkcs11  # noqa: F401  # what the command loads by name
from hsmwrap.cli import main
from hsmwrap.testing.softhsm import SoftHsm, SoftHsmError
from support import forked


def use():
    """Let every token of this process make its keys so."""
    SoftHsm.run_keys = _run_keys


def _run_keys(self, action, prefix, *arguments, trusted=True):
    arguments = ["keys", action, *arguments, "--key-prefix", prefix, "--json"]
    more = dict(self.environment)
    if not trusted:
        more["HSMWRAP_SO_PIN_FILE"] = None
    done = forked.run(__name__, arguments=arguments, environment=more)
    if done.returncode:
        raise SoftHsmError(done.stderr.strip())
    return done.stdout


def perform(arguments):
    return main(arguments)
