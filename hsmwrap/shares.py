"""A secret in shares, M of N, as words to write down: SLIP-39, by the library shamir-mnemonic.

Shares are secrets. No text of an error here has one, nor a word of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from hsmwrap.errors import ConfigurationError, strip_tracebacks

MOST_SHARES = 16
"""SLIP-39 has four bits for the number of a share."""
# Against guesses of a passphrase, which there is not: the secret is random.
_ITERATION_EXPONENT = 0


@strip_tracebacks
def split(secret: bytes, shares: int, threshold: int) -> tuple[str, ...]:
    """Split a random secret; each share is a text of words.

    Args:
        secret: 32 random bytes.
        shares: How many, up to :data:`MOST_SHARES`.
        threshold: How many of them are needed, at least 2.

    Raises:
        ConfigurationError: The numbers of shares are not possible, or the extra is not installed.
    """
    if not 2 <= threshold <= shares <= MOST_SHARES:  # noqa: PLR2004 (with 1 each share is the secret)
        raise ConfigurationError(
            f"a secret is split into 2 to {MOST_SHARES} shares, of which at least 2 are needed; "
            f"not into {shares} of which {threshold} are"
        )
    generate = _library().generate_mnemonics
    (made,) = generate(1, [(threshold, shares)], secret, iteration_exponent=_ITERATION_EXPONENT)
    return tuple(made)


@strip_tracebacks
def combine(shares: Mapping[str, str], digests: Sequence[str], threshold: int) -> bytes:
    """The secret of which these are shares.

    Args:
        shares: The words by what errors call each share, ``share 2`` or a file.
        digests: :func:`digest` of every share that was made, in their order.
        threshold: How many are needed.

    Raises:
        ConfigurationError: One is damaged, given twice, or of another secret (the text says
            which), or they are too few.
    """
    seen: dict[str, str] = {}
    for named, words in shares.items():
        require_share(named, words, digests, seen)
        seen[digest(words)] = named
    if len(seen) < threshold:
        raise ConfigurationError(
            f"{len(seen)} shares of this backup were given, and {threshold} are needed"
        )
    library = _library()
    try:
        secret: bytes = library.combine_mnemonics(list(shares.values())[:threshold])
    except library.MnemonicError:
        raise ConfigurationError("the shares do not fit together: the file was changed") from None
    return secret


@strip_tracebacks
def require_share(named: str, words: str, digests: Sequence[str], seen: Mapping[str, str]) -> None:
    """Check one share.

    Args:
        named: What an error calls it.
        words: Its words.
        digests: As for :func:`combine`.
        seen: What the shares before it are called, by their digests.

    Raises:
        ConfigurationError: It is damaged, of another secret, or one of those before.
    """
    library = _library()
    try:
        library.Share.from_mnemonic(words)
    except library.MnemonicError:
        # Not its text, which has words of the share.
        raise ConfigurationError(
            f"{named} is damaged: it has another number of words, an unknown word, or a wrong one; "
            "compare it with the paper"
        ) from None
    found = digest(words)
    if found not in digests:
        raise ConfigurationError(
            f"{named} is whole, but a share of another backup (its SLIP-39 identifier is "
            f"{identifier(words)})"
        )
    if found in seen:
        raise ConfigurationError(f"{named} is the same share as {seen[found]}")


def identifier(words: str) -> int:
    """The random number of 15 bits that all shares of one secret have; not a secret (SLIP-39).

    Args:
        words: A share that is whole.
    """
    found: int = _library().Share.from_mnemonic(words).identifier
    return found


def digest(words: str) -> str:
    """SHA-256 of a share, 64 hexadecimal digits.

    A share has 256 random bits, which nothing finds by its digest.
    """
    return hashlib.sha256(b"hsmwrap share\n" + " ".join(words.lower().split()).encode()).hexdigest()


def _library() -> Any:
    try:
        import shamir_mnemonic  # noqa: PLC0415 (the extra may be absent)
    except ImportError:
        raise ConfigurationError(
            "shares need the extra 'backup': pip install '.[backup]' in a clone of hsmwrap"
        ) from None
    return shamir_mnemonic
