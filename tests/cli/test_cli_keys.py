"""hsmwrap keys, on both backends."""

import json
from datetime import timedelta

import pytest

from hsmwrap import registry
from hsmwrap.cli import main
from hsmwrap.imports import TOKEN_LIFETIME
from hsmwrap.keypool import PoolSettings
from hsmwrap.pkcs11.keysets.keys import CURRENT_SET_LIFETIME
from hsmwrap.testing import MemoryBackend


@pytest.fixture
def keyring(tmp_path):
    return ["--backend", "software", "--keyring-file", str(tmp_path / "keyring")]


def test_the_life_of_a_keyring(keyring, run_json, capsys):
    status, first = run_json("keys", "init", *keyring)
    assert status == 0
    (only,) = first["key_sets"]
    _, both = run_json("keys", "rotate", *keyring)
    assert [each["current"] for each in both["key_sets"]].count(True) == 1
    assert len(both["key_sets"]) == 2
    _, left = run_json("keys", "retire", only["key_set"], "--force", *keyring)
    assert only["key_set"] not in [each["key_set"] for each in left["key_sets"]]
    assert main(["keys", "list", *keyring]) == 0
    assert "current" in capsys.readouterr().out


def test_the_current_set_cannot_be_retired(keyring, run_json, capsys):
    _, first = run_json("keys", "init", *keyring)
    assert main(["keys", "retire", first["key_sets"][0]["key_set"], *keyring]) == 2
    assert "current" in capsys.readouterr().err


def test_retire_without_a_number_says_what_is_missing(keyring, run_json, capsys):
    run_json("keys", "init", *keyring)
    assert main(["keys", "retire", "--force", *keyring]) == 2
    assert "retire: name the key set; `hsmwrap keys list`" in capsys.readouterr().err


def test_init_twice_is_refused(keyring, run_json):
    run_json("keys", "init", *keyring)
    assert main(["keys", "init", *keyring]) == 2


def test_the_life_of_key_sets_in_an_hsm_token(softhsm):
    made = json.loads(softhsm.run_keys("init", "cli-keys"))["key_sets"]
    assert [(each["key_set"], each["current"]) for each in made] == [("1", True)]
    assert "trusted" in made[0]["detail"]
    rotated = json.loads(softhsm.run_keys("rotate", "cli-keys"))["key_sets"]
    assert [(each["key_set"], each["current"]) for each in rotated] == [("1", False), ("2", True)]
    left = json.loads(softhsm.run_keys("retire", "cli-keys", "1", "--force"))["key_sets"]
    assert [each["key_set"] for each in left] == ["2"]


@pytest.fixture
def acme(tmp_path, monkeypatch):
    """A plug-in that hsmwrap has no options for, and its settings in a file."""
    monkeypatch.setattr(registry, "load", lambda _name: MemoryBackend)
    file = tmp_path / "acme.toml"
    directory = tmp_path / "objects"
    file.write_text(f'directory = "{directory}"\nwrapping_custody = "HsmInternal"\n')
    return ["--backend", "acme", "--settings", str(file)]


def test_the_key_sets_of_any_plug_in_are_managed(acme, run_json):
    assert run_json("keys", "init", *acme)[1]["key_sets"][0]["key_set"] == "1"
    _, rotated = run_json("keys", "rotate", *acme)
    assert [(each["key_set"], each["current"]) for each in rotated["key_sets"]] == [
        ("1", False),
        ("2", True),
    ]
    _, left = run_json("keys", "retire", "1", "--force", *acme)
    assert [each["key_set"] for each in left["key_sets"]] == ["2"]
    assert run_json("keys", "reap", *acme)[1] == {"examined": 0, "removed": [], "failed": []}


def test_options_outrank_the_settings_file(keyring, tmp_path, run_json):
    file = tmp_path / "settings.toml"
    file.write_text(f'keyring_file = "{tmp_path / "another"}"\n')
    run_json("keys", "init", *keyring, "--settings", str(file))
    assert (tmp_path / "keyring").exists()
    assert not (tmp_path / "another").exists()
    run_json("keys", "init", "--backend", "software", "--settings", str(file))
    assert (tmp_path / "another").exists()


