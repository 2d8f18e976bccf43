import subprocess
import sys

import pytest

from hsmwrap import __version__
from hsmwrap.backend import Backend
from hsmwrap.cli import main
from hsmwrap.errors import BackendLoadError, ConfigurationError, HsmUnavailable
from hsmwrap.registry import BackendEntry


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"hsmwrap {__version__}\n"


@pytest.mark.parametrize(
    "argv", [[], ["no-such-command"], ["demo", "--backend"], ["compat", "--managed-hsm", "X"]]
)
def test_wrong_usage_is_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: hsmwrap" in capsys.readouterr().err


def test_an_unknown_backend_is_exit_code_2_and_lists_those_registered(capsys):
    assert main(["demo", "--backend", "x"]) == 2
    assert capsys.readouterr().err == (
        "hsmwrap: no backend plug-in is called 'x'; registered: pkcs11, sdf, software\n"
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigurationError("a setting is wrong"), 2),
        (BackendLoadError("a plug-in is wrong"), 2),
        (HsmUnavailable("the HSM is unavailable"), 1),
    ],
)
def test_an_error_is_one_line_on_stderr(error, status, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr("hsmwrap.registry.load_all", fail)
    assert main(["backends"]) == status
    assert capsys.readouterr() == ("", f"hsmwrap: {error}\n")


def test_a_reader_that_leaves_early_sees_no_traceback():
    command = subprocess.Popen(
        [sys.executable, "-m", "hsmwrap.cli", "compat", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    command.stdout.close()
    with command.stderr:
        assert command.stderr.read() == b""
    assert command.wait() == 1


class TestBackends:
    ENTRIES = (
        BackendEntry("acme", "acme:Hsm", "acme-hsm 2.0"),
        BackendEntry("broken", "broken:Hsm", "broken-hsm 1.0"),
    )

    @pytest.fixture(autouse=True)
    def plugins(self, monkeypatch):
        error = BackendLoadError("backend plug-in 'broken' cannot be imported: no licence")
        monkeypatch.setattr("hsmwrap.registry.available", lambda: list(self.ENTRIES))
        monkeypatch.setattr(
            "hsmwrap.registry.load_all", lambda: ({"acme": Backend}, {"broken": error})
        )

    def test_the_table_says_which_plugin_fails_and_why(self, capsys):
        assert main(["backends"]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[2].split() == ["acme", "loads", "acme:Hsm", "acme-hsm", "2.0"]
        assert lines[3].split()[:2] == ["broken", "FAILED"]
        assert lines[-1].endswith("no licence")

    def test_json_says_the_same(self, run_json):
        status, document = run_json("backends")
        assert status == 1
        assert [(row["name"], row["loads"]) for row in document["backends"]] == [
            ("acme", True),
            ("broken", False),
        ]
        assert document["backends"][1]["error"].endswith("no licence")


@pytest.mark.parametrize("workers", ["0", "-1", "two"])
def test_a_server_has_a_worker(workers, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--workers", workers])
    assert stopped.value.code == 2
    assert "1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("wrap", "--algorithm", "RSAES_OAEP_SHA256", "--generate", "x"),
        ("wrap", "--key-spec", "AES_256", "--algorithm", "SM2PKE", "--generate", "x"),
        ("keys", "list", "--level", "hms"),
    ],
)
def test_a_choice_that_does_not_exist_is_answered_with_those_that_do(arguments, capsys):
    with pytest.raises(SystemExit):
        main(list(arguments))
    said = capsys.readouterr().err
    assert "invalid choice" in said
    assert "<" not in said
