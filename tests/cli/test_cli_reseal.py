"""``hsmwrap keys`` with the server's file: what needs which key set, moved and asked for."""

import json
import os
import pwd
from itertools import count
from types import SimpleNamespace

import pytest
from support.kms.fakes import AES_MATERIAL, Client

from hsmwrap.catalog import ProtectionLevel
from hsmwrap.cli import main
from hsmwrap.kms import StaticAccessKeys, load_config, open_kms
from hsmwrap.kms.checking import try_to_open
from hsmwrap.software import SoftwareBackend

pytestmark = pytest.mark.slow
SOFTWARE = ProtectionLevel.SOFTWARE
KEYS = 3


@pytest.fixture
def config(tmp_path):
    """A server's file, with three imported keys in its database."""
    keyring = tmp_path / "keyring"
    SoftwareBackend.initialise_keys({"keyring_file": str(keyring)})
    file = tmp_path / "server.toml"
    file.write_text(
        f'database_url = "sqlite:///{tmp_path}/kms.db"\n'
        f'audit_file = "{tmp_path}/audit.log"\n'
        "sweep_interval = 0\n"
        '[backends.SOFTWARE]\nplugin = "software"\n'
        f'settings = {{ keyring_file = "{keyring}" }}\n'
    )
    with opened(file) as kms:
        client = Client(kms)
        for _ in range(KEYS):
            key_id = client.create(ProtectionLevel=SOFTWARE)
            client.import_material(key_id, AES_MATERIAL)
    return file


def opened(file):
    return open_kms(load_config(file), access_keys=StaticAccessKeys(()))


def sets(document):
    return [(each["current"], each["keys"]) for each in document["key_sets"]]


def test_keys_are_counted_moved_and_then_their_set_is_retired(config, run_json, capsys):
    at = ("--config", str(config))
    _, listed = run_json("keys", "list", *at)
    assert sets(listed) == [(True, KEYS)]
    old = listed["key_sets"][0]["key_set"]
    run_json("keys", "rotate", *at)
    assert sets(run_json("keys", "list", *at)[1]) == [(False, KEYS), (True, 0)]

    assert main(["keys", "retire", old, *at]) == 2
    refused = capsys.readouterr().err
    assert f"needed by {KEYS} stored keys (`hsmwrap keys reseal` moves them)" in refused
    assert "import tokens" in refused

    status, moved = run_json("keys", "reseal", *at)
    current = run_json("keys", "list", *at)[1]["key_sets"][1]["key_set"]
    assert (status, moved) == (
        0,
        {"key_set": current, "examined": KEYS, "moved": KEYS, "failed": 0},
    )
    assert sets(run_json("keys", "list", *at)[1]) == [(False, 0), (True, KEYS)]

    assert main(["keys", "retire", old, *at]) == 2
    refused = capsys.readouterr().err
    assert "stored keys" not in refused
    assert "import tokens" in refused
    _, left = run_json("keys", "retire", old, "--force", *at)
    assert [each["key_set"] for each in left["key_sets"]] == [current]
    with opened(config) as kms:
        client = Client(kms)
        for key in client("ListKeys")["Keys"]["Key"]:
            client.usable(key["KeyId"])


def test_a_key_set_that_is_missing_is_listed_and_its_number_is_not_taken(config, run_json, capsys):
    at = ("--config", str(config))
    old = run_json("keys", "list", *at)[1]["key_sets"][0]["key_set"]
    run_json("keys", "rotate", *at)
    run_json("keys", "retire", old, "--force", *at)
    status, listed = run_json("keys", "list", *at)
    assert (status, listed["missing"]) == (1, {old: KEYS})
    assert main(["keys", "list", *at]) == 1
    assert "MISSING" in capsys.readouterr().out
    assert main(["keys", "rotate", *at]) == 2
    assert f"stored keys need key set {old}, which the backend does not have" in (
        capsys.readouterr().err
    )
    assert main(["keys", "rotate", "--force", *at]) == 0


def test_the_moves_are_in_the_audit_log(config, run_json, tmp_path):
    run_json("keys", "rotate", "--config", str(config))
    run_json("keys", "reseal", "--config", str(config))
    assert (tmp_path / "audit.log").read_text().count("ResealKey") == KEYS
    assert main(["audit", "verify", "--config", str(config)]) == 0


