import pytest
from http_fakes import Bench


@pytest.fixture
def bench():
    return Bench()
