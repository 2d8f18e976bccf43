"""RSA pairs without the search for primes, for SoftHSM in all processes of a test run.

See ``rsa_pairs.c``. A process that SoftHSM runs in without it works as well, and takes longer.
"""

import atexit
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".c")
_VARIABLE = "LD_PRELOAD"
_BITS = 1024
# How many odd numbers to go on from a number that the index fixes; the prime there is p with
# gcd(p - 1, 65537) = 1.
_STEPS = (
    *(28, 284, 273, 132, 635, 511, 98, 370, 730, 8, 296, 559, 788, 255, 191, 106, 721, 177, 608),
    *(416, 37, 47, 239, 575, 451, 800, 585, 88, 50, 1029, 131, 556, 231, 409, 681, 194, 683, 304),
    *(697, 736, 1457, 205, 125, 285, 312, 229, 43, 1009, 701, 118, 898, 604, 437, 1189, 324, 640),
    *(55, 562, 189, 821, 339, 1163, 151, 167, 704, 619, 1459, 440, 285, 541, 184, 101, 135, 459),
    *(249, 947, 230, 42, 269, 274, 354, 69, 16, 256, 1235, 46, 157, 161, 208, 57, 36, 351, 112),
    *(155, 115, 23, 665, 309, 260, 184, 695, 40, 55, 353, 818, 3, 85, 136, 211, 61, 207, 40, 468),
    *(456, 83, 648, 201, 291, 130, 344, 220, 596, 253, 409, 22, 190, 196, 166),
)
PRIMES = tuple(
    (int.from_bytes(hashlib.shake_256(b"prime %d" % index).digest(_BITS // 8)) | 3 << _BITS - 2 | 1)
    + 2 * steps
    for index, steps in enumerate(_STEPS)
)


def use():
    """From now on in this process and its children, where there is gcc."""
    library = os.environ.get(_VARIABLE, "")
    if not library.endswith(f"/{_SOURCE.stem}.so"):
        if library or not shutil.which("gcc"):
            return
        library = str(_build())
        os.environ[_VARIABLE] = library
    # Ahead of the libcrypto that SoftHSM is linked with, in this process too.
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


def _build():
    directory = Path(tempfile.mkdtemp(prefix="hsmwrap-rsa-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    directory.chmod(0o755)  # some children are another user's
    primes, counter = directory / "primes.h", directory / "given"
    primes.write_text("".join(f'"{prime:X}",\n' for prime in PRIMES))
    counter.write_bytes(bytes(8))
    library = directory / f"{_SOURCE.stem}.so"
    flags = ["-std=c11", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror"]
    flags += [f'-DPRIMES="{primes}"', f'-DCOUNTER="{counter}"']
    subprocess.run(["gcc", *flags, "-o", library, _SOURCE], check=True)
    return library
