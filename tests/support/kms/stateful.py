"""Random sequences of API calls on two processes that share a database, against a small model.

The model knows what the API promises of one key: its state, its material, when that and the key
itself end. It knows nothing of rows, leases and objects. Calls may die at steps that the KMS names.
"""

import base64
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from hsmwrap.errors import (
    ExpiredImportToken,
    InvalidImportToken,
    InvalidKeyMaterial,
    KeyNotFound,
)
from hsmwrap.kms.errors import AliasAlreadyExists, AliasNotFound, DryRunOperationError
from hsmwrap.kms.objects import LEASE
from support.kms.fakes import AES_MATERIAL, OTHER_MATERIAL, import_request
from support.kms.listing import cells
from support.kms.worker import MAX_FAILED_IMPORTS, Worker

MATRIX = {(operation, state): (code, afterwards) for operation, state, code, afterwards in cells()}
DAY = 86_400
SCHEDULED, IMPORTED, COMMITTED = "destruction scheduled", "material imported", "row committed"
DESTRUCTION = ["destruction started", "object destroyed"]
STEPS = [SCHEDULED, IMPORTED, COMMITTED, *DESTRUCTION]
LASTS = st.sampled_from((None, 1, 3600, 7 * DAY))
DIE_AT = st.sampled_from((None, None, None, None, *STEPS))
ALIASES = st.sampled_from(("alias/a", "alias/b"))


@dataclass(eq=False)
class Key:
    key_id: str
    state: str = "PendingImport"
    material: bytes | None = None
    first_material: bytes | None = None
    expires_at: datetime | None = None
    deletion_at: datetime | None = None
    description: str = ""

    def __repr__(self):
        return f"<key {self.state}>"

    def is_gone(self, now):
        return self.deletion_at is not None and self.deletion_at <= now

    def settle(self, now):
        """Apply what time did, as any look at the key does; whether it deleted the material."""
        expired = self.expires_at is not None and self.expires_at <= now
        if expired and not self.is_gone(now):
            self.lose_material()
            return True
        return False

    def lose_material(self):
        self.material = self.expires_at = None
        if self.state != "PendingDeletion":
            self.state = "PendingImport"

    def refusal(self, operation, now):
        return KeyNotFound.code if self.is_gone(now) else MATRIX[operation, self.state][0]

    def has_done(self, operation):
        self.state = MATRIX[operation, self.state][1]


@dataclass(eq=False)
class Token:
    key: Key
    parameters: dict = field(repr=False)
    expires_at: datetime
    failures: int = 0


@dataclass(eq=False)
class Blob:
    """The plaintext is the id of the key that was the first to encrypt it."""

    key: Key
    text: str = field(repr=False)
    plaintext: str = ""

    def __post_init__(self):
        self.plaintext = self.plaintext or self.key.key_id


