"""The files to copy in docs/deploy: they name what exists, and `hsmwrap serve` runs by them.

Where they say /etc/hsmwrap, /var/lib/hsmwrap and so on, these tests have directories of their own.
"""

import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
import yaml
from support.certificates import Certificate
from support.documents import ROOT, text_of
from support.fast import needs_service
from support.http.gunicorn_runner import DEADLINE, running_command
from support.http.kms_over_http import backend_settings
from support.http.rpc_signing import v1_query

from hsmwrap.cli import _parser
from hsmwrap.http.server import PIN_REFUSED
from hsmwrap.privatefile import PrivateFile

DEPLOY = ROOT / "docs" / "deploy"
CONFIGURATION = text_of(DEPLOY / "hsmwrap.toml")
UNIT = text_of(DEPLOY / "hsmwrap.service")
MANIFEST = {each["kind"]: each for each in yaml.safe_load_all(text_of(DEPLOY / "kubernetes.yaml"))}
POD = MANIFEST["StatefulSet"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
IMAGE = text_of(DEPLOY / "Containerfile")
HSMWRAP = Path(sys.executable).with_name("hsmwrap")
ACCESS_KEYS = """\
[[access_key]]
id = "testid"
secret = "testsecret"
allow = [{ actions = ["*"], keys = ["*"] }]
"""


def unit_values(name):
    return re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)


class Host:
    """Directories in place of the machine's, and a token in place of the HSM."""

    def __init__(self, base, settings):
        self.base = base
        self.settings = settings
        self.secrets = {
            "pin": Path(settings["pin_file"]).read_bytes(),
            "access-keys.toml": ACCESS_KEYS.encode(),
            "audit-key": bytes(range(32)),
        }

    def here(self, text):
        """The text with directories of this test."""
        places = r"(/etc|/var/lib|/var/log|/run/secrets)/hsmwrap(-tls)?(?=[/\"])"
        return re.sub(places, lambda found: str(self.directory(found[0])), text)

    def directory(self, name):
        path = self.base / name.strip("/").replace("/", "-")
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    def configure(self, text):
        """The configuration, on this token."""
        changed = self.here(text)
        settings = self.settings
        for old, new in {
            '"/usr/lib/softhsm/libsofthsm2.so"': json.dumps(settings["module"]),
            'token_label = "kms"': (
                f'token_label = "{settings["token_label"]}"\n'
                f'key_prefix = "{settings["key_prefix"]}"'
            ),
        }.items():
            assert old in changed
            changed = changed.replace(old, new)
        (self.directory("/etc/hsmwrap") / "hsmwrap.toml").write_text(changed)

    def put_secrets(self, directory, names, mode):
        for name in names:
            (directory / name).write_bytes(self.secrets[name])
            (directory / name).chmod(mode)


@pytest.fixture
def host(request, tmp_path):
    return Host(tmp_path, backend_settings("pkcs11", request))


def serves(command, environment, log, ready, tls=None):
    """The server becomes ready by ``command``, and a signed call passes."""
    settings = {"METRICS_ADDRESS": "127.0.0.1:0", "LIMITS__DRAIN_SECONDS": "0"}
    environment = {
        f"HSMWRAP_SERVER_{name}": value for name, value in settings.items()
    } | environment
    with running_command([*command, "--port", "0"], log, os.environ | environment) as process:

        def get(target):
            kind = partial(http.client.HTTPSConnection, context=tls)
            kind = kind if tls else http.client.HTTPConnection
            with contextlib.closing(kind("127.0.0.1", process.port, timeout=DEADLINE)) as client:
                client.request("GET", target)
                answer = client.getresponse()
                return answer.status, answer.read()

        assert get(ready)[0] == 200, process.log_text()
        query = v1_query(action="CreateKey", at=datetime.now(UTC), ProtectionLevel="HSM")
        status, body = get(f"/?{query}")
        assert status == 200, body
        assert json.loads(body)["KeyMetadata"]["KeyState"] == "Enabled"
        assert process.stop() == 0


