"""Typical mistakes in a configuration: `config check` says each, and a server refuses it as well.

The list is data. Each mistake is made in a configuration that works. Then `hsmwrap config check`
and `hsmwrap serve` refuse it with the same words, and a KMS that is opened without that check does
not come up either: so the check refuses nothing that would have worked.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from hsmwrap.cli import main
from hsmwrap.errors import ConfigurationError, HsmwrapError
from hsmwrap.kms import load_config, open_kms
from hsmwrap.kms.checking import check
from hsmwrap.software import KeyringFile

SOFTWARE, PKCS11 = "software", "pkcs11"
ACCESS = '[[access_key]]\nid = "me"\nsecret = "x"\nallow = [{ actions = ["*"], keys = ["*"] }]\n'


class Site:
    """A server's files in a directory, to make a mistake in."""

    def __init__(self, directory, level, plugin, settings):
        self.here = directory
        self.file = directory / "server.toml"
        self.top = {
            "host": "127.0.0.1",
            "metrics_address": "",
            "database_url": f"sqlite:///{directory}/kms.db",
            "access_key_file": f"{self.private('access.toml', ACCESS)}",
            "audit_file": f"{directory}/audit.log",
            "audit_key_file": f"{self.private('audit.key', 'k' * 32)}",
            "startup_wait": 0,
            "sweep_interval": 0,
        }
        self.level, self.plugin, self.settings = level, plugin, settings
        self.in_backend = self.end = ""

    def private(self, name, text):
        file = self.here / name
        file.write_text(text)
        file.chmod(0o400)
        return file

    def write(self):
        backend = [f"[backends.{self.level}]", f'plugin = "{self.plugin}"', self.in_backend]
        table = [f"[backends.{self.level}.settings]", *_lines(self.settings)]
        self.file.write_text("\n".join([*_lines(self.top), *backend, *table, self.end]))
        return self.file


def _lines(settings):
    return [f"{name} = {json.dumps(value)}" for name, value in settings.items()]


def top(**settings):
    return lambda site: site.top.update({k.removeprefix("_"): v for k, v in settings.items()})


def without(name):
    return lambda site: site.settings.pop(name)


def setting(**settings):
    return lambda site: site.settings.update(settings)


def end(text):
    return lambda site: setattr(site, "end", text)


def access(text):
    def change(site):
        site.private("other.toml", text)
        site.top["access_key_file"] = f"{site.here}/other.toml"

    return change


def open_to_others(name):
    return lambda site: Path(site.here, name).chmod(0o444)


def url(text):
    return lambda site: site.top.update(database_url=text.format(here=site.here))


def open_directory(site):
    (site.here / "open").mkdir()
    (site.here / "open").chmod(0o777)
    site.top["database_url"] = f"sqlite:///{site.here}/open/kms.db"


