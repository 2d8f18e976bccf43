"""The conformance kit: what every backend has to do, as a pytest class.

A plug-in author subclasses it in a test module and says what to open::

    class TestMyBackend(BackendConformance):
        plugin = MyBackend

        @pytest.fixture
        def settings(self):
            return {...}

        @pytest.fixture
        def count_objects(self, backend):
            return lambda: ...  # objects in the HSM, session objects too

The backend is tested behind its guard (:mod:`hsmwrap.guard`), as applications have it. Override
``backend`` and ``reopen`` (a second instance, on the same keys) where opening takes more than the
settings; a ``reopen`` of None leaves out what two processes share. ``count_objects`` is needed
where any custody is HSM_INTERNAL: without it the tests that look for leaks fail. Override
``rotate_keys`` where making another key set takes more than the settings.

A registered plug-in that keeps no objects needs no test module::

    pytest --pyargs hsmwrap.testing.conformance --hsmwrap-backend NAME --hsmwrap-settings FILE.toml

Tests of what the backend's capability report does not promise are skipped, and say so: the reason
of every skip starts with ``capability:``. Clients are the openssl command and pyca/cryptography;
:mod:`hsmwrap.testing.hostile` makes the forged ciphertexts.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hsmwrap.backend import Backend
from hsmwrap.registry import load
from hsmwrap.testing._conformance.base import PAIRS, Conversation, UsableKey
from hsmwrap.testing._conformance.imports import ImportConformance
from hsmwrap.testing._conformance.lifecycle import LifecycleConformance
from hsmwrap.testing._conformance.resealing import ResealingConformance
from hsmwrap.testing._conformance.tokens import ImportTokenConformance
from hsmwrap.testing._conformance.use import UseConformance
from hsmwrap.testing._conformance.wrapping import WrappingKeyConformance

__all__ = ["PAIRS", "BackendConformance", "Conversation", "UsableKey"]


@pytest.mark.usefixtures("backend")
class BackendConformance(
    WrappingKeyConformance,
    ImportConformance,
    UseConformance,
    ImportTokenConformance,
    ResealingConformance,
    LifecycleConformance,
):
    """Subclass it, set ``plugin`` and override the fixture ``settings``."""


class TestRegisteredBackend(BackendConformance):
    """The kit over the plug-in that ``--hsmwrap-backend`` names."""

    @pytest.fixture
    def plugin_class(self, pytestconfig: pytest.Config) -> type[Backend]:
        """The class of the plug-in."""
        name = pytestconfig.getoption("hsmwrap_backend")
        if name is None:
            pytest.fail("name the plug-in: --hsmwrap-backend NAME", pytrace=False)
        return load(name)

    @pytest.fixture
    def settings(self, pytestconfig: pytest.Config) -> Mapping[str, Any]:
        """Settings from the file that ``--hsmwrap-settings`` names."""
        file = pytestconfig.getoption("hsmwrap_settings")
        return tomllib.loads(Path(file).read_text("utf-8")) if file else {}
