"""A raw PKCS#11 client for tests: every answer is the return code itself."""

from __future__ import annotations

import ctypes
import functools
import importlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from hsmwrap.testing.faults import CKR, FUNCTIONS

PIN = b"1234"
CKF_OS_LOCKING_OK = 2
CKF_RW_SERIAL = 6
CKA_CLASS, CKA_TOKEN, CKA_KEY_TYPE, CKA_VALUE = 0x0, 0x1, 0x100, 0x11
CKA_VALUE_LEN, CKA_MODULUS_BITS = 0x161, 0x121
CKM_RSA_KEY_PAIR, CKM_AES_KEY = 0x0, 0x1080


class Attribute(ctypes.Structure):
    _fields_ = (("type", ctypes.c_ulong), ("value", ctypes.c_char_p), ("length", ctypes.c_ulong))


class Mechanism(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_ulong),
        ("parameter", ctypes.c_void_p),
        ("length", ctypes.c_ulong),
    )


class InitializeArgs(ctypes.Structure):
    _fields_ = (
        ("mutexes", ctypes.c_void_p * 4),
        ("flags", ctypes.c_ulong),
        ("reserved", ctypes.c_void_p),
    )


def ulong(number):
    return bytes(ctypes.c_ulong(number))


def template(attributes):
    """{type: bytes} as (array, count)."""
    rows = [Attribute(kind, value, len(value)) for kind, value in attributes.items()]
    return (Attribute * len(rows))(*rows), len(rows)


class Client:
    """The functions of one module; ``client.C_Login(session, 1, PIN, 4)`` answers a code."""

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))
        table = ctypes.c_void_p()
        code = self._library.C_GetFunctionList(ctypes.byref(table))
        if code != CKR.OK:
            raise RuntimeError(f"C_GetFunctionList answers {code:#x}")
        start = table.value + ctypes.sizeof(ctypes.c_void_p)
        self.entries = (ctypes.c_void_p * len(FUNCTIONS)).from_address(start)

    def __getattr__(self, name):
        address = self.entries[FUNCTIONS.index(name)]

        def call(*arguments):
            prototype = ctypes.CFUNCTYPE(ctypes.c_ulong, *[ctypes.c_void_p] * len(arguments))
            return prototype(address)(*arguments)

        return call

    def exported(self, name):
        return ctypes.cast(getattr(self._library, name), ctypes.c_void_p).value

    def initialize(self, flags=CKF_OS_LOCKING_OK):
        return self.C_Initialize(ctypes.byref(InitializeArgs(flags=flags)))

    def slots(self, token_present=1):
        count, slots = ctypes.c_ulong(8), (ctypes.c_ulong * 8)()
        assert self.C_GetSlotList(token_present, slots, ctypes.byref(count)) == CKR.OK
        return slots[: count.value]

    def open(self, slot=None):
        """(code, session)"""
        handle = ctypes.c_ulong(0)
        slot = self.slots()[0] if slot is None else slot
        return self.C_OpenSession(slot, CKF_RW_SERIAL, None, None, ctypes.byref(handle)), (
            handle.value
        )

    def login(self, session):
        return self.C_Login(session, 1, PIN, len(PIN))

    def generate_aes(self, session, *, token=False, handle=None):
        """(code, key)"""
        handle = ctypes.c_ulong(0) if handle is None else handle
        rows, count = template({CKA_TOKEN: bytes([token]), CKA_VALUE_LEN: ulong(32)})
        mechanism = ctypes.byref(Mechanism(CKM_AES_KEY))
        code = self.C_GenerateKey(session, mechanism, rows, count, ctypes.byref(handle))
        return code, handle.value

    def generate_rsa(self, session, *, token=False, bits=1024):
        """(code, public, private)"""
        public, private = ctypes.c_ulong(0), ctypes.c_ulong(0)
        ask_public = template({CKA_TOKEN: bytes([token]), CKA_MODULUS_BITS: ulong(bits)})
        ask_private = template({CKA_TOKEN: bytes([token])})
        code = self.C_GenerateKeyPair(
            session,
            ctypes.byref(Mechanism(CKM_RSA_KEY_PAIR)),
            *ask_public,
            *ask_private,
            ctypes.byref(public),
            ctypes.byref(private),
        )
        return code, public.value, private.value

    def create_data(self, session, *, token=None):
        """(code, object): a CKO_DATA object, which needs no login to be seen."""
        handle = ctypes.c_ulong(0)
        kind = {} if token is None else {CKA_TOKEN: bytes([token])}
        rows, count = template({CKA_CLASS: ulong(0), CKA_VALUE: b"x", 0x2: b"\0"} | kind)
        return self.C_CreateObject(session, rows, count, ctypes.byref(handle)), handle.value

    def copy(self, session, original, attributes):
        """(code, object)"""
        handle = ctypes.c_ulong(0)
        rows, count = template(attributes)
        code = self.C_CopyObject(session, original, rows, count, ctypes.byref(handle))
        return code, handle.value

    def count_objects(self, session):
        found, count = (ctypes.c_ulong * 64)(), ctypes.c_ulong(0)
        assert self.C_FindObjectsInit(session, None, 0) == CKR.OK
        assert self.C_FindObjects(session, found, 64, ctypes.byref(count)) == CKR.OK
        assert self.C_FindObjectsFinal(session) == CKR.OK
        return count.value

    def random_bytes(self, session):
        return self.C_GenerateRandom(session, ctypes.create_string_buffer(8), 8)


def ready(path):
    """(client, slot, session): initialised with locking, logged in."""
    client = Client(path)
    assert client.initialize() == CKR.OK
    slot = client.slots()[0]
    code, session = client.open(slot)
    assert (code, client.login(session)) == (CKR.OK, CKR.OK)
    return client, slot, session


def _call_wrapped(module, name, arguments):
    getattr(importlib.import_module(module), name).__wrapped__(**arguments)


def fresh_process(test):
    """Run a test in a new process: SoftHSM reads its configuration once, and may crash."""

    @functools.wraps(test)
    def runner(**arguments):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(_call_wrapped, test.__module__, test.__name__, arguments).result()

    return runner
