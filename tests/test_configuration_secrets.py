"""No PIN and no password of a configuration in a repr, a text or an exception, frames included."""

import traceback
from pathlib import Path

import pytest

from hsmwrap.errors import ConfigurationError, HsmwrapError
from hsmwrap.kms.access import FileAccessKeys, parse_access_keys
from hsmwrap.kms.config import BackendConfig, ServerConfig, load_config
from hsmwrap.kms.database import Database
from hsmwrap.kms.explain import explain
from hsmwrap.kms.opening import open_kms
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.token.pin import from_settings
from hsmwrap.pkcs11.token.uri import parse
from hsmwrap.registry import open_backend
from hsmwrap.settings import read_settings

SECRET = "Zx9-4711-QQ"
URI = f"pkcs11:token=A?module-path=/usr/lib/x.so&pin-value={SECRET}"
VALUES = {
    "uri": {"uri": URI, "allow_pin_value": True},
    "pin command": {"module": "/x.so", "pin_command": ["/bin/echo", SECRET]},
    "pin command in text": {"module": "/x.so", "pin_command": f"/bin/echo {SECRET}"},
    "pin callback": {"module": "/x.so", "pin_callback": lambda secret=SECRET: secret},
    "vendor's own": {"module": "/x.so", "user_pin": SECRET},
    "wrong place": {"module": "/x.so", "slot_id": SECRET, "pin_env": SECRET},
    "list": {"module": "/x.so", "pin_file": [SECRET]},
    "relative": {"module": "/x.so", "pin_file": SECRET},
    "variable": {"module": "/x.so", "pin_env": f"{SECRET} "},
    "unquoted": {"uri": f"pkcs11:token=A?pin-value={SECRET}&x y"},
    "in the path": {"uri": f"pkcs11:token=A;pin-value={SECRET}"},
    "not allowed": {"uri": URI},
    "stray": {"uri": f"pkcs11:token=A&pin-value={SECRET}"},
}


def shown(thing):
    """All that a log or a report may show of a value."""
    yield from (repr(thing), str(thing), f"{thing}", f"{thing!a}")


def texts_of(error):
    """All that whatever records an error, its frames and the errors behind it can show."""
    pending, seen = [error], set()
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield from shown(one)
        yield repr((one.args, vars(one)))
        frames = traceback.TracebackException.from_exception(one, capture_locals=True)
        for summary in frames.stack:
            if Path(summary.filename) != Path(__file__):
                yield from (summary.locals or {}).values()
        pending += [one.__cause__, one.__context__]


def outcome(call, *arguments, **named):
    """What the call returned, or its error and all texts of it."""
    result, failed = None, None
    try:
        result = call(*arguments, **named)
    except (HsmwrapError, TypeError) as error:
        failed = error
    texts = texts_of(failed) if failed else shown(result)
    assert not [text for text in texts if SECRET in text]
    return result


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_settings_of_a_backend(values):
    outcome(Pkcs11Settings.from_mapping, values)
    outcome(open_backend, "pkcs11", values)
    outcome(open_backend, "software", values)
    outcome(open_backend, "software", {"keyring_file": SECRET, "sm2_engine": SECRET})
    if "uri" in values:
        for allow in (True, False):
            outcome(parse, values["uri"], allow_pin_value=allow)
    outcome(from_settings, values)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_configuration_of_a_server(values):
    config = ServerConfig(
        backends={"HSM": {"plugin": "pkcs11", "settings": values}},
        database_url=f"postgresql+psycopg://kms:{SECRET}@db/kms?password={SECRET}",
    )
    for thing in (config, config.backends, config.backends["HSM"], [config], config.database_url):
        assert not [text for text in shown(thing) if SECRET in text]


def test_a_configuration_says_which_plugin_it_has():
    assert repr(BackendConfig(plugin="pkcs11", settings={"user_pin": SECRET})) == (
        "BackendConfig(plugin='pkcs11')"
    )


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_a_server_that_does_not_start(values):
    config = ServerConfig(
        backends={"HSM": {"plugin": "pkcs11", "settings": values}},
        database_url=f"postgresql+psycopg://kms:{SECRET}@db/kms",
    )
    with pytest.raises(HsmwrapError):
        open_kms(config)
    outcome(open_kms, config)