def test_a_settings_file_replaces_the_variables(keyring, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HSMWRAP_KEYRING_FILE", str(tmp_path / "keyring"))
    file = tmp_path / "settings.toml"
    file.write_text("")
    assert main(["keys", "init", "--backend", "software", "--settings", str(file)]) == 2
    assert "keyring_file" in capsys.readouterr().err
    assert not (tmp_path / "keyring").exists()


@pytest.mark.parametrize("content", [b"pin = '0123456789abcdef", b"\xff0123456789abcdef", None])
def test_a_settings_file_that_does_not_parse_is_named_and_not_quoted(content, tmp_path, capsys):
    file = tmp_path / "settings.toml"
    if content is not None:
        file.write_bytes(content)
    assert main(["keys", "list", "--backend", "software", "--settings", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hsmwrap: --settings {file}: ")
    assert "0123456789abcdef" not in error


def test_an_option_of_another_backend_is_refused(acme, capsys):
    assert main(["keys", "list", *acme, "--token-label", "x"]) == 2
    assert "--token-label is an option of another backend" in capsys.readouterr().err


def test_a_backend_without_resident_keys_has_nothing_to_reap(keyring, run_json):
    run_json("keys", "init", *keyring)
    assert run_json("keys", "reap", *keyring) == (0, {"examined": 0, "removed": [], "failed": []})


def test_the_help_says_when_a_key_set_may_be_retired(capsys):
    """Token lifetime, the pool's max_age, and the time that processes cache the current set."""
    wait = TOKEN_LIFETIME + PoolSettings().max_age + timedelta(seconds=CURRENT_SET_LIFETIME)
    assert wait == timedelta(hours=25, minutes=1)
    with pytest.raises(SystemExit):
        main(["keys", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "25 hours and a minute" in text
    assert "wait 24 hours" not in text


def test_init_without_the_so_pin_says_what_is_weaker(softhsm, monkeypatch, capsys):
    for name, value in softhsm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HSMWRAP_SO_PIN_FILE")
    assert main(["keys", "init", "--key-prefix", "cli-weak"]) == 0
    captured = capsys.readouterr()
    assert "not trusted" in captured.err
    assert "NOT trusted" in captured.out


def test_old_tokens_and_keys_work_until_their_set_is_retired(softhsm):
    from datetime import UTC, datetime, timedelta

    from hsmwrap import registry
    from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
    from hsmwrap.errors import InvalidImportToken, InvalidMac, KeyNotFound
    from hsmwrap.testing.clients import openssl_encrypt

    settings = softhsm.settings("cli-rotation")
    algorithm = WrappingAlgorithm.RSAES_OAEP_SHA_1
    with registry.open_backend("pkcs11", settings) as backend:
        expires = datetime.now(UTC) + timedelta(hours=1)
        key = backend.generate_wrapping_key(WrappingKeySpec.RSA_2048, algorithm, expires_at=expires)
        mac = backend.mac(b"token")
        ciphertext = openssl_encrypt(algorithm, key.public_key, bytes(32))

        def bring():
            return backend.unwrap_material(
                key.private_key, algorithm, ciphertext, key_spec=KeySpec.ALIYUN_AES_256
            )

        imported = bring().key
        softhsm.run_keys("rotate", "cli-rotation")
    with registry.open_backend("pkcs11", settings) as backend:
        assert backend.mac(b"token").key_set == "2"
        backend.verify_mac(b"token", mac)
        assert bring().check_value
        assert backend.decrypt(imported, backend.encrypt(imported, b"m")) == b"m"
    softhsm.run_keys("retire", "cli-rotation", "1", "--force")
    with registry.open_backend("pkcs11", settings) as backend:
        with pytest.raises(InvalidMac):
            backend.verify_mac(b"token", mac)
        with pytest.raises(InvalidImportToken):
            bring()
        with pytest.raises(KeyNotFound):
            backend.encrypt(imported, b"m")
