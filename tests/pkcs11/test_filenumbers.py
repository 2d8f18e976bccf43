"""A module that closes a number which is no longer its own file's (field note 106)."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

import pytest

from hsmwrap.pkcs11.binding import filenumbers


@pytest.fixture
def lock(tmp_path):
    """The number of a lock file, far from those that anything else opens."""
    opened = os.open(tmp_path / filenumbers.LOCK_FILE, os.O_CREAT | os.O_RDONLY)
    number = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 700)
    os.close(opened)
    yield number
    os.close(number)


def open_numbers():
    return {each.name for each in Path("/proc/self/fd").iterdir()}


def test_a_lock_file_that_is_closed_is_open_again(lock, tmp_path):
    before = open_numbers()
    for _ in range(3):
        with filenumbers.kept():
            os.close(lock)
        there = (tmp_path / filenumbers.LOCK_FILE).stat()
        assert os.path.samestat(os.fstat(lock), there)
    assert open_numbers() == before


def test_one_that_stays_open_is_left_as_it_is(lock, caplog):
    before = open_numbers()
    with filenumbers.kept():
        pass
    assert (open_numbers(), caplog.text) == (before, "")


def test_after_an_error_too(lock):
    with suppress(ZeroDivisionError), filenumbers.kept():
        os.close(lock)
        _ = 1 / 0
    os.fstat(lock)


def test_a_number_that_another_thread_got_stays_its_own(lock, tmp_path, caplog):
    other = tmp_path / "other"
    other.touch()
    before = open_numbers()
    with filenumbers.kept():
        os.close(lock)
        opened = os.open(other, os.O_RDONLY)
        os.dup2(opened, lock)
        os.close(opened)
    assert os.path.samestat(os.fstat(lock), other.stat())
    assert open_numbers() == before
    assert "closes a file that is not its own" in caplog.text


def test_other_files_are_not_kept(tmp_path):
    opened = os.open(tmp_path / "other", os.O_CREAT | os.O_RDONLY)
    with filenumbers.kept():
        os.close(opened)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened)
