"""Key unwrap with padding (RFC 5649) over any block cipher: what has an HSM wrapped by SM4?"""

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap

_HALF = 8


def unwrapped(key, blob, cipher=algorithms.SM4):
    """The key that was wrapped; InvalidUnwrap where the blob is not one of this key's."""
    ecb = Cipher(cipher(key), modes.ECB()).decryptor()
    n = len(blob) // _HALF - 1
    if n < 1 or len(blob) % _HALF:
        raise InvalidUnwrap
    if n == 1:
        head, *rows = _halves(ecb.update(blob))
    else:
        head, *rows = _halves(blob)
        for step in range(6 * n, 0, -1):
            counted = (int.from_bytes(head) ^ step).to_bytes(_HALF)
            at = (step - 1) % n
            head, rows[at] = _halves(ecb.update(counted + rows[at]))
    length, plain = int.from_bytes(head[4:]), b"".join(rows)
    if head[:4] != b"\xa6\x59\x59\xa6" or not 0 <= len(plain) - length < _HALF:
        raise InvalidUnwrap
    return plain[:length]


def _halves(data):
    return [data[at : at + _HALF] for at in range(0, len(data), _HALF)]
