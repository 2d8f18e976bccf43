"""``hsmwrap keys`` killed by SIGKILL at each of its steps, and what has to hold after each.

A step is a token object that was made or destroyed (with ``HSMWRAP_KILLS=N`` each N-th call of the
PKCS#11 module as well), a commit of the database, or a change of a file. Each command runs in a
fork, on a :class:`World`, which is put back before the next kill.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import Engine, event
from sqlalchemy.orm import Session

import hsmwrap.pkcs11
import hsmwrap.software  # noqa: F401  # what the commands load by name
from hsmwrap.backend import HasKeySets, KeyRef, ReSealsKeys
from hsmwrap.cli import main
from hsmwrap.kms import StaticAccessKeys, load_config, open_kms
from hsmwrap.registry import KeySetManager
from support import forked
from support.kms.fakes import AES_MATERIAL, SM4_MATERIAL, Client, import_request

NTH_CALL = int(os.environ.get("HSMWRAP_KILLS", "0"))
"""Which calls of the module are steps: each N-th, none if 0."""
WHOLE = "6 keys", "master key"
"""How ``keys list`` describes a key set with all of its keys."""


@dataclass(frozen=True)
class Step:
    """The n-th ``call`` of the module, ``change`` of a token object, or change made ``here``."""

    kind: str
    nth: int


@dataclass(frozen=True)
class Command:
    """``hsmwrap keys ARGUMENTS --config SITE/server.toml``, in the world's directory.

    ``{name}`` in an argument is the fingerprint of the file ``name``, as it was shown; ``{old}`` is
    the id of the first key set, ``{here}`` the directory. After one that ``ends_tokens``, import
    tokens that were issued before do not hold. ``was_done`` is what a second run says after one
    that did all. ``writes`` are the files that it makes, the first one is its --out.
    """

    arguments: tuple[str, ...]
    site: str = "source"
    ends_tokens: bool = False
    was_done: str | None = None
    writes: tuple[str, ...] = ()


@dataclass
class World:
    """Everything that commands change, in one directory, and what has to open.

    ``sites`` are the environments of the HSM tokens by name; each has a server's file for itself,
    and one behind ``shim``, where commands are killed. All use one database.
    """

    directory: Path
    sites: dict[str, dict[str, str]]
    shim: object = None
    shown: dict[str, str] = field(default_factory=dict)
    kept: dict = field(default_factory=dict)

    def config(self, site, *, killed=False):
        return str(self.directory / f"{site}-{'killed' if killed else 'server'}.toml")

    def _ask(self, do, site, **arguments):
        return forked.run(__name__, self.sites[site], do=do, **arguments)

    def provide(self):
        """Keys of each kind, messages under them, and parameters for an import."""
        done = self._ask("provide", "source", config=self.config("source"))
        assert done.returncode == 0, done.stderr
        self.kept = json.loads(done.stdout)
        self.shown["old"] = self.kept["key_set"]

    def run(self, command, step=None, *, again=False):
        """Run a command; with a step, it dies there. Returns how many steps it made here."""
        counted = self.directory.with_name(f"{self.directory.name}-counted")
        if self.shim is not None:
            kinds = {step.kind: step.nth} if step and step.kind != "here" else {}
            self.shim.kill(**kinds)
        words = [each.format(**self.shown, here=self.directory) for each in command.arguments]
        words += ["--config", self.config(command.site, killed=True), "--json"]
        done = self._ask(
            "command",
            command.site,
            arguments=["keys", *words],
            directory=str(self.directory),
            counted=str(counted),
            die_at=step.nth if step and step.kind == "here" else 0,
        )
        if done.stdout and command.writes:
            self.shown[command.writes[0]] = json.loads(done.stdout)["fingerprint"]
        if again and command.was_done and command.was_done in done.stderr:
            return 0
        expected = 0 if step is None else -signal.SIGKILL
        assert done.returncode == expected, (command, step, done.returncode, done.stderr)
        if step is None:
            self._nothing_is_unfinished(command)
        return int(counted.read_text()) if step is None else 0

    def steps_of(self, command):
        """Every step of a command, by running it once."""
        before = self._counted()
        here, after = self.run(command), self._counted()
        made = {kind: after[kind] - before[kind] for kind in before}
        steps = [Step("change", nth) for nth in range(1, made["change"] + 1)]
        if NTH_CALL:
            steps += [Step("call", nth) for nth in range(1, made["call"] + 1, NTH_CALL)]
        return steps + [Step("here", nth) for nth in range(1, here + 1)]

    def _counted(self):
        if self.shim is None:
            return {"change": 0, "call": 0}
        counters = self.shim.counters()
        changes = counters.token_objects_created + counters.token_objects_destroyed
        return {"change": changes, "call": sum(counters.calls.values())}

    def again(self, command):
        """Run a command that was killed."""
        self.run(command, again=True)

    def _nothing_is_unfinished(self, command):
        """Its files are there, as if it had never been killed."""
        assert all((self.directory / name).is_file() for name in command.writes)
        assert not list(self.directory.rglob("*.unfinished")), command

    def check(self, *, tokens, sites=("source",), others=()):
        """Each key opens at ``sites``, and at those others that have a current, whole key set."""
        for site in (*sites, *others):
            asked = {"kept": self.kept, "tokens": tokens, "must_be_there": site in sites}
            done = self._ask("check", site, config=self.config(site), **asked)
            assert done.returncode == 0, (site, done.stderr)

    @contextmanager
    def remembered(self):
        """Everything is put back at the end to where it was."""
        copy = Path(tempfile.mkdtemp(dir=self.directory.parent)) / "copy"
        shutil.copytree(self.directory, copy)
        shown = dict(self.shown)
        try:
            yield
        finally:
            shutil.rmtree(self.directory)
            shutil.copytree(copy, self.directory)
            self.shown = shown
            shutil.rmtree(copy.parent)


# --- in the forks ---------------------------------------------------------------------------------


def perform(do, **arguments):
    return {"command": _command, "provide": _provide, "check": _check}[do](**arguments)


def _command(arguments, directory, counted, die_at):
    os.chdir(directory)
    steps = _Steps(directory, die_at)
    status = main(arguments)
    steps.on = False
    Path(counted).write_text(str(steps.count))
    return status


class _Steps:
    """Counts commits and changes of files, and dies at one of them.

    A file that is opened to be written is a step, and so are the moments before and after a rename
    and a commit.
    """

    def __init__(self, directory, die_at):
        self.count, self.on = 0, True
        self._directory, self._die_at = directory, die_at
        sys.addaudithook(self._audit)
        event.listen(Engine, "commit", lambda _connection: self._step())
        event.listen(Session, "after_commit", lambda _session: self._step())

    def _step(self, last_act=lambda: None):
        self.count += 1
        if self.count == self._die_at:
            self.on = False
            with suppress(OSError):
                last_act()
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, name, arguments):
        if not self.on or name not in ("open", "os.rename", "os.link", "os.remove"):
            return
        path = arguments[0]
        if isinstance(path, int) or not Path(os.fsdecode(path)).resolve().is_relative_to(
            self._directory
        ):
            return
        if name in ("os.rename", "os.link"):
            self._step()
            self._step(lambda: getattr(os, name[3:])(path, arguments[1]))
        elif name == "os.remove":
            self._step(lambda: Path(path).unlink(missing_ok=True))
        elif arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self._step(lambda: os.open(path, arguments[2], 0o600))


def _opened(config):
    return open_kms(load_config(Path(config)), access_keys=StaticAccessKeys(()))


def _level(config):
    return str(next(iter(load_config(Path(config)).backends)))


def _provide(config):
    level, kept = _level(config), {"messages": {}}
    with _opened(config) as kms:
        client = Client(kms)
        for material, spec in ((AES_MATERIAL, "Aliyun_AES_256"), (SM4_MATERIAL, "Aliyun_SM4")):
            key_id = client.create(ProtectionLevel=level, KeySpec=spec)
            client.import_material(key_id, material)
            if material is AES_MATERIAL:
                kept["messages"][key_id] = client.usable(key_id)
        made = client("CreateKey", ProtectionLevel=level)["KeyMetadata"]["KeyId"]
        kept["messages"][made] = client.usable(made)
        pending = client.create(ProtectionLevel=level)
        kept["import"] = import_request(client.parameters(pending), AES_MATERIAL)
        (backend,) = kms._backends.values()
        kept["key_set"] = HasKeySets.of(backend).current_key_set()
    print(json.dumps(kept))


def _check(config, kept, tokens, must_be_there):
    loaded = next(iter(load_config(Path(config)).backends.values()))
    sets = KeySetManager(loaded.plugin, loaded.settings).list()
    current = [each for each in sets if each.current]
    assert len(current) == 1 or not (current or must_be_there), sets
    assert all(each.finished and each.detail.startswith(WHOLE) for each in current), sets
    if not current:
        return
    with _opened(config) as kms:
        client = Client(kms)
        for blob in kept["messages"].values():
            assert client("Decrypt", CiphertextBlob=blob)["Plaintext"] == "aGVsbG8="
        if tokens:
            client("ImportKeyMaterial", **kept["import"])
            client.usable(kept["import"]["KeyId"])
        (backend,) = kms._backends.values()
        resealing = ReSealsKeys.of(backend)
        with closing(kms._database.engine.raw_connection()) as connection:
            rows = connection.cursor().execute("SELECT reference, check_value FROM keys").fetchall()
        sealed = [row for row in rows if row[0]]
        assert len(sealed) >= len(kept["messages"]) + 1
        for reference, check_value in sealed:
            key = KeyRef.from_bytes(bytes(reference))
            assert resealing.key_set_of(key) in [each.key_set for each in sets]
            resealing.reseal(key, expected_check_value=check_value)