class TestUnit:
    def test_it_serves(self, host):
        """As systemd starts it: with credentials of mode 0400, and no other secret."""
        host.configure(CONFIGURATION)
        credentials = host.directory("/credentials")
        loaded = [line.split(":") for line in unit_values("LoadCredential")]
        assert dict(loaded) == {name: f"/etc/hsmwrap/{name}" for name in host.secrets}
        host.put_secrets(credentials, host.secrets, 0o400)
        environment = dict(line.split("=", 1) for line in unit_values("Environment"))
        environment = {n: v.replace("%d", str(credentials)) for n, v in environment.items()}
        (start,) = unit_values("ExecStart")
        program, *arguments = shlex.split(host.here(start))
        assert program == "/opt/hsmwrap/bin/hsmwrap"
        serves([HSMWRAP, *arguments], environment, host.base / "log", "/readyz")
        assert (host.directory("/var/lib/hsmwrap") / "kms.db").exists()
        assert (host.directory("/var/log/hsmwrap") / "audit.log").exists()

    def test_what_it_writes_to_is_made_for_it(self):
        for setting, kind in (("database_url", "State"), ("audit_file", "Logs")):
            (name,) = unit_values(f"{kind}Directory")
            place = {"State": "/var/lib", "Logs": "/var/log"}[kind]
            assert f"{place}/{name}/" in tomllib.loads(CONFIGURATION)[setting]
            assert unit_values(f"{kind}DirectoryMode") == ["0700"]

    def test_it_waits_longer_than_the_server_does(self):
        assert int(unit_values("TimeoutStopSec")[0]) > 30

    def test_a_refused_pin_is_not_tried_again(self):
        assert unit_values("RestartPreventExitStatus") == [str(PIN_REFUSED)]

    def test_systemd_takes_it(self, tmp_path):
        needs_service()
        if not shutil.which("systemd-analyze"):
            pytest.skip("capability: systemd-analyze is not installed")
        file = tmp_path / "hsmwrap.service"
        file.write_text(UNIT.replace("/opt/hsmwrap/bin/hsmwrap", "/bin/true"))
        assert analyzed("verify", file) == ""  # its status is 0 for unknown settings too
        security = analyzed("security", "--offline=true", "--threshold=20", file)
        assert "Overall exposure level" in security
        file.write_text(UNIT.replace("ProtectHome=", "ProtectHouse="))
        assert "ProtectHouse" in analyzed("verify", file)


ADMIN = text_of(DEPLOY / "hsmwrap-admin")
SYSTEMD_RUN = """\
#!/bin/sh
# As systemd: private copies of the credentials, in a directory that the command is told.
set -eu
while [ "$1" != -- ]; do
    case $1 in
        --property=LoadCredential=*)
            named=${1#--property=LoadCredential=}
            cp "${named#*:}" "$CREDENTIALS_DIRECTORY/${named%%:*}";;
    esac
    shift
done
shift
chmod 0400 "$CREDENTIALS_DIRECTORY"/*
exec "$@"
"""


