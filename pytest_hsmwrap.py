"""pytest fixtures of hsmwrap: a private SoftHSM2 token, backends and an import service.

pytest finds this module by its entry point where ``hsmwrap[testing]`` is installed. It is outside
the package ``hsmwrap`` and imports it only in fixtures: without use of them nothing is loaded, and
coverage of hsmwrap can still be measured. ``-p no:hsmwrap`` turns it off.

Fixtures of the token skip where SoftHSM2 is not installed. They fail instead where the environment
variable HSMWRAP_REQUIRE_SOFTHSM is 1, for CI that must not skip silently.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hsmwrap import Backend, ImportService
    from hsmwrap.testing.softhsm import SoftHsm

NOT_INSTALLED = "capability: SoftHSM2 is not installed"

pytest.register_assert_rewrite("hsmwrap.testing")  # failures of the conformance kit show values


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options for ``--pyargs hsmwrap.testing.conformance``."""
    group = parser.getgroup("hsmwrap", "hsmwrap's conformance kit")
    group.addoption("--hsmwrap-backend", metavar="NAME", help="registered plug-in to test")
    group.addoption("--hsmwrap-settings", metavar="FILE.toml", help="its settings")
    group.addoption(
        "--hsmwrap-so-pin-file",
        metavar="FILE",
        help="the security officer's PIN, for key sets that are trusted and that can move",
    )
    group.addoption(
        "--hsmwrap-clone-settings",
        metavar="FILE.toml",
        help="settings of a second HSM, to which key sets are cloned and restored",
    )
    group.addoption("--hsmwrap-clone-so-pin-file", metavar="FILE", help="its SO PIN")
    group.addoption(
        "--hsmwrap-report",
        metavar="FILE",
        action="append",
        help="write a report to publish: FILE.json or FILE.md; may be given twice",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Check the options of the kit, if one is given."""
    given = {name for name, value in vars(config.option).items() if value is not None}
    if not any(name.startswith("hsmwrap_") for name in given):
        return
    from hsmwrap.testing._conformance.run import NAME, KitRun

    config.pluginmanager.register(KitRun(config), NAME)


class OpenBackends:
    """Backends that stay open for the session: to probe a token takes longer than most tests."""

    def __init__(self) -> None:
        self._backends: dict[str, Backend] = {}

    def get(self, plugin: str, settings: dict[str, Any]) -> Backend:
        """Return the backend with these settings; open it if it is not open (any more)."""
        from hsmwrap import BackendClosed, open_backend

        key = repr((plugin, sorted(settings.items())))
        try:
            self._backends[key].capabilities()
        except (KeyError, BackendClosed):
            self._backends[key] = open_backend(plugin, settings)
        return self._backends[key]

    def close(self) -> None:
        """Close all of them."""
        for backend in self._backends.values():
            backend.close()


@pytest.fixture(scope="session")
def hsmwrap_softhsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftHsm]:
    """A private SoftHSM2 token, one for each worker process, in a temporary directory.

    It is made as ``softhsm/init-token`` makes it: random PINs in files, and no SoftHSM that is
    configured elsewhere is read or written. SOFTHSM2_CONF and the variables HSMWRAP_PKCS11_MODULE,
    HSMWRAP_TOKEN_LABEL, HSMWRAP_PIN_FILE, HSMWRAP_SO_PIN_FILE and HSMWRAP_TOKEN_DIR are set until
    the session ends. ``hsmwrap_softhsm.settings("a-prefix")`` are settings for the backend
    ``pkcs11`` with a key set of its own.
    """
    from hsmwrap.testing.softhsm import SoftHsm, SoftHsmNotInstalledError

    # A label that is not used twice: a module that was loaded before with another configuration
    # has no token of this label, so its PIN is never tried with ours.
    label = f"hsmwrap-{secrets.token_hex(4)}"
    try:
        token = SoftHsm.make(tmp_path_factory.mktemp("hsmwrap-softhsm"), label)
    except SoftHsmNotInstalledError as error:
        if os.environ.get("HSMWRAP_REQUIRE_SOFTHSM") == "1":
            pytest.fail(f"HSMWRAP_REQUIRE_SOFTHSM is 1, but there is {error}", pytrace=False)
        pytest.skip(NOT_INSTALLED)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in token.environment.items():
            environment.setenv(name, value)
        yield token


@pytest.fixture(scope="session")
def hsmwrap_open_backends() -> Iterator[OpenBackends]:
    """The backends that the other fixtures share."""
    backends = OpenBackends()
    yield backends
    backends.close()


@pytest.fixture
def hsmwrap_pkcs11_settings(hsmwrap_softhsm: SoftHsm) -> dict[str, Any]:
    """Settings of ``hsmwrap_pkcs11_backend``, with a trusted key set.

    Override it in a module or class for other settings or keys of its own::

        @pytest.fixture
        def hsmwrap_pkcs11_settings(hsmwrap_softhsm):
            return hsmwrap_softhsm.settings("resident", material_custody="HsmInternal")
    """
    return hsmwrap_softhsm.settings()


@pytest.fixture
def hsmwrap_pkcs11_backend(
    hsmwrap_pkcs11_settings: dict[str, Any], hsmwrap_open_backends: OpenBackends
) -> Backend:
    """An open ``pkcs11`` backend on the private token.

    Tests with the same settings share it. A test may close it; the next one gets a new one.
    """
    return hsmwrap_open_backends.get("pkcs11", hsmwrap_pkcs11_settings)


@pytest.fixture
def hsmwrap_import_service(
    hsmwrap_pkcs11_backend: Backend, hsmwrap_open_backends: OpenBackends
) -> ImportService:
    """An import service: level HSM on ``hsmwrap_pkcs11_backend``, level SOFTWARE in software.

    The deployment is the default one, a region with an SCA-certified HSM.
    """
    from hsmwrap import Deployment, ImportService, ProtectionLevel

    backends = {
        ProtectionLevel.HSM: hsmwrap_pkcs11_backend,
        ProtectionLevel.SOFTWARE: hsmwrap_open_backends.get("software", {}),
    }
    return ImportService(backends, Deployment())


@pytest.fixture
def hsmwrap_memory_backend() -> Iterator[Backend]:
    """An open ``hsmwrap.testing.MemoryBackend`` with keys of its own: both levels, no HSM.

    It is guarded, as ``open_backend`` guards a plug-in.
    """
    from hsmwrap.guard import GuardedBackend
    from hsmwrap.testing import MemoryBackend

    with GuardedBackend(MemoryBackend()) as backend:
        yield backend
