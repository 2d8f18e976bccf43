"""Configuration: file, environment, refusals, explanations; and a KMS opened from it."""

import argparse
import json
from datetime import timedelta

import pytest
from kms_fakes import Client

from hsmwrap.backend import Exposure
from hsmwrap.catalog import ManagedHsm, ProtectionLevel
from hsmwrap.cli import config as config_command
from hsmwrap.errors import BackendLoadError, ConfigurationError
from hsmwrap.kms import load_config, open_kms

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


def test_missing_file_and_missing_keys(tmp_path):
    with pytest.raises(ConfigurationError, match=r"none\.toml"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigurationError, match="backends"):
        load_config()


def test_no_secret_in_repr(file):
    assert "pass-word" not in repr(load_config(file))


def check(capsys, *arguments):
    parser = argparse.ArgumentParser()
    config_command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["config", "check", *map(str, arguments)])
    assert args.run(args) == 0
    return capsys.readouterr().out


def test_check_explains(file, monkeypatch, capsys):
    monkeypatch.setenv("HSMWRAP_SERVER_REGION", "cn-hangzhou")
    out = check(capsys, "--config", file, "--json")
    explained = {s["name"]: (s["value"], s["source"]) for s in json.loads(out)["settings"]}
    assert explained["region"] == ("cn-hangzhou", "HSMWRAP_SERVER_REGION")
    assert explained["port"] == ("8443", "default")
    assert explained["limits.max_threads"] == ("4", "file")
    assert explained["limits.max_request_bytes"] == ("65536", "default")
    assert explained["backends.HSM.plugin"] == ("pkcs11", "file")
    assert explained["backends.HSM.settings.pin_file"] == ("/etc/hsmwrap/pin", "file")
    assert explained["backends.HSM.settings.user_pin"] == ("(set, not shown)", "file")
    assert explained["database_url"] == ("postgresql+psycopg://kms:***@db.example/kms", "file")
    assert explained["audit_key_file"] == ("-", "default")
    table = check(capsys, "--config", file)
    assert table.splitlines()[0].split() == ["setting", "value", "source"]
    for secret in ("pass-word", "12345678", "hidden"):
        assert secret not in out + table


@pytest.fixture
def real(tmp_path, keyring_file, database_url):
    access = tmp_path / "access.toml"
    access.write_text('[[access_key]]\nid = "me"\nsecret = "x"\nallow = [{ actions = ["*"] }]\n')
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