class TestAdmin:
    """`hsmwrap keys` and `config check --open` with the credentials of the unit."""

    def run(self, host, *arguments, **environment):
        host.configure(CONFIGURATION)
        host.put_secrets(host.directory("/etc/hsmwrap"), host.secrets, 0o400)
        for name in ("/var/lib/hsmwrap", "/var/log/hsmwrap", "/credentials", "/bin"):
            host.directory(name)
        programs = host.directory("/bin")
        for name, text in (("systemd-run", SYSTEMD_RUN), ("hsmwrap-admin", host.here(ADMIN))):
            (programs / name).write_text(text.replace("/opt/hsmwrap/bin/hsmwrap", str(HSMWRAP)))
            (programs / name).chmod(0o755)
        found = {"PATH": f"{programs}:{os.environ['PATH']}"}
        found["CREDENTIALS_DIRECTORY"] = str(host.directory("/credentials"))
        return subprocess.run(
            ["hsmwrap-admin", *arguments],
            env=os.environ | found | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def test_it_opens_what_the_unit_opens(self, host):
        done = self.run(host, "config", "check", "--open")
        assert done.returncode == 0, done.stderr
        assert str(host.directory("/credentials") / "pin") in done.stdout

    def test_the_so_pin_is_a_credential_too(self, host):
        so_pin = host.base / "so-pin"
        so_pin.write_bytes(Path(os.environ["HSMWRAP_SO_PIN_FILE"]).read_bytes())
        done = self.run(host, "keys", "list", SO_PIN=str(so_pin), HSMWRAP_SO_PIN_FILE="")
        assert done.returncode == 0, done.stderr
        assert "current" in done.stdout
        assert (host.directory("/credentials") / "so-pin").read_bytes() == so_pin.read_bytes()

    def test_user_and_credentials_are_those_of_the_unit(self):
        def given(name):
            return re.findall(rf"--property={name}=(\S+)", ADMIN)

        # With the directories: `keys init` comes before the unit's first start, which makes them.
        directories = ["StateDirectory", "StateDirectoryMode", "LogsDirectory", "LogsDirectoryMode"]
        for name in ("User", "Group", "WorkingDirectory", "UMask", "LimitCORE", *directories):
            assert given(name) == unit_values(name) != []
        assert given("LoadCredential")[:-1] == unit_values("LoadCredential")
        exported = re.findall(r'export (HSMWRAP_SERVER_\w+)="\$CREDENTIALS_DIRECTORY/(.*)"', ADMIN)
        assert [f"{name}=%d/{file}" for name, file in exported] == unit_values("Environment")


def analyzed(*arguments):
    done = subprocess.run(
        ["systemd-analyze", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0 or "verify" in arguments, done.stdout
    return done.stdout


class TestManifest:
    def test_it_serves(self, host):
        host.configure(MANIFEST["ConfigMap"]["data"]["hsmwrap.toml"])
        secrets = host.directory("/run/secrets/hsmwrap")
        volume = volumes()["secrets"]["secret"]
        # Root's with a group that may read; another owner's has to be closed to the group.
        mode = volume["defaultMode"] if os.geteuid() == 0 else 0o400
        host.put_secrets(secrets, [item["path"] for item in volume["items"]], mode)
        named = {each["name"] for each in CONTAINER["env"]}
        values = {
            "HSMWRAP_SERVER_AUDIT_LOG_ID": "hsmwrap-0",
            "HSMWRAP_SERVER_DATABASE_URL": f"sqlite:///{host.base}/kms.db",
        }
        assert named == values.keys()
        arguments = [host.here(each) for each in CONTAINER["args"]]
        environment = {"HSMWRAP_SERVER_HOST": "127.0.0.1"} | values
        # As in a secret of the type kubernetes.io/tls.
        files = Certificate().write(host.directory("/run/secrets/hsmwrap-tls"))
        for file, name in zip(files, ("tls.crt", "tls.key"), strict=True):
            file.rename(file.with_name(name))
        probe = CONTAINER["readinessProbe"]["httpGet"]
        assert probe["scheme"] == "HTTPS"
        tls = ssl.create_default_context(cafile=files[0].with_name("tls.crt"))
        serves([HSMWRAP, *arguments], environment, host.base / "log", probe["path"], tls)

    def test_secrets_are_closed_to_others(self, tmp_path):
        for name in ("secrets", "tls"):
            assert volumes()[name]["secret"]["defaultMode"] == 0o440
        assert POD["securityContext"]["fsGroup"] == POD["securityContext"]["runAsGroup"]
        if os.geteuid() == 0:
            file = tmp_path / "pin"
            file.write_text("1234")
            file.chmod(0o440)
            os.chown(file, 0, POD["securityContext"]["fsGroup"])
            assert PrivateFile(file, "PIN file").read_text() == "1234"

    def test_each_file_of_the_configuration_is_mounted(self):
        document = tomllib.loads(MANIFEST["ConfigMap"]["data"]["hsmwrap.toml"])
        mounts = {each["name"]: each["mountPath"] for each in CONTAINER["volumeMounts"]}
        claims = {
            each["metadata"]["name"]
            for each in MANIFEST["StatefulSet"]["spec"]["volumeClaimTemplates"]
        }
        assert mounts.keys() == volumes().keys() | claims
        items = {item["path"] for item in volumes()["secrets"]["secret"]["items"]}
        secrets = {
            document["access_key_file"],
            document["audit_key_file"],
            document["backends"]["HSM"]["settings"]["pin_file"],
        }
        assert secrets == {f"{mounts['secrets']}/{item}" for item in items}
        for name in ("tls_certificate_file", "tls_key_file"):
            assert document[name].startswith(f"{mounts['tls']}/tls.")
        assert document["audit_file"].startswith(f"{mounts['state']}/")
        assert f"{mounts['configuration']}/hsmwrap.toml" in CONTAINER["args"]
        assert mounts["tmp"] == "/tmp"  # gunicorn's and the metrics' files: the root is read-only

    def test_names_and_ports_agree(self):
        document = tomllib.loads(MANIFEST["ConfigMap"]["data"]["hsmwrap.toml"])
        ports = {each["name"]: each["containerPort"] for each in CONTAINER["ports"]}
        assert ports["api"] == document["port"]
        assert document["metrics_address"].endswith(f":{ports['metrics']}")
        labels = MANIFEST["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
        assert MANIFEST["StatefulSet"]["spec"]["selector"]["matchLabels"] == labels
        assert MANIFEST["Service"]["spec"]["selector"] == labels
        assert MANIFEST["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
        (port,) = MANIFEST["Service"]["spec"]["ports"]
        assert port["targetPort"] == "api"
        for probe in ("readinessProbe", "livenessProbe"):
            assert CONTAINER[probe]["httpGet"]["port"] == "api"

    def test_it_waits_longer_than_the_server_does(self):
        document = tomllib.loads(MANIFEST["ConfigMap"]["data"]["hsmwrap.toml"])
        drains = document["limits"]["drain_seconds"]
        assert POD["terminationGracePeriodSeconds"] > 30 + drains

    def test_the_pod_has_few_rights(self):
        assert POD["securityContext"]["runAsNonRoot"]
        assert POD["automountServiceAccountToken"] is False
        assert CONTAINER["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def volumes():
    return {each["name"]: each for each in POD["volumes"]}


class TestContainerfile:
    def test_what_it_copies_and_installs_is_there(self):
        copied = [word for line in steps("COPY") for word in line.split()[:-1]]
        assert copied
        assert [name for name in copied if not (ROOT / name).exists()] == []
        locks = re.findall(r"-r (\S+)", IMAGE)
        assert locks == ["requirements/build.txt", "requirements/run.txt"]
        assert all((ROOT / lock).exists() and "--hash=" in text_of(ROOT / lock) for lock in locks)
        # What hatchling needs beside the package itself.
        project = tomllib.loads(text_of(ROOT / "pyproject.toml"))
        needed = {project["project"]["readme"], *project["project"]["license-files"]}
        needed |= set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"])
        assert needed <= set(copied)

    def test_its_python_is_one_that_is_tested(self):
        (version,) = re.findall(r"^ARG PYTHON_IMAGE=python:(\d+\.\d+)-", IMAGE, re.MULTILINE)
        assert steps("FROM") == ["$PYTHON_IMAGE AS build", "$PYTHON_IMAGE"]
        project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
        assert f"Programming Language :: Python :: {version}" in project["classifiers"]

    def test_its_command_and_its_user_are_those_of_the_manifest(self):
        assert [json.loads(line) for line in steps("ENTRYPOINT")] == [["hsmwrap"]]
        (command,) = [json.loads(line) for line in steps("CMD")]
        _parser().parse_args(command)
        assert CONTAINER["args"][: len(command)] == command
        (user,) = steps("USER")
        context = POD["securityContext"]
        assert user == f"{context['runAsUser']}:{context['runAsGroup']}"
        assert f"--uid {context['runAsUser']} " in IMAGE


def steps(name):
    return re.findall(rf"^{name} (.*)$", IMAGE, re.MULTILINE)