WRONG_FILES = {
    "value of the wrong kind": f"port = '{SECRET}'\n",
    "setting in the wrong place": f"[backends]\nHSM = '{SECRET}'\n",
    "unknown key": f"[backends.HSM]\nplugin = 'x'\npin = '{SECRET}'\n",
    "wrong database": f"database_url = ['{SECRET}']\n",
    "not closed": f"user_pin = '{SECRET}\n",
    "not quoted": f"user_pin = {SECRET}\n",
    "twice": f"user_pin = '{SECRET}'\nuser_pin = '{SECRET}'\n",
    "table over value": f"user_pin = '{SECRET}'\n[user_pin]\nx = 1\n",
    "escape": f'user_pin = "{SECRET}\\q"\n',
    "not UTF-8": b"user_pin = '\xff" + SECRET.encode() + b"'\n",
}


@pytest.mark.parametrize("text", WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_file_that_is_wrong(tmp_path, text):
    file = tmp_path / "hsmwrap.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    file.chmod(0o600)
    with pytest.raises(ConfigurationError):
        load_config(file)
    outcome(load_config, file)
    outcome(lambda: read_settings(file) and None)
    outcome(FileAccessKeys, file)


def test_a_file_that_is_wrong_names_the_place(tmp_path):
    file = tmp_path / "hsmwrap.toml"
    file.write_text(f"port = 1\nuser_pin = {SECRET}\n")
    with pytest.raises(ConfigurationError, match=r"is not TOML \(at line 2, column \d+\)"):
        load_config(file)


@pytest.mark.parametrize("value", [f'{{"HSM": "{SECRET}', f"{SECRET}", f'["{SECRET}"]'])
def test_a_variable_that_is_wrong(monkeypatch, value):
    monkeypatch.setenv("HSMWRAP_SERVER_BACKENDS", value)
    with pytest.raises(ConfigurationError, match="backends"):
        load_config()
    outcome(load_config)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+psycopg://kms:{SECRET}@db/kms",
        f"postgresql+psycopg://db/kms?user=kms&password={SECRET}",
        f"mysql://kms:{SECRET}@db/kms",
        f"postgresql+nothing://kms:{SECRET}@db/kms",
        f"postgresql://kms:{SECRET}@db:port/kms",
        SECRET,
    ],
)
def test_database(url):
    database = outcome(Database, url)
    if database:
        database.close()


@pytest.mark.parametrize(
    "document",
    [
        {"access_key": SECRET},
        {"access_key": [SECRET]},
        {"access_key": [{"id": "a", "secret": [SECRET]}]},
        {"access_key": [{"id": "a", "secret": SECRET, "allow": [SECRET]}]},
        {"access_key": [{"id": "a", "secret": SECRET, "allow": [{"actions": ["*"]}]}]},
        {"access_key": [{"id": "system", "secret": SECRET}]},
        {"access_key": [{"id": "a", "secret": SECRET}] * 2},
    ],
)
def test_access_keys(document):
    with pytest.raises(ConfigurationError):
        parse_access_keys(document)
    outcome(parse_access_keys, document)


def test_what_explains_a_configuration_shows_none():
    for values in VALUES.values():
        config = ServerConfig(backends={"HSM": {"plugin": "pkcs11", "settings": values}})
        known = {"uri", "pin_command", "user_pin"}
        if set(values) <= known | {"module", "allow_pin_value"} and "stray" not in values:
            assert SECRET not in str(explain(config))


def test_the_search_finds_a_planted_one():
    with pytest.raises(ConfigurationError) as planted:
        exec(compile(PLANTED, "elsewhere", "exec"), {"ConfigurationError": ConfigurationError})
    assert [text for text in texts_of(planted.value) if SECRET in text]


PLANTED = f"""
def fail(secret):
    raise ConfigurationError("wrong")
fail("{SECRET}")
"""
