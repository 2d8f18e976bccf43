"""Private files: one policy for every secret that is read from a file."""

import os
import resource
import stat
import struct
from pathlib import Path

import pytest

from hsmwrap import privatefile
from hsmwrap.errors import ConfigurationError
from hsmwrap.kms.access import FileAccessKeys
from hsmwrap.kms.opening import audit_key
from hsmwrap.pkcs11.token.pin import PinFile
from hsmwrap.privatefile import MAX_BYTES, ParsedFile, PrivateFile, decode
from hsmwrap.software import KeyringFile

SECRET = "Zx9-4711-QQ"
ME = os.getuid() or 1000
OTHER_USER = ME + 1
READERS = [
    lambda path: PinFile(str(path)).read(),
    lambda path: KeyringFile(path).read(),
    FileAccessKeys,
    audit_key,
]


def refusal(call, *arguments):
    with pytest.raises(ConfigurationError) as caught:
        call(*arguments)
    assert caught.value.__context__ is None
    assert SECRET not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a file of an ordinary user, who we then are (the reader asks for our uid only)."""

    def make(content=SECRET, mode=0o400, uid=ME):
        path = tmp_path / "secret"
        path.unlink(missing_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        path.chmod(mode)
        if os.getuid() == 0:
            os.chown(path, uid, uid)
            monkeypatch.setattr(privatefile.os, "geteuid", lambda: ME)
        return path

    return make


def read(path):
    return PrivateFile(path, "secret file").read_text()


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
def test_a_file_of_the_owner_only(make, mode):
    assert read(make(mode=mode)) == SECRET


OPEN_MODES = [0o440, 0o410, 0o404, 0o402, 0o640, 0o620, 0o610, 0o604, 0o602, 0o601, 0o644, 0o777]


@pytest.mark.parametrize("mode", OPEN_MODES)
def test_a_file_open_to_others_is_refused(make, mode):
    path = make(mode=mode)
    text = f"secret file {path}: is open to others (mode {mode:04o}): chmod 0400 it"
    assert text in refusal(read, path)


@pytest.mark.parametrize("path", READERS)
@pytest.mark.parametrize("mode", [0o644, 0o620])
def test_each_reader_of_secrets_has_the_same_policy(make, path, mode):
    assert f"is open to others (mode {mode:04o})" in refusal(path, make(mode=mode))


@pytest.mark.parametrize("path", READERS[:-1])  # the audit key is bytes, not text
def test_each_reader_of_text_refuses_a_byte_order_mark(make, path):
    assert "byte-order mark" in refusal(path, make("\ufeffx"))


def fault(uid, mode, acl=b""):
    status = os.stat_result((stat.S_IFREG | mode, 1, 1, 1, uid, 7, 0, 0, 0, 0))
    return privatefile._fault(status, acl)


@pytest.fixture
def ordinary_user(monkeypatch):
    monkeypatch.setattr(privatefile.os, "geteuid", lambda: ME)


@pytest.mark.usefixtures("ordinary_user")
class TestOwner:
    @pytest.mark.parametrize("uid", [ME, 0])
    def test_we_and_root(self, uid):
        assert fault(uid, 0o400) is None

    def test_another_user_is_refused(self):
        text = fault(OTHER_USER, 0o400)
        assert text == f"belongs to uid {OTHER_USER}; it has to belong to uid {ME} or to root"

    def test_the_group_reads_what_root_owns(self):
        """A Kubernetes secret: root:fsGroup 0440."""
        assert fault(0, 0o440) is None
        assert fault(0, 0o640) is None

    @pytest.mark.parametrize("mode", [0o444, 0o460, 0o450, 0o404, 0o442])
    def test_and_nothing_else(self, mode):
        assert f"mode {mode:04o}): chmod 0440 it" in fault(0, mode)

    def test_root_trusts_no_other_user(self, monkeypatch):
        monkeypatch.setattr(privatefile.os, "geteuid", lambda: 0)
        assert fault(0, 0o440) is None
        assert fault(ME, 0o400) == f"belongs to uid {ME}; it has to belong to uid 0 or to root"


USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32


def acl(*entries):
    return struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, permissions, who) for tag, permissions, who in entries
    )


@pytest.mark.usefixtures("ordinary_user")
class TestAccessControlList:
    """systemd lets a service's user read root's credential by such a list: mode 0440."""

    BASE = ((USER_OBJ, 4, 0), (GROUP_OBJ, 0, 0), (MASK, 4, 0), (OTHER, 0, 0))

    @pytest.mark.parametrize("owner", [0, ME])
    def test_the_group_bits_may_be_a_mask(self, owner):
        assert fault(owner, 0o440, acl(*self.BASE, (USER, 4, ME))) is None

    @pytest.mark.parametrize(
        "entry",
        [(USER, 4, OTHER_USER), (GROUP, 4, 0), (GROUP_OBJ, 4, 0), (OTHER, 4, 0), (OTHER, 1, 0)],
    )
    def test_everyone_else_is_refused(self, entry):
        assert fault(ME, 0o440, acl(*self.BASE, entry))

    @pytest.mark.parametrize(
        ("entry", "accepted"), [((GROUP_OBJ, 4, 0), True), ((GROUP_OBJ, 6, 0), False)]
    )
    def test_the_group_of_roots_file_reads_it(self, entry, accepted):
        entries = ((USER_OBJ, 4, 0), (MASK, 6, 0), (OTHER, 0, 0), entry)
        assert (fault(0, 0o460, acl(*entries)) is None) == accepted

    @pytest.mark.parametrize(
        "entry", [(USER, 4, OTHER_USER), (GROUP, 4, 0), (OTHER, 4, 0), (OTHER, 1, 0)]
    )
    def test_everyone_else_is_refused_roots_file(self, entry):
        assert fault(0, 0o440, acl(*self.BASE, entry))

    def test_what_the_mask_takes_away_does_not_count(self):
        entries = ((USER_OBJ, 4, 0), (GROUP_OBJ, 4, 0), (GROUP, 7, 1), (MASK, 0, 0), (OTHER, 0, 0))
        assert fault(ME, 0o400, acl(*entries)) is None

    def test_without_mask_the_group_counts(self):
        assert fault(ME, 0o440, acl((USER_OBJ, 4, 0), (GROUP_OBJ, 4, 0), (OTHER, 0, 0)))

    @pytest.mark.parametrize(("user", "accepted"), [(ME, True), (OTHER_USER, False)])
    def test_on_a_real_file(self, make, user, accepted):
        path = make()
        try:
            os.setxattr(
                path,
                "system.posix_acl_access",
                acl((USER_OBJ, 4, 2**32 - 1), (USER, 4, user), (GROUP_OBJ, 0, 2**32 - 1))
                + acl((MASK, 4, 2**32 - 1), (OTHER, 0, 2**32 - 1))[4:],
            )
        except OSError:
            pytest.skip("capability: this file system has no access control lists")
        assert path.stat().st_mode & 0o777 == 0o440
        if accepted:
            assert read(path) == SECRET
        else:
            assert "mode 0440" in refusal(read, path)


@pytest.mark.skipif(os.getuid() != 0, reason="capability: only root can change the owner of files")
def test_a_real_file_of_another_user(make):
    assert f"belongs to uid {OTHER_USER}" in refusal(read, make(uid=OTHER_USER))


@pytest.mark.skipif(os.getuid() != 0, reason="capability: only root can change the owner of files")
def test_a_kubernetes_secret(make, tmp_path):
    path = make(mode=0o440, uid=0)
    os.chown(path, 0, 2000)
    data = tmp_path / "..data"
    data.symlink_to(tmp_path)
    link = tmp_path / "pin"
    link.symlink_to("..data/secret")
    assert read(link) == SECRET
    path.chmod(0o444)
    assert "mode 0444" in refusal(read, link)


def test_what_is_checked_is_what_was_opened(make, tmp_path, monkeypatch):
    """The link turns from a file that is open to others to a private one, after the open."""
    private, link, exposed = make(), tmp_path / "link", tmp_path / "exposed"
    exposed.write_bytes(b"planted")
    exposed.chmod(0o644)
    os.chown(exposed, private.stat().st_uid, -1)
    link.symlink_to(exposed)
    opened = os.open

    def slow_open(path, *arguments):
        descriptor = opened(path, *arguments)
        link.unlink()
        link.symlink_to(private)
        return descriptor

    monkeypatch.setattr(privatefile.os, "open", slow_open)
    assert "is open to others (mode 0644)" in refusal(read, link)


def test_a_fifo_a_directory_and_a_device_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo", 0o400)
    for path in (tmp_path / "fifo", tmp_path, os.devnull):
        assert "is not a regular file" in refusal(read, path)


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "missing"
    assert refusal(read, path) == f"secret file {path}: No such file or directory"


def test_size_is_bounded(make):
    assert len(read(make(b"x" * MAX_BYTES))) == MAX_BYTES
    path = make(b"x" * (MAX_BYTES + 1), 0o600)
    assert f"has more than {MAX_BYTES} bytes" in refusal(read, path)


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbfx", b"\xff\xfex\0", b"\xfe\xff\0x", b"Zx9-4711-QQ\xff"]
)
def test_text_is_utf_8_without_a_byte_order_mark(content):
    assert refusal(decode, content, "it").startswith("it: ")
    assert decode("pïn密码".encode(), "it") == "pïn密码"


def test_no_descriptor_is_left_open(make, tmp_path):
    exposed = make(mode=0o644)
    before = sorted(Path("/proc/self/fd").iterdir())
    for path in (exposed, tmp_path, tmp_path / "missing"):
        refusal(read, path)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


class TestWriteNew:
    @pytest.fixture
    def file(self, tmp_path):
        return PrivateFile(tmp_path / "new", "share")

    def test_is_for_this_user_only_and_on_the_disk(self, file, tmp_path, monkeypatch):
        flushed, fsync = [], os.fsync

        def note(descriptor):
            flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", note)
        before = os.umask(0)
        try:
            file.write_new(SECRET.encode())
        finally:
            os.umask(before)
        assert file.path.stat().st_mode & 0o777 == 0o600
        assert file.read_text() == SECRET
        assert flushed == [str(file.path), str(tmp_path)]

    def test_replaces_nothing_and_follows_no_link(self, file, tmp_path):
        for make in (
            lambda: file.path.write_bytes(b"as before"),
            lambda: file.path.symlink_to(tmp_path / "nowhere"),
        ):
            make()
            assert refusal(file.write_new, SECRET.encode()) == f"share {file.path}: File exists"
            assert file.path.is_symlink() or file.path.read_bytes() == b"as before"
            file.path.unlink()
        assert not (tmp_path / "nowhere").exists()

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    @pytest.mark.parametrize("failing", [1, 2])
    def test_leaves_nothing_where_it_fails(self, file, monkeypatch, error, failing):
        calls, fsync = [], os.fsync

        def fail(descriptor):
            calls.append(descriptor)
            if len(calls) == failing:
                raise error
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises((ConfigurationError, KeyboardInterrupt)):
            file.write_new(SECRET.encode())
        assert len(calls) == failing
        assert not file.path.exists()

    def test_leaves_no_part_of_what_is_too_long(self, file):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
        try:
            assert refusal(file.write_new, bytes(200)).endswith("File too large")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not file.path.exists()


class TestParsedFile:
    def test_is_parsed_again_only_when_it_changed(self, make):
        path = make(b"1", 0o600)
        parsed = []
        file = ParsedFile(PrivateFile(path, "it"), lambda text: parsed.append(text) or int(text))
        assert [file.read(), file.read()] == [1, 1]
        path.write_bytes(b"22")
        assert [file.read(), file.read()] == [22, 22]
        assert parsed == ["1", "22"]

    def test_a_file_that_is_opened_to_others_later_is_refused(self, make):
        path = make(b"1", 0o600)
        file = ParsedFile(PrivateFile(path, "it"), int)
        file.read()
        path.chmod(0o644)
        assert "is open to others" in refusal(file.read)
        path.chmod(0o400)
        assert file.read() == 1

    def test_a_fault_of_its_text_names_the_file(self, make):
        def parse(_text):
            raise ConfigurationError("is wrong")

        path = make()
        assert refusal(ParsedFile(PrivateFile(path, "it"), parse).read) == f"it {path}: is wrong"
