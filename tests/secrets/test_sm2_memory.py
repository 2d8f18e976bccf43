"""A thousand imports by SM2PKE with the module in another process; then the memory is searched.

All key material begins with the same bytes, which are looked for. The control is the same without
unwrapping inside the HSM: there they are found.
"""

import json
import secrets
import subprocess
import sys

import pytest
from support.canaries import Canary, Search
from support.faults.shim import fault_shim
from support.pkcs11 import sm2_importer
from support.services.p11kit import p11kit_server
from support.services.softhsm import make_softhsm

from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.sm2 import decode_spki, open_engine
from hsmwrap.testing.faults import Vendor

IMPORTS = 1000
PROFILE = """\
summary = "A vendor whose numbers p11-kit's client carries"
tried = "by this test"

[sm2]
key_type = 0x80000004
generate = 0x1010
decrypt = 0x1065
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("remote")
    token = make_softhsm(directory / "token", "remote")
    shim = fault_shim(token.module, directory / "shim")
    shim.play(Vendor.REMOTE)
    with p11kit_server(token, directory, provider=shim.path) as server:
        yield server


def found_after_imports(server, directory, profile, imports=IMPORTS):
    """Exposure, and what is in the memory of the process after its imports."""
    file = directory / "profile.toml"
    file.write_text(profile)
    settings = server.settings("memory", profile_file=str(file))
    if not Pkcs11Backend.list_keys(settings):
        Pkcs11Backend.initialise_keys(settings)
    begin, planted = secrets.token_bytes(16), secrets.token_hex(16)
    search = Search([Canary("material", begin), Canary("planted", planted.encode())])
    command = [sys.executable, "-m", sm2_importer.__name__, json.dumps(settings), planted]
    engine = open_engine("libcrypto")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        exposure, public_key = process.stdout.readline().split()
        point = decode_spki(bytes.fromhex(public_key))
        for _ in range(imports):
            ciphertext = engine.encrypt(point, begin + secrets.token_bytes(16))
            process.stdin.write(ciphertext.to_c1c3c2().hex() + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "ok\n"
        search.memory(process.pid, "memory")
        process.stdin.close()
        assert process.wait() == 0
    return exposure, search.names()


@pytest.mark.slow
def test_no_material_that_the_hsm_unwrapped_is_in_memory(server, tmp_path):
    profile = f"{PROFILE}unwrap = 0x1065\n"
    assert found_after_imports(server, tmp_path, profile) == ("in_hsm", {"planted"})


@pytest.mark.slow
def test_material_that_comes_through_the_host_is_found(server, tmp_path):
    found = found_after_imports(server, tmp_path, PROFILE, imports=100)
    assert found == ("host", {"material", "planted"})
