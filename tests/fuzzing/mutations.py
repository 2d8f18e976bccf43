"""Deterministic mutations of corpus inputs: a seed gives the same inputs on every machine."""

import random
from collections.abc import Iterator, Sequence

# Bytes that parsers treat specially: DER tags and lengths, versions, separators, ends of texts.
_SPECIAL = (b"\0", b"\x01", b"\x30", b"\x02", b"\x04", b"\x80", b"\x81", b"\x84\xff\xff\xff\xff")
_SPECIAL += (b"\xff", b"\x7f", b"=", b"&", b"%", b"%00", b";", b"?", b"\n", b"{", b"[", b'"', b"\\")
_SPECIAL += (b"\xef\xbb\xbf", "²".encode(), b"\xed\xa0\x80")
MOST_BYTES = 8192


def mutated(seeds: Sequence[bytes], count: int, seed: str) -> Iterator[bytes]:
    """Yield ``count`` inputs, each a seed with one to four changes."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            _change(data, seeds, rng)
        yield bytes(data[:MOST_BYTES])


def _change(data: bytearray, seeds: Sequence[bytes], rng: random.Random) -> None:
    at = rng.randint(0, len(data))
    end = min(len(data), at + rng.choice((1, 1, 2, 4, 16, 64)))
    match rng.randrange(7):
        case 0 if data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        case 1:
            data[at:end] = b""
        case 2:
            data[at:at] = rng.choice(_SPECIAL)
        case 3:
            data[at:end] = rng.choice(_SPECIAL)
        case 4:
            data[at:at] = data[at:end] * rng.choice((1, 2, 50))
        case 5:
            other = rng.choice(seeds)
            cut = rng.randint(0, len(other))
            data[at:] = other[cut:]
        case _:
            data[at:end] = rng.randbytes(end - at)
