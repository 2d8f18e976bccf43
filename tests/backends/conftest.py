"""Every backend under the conformance kit, and how to open it."""

import pytest

from hsmwrap import registry


@pytest.fixture
def count_token_objects(softhsm):
    """Counts all objects on the session's token, through a connection of its own."""
    from hsmwrap.pkcs11.connection import Connection
    from hsmwrap.pkcs11.settings import Pkcs11Settings

    connection = Connection(Pkcs11Settings.from_mapping(softhsm.bare_settings()))
    yield lambda: connection.run(lambda pooled: len(list(pooled.session.get_objects())))
    connection.close()


@pytest.fixture
def open_pkcs11(softhsm):
    opened = []

    def opens(prefix, **more):
        backend = registry.open_backend("pkcs11", softhsm.settings(prefix, **more))
        opened.append(backend)
        return backend

    yield opens
    for backend in opened:
        backend.close()
