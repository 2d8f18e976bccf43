"""Configuration: file, environment, refusals, explanations; and a KMS opened from it."""

import argparse
import json
import tomllib
from datetime import timedelta

import pytest
from support.kms.fakes import Client, Clock

from hsmwrap.backend import Exposure
from hsmwrap.catalog import ManagedHsm, ProtectionLevel, WrappingAlgorithm
from hsmwrap.cli import config as config_command
from hsmwrap.cli import main
from hsmwrap.errors import (
    BackendClosed,
    BackendLoadError,
    ConfigurationError,
    HsmUnavailable,
    TokenSelectionError,
)
from hsmwrap.kms import Kms, StaticAccessKeys, load_config, open_kms, opening
from hsmwrap.kms.audit import AuditLog
from hsmwrap.kms.database import Database
from hsmwrap.kms.explain import MASK
from hsmwrap.policy import Deployment
from hsmwrap.software import SoftwareBackend
from hsmwrap.software._keyring_file import KeyringFile

FILE = """
database_url = "postgresql+psycopg://kms:pass-word@db.example/kms?sslkey=hidden"
region = "us-east-1"
token_lifetime = 3600
required_exposure = "in_hsm"
access_key_file = "/etc/hsmwrap/access.toml"

[backends.SOFTWARE]
plugin = "software"

[backends.HSM]
plugin = "pkcs11"
settings = { module = "/usr/lib/x.so", pin_file = "/etc/hsmwrap/pin", user_pin = "12345678" }

[limits]
max_threads = 4
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "server.toml"
    path.write_text(FILE)
    return path


def test_file(file):
    config = load_config(file)
    assert config.region == "us-east-1"
    assert config.deployment().managed_hsm is ManagedHsm.FIPS
    assert config.token_lifetime == timedelta(hours=1)
    assert config.required_exposure is Exposure.IN_HSM
    assert config.limits.max_threads == 4
    assert config.backends[ProtectionLevel.HSM].settings["module"] == "/usr/lib/x.so"
    assert (config.port, config.single_use) == (8443, False)


def test_environment_outranks_the_file(file, monkeypatch):
    monkeypatch.setenv("HSMWRAP_SERVER_REGION", "cn-hangzhou")
    monkeypatch.setenv("HSMWRAP_SERVER_LIMITS__MAX_THREADS", "9")
    monkeypatch.setenv("HSMWRAP_SERVER_MANAGED_HSM", "NONE")
    config = load_config(file)
    assert (config.region, config.limits.max_threads) == ("cn-hangzhou", 9)
    assert config.deployment().managed_hsm is ManagedHsm.NONE


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("colour = 1\n", "colour"),
        ("port = 70000\n", "port"),
        ('metrics_address = "9443"\n', "metrics_address"),
        ('metrics_address = "::1:9443"\n', "metrics_address"),
        ('managed_hsm = "GOLD"\n', "managed_hsm"),
        ("sweep_interval = -1\n", "sweep_interval"),
        ("[limits2]\nx = 1\n", "limits2"),
        ("= nonsense", "server.toml"),
    ],
)
def test_wrong_keys_are_named(file, line, named):
    file.write_text(line + FILE)
    with pytest.raises(ConfigurationError, match=named) as caught:
        load_config(file)
    assert "pass-word" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("colour = 1\n", "limits.colour"),
        ('[backends.TPM]\nplugin = "x"\n', "backends.TPM"),
        ("[backends.HSM.more]\n", "backends.HSM.more"),
    ],
)
def test_wrong_nested_keys_are_named(file, line, named):
    file.write_text(FILE + line)
    with pytest.raises(ConfigurationError, match=named):
        load_config(file)


@pytest.mark.parametrize("name", ["HSMWRAP_SERVER_COLOUR", "HSMWRAP_SERVER_LIMITS__COLOUR"])
def test_unknown_variables_are_errors(file, monkeypatch, name):
    monkeypatch.setenv(name, "red")
    with pytest.raises(ConfigurationError, match=r"(?i)colour"):
        load_config(file)


@pytest.mark.parametrize(
    ("line", "near"),
    [("prot = 1\n", "port"), ("[limits]\nmax_thread = 1\n", "limits.max_threads")],
)
def test_an_unknown_key_names_the_nearest_known_one(tmp_path, line, near):
    file = tmp_path / "server.toml"
    file.write_text(line)
    with pytest.raises(ConfigurationError, match=f"unknown setting; did you mean {near}[?]"):
        load_config(file)


def test_an_unknown_variable_names_the_nearest_known_one(file, monkeypatch):
    monkeypatch.setenv("HSMWRAP_SERVER_REGOIN", "x")
    known = "did you mean HSMWRAP_SERVER_REGION[?]"
    with pytest.raises(ConfigurationError, match=f"nothing reads HSMWRAP_SERVER_REGOIN; {known}"):
        load_config(file)


def test_a_variable_with_too_few_underscores_names_the_right_one(file, monkeypatch):
    monkeypatch.setenv("HSMWRAP_SERVER_LIMITS_MAX_THREADS", "8")
    known = "did you mean HSMWRAP_SERVER_LIMITS__MAX_THREADS[?]"
    with pytest.raises(ConfigurationError, match=known):
        load_config(file)


def test_durations_in_variables_are_seconds_or_iso_8601(file, monkeypatch):
    monkeypatch.setenv("HSMWRAP_SERVER_TOKEN_LIFETIME", "600")
    monkeypatch.setenv("HSMWRAP_SERVER_SWEEP_INTERVAL", "PT2M")
    config = load_config(file)
    assert config.token_lifetime == timedelta(minutes=10)
    assert config.sweep_interval == timedelta(minutes=2)


def test_backends_in_variables(file, monkeypatch):
    monkeypatch.setenv("HSMWRAP_SERVER_BACKENDS__HSM__SETTINGS__TOKEN_LABEL", "another")
    monkeypatch.setenv("HSMWRAP_SERVER_BACKENDS__SOFTWARE", '{"plugin": "software"}')
    backends = load_config(file).backends
    assert backends[ProtectionLevel.HSM].plugin == "pkcs11"
    assert backends[ProtectionLevel.HSM].settings["token_label"] == "another"
    assert backends[ProtectionLevel.HSM].settings["module"]
    assert backends[ProtectionLevel.SOFTWARE].plugin == "software"


def test_an_algorithm_that_is_turned_off(tmp_path):
    file = tmp_path / "off.toml"
    file.write_text(f'refused_algorithms = ["RSAES_PKCS1_V1_5"]\n{FILE}')
    assert load_config(file).refused_algorithms == {WrappingAlgorithm.RSAES_PKCS1_V1_5}
    file.write_text(f'refused_algorithms = ["PKCS1"]\n{FILE}')
    with pytest.raises(ConfigurationError, match="refused_algorithms"):
        load_config(file)


def test_missing_file_and_missing_keys(tmp_path):
    with pytest.raises(ConfigurationError, match=r"none\.toml"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigurationError, match="backends"):
        load_config()


def test_no_secret_in_repr(file):
    assert "pass-word" not in repr(load_config(file))


INLINE_SETTINGS = next(line for line in FILE.splitlines() if line.startswith("settings = "))


def check(capsys, *arguments):
    """What the command prints; it refuses all files of this module, after it has shown them."""
    parser = argparse.ArgumentParser()
    config_command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["config", "check", *map(str, arguments)])
    with pytest.raises(ConfigurationError, match="access_key_file") as refused:
        args.run(args)
    assert "two backends" not in str(refused.value)
    return capsys.readouterr().out


def test_check_explains(file, monkeypatch, capsys):
    monkeypatch.setenv("HSMWRAP_SERVER_REGION", "cn-hangzhou")
    out = check(capsys, "--config", file, "--json")
    explained = {s["name"]: (s["value"], s["source"]) for s in json.loads(out)["settings"]}
    assert explained["region"] == ('"cn-hangzhou"', "HSMWRAP_SERVER_REGION")
    assert explained["port"] == ("8443", "default")
    assert explained["limits.max_threads"] == ("4", "file")
    assert explained["limits.max_request_bytes"] == ("131072", "default")
    assert explained["backends.HSM.plugin"] == ('"pkcs11"', "file")
    assert explained["backends.HSM.settings.pin_file"] == ('"/etc/hsmwrap/pin"', "file")
    assert explained["backends.HSM.settings.user_pin"] == ("(set, not shown)", "file")
    url = '"postgresql+psycopg://kms:***@db.example/kms"'
    assert explained["database_url"] == (url, "file")
    assert explained["token_lifetime"] == ("3600", "file")
    assert explained["single_use"] == ("false", "default")
    assert explained["refused_algorithms"] == ("[]", "default")
    assert explained["required_exposure"] == ('"in_hsm"', "file")
    for name, (value, _) in explained.items():
        assert value in {"-", MASK} or tomllib.loads(f"value = {value}"), name
    assert explained["audit_key_file"] == ("-", "default")
    table = check(capsys, "--config", file)
    assert table.splitlines()[0].split() == ["setting", "value", "source"]
    for secret in ("pass-word", "12345678", "hidden"):
        assert secret not in out + table


PINS = """
allow_pin_value = true
uri = "pkcs11:token=A?module-path=/usr/lib/x.so&pin-value=12345678&rest"
fallbacks = ["pkcs11:token=B?PIN-Value=12345678", "pkcs11:token=C?pin-source=|echo 12345678"]
tokens = [{ label = "D", user_pin = "12345678" }]
credentials = { user = "12345678" }
pin_command = "echo 12345678"
"""


def test_check_masks_pins_wherever_they_are(file, capsys):
    settings = "".join(f"{line}\n" for line in PINS.strip().splitlines())
    file.write_text(FILE + f"[backends.HSM.settings]\n{settings}")
    file.write_text(file.read_text().replace(INLINE_SETTINGS, ""))
    out = check(capsys, "--config", file, "--json")
    explained = {s["name"]: s["value"] for s in json.loads(out)["settings"]}
    shown = {name.removeprefix("backends.HSM.settings."): v for name, v in explained.items()}
    assert "12345678" not in out
    assert "12345678" not in check(capsys, "--config", file)
    assert shown["allow_pin_value"] == "true"
    assert shown["uri"] == f'"pkcs11:token=A?module-path=/usr/lib/x.so&pin-value={MASK}"'
    fallbacks = (f'"pkcs11:token=B?PIN-Value={MASK}"', f'"pkcs11:token=C?pin-source={MASK}"')
    assert shown["fallbacks"] == f"[{', '.join(fallbacks)}]"
    assert shown["tokens"] == f'[{{ label = "D", user_pin = "{MASK}" }}]'
    assert shown["credentials.user"] == shown["pin_command"] == MASK


def test_a_level_in_small_letters_comes_from_the_file(file, capsys):
    file.write_text(FILE.replace("[backends.HSM]", "[backends.hsm]"))
    out = check(capsys, "--config", file, "--json")
    explained = {s["name"]: (s["value"], s["source"]) for s in json.loads(out)["settings"]}
    assert explained["backends.HSM.plugin"] == ('"pkcs11"', "file")
    assert explained["backends.HSM.settings.module"] == ('"/usr/lib/x.so"', "file")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('port = "x"\n', "port: takes a whole number, 0 to 65535; Port to listen on"),
        ("port = 70000\n", "port: takes a whole number, 0 to 65535; Port to listen on"),
        ('dedicated = "maybe"\n', "dedicated: takes true or false; Whether this is a dedicated"),
        ('sweep_interval = "long"\n', "sweep_interval: takes seconds, or ISO 8601 (PT24H)"),
        ('managed_hsm = "GOLD"\n', "managed_hsm: takes one of SCA, FIPS, NONE; Class"),
        ("limits = 1\n", "limits: takes a table"),
        ('metrics_address = "9443"\n', "metrics_address: takes ADDRESS:PORT; Address"),
        (
            '[backends.HSMM]\nplugin = "software"\n',
            "backends.HSMM: is not a protection level; take SOFTWARE or HSM",
        ),
    ],
)
def test_what_is_right_is_said_in_our_words(tmp_path, line, said):
    """Not in pydantic's, which may change and speak of its types."""
    file = tmp_path / "server.toml"
    file.write_text(line + FILE.replace("[limits]\nmax_threads = 4\n", ""))
    with pytest.raises(ConfigurationError) as caught:
        load_config(file)
    assert said in str(caught.value)


