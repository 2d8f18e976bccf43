"""Every wrong type at the public doors is a typed error: of each method, each argument, in turn."""

import inspect
from datetime import UTC, datetime, timedelta

import pytest
from support.kms.fakes import ADMIN, Client, DirectoryBackend, build_kms

from hsmwrap import Cmk, Deployment, ImportService, KeySpec, ProtectionLevel
from hsmwrap.arguments import checked, of_the_api
from hsmwrap.errors import ConfigurationError, InvalidParameter, MissingParameter
from hsmwrap.imports import ResidentBounds
from hsmwrap.kms.blobs import CiphertextBlob
from hsmwrap.testing import MemoryBackend

CMK = Cmk("key-1", KeySpec.ALIYUN_AES_256, ProtectionLevel.HSM)
NOW = datetime.now(UTC)
WRONG = (7, 7.5, True, None, "text", b"bytes", bytearray(b"b"), ["a"], {"a": 1}, object(), NOW)
"""Of each of these types, an argument that does not take it."""
RIGHT = {
    # Whatever is right: the operation itself is never reached.
    "cmk": CMK, "wrapping_key_spec": "RSA_2048", "wrapping_algorithm": "RSAES_OAEP_SHA_1",
    "encrypted_key_material": b"", "import_token": b"", "key_material_expire": None,
    "object_id": None, "key_id": "k", "creator": "c", "description": "", "plaintext": b"",
    "context": {}, "source_context": {}, "destination_context": {}, "destination": "k",
    "length": 32, "blob": CiphertextBlob("k", b""), "page_number": 1, "page_size": 1,
    "pending_window_in_days": 7, "name": "alias/a", "current": "k", "now": None,
    "action": "Encrypt", "parameters": {}, "caller": ADMIN, "request_id": "r",
    "access_key_id": "a", "code": "c",
}  # fmt: skip


def _public(kind):
    return [name for name, _ in inspect.getmembers(kind, inspect.isfunction) if name[0] != "_"]


def doors(kms, service):
    """Each public method that takes something, as (name, method)."""
    operations = kms.operations
    of_kms = (operations.lifecycle, operations.material, operations.use, operations.aliases)
    owners = (
        (service, ("get_parameters_for_import", "import_key_material", "backend_for_import")),
        (kms, ("execute", "record_refusal", "sweep")),
        *((each, _public(type(each))) for each in of_kms),
    )
    for owner, names in owners:
        for name in names:
            yield f"{type(owner).__name__}.{name}", getattr(owner, name)


@pytest.fixture
def kms(migrated_kms):
    return migrated_kms


@pytest.fixture
def migrated_kms(tmp_path):

    backend = DirectoryBackend(tmp_path / "objects")
    with build_kms(f"sqlite:///{tmp_path}/kms.db", backend, tmp_path / "audit.log") as kms:
        yield kms


def test_each_argument_of_each_method(kms):
    service = ImportService({ProtectionLevel.HSM: MemoryBackend()}, Deployment())
    tried = 0
    for door, method in doors(kms, service):
        parameters = inspect.signature(method).parameters
        right = {n: RIGHT[n] for n, p in parameters.items() if p.default is p.empty}
        for name, parameter in parameters.items():
            takes = parameter.annotation
            for wrong in WRONG:
                fits = isinstance(wrong, type(RIGHT.get(name))) and not isinstance(wrong, bool)
                if fits or (wrong is None and "None" in takes) or _is_right(wrong, takes):
                    continue
                with pytest.raises((InvalidParameter, MissingParameter)) as refused:
                    method(**right | {name: wrong})
                assert type(wrong).__name__ in str(refused.value) or wrong is None, (door, name)
                tried += 1
    assert tried > 400


def _is_right(value, takes):
    """Whether an annotation names this value's type; a mapping here has a number in it."""
    return any(each.strip() == type(value).__name__ for each in takes.split("|"))


def test_what_the_errors_say(kms):
    material = kms.operations.material
    with pytest.raises(
        InvalidParameter, match=r"^KeyMaterialExpire: takes datetime or None, not int"
    ):
        material.import_key_material("k", b"", b"", 1_700_000_000)
    with pytest.raises(MissingParameter, match=r"^EncryptedKeyMaterial is needed"):
        material.import_key_material("k", None, b"")
    with pytest.raises(InvalidParameter, match=r"^Context: takes texts only, not int"):
        kms.operations.use.encrypt("k", b"", {"a": 1})
    with pytest.raises(InvalidParameter, match=r"^PageNumber: takes int, not bool"):
        kms.operations.lifecycle.list_keys(True, 10)  # noqa: FBT003 (that is what is wrong)


@pytest.mark.parametrize("key_id", [7, None, b"key-1", ["key-1"]])
def test_a_cmk(key_id):
    with pytest.raises((InvalidParameter, MissingParameter), match=r"^KeyId"):
        Cmk(key_id, KeySpec.ALIYUN_AES_256, ProtectionLevel.HSM)
    with pytest.raises(InvalidParameter, match=r"^CheckValue: takes bytes or None, not str"):
        Cmk("key-1", KeySpec.ALIYUN_AES_256, ProtectionLevel.HSM, check_value="ab")


@pytest.mark.parametrize(
    "wrong",
    [
        {"token_lifetime": 3600},
        {"clock": datetime.now(UTC)},
        {"max_failed_imports": "3"},
        {"max_failed_imports": True},
        {"deployment": "cn-hangzhou"},
        {"backends": [MemoryBackend()]},
        {"resident_bounds": 100},
        {"refused_algorithms": 7},
        {"required_exposure": True},
    ],
)
def test_what_an_embedder_sets_up(wrong):
    right = {"backends": {ProtectionLevel.HSM: MemoryBackend()}, "deployment": Deployment()}
    with pytest.raises(ConfigurationError, match=rf"^{next(iter(wrong))}: takes"):
        ImportService(**right | wrong)
    ImportService(**right, token_lifetime=timedelta(hours=1), required_exposure="in_hsm")


@pytest.mark.parametrize("bound", ["3", 3.5, True, None])
def test_bounds(bound):
    with pytest.raises(ConfigurationError, match=r"^in_all: takes int, not"):
        ResidentBounds(in_all=bound)


def test_a_call_that_is_right_gets_its_arguments():
    @checked(of_the_api)
    def door(number: float, texts: "dict[str, str] | None" = None, *, more: int = 1) -> object:
        return number, texts, more

    assert door(1, {"a": "b"}, more=2) == (1, {"a": "b"}, 2)
    assert door(1.5) == (1.5, None, 1)
    with pytest.raises(TypeError):
        door()


def test_the_kms_still_works(kms):
    client = Client(kms)
    key_id = client.create()
    client.import_material(key_id)
    client.usable(key_id)
