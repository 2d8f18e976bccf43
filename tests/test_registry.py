import subprocess
import sys
from textwrap import dedent

import pytest

from hsmwrap import registry
from hsmwrap.backend import Backend
from hsmwrap.errors import BackendLoadError, ConfigurationError

WHOLE = """
    from hsmwrap.backend import Backend

    def unused(*args, **kwargs):
        raise NotImplementedError

    class Whole(Backend):
        contract_version = 1
        from_settings = classmethod(lambda cls, settings: cls(settings))
        name = capabilities = generate_wrapping_key = unwrap_material = unused
        encrypt = decrypt = destroy_key = mac = verify_mac = reap = health = close = unused

        def __init__(self, settings):
            self.settings = settings
"""


class Site:
    """A directory on ``sys.path`` into which distributions with plug-ins are written."""

    def __init__(self, path):
        self.path = path

    def distribution(self, name, **entries):
        info = self.path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{entry} = {value}" for entry, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[hsmwrap.backends]", *lines]))

    def plugin(self, name, source):
        """One distribution, one module, one entry: ``name`` is the class ``Whole`` of them."""
        (self.path / f"plugin_{name}.py").write_text(dedent(source))
        self.distribution(f"dist-{name}", **{name: f"plugin_{name}:Whole"})


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    yield Site(tmp_path)
    for module in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[module]


def test_the_built_in_backends_are_registered_like_any_other():
    entries = {entry.name: entry for entry in registry.available()}
    assert entries["software"].value == "hsmwrap.software:SoftwareBackend"
    assert entries["pkcs11"].value == "hsmwrap.pkcs11:Pkcs11Backend"
    assert entries["software"].distribution.split()[0] == "hsmwrap"


def test_available_lists_without_importing(site):
    site.plugin("acme", "raise RuntimeError('imported')")
    assert registry.BackendEntry("acme", "plugin_acme:Whole", "dist-acme 1.0") in (
        registry.available()
    )
    assert "plugin_acme" not in sys.modules


def test_load_imports_the_plugin_asked_for_and_no_other(site):
    site.plugin("acme", WHOLE)
    site.plugin("other", WHOLE)
    loaded = registry.load("acme")
    assert issubclass(loaded, Backend)
    assert loaded.__module__ == "plugin_acme"
    assert "plugin_other" not in sys.modules


def test_importing_the_registry_imports_no_backend():
    code = (
        "import sys, hsmwrap.registry as r; r.available(); "
        "sys.exit(any(m.startswith(('hsmwrap.software', 'hsmwrap.pkcs11')) for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_open_backend_passes_the_settings(site):
    site.plugin("acme", WHOLE)
    backend = registry.open_backend("acme", {"slot": 3})
    assert type(backend) is registry.load("acme")
    assert backend.settings == {"slot": 3}


def test_an_unknown_name_lists_those_registered(site):
    site.plugin("acme", WHOLE)
    with pytest.raises(BackendLoadError, match=r"'acmee'.*registered: acme, .*software") as caught:
        registry.load("acmee")
    assert isinstance(caught.value, ConfigurationError)


BROKEN = {
    "raises": ("raise RuntimeError('no licence')", "cannot be imported: RuntimeError: no licence"),
    "exits": ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
    "syntax": ("def broken(:", "cannot be imported: SyntaxError"),
    "needs": ("import module_of_a_vendor", "No module named 'module_of_a_vendor'"),
    "empty": ("", "has no attribute 'Whole'"),
    "function": ("def Whole(): ...", "is not a subclass of hsmwrap's Backend"),
    "stranger": ("class Whole: contract_version = 1", "is not a subclass of hsmwrap's Backend"),
    "silent": (
        WHOLE.replace("contract_version = 1", "pass"),
        "declares contract version none; this hsmwrap has contract version 1",
    ),
    "newer": (
        WHOLE.replace("contract_version = 1", "contract_version = 2"),
        "declares contract version 2; this hsmwrap has contract version 1",
    ),
    "unfinished": (WHOLE.replace("mac = verify_mac =", ""), "does not implement mac, verify_mac"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_refused_by_name(site, name):
    source, reason = BROKEN[name]
    site.plugin(name, source)
    with pytest.raises(BackendLoadError) as caught:
        registry.load(name)
    assert repr(name) in str(caught.value)
    assert f"dist-{name} 1.0" in str(caught.value)
    assert reason in str(caught.value)


def test_a_value_that_is_no_object_reference_is_refused_by_name(site):
    site.distribution("dist-odd", odd="not a reference")
    with pytest.raises(BackendLoadError, match=r"'odd' \(not a reference, of dist-odd 1\.0\)"):
        registry.load("odd")


def test_a_broken_plugin_takes_nothing_else_down(site):
    for name, (source, _) in BROKEN.items():
        site.plugin(name, source)
    site.plugin("acme", WHOLE)
    loaded, failed = registry.load_all()
    assert {"acme", "software"} <= loaded.keys()
    assert failed.keys() >= BROKEN.keys()
    assert not loaded.keys() & failed.keys()
    assert loaded.keys() | failed.keys() == {entry.name for entry in registry.available()}


def test_a_name_registered_twice_names_both_distributions(site):
    site.plugin("acme", WHOLE)
    site.distribution("dist-impostor", acme="plugin_acme:Whole")
    with pytest.raises(BackendLoadError, match=r"dist-acme 1\.0 and dist-impostor 1\.0"):
        registry.load("acme")
    loaded, failed = registry.load_all()
    assert "acme" in failed
    assert "software" in loaded
    assert "plugin_acme" not in sys.modules
