"""Several KMS on one database and one set of keys, like several processes; and real forks."""

import multiprocessing
import warnings
from datetime import timedelta

import pytest
from support.kms.fakes import AES_MATERIAL, Client, Clock

from hsmwrap.errors import InvalidImportToken, InvalidKeyMaterial, TooManyWrappingKeys
from hsmwrap.imports import ResidentBounds
from hsmwrap.kms import RejectedPendingImport

pytestmark = pytest.mark.slow


def test_parameters_of_one_are_honoured_by_the_other(open_kms, custody):
    one, other = Client(open_kms(custody)), Client(open_kms(custody))
    key_id = one.create()
    parameters = one.parameters(key_id)
    one.kms.close()
    other.import_material(key_id, parameters=parameters)
    blob = other.usable(key_id)
    third = Client(open_kms(custody))
    assert third("Decrypt", CiphertextBlob=blob)["Plaintext"] == "aGVsbG8="


def test_deletion_by_one_is_seen_by_the_other(open_kms, objects):
    one, other = Client(open_kms()), Client(open_kms())
    key_id = one.create()
    one.import_material(key_id)
    other("DeleteKeyMaterial", KeyId=key_id)
    with pytest.raises(RejectedPendingImport):
        one.usable(key_id)
    assert objects() == 0


def test_single_use_holds_across(open_kms):
    one, other = Client(open_kms(single_use=True)), Client(open_kms(single_use=True))
    key_id = one.create()
    parameters = one.parameters(key_id)
    # A failed import releases the token.
    with pytest.raises(InvalidKeyMaterial):
        one.import_material(key_id, b"short", parameters)
    other.import_material(key_id, AES_MATERIAL, parameters)
    for client in (one, other):
        with pytest.raises(InvalidImportToken):
            client.import_material(key_id, AES_MATERIAL, parameters)
    one.import_material(key_id)


def test_single_use_holds_where_clocks_differ(open_kms, clock):
    ahead = Clock()
    fast, slow = open_kms(single_use=True, clock=ahead), Client(open_kms(single_use=True))
    key_id = slow.create()
    parameters = slow.parameters(key_id)
    slow.import_material(key_id, AES_MATERIAL, parameters)
    clock.advance(hours=24, minutes=-2)
    ahead.advance(hours=24, minutes=2)
    fast.sweep()
    with pytest.raises(InvalidImportToken):
        slow.import_material(key_id, AES_MATERIAL, parameters)


def test_expired_token_is_not_claimed(open_kms, clock):
    used = open_kms(single_use=True).operations.material._core.used_tokens
    assert not used.claim(b"a", clock())
    assert used.claim(b"a", clock() + timedelta(seconds=1))


def _use_in_child(client, key_id, blob, answers):
    try:
        client.usable(key_id)
        answers.put(client("Decrypt", CiphertextBlob=blob)["Plaintext"])
    except BaseException as error:
        answers.put(repr(error))
        raise


def test_children_after_fork_use_what_they_inherit(open_kms):
    client = Client(open_kms("HsmEncryptedDatabase", sweep_seconds=3600))
    key_id = client.create()
    client.import_material(key_id)
    blob = client.usable(key_id)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    children = [
        context.Process(target=_use_in_child, args=(client, key_id, blob, answers))
        for _ in range(4)
    ]
    with warnings.catch_warnings():
        # Python 3.12 and newer warn of a fork in a process with threads; that is tested here.
        warnings.simplefilter("ignore", DeprecationWarning)
        for child in children:
            child.start()
            client.usable(key_id)
    for child in children:
        child.join(60)
    assert [answers.get() for _ in children] == ["aGVsbG8="] * 4
    assert [child.exitcode for child in children] == [0] * 4
    client.usable(key_id)


def test_failed_imports_are_counted_across_and_forgotten_after_the_token(open_kms, clock):
    one, other = (Client(open_kms(max_failed_imports=3)) for _ in range(2))
    key_id = one.create()
    parameters = one.parameters(key_id)
    for client in (one, other, one):
        with pytest.raises(InvalidKeyMaterial):
            client.import_material(key_id, AES_MATERIAL[:-1], parameters=parameters)
    for client in (one, other):
        with pytest.raises(InvalidImportToken, match="call GetParametersForImport again"):
            client.import_material(key_id, parameters=parameters)
    other.import_material(key_id)
    for hours, rows in ((24.5, 1), (0.6, 0)):
        clock.advance(hours=hours)
        one.kms.sweep()
        with one.kms._database.read() as transaction:
            counted = transaction.connection().exec_driver_sql(
                "SELECT failures FROM failed_imports"
            )
            assert [each.failures for each in counted] == [3] * rows


def test_resident_wrapping_keys_are_counted_across_and_forgotten_when_they_expire(open_kms, clock):
    bounds = ResidentBounds(of_cmk=2, in_all=3)
    one, other = (
        Client(open_kms(wrapping="HsmInternal", resident_bounds=bounds)) for _ in range(2)
    )
    first, second = one.create(), other.create()
    for client in (one, other):
        client.parameters(first)
    for client in (one, other):
        with pytest.raises(TooManyWrappingKeys, match="this CMK has 2"):
            client.parameters(first)
    one.parameters(second)
    with pytest.raises(TooManyWrappingKeys, match="all CMKs together have 3"):
        other.parameters(second)
    clock.advance(hours=24)
    other.parameters(second)
    one.kms.sweep()
    with one.kms._database.read() as transaction:
        rows = transaction.connection().exec_driver_sql("SELECT key_id FROM resident_keys")
        assert [row.key_id for row in rows] == [second]
