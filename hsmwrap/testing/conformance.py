"""The conformance kit: what every backend has to do, as a pytest class.

A plug-in author subclasses it in a test module and says how to open the backend::

    class TestMyBackend(BackendConformance):
        @pytest.fixture
        def settings(self):
            return {...}

        @pytest.fixture
        def backend(self, settings):
            with MyBackend.from_settings(settings) as backend:
                yield backend

        @pytest.fixture
        def reopen(self, settings):
            return lambda: MyBackend.from_settings(settings)  # a second one, on the same keys

        @pytest.fixture
        def count_objects(self, backend):
            return lambda: ...  # objects in the HSM, session objects too

``backend`` is needed. Without ``settings`` (default: none), an unknown setting is tried alone.
Without ``reopen``, what two processes share is not tested. ``count_objects`` is needed where any
custody is HSM_INTERNAL: without it the tests that look for leaks fail.

A registered plug-in that keeps no objects needs no test module::

    pytest --pyargs hsmwrap.testing.conformance --hsmwrap-backend NAME --hsmwrap-settings FILE.toml

Tests of what the backend's capability report does not promise are skipped, and say so: the reason
of every skip starts with ``capability:``. Clients are the openssl command and pyca/cryptography;
:mod:`hsmwrap.testing.hostile` makes the forged ciphertexts.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from hsmwrap.backend import Backend
from hsmwrap.registry import open_backend
from hsmwrap.testing._conformance.base import PAIRS, Conversation, Reopen, UsableKey
from hsmwrap.testing._conformance.imports import ImportConformance
from hsmwrap.testing._conformance.lifecycle import LifecycleConformance
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
    LifecycleConformance,
):
    """Subclass it and override the fixture ``backend``."""


class TestRegisteredBackend(BackendConformance):
    """The kit over the plug-in that ``--hsmwrap-backend`` names."""

    @pytest.fixture
    def settings(self, pytestconfig: pytest.Config) -> Mapping[str, Any]:
        """Settings from the file that ``--hsmwrap-settings`` names."""
        file = pytestconfig.getoption("hsmwrap_settings")
        return tomllib.loads(Path(file).read_text("utf-8")) if file else {}

    @pytest.fixture
    def backend(self, reopen: Reopen) -> Iterator[Backend]:
        """The open plug-in."""
        with reopen() as backend:
            yield backend

    @pytest.fixture
    def reopen(self, pytestconfig: pytest.Config, settings: Mapping[str, Any]) -> Reopen:
        """Opens the plug-in again, on the same keys."""
        name = pytestconfig.getoption("hsmwrap_backend")
        if name is None:
            pytest.fail("name the plug-in: --hsmwrap-backend NAME", pytrace=False)
        return lambda: open_backend(name, settings)
