"""Desks over the built-in backends, each opened once for a module."""

import pytest
from support.backends.scripted import Scripted
from support.importing import Desk, open_pkcs11, open_software
from support.pkcs11.objects import token_objects


@pytest.fixture(scope="module")
def backends(request):
    """Opens each backend once for the module, at its first use."""
    opened = {}

    def named(name):
        if name not in opened:
            opened[name] = _OPEN[name](request)
        return opened[name]

    yield named
    for backend in opened.values():
        backend.close()


def _on_softhsm(prefix, **more):
    return lambda request: open_pkcs11(request.getfixturevalue("softhsm"), prefix, **more)


_OPEN = {
    "software": lambda request: open_software(),
    "pkcs11": _on_softhsm("imports"),
    "resident": _on_softhsm(
        "imports-resident", wrapping_custody="HsmInternal", material_custody="HsmInternal"
    ),
    "other name": _on_softhsm("imports", name="elsewhere"),
    "other prefix": _on_softhsm("imports-other"),
}


@pytest.fixture(scope="module")
def softhsm_objects(softhsm):
    with token_objects(softhsm) as count:
        yield count


@pytest.fixture
def desk_of(request, backends):
    def made(name):
        backend = backends(name)
        if name == "software":
            return Desk(backend)
        backend.capabilities()  # the probe makes session objects of its own
        return Desk(backend, request.getfixturevalue("softhsm_objects"))

    return made


@pytest.fixture(params=["software", "pkcs11", "resident"])
def desk(request, desk_of):
    return desk_of(request.param)


@pytest.fixture(params=["software", "pkcs11"])
def any_desk(request, desk_of):
    """Where custody makes no difference."""
    return desk_of(request.param)


@pytest.fixture
def spied():
    return Desk(Scripted())
