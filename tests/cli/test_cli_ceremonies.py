"""Ceremonies of ``hsmwrap keys``: terminals, two HSM tokens, transcripts."""

import argparse
import json
import os
import re
import secrets
import select
import subprocess
import sys
from argparse import Namespace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support import forked
from support.kms.fakes import AES_MATERIAL, SM4_MATERIAL, Client
from support.shares import told

from hsmwrap import transcript
from hsmwrap.backend import KeySetFile
from hsmwrap.cli import ceremonies, main
from hsmwrap.errors import ConfigurationError, HsmError, PinError
from hsmwrap.kms import StaticAccessKeys, load_config, open_kms
from hsmwrap.privatefile import PrivateFile
from hsmwrap.registry import KeySetManager
from hsmwrap.testing.softhsm import SoftHsm, SoftHsmError


def settings_file(token, file):
    file.write_text("".join(f'{k} = "{v}"\n' for k, v in token.bare_settings().items()))
    return file


def sets(printed):
    return [(each["key_set"], each["current"]) for each in json.loads(printed)["key_sets"]]


# --- the terminal ---------------------------------------------------------------------------------


class Terminal:
    """The command, with a terminal that is not its standard output."""

    def __init__(self, token, *arguments):
        self.master, slave = os.openpty()
        command = ["setsid", "--ctty", "--wait", sys.executable, "-m", "hsmwrap.cli", "keys"]
        self.process = subprocess.Popen(
            [*command, *arguments],
            env=os.environ | token.environment,
            stdin=slave,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(slave)
        self.shown = ""

    def until(self, text):
        """What is shown since the last call, up to this text."""
        while text not in self.shown:
            ready, _, _ = select.select([self.master], [], [], 60)
            assert ready, self.shown
            self.shown += os.read(self.master, 4096).decode()
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text):
        os.write(self.master, f"{text}\n".encode())

    def ended(self):
        output, errors = self.process.communicate(timeout=60)
        os.close(self.master)
        return self.process.returncode, output, errors


