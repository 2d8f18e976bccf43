"""The conformance kit: what every backend has to do, as a pytest class.

A registered plug-in is tested without a test module::

    pytest --pyargs hsmwrap.testing.conformance --hsmwrap-backend NAME --hsmwrap-settings FILE.toml

Otherwise, and where tests need more than settings, the author subclasses the kit in a test module
and says what to open::

    class TestMyBackend(BackendConformance):
        plugin = MyBackend

        @pytest.fixture
        def settings(self):
            return {...}

The backend is tested behind its guard (:mod:`hsmwrap.guard`), as applications have it. Override
``backend`` and ``reopen`` (a second instance, on the same keys) where opening takes more than the
settings; a ``reopen`` of None leaves out what two processes share. Where any custody is
HSM_INTERNAL, something has to count the objects in the HSM: the plug-in
(:class:`hsmwrap.backend.CountsObjects`) or an override of ``count_objects``; without it the tests
that look for leaks fail.

Tests of what the backend's capability report does not promise are skipped, and say so: the reason
of every skip starts with ``capability:``. ``--hsmwrap-report FILE.md`` writes what was tested, with
which outcome, in a form to publish. Clients are the openssl command and pyca/cryptography;
:mod:`hsmwrap.testing.hostile` makes the forged ciphertexts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from hsmwrap.backend import Backend
from hsmwrap.guard import guarded
from hsmwrap.testing._conformance.base import PAIRS, Conversation, UsableKey
from hsmwrap.testing._conformance.imports import ImportConformance
from hsmwrap.testing._conformance.lifecycle import LifecycleConformance
from hsmwrap.testing._conformance.moving import MovingConformance
from hsmwrap.testing._conformance.resealing import ResealingConformance
from hsmwrap.testing._conformance.run import KitRun, kit_run, required
from hsmwrap.testing._conformance.tokens import ImportTokenConformance
from hsmwrap.testing._conformance.use import UseConformance
from hsmwrap.testing._conformance.wrapping import WrappingKeyConformance

__all__ = ["PAIRS", "BackendConformance", "Conversation", "UsableKey"]


class BackendConformance(
    WrappingKeyConformance,
    ImportConformance,
    UseConformance,
    ImportTokenConformance,
    ResealingConformance,
    MovingConformance,
    LifecycleConformance,
):
    """Subclass it, set ``plugin`` and override the fixture ``settings``."""


class TestRegisteredBackend(BackendConformance):
    """The kit over the plug-in that ``--hsmwrap-backend`` names, which stays open."""

    keeps_backend_open = True

    @pytest.fixture(scope="class")
    @classmethod
    def kit_run(cls, pytestconfig: pytest.Config) -> KitRun:
        """The options; without them pytest ends."""
        return kit_run(pytestconfig)

    @pytest.fixture(scope="class")
    @classmethod
    def plugin_class(cls, kit_run: KitRun) -> type[Backend]:
        """The class of the plug-in."""
        return kit_run.plugin_class

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, kit_run: KitRun) -> Iterator[Mapping[str, Any]]:
        """Those of the file, changed for key sets of this run alone where the plug-in can do it."""
        with kit_run.key_sets(kit_run.first, make=True) as settings:
            yield settings

    @pytest.fixture(scope="class")
    @classmethod
    def kept_open(
        cls, plugin_class: type[Backend], settings: Mapping[str, Any]
    ) -> Iterator[Backend]:
        """The backend that tests share."""
        with required("the backend cannot be opened"):
            opened = guarded(plugin_class.from_settings(settings))
        with opened:
            yield opened

    @pytest.fixture
    def backend(
        self,
        kept_open: Backend,
        request: pytest.FixtureRequest,
        plugin_class: type[Backend],
        settings: Mapping[str, Any],
    ) -> Iterator[Backend]:
        """The shared backend; one of its own for a test that closes it."""
        if not request.node.originalname.endswith("_closed_after_close"):
            yield kept_open
            return
        with guarded(plugin_class.from_settings(settings)) as backend:
            yield backend

    @pytest.fixture
    def so_pin_file(self, kit_run: KitRun) -> str | None:
        """From the option."""
        return kit_run.first.so_pin_file

    @pytest.fixture
    def other_settings(self, kit_run: KitRun) -> Iterator[Mapping[str, Any] | None]:
        """A place without key sets, in the HSM of the option."""
        if kit_run.other is None:
            yield None
            return
        with kit_run.key_sets(kit_run.other, make=False) as settings:
            yield settings

    @pytest.fixture
    def other_so_pin_file(self, kit_run: KitRun) -> str | None:
        """From the option."""
        return None if kit_run.other is None else kit_run.other.so_pin_file

    @pytest.fixture
    def may_rotate(self, settings: Mapping[str, Any], kit_run: KitRun) -> bool:
        """Key sets that others may use are not rotated."""
        return settings is not kit_run.first.settings
