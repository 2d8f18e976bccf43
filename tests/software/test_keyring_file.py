import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from hsmwrap.errors import ConfigurationError, KeyNotFound
from hsmwrap.software import _keyring_file as keyring_file_module
from hsmwrap.software._keyring_file import KeyringFile


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keyring.json"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_created_for_the_owner_only_whatever_the_umask(path):
    before = os.umask(0)
    try:
        KeyringFile(path).create()
    finally:
        os.umask(before)
    assert mode(path) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_an_existing_file_is_not_replaced(path):
    path.write_bytes(b"something")
    with pytest.raises(ConfigurationError, match="exists already"):
        KeyringFile(path).create()
    assert path.read_bytes() == b"something"
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(ConfigurationError, match="exists already"):
        KeyringFile(path).create()


def test_read_gives_what_was_created(path):
    created = KeyringFile(path).create()
    assert KeyringFile(path).read().to_json() == created.to_json()


@pytest.mark.parametrize("exposed", [0o620, 0o610, 0o604, 0o602, 0o601, 0o644, 0o777])
def test_a_file_that_others_can_reach_is_refused(keyring_file, path, exposed):
    path.chmod(exposed)
    with pytest.raises(ConfigurationError, match="chmod 0400"):
        KeyringFile(path).read()
    with pytest.raises(ConfigurationError, match="chmod 0400"):
        keyring_file.rotate()


def test_a_file_that_others_can_reach_later_is_refused(keyring_file, path):
    keyring_file.read()
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 0400"):
        keyring_file.read()
    path.chmod(0o400)
    keyring_file.read()


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_what_is_no_file_is_refused(path, make):
    make(path)
    with pytest.raises(ConfigurationError, match=r"keyring\.json"):
        KeyringFile(path).read()


def test_what_is_no_regular_file_is_refused():
    with pytest.raises(ConfigurationError, match="not a regular file"):
        KeyringFile(os.devnull).read()


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(ConfigurationError, match="No such file"):
        KeyringFile(tmp_path / "absent" / "keyring.json").create()


def test_rotation_and_retirement_reach_another_reader(keyring_file, path):
    reader = KeyringFile(path)
    first = reader.read().current
    rotated = keyring_file.rotate()
    assert reader.read().ids == (first, rotated.current)
    keyring_file.retire(first)
    assert reader.read().ids == (rotated.current,)
    assert mode(path) == 0o600
    with pytest.raises(KeyNotFound):
        keyring_file.retire(first)


def test_unchanged_file_is_parsed_once(keyring_file):
    assert keyring_file.read() is keyring_file.read()


def test_failed_change_leaves_the_file_as_it_was(keyring_file, path, monkeypatch):
    before = path.read_bytes()

    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keyring_file_module.os, "fsync", fail)
    with pytest.raises(ConfigurationError, match="No space left"):
        keyring_file.rotate()
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_leftover_of_a_change_that_died_is_replaced(keyring_file, path):
    leftover = path.with_name(f".{path.name}.new")
    leftover.write_bytes(b"half")
    leftover.chmod(0o644)
    keyring_file.rotate()
    assert not leftover.exists()
    assert mode(path) == 0o600


def test_symbolic_link_stays_one(keyring_file, path, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(path)
    KeyringFile(link).rotate()
    assert link.is_symlink()
    assert len(keyring_file.read().ids) == 2


def test_concurrent_rotations_lose_no_key(keyring_file, path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: KeyringFile(path).rotate(), range(16)))
    assert len(keyring_file.read().ids) == 17


def test_concurrent_creations_make_one_keyring(path):
    def create(_):
        try:
            return KeyringFile(path).create().to_json()
        except ConfigurationError:
            return None

    with ThreadPoolExecutor(8) as pool:
        created = [made for made in pool.map(create, range(8)) if made]
    assert created == [path.read_bytes()]


def test_repr_shows_the_path_alone(keyring_file, path):
    keyring_file.read()
    assert repr(keyring_file) == f"<KeyringFile {str(path)!r}>"
