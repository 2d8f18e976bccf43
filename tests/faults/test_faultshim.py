"""The fault shim in front of SoftHSM2: it injects the faults that are set, and counts right."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.faults.shimclient import CKA_CLASS, CKA_TOKEN, PIN, Client, fresh_process, ready

from hsmwrap.testing import _control, _shimbuild
from hsmwrap.testing.faults import (
    CKR,
    FUNCTIONS,
    FaultControl,
    FaultShim,
    Restriction,
    Vendor,
    build,
    main,
)

pytestmark = pytest.mark.slow

SOFTHSM = "/usr/lib/softhsm/libsofthsm2.so"
ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "tests/support/faults/smoke.c"


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("faultshim"))


@pytest.fixture(scope="session")
def token_template(tmp_path_factory):
    home = tmp_path_factory.mktemp("softhsm")
    environment = os.environ | {"SOFTHSM2_CONF": write_configuration(home)}
    subprocess.run(
        [
            *("softhsm2-util", "--init-token", "--free", "--label=faults"),
            *("--so-pin=5678", f"--pin={PIN.decode()}"),
        ],
        env=environment,
        check=True,
        capture_output=True,
    )
    return home / "tokens"


def write_configuration(home):
    (home / "tokens").mkdir(parents=True, exist_ok=True)
    path = home / "softhsm2.conf"
    path.write_text(f"directories.tokendir = {home / 'tokens'}\nlog.level = ERROR\n")
    return str(path)


@pytest.fixture
def token(token_template, tmp_path, monkeypatch):
    shutil.copytree(token_template, tmp_path / "tokens")
    monkeypatch.setenv("SOFTHSM2_CONF", write_configuration(tmp_path))


@pytest.fixture
def home(token, library, tmp_path):
    """Directory of a shim in front of SoftHSM2 with a token of its own."""
    FaultShim(SOFTHSM, tmp_path / "shim", library=library)
    return tmp_path / "shim"


# --- building and layout ---


def test_layout_is_that_of_the_header(tmp_path):
    structures = {
        "function_control": _control.FunctionControl,
        "process_share": _control.ProcessShare,
        "control": _control.Control,
    }
    fields = [(name, field) for name, kind in structures.items() for field, *_ in kind._fields_]
    prints = [f'P(sizeof(struct {name}), "{name}")' for name in structures]
    prints += [f'P(offsetof(struct {name}, {field}), "{name}.{field}")' for name, field in fields]
    prints += ['P(CONTROL_MAGIC, "MAGIC")', 'P(CONTROL_VERSION, "VERSION")']
    prints += ['P(CODES_MAX, "CODES")', 'P(PROCESSES_MAX, "PROCESSES")', 'P(PIN_MAX, "PIN")']
    prints += [f'P({each.name}, "{each.name}")' for each in Restriction]
    prints += ['P(RESTRICTION_COUNT, "RESTRICTIONS")', 'P(VENDOR_COUNT, "VENDORS")']
    prints += [f'P(VENDOR_{each.name}, "VENDOR_{each.name}")' for each in Vendor]
    source = tmp_path / "layout.c"
    source.write_text(
        '#include <stdio.h>\n#include "restrictions.h"\n#include "vendor.h"\n'
        '#define P(value, name) printf("%s %lu\\n", name, (unsigned long)(value));\n'
        "int main(void) {" + "\n".join(prints) + "}"
    )
    program = tmp_path / "layout"
    subprocess.run(["gcc", "-I", _control.SOURCES, "-o", program, source], check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    measured = {name: int(value) for name, value in map(str.split, lines.splitlines())}
    mirrored = {name: ctypes.sizeof(kind) for name, kind in structures.items()}
    mirrored |= {f"{name}.{f}": getattr(structures[name], f).offset for name, f in fields}
    mirrored |= {"MAGIC": _control.MAGIC, "VERSION": _control.VERSION}
    mirrored |= {"CODES": _control.CODES_MAX, "PROCESSES": _control.PROCESSES_MAX}
    mirrored |= {"PIN": _control.PIN_MAX, "RESTRICTIONS": len(Restriction)}
    mirrored |= {each.name: each.value for each in Restriction}
    mirrored |= {f"VENDOR_{each.name}": each.value for each in Vendor}
    mirrored |= {"VENDORS": len(Vendor) + 1}
    assert measured == mirrored


def test_only_one_symbol_is_exported(library):
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True
    ).stdout
    assert [line.split()[-1] for line in symbols.splitlines()] == ["C_GetFunctionList"]


def test_build_only_when_sources_are_newer(tmp_path):
    first = build(tmp_path).stat()
    assert build(tmp_path).stat().st_ino == first.st_ino
    os.utime(tmp_path / "faultshim.so", ns=(0, 0))
    assert build(tmp_path).stat().st_mtime_ns > 0


def test_script_prints_the_path(tmp_path):
    done = subprocess.run(
        [ROOT / "softhsm/build-shim", tmp_path], check=True, capture_output=True, text=True
    )
    assert done.stdout == f"{tmp_path / 'faultshim.so'}\n"
    assert Path(done.stdout.strip()).exists()


def test_no_compiler_names_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["build", str(tmp_path)]) == 2
    assert "apt-get install --yes gcc libc6-dev" in capsys.readouterr().err


def test_a_broken_compiler_is_reported(tmp_path, monkeypatch):
    fake = tmp_path / "gcc"
    fake.write_text("#!/bin/sh\necho no stdio.h >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(_shimbuild.ShimBuildError, match=r"no stdio\.h"):
        build(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


# --- passing through ---


@fresh_process
def test_function_list_is_in_the_order_of_the_standard(home):
    real = Client(SOFTHSM)
    assert len(set(FUNCTIONS)) == 68
    assert list(real.entries) == [real.exported(name) for name in FUNCTIONS]


@pytest.mark.parametrize("vendor", [None, *Vendor])
@fresh_process
def test_every_function_answers_as_the_module_does(home, vendor):
    FaultControl(home).play(vendor)
    shim, real = Client(FaultControl(home).path), Client(SOFTHSM)
    arity = dict(_arities())
    silent = {"C_Initialize", "C_Finalize", "C_GetFunctionList"}
    for initialized in (False, True):
        if initialized:
            assert shim.initialize() == CKR.OK
        for name in (name for name in FUNCTIONS if name not in silent):
            arguments = [0xDEAD] + [0] * (arity[name] - 1)
            if name in {"C_GetInfo", "C_WaitForSlotEvent"}:
                arguments[0] = 0
            assert getattr(shim, name)(*arguments) == getattr(real, name)(*arguments), name
    assert all(FaultControl(home).counters().calls[name] == 2 for name in FUNCTIONS[10:])


def _arities():
    text = (_control.SOURCES / "functions.h").read_text()
    rows = (line.strip().split(")")[0] for line in text.splitlines() if " X(C_" in line)
    for name, arity, _kind in (row.removeprefix("X(").split(",") for row in rows):
        yield name, int(arity)


@fresh_process
def test_python_pkcs11_works_through_it(home):
    import pkcs11

    control = FaultControl(home)
    module = pkcs11.lib(str(control.path))
    token = module.get_token(token_label="faults")
    with token.open(user_pin=PIN.decode(), rw=True) as session:
        key = session.generate_key(pkcs11.KeyType.AES, 256)
        iv = session.generate_random(128)
        assert key.decrypt(key.encrypt(b"text", mechanism_param=iv), mechanism_param=iv) == b"text"
        counters = control.counters()
        assert counters.held == (1, 1, 0)
        assert counters.calls["C_GenerateKey"] == 1
        assert counters.initialized_without_locking == 1
        control.fail("C_GenerateKey", CKR.DEVICE_ERROR)
        with pytest.raises(pkcs11.DeviceError):
            session.generate_key(pkcs11.KeyType.AES, 256)
    assert control.counters().held == (0, 0, 0)


@fresh_process
def test_two_shims_in_one_process(home, library, tmp_path):
    inner = FaultControl(home)
    outer = FaultShim(inner.path, tmp_path / "outer", library=library)
    client, _, session = ready(outer.path)
    outer.fail("C_GenerateRandom", CKR.DEVICE_MEMORY)
    inner.fail("C_GenerateRandom", CKR.DEVICE_ERROR)
    answers = [client.random_bytes(session) for _ in range(3)]
    assert answers == [CKR.DEVICE_MEMORY, CKR.DEVICE_ERROR, CKR.OK]
    calls = [control.counters().calls["C_GenerateRandom"] for control in (outer, inner)]
    assert calls == [3, 2]


# --- faults ---


@fresh_process
def test_nth_call_once(home):
    client, _, session = ready(FaultControl(home).path)
    shim = FaultControl(home)
    shim.fail("C_GenerateRandom", CKR.DEVICE_ERROR, nth=3)
    assert shim.pending() == ("C_GenerateRandom",)
    answers = [client.random_bytes(session) for _ in range(5)]
    assert answers == [CKR.OK, CKR.OK, CKR.DEVICE_ERROR, CKR.OK, CKR.OK]
    assert shim.pending() == ()
    assert shim.counters().injected["C_GenerateRandom"] == 1
    assert shim.counters().calls["C_GenerateRandom"] == 5


def _together(call, arguments):
    barrier = threading.Barrier(len(arguments))
    answers = []

    def run(argument):
        barrier.wait()
        answers.append(call(argument))

    threads = [threading.Thread(target=run, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@fresh_process
def test_every_nth_call_always_and_clear(home):
    shim = FaultControl(home)
    client, _, session = ready(shim.path)
    client.random_bytes(session)
    shim.fail("C_GenerateRandom", CKR.SESSION_COUNT, every=2)
    answers = [client.random_bytes(session) for _ in range(4)]
    assert answers == [CKR.OK, CKR.SESSION_COUNT] * 2
    shim.fail("C_GenerateRandom", 0x80000123, always=True)
    assert {client.random_bytes(session) for _ in range(3)} == {0x80000123}
    shim.fail("C_GetSessionInfo", CKR.DEVICE_ERROR, always=True)
    shim.clear("C_GenerateRandom")
    assert client.random_bytes(session) == CKR.OK
    assert client.C_GetSessionInfo(session, ctypes.create_string_buffer(64)) == CKR.DEVICE_ERROR
    shim.clear()
    assert client.C_GetSessionInfo(session, ctypes.create_string_buffer(64)) == CKR.OK
    assert shim.counters().injected["C_GenerateRandom"] == 5


@fresh_process
def test_instead_does_nothing_and_after_does_all_but_answer(home):
    shim = FaultControl(home)
    client, slot, session = ready(shim.path)
    handle = ctypes.c_ulong(0xABCD)
    shim.fail("C_GenerateKey", CKR.DEVICE_ERROR)
    code, _ = client.generate_aes(session, token=True)
    assert (code, client.count_objects(session)) == (CKR.DEVICE_ERROR, 0)
    shim.fail("C_GenerateKey", CKR.DEVICE_ERROR, after=True)
    answer = client.generate_aes(session, token=True, handle=handle)
    assert (answer, client.count_objects(session)) == ((CKR.DEVICE_ERROR, 0xABCD), 1)
    shim.fail("C_GenerateKeyPair", CKR.DEVICE_ERROR, after=True)
    assert client.generate_rsa(session, token=True) == (CKR.DEVICE_ERROR, 0, 0)
    assert client.count_objects(session) == 3
    shim.fail("C_OpenSession", CKR.DEVICE_ERROR, after=True)
    assert client.open(slot) == (CKR.DEVICE_ERROR, 0)
    assert shim.counters().held == (2, 0, 3)


@fresh_process
def test_random_faults_are_those_of_the_seed(home):
    shim = FaultControl(home)
    client, _, session = ready(shim.path)
    codes = (CKR.DEVICE_ERROR, CKR.SESSION_COUNT, CKR.GENERAL_ERROR)

    def draw(seed):
        shim.random(["C_GenerateRandom"], codes, probability=0.3, seed=seed)
        return [client.random_bytes(session) for _ in range(300)]

    answers = draw(7)
    expected = [_drawn(7, "C_GenerateRandom", call, codes, 0.3) for call in range(1, 301)]
    assert answers == expected == draw(7) != draw(8)
    assert set(answers) == {CKR.OK, *codes}
    shim.random(["C_GenerateRandom"], codes[:1], probability=1, seed=0)
    assert {client.random_bytes(session) for _ in range(50)} == {CKR.DEVICE_ERROR}
    shim.random(["C_GenerateRandom"], codes, probability=0, seed=0)
    assert {client.random_bytes(session) for _ in range(50)} == {CKR.OK}
    shim.random(["C_GenerateKey"], codes[:1], probability=1, seed=0, after=True)
    assert client.generate_aes(session, token=True) == (CKR.DEVICE_ERROR, 0)
    assert client.count_objects(session) == 1


def _drawn(seed, function, call, codes, probability):
    step = call * len(FUNCTIONS) + FUNCTIONS.index(function)
    z = (seed + step * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return codes[(z >> 16) % len(codes)] if z % 65536 < round(probability * 65536) else CKR.OK


@fresh_process
def test_latency_is_waited_for(home):
    shim = FaultControl(home)
    client, _, session = ready(shim.path)
    shim.latency("C_GenerateRandom", 50_000)
    start = time.monotonic()
    assert client.random_bytes(session) == CKR.OK
    assert time.monotonic() - start >= 0.05  # a lower bound: no load can break it
    shim.clear()


@pytest.mark.parametrize(
    "order",
    [
        lambda shim: shim.fail("C_Unwrap", CKR.DEVICE_ERROR),
        lambda shim: shim.fail("C_UnwrapKey", CKR.OK),
        lambda shim: shim.fail("C_UnwrapKey", 1 << 32),
        lambda shim: shim.fail("C_UnwrapKey", CKR.DEVICE_ERROR, nth=0),
        lambda shim: shim.fail("C_UnwrapKey", CKR.DEVICE_ERROR, every=0),
        lambda shim: shim.random(["C_UnwrapKey"], [], probability=0.5, seed=1),
        lambda shim: shim.random(["C_UnwrapKey"], [5] * 17, probability=0.5, seed=1),
        lambda shim: shim.random(["C_UnwrapKey"], [5], probability=1.1, seed=1),
        lambda shim: shim.latency("C_UnwrapKey", -1),
    ],
)
def test_impossible_orders_are_refused(home, order):
    with pytest.raises(ValueError):
        order(FaultControl(home))


def die(shim):
    """How a child ends that makes three token objects, and how many it made."""
    before = shim.counters()
    if not (child := os.fork()):
        client, _, session = ready(shim.path)
        for _ in range(3):
            client.create_data(session, token=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    after = shim.counters()
    made = after.token_objects_created - before.token_objects_created
    return os.waitstatus_to_exitcode(status), made, sum(after.calls_since(before).values())


@fresh_process
def test_a_process_is_killed_at_a_call_or_a_change(home):
    shim = FaultControl(home)
    ended, made, calls = die(shim)
    assert (ended, made) == (0, 3)
    shim.kill(change=2)
    assert die(shim)[:2] == (-signal.SIGKILL, 2)
    for call, made in ((calls, 2), (calls - 2, 0), (1, 0)):
        shim.kill(call=call)
        assert die(shim) == (-signal.SIGKILL, made, call)
    shim.kill(call=1)
    shim.kill()
    assert die(shim) == (0, 3, calls)


# --- counters ---


@fresh_process
def test_sessions_and_objects_are_counted(home):
    shim = FaultControl(home)
    client, slot, first = ready(shim.path)
    second, third = client.open(slot)[1], client.open(slot)[1]
    assert client.generate_rsa(second)[0] == CKR.OK
    key = client.generate_aes(third)[1]
    resident = client.generate_aes(third, token=True)[1]
    assert shim.counters().held == (3, 3, 1)
    assert client.C_DestroyObject(first, key) == CKR.OK
    assert client.C_DestroyObject(first, key) == CKR.OBJECT_HANDLE_INVALID
    assert shim.counters().held == (3, 2, 1)
    assert client.C_CloseSession(second) == CKR.OK
    assert shim.counters().held == (2, 0, 1)
    assert client.C_DestroyObject(first, resident) == CKR.OK
    assert shim.counters().held == (2, 0, 0)
    client.generate_aes(first)
    assert client.C_CloseAllSessions(slot) == CKR.OK
    assert shim.counters().held == (0, 0, 0)
    session = client.open(slot)[1]
    client.create_data(session)
    assert shim.counters().held == (1, 1, 0)
    assert client.C_Finalize(None) == CKR.OK
    counters = shim.counters()
    assert counters.held == (0, 0, 0)
    assert counters.session_high_water == 3
    assert (counters.token_objects_created, counters.token_objects_destroyed) == (1, 1)
    assert not counters.violations


@fresh_process
def test_created_and_copied_objects_are_told_apart(home):
    shim = FaultControl(home)
    client, _, session = ready(shim.path)
    temporary = client.create_data(session)[1]
    lasting = client.create_data(session, token=True)[1]
    assert shim.counters().held == (1, 1, 1)
    copies = [
        client.copy(session, temporary, {}),
        client.copy(session, lasting, {}),
        client.copy(session, temporary, {CKA_TOKEN: b"\1"}),
        client.copy(session, lasting, {CKA_TOKEN: b"\0"}),
    ]
    assert [code for code, _ in copies] == [CKR.OK] * 4
    assert shim.counters().held == (1, 3, 3)
    refused, _ = client.copy(session, lasting, {CKA_CLASS: b"\1" * 8})
    assert refused != CKR.OK
    assert shim.counters().held == (1, 3, 3)


@fresh_process
def test_unwrapped_and_derived_keys_are_counted(home):
    import pkcs11
    from pkcs11 import Attribute, KeyType, Mechanism
    from pkcs11.util.ec import encode_named_curve_parameters

    shim = FaultControl(home)
    token = pkcs11.lib(str(shim.path)).get_token(token_label="faults")
    with token.open(user_pin=PIN.decode(), rw=True) as session:
        wrapping = session.generate_key(KeyType.AES, 256, template={Attribute.WRAP: True})
        key = session.generate_key(KeyType.AES, 256, template={Attribute.EXTRACTABLE: True})
        blob = wrapping.wrap_key(key, mechanism=Mechanism.AES_KEY_WRAP)
        arguments = (pkcs11.ObjectClass.SECRET_KEY, KeyType.AES, blob)
        wrapping.unwrap_key(*arguments, mechanism=Mechanism.AES_KEY_WRAP)
        wrapping.unwrap_key(*arguments, mechanism=Mechanism.AES_KEY_WRAP, store=True)
        assert shim.counters().held == (1, 3, 1)
        parameters = session.create_domain_parameters(
            KeyType.EC,
            {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")},
            local=True,
        )
        public, private = parameters.generate_keypair()
        assert shim.counters().held == (1, 5, 1)
        point = public[Attribute.EC_POINT]
        private.derive_key(KeyType.AES, 256, mechanism_param=(pkcs11.KDF.NULL, None, point))
        assert shim.counters().held == (1, 6, 1)
    assert shim.counters().calls["C_DeriveKey"] == 1
    assert shim.counters().held == (0, 0, 1)


@fresh_process
def test_locking_is_observed(home):
    shim = FaultControl(home)
    client = Client(shim.path)
    for flags in (0, 2, 2):
        assert client.initialize(flags) == CKR.OK
        assert client.C_Finalize(None) == CKR.OK
    assert client.C_Initialize(None) == CKR.OK
    assert client.initialize() == CKR.CRYPTOKI_ALREADY_INITIALIZED
    counters = shim.counters()
    assert counters.initialized_with_locking == 2
    assert counters.initialized_without_locking == 2


# --- the removed device ---


@fresh_process
def test_removed_device(home):
    shim = FaultControl(home)
    client, slot, session = ready(shim.path)
    client.generate_aes(session)
    resident = client.generate_aes(session, token=True)[1]
    shim.remove_device()
    assert client.random_bytes(session) == CKR.DEVICE_REMOVED
    assert client.open(slot)[0] == CKR.TOKEN_NOT_PRESENT
    assert client.C_GetTokenInfo(slot, ctypes.create_string_buffer(512)) == CKR.TOKEN_NOT_PRESENT
    assert client.slots() == []
    assert slot in client.slots(token_present=0)
    assert _slot_flags(client, slot) & 1 == 0
    assert client.C_GetInfo(ctypes.create_string_buffer(512)) == CKR.OK
    assert shim.counters().held == (0, 0, 1)
    shim.restore_device()
    assert client.random_bytes(session) == CKR.SESSION_HANDLE_INVALID
    assert client.slots()[0] == slot
    assert _slot_flags(client, slot) & 1 == 1
    code, fresh = client.open(slot)
    assert code == CKR.OK
    assert client.generate_aes(fresh)[0] == CKR.USER_NOT_LOGGED_IN
    assert client.login(fresh) == CKR.OK
    assert client.count_objects(fresh) == 1
    assert client.C_DestroyObject(fresh, resident) in {CKR.OK, CKR.OBJECT_HANDLE_INVALID}


def _slot_flags(client, slot):
    info = ctypes.create_string_buffer(256)
    assert client.C_GetSlotInfo(slot, info) == CKR.OK
    return int.from_bytes(info.raw[96:104], sys.byteorder)


@fresh_process
def test_sticky_removal_lasts_until_initialized_again(home):
    shim = FaultControl(home)
    client, slot, session = ready(shim.path)
    shim.remove_device(sticky=True)
    assert client.random_bytes(session) == CKR.DEVICE_REMOVED
    shim.restore_device()
    for _ in range(2):
        assert client.random_bytes(session) == CKR.DEVICE_REMOVED
        assert client.open(slot)[0] == CKR.DEVICE_REMOVED
    assert client.initialize() == CKR.CRYPTOKI_ALREADY_INITIALIZED
    assert client.open(slot)[0] == CKR.DEVICE_REMOVED
    assert client.C_Finalize(None) == CKR.OK
    assert client.random_bytes(session) == CKR.CRYPTOKI_NOT_INITIALIZED
    assert client.initialize() == CKR.OK
    assert client.random_bytes(session) == CKR.SESSION_HANDLE_INVALID
    assert client.open(slot)[0] == CKR.OK


@pytest.mark.parametrize("sticky", [False, True])
@fresh_process
def test_a_removal_takes_effect_even_when_over_before_the_next_call(home, sticky):
    shim = FaultControl(home)
    client, _, session = ready(shim.path)
    shim.remove_device(sticky=sticky)
    shim.restore_device()
    expected = CKR.DEVICE_REMOVED if sticky else CKR.SESSION_HANDLE_INVALID
    assert client.random_bytes(session) == expected
    assert shim.counters().held == (0, 0, 0)


@fresh_process
def test_reinitialized_while_away(home):
    shim = FaultControl(home)
    client, slot, _ = ready(shim.path)
    shim.remove_device(sticky=True)
    assert (client.C_Finalize(None), client.initialize()) == (CKR.OK, CKR.OK)
    assert client.open(slot)[0] == CKR.TOKEN_NOT_PRESENT
    shim.restore_device()
    assert client.open(slot)[0] == CKR.OK


@fresh_process
def test_removal_waits_for_the_running_call(home):
    """SoftHSM 2.6.1 would free the session under it."""
    shim = FaultControl(home)
    client, slot, session = ready(shim.path)
    other = client.open(slot)[1]
    answers = []
    generate = threading.Thread(
        target=lambda: answers.append(client.generate_rsa(session, bits=4096)[0])
    )
    generate.start()
    time.sleep(0.02)
    shim.remove_device()
    assert client.random_bytes(other) == CKR.DEVICE_REMOVED
    generate.join()
    assert answers in ([CKR.OK], [CKR.DEVICE_REMOVED])
    assert shim.counters().held == (0, 0, 0)


@fresh_process
def test_removal_under_load_crashes_no_thread(home):
    shim = FaultControl(home)
    client, slot, _ = ready(shim.path)
    over = threading.Event()
    seen = set()

    def work():
        session = client.open(slot)[1]
        while not over.is_set():
            code = client.random_bytes(session)
            seen.add(code)
            if code != CKR.OK:
                session = client.open(slot)[1]

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        shim.remove_device()
        time.sleep(0.005)
        shim.restore_device()
        time.sleep(0.005)
    over.set()
    for thread in threads:
        thread.join()
    assert CKR.DEVICE_REMOVED in seen
    assert seen <= {CKR.OK, CKR.DEVICE_REMOVED, CKR.SESSION_HANDLE_INVALID}
    assert client.C_CloseAllSessions(slot) == CKR.OK
    assert shim.counters().held == (0, 0, 0)


# --- processes ---


@fresh_process
def test_another_process_gives_the_orders(home):
    shim = FaultControl(home)
    client, _, session = ready(shim.path)
    order = (
        "import sys; from hsmwrap.testing.faults import CKR, FaultControl;"
        "shim = FaultControl(sys.argv[1]);"
        "shim.fail('C_GenerateRandom', CKR.FUNCTION_FAILED);"
        "print(shim.counters().open_sessions)"
    )
    done = subprocess.run(
        [sys.executable, "-c", order, home], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "1\n"
    assert client.random_bytes(session) == CKR.FUNCTION_FAILED


def _in_child(steps):
    """Fork, run ``steps`` in the child; the answer is True when nothing failed there."""
    pid = os.fork()
    if pid == 0:
        failed = True
        try:
            steps()
            failed = False
        finally:
            if failed:
                sys.excepthook(*sys.exc_info())
            os._exit(failed)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@fresh_process
def test_forked_child_starts_afresh(home):
    shim = FaultControl(home)
    client, slot, session = ready(shim.path)
    client.generate_aes(session)

    def child():
        # SoftHSM, unless configured otherwise, takes the parent's C_Initialize for the child's.
        assert client.initialize() == CKR.CRYPTOKI_ALREADY_INITIALIZED
        assert (client.C_Finalize(None), client.initialize()) == (CKR.OK, CKR.OK)
        assert client.open(slot)[0] == CKR.OK
        assert shim.counters().held == (2, 1, 0)
        assert client.C_Finalize(None) == CKR.OK
        assert shim.counters().held == (1, 1, 0)

    assert _in_child(child)
    assert client.random_bytes(session) == CKR.OK
    assert shim.counters().held == (1, 1, 0)
    assert not shim.counters().violations


@fresh_process
def test_use_of_inherited_handles_is_a_violation(home):
    shim = FaultControl(home)
    client, _, session = ready(shim.path)
    assert _in_child(lambda: client.random_bytes(session))
    assert shim.counters().violations.uninitialized_calls == 1


@fresh_process
def test_what_a_killed_process_held_is_not_counted(home):
    shim = FaultControl(home)
    client, slot, _ = ready(shim.path)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        client.C_Finalize(None)
        client.initialize()
        client.open(slot)
        client.create_data(client.open(slot)[1])
        os.write(writer, b"!")
        signal.pause()
    assert os.read(reader, 1) == b"!"
    assert shim.counters().held == (3, 1, 0)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert shim.counters().held == (1, 0, 0)  # a zombie still
    os.waitpid(pid, 0)
    assert shim.counters().held == (1, 0, 0)
    for _ in range(_control.PROCESSES_MAX + 1):
        assert _in_child(lambda: client.C_Finalize(None))
    assert shim.counters().held == (1, 0, 0)


# --- violations ---


@fresh_process
def test_one_session_in_two_threads_is_caught(home):
    shim = FaultControl(home)
    client, _, session = ready(shim.path)
    shim.latency("C_GenerateRandom", 200_000)
    _together(client.random_bytes, [session, session])
    assert shim.counters().violations.session_conflicts == 1
    assert shim.counters().concurrent_high_water == 2


@fresh_process
def test_sessions_of_their_own_are_no_violation(home):
    shim = FaultControl(home)
    client, slot, session = ready(shim.path)
    sessions = [session, client.open(slot)[1], client.open(slot)[1]]
    shim.latency("C_GenerateRandom", 100_000)
    assert _together(client.random_bytes, sessions) == [CKR.OK] * 3
    counters = shim.counters()
    assert not counters.violations
    assert counters.concurrent_high_water == 3


def _while_a_call_runs(shim, client, session, step):
    shim.latency("C_GenerateRandom", 300_000)
    calls = shim.counters().calls["C_GenerateRandom"]
    thread = threading.Thread(target=client.random_bytes, args=(session,))
    thread.start()
    while shim.counters().calls["C_GenerateRandom"] == calls:
        time.sleep(0.001)
    time.sleep(0.01)
    step()
    thread.join()


@fresh_process
def test_closing_all_sessions_under_a_call_is_caught(home):
    shim = FaultControl(home)
    client, slot, session = ready(shim.path)
    _while_a_call_runs(shim, client, session, lambda: client.C_CloseAllSessions(slot))
    assert shim.counters().violations.session_conflicts == 1


@fresh_process
def test_finalize_under_a_call_is_caught(home):
    shim = FaultControl(home)
    client, _, session = ready(shim.path)
    _while_a_call_runs(shim, client, session, lambda: client.C_Finalize(None))
    assert shim.counters().violations.finalize_conflicts == 1


@fresh_process
def test_call_begun_during_finalize_is_caught(home):
    shim = FaultControl(home)
    client, _, session = ready(shim.path)
    shim.latency("C_Finalize", 300_000)
    thread = threading.Thread(target=client.C_Finalize, args=(None,))
    thread.start()
    while not shim.counters().calls["C_Finalize"]:
        time.sleep(0.001)
    time.sleep(0.01)
    client.random_bytes(session)
    thread.join()
    assert shim.counters().violations.finalize_conflicts == 1


@fresh_process
def test_call_before_initialize_is_caught(home):
    shim = FaultControl(home)
    assert Client(shim.path).random_bytes(1) == CKR.CRYPTOKI_NOT_INITIALIZED
    assert shim.counters().violations.uninitialized_calls == 1


# --- setting up ---


def test_a_directory_holds_one_shim(home, library):
    with pytest.raises(FileExistsError):
        FaultShim(SOFTHSM, home, library=library)
    assert oct((home / "faultshim.control").stat().st_mode & 0o777) == "0o600"


def test_shim_builds_itself(tmp_path):
    assert FaultShim(SOFTHSM, tmp_path / "new").path.exists()


def test_path_that_cannot_be_configured(tmp_path, library):
    with pytest.raises(ValueError, match="line feed"):
        FaultShim("a\nb", tmp_path, library=library)


@pytest.mark.parametrize("offset", [0, 4, 8])
def test_control_file_of_another_version(home, offset):
    _flip(home / "faultshim.control", offset)
    with pytest.raises(ValueError, match=f"version {_control.VERSION}"):
        FaultControl(home)
    assert "control file of this version" in _refusal(home)


def _flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(data)


def _refusal(home):
    """What the shim writes when it cannot work."""
    load = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]);"
        "sys.exit(library.C_GetFunctionList(ctypes.byref(ctypes.c_void_p())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", load, home / "faultshim.so"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == CKR.GENERAL_ERROR
    return done.stderr


def test_control_file_cut_short(home):
    os.truncate(home / "faultshim.control", 100)
    with pytest.raises(ValueError, match=f"version {_control.VERSION}"):
        FaultControl(home)
    assert "control file of this version" in _refusal(home)


def test_no_module_behind(tmp_path, library):
    FaultShim(tmp_path / "none.so", tmp_path, library=library)
    assert "none.so" in _refusal(tmp_path)
    (tmp_path / "faultshim.so.conf").write_text("libc.so.6\n")
    assert "is not two lines" in _refusal(tmp_path)
    (tmp_path / "faultshim.so.conf").write_text(f"libc.so.6\n{tmp_path / 'faultshim.control'}\n")
    assert "is not a PKCS#11 module" in _refusal(tmp_path)


def test_smoke_under_sanitizers(home, tmp_path):
    """Threads, faults, a removal and a fork, with AddressSanitizer and UBSan watching the shim."""
    flags = ["-std=c11", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = sorted(_control.SOURCES.glob("*.c"))
    command = ["gcc", *flags, "-pthread", "-I", _control.SOURCES, "-o"]
    shared = [home / "faultshim.so", "-fPIC", "-shared", "-fvisibility=hidden", *sources]
    subprocess.run([*command, *shared], check=True)
    subprocess.run([*command, tmp_path / "smoke", SMOKE], check=True)
    # SoftHSM keeps memory until exit; the shim keeps its tables.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": ""}  # goes first
    FaultControl(home).random(FUNCTIONS[10:], [CKR.DEVICE_ERROR], probability=0.05, seed=1)
    FaultControl(home).fail("C_GetSessionInfo", CKR.FUNCTION_FAILED, always=True)
    done = subprocess.run(
        [tmp_path / "smoke", home / "faultshim.so", home / "faultshim.control"],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,  # a lock that a fork left held
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert FaultControl(home).counters().held == (0, 0, 0)
