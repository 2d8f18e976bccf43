"""Key sets in a backup file and its shares: each token has processes of its own."""

import json
import os
import re
import secrets
import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from itertools import combinations

import pytest
from support.pkcs11.clone_user import MATERIAL, sealed_by, used_on
from support.shares import told

from hsmwrap import shares as secret_sharing
from hsmwrap.backup import Backup, restore
from hsmwrap.checkvalue import check_value
from hsmwrap.errors import ConfigurationError, UnsupportedOperation
from hsmwrap.pkcs11.keysets.backup import _drill_prefix
from hsmwrap.registry import KeySetManager
from hsmwrap.testing.softhsm import SoftHsm, SoftHsmError

SHARES, THRESHOLD = 5, 3


class Made:
    """A backup file and its shares, each in a file."""

    def __init__(self, directory, prefix):
        self.directory, self.prefix = directory, prefix
        self.file = directory / "backup"
        self.shares = [directory / f"share-{number}" for number in range(1, SHARES + 1)]

    def arguments(self, shares):
        given = (f"--share-file={share}" for share in shares)
        return ("--file", str(self.file), *given)

    def restored_on(self, token, shares=None, prefix=None):
        given = self.shares[:THRESHOLD] if shares is None else shares
        printed = token.run_keys("restore", prefix or self.prefix, *self.arguments(given))
        return sets(printed)

    def copy_to(self, directory):
        for file in (self.file, *self.shares):
            shutil.copy(file, directory)
        return Made(directory, self.prefix)


def sets(printed):
    return [(each["key_set"], each["current"]) for each in json.loads(printed)["key_sets"]]


def backed_up(token, prefix, directory):
    made = Made(directory, prefix)
    numbers = ("--shares", str(SHARES), "--threshold", str(THRESHOLD))
    token.run_keys(
        "backup", prefix, *numbers, "--out", str(made.file), "--shares-to", str(directory)
    )
    return made


@pytest.fixture(scope="module")
def prefix(softhsm):
    """Two key sets: the older one opens what it sealed."""
    made = f"backup-{secrets.token_hex(4)}"
    softhsm.run_keys("init", made)
    return made


@pytest.fixture(scope="module")
def sealed(softhsm, prefix):
    made = sealed_by(softhsm, prefix)
    softhsm.run_keys("rotate", prefix)
    return made


@pytest.fixture(scope="module")
def backup_once(softhsm, prefix, sealed, tmp_path_factory):
    return backed_up(softhsm, prefix, tmp_path_factory.mktemp("backup"))


