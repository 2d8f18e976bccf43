"""The pytest fixtures of hsmwrap, in a pytest of their own with an empty root directory."""

import os
import re
import signal
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.services.softhsm import ROOT

from hsmwrap import KeySpec
from hsmwrap.software import SoftwareBackend

pytestmark = pytest.mark.slow

IMPORTS_ONE_KEY = """
import os
import pytest
from hsmwrap import Cmk, KeySpec, ProtectionLevel
from hsmwrap.testing.clients import pyca_encrypt

def import_one_key(service, level):
    cmk = Cmk("key-1", KeySpec.ALIYUN_AES_256, level)
    given = service.get_parameters_for_import(cmk, "RSA_2048", "RSAES_OAEP_SHA_1")
    ciphertext = pyca_encrypt(given.algorithm, given.public_key, bytes(32))
    return service.import_key_material(cmk, ciphertext, given.import_token).imported

@pytest.mark.parametrize("level", ProtectionLevel)
def test_a_key_is_imported(hsmwrap_import_service, level):
    assert import_one_key(hsmwrap_import_service, level).check_value
"""


@pytest.fixture
def run_pytest(tmp_path):
    """Runs pytest over files given by name; the environment has nothing of this session."""

    def run(*options, environment=(), **files):
        root = tmp_path / "root"
        root.mkdir()
        for name, content in files.items():
            (root / f"{name}.py").write_text(content)
        clean = {n: v for n, v in os.environ.items() if not re.match("HSMWRAP_|SOFTHSM2|PY", n)}
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *options],
            cwd=root,
            env=clean | dict(environment),
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def passed(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return int(re.search(r"(\d+) passed", done.stdout)[1])


# --- a user who uses none of it -------------------------------------------------------------------


def test_it_loads_nothing_until_a_fixture_is_used(run_pytest):
    test = """
import sys
def test_nothing(pytestconfig):
    assert pytestconfig.pluginmanager.has_plugin("hsmwrap")
    assert [name for name in sys.modules if name.split(".")[0] in {"hsmwrap", "pkcs11"}] == []
"""
    assert passed(run_pytest("-W", "error", test_it=test)) == 1


def test_it_can_be_turned_off(run_pytest):
    test = "def test_it(hsmwrap_softhsm): pass"
    done = run_pytest("-p", "no:hsmwrap", test_it=test)
    assert "fixture 'hsmwrap_softhsm' not found" in done.stdout


def test_it_is_in_the_wheel():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert "pytest_hsmwrap.py" in wheel["targets"]["wheel"]["only-include"]


# --- the conformance kit over a registered plug-in ------------------------------------------------

KIT = ("--pyargs", "hsmwrap.testing.conformance")
FEW = ("-k", "contract_version or another_instance_uses")


@pytest.fixture
def settings_file(tmp_path):
    """Makes a TOML file of settings; without any, one for a keyring of the software backend."""

    def make(name="settings.toml", **settings):
        if not settings:
            settings = {"keyring_file": str(tmp_path / f"{name}.keyring")}
            SoftwareBackend.initialise_keys(settings)
        file = tmp_path / name
        file.write_text("".join(f"{key} = '{value}'\n" for key, value in settings.items()))
        return str(file)

    return make


def test_the_kit_runs_over_a_registered_plug_in(run_pytest, settings_file):
    options = ("--hsmwrap-backend", "software", "--hsmwrap-settings", settings_file())
    assert passed(run_pytest(*KIT, *FEW, *options)) == 1 + len(KeySpec)


def test_its_key_sets_are_its_own_and_nothing_is_left(run_pytest, settings_file, tmp_path):
    file = settings_file()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    options = ("--hsmwrap-backend", "software", "--hsmwrap-settings", file)
    done = run_pytest(*KIT, *options, "-k", "a_key_that_moved_is_the_same_key")
    assert passed(done) == len(KeySpec)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_the_kit_without_the_right_keys_fails(run_pytest, tmp_path):
    """The settings reach the plug-in: with none, each instance has keys of its own."""
    (tmp_path / "empty.toml").touch()
    options = ("--hsmwrap-backend", "software", "--hsmwrap-settings", str(tmp_path / "empty.toml"))
    done = run_pytest(*KIT, *FEW, *options)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "1 passed" in done.stdout


def test_a_failure_of_the_kit_shows_its_values(run_pytest, settings_file):
    never_ready = """
from hsmwrap import Health
from hsmwrap.software import SoftwareBackend
SoftwareBackend.health = lambda self: Health(ready=False, detail="broken here")
"""
    options = ("--hsmwrap-backend", "software", "--hsmwrap-settings", settings_file())
    done = run_pytest(*KIT, *options, "-k", "test_health_of_an_open_backend", conftest=never_ready)
    assert "where False = Health(ready=False, detail='broken here'" in done.stdout


def refused(done, *words):
    """It is said once, and no test runs."""
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    said = done.stdout + done.stderr
    assert [word for word in words if word not in said] == [], said
    assert not re.search(r"[1-9]\d* (passed|failed|error)", said)
    assert "Traceback" not in said


def test_the_kit_needs_the_name_of_a_plug_in(run_pytest):
    refused(run_pytest(*KIT), "name the plug-in: --hsmwrap-backend NAME")


def test_an_unknown_plug_in_is_refused_with_the_nearest_name(run_pytest, settings_file):
    options = ("--hsmwrap-backend", "sofware", "--hsmwrap-settings", settings_file())
    refused(run_pytest(*KIT, *options), "'sofware'; did you mean software?")


ALONE = {
    "backend": ("software", "--hsmwrap-backend NAME and --hsmwrap-settings FILE.toml are given"),
    "settings": ("a.toml", "--hsmwrap-backend NAME and --hsmwrap-settings FILE.toml are given"),
    "so-pin-file": ("pin", "--hsmwrap-so-pin-file is for a plug-in that --hsmwrap-backend names"),
    "clone-settings": ("a.toml", "--hsmwrap-clone-settings is for a plug-in"),
    "report": ("report.txt", "takes a file whose name ends with .json or .md"),
}


@pytest.mark.parametrize("option", ALONE)
def test_an_option_alone_is_refused(run_pytest, option):
    value, why = ALONE[option]
    refused(run_pytest(*KIT, f"--hsmwrap-{option}", value), why)


def test_a_report_without_a_directory_is_refused(run_pytest):
    refused(run_pytest(*KIT, "--hsmwrap-report", "no/report.md"), "there is not such a directory")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "missing.toml: No such file or directory"),
        ("not TOML", "is not TOML in UTF-8"),
        ("keyring_fil = 'a'", "unknown setting keyring_fil; did you mean keyring_file?"),
        ("keyring_file = '/no/keyring'", "keyring_file"),
    ],
)
def test_settings_that_are_wrong_are_refused(run_pytest, tmp_path, content, why):
    file = tmp_path / "missing.toml"
    if content is not None:
        file.write_text(content)
    options = ("--hsmwrap-backend", "software", "--hsmwrap-settings", str(file))
    refused(run_pytest(*KIT, *options), why)


