"""SIGHUP under a file that is wrong, and one that is right again."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
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


def test_a_wrong_file_is_refused_and_a_right_one_taken(file):
    serve = ["-m", "hsmwrap.cli", "serve", "--config", str(file)]
    with running(serve, file.with_name("log")) as process:
        to = Credentials(f"127.0.0.1:{process.port}")

        def region():
            made = SDKS[DEFAULT_SDKS[0]].call(to, "CreateKey", Origin="EXTERNAL")
            return made["KeyMetadata"]["Arn"].split(":")[2]

        def lines(event):
            logged = [json.loads(line) for line in process.log_text().splitlines()]
            return [line for line in logged if line.get("event", line.get("message")) == event]

        def booted():
            return process.log_text().count("Booting worker with pid")

        right = file.read_text()
        file.write_text(right.replace('"cn-hangzhou"', '"cn-hangzou"'))
        process.popen.send_signal(signal.SIGHUP)
        wait_for(lambda: booted() == 2)
        refused = lines("the configuration is refused: that of before stays in use")
        assert "did you mean cn-hangzhou?" in refused[0]["why"]
        assert region() == "cn-hangzhou"
        # A worker that replaces a dead one does not read the file either.
        children = Path(f"/proc/{process.popen.pid}/task/{process.popen.pid}/children")
        wait_for(lambda: len(children.read_text().split()) == 1)
        os.kill(int(children.read_text()), signal.SIGKILL)
        wait_for(lambda: booted() == 3)
        assert region() == "cn-hangzhou"

        file.write_text(right.replace('"cn-hangzhou"', '"cn-shanghai"'))
        process.popen.send_signal(signal.SIGHUP)
        wait_for(lambda: booted() == 4)
        wait_for(lambda: region() == "cn-shanghai")
        assert process.stop() == 0
