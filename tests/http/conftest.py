import pytest
from support.http.fakes import Bench


@pytest.fixture
def bench():
    return Bench()
