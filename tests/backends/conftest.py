"""Every backend under the conformance kit, and how to open it."""

import pytest


@pytest.fixture
def count_token_objects(softhsm):
    """Counts all objects on the session's token, through a connection of its own."""
    from hsmwrap.pkcs11.sessions.connection import Connection
    from hsmwrap.pkcs11.settings import Pkcs11Settings

    connection = Connection(Pkcs11Settings.from_mapping(softhsm.bare_settings()))
    yield lambda: connection.run(lambda pooled: len(list(pooled.session.get_objects())))
    connection.close()