class TwoProcesses:
    """Two workers on one database, and the time, which never goes back."""

    def __init__(self, directory):
        self.now = datetime(2030, 1, 1, tzinfo=UTC)
        self._stack = ExitStack()
        url, objects = f"sqlite:///{directory}/kms.db", directory / "objects"
        self.workers = [
            self._stack.enter_context(Worker(url, objects, directory / "audit.log"))
            for _ in range(2)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._stack.__exit__(*exc)


class KmsMachine(RuleBasedStateMachine):
    keys, tokens, blobs = Bundle("keys"), Bundle("tokens"), Bundle("blobs")
    workers = st.sampled_from((0, 1))

    def __init__(self, processes):
        super().__init__()
        self.processes = processes
        self.model = []
        self.aliases = {}
        self.objects_before = self.sweep_and_count()

    @property
    def now(self):
        return self.processes.now

    def call(self, at, action, *, die_at=None, **parameters):
        return self.processes.workers[at].call(self.now, action, parameters, die_at)

    def expect(self, code, at, action, **parameters):
        """Call, and compare the answer's code; returns the fields."""
        answer, fields = self.call(at, action, **parameters)
        assert answer == code, f"{action}: {answer}, expected {code}"
        return fields

    # --- keys

    @initialize(target=keys, at=workers)
    def first(self, at):
        return self.create(at, lasts=None)

    @rule(target=keys, at=workers, lasts=LASTS)
    def create(self, at, lasts):
        made = self.expect("ok", at, "CreateKey", Origin="EXTERNAL", ProtectionLevel="HSM")
        key = Key(made["KeyMetadata"]["KeyId"])
        self.model.append(key)
        if lasts != 1:  # without material
            self.import_material(at, None, key, material=AES_MATERIAL, lasts=lasts, die_at=None)
        return key

    @rule(at=workers, key=keys, operation=st.sampled_from(("EnableKey", "DisableKey")))
    def switch(self, at, key, operation):
        key.settle(self.now)
        code = key.refusal(operation, self.now)
        self.expect(code, at, operation, KeyId=key.key_id)
        if code == "ok":
            key.has_done(operation)

    @rule(at=workers, key=keys, days=st.sampled_from((7, 8)))
    def schedule_deletion(self, at, key, days):
        key.settle(self.now)
        operation = "ScheduleKeyDeletion"
        code = key.refusal(operation, self.now)
        self.expect(code, at, operation, KeyId=key.key_id, PendingWindowInDays=str(days))
        if code == "ok":
            key.has_done(operation)
            key.deletion_at = self.now + timedelta(days=days)

    @rule(at=workers, key=keys)
    def cancel_deletion(self, at, key):
        key.settle(self.now)
        code = key.refusal("CancelKeyDeletion", self.now)
        self.expect(code, at, "CancelKeyDeletion", KeyId=key.key_id)
        if code == "ok":
            key.deletion_at = None
            key.state = "Enabled" if key.material else "PendingImport"

    @rule(at=workers, key=keys)
    def describe(self, at, key):
        key.settle(self.now)
        shown = self.expect(
            key.refusal("DescribeKey", self.now), at, "DescribeKey", KeyId=key.key_id
        )
        if shown is not None:
            metadata = shown["KeyMetadata"]
            names = ("KeyState", "MaterialExpireTime", "DeleteDate", "Description")
            assert tuple(metadata[name] for name in names) == (
                *(key.state, _time(key.expires_at), _time(key.deletion_at)),
                key.description,
            )

    @rule(at=workers, key=keys, description=st.sampled_from(("", "one", "two")))
    def update_description(self, at, key, description):
        key.settle(self.now)
        operation = "UpdateKeyDescription"
        code = key.refusal(operation, self.now)
        self.expect(code, at, operation, KeyId=key.key_id, Description=description)
        if code == "ok":
            key.description = description

    # --- aliases

    def holder(self, name):
        """The key that has the alias; a key that is gone may have it until it is swept."""
        key = self.aliases.get(name)
        return None if key is None or key.is_gone(self.now) else key

    @rule(at=workers, key=keys, name=ALIASES)
    def create_alias(self, at, key, name):
        key.settle(self.now)
        code = key.refusal("CreateAlias", self.now)
        if code == "ok" and self.holder(name):
            code = AliasAlreadyExists.code
        self.expect(code, at, "CreateAlias", KeyId=key.key_id, AliasName=name)
        if code == "ok":
            self.aliases[name] = key

    @rule(at=workers, key=keys, name=ALIASES)
    def update_alias(self, at, key, name):
        if name in self.aliases and not self.holder(name):
            return  # whether the key that is gone was swept is not known
        key.settle(self.now)
        code = key.refusal("UpdateAlias", self.now) if self.holder(name) else AliasNotFound.code
        self.expect(code, at, "UpdateAlias", KeyId=key.key_id, AliasName=name)
        if code == "ok":
            self.aliases[name] = key

    @rule(at=workers, name=ALIASES)
    def delete_alias(self, at, name):
        if name in self.aliases and not self.holder(name):
            return
        code = "ok" if self.holder(name) else AliasNotFound.code
        self.expect(code, at, "DeleteAlias", AliasName=name)
        self.aliases.pop(name, None)

    @rule(at=workers)
    def list_aliases(self, at):
        made = {each.key_id for each in self.model}
        listed = self.expect("ok", at, "ListAliases", PageSize="100")["Aliases"]["Alias"]
        found = {each["AliasName"]: each["KeyId"] for each in listed if each["KeyId"] in made}
        names = (name for name in self.aliases if self.holder(name))
        assert found == {name: self.aliases[name].key_id for name in names}

    # --- material

    @rule(target=tokens, at=workers, key=keys)
    def get_parameters(self, at, key):
        key.settle(self.now)
        code = key.refusal("GetParametersForImport", self.now)
        spec = {"WrappingKeySpec": "RSA_2048", "WrappingAlgorithm": "RSAES_OAEP_SHA_256"}
        parameters = self.expect(code, at, "GetParametersForImport", KeyId=key.key_id, **spec)
        if parameters is None:
            return hypothesis.stateful.multiple()
        return Token(key, parameters, self.now + timedelta(days=1))

    @rule(
        at=workers,
        token=st.none() | tokens,
        key=keys,
        material=st.sampled_from((AES_MATERIAL, AES_MATERIAL, OTHER_MATERIAL, b"short")),
        lasts=LASTS,
        die_at=DIE_AT,
    )
    def import_material(self, at, token, key, *, material, lasts, die_at):
        if token is None:
            token = self.get_parameters(1 - at, key)
            if not isinstance(token, Token):
                return
        expires_at = lasts and self.now + timedelta(seconds=lasts)
        request = import_request(token.parameters, material) | {"KeyId": key.key_id}
        if lasts:
            request["KeyMaterialExpireUnix"] = str(int(expires_at.timestamp()))

        steps = DESTRUCTION * key.settle(self.now)
        code = key.refusal("ImportKeyMaterial", self.now)
        if code == "ok":
            code = self._of_token(token, key) or self._of_material(key, material)
            replaced = DESTRUCTION * bool(key.material)
            then = [IMPORTED, COMMITTED, *replaced] if code == "ok" else DESTRUCTION
            steps = [*steps, SCHEDULED, *then]
        died, done = _dies(steps, die_at)
        self.expect("died" if died else code, at, "ImportKeyMaterial", die_at=die_at, **request)
        if code == InvalidKeyMaterial.code and (not died or done[-1] != SCHEDULED):
            token.failures += SCHEDULED in done
        if code == "ok" and COMMITTED in done:
            key.has_done("ImportKeyMaterial")
            key.material = key.first_material = material
            key.expires_at = expires_at

    def _of_token(self, token, key):
        """The code that refuses the token, or None."""
        if token.key is not key:
            return InvalidImportToken.code
        if token.expires_at <= self.now:
            return ExpiredImportToken.code
        return InvalidImportToken.code if token.failures >= MAX_FAILED_IMPORTS else None

    @staticmethod
    def _of_material(key, material):
        is_right = len(material) == 32 and key.first_material in (None, material)
        return "ok" if is_right else InvalidKeyMaterial.code

    @rule(at=workers, key=keys, die_at=DIE_AT)
    def delete_material(self, at, key, die_at):
        steps = DESTRUCTION * key.settle(self.now)
        code = key.refusal("DeleteKeyMaterial", self.now)
        if code == "ok":
            steps = [*steps, COMMITTED, *DESTRUCTION * bool(key.material)]
        died, done = _dies(steps, die_at)
        self.expect(
            "died" if died else code, at, "DeleteKeyMaterial", die_at=die_at, KeyId=key.key_id
        )
        if code == "ok" and COMMITTED in done:
            key.lose_material()

    # --- use

    @rule(target=blobs, at=workers, key=keys)
    def encrypt(self, at, key):
        key.settle(self.now)
        code = key.refusal("Encrypt", self.now)
        plaintext = base64.b64encode(key.key_id.encode()).decode()
        made = self.expect(code, at, "Encrypt", KeyId=key.key_id, Plaintext=plaintext)
        return hypothesis.stateful.multiple(*[Blob(key, m["CiphertextBlob"]) for m in (made,) if m])

    @rule(at=workers, blob=blobs)
    def decrypt(self, at, blob):
        key = blob.key
        key.settle(self.now)
        code = key.refusal("Decrypt", self.now)
        opened = self.expect(code, at, "Decrypt", CiphertextBlob=blob.text)
        if opened is not None:
            assert base64.b64decode(opened["Plaintext"]).decode() == blob.plaintext

    @rule(target=blobs, at=workers, blob=blobs, key=keys, dry=st.booleans())
    def re_encrypt(self, at, blob, key, dry):
        codes = []
        for each in (blob.key, key):
            each.settle(self.now)
            codes.append(each.refusal("ReEncrypt", self.now))
        code = next((each for each in codes if each != "ok"), "ok")
        parameters = {"CiphertextBlob": blob.text, "DestinationKeyId": key.key_id}
        if dry and code == "ok":
            code = DryRunOperationError.code
        made = self.expect(code, at, "ReEncrypt", **parameters, DryRun=str(dry))
        return hypothesis.stateful.multiple(
            *[Blob(key, m["CiphertextBlob"], blob.plaintext) for m in (made,) if m]
        )

    @rule(at=workers, name=ALIASES)
    def use_by_alias(self, at, name):
        key = self.holder(name)
        if key is None and name in self.aliases:
            return
        if key is not None:
            key.settle(self.now)
        operation = "GenerateDataKeyWithoutPlaintext"
        code = key.refusal(operation, self.now) if key else AliasNotFound.code
        made = self.expect(code, at, operation, KeyId=name)
        if made is not None:
            assert made["KeyId"] == key.key_id

    # --- time

    @rule(seconds=st.sampled_from((1, 3600, DAY, 8 * DAY)))
    def wait(self, seconds):
        self.processes.now += timedelta(seconds=seconds)

    @rule(
        of=keys | tokens, what=st.sampled_from(("expires_at", "deletion_at")), at_last=st.booleans()
    )
    def wait_until(self, of, what, at_last):
        """The moment that something ends, or the last one before."""
        moment = getattr(of, what, None)
        if moment is not None:
            moment -= timedelta(seconds=at_last)
            self.processes.now = max(self.now, moment)

    @rule(at=workers)
    def sweep(self, at):
        assert self.processes.workers[at].sweep(self.now) == ("ok", None)
        for key in self.model:
            key.settle(self.now)

    def sweep_and_count(self):
        """Let everything that a dead call left be destroyed; returns the number of objects."""
        for worker in self.processes.workers:
            self.processes.now += LEASE
            assert worker.sweep(self.now) == ("ok", None)
        return self.processes.workers[0].objects(self.now)

    def teardown(self):
        """Both processes see every key as the model does, and no object is too many or missing."""
        objects = self.sweep_and_count()
        for key in self.model:
            for at in (0, 1):
                self.describe(at, key)
        kept = sum(key.material is not None and not key.is_gone(self.now) for key in self.model)
        for key in self.model:
            self.call(0, "DeleteKeyMaterial", KeyId=key.key_id)
        self.list_aliases(0)
        for name in ("alias/a", "alias/b"):
            self.call(0, "DeleteAlias", AliasName=name)
        assert objects - self.objects_before == kept


def _dies(steps, die_at):
    """Whether a call with these steps dies, and the steps that it gets to."""
    if die_at not in steps:
        return False, steps
    return True, steps[: steps.index(die_at) + 1]


def _time(moment):
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ") if moment else ""


def run(processes, examples, steps=40):
    """Run so many random sequences; raises what the first one that fails raises, made small."""
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run_state_machine_as_test(lambda: KmsMachine(processes), settings=settings)


def main(seconds):
    """Run until the time is over."""
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as directory, TwoProcesses(Path(directory)) as processes:
        while time.monotonic() < end:
            run(processes, examples=10, steps=80)


if __name__ == "__main__":
    main(float(sys.argv[1]))
