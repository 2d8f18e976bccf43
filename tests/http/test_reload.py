"""SIGHUP under a file that is wrong, and one that is right again."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.faults.shim import fault_shim
from support.http.gunicorn_runner import DEADLINE, running
from support.http.sdk_clients import DEFAULT_SDKS, SDK_WARNINGS, SDKS, Credentials

from hsmwrap.software import KeyringFile

pytestmark = SDK_WARNINGS

CONFIG = """\
port = 0
metrics_address = ""
region = "cn-hangzhou"
database_url = "sqlite:///{here}/kms.db"
access_key_file = "{here}/access.toml"
audit_file = "{here}/audit.log"
sweep_interval = 0

[backends.SOFTWARE]
plugin = "software"
settings = {{ keyring_file = "{here}/keyring" }}
"""
ACCESS = '[[access_key]]\nid = "testid"\nsecret = "testsecret"\n'
GRANT = 'allow = [{ actions = ["*"], keys = ["*"] }]\n'


@pytest.fixture
def file(tmp_path):
    KeyringFile(tmp_path / "keyring").create()
    (tmp_path / "access.toml").write_text(ACCESS + GRANT)
    (tmp_path / "access.toml").chmod(0o400)
    file = tmp_path / "server.toml"
    file.write_text(CONFIG.format(here=tmp_path))
    return file


def wait_for(condition):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Served:
    """A running server of one worker, and what its log says."""

    def __init__(self, process):
        self.process = process
        self.to = Credentials(f"127.0.0.1:{process.port}")

    def region(self, level="SOFTWARE"):
        made = SDKS[DEFAULT_SDKS[0]].call(
            self.to, "CreateKey", Origin="EXTERNAL", ProtectionLevel=level
        )
        return made["KeyMetadata"]["Arn"].split(":")[2]

    def refused(self):
        """Why, each time that a configuration was refused."""
        event = "the configuration is refused: that of before stays in use"
        logged = [json.loads(line) for line in self.process.log_text().splitlines()]
        return [line["why"] for line in logged if line["message"] == event]

    def booted(self):
        return self.process.log_text().count("Booting worker with pid")

    def children(self):
        pid = self.process.popen.pid
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

    def hang_up(self):
        self.process.popen.send_signal(signal.SIGHUP)


@contextmanager
def serving(file):
    serve = ["-m", "hsmwrap.cli", "serve", "--config", str(file)]
    with running(serve, file.with_name("log")) as process:
        yield Served(process)
        assert process.stop() == 0


def test_a_wrong_file_is_refused_and_a_right_one_taken(file):
    with serving(file) as served:
        right = file.read_text()
        file.write_text(right.replace('"cn-hangzhou"', '"cn-hangzou"'))
        served.hang_up()
        wait_for(served.refused)
        assert "did you mean cn-hangzhou?" in served.refused()[0]
        assert served.region() == "cn-hangzhou"
        assert served.booted() == 1
        # A worker that replaces a dead one does not read the file either.
        (worker,) = served.children()
        os.kill(int(worker), signal.SIGKILL)
        wait_for(lambda: served.booted() == 2)
        assert served.region() == "cn-hangzhou"

        file.write_text(right.replace('"cn-hangzhou"', '"cn-shanghai"'))
        served.hang_up()
        wait_for(lambda: served.booted() == 3)
        wait_for(lambda: served.region() == "cn-shanghai")


@pytest.mark.slow
def test_what_does_not_open_is_refused_and_costs_a_wrong_pin_one_try(softhsm, file):
    """The workers go on meanwhile, and none is replaced."""
    shim = fault_shim(softhsm.module, file.with_name("shim"))
    settings = softhsm.settings("reload", module=str(shim.path))
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    right = (
        file.read_text() + f"[backends.HSM]\nplugin = 'pkcs11'\n[backends.HSM.settings]\n{lines}"
    )
    right = right.replace("sweep_interval = 0\n", "sweep_interval = 0\nstartup_wait = 1\n")
    file.write_text(right)
    wrong_pin = file.with_name("wrong-pin")
    wrong_pin.write_text("0000")
    wrong_pin.chmod(0o400)
    wrong = {
        "0 of 1 tokens match": (settings["token_label"], "not-a-token"),
        "PIN": (settings["pin_file"], str(wrong_pin)),
        "database": (f"sqlite:///{file.parent}/kms.db", "postgresql://kms@127.0.0.1:1/none"),
        "keys init": ('key_prefix = "reload"', 'key_prefix = "none-of-this"'),
    }
    with serving(file) as served:
        for number, (why, (before, after)) in enumerate(wrong.items(), start=1):
            logins = shim.counters().calls["C_Login"]
            file.write_text(right.replace(before, after))
            assert file.read_text() != right
            served.hang_up()
            wait_for(lambda number=number: len(served.refused()) == number)
            assert why in served.refused()[-1]
            assert served.region("HSM") == "cn-hangzhou"
            if why == "PIN":
                assert shim.counters().calls["C_Login"] == logins + 1
            wait_for(lambda: len(served.children()) == 1)
        assert served.booted() == 1

        file.write_text(right.replace('"cn-hangzhou"', '"cn-shanghai"'))
        served.hang_up()
        wait_for(lambda: served.region("HSM") == "cn-shanghai")
        assert len(served.refused()) == len(wrong)
        assert served.booted() == 2


def test_the_next_hang_up_waits_for_the_one_that_is_tried(file):
    """And reads the file as it is then. A stop does not wait."""
    with serving(file) as served:
        right = file.read_text().replace('"cn-hangzhou"', '"cn-shanghai"')
        unreachable = right.replace(
            f"sqlite:///{file.parent}/kms.db", "postgresql://kms@127.0.0.1:1/none"
        )
        file.write_text(unreachable.replace("sweep_interval", "startup_wait = 2\nsweep_interval"))
        served.hang_up()
        wait_for(lambda: len(served.children()) == 2)
        file.write_text(right)
        served.hang_up()
        assert served.region() == "cn-hangzhou"
        wait_for(lambda: served.region() == "cn-shanghai")
        assert len(served.refused()) == 1

        file.write_text(unreachable.replace("sweep_interval", "startup_wait = 90\nsweep_interval"))
        served.hang_up()
        wait_for(
            lambda: "cannot start yet" in served.process.log_text().split("Worker exiting")[-1]
        )