@pytest.mark.slow
def test_shares_are_shown_one_at_a_time_and_typed_without_an_echo(softhsm, tmp_path):
    prefix = f"terminal-{secrets.token_hex(4)}"
    softhsm.run_keys("init", prefix)
    file = str(tmp_path / "backup")
    made = ("--shares", "3", "--threshold", "2", "--out", file, "--key-prefix", prefix)
    terminal = Terminal(softhsm, "backup", *made)
    shares = []
    for number in range(1, 4):
        terminal.until(f"Share {number} of 3")
        shown = terminal.until("Write it down")
        terminal.until("press Enter. ")
        shares.append(" ".join(re.findall(r"\d+ ([a-z]+)", shown)))
        terminal.type("")
    status, output, errors = terminal.ended()
    assert status == 0, errors
    assert output.splitlines()[0] == file
    assert not any(told(share, output + errors) for share in shares)

    target = SoftHsm.make(tmp_path / "token", "other")
    given = ("restore", "--file", file, "--key-prefix", prefix)
    terminal = Terminal(target, *given)
    echoed = terminal.until("share 1 of 2 (not shown): ")
    for typed in ("zebra", shares[2]):
        terminal.type(typed)
        again = "share 1 of 2" if typed != shares[2] else "share 2 of 2"
        echoed += terminal.until(f"{again} (not shown): ")
    terminal.type(shares[2])
    echoed += terminal.until("share 2 of 2 (not shown): ")
    terminal.type(shares[0])
    status, output, errors = terminal.ended()
    assert status == 0, errors
    assert "share 1 is damaged" in errors
    assert "share 2 is the same share as share 1" in errors
    assert not told(shares[2], echoed)
    assert "zebra" not in echoed
    assert sets(target.run_keys("list", prefix)) == [("1", True)]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["backup", "--out", "f"], "give --shares N and --threshold M"),
        (["backup", "--shares", "3", "--threshold", "2"], "name a new file by --out FILE"),
        (
            ["backup", "--shares", "3", "--threshold", "2", "--out", "f"],
            "there is not a terminal: give --shares-to DIR",
        ),
        (
            ["backup", "--shares", "3", "--threshold", "2", "--out", "f", "--shares-to", "none"],
            "--shares-to none: is not a directory: make it first",
        ),
        (["restore"], "give --file FILE, the backup"),
        (["restore", "--file", "none"], "No such file"),
        (["clone"], "give --to SETTINGS.toml and --to-so-pin-file FILE"),
        (["drill"], "give --to SETTINGS.toml and --to-so-pin-file FILE"),
        (["init", "--words", "hello"], "--words: are for --transcript FILE"),
        (["init", "--words", "x" * 1001, "--transcript", "t"], "at most 1000 characters"),
        (["verify-transcript"], "give --transcript FILE"),
    ],
)
def test_what_is_not_given_is_said(arguments, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hsmwrap.cli.ceremonies._TERMINAL", str(tmp_path / "none" / "tty"))
    assert main(["keys", *arguments]) == 2
    assert why in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_backup_replaces_no_file_and_no_share(tmp_path, capsys):
    numbers = ("--shares", "3", "--threshold", "2", "--shares-to", str(tmp_path))
    there = tmp_path / "share-2"
    there.write_text("")
    assert main(["keys", "backup", *numbers, "--out", str(tmp_path / "new")]) == 2
    assert "share-2: is there already" in capsys.readouterr().err
    assert main(["keys", "backup", *numbers, "--out", str(there)]) == 2
    assert list(tmp_path.iterdir()) == [there]


@pytest.mark.parametrize("action", ["backup", "clone", "transport-key"])
def test_the_software_backend_says_that_its_file_is_the_backup(action, tmp_path, capsys):
    at = ("--backend", "software", "--keyring-file", str(tmp_path / "keyring"))
    main(["keys", "init", *at])
    other = tmp_path / "other.toml"
    other.write_text(f'keyring_file = "{tmp_path / "other"}"\n')
    more = ("--to", str(other), "--to-so-pin-file", "f", "--out", str(tmp_path / "out"))
    shares = ("--shares", "3", "--threshold", "2", "--shares-to", str(tmp_path))
    done = forked.run(
        "support.pkcs11.keys_command", arguments=["keys", action, *at, *more, *shares]
    )
    assert done.returncode == 1
    assert "a copy of that file is the backup and the clone" in done.stderr
    assert not (tmp_path / "out").exists()


# --- two tokens on one host -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_clone_in_one_command_and_back(softhsm, tmp_path):
    """Each token in a slot of one module; the keys that were sealed on one open on the other."""
    source = SoftHsm.make(tmp_path / "both", "source")
    (tmp_path / "both" / "user.pin").rename(tmp_path / "source.pin")
    (tmp_path / "both" / "so.pin").rename(tmp_path / "source-so.pin")
    target = SoftHsm.make(tmp_path / "both", "target")
    source.environment["HSMWRAP_PIN_FILE"] = str(tmp_path / "source.pin")
    source.environment["HSMWRAP_SO_PIN_FILE"] = str(tmp_path / "source-so.pin")
    record = ("--transcript", str(tmp_path / "transcript"))

    def clone(one, other):
        to = settings_file(other, tmp_path / "to.toml")
        so_pin = other.environment["HSMWRAP_SO_PIN_FILE"]
        given = ("--to", str(to), "--to-so-pin-file", so_pin, *record)
        return sets(one.run_keys("clone", "hsmwrap", *given))

    with pytest.raises(SoftHsmError, match="has no key set whose keys can leave it"):
        clone(source, target)
    assert {each.name for each in (tmp_path / "both").rglob("*.object")} == {"token.object"}
    (tmp_path / "transcript").unlink()
    source.run_keys("init", "hsmwrap")
    assert clone(source, target) == [("1", True)]
    assert sets(target.run_keys("rotate", "hsmwrap")) == [("1", False), ("2", True)]
    assert clone(target, source) == [("1", False), ("2", True)]
    assert sets(source.run_keys("list", "hsmwrap")) == [("1", False), ("2", True)]
    lines = [json.loads(line) for line in (tmp_path / "transcript").read_text().splitlines()]
    assert [each["outcome"] for each in lines] == ["began", "ok"] * 2
    assert lines[1]["fingerprints"].keys() == {"transport_key", "key_sets"}


class Target(KeySetManager):
    """Of the other HSM token, as a clone sees it."""

    def __init__(self, failing):
        self.failing, self.calls, self._name = failing, [], "pkcs11"

    def _called(self, name, error=None):
        self.calls.append(name)
        if self.failing == name:
            raise error or PinError("refused")
        return KeySetFile("{}", "00")

    def make_transport_key(self, **_):
        return self._called("make_transport_key")

    def export(self, *_, **_options):
        return self._called("export")

    def import_exported(self, *_, **_options):
        return self._called("import_exported", HsmError("does not unwrap"))

    def discard_transport_key(self, **_):
        self._called("discard_transport_key")


@pytest.mark.parametrize(
    ("failing", "error", "discarded"),
    [
        ("make_transport_key", PinError, False),
        ("export", PinError, True),
        ("import_exported", HsmError, True),
        ("import_exported", PinError, False),  # the next wrong PIN may lock the target
    ],
)
def test_a_clone_that_fails_leaves_no_transport_key(failing, error, discarded, monkeypatch):
    target = Target(failing)
    if error is PinError:
        monkeypatch.setattr(target, "import_exported", lambda *_, **__: target._called(failing))
    monkeypatch.setattr(ceremonies, "other_token", lambda _: (target, "so.pin"))
    with pytest.raises(error):
        ceremonies.clone(ceremonies.Ceremony(Namespace(), target, "so.pin"))
    assert (target.calls[-1] == "discard_transport_key") is discarded


# --- a drill with a server's keys -----------------------------------------------------------------


@pytest.mark.slow
def test_a_drill_opens_the_keys_of_a_server(softhsm, tmp_path):
    """And counts those that the backup is too old for; their rows stay as they are."""
    prefix = f"drill-{secrets.token_hex(4)}"
    softhsm.run_keys("init", prefix)
    server = tmp_path / "server.toml"
    settings = softhsm.bare_settings(key_prefix=prefix)
    given = "\n".join(f'{name} = "{value}"' for name, value in settings.items())
    server.write_text(
        f'database_url = "sqlite:///{tmp_path}/kms.db"\naudit_file = "{tmp_path}/audit.log"\n'
        f'sweep_interval = 0\n[backends.HSM]\nplugin = "pkcs11"\n[backends.HSM.settings]\n{given}\n'
    )

    def imported(*materials):
        with open_kms(load_config(server), access_keys=StaticAccessKeys(())) as kms:
            client = Client(kms)
            for spec, material in materials:
                key_id = client.create(ProtectionLevel="HSM", KeySpec=spec)
                client.import_material(key_id, material)

    imported(("Aliyun_AES_256", AES_MATERIAL), ("Aliyun_SM4", SM4_MATERIAL))
    shares = tmp_path / "shares"
    shares.mkdir()
    numbers = ("--shares", "3", "--threshold", "2", "--shares-to", str(shares))
    softhsm.run_keys("backup", prefix, *numbers, "--out", str(tmp_path / "backup"))
    scratch = SoftHsm.make(tmp_path / "scratch", "scratch")
    to = settings_file(scratch, tmp_path / "to.toml")
    arguments = ["keys", "drill", "--config", str(server), "--file", str(tmp_path / "backup")]
    arguments += [f"--share-file={shares / name}" for name in ("share-1", "share-3")]
    arguments += ["--to", str(to)]
    arguments += ["--to-so-pin-file", scratch.environment["HSMWRAP_SO_PIN_FILE"], "--json"]
    arguments += ["--transcript", str(tmp_path / "transcript")]

    def drilled():
        environment = scratch.environment
        done = forked.run(
            "support.pkcs11.keys_command", arguments=arguments, environment=environment
        )
        return done.returncode, done.stdout and json.loads(done.stdout), done.stderr

    before = (tmp_path / "kms.db").read_bytes()
    expected = {"key_sets": ["1"], "stored_keys": {"opened": 2, "failed": 0}}
    assert drilled()[:2] == (0, expected)
    assert (tmp_path / "kms.db").read_bytes() == before
    assert sets(scratch.run_keys("list", "hsmwrap")) == []
    last = json.loads((tmp_path / "transcript").read_text().splitlines()[-1])
    assert last["stored_keys"] == expected["stored_keys"]
    # The control: a key that was imported under a set which the backup does not have.
    softhsm.run_keys("rotate", prefix)
    imported(("Aliyun_AES_256", bytes(32)))
    expected["stored_keys"] = {"opened": 2, "failed": 1}
    assert drilled()[:2] == (1, expected)


# --- transcripts ----------------------------------------------------------------------------------

NOW = datetime(2026, 12, 1, 9, 30, tzinfo=UTC)


@pytest.fixture
def written(tmp_path):
    """A transcript of four lines, and the digest of the last."""
    file = tmp_path / "transcript"
    for number in range(4):
        digest = transcript.append(file, NOW, {"ceremony": "init", "words": f"line {number}"})
    return file, digest


def test_a_transcript_is_complete(written, run_json):
    file, digest = written
    assert file.stat().st_mode & 0o777 == 0o600
    status, found = run_json("keys", "verify-transcript", "--transcript", str(file))
    assert (status, found["ok"], found["lines"], found["digest"]) == (0, True, 4, digest)
    noted = ("--fingerprint", digest)
    assert run_json("keys", "verify-transcript", "--transcript", str(file), *noted)[0] == 0


def test_a_digest_of_an_earlier_ceremony_is_found(written, run_json, capsys):
    file, digest = written
    for number in range(2):
        transcript.append(file, NOW, {"ceremony": "rotate", "words": f"line {number}"})
    noted = ("keys", "verify-transcript", "--transcript", str(file), "--fingerprint", digest)
    assert main([*noted]) == 0
    assert "6 lines, complete; noted after line 4; 2 lines follow\n" in capsys.readouterr().out
    status, found = run_json(*noted)
    assert (status, found["noted"], found["lines"]) == (0, 4, 6)


def changed(lines):
    lines[1] = lines[1].replace(b"line 1", b"line 7")


def missing(lines):
    del lines[2]


def reordered(lines):
    lines[1], lines[2] = lines[2], lines[1]


def inserted(lines):
    lines.insert(1, lines[1])


def without_the_first(lines):
    del lines[0]


def other_text(lines):
    lines[3] = b"all went well\n"


def incomplete(lines):
    lines[3] = lines[3][:-1]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (changed, 2),
        (missing, 3),
        (reordered, 2),
        (inserted, 3),
        (without_the_first, 1),
        (other_text, 4),
        (incomplete, 4),
    ],
)
def test_a_changed_transcript_is_found_and_not_gone_on_with(written, change, line, capsys):
    file, _ = written
    lines = file.read_bytes().splitlines(keepends=True)
    change(lines)
    file.write_bytes(b"".join(lines))
    assert main(["keys", "verify-transcript", "--transcript", str(file)]) == 1
    assert capsys.readouterr().out.startswith(f"{file}: line {line}: ")
    with pytest.raises(ConfigurationError, match=f"line {line}: .*; keep it, and begin a new one"):
        transcript.append(file, NOW, {"ceremony": "init"})
    assert file.read_bytes() == b"".join(lines)