def open_pin(site):
    site.settings["pin_file"] = str(site.private("pin", "1234"))
    Path(site.settings["pin_file"]).chmod(0o440 if os.geteuid() else 0o444)


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        change: Makes it in a :class:`Site`.
        says: What the check says, among the rest.
        on: The plug-in whose configuration it is made in.
        listening: True where only listening shows it, which opening a KMS does not.
    """

    change: object
    says: str
    on: str = SOFTWARE
    listening: bool = False


MISTAKES = {
    # the plug-in and its settings
    "plug-in mistyped": Mistake(
        lambda site: setattr(site, "plugin", "sofware"),
        "[backends.SOFTWARE] no backend plug-in is called 'sofware'; did you mean software?",
    ),
    "setting of a plug-in mistyped": Mistake(
        setting(keyring_fil="x"), "unknown setting keyring_fil; did you mean keyring_file?"
    ),
    "plug-in's setting beside its table": Mistake(
        lambda site: setattr(site, "in_backend", 'keyring_file = "/keyring"'),
        "backends.SOFTWARE.keyring_file: unknown setting; settings of the plug-in belong into the "
        "table [backends.SOFTWARE.settings]",
    ),
    "server's setting after a table": Mistake(
        end('region = "cn-beijing"'), "region is a setting of the server: put it before the first"
    ),
    "server's setting in another table": Mistake(
        end("[limits]\nport = 8443"),
        "limits.port: unknown setting; port belongs before the first [table] of the file",
    ),
    "limit outside of its table": Mistake(
        top(max_threads=4),
        "max_threads: unknown setting; max_threads belongs into the table [limits]",
    ),
    "level HSM in software": Mistake(
        lambda site: setattr(site, "level", "HSM"), "serves SOFTWARE, not HSM"
    ),
    "unknown protection level": Mistake(lambda site: setattr(site, "level", "TPM"), "backends.TPM"),
    "no plug-in": Mistake(end("[backends.HSM]\nsettings = { }"), "backends.HSM.plugin: required"),
    "keyring that is not there": Mistake(setting(keyring_file="/nowhere"), "keyring_file /nowhere"),
    "keyring open to others": Mistake(
        open_to_others("keyring"), "keyring: is open to others (mode 0444)"
    ),
    "keyring damaged": Mistake(
        lambda site: setting(keyring_file=str(site.private("bad", "{")))(site), "/bad: "
    ),
    "text where a switch is due": Mistake(
        setting(require_implicit_rejection="yes"), "require_implicit_rejection: takes true or false"
    ),
    "SM2 engine unknown": Mistake(setting(sm2_engine="openssl"), "sm2_engine: takes one of"),
    "two backends of one name": Mistake(
        end('[backends.HSM]\nplugin = "software"\nsettings = { serve_hsm_level = true }'),
        "two backends are named 'software'",
    ),
    "module that is not there": Mistake(
        setting(module="/usr/lib/no-such-module.so"), "module /usr/lib/no-such-module.so: ", PKCS11
    ),
    "module that is a directory": Mistake(
        setting(module="/usr/lib/"), "module /usr/lib/: is not a file", PKCS11
    ),
    "limit in the plug-in's table": Mistake(
        setting(max_threads=4), "max_threads is a setting of the server: put it into the table [l"
    ),
    "no module": Mistake(without("module"), "module: give the module's path", PKCS11),
    "token label mistyped": Mistake(
        setting(tokn_label="x"), "unknown setting tokn_label; did you mean token_label?", PKCS11
    ),
    "PIN file that is not there": Mistake(
        setting(pin_file="/nowhere/pin"), "PIN file /nowhere/pin: No such file", PKCS11
    ),
    "PIN file open to others": Mistake(open_pin, "/pin: is open to others (mode 04", PKCS11),
    "PIN in place of its file": Mistake(setting(pin_file="12345678"), "absolute path", PKCS11),
    "two sources of the PIN": Mistake(setting(pin_env="PIN"), "give exactly one of", PKCS11),
    "variable of the PIN not set": Mistake(
        lambda site: (without("pin_file")(site), setting(pin_env="NOT_SET_HERE")(site)),
        "environment variable NOT_SET_HERE (the PIN) is not set",
        PKCS11,
    ),
    "PIN command that is not there": Mistake(
        lambda site: (without("pin_file")(site), setting(pin_command="/no/program")(site)),
        "PIN command /no/program: is not there",
        PKCS11,
    ),
    "true for a number of sessions": Mistake(
        setting(sessions=True), "sessions: takes a whole number", PKCS11
    ),
    "text for a number of sessions": Mistake(
        setting(sessions="8"), "sessions: takes a whole number", PKCS11
    ),
    "vendor profile unknown": Mistake(
        setting(profile="acme"), "profile: 'acme' is unknown; there are", PKCS11
    ),
    "PIN in the URI": Mistake(
        lambda site: (site.settings.clear(), setting(uri="pkcs11:token=A?pin-value=1")(site)),
        "pin-value",
        PKCS11,
    ),
    "level SOFTWARE in an HSM": Mistake(
        lambda site: setattr(site, "level", "SOFTWARE"), "serves HSM, not SOFTWARE", PKCS11
    ),
    # the server's own settings
    "setting mistyped": Mistake(top(prot=1), "prot: unknown setting; did you mean port?"),
    "true for a port": Mistake(top(port=True), "port: takes a whole number"),
    "true for a duration": Mistake(top(token_lifetime=True), "token_lifetime: takes seconds"),
    "true for a limit": Mistake(
        end("[limits]\nmax_threads = true"), "limits.max_threads: takes a whole number"
    ),
    "text for a list": Mistake(
        top(refused_algorithms="RSAES_PKCS1_V1_5"), "refused_algorithms: takes a list of"
    ),
    "duration without an end": Mistake(top(token_lifetime=1e12), "token_lifetime: takes seconds"),
    "region mistyped": Mistake(
        top(region="cn-hangzou"), "region: cn-hangzou is not known to have a managed HSM; did you"
    ),
    "exposure mistyped": Mistake(top(required_exposure="hsm"), "required_exposure: takes one of"),
    "not TOML": Mistake(end("region = cn-beijing"), "is not TOML (at line"),
    "no access keys": Mistake(
        lambda site: site.top.pop("access_key_file"), "access_key_file: required"
    ),
    "access keys that are not there": Mistake(
        top(access_key_file="/none"), "access_key_file /none"
    ),
    "access keys open to others": Mistake(
        open_to_others("access.toml"), "access.toml: is open to others (mode 0444)"
    ),
    "access keys without any": Mistake(access(""), "access keys: there is none"),
    "access key without keys in a grant": Mistake(
        access(ACCESS.replace(', keys = ["*"]', "")), "a grant names its keys"
    ),
    "audit key too short": Mistake(
        lambda site: top(audit_key_file=str(site.private("short", "k")))(site), "at least 32 bytes"
    ),
    "audit key open to others": Mistake(
        open_to_others("audit.key"), "audit.key: is open to others (mode 0444)"
    ),
    "directory of the audit log missing": Mistake(
        top(audit_file="/no/such/directory/audit.log"),
        "audit_file: the directory /no/such/directory is not there",
    ),
    "audit log that is a directory": Mistake(top(audit_file="/"), "audit_file: / is not a file"),
    "another database": Mistake(
        url("mysql://kms@db/kms"), "has to be sqlite:///FILE or postgresql"
    ),
    "old scheme of PostgreSQL": Mistake(url("postgres://db/kms"), "has to be sqlite:///FILE or"),
    "two slashes": Mistake(url("sqlite://kms.db"), "has to be sqlite:///FILE or"),
    "two slashes before a path": Mistake(
        url("sqlite://tmp/kms.db"), "an absolute FILE has a fourth slash before it"
    ),
    "option for SQLite": Mistake(
        url("sqlite:///{here}/kms.db?mode=ro"), "options are PostgreSQL's"
    ),
    "database that is a directory": Mistake(url("sqlite:///{here}"), "is not a file"),
    "database in the file of the audit log": Mistake(
        url("sqlite:///{here}/audit.log"), "audit_file: database_url names that file too"
    ),
    "audit log in the keyring": Mistake(
        lambda site: top(audit_file=site.settings["keyring_file"])(site),
        "audit_file: backends.SOFTWARE.settings.keyring_file names that file too",
    ),
    "value of PostgreSQL's option mistyped": Mistake(
        url("postgresql://127.0.0.1:1/kms?sslmode=required"),
        "database_url: sslmode: this value is none of those that libpq takes",
    ),
    "path in place of a URL": Mistake(
        url("{here}/kms.db"), "database_url is not an SQLAlchemy URL"
    ),
    "option of PostgreSQL mistyped": Mistake(
        url("postgresql://127.0.0.1:1/kms?sslmod=require"), 'invalid connection option "sslmod"'
    ),
    "certificate that is not there": Mistake(
        url("postgresql://127.0.0.1:1/kms?sslmode=verify-ca&sslrootcert=/no.pem"),
        "database_url: sslrootcert: the file is not there",
    ),
    "directory of the database missing": Mistake(
        url("sqlite:////no/such/directory/kms.db"), "database_url: the directory /no/such/directory"
    ),
    "directory of the database open to all": Mistake(
        open_directory, "database_url: every user can write the directory"
    ),
    "address of another machine": Mistake(
        top(host="192.0.2.1"), "host: cannot listen there", listening=True
    ),
    "URL in place of an address": Mistake(
        top(host="https://127.0.0.1"), "such as 127.0.0.1, without a scheme", listening=True
    ),
    "no address": Mistake(
        top(host=""), "host: takes an address; 0.0.0.0 and :: are all", listening=True
    ),
    "star in place of an address": Mistake(
        top(metrics_address="*:9443"), "metrics_address: takes", listening=True
    ),
    "certificate without a key": Mistake(
        top(tls_certificate_file="/c.pem"),
        "give tls_certificate_file and tls_key_file together",
        listening=True,
    ),
    "TLS files that are not there": Mistake(
        top(tls_certificate_file="/no/c.pem", tls_key_file="/no/k.pem"),
        "tls_certificate_file /no/c.pem: No such file",
        listening=True,
    ),
    "two services at one address": Mistake(
        top(port=9443, metrics_address="127.0.0.1:9443"),
        "metrics_address: is the address of the API",
        listening=True,
    ),
    "metrics without a port": Mistake(
        top(metrics_address="127.0.0.1"), "metrics_address: takes ADDRESS:PORT", listening=True
    ),
}


@pytest.fixture
def site_on(request, tmp_path):
    def make(plugin):
        if plugin == PKCS11:
            settings = request.getfixturevalue("hsmwrap_pkcs11_settings")
            return Site(tmp_path, "HSM", PKCS11, dict(settings))
        KeyringFile(tmp_path / "keyring").create()
        return Site(tmp_path, "SOFTWARE", SOFTWARE, {"keyring_file": str(tmp_path / "keyring")})

    return make


def come_up(file):
    """Open a KMS without the check; it is not ready in the end, if it opens."""
    with open_kms(load_config(file)) as kms:
        health = kms.health()
        if not health.ready:
            raise ConfigurationError(health.detail)


@pytest.mark.parametrize("plugin", [SOFTWARE, PKCS11])
def test_what_mistakes_are_made_in_works(site_on, plugin, capsys):
    file = str(site_on(plugin).write())
    assert main(["config", "check", "--open", "--config", file]) == 0
    assert "FAILS" not in capsys.readouterr().out
    check(load_config(Path(file)))
    come_up(Path(file))


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_said_and_refused(site_on, mistake, capsys):
    site = site_on(mistake.on)
    mistake.change(site)
    file = site.write()
    assert main(["config", "check", "--config", str(file)]) == 2
    checked = capsys.readouterr().err
    assert mistake.says in checked
    assert main(["serve", "--config", str(file)]) == 2
    assert capsys.readouterr().err == checked
    if not mistake.listening:
        with pytest.raises(HsmwrapError):
            come_up(file)


def test_there_are_enough():
    assert len(MISTAKES) >= 40


def test_all_that_is_wrong_is_said_at_once(site_on, capsys):
    site = site_on(SOFTWARE)
    for name in ("keyring that is not there", "no access keys", "another database"):
        MISTAKES[name].change(site)
    assert main(["config", "check", "--config", str(site.write())]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in ("/nowhere", "access_key_file: required", "sqlite:///FILE"))


def test_a_region_that_is_not_listed_says_its_class(site_on):
    site = site_on(SOFTWARE)
    top(region="eu-central-1", managed_hsm="NONE")(site)
    assert load_config(site.write()).deployment().managed_hsm == "NONE"
