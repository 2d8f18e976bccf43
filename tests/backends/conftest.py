"""Every backend under the conformance kit, and how to open it."""

import pytest
from support.pkcs11.objects import token_objects


@pytest.fixture
def count_token_objects(softhsm):
    """Counts all objects on the session's token, through a connection of its own."""
    with token_objects(softhsm) as count:
        yield count