def test_a_cut_off_end_is_found_by_the_digest_that_was_noted(written, capsys):
    file, digest = written
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:3]))
    assert main(["keys", "verify-transcript", "--transcript", str(file)]) == 0
    noted = ("--transcript", str(file), "--fingerprint", digest)
    assert main(["keys", "verify-transcript", *noted]) == 1
    assert "lines are missing at the end" in capsys.readouterr().out


def test_a_transcript_that_cannot_be_written_stops_the_ceremony(tmp_path, capsys):
    at = ("--backend", "software", "--keyring-file", str(tmp_path / "keyring"))
    assert main(["keys", "init", *at, "--transcript", str(tmp_path)]) == 2
    assert "transcript" in capsys.readouterr().err
    assert not (tmp_path / "keyring").exists()


@pytest.mark.parametrize("failing", ["write", "fdatasync"])
def test_a_line_that_cannot_be_written_is_taken_back(written, failing, monkeypatch):
    file, _ = written
    before, write = file.read_bytes(), os.write

    def full(_file):
        raise OSError(28, "No space left on device")

    partial = {"write": lambda to, line: write(to, line[:9]), "fdatasync": full}
    monkeypatch.setattr(os, failing, partial[failing])
    with pytest.raises(ConfigurationError, match=r"transcript .*: (a line was written only|No sp)"):
        transcript.append(file, NOW, {"ceremony": "init"})
    monkeypatch.undo()
    assert file.read_bytes() == before
    transcript.append(file, NOW, {"ceremony": "init"})
    assert transcript.verify(file).lines == 5
    assert not transcript.verify(file).problems


