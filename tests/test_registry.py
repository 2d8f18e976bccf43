import subprocess
import sys
from textwrap import dedent

import pytest

from hsmwrap import registry
from hsmwrap.backend import Backend
from hsmwrap.errors import BackendLoadError, ConfigurationError, HsmError, UnsupportedOperation
from hsmwrap.guard import Guarded

WHOLE = """
    from hsmwrap.backend import Backend

    def unused(*args, **kwargs):
        raise NotImplementedError

    class Whole(Backend):
        contract_version = 2
        name = "whole"
        from_settings = classmethod(lambda cls, settings: cls(settings))
        capabilities = generate_wrapping_key = unwrap_material = unused
        encrypt = decrypt = mac = verify_mac = health = unused

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
    assert Guarded.of(backend)
    assert backend.ability(registry.load("acme")).settings == {"slot": 3}


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
    "stranger": ("class Whole: contract_version = 2", "is not a subclass of hsmwrap's Backend"),
    "silent": (
        WHOLE.replace("contract_version = 2", "pass"),
        "declares contract version none; this hsmwrap has contract version 2",
    ),
    "newer": (
        WHOLE.replace("contract_version = 2", "contract_version = 3"),
        "declares contract version 3; this hsmwrap has contract version 2",
    ),
    "unfinished": (WHOLE.replace("mac = verify_mac =", ""), "does not implement mac, verify_mac"),
    "narrow": (
        WHOLE + "\n        def mac(self): ...\n",
        "mac does not take what the contract passes: too many positional arguments",
    ),
    "otherwise": (
        WHOLE + "\n        def generate_wrapping_key(self, spec, algorithm, *, expires): ...\n",
        "generate_wrapping_key does not take what the contract passes: missing a required argument",
    ),
    "older": (
        WHOLE + "\n        def unwrap_material(self, key, algorithm, data, *, key_spec): ...\n",
        "got an unexpected keyword argument 'expected_check_value'",
    ),
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


@pytest.mark.parametrize(
    "method",
    [
        "def mac(self, anything, and_more=None): ...",
        "def mac(*all_of_it): ...",
        "@staticmethod\n        def mac(data): ...",
        "def destroy_key(self, k): ...",
    ],
)
def test_what_can_be_called_as_declared_is_accepted(site, method):
    site.plugin("acme", f"{WHOLE}\n        {method}\n")
    registry.load("acme")


def test_an_ability_is_called_as_declared_too(site):
    site.plugin(
        "acme",
        WHOLE.replace("Backend)", "Backend, CountsObjects)").replace(
            "import Backend", "import Backend, CountsObjects"
        )
        + "\n        def count_objects(self, more): ...\n",
    )
    with pytest.raises(BackendLoadError, match=r"count_objects does not take .*'more'"):
        registry.load("acme")


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


# --- a plug-in that loads, and breaks the contract when it is opened ------------------------------

OPENS_WRONG = {
    "returns_none": (
        "lambda cls, settings: None",
        r"plug-in returns_none: from_settings returned NoneType where Whole is due",
    ),
    "raises": (
        "lambda cls, settings: settings['0123456789abcdef']",
        r"plug-in raises: from_settings raised KeyError \(plugin_raises\.py:\d+, in <lambda>\)$",
    ),
    "is_unnamed": ("lambda cls, settings: vars(cls(settings))['settings']", "returned dict"),
}


@pytest.mark.parametrize("name", OPENS_WRONG)
def test_a_plugin_that_opens_wrong_is_refused_by_name(site, name):
    opens, reason = OPENS_WRONG[name]
    site.plugin(name, WHOLE.replace("lambda cls, settings: cls(settings)", opens))
    with pytest.raises(BackendLoadError, match=reason) as caught:
        registry.open_backend(name, {})
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    assert "0123456789abcdef" not in str(caught.value)


@pytest.mark.parametrize("name", ["''", "'x' * 33", "'é'", "7"])
def test_a_plugin_whose_name_fits_no_import_token_is_refused(site, name):
    site.plugin("acme", WHOLE.replace('name = "whole"', f"name = {name}"))
    with pytest.raises(BackendLoadError, match="plug-in acme: its name has to be 1 to 32 ASCII"):
        registry.open_backend("acme", {})


def test_what_a_plugin_raises_of_hsmwrap_s_errors_is_passed_on(site):
    raises = "raise ConfigurationError('slot: missing')"
    source = WHOLE.replace(
        "from_settings = classmethod(lambda cls, settings: cls(settings))",
        f"@classmethod\n        def from_settings(cls, settings):\n            {raises}",
    ).replace(
        "import Backend\n", "import Backend\n    from hsmwrap.errors import ConfigurationError\n"
    )
    site.plugin("acme", source)
    with pytest.raises(ConfigurationError, match=r"^slot: missing$"):
        registry.open_backend("acme", {})


# --- key sets -----------------------------------------------------------------------------------

MANAGES = """
    from hsmwrap.testing import MemoryBackend
    from hsmwrap.backend import KeySetInfo

    class Whole(MemoryBackend):
        pass
"""


def test_key_sets_of_any_plugin_are_managed(site):
    site.plugin("acme", MANAGES)
    key_sets = registry.KeySetManager("acme", {"store": {}})
    assert key_sets.initialise().key_set == "1"
    assert key_sets.rotate().key_set == "2"
    key_sets.retire("1")
    assert [each.key_set for each in key_sets.list()] == ["2"]
    with pytest.raises(ConfigurationError):
        key_sets.retire("2")


def test_a_plugin_without_key_sets_says_so(site):
    site.plugin("acme", WHOLE)
    with pytest.raises(UnsupportedOperation, match="plug-in acme has no key sets"):
        registry.KeySetManager("acme", {})


@pytest.mark.parametrize("call", ["list", "initialise", "rotate", "retire"])
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return 7", r"plug-in acme: \w+_keys returned int where (tuple|KeySetInfo|None) is due"),
        ("raise OSError('0123456789abcdef')", r"plug-in acme: \w+_keys raised OSError \(plugin_"),
    ],
)
def test_a_plugin_that_manages_key_sets_wrong_is_named(site, call, body, reason):
    wrong = f"""        @classmethod
        def {call}_keys(cls, *args, **kwargs):
            {body}
"""
    site.plugin("acme", MANAGES.replace("        pass\n", wrong))
    key_sets = registry.KeySetManager("acme", {"store": {}})
    with pytest.raises(HsmError, match=reason):
        getattr(key_sets, call)(*(["1"] if call == "retire" else []))