def test_more_processes_than_one_are_refused(run_pytest, settings_file):
    pytest.importorskip("xdist")
    options = ("--hsmwrap-backend", "software", "--hsmwrap-settings", settings_file())
    refused(run_pytest(*KIT, *options, "-n", "2"), "leave out -n")


def test_a_backend_that_does_not_open_is_said_once(run_pytest, settings_file):
    broken = """
from hsmwrap import HsmUnavailable
from hsmwrap.software import SoftwareBackend

def from_settings(settings):
    raise HsmUnavailable("the HSM does not answer")
SoftwareBackend.from_settings = from_settings
SoftwareBackend.check_settings = lambda settings: frozenset()
"""
    options = ("--hsmwrap-backend", "software", "--hsmwrap-settings", settings_file())
    why = "the backend cannot be opened: HsmUnavailable: the HSM does not answer"
    refused(run_pytest(*KIT, *options, conftest=broken), why)


# --- without SoftHSM ------------------------------------------------------------------------------

NOT_INSTALLED = "from hsmwrap.testing import softhsm\nsofthsm._MODULES = ()"


def test_without_softhsm_it_skips(run_pytest):
    done = run_pytest("-k", "HSM", conftest=NOT_INSTALLED, test_it=IMPORTS_ONE_KEY)
    assert done.returncode == 0
    assert "capability: SoftHSM2 is not installed" in done.stdout
    assert "passed" not in done.stdout