def test_what_is_missing_is_said(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text("[backends.HSM]\n")
    with pytest.raises(
        ConfigurationError, match=r"backends[.]HSM[.]plugin: required; The backend's"
    ):
        load_config(file)


TWO_TOKENS = """
[backends.SOFTWARE]
plugin = "pkcs11"
settings = { token_label = "a"SETTING }

[backends.HSM]
plugin = "pkcs11"
settings = { token_label = "b" }
"""


@pytest.mark.parametrize("name", [None, "pkcs11"])
def test_check_refuses_two_backends_of_one_name(file, capsys, name):
    setting = f', name = "{name}"' if name else ""
    file.write_text(TWO_TOKENS.replace("SETTING", setting))
    assert main(["config", "check", "--config", str(file)]) == 2
    assert "two backends are named 'pkcs11'; give one" in capsys.readouterr().err


def test_check_takes_two_names_or_one_backend(file, capsys):
    file.write_text(TWO_TOKENS.replace("SETTING", ', name = "other"'))
    assert "other" in check(capsys, "--config", file)
    file.write_text(TWO_TOKENS.replace("SETTING", "").replace('"b"', '"a"'))
    assert "pkcs11" in check(capsys, "--config", file)


@pytest.fixture
def real(tmp_path, database_url):
    keyring_file = tmp_path / "keyring.json"
    KeyringFile(keyring_file).create()
    access = tmp_path / "access.toml"
    allow = '[{ actions = ["*"], keys = ["*"] }]'
    access.write_text(f'[[access_key]]\nid = "me"\nsecret = "x"\nallow = {allow}\n')
    access.chmod(0o600)
    path = tmp_path / "server.toml"
    path.write_text(
        f"""
database_url = "{database_url}"
access_key_file = "{access}"
audit_file = "{tmp_path}/audit.log"
account_id = "42"
region = "cn-beijing"

[backends.SOFTWARE]
plugin = "software"
settings = {{ keyring_file = "{keyring_file}", serve_hsm_level = true }}

[backends.HSM]
plugin = "software"
settings = {{ keyring_file = "{keyring_file}", serve_hsm_level = true }}
"""
    )
    return path


def test_open_kms(real):
    with open_kms(load_config(real)) as kms:
        client = Client(kms, kms.access_keys.lookup("me").caller())
        key_id = client.create()
        client.import_material(key_id)
        blob = client.usable(key_id)
        assert kms._sweeper._thread.is_alive()
        # Equal configurations share one backend.
        assert len(set(map(id, kms._backends.values()))) == 1
    with open_kms(load_config(real)) as kms:
        client = Client(kms, kms.access_keys.lookup("me").caller())
        assert client("Decrypt", CiphertextBlob=blob)["Plaintext"] == "aGVsbG8="
        arn = client("DescribeKey", KeyId=key_id)["KeyMetadata"]["Arn"]
        assert arn == f"acs:kms:cn-beijing:42:key/{key_id}"


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("DATABASE_URL", "mysql://x/y", ConfigurationError),
        ("DATABASE_URL", "sqlite://", ConfigurationError),
        ("DATABASE_URL", "nonsense", ConfigurationError),
        ("ACCESS_KEY_FILE", "/nowhere", ConfigurationError),
        ("AUDIT_KEY_FILE", "/nowhere", ConfigurationError),
        ("BACKENDS", '{"HSM": {"plugin": "none"}}', BackendLoadError),
    ],
)
def test_open_kms_refuses(real, monkeypatch, name, value, error):
    monkeypatch.setenv(f"HSMWRAP_SERVER_{name}", value)
    with pytest.raises(error):
        open_kms(load_config(real))