def test_each_command_is_a_line_of_the_audit_log(config, run_json, tmp_path, capsys):
    """And one that was refused, but for one that could not be audited: that does nothing."""
    at = ("--config", str(config))
    _, before = run_json("keys", "list", *at)
    old = before["key_sets"][0]["key_set"]
    assert main(["keys", "init", *at]) == 2
    _, rotated = run_json("keys", "rotate", *at)
    new = rotated["key_sets"][-1]["key_set"]
    assert main(["keys", "retire", old, *at]) == 2
    run_json("keys", "reseal", *at)
    run_json("keys", "retire", old, "--force", *at)
    log = tmp_path / "audit.log"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [line for line in lines if "operator" in line]
    operator = pwd.getpwuid(os.getuid()).pw_name
    assert {(line["operator"], line["access_key_id"], line["backend"]) for line in lines} == {
        (operator, "system", "software")
    }
    told = ("action", "outcome", "key_set", "key_sets_before", "key_sets", "moved", "failed")
    assert [tuple(line.get(name) for name in told) for line in lines] == [
        ("InitKeySets", "ConfigurationError", None, old, None, None, None),
        ("RotateKeySets", "ok", None, old, f"{old} {new}", None, None),
        ("RetireKeySet", "ConfigurationError", old, f"{old} {new}", None, None, None),
        ("ResealAllKeys", "ok", new, None, None, str(KEYS), "0"),
        ("RetireKeySet", "ok", old, f"{old} {new}", new, None, None),
    ]
    assert main(["audit", "verify", *at]) == 0
    log.write_text("damaged\n")
    for command in (["rotate"], ["reseal"], ["retire", new, "--force"]):
        assert main(["keys", *command, *at]) == 1
        assert "audit log" in capsys.readouterr().err
    assert run_json("keys", "list", *at)[1]["key_sets"] == [
        {"key_set": new, "current": True, "detail": "master key", "keys": KEYS}
    ]


def test_root_makes_no_audit_log_for_the_server(config, run_json, tmp_path, monkeypatch):
    for file in tmp_path.glob("audit.log*"):
        file.unlink()
    with monkeypatch.context() as elsewhere:
        another = SimpleNamespace(geteuid=lambda: tmp_path.stat().st_uid + 1)
        elsewhere.setattr("hsmwrap.kms.opening.os", another)
        assert run_json("keys", "rotate", "--config", str(config))[0] == 0
    assert not (tmp_path / "audit.log").exists()
    assert run_json("keys", "rotate", "--config", str(config))[0] == 0
    assert "RotateKeySets" in (tmp_path / "audit.log").read_text()


@pytest.mark.parametrize("command", ["verify", "export"])
def test_progress_is_shown_on_a_terminal_alone(config, command, monkeypatch, capsys):
    times = count()
    monkeypatch.setattr("hsmwrap.cli.audit.time.monotonic", lambda: next(times))
    assert main(["audit", command, "--config", str(config)]) == 0
    quiet = capsys.readouterr()
    assert quiet.err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(["audit", command, "--config", str(config)]) == 0
    shown = capsys.readouterr()
    assert "\r3 lines" in shown.err
    assert shown.err.endswith("\r\x1b[K")
    if command == "export":
        assert shown.out == quiet.out


def test_nothing_moves_with_another_audit_key(config, run_json, tmp_path, capsys):
    key_file = tmp_path / "audit.key"
    key_file.write_bytes(bytes(32))
    key_file.chmod(0o600)
    run_json("keys", "rotate", "--config", str(config))
    before = (tmp_path / "audit.log").read_bytes()
    config.write_text(f'audit_key_file = "{key_file}"\n' + config.read_text())
    for command in (("keys", "reseal"), ("audit", "rotate")):
        assert main([*command, "--config", str(config)]) == 1
        assert "does not chain with this key: set audit_key_file" in capsys.readouterr().err
    assert (tmp_path / "audit.log").read_bytes() == before
    assert sets(run_json("keys", "list", "--config", str(config))[1]) == [(False, KEYS), (True, 0)]
    with opened(config) as kms:
        assert not kms.health().ready
    tried = {each.part: each for each in try_to_open(load_config(config))}
    assert not tried["audit log"].ok
    assert "does not chain with this key" in tried["audit log"].detail


def test_a_key_that_does_not_move_is_the_exit_code(config, run_json, tmp_path):
    keyring = tmp_path / "keyring"
    keyring.rename(tmp_path / "old")
    SoftwareBackend.initialise_keys({"keyring_file": str(keyring)})
    status, moved = run_json("keys", "reseal", "--config", str(config))
    assert (status, moved["moved"], moved["failed"]) == (1, 0, KEYS)