def test_without_softhsm_it_fails_where_that_is_required(run_pytest):
    environment = {"HSMWRAP_REQUIRE_SOFTHSM": "1"}
    done = run_pytest(conftest=NOT_INSTALLED, test_it=IMPORTS_ONE_KEY, environment=environment)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "HSMWRAP_REQUIRE_SOFTHSM is 1, but there is no libsofthsm2.so" in done.stdout


def test_without_softhsm_the_memory_backend_is_there(run_pytest):
    test = """
import pytest
from hsmwrap import BackendClosed

seen = []

@pytest.mark.parametrize("run", range(2))
def test_it(hsmwrap_memory_backend, run):
    mac = hsmwrap_memory_backend.mac(b"data")
    assert mac not in seen
    seen.append(mac)
    hsmwrap_memory_backend.close()
    with pytest.raises(BackendClosed):
        hsmwrap_memory_backend.verify_mac(b"data", mac)
"""
    assert passed(run_pytest(conftest=NOT_INSTALLED, test_it=test)) == 2


# --- with SoftHSM ---------------------------------------------------------------------------------

# Notes every command that pytest's process starts, and looks for the PINs at the end.
WATCHED = """
import os
import sys
from pathlib import Path
import pytest

commands = []
sys.addaudithook(lambda event, args: event == "subprocess.Popen" and commands.append(repr(args)))

@pytest.fixture(scope="session", autouse=True)
def no_pin_on_a_command_line(hsmwrap_softhsm):
    yield
    assert len(commands) >= 2
    for name in ("HSMWRAP_PIN_FILE", "HSMWRAP_SO_PIN_FILE"):
        pin = Path(os.environ[name]).read_text()
        assert len(pin) == 32
        assert pin not in "".join(commands)

def pytest_unconfigure():
    print(*[name for name in os.environ if name.startswith("HSMWRAP_")])
    print("SOFTHSM2_CONF", os.environ["SOFTHSM2_CONF"])
"""
ON_A_TOKEN = (
    IMPORTS_ONE_KEY
    + """
from hsmwrap import BackendClosed
from hsmwrap.pkcs11 import Pkcs11Backend

def test_the_key_set_is_trusted(hsmwrap_pkcs11_settings):
    (keys,) = Pkcs11Backend.list_keys(hsmwrap_pkcs11_settings)
    assert keys.detail.endswith("key-encryption keys trusted")

def test_a_backend_that_a_test_closes(hsmwrap_pkcs11_backend):
    hsmwrap_pkcs11_backend.close()
    with pytest.raises(BackendClosed):
        hsmwrap_pkcs11_backend.capabilities()

opened = []

@pytest.mark.parametrize("run", range(2))
def test_is_replaced_and_then_shared(hsmwrap_pkcs11_backend, run):
    assert hsmwrap_pkcs11_backend.health().ready
    opened.append(hsmwrap_pkcs11_backend)
    assert len({id(each) for each in opened}) == 1

class TestOtherSettings:
    @pytest.fixture
    def hsmwrap_pkcs11_settings(self, hsmwrap_softhsm):
        return hsmwrap_softhsm.settings("resident", material_custody="HsmInternal", name="other")

    def test_they_are_used(self, hsmwrap_import_service):
        imported = import_one_key(hsmwrap_import_service, ProtectionLevel.HSM)
        assert (imported.key.backend, imported.key.custody) == ("other", "HsmInternal")

def test_the_others_are_not_changed(hsmwrap_import_service):
    imported = import_one_key(hsmwrap_import_service, ProtectionLevel.HSM)
    assert imported.key.backend == "pkcs11"
"""
)


