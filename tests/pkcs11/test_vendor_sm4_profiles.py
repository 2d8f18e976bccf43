"""SM4 by profiles that say less, or say it wrongly: each HSM that is played has another one.

A module has one profile in a process, so no backend stays open here.
"""

import pytest
from support.importing import AES, MATERIAL, SM4
from support.pkcs11.sm4_importing import bring, issue, report_of, told
from support.pkcs11.sm4_vendors import KEYS, MODES, WITH_GCM, table
from support.pkcs11.vendors import by_officer

from hsmwrap import registry
from hsmwrap.backend import ReSealsKeys
from hsmwrap.checkvalue import check_value
from hsmwrap.errors import UnsupportedOperation
from hsmwrap.pkcs11.wrapping.material import parse_key_ref
from hsmwrap.testing.clients import decrypt_message

WRONG = 0x8000AFFF
"""A number that no module knows, as the next one."""


def test_keys_that_were_only_kept_are_usable_once_they_moved(play, softhsm):
    """The profile learns of SM4 when keys are there already."""
    before, after = play("moved", sm4=""), play("moved")
    with registry.open_backend("pkcs11", before) as opened:
        assert not opened.capabilities().key_for(SM4).usable
        kept = bring(opened, issue(opened)).key
    with registry.open_backend("pkcs11", after) as opened:
        assert not opened.capabilities().key_for(SM4).usable
        assert "`hsmwrap keys rotate` helps" in told(opened.capabilities())
    by_officer("rotate", after, softhsm)
    with registry.open_backend("pkcs11", after) as opened:
        assert opened.capabilities().key_for(SM4).usable
        with pytest.raises(UnsupportedOperation, match="keys reseal"):
            opened.encrypt(kept, b"message")
        moved = ReSealsKeys.of(opened).reseal(kept)
        message = opened.encrypt(moved, b"message")
        assert decrypt_message(SM4, MATERIAL[SM4], message, b"") == b"message"


def test_keys_that_encrypt_move_to_the_next_set(play, softhsm):
    settings = play("rotated")
    with registry.open_backend("pkcs11", settings) as opened:
        key = bring(opened, issue(opened)).key
        message = opened.encrypt(key, b"message")
    by_officer("rotate", settings, softhsm)
    with registry.open_backend("pkcs11", settings) as opened:
        moved = ReSealsKeys.of(opened).reseal(key, expected_check_value=check_value(MATERIAL[SM4]))
        assert parse_key_ref(moved)[0] == 2
        assert opened.decrypt(moved, message) == b"message"


def test_a_key_type_that_the_module_does_not_know_leaves_the_keys_kept(play):
    numbers = {**KEYS, "key_type": WRONG, "gcm": MODES["gcm"]}
    report = report_of(play("sm4-kept", sm4=table(**numbers)))
    assert report.key_for(SM4) is None or not report.key_for(SM4).usable
    assert "of the vendor's type" in told(report)


@pytest.mark.parametrize("vendor", [WITH_GCM], indirect=True, ids=str)
@pytest.mark.parametrize("changed", [{"gcm": WRONG}, {"gcm": WRONG, "ecb": None}])
def test_where_gcm_does_not_work_ccm_is_used(play, changed):
    numbers = {n: v for n, v in {**KEYS, **MODES, **changed}.items() if v is not None}
    report = report_of(play("sm4", sm4=table(**numbers)))
    assert (
        "encrypt with an imported Aliyun_SM4 key by GCM: Imported Aliyun_SM4 keys encrypt by"
        in told(report)
    )
    assert "SM4-CCM" in told(report)


@pytest.mark.parametrize("vendor", [WITH_GCM], indirect=True, ids=str)
@pytest.mark.parametrize(
    "wrong",
    [
        {"gcm": MODES["ctr"]},
        {"ecb": MODES["cbc"], "cbc": MODES["ecb"]},
        {"cbc": WRONG, "ecb": WRONG + 1},
    ],
)
def test_a_number_that_is_another_s_is_not_believed(play, wrong):
    report = report_of(play("sm4", sm4=table(**KEYS, **wrong)))
    assert not report.key_for(SM4).usable
    assert report.key_for(AES).usable
    assert "Aliyun_SM4 keys are kept and cannot encrypt" in told(report)
