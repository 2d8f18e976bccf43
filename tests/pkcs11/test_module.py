"""Loading a module for threads: the reason why hsmwrap does not use the plain library class."""

import ctypes
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from hsmwrap.ckr import CKR
from hsmwrap.errors import ConfigurationError
from hsmwrap.pkcs11.binding.module import Module, parameters_of
from hsmwrap.pkcs11.settings import Pkcs11Settings

HAMMER = textwrap.dedent(
    """
    import os, sys, threading
    import pkcs11
    from pkcs11 import KeyType, Mechanism
    from hsmwrap.pkcs11.binding.module import Module
    from pkcs11._pkcs11 import lib

    kind = {"plain": lib, "ours": Module}[sys.argv[1]]
    module = kind(os.environ["HSMWRAP_PKCS11_MODULE"])
    token = next(module.get_tokens(token_label=os.environ["HSMWRAP_TOKEN_LABEL"]))
    pin = open(os.environ["HSMWRAP_PIN_FILE"]).read().strip()
    login = token.open(rw=True, user_pin=pin)
    errors = []

    def work():
        try:
            for _ in range(60):
                session = token.open(rw=True)
                keys = [session.generate_key(KeyType.AES, 256) for _ in range(20)]
                for key in keys:
                    key.encrypt(bytes(16), mechanism=Mechanism.AES_ECB)
                    key.destroy()
                session.close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    os._exit(1 if errors else 0)
    """
)


def hammer(kind):
    command = [sys.executable, "-c", HAMMER, kind]
    return subprocess.run(command, capture_output=True, check=False).returncode


def test_eight_threads_do_not_harm_our_module(softhsm):
    assert hammer("ours") == 0


def test_the_same_breaks_the_plain_library(softhsm):
    """If this fails, python-pkcs11 initialises for threads by itself, and Module can go."""
    assert any(hammer("plain") != 0 for _ in range(5))


@pytest.mark.parametrize("path", ["/nowhere/libnothing.so", "/etc/hostname", "libz.so.1"])
def test_what_is_not_a_module_is_a_configuration_error(path):
    said = f"cannot load PKCS#11 module {path}: .*shared object with C_GetFunctionList"
    with pytest.raises(ConfigurationError, match=said):
        Module(path)


@pytest.mark.parametrize("parameters", ["configdir='sql:/a'", b"\0\xff\0\1"])
def test_the_parameters_reach_c_initialize(parameters):
    """Those of a structure with zeros in it, at which a C string would end."""
    text, seen = isinstance(parameters, str), []
    as_bytes = parameters.encode() if text else parameters

    def initialize(arguments):
        given = arguments._obj
        at = ctypes.c_void_p.from_buffer(given, type(given).reserved.offset).value
        seen.append(ctypes.string_at(at, len(as_bytes)))
        return CKR.CRYPTOKI_ALREADY_INITIALIZED

    named = {"library_parameters": parameters}
    if not text:
        named = {"library_parameters_hex": parameters.hex()}
    reserved = Pkcs11Settings.from_mapping({"module": "/m", **named}).reserved
    module = SimpleNamespace(_parameters=parameters_of(reserved), _path="/m")
    assert not Module._initialize(module, SimpleNamespace(c_initialize=initialize))
    assert seen == [as_bytes]