def test_two_backends_of_one_name_are_refused(real, tmp_path, monkeypatch):
    other = tmp_path / "other-keyring.json"
    KeyringFile(other).create()
    software, hsm = real.read_text().split("[backends.HSM]")
    real.write_text(f"{software}[backends.HSM]{hsm.replace('keyring.json', other.name)}")
    monkeypatch.setattr(opening, "Kms", None)  # not after the database was opened
    with pytest.raises(ConfigurationError, match="two backends are named 'software'"):
        open_kms(load_config(real))


def test_kms_refuses_two_backends_of_one_name(open_backend, sqlite_url, tmp_path):
    backends = [open_backend(), open_backend()]
    database = Database(sqlite_url)
    with pytest.raises(ConfigurationError, match="two backends are named 'hsm'"):
        Kms(
            database,
            dict(zip(ProtectionLevel, backends, strict=True)),
            Deployment(),
            access_keys=StaticAccessKeys(()),
            audit_log=AuditLog(tmp_path / "audit.log", Clock()),
        )
    database.close()
    for backend in backends:
        backend.close()


class Unavailable:
    """Makes a function fail a number of times before it works."""

    def __init__(self, monkeypatch, owner, name, error, times):
        self.calls, self.pauses = 0, []
        inner = getattr(owner, name)

        def call(*arguments):
            self.calls += 1
            if self.calls <= times:
                raise error
            return inner(*arguments)

        monkeypatch.setattr(owner, name, call)
        monkeypatch.setattr(opening.time, "sleep", self.pause)
        monkeypatch.setattr(opening.time, "monotonic", lambda: sum(self.pauses))

    def pause(self, seconds):
        self.pauses.append(seconds)


