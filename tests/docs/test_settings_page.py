"""docs/settings.md and the command line say of each setting what the code reads."""

import dataclasses

import pytest
from support.documents import ROOT, section_of, text_of

from hsmwrap.cli import main
from hsmwrap.keypool import PoolSettings
from hsmwrap.kms.config import BackendConfig, LimitsConfig, ServerConfig, settings_table
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.software.settings import SoftwareSettings

SETTINGS = ROOT / "docs" / "settings.md"
COMPONENTS = {
    "PKCS#11 backend": Pkcs11Settings.table(),
    "Software backend": SoftwareSettings.table(),
    "Key-pair pool": PoolSettings.table(),
    "Server": settings_table(),
}


def test_the_document_is_what_the_command_prints(capsys):
    assert main(["config", "settings"]) == 0
    assert text_of(SETTINGS) == capsys.readouterr().out


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_setting_has_its_row(component):
    section = section_of(SETTINGS, component)
    for row in COMPONENTS[component]:
        assert f"\n| `{row.name}` | {row.takes} | " in section
        assert f" | {row.help} |\n" in section
        assert row.help.endswith(".")
        assert row.takes


@pytest.mark.parametrize("settings", [Pkcs11Settings, SoftwareSettings, PoolSettings])
def test_the_table_is_the_arguments_of_the_class(settings):
    arguments = [field.name for field in dataclasses.fields(settings) if field.init]
    assert [row.name for row in settings.table()] == arguments


def test_the_servers_table_is_what_pydantic_reads():
    names = {row.name for row in settings_table()}
    plain = set(ServerConfig.model_fields) - {"backends", "former_backends", "limits"}
    limits = {f"limits.{name}" for name in LimitsConfig.model_fields}
    backends = {
        f"{table}.{name}"
        for table in ("backends.LEVEL", "former_backends.NAME")
        for name in BackendConfig.model_fields
    }
    assert names == plain | limits | backends


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_server_explains_its_settings(capsys):
    text = said(capsys, "serve")
    for row in settings_table():
        assert f"{row.name}: {row.help} Takes {row.takes} (".replace("`", "") in text


def test_the_keys_command_explains_its_options(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = said(capsys, "keys")
    rows = {row.name: row for row in (*Pkcs11Settings.table(), *SoftwareSettings.table())}
    for name in ("uri", "module", "token_label", "pin_file", "force_login", "keyring_file"):
        assert rows[name].help in text
