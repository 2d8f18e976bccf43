"""Files of a command: all or none, and none of another command's."""

import errno
import os
from hashlib import sha256
from pathlib import Path

import pytest

from hsmwrap.cli.newfiles import NewFiles, new_files
from hsmwrap.errors import ConfigurationError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def there():
    return {path.name: path.read_text() for path in Path().iterdir()}


FILES = [Path("share-1"), Path("share-2"), Path("out")]


def killed(*contents, command="backup", files=FILES):
    """What a run leaves that was killed before it was finished."""
    made = NewFiles(command, [file.absolute() for file in files])
    if contents:
        made.write(contents)
    os.close(made._descriptor)  # with it goes the lock


def test_the_files_are_there_and_nothing_else(here):
    with new_files("backup", FILES) as files:
        files.write(["one", "two", "three"])
        assert "out.unfinished" in there()
    assert there() == {"share-1": "one", "share-2": "two", "out": "three"}
    assert {path.stat().st_mode & 0o777 for path in here.iterdir()} == {0o600}


def test_an_error_leaves_nothing():
    def fail():
        with new_files("backup", FILES) as files:
            files.write(["one", "two", "three"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert there() == {}


def test_what_a_killed_run_wrote_is_replaced():
    killed("old one", "old two", "old three")
    assert len(there()) == 4
    with new_files("backup", FILES) as files:
        assert list(there()) == ["out.unfinished"]  # before a new one is there
        files.write(["one", "two", "three"])
    assert there() == {"share-1": "one", "share-2": "two", "out": "three"}


@pytest.mark.parametrize("written", ["", "# unf", "0000"])
def test_a_run_that_was_killed_before_it_wrote_is_repeated(written):
    killed()
    head = Path("out.unfinished").read_text()
    Path("out.unfinished").write_text(head + written if written == "0000" else written)
    with new_files("backup", FILES) as files:
        files.write(["one", "two", "three"])
    assert there() == {"share-1": "one", "share-2": "two", "out": "three"}


def test_a_part_of_a_file_is_removed():
    killed("old one", "old two", "old three")
    Path("share-2").rename(".share-2.unfinished")
    Path(".share-2.unfinished").write_text("ol")
    Path("out").unlink()
    with new_files("backup", FILES) as files:
        files.write(["one", "two", "three"])
    assert there() == {"share-1": "one", "share-2": "two", "out": "three"}


def test_a_file_that_is_there_stays():
    Path("share-2").write_text("")
    with pytest.raises(ConfigurationError, match="share-2: is there already, and not of"):
        NewFiles("backup", [file.absolute() for file in FILES])
    assert there() == {"share-2": ""}


def test_a_file_that_took_a_name_since_the_kill_stays():
    killed("old one", "old two", "old three")
    Path("share-2").write_text("another")
    before = there()
    with pytest.raises(ConfigurationError, match=r"/share-2: not of this command as it is run now"):
        NewFiles("backup", [file.absolute() for file in FILES])
    assert there() == before


def test_a_file_that_takes_a_name_while_the_command_runs_stays():
    def run():
        with new_files("backup", FILES) as files:
            Path("share-2").write_text("another")
            files.write(["one", "two", "three"])

    with pytest.raises(ConfigurationError, match="share-2: File exists"):
        run()
    assert there() == {"share-2": "another"}


@pytest.mark.parametrize(
    ("command", "files", "why"),
    [
        ("export", FILES, "another command did not finish"),
        ("backup", FILES[1:], "/share-1: not of this command as it is run now"),
    ],
)
def test_another_command_is_not_finished_by_this_one(command, files, why):
    killed("old one", "old two", "old three")
    before = there()
    with pytest.raises(ConfigurationError, match=why):
        NewFiles(command, [file.absolute() for file in files])
    assert there() == before


def test_a_file_of_another_kind_is_not_taken_for_ours():
    Path("out.unfinished").write_text("my notes\n")
    with pytest.raises(ConfigurationError, match="another command did not finish"):
        NewFiles("backup", [Path("out").absolute()])
    assert there() == {"out.unfinished": "my notes\n"}


def test_two_at_once_are_refused():
    with new_files("backup", FILES) as files:
        with pytest.raises(ConfigurationError, match="is running already"):
            NewFiles("backup", [file.absolute() for file in FILES])
        files.write(["one", "two", "three"])
    assert len(there()) == 3


def test_a_file_system_without_links(monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with new_files("backup", FILES) as files:
        files.write(["one", "two", "three"])
    assert there() == {"share-1": "one", "share-2": "two", "out": "three"}
    with pytest.raises(ConfigurationError, match="share-1: is there already"):
        NewFiles("backup", [file.absolute() for file in FILES])


def test_the_unfinished_lines_are_those_of_sha256sum(here):
    killed("one", "two", "three")
    lines = Path("out.unfinished").read_text().splitlines()
    assert lines[0].endswith(": backup")
    assert lines[1] == f"{sha256(b'one').hexdigest()}  {here}/share-1"
