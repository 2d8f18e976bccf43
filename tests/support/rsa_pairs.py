"""RSA pairs without the search for primes, in all processes of a test run.

For SoftHSM by a library that is preloaded, see ``rsa_pairs.c``; for pyca in the processes that call
:func:`use`. What has neither works as well, and takes longer.
"""

import atexit
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa

_SOURCE = Path(__file__).with_suffix(".c")
_DIRECTORY = "RSA_PAIRS_OF_THE_TESTS"
"""The environment variable of the directory that the processes of a run share."""
_BITS, _EXPONENT = 1024, 65537
# How many odd numbers to go on from a number that the index fixes; the prime there is p with
# gcd(p - 1, 65537) = 1.
_STEPS = (
    *(28, 284, 273, 132, 635, 511, 98, 370, 730, 8, 296, 559, 788, 255, 191, 106, 721, 177, 608),
    *(416, 37, 47, 239, 575, 451, 800, 585, 88, 50, 1029, 131, 556, 231, 409, 681, 194, 683, 304),
    *(697, 736, 1457, 205, 125, 285, 312, 229, 43, 1009, 701, 118, 898, 604, 437, 1189, 324, 640),
    *(55, 562, 189, 821, 339, 1163, 151, 167, 704, 619, 1459, 440, 285, 541, 184, 101, 135, 459),
    *(249, 947, 230, 42, 269, 274, 354, 69, 16, 256, 1235, 46, 157, 161, 208, 57, 36, 351, 112),
    *(155, 115, 23, 665, 309, 260, 184, 695, 40, 55, 353, 818, 3, 85, 136, 211, 61, 207, 40, 468),
    *(456, 83, 648, 201, 291, 130, 344, 220, 596, 253, 409, 22, 190, 196, 166, 953, 1002, 690, 205),
    *(182, 403, 128, 242, 119, 167, 430, 327, 922, 99, 124, 434, 1134, 376, 96, 19, 16, 159, 223),
    *(270, 1009, 230, 95, 145, 573, 245, 157, 490, 572, 76, 4, 329, 460, 31, 428, 258, 171, 847),
    *(222, 92, 30, 154, 762, 216, 261, 151, 833, 259, 192, 88, 343, 2, 84, 69, 26, 480, 97, 1542),
    *(126, 11),
)
PRIMES = tuple(
    (int.from_bytes(hashlib.shake_256(b"prime %d" % index).digest(_BITS // 8)) | 3 << _BITS - 2 | 1)
    + 2 * steps
    for index, steps in enumerate(_STEPS)
)


_PAIRS = len(PRIMES) * ((len(PRIMES) - 1) // 2)
generate = rsa.generate_private_key


def use(*, preload):
    """From now on in this process, and in its children by what it ``preload``s, where gcc is."""
    directory = os.environ.get(_DIRECTORY)
    if directory is None:
        directory = os.environ[_DIRECTORY] = tempfile.mkdtemp(prefix="hsmwrap-rsa-")
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        Path(directory).chmod(0o755)  # some children are another user's
        Path(directory, "given").touch()
        if preload and "LD_PRELOAD" not in os.environ and shutil.which("gcc"):
            os.environ["LD_PRELOAD"] = str(_build(Path(directory)))
    library = Path(directory, f"{_SOURCE.stem}.so")
    if library.exists():
        # Ahead of the libcrypto that SoftHSM is linked with, in this process too.
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    rsa.generate_private_key = _give


def _build(directory):
    primes, library = directory / "primes.h", directory / f"{_SOURCE.stem}.so"
    primes.write_text("".join(f'"{prime:X}",\n' for prime in PRIMES))
    flags = ["-std=c11", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror"]
    flags += [f'-DPRIMES="{primes}"', f'-DGIVEN="{directory / "given"}"']
    subprocess.run(["gcc", *flags, "-o", library, _SOURCE], check=True)
    return library


def _give(public_exponent, key_size, backend=None):
    number = _number()
    if (public_exponent, key_size) != (_EXPONENT, 2 * _BITS) or number >= _PAIRS:
        return generate(public_exponent, key_size, backend)
    step, first = divmod(number, len(PRIMES))
    q, p = sorted((PRIMES[first], PRIMES[(first + 1 + step) % len(PRIMES)]))
    d = pow(_EXPONENT, -1, (p - 1) * (q - 1))
    numbers = rsa.RSAPrivateNumbers(
        *(p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p)),
        rsa.RSAPublicNumbers(_EXPONENT, p * q),
    )
    return numbers.private_key(unsafe_skip_rsa_key_validation=True)


def _number():
    """One that no other process gets: the position of a byte that is appended to a file."""
    try:
        file = os.open(Path(os.environ[_DIRECTORY], "given"), os.O_WRONLY | os.O_APPEND)
    except FileNotFoundError:
        return _PAIRS
    try:
        os.write(file, b".")
        return os.lseek(file, 0, os.SEEK_CUR) - 1
    finally:
        os.close(file)