@pytest.fixture
def backup(backup_once, tmp_path):
    """A copy that a test may change."""
    return backup_once.copy_to(tmp_path)


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A token on which nothing is ever restored."""
    return SoftHsm.make(tmp_path_factory.mktemp("empty"), "empty")


def test_after_the_loss_of_the_token_a_backup_opens_what_it_sealed(backup, sealed, tmp_path):
    """On a token made anew; with any shares; what was lost does not come back by itself."""
    lost = SoftHsm.make(tmp_path / "token", "lost")
    shutil.rmtree(lost.directory)
    anew = SoftHsm.make(tmp_path / "token", "lost")
    assert used_on(anew, backup.prefix, sealed, tmp_path).returncode != 0
    both = [("1", False), ("2", True)]
    assert backup.restored_on(anew, backup.shares[-THRESHOLD:]) == both
    done = used_on(anew, backup.prefix, sealed, tmp_path)
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    assert bytes.fromhex(used["message"]) == b"message"
    assert bytes.fromhex(used["check_value"]) == check_value(MATERIAL)
    # A second time it finds all there; it can be rotated, and backed up from there.
    assert backup.restored_on(anew) == both
    assert sets(anew.run_keys("rotate", backup.prefix))[-1] == ("3", True)
    (tmp_path / "again").mkdir()
    again = backed_up(anew, backup.prefix, tmp_path / "again")
    assert Backup.from_json(again.file.read_text()).key_sets == ("1", "2", "3")


def test_files_of_shares_are_private_and_the_backup_has_no_word_of_them(backup_once):
    text = backup_once.file.read_text()
    for share in backup_once.shares:
        assert share.stat().st_mode & 0o777 == 0o600
        words = share.read_text()
        assert len(words.split()) == 33
        assert told(words, words)
        assert not told(words, text)


# --- shares ---------------------------------------------------------------------------------------


def test_any_enough_shares_combine_and_fewer_do_not():
    secret = secrets.token_bytes(32)
    made = secret_sharing.split(secret, SHARES, THRESHOLD)
    digests = [secret_sharing.digest(share) for share in made]
    named = {f"share {number}": share for number, share in enumerate(made, 1)}
    for several in combinations(named, THRESHOLD):
        given = {name: named[name] for name in several}
        assert secret_sharing.combine(given, digests, THRESHOLD) == secret
    assert secret_sharing.combine(named, digests, THRESHOLD) == secret
    for fewer in combinations(named, THRESHOLD - 1):
        given = {name: named[name] for name in fewer}
        with pytest.raises(ConfigurationError, match="2 shares of this backup were given, and 3"):
            secret_sharing.combine(given, digests, THRESHOLD)
        # Nor where the file says that they are enough.
        with pytest.raises(ConfigurationError, match="do not fit together"):
            secret_sharing.combine(given, digests, THRESHOLD - 1)


@pytest.mark.parametrize(
    ("shares", "threshold"), [(5, 1), (1, 1), (2, 3), (17, 3), (0, 0), (3, -1)]
)
def test_other_numbers_of_shares_are_refused(shares, threshold):
    with pytest.raises(ConfigurationError, match="2 to 16 shares"):
        secret_sharing.split(bytes(32), shares, threshold)


def other_word(share):
    words = share.read_text().split()
    words[20] = "academic" if words[20] != "academic" else "acid"
    share.write_text(" ".join(words))


def unknown_word(share):
    share.write_text(share.read_text().replace(share.read_text().split()[7], "xylophone"))


def missing_word(share):
    share.write_text(" ".join(share.read_text().split()[:-1]))


def of_another_backup(share):
    share.write_text(secret_sharing.split(secrets.token_bytes(32), SHARES, THRESHOLD)[1])


def nothing(share):
    share.write_text("")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other_word, "is damaged"),
        (unknown_word, "is damaged"),
        (missing_word, "is damaged"),
        (nothing, "is damaged"),
        (
            of_another_backup,
            r"is whole, but a share of another backup \(its SLIP-39 identifier is \d+\)",
        ),
    ],
)
def test_a_wrong_share_is_named_and_nothing_of_it_is_said(backup, empty, change, why):
    wrong = backup.shares[1]
    words = wrong.read_text()
    change(wrong)
    with pytest.raises(SoftHsmError, match=f"share {wrong} {why}") as caught:
        backup.restored_on(empty)
    said = str(caught.value)
    assert not told(words, said)
    assert not told(wrong.read_text(), said)
    assert "xylophone" not in said
    assert sets(empty.run_keys("list", backup.prefix)) == []


def test_a_share_of_another_backup_of_the_same_identifier_is_named():
    """SLIP-39 has 15 bits for it: two backups may have the same."""
    import shamir_mnemonic

    def made(identifier):
        ems = shamir_mnemonic.EncryptedMasterSecret.from_master_secret(
            secrets.token_bytes(32), b"", identifier, extendable=True, iteration_exponent=0
        )
        return [share.mnemonic() for share in shamir_mnemonic.split_ems(1, [(2, 3)], ems)[0]]

    ours, theirs = made(7), made(7)
    digests = [secret_sharing.digest(share) for share in ours]
    with pytest.raises(ConfigurationError, match="second is whole, but a share of another"):
        secret_sharing.combine({"first": ours[0], "second": theirs[1]}, digests, 2)


def test_a_share_given_twice_is_named(backup, empty, tmp_path):
    first, second, _ = backup.shares[:3]
    copied = tmp_path / "copied"
    copied.write_text(second.read_text().upper().replace(" ", "\n"))
    copied.chmod(0o600)
    with pytest.raises(SoftHsmError, match=f"share {copied} is the same share as share {second}"):
        backup.restored_on(empty, [first, second, copied])


def test_too_few_shares_open_nothing(backup, empty):
    with pytest.raises(SoftHsmError, match="2 shares of this backup were given, and 3 are needed"):
        backup.restored_on(empty, backup.shares[: THRESHOLD - 1])
    assert sets(empty.run_keys("list", backup.prefix)) == []


def test_a_share_that_others_can_read_is_refused(backup, empty):
    backup.shares[2].chmod(0o644)
    with pytest.raises(SoftHsmError, match="is open to others"):
        backup.restored_on(empty)


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"plugin": "other"},
        {"made_at": "2001-01-01T00:00:00+00:00"},
        {"key_sets": ("1",)},
        {"content": '{"format": "hsmwrap-pkcs11-backup/1", "token": {}, "key_sets": []}'},
        {"tag": "é"},
    ],
)
def test_a_changed_file_is_refused_before_the_token_is_asked(backup, change):
    made = replace(Backup.from_json(backup.file.read_text()), **change)
    given = {share.name: share.read_text() for share in backup.shares}
    # These settings reach no token.
    key_sets = KeySetManager("pkcs11", {})
    with pytest.raises(ConfigurationError, match=r"was changed|not of pkcs11"):
        restore(key_sets, made, given)
    with pytest.raises(ConfigurationError, match="module"):
        restore(key_sets, Backup.from_json(backup.file.read_text()), given)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "hsmwrap-backup/9"}', "[" * 100_000])
def test_a_file_of_something_else_is_refused(text):
    with pytest.raises(ConfigurationError, match="not a backup file"):
        Backup.from_json(text)


def test_another_set_of_the_same_number_is_not_replaced(backup, tmp_path):
    used = SoftHsm.make(tmp_path / "token", "used")
    used.run_keys("init", backup.prefix)
    with pytest.raises(SoftHsmError, match="another key set 1"):
        backup.restored_on(used)
    assert sets(used.run_keys("list", backup.prefix)) == [("1", True)]


def test_sets_that_are_not_trusted_are_not_backed_up(softhsm, tmp_path):
    prefix = f"backup-{secrets.token_hex(4)}"
    softhsm.run_keys("init", prefix, trusted=False)
    with pytest.raises(SoftHsmError, match="no key set whose keys can leave it"):
        backed_up(softhsm, prefix, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_the_so_pin_nothing_is_backed_up(softhsm, prefix, tmp_path, monkeypatch):
    monkeypatch.delenv("HSMWRAP_SO_PIN_FILE", raising=False)
    key_sets = KeySetManager("pkcs11", softhsm.bare_settings(key_prefix=prefix))
    with pytest.raises(ConfigurationError, match="takes the security officer"):
        key_sets.back_up(bytes(32))


def test_the_software_backend_says_that_its_file_is_the_backup(tmp_path):
    key_sets = KeySetManager("software", {"keyring_file": str(tmp_path / "keyring")})
    with pytest.raises(UnsupportedOperation, match="a copy of that file is the backup"):
        key_sets.back_up(bytes(32))
    with pytest.raises(UnsupportedOperation, match="a copy of that file is the backup"):
        key_sets.make_transport_key()


# --- the drill ------------------------------------------------------------------------------------


def settings_of(token, file):
    file.write_text("".join(f'{k} = "{v}"\n' for k, v in token.bare_settings().items()))
    return ("--to", str(file), "--to-so-pin-file", token.environment["HSMWRAP_SO_PIN_FILE"])


def objects_of(token):
    """The files of its objects, whichever prefix they have."""
    return sorted(token.directory.rglob("*.object"))


@pytest.fixture
def drilled(softhsm, backup, tmp_path):
    """Runs a drill in a process that knows one token only."""

    def drill(token):
        there = settings_of(token, tmp_path / "scratch.toml")
        arguments = (*there, *backup.arguments(backup.shares[:THRESHOLD]))
        return json.loads(token.run_keys("drill", backup.prefix, *arguments))

    return drill


def test_a_drill_restores_and_leaves_the_scratch_token_as_it_was(drilled, tmp_path):
    scratch = SoftHsm.make(tmp_path / "scratch", "scratch")
    before = objects_of(scratch)
    assert drilled(scratch) == {"key_sets": ["1", "2"], "stored_keys": None}
    assert objects_of(scratch) == before


def test_a_drill_refuses_the_token_of_the_backup(drilled, softhsm):
    with pytest.raises(SoftHsmError, match="is the one that the backup is of"):
        drilled(softhsm)


def test_a_drill_refuses_a_token_with_its_label(drilled, softhsm, tmp_path):
    label = softhsm.environment["HSMWRAP_TOKEN_LABEL"]
    with pytest.raises(SoftHsmError, match="has its label or serial number"):
        drilled(SoftHsm.make(tmp_path / "same", label))


def test_a_drill_refuses_a_token_in_use(drilled, tmp_path):
    used = SoftHsm.make(tmp_path / "used", "used")
    used.run_keys("init", "hsmwrap")
    before = objects_of(used)
    with pytest.raises(SoftHsmError, match="has key sets, so a KMS may use it"):
        drilled(used)
    assert objects_of(used) == before


def test_a_drill_removes_what_a_killed_one_left_and_nothing_else(drilled, backup, tmp_path):
    """Not what has a name like it, nor what a drill would have made on another token."""
    scratch = SoftHsm.make(tmp_path / "scratch", "scratch")
    before = objects_of(scratch)
    shown = subprocess.run(
        ["softhsm2-util", "--show-slots"],
        env=os.environ | scratch.environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    (serial,) = re.findall(r"Serial number: +(\S+)", shown)
    left = [_drill_prefix("0badcafe", serial), _drill_prefix("12345678", serial)]
    others = [_drill_prefix("0badcafe", "another"), "drill-0badcafe"]
    for prefix in left:
        backup.restored_on(scratch, prefix=prefix)
    drilled(scratch)
    assert objects_of(scratch) == before
    for prefix in others:
        backup.restored_on(scratch, prefix=prefix)
    kept = objects_of(scratch)
    assert len(kept) > len(before)
    drilled(scratch)
    assert objects_of(scratch) == kept


def test_what_does_not_restore_is_told_and_leaves_nothing(drilled, backup, tmp_path):
    scratch = SoftHsm.make(tmp_path / "scratch", "scratch")
    before = objects_of(scratch)
    made = Backup.from_json(backup.file.read_text())
    document = json.loads(made.content)
    keys = document["key_sets"][1]["keys"]
    keys["mac"], keys["kek-material-sm4"] = keys["kek-material-sm4"], keys["mac"]
    # With a tag as the holder of all shares can make it.
    secret = secret_sharing.combine(
        {share.name: share.read_text() for share in backup.shares}, made.shares, THRESHOLD
    )
    changed = replace(made, content=json.dumps(document))
    backup.file.write_text(replace(changed, tag=changed.tag_under(secret)).to_json())
    with pytest.raises(SoftHsmError, match="key set 2 does not open or authenticate"):
        drilled(scratch)
    assert objects_of(scratch) == before


def test_the_time_of_a_backup_is_in_it(backup):
    made = datetime.fromisoformat(Backup.from_json(backup.file.read_text()).made_at)
    assert made.tzinfo == UTC
