import copy
import os
import pickle
import sys
from functools import partial

import pytest

from hsmwrap.errors import ConfigurationError, HsmUnavailable
from hsmwrap.pkcs11.token import pin
from hsmwrap.pkcs11.token.pin import (
    Pin,
    PinCallback,
    PinCommand,
    PinEnvironment,
    PinFile,
    PinLiteral,
    checked_pin,
    from_pin_source,
    from_settings,
)

SECRET = "Zx9-4711-QQ"
MARKED = "\ufeff" + SECRET


def refusal(source):
    with pytest.raises(ConfigurationError) as caught:
        source.read()
    error = caught.value
    while error:
        assert SECRET not in f"{error} {error!r} {vars(error)}"
        error = error.__cause__ or error.__context__
    return str(caught.value)


@pytest.fixture
def pin_file(tmp_path):
    def write(content, mode=0o400):
        path = tmp_path / "pin"
        path.write_bytes(content)
        path.chmod(mode)
        return PinFile(str(path))

    return write


class TestPin:
    def test_shows_itself_only_when_asked(self):
        secret = Pin(SECRET)
        assert f"{secret} {secret!r} {secret:>20} %s" % secret == " ".join(["<Pin>"] * 4)
        assert SECRET not in repr([secret, {"pin": secret}])
        assert secret.reveal() == SECRET
        assert not hasattr(secret, "__dict__")

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_is_not_pickled(self, protocol):
        with pytest.raises(TypeError, match="not serialised"):
            pickle.dumps(Pin(SECRET), protocol)

    def test_a_copy_is_the_same_object(self):
        secret = Pin(SECRET)
        assert copy.copy(secret) is secret
        assert copy.deepcopy([secret])[0] is secret

    def test_equality_is_by_value_and_in_constant_time(self, monkeypatch):
        compared = []

        def compare(a, b):
            compared.append((a, b))
            return a == b

        monkeypatch.setattr(pin.hmac, "compare_digest", compare)
        assert Pin("né") == Pin("né")
        assert Pin("1") != Pin("2")
        assert len(compared) == 2
        assert Pin("1") != "1"

    def test_is_overwritten_at_the_end_of_a_block(self):
        memory = bytearray(SECRET.encode())
        with Pin(memory) as secret:
            assert secret.reveal() == SECRET
        assert memory == bytes(len(SECRET))

    def test_is_not_copied(self):
        memory = bytearray(SECRET.encode())
        assert Pin(memory).utf8 is Pin(memory).encode("utf-8") is memory

    def test_a_refused_one_is_overwritten(self):
        memory = bytearray(f"{SECRET}\n".encode())
        with pytest.raises(ConfigurationError):
            checked_pin(memory, "here")
        assert memory == bytes(len(SECRET) + 1)

    def test_has_no_hash(self):
        with pytest.raises(TypeError):
            hash(Pin(SECRET))


class TestFile:
    @pytest.mark.parametrize(
        ("content", "value"),
        [
            (b"1234", "1234"),
            (b"1234\n", "1234"),
            (b"1234\r\n", "1234"),
            (b" 12 34 ", " 12 34 "),
            ("pïn密码".encode(), "pïn密码"),
            (b"x" * 1024 + b"\r\n", "x" * 1024),
        ],
    )
    def test_loses_one_line_end(self, pin_file, content, value):
        assert pin_file(content).read().reveal() == value

    @pytest.mark.parametrize(
        ("content", "fault"),
        [
            (b"", "empty"),
            (b"\n", "empty"),
            (SECRET.encode() + b"\n\n", "line end"),
            (SECRET.encode() + b"\nsecond", "line end"),
            (SECRET.encode() + b"\r", "line end"),
            (SECRET.encode() + b"\0", "control"),
            (SECRET.encode() + b"\xff", "not UTF-8"),
            (SECRET.encode() + b"x" * 1024, "at most 1024"),
            ("é".encode() * 513, "at most 1024"),
        ],
    )
    def test_refuses_what_is_no_pin(self, pin_file, content, fault):
        text = refusal(pin_file(content))
        assert fault in text
        assert "PIN file /" in text

    def test_has_to_be_private(self, pin_file):
        source = pin_file(b"1234", 0o644)
        assert f"PIN file {source.path}: is open to others (mode 0644)" in refusal(source)

    @pytest.mark.parametrize("mark", ["\ufeff".encode(), b"\xff\xfe", b"\xfe\xff"])
    def test_a_byte_order_mark_is_refused(self, pin_file, mark):
        assert "byte-order mark" in refusal(pin_file(mark + SECRET.encode()))

    def test_is_read_each_time(self, pin_file):
        source = pin_file(b"1234", 0o600)
        source.read()
        pin_file(b"5678", 0o600)
        assert source.read() == Pin("5678")

    @pytest.mark.parametrize("path", ["pin", "", SECRET, "/a\0b"])
    def test_a_path_is_absolute_and_else_not_repeated(self, path):
        with pytest.raises(ConfigurationError) as caught:
            PinFile(path)
        assert str(caught.value) == "PIN file: takes an absolute path"


