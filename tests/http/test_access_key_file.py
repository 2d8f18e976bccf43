import os

from hsmwrap.kms.access import FileAccessKeys

ENTRY = "[[access_key]]\nid = '{}'\nsecret = 's'\nallow = []\n"


def test_a_change_within_the_clocks_tick_is_seen_by_its_size(tmp_path):
    """As on file systems that keep whole seconds only."""
    file = tmp_path / "access-keys.toml"
    file.touch(mode=0o600)
    file.write_text(ENTRY.format("old"))
    before = file.stat()
    keys = FileAccessKeys(file)
    file.write_text(ENTRY.format("newer"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_ino == before.st_ino
    assert keys.lookup("newer") is not None
    assert keys.lookup("old") is None