def test_on_a_token(hsmwrap_softhsm, run_pytest, tmp_path):
    """A SoftHSM that is configured elsewhere is not read (it would fail), and not written."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / ".config/softhsm2").mkdir(parents=True)
    (elsewhere / ".config/softhsm2/softhsm2.conf").write_text("no setting of softhsm2.conf")
    configuration = elsewhere / "softhsm2.conf"
    configuration.write_text("no setting of softhsm2.conf")
    before = {path: path.stat().st_mtime_ns for path in elsewhere.rglob("*")}

    environment = {"HOME": str(elsewhere), "SOFTHSM2_CONF": str(configuration)}
    done = run_pytest("-s", conftest=WATCHED, test_it=ON_A_TOKEN, environment=environment)

    assert passed(done) == 8
    assert done.stdout.splitlines()[-2:] == ["", f"SOFTHSM2_CONF {configuration}"]
    assert {path: path.stat().st_mtime_ns for path in elsewhere.rglob("*")} == before


def test_a_token_for_each_worker(hsmwrap_softhsm, run_pytest, tmp_path):
    pytest.importorskip("xdist")
    test = f"""
import pytest
from pathlib import Path
@pytest.mark.parametrize("number", range(2))
def test_it(hsmwrap_pkcs11_backend, hsmwrap_softhsm, number, worker_id):
    assert hsmwrap_pkcs11_backend.health().ready
    Path({str(tmp_path)!r}, worker_id).write_text(str(hsmwrap_softhsm.directory))
"""
    assert passed(run_pytest("-n", "2", "--dist", "each", test_it=test)) == 4
    assert Path(tmp_path, "gw0").read_text() != Path(tmp_path, "gw1").read_text()


# --- softhsm/init-token ---------------------------------------------------------------------------


def init_token(directory, *command, umask=-1, **more):
    return subprocess.run(
        [ROOT / "softhsm/init-token", *command],
        env={"PATH": os.environ["PATH"], "HSMWRAP_TOKEN_DIR": str(directory), **more},
        capture_output=True,
        text=True,
        check=False,
        umask=umask,
    )


def test_init_token_gives_the_command_what_the_fixture_has(hsmwrap_softhsm, tmp_path):
    done = init_token(tmp_path / "token", "env", HSMWRAP_TOKEN_LABEL="a label")
    variables = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert hsmwrap_softhsm.environment.keys() <= variables.keys()
    assert variables["HSMWRAP_TOKEN_LABEL"] == "a label"
    assert variables["HSMWRAP_PKCS11_MODULE"] == hsmwrap_softhsm.module


def test_what_it_makes_is_for_the_owner_only(hsmwrap_softhsm, tmp_path):
    init_token(tmp_path / "token", "true")
    made = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert {"user.pin", "so.pin", "softhsm2.conf", "token.object"} <= made.keys()
    assert {name: mode for name, mode in made.items() if mode & 0o077} == {}


def test_a_second_run_finds_the_token_made(hsmwrap_softhsm, tmp_path):
    contents = []
    for _ in range(2):
        assert init_token(tmp_path, "true").returncode == 0
        contents.append({p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()})
    assert contents[0] == contents[1]


def test_the_command_has_the_umask_and_the_signals_of_the_caller(hsmwrap_softhsm, tmp_path):
    """Python ignores SIGPIPE, and exec would pass that on."""
    script = 'umask; yes | head -n 1; echo "${PIPESTATUS[0]}"'
    done = init_token(tmp_path, "bash", "-c", script, umask=0o026)
    assert done.stdout.split() == ["0026", "y", str(128 + signal.SIGPIPE)]


@pytest.mark.parametrize(
    ("variables", "command", "message"),
    [
        ({"HSMWRAP_TOKEN_DIR": ""}, "true", "HSMWRAP_TOKEN_DIR is the directory"),
        ({"HSMWRAP_TOKEN_LABEL": "l" * 33}, "true", "label has at most 32 bytes"),
        ({}, "no-such-command", "no-such-command: No such file"),
    ],
)
def test_what_is_wrong_is_one_line(hsmwrap_softhsm, tmp_path, variables, command, message):
    done = init_token(tmp_path, command, **variables)
    assert done.returncode == 1
    assert re.fullmatch(f"init-token: .*{message}.*\n", done.stderr)