class TestEnvironment:
    def test_is_read_each_time(self, monkeypatch):
        source = PinEnvironment("HSMWRAP_TEST_PIN")
        monkeypatch.setenv("HSMWRAP_TEST_PIN", "1")
        assert source.read() == Pin("1")
        monkeypatch.setenv("HSMWRAP_TEST_PIN", "2")
        assert source.read() == Pin("2")

    def test_an_unset_variable_is_named(self, monkeypatch):
        monkeypatch.delenv("HSMWRAP_TEST_PIN", raising=False)
        assert "HSMWRAP_TEST_PIN" in refusal(PinEnvironment("HSMWRAP_TEST_PIN"))

    @pytest.mark.parametrize(
        "value", ["", SECRET + "\n", MARKED, SECRET + "\udcff", SECRET + "x" * 1024]
    )
    def test_refuses_what_is_no_pin(self, monkeypatch, value):
        monkeypatch.setenv("HSMWRAP_TEST_PIN", value)
        assert "environment variable HSMWRAP_TEST_PIN" in refusal(
            PinEnvironment("HSMWRAP_TEST_PIN")
        )

    @pytest.mark.parametrize("name", ["4711", "", "A=B", SECRET])
    def test_a_pin_in_place_of_the_name_is_not_repeated(self, name):
        with pytest.raises(ConfigurationError) as caught:
            PinEnvironment(name)
        assert str(caught.value) == "PIN environment variable: takes a name, not a value"


class TestCallback:
    def test_is_called_each_time(self):
        answers = iter(["1", "2"])
        source = PinCallback(lambda: next(answers))
        assert [source.read().reveal(), source.read().reveal()] == ["1", "2"]

    def test_its_failure_is_named_by_type_only(self):
        def fail():
            raise LookupError(SECRET)

        assert refusal(PinCallback(fail)) == "PIN callback failed: LookupError"

    @pytest.mark.parametrize("answer", [None, SECRET.encode(), 4711])
    def test_returns_str(self, answer):
        assert "not str" in refusal(PinCallback(lambda: answer))

    @pytest.mark.parametrize("answer", ["", SECRET + "\n", MARKED])
    def test_refuses_what_is_no_pin(self, answer):
        assert "PIN callback" in refusal(PinCallback(lambda: answer))

    def test_our_own_errors_pass(self):
        def unavailable():
            raise HsmUnavailable("the vault is unavailable")

        with pytest.raises(HsmUnavailable):
            PinCallback(unavailable).read()

    def test_its_arguments_are_not_shown(self):
        assert SECRET not in repr(PinCallback(partial(str, SECRET)))


def python(code, **options):
    return PinCommand((sys.executable, "-c", code), **options)


class TestCommand:
    def test_gives_its_output_without_one_line_end(self):
        assert python("print('1234')").read() == Pin("1234")

    def test_runs_without_a_shell(self):
        assert PinCommand(("/bin/echo", "$HOME;`id`")).read() == Pin("$HOME;`id`")

    def test_does_not_read_our_standard_input(self, tmp_path):
        (tmp_path / "stdin").write_text("5678")
        ours = os.dup(0)
        try:
            with (tmp_path / "stdin").open() as file:
                os.dup2(file.fileno(), 0)
            assert python("import sys; print('1234' + sys.stdin.read())").read() == Pin("1234")
        finally:
            os.dup2(ours, 0)
            os.close(ours)

    def test_does_not_write_to_our_standard_error(self, capfd):
        code = f"import sys; print('1234'); print('{SECRET}', file=sys.stderr)"
        assert python(code).read() == Pin("1234")
        assert capfd.readouterr() == ("", "")

    def test_failure_shows_the_status_and_no_output(self):
        code = f"import sys; print('{SECRET}'); print('{SECRET}', file=sys.stderr); sys.exit(3)"
        assert refusal(python(code)) == f"PIN command {sys.executable}: exit status 3"

    def test_a_timeout_shows_no_output(self):
        code = f"import time; print('{SECRET}', flush=True); time.sleep(60)"
        assert "no answer within 0.5 seconds" in refusal(python(code, timeout=0.5))

    @pytest.mark.parametrize(
        "code", ["", f"print('{SECRET}\\n')", f"print('{MARKED}')", "print('x' * 2000)"]
    )
    def test_refuses_what_is_no_pin(self, code):
        assert f"PIN command {sys.executable}" in refusal(python(code))

    def test_a_missing_program_is_named(self, tmp_path):
        program = str(tmp_path / "none")
        assert f"PIN command {program}: No such file" in refusal(PinCommand((program, SECRET)))

    @pytest.mark.parametrize("argv", [(), ("echo", SECRET), ("/bin/echo", f"{SECRET}\0")])
    def test_the_program_is_absolute(self, argv):
        with pytest.raises(ConfigurationError) as caught:
            PinCommand(argv)
        assert SECRET not in str(caught.value)

    def test_its_arguments_are_not_shown(self):
        assert repr(PinCommand(("/bin/echo", SECRET))) == "PinCommand('/bin/echo')"