def test_the_rate_is_kept_and_progress_is_shown(config, run_json, monkeypatch):
    now, slept = [0.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr("hsmwrap.cli.keys.time", clock)
    said = []
    monkeypatch.setattr("builtins.print", lambda *text, **_: said.append(text[0]))
    main(["keys", "rotate", "--config", str(config)])
    main(["keys", "reseal", "--config", str(config), "--rate", "0.5"])
    assert slept == [2.0] * KEYS
    assert [text for text in said if "of 3" in text] == [
        "2 of 3: 2 moved, 0 failed",
        "3 of 3: 3 moved, 0 failed",
    ]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--backend", "pkcs11"], "that is configured: software; pkcs11 is not"),
        (["--keyring-file", "f"], "--config names backend and settings"),
        (["--level", "HSM"], "no backend of level HSM"),
    ],
)
def test_what_contradicts_the_server_s_file_is_refused(config, options, why, capsys):
    assert main(["keys", "list", "--config", str(config), *options]) == 2
    assert why in capsys.readouterr().err


def test_the_backend_of_a_level_may_be_named(config, run_json):
    named = ("--config", str(config), "--backend", "software")
    assert sets(run_json("keys", "list", *named)[1]) == [(True, KEYS)]


@pytest.fixture
def restored(config, tmp_path, run_json):
    """After a rotation and the move to the new set, the keyring of before was restored."""
    keyring = tmp_path / "keyring"
    old = keyring.read_bytes()
    run_json("keys", "rotate", "--config", str(config))
    run_json("keys", "reseal", "--config", str(config))
    newer = keyring.read_bytes()
    keyring.write_bytes(old)
    return SimpleNamespace(keyring=keyring, newer=newer)


def test_a_missing_set_fails_a_check_and_nothing_is_made_before_it_is_back(
    config, restored, run_json, capsys
):
    at = ("--config", str(config))
    status, listed = run_json("keys", "list", *at)
    assert (status, sets(listed)) == (1, [(True, 0)])
    ((lost, keys),) = listed["missing"].items()
    assert keys == KEYS

    before = restored.keyring.read_bytes()
    for action in ("rotate", "init"):
        assert main(["keys", action, *at]) == 2
        refused = capsys.readouterr().err
        assert f"stored keys need key set {lost}, which the backend does not have" in refused
    assert restored.keyring.read_bytes() == before

    tried = {each.part: each for each in try_to_open(load_config(config))}
    assert not tried["stored keys"].ok
    assert f"{KEYS} need key set {lost} of backend software" in tried["stored keys"].detail

    restored.keyring.write_bytes(restored.newer)
    status, listed = run_json("keys", "list", *at)
    assert (status, "missing" in listed) == (0, False)
    assert all(each.ok for each in try_to_open(load_config(config)))
    assert run_json("keys", "rotate", *at)[0] == 0


def test_before_the_server_s_first_start_a_set_is_made(tmp_path, run_json):
    file = tmp_path / "server.toml"
    file.write_text(
        f'database_url = "sqlite:///{tmp_path}/kms.db"\naudit_file = "{tmp_path}/audit.log"\n'
        '[backends.SOFTWARE]\nplugin = "software"\n'
        f'settings = {{ keyring_file = "{tmp_path / "keyring"}" }}\n'
    )
    assert run_json("keys", "init", "--config", str(file))[0] == 0
    assert sets(run_json("keys", "list", "--config", str(file))[1]) == [(True, 0)]
    assert not (tmp_path / "kms.db").exists()


@pytest.mark.parametrize("rate", ["0", "-1", "nan"])
def test_a_rate_that_is_not_one_is_refused(config, rate, capsys):
    assert main(["keys", "reseal", "--config", str(config), "--rate", rate]) == 2
    assert "--rate: takes more than 0" in capsys.readouterr().err


@pytest.mark.parametrize("action", [["reseal"], ["retire", "SET"]])
def test_without_the_server_s_file_nothing_tells_what_a_set_sealed(
    action, run_json, capsys, tmp_path
):
    keyring = ["--backend", "software", "--keyring-file", str(tmp_path / "keyring")]
    _, first = run_json("keys", "init", *keyring)
    run_json("keys", "rotate", *keyring)
    words = [first["key_sets"][0]["key_set"] if word == "SET" else word for word in action]
    assert main(["keys", *words, *keyring]) == 2
    assert "give --config FILE" in capsys.readouterr().err
    assert len(run_json("keys", "list", *keyring)[1]["key_sets"]) == 2