@pytest.mark.parametrize("part", [(Database, "prepare"), (opening, "open_backend")])
def test_start_waits_for_what_is_unavailable(real, monkeypatch, part, caplog):
    monkeypatch.setenv("HSMWRAP_SERVER_SWEEP_INTERVAL", "PT0S")
    unavailable = Unavailable(monkeypatch, *part, HsmUnavailable("unavailable"), times=6)
    with open_kms(load_config(real)) as kms:
        assert kms.health().ready
    assert unavailable.pauses == [0.25, 0.5, 1, 2, 4, 4]
    assert "cannot start yet" in caplog.text


@pytest.mark.parametrize(
    ("wait", "error", "waited"),
    [
        ("PT30S", HsmUnavailable("unavailable"), (26, 30)),
        ("PT0S", HsmUnavailable("unavailable"), (0, 0)),
        ("PT30S", BackendClosed("closed"), (0, 0)),
        ("PT30S", ConfigurationError("wrong"), (0, 0)),
        ("PT30S", TokenSelectionError("no slot lists it", absent=True), (26, 30)),
        ("PT30S", TokenSelectionError("two of that label"), (0, 0)),
    ],
)
def test_start_does_not_wait_for_ever(real, monkeypatch, wait, error, waited):
    monkeypatch.setenv("HSMWRAP_SERVER_STARTUP_WAIT", wait)
    unavailable = Unavailable(monkeypatch, Database, "prepare", error, times=1000)
    closed = []
    close = SoftwareBackend.close
    monkeypatch.setattr(SoftwareBackend, "close", lambda backend: closed.append(close(backend)))
    with pytest.raises(type(error)):
        open_kms(load_config(real))
    assert waited[0] <= sum(unavailable.pauses) <= waited[1]
    assert len(closed) == 1