class TestPinSource:
    @pytest.mark.parametrize(
        ("value", "source"),
        [
            ("/etc/pin", PinFile("/etc/pin")),
            ("file:/etc/pin", PinFile("/etc/pin")),
            ("file:///etc/my%20pin", PinFile("/etc/my pin")),
            ("FILE://localhost/etc/pin", PinFile("/etc/pin")),
            ("|/usr/bin/pass 'show me' pin", PinCommand(("/usr/bin/pass", "show me", "pin"))),
        ],
    )
    def test_the_forms_of_the_rfc(self, value, source):
        assert from_pin_source(value) == source

    @pytest.mark.parametrize(
        "value",
        [
            "",
            SECRET,
            f"pin/{SECRET}",
            f"http://host/{SECRET}",
            f"file://host/{SECRET}",
            f"file:{SECRET}",
            f"file:///pin?{SECRET}",
            f"file:////{SECRET}",
            f"file:///%00{SECRET}",
            f"|echo {SECRET}",
            f"|/bin/echo '{SECRET}",
            "|",
        ],
    )
    def test_anything_else_is_refused_and_not_repeated(self, value):
        with pytest.raises(ConfigurationError) as caught:
            from_pin_source(value)
        assert SECRET not in f"{caught.value} {caught.value.__context__!r}"


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "source"),
        [
            ({"pin_file": "/etc/pin"}, PinFile("/etc/pin")),
            ({"pin_env": "PIN"}, PinEnvironment("PIN")),
            ({"pin_command": "/bin/pass 'a b'"}, PinCommand(("/bin/pass", "a b"))),
            ({"pin_command": ["/bin/pass", "a b"]}, PinCommand(("/bin/pass", "a b"))),
            ({"pin_callback": str}, PinCallback(str)),
            ({"pin-source": "/etc/pin"}, PinFile("/etc/pin")),
            ({"pin-value": Pin("1")}, PinLiteral(Pin("1"))),
            ({"pin_env": "PIN", "pin_file": None, "module": "m"}, PinEnvironment("PIN")),
        ],
    )
    def test_one_source(self, settings, source):
        assert from_settings(settings) == source

    def test_a_literal_hides_its_pin(self):
        source = from_settings({"pin-value": Pin(SECRET)})
        assert source.read().reveal() == SECRET
        assert SECRET not in repr(source)
        with source.read():
            pass
        assert source.read().reveal() == SECRET

    @pytest.mark.parametrize(
        ("settings", "fault"),
        [
            ({}, "exactly one of pin_file, pin_env, .*; found none"),
            ({"pin_env": "A", "pin_file": "/a"}, "found pin_file and pin_env"),
            ({"pin_env": "A", "pin-source": "/a"}, "found pin_env and pin-source"),
            ({"pin_file": 4711}, "pin_file: takes an absolute path, not int"),
            ({"pin_env": ["A"]}, "pin_env: takes the name .*, not list"),
            ({"pin_command": 4711}, "pin_command: takes a command.*, not int"),
            ({"pin_command": ["/bin/echo", 4711]}, "every part is a string"),
            ({"pin_callback": "4711"}, "pin_callback: takes a callable, not str"),
            ({"pin-value": "4711"}, "pin-value: takes a Pin, not str"),
        ],
    )
    def test_refusals(self, settings, fault):
        with pytest.raises(ConfigurationError, match=fault) as caught:
            from_settings(settings)
        assert "4711" not in str(caught.value)
