"""All objects of an HSM token: counted, and destroyed."""

import ctypes
from contextlib import contextmanager
from functools import partial

from hsmwrap.pkcs11.binding.module import shared_function_list
from hsmwrap.pkcs11.sessions.connection import Connection
from hsmwrap.pkcs11.settings import Pkcs11Settings

_ROOM = 8192


def handles(session, module):
    """The handles of all objects that this session of python-pkcs11 sees.

    python-pkcs11 reads eight attributes of each object that it finds. SoftHSM reads files for each
    of them, so it is asked without python-pkcs11 where that is possible.
    """
    library = ctypes.CDLL(module)
    if shared_function_list(module) is None or not hasattr(library, "C_FindObjectsInit"):
        return [key.handle for key in session.get_objects()]
    handle, count = ctypes.c_ulong(session.handle), ctypes.c_ulong()
    found, room = (ctypes.c_ulong * _ROOM)(), ctypes.c_ulong(_ROOM)
    assert library.C_FindObjectsInit(handle, None, ctypes.c_ulong(0)) == 0
    assert library.C_FindObjects(handle, found, room, ctypes.byref(count)) == 0
    assert library.C_FindObjectsFinal(handle) == 0
    assert count.value < _ROOM
    return found[: count.value]


def count_objects(connection):
    """The number of objects that a backend's connection sees."""
    module = connection._settings.module
    return connection.run(lambda pooled: len(handles(pooled.session, module)))


@contextmanager
def _connected(softhsm):
    connection = Connection(Pkcs11Settings.from_mapping(softhsm.bare_settings()))
    try:
        yield connection
    finally:
        connection.close()


@contextmanager
def token_objects(softhsm):
    """A function that counts all objects on the token, by a connection of its own."""
    with _connected(softhsm) as connection:
        yield partial(count_objects, connection)


def destroy_all(softhsm):
    """Destroy all objects of the token, key sets too; they are made again where they are asked for.

    SoftHSM reads the file of each object at each search. Hundreds that earlier tests left make
    each of the later ones slower.
    """
    softhsm.forget_keys()
    library = ctypes.CDLL(softhsm.module)

    def operation(pooled):
        session = pooled.session
        for each in handles(session, softhsm.module):
            answer = library.C_DestroyObject(ctypes.c_ulong(session.handle), ctypes.c_ulong(each))
            assert answer == 0

    with _connected(softhsm) as connection:
        connection.run(operation)