def test_the_error_of_a_ceremony_is_not_replaced_by_that_of_its_transcript(tmp_path, capsys):
    args = argparse.Namespace(transcript=tmp_path / "t", words=None, action="init", key_set=None)
    key_sets = KeySetManager("software", {"keyring_file": str(tmp_path / "keyring")})

    @ceremonies.recorded(ceremonies.Ceremony(args, key_sets, None))
    def fail():
        args.transcript.write_bytes(b"damaged")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert "is not a line of a transcript" in capsys.readouterr().err


def test_each_ceremony_is_written_down_with_its_end(tmp_path, run_json, capsys):
    at = ("--backend", "software", "--keyring-file", str(tmp_path / "keyring"))
    file = tmp_path / "transcript"
    record = ("--transcript", str(file), "--words", "Ann and Bo, room 4")
    _, first = run_json("keys", "init", *at, *record)
    assert main(["keys", "init", *at, *record]) == 2
    run_json("keys", "rotate", *at, *record)
    old = first["key_sets"][0]["key_set"]
    _, left = run_json("keys", "retire", old, "--force", *at, *record)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(each["ceremony"], each["outcome"]) for each in lines] == [
        *(("init", "began"), ("init", "ok"), ("init", "began"), ("init", "ConfigurationError")),
        *(("rotate", "began"), ("rotate", "ok"), ("retire", "began"), ("retire", "ok")),
    ]
    assert lines[-1]["key_set"] == old
    assert lines[-1]["key_sets"] == [left["key_sets"][0]["key_set"]]
    assert {each["words"] for each in lines} == {"Ann and Bo, room 4"}
    assert all(datetime.fromisoformat(each["time"]).tzinfo for each in lines)


@pytest.mark.slow
def test_a_transcript_has_fingerprints_and_no_secret(softhsm, tmp_path):
    prefix = f"transcript-{secrets.token_hex(4)}"
    file = tmp_path / "transcript"
    record = ("--transcript", str(file))
    softhsm.run_keys("init", prefix, *record)
    numbers = ("--shares", "3", "--threshold", "2", "--shares-to", str(tmp_path))
    out = ("--out", str(tmp_path / "backup"))
    made = json.loads(softhsm.run_keys("backup", prefix, *numbers, *out, *record))
    shares = [f"--share-file={tmp_path / f'share-{number}'}" for number in (1, 2)]
    softhsm.run_keys("restore", prefix, "--file", str(tmp_path / "backup"), *shares, *record)
    damaged = tmp_path / "share-2"
    damaged.write_text(damaged.read_text().replace(" ", " academic ", 1))
    with pytest.raises(SoftHsmError, match="is damaged"):
        softhsm.run_keys("restore", prefix, "--file", str(tmp_path / "backup"), *shares, *record)
    text = file.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [each["ceremony"] for each in lines[1::2]] == ["init", "backup", "restore", "restore"]
    assert [each["outcome"] for each in lines[1::2]] == ["ok", "ok", "ok", "ConfigurationError"]
    for line in lines[3::2]:
        assert line["fingerprints"]["backup"] == made["fingerprint"]
    assert lines[3]["shares"] == "2 of 3"
    assert not any(told(path.read_text(), text) for path in tmp_path.glob("share-*"))
    for secret in ("HSMWRAP_PIN_FILE", "HSMWRAP_SO_PIN_FILE"):
        assert Path(softhsm.environment[secret]).read_text().strip() not in text


def test_a_share_file_that_is_given_twice_is_refused():
    given = Namespace(share_file=[Path("share-1"), Path("share-2"), Path("share-1")])
    with pytest.raises(ConfigurationError, match="share-1 is given twice"):
        ceremonies._given_shares(given, None)


def test_a_part_of_a_share_is_not_left(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(ConfigurationError, match="full"):
        PrivateFile(tmp_path / "share-1", "share").write_new(b"words")
    assert not (tmp_path / "share-1").exists()


def test_a_line_that_was_written_in_part_leaves_a_whole_transcript(tmp_path, monkeypatch):
    file, now = tmp_path / "transcript", datetime.now(UTC)
    transcript.append(file, now, {"event": "one"})
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda f, line: write(f, line[:5]))
        with pytest.raises(ConfigurationError, match="only in part"):
            transcript.append(file, now, {"event": "two"})
    transcript.append(file, now, {"event": "two"})
    assert transcript.verify(file).problems == ()
