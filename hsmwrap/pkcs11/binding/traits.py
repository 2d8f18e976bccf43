"""What a vendor profile says of a module that its calls depend on.

A vendor's numbers mean something in its own module only, and an exception of python-pkcs11 does not
say which module it is from. So the traits of the module that a thread is inside of are in a context
variable (:meth:`hsmwrap.pkcs11.binding.host.ModuleHost.inside` sets it), and an exception that
leaves the module takes them along.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import TYPE_CHECKING

from pkcs11.constants import Attribute
from pkcs11.exceptions import AttributeTypeInvalid, MechanismInvalid, PKCS11Error
from pkcs11.mechanisms import KeyType, Mechanism

if TYPE_CHECKING:
    from hsmwrap.pkcs11.binding.returncodes import Recovery

CKU_SO, CKU_USER = 0, 1
DATA_SPECIFIED, NO_SOURCE = 1, 0


@dataclass(frozen=True, slots=True)
class BlockCipher:
    """Of the secret keys that a module generates: AES, or a vendor's SM4.

    Attributes:
        name: In words.
        key_type: Of its keys.
        generate: Mechanism of key generation.
        length: Of a key-encryption key, in bytes.
        lengths: That its keys can have.
        ecb, cbc, ctr: Mechanisms; None where there are none.
        key_wraps: Mechanisms of key wrap with padding, in the order in which they are tried.
        weak_wraps: Other mechanisms that wrap keys, which no key-encryption key allows; with their
            parameters.
    """

    name: str
    key_type: KeyType
    generate: Mechanism
    length: int
    lengths: tuple[int, ...]
    ecb: Mechanism | None
    cbc: Mechanism | None
    ctr: Mechanism | None
    key_wraps: tuple[Mechanism, ...] = ()
    weak_wraps: tuple[tuple[Mechanism, bytes | None], ...] = ()


AES = BlockCipher(
    name="AES",
    key_type=KeyType.AES,
    generate=Mechanism.AES_KEY_GEN,
    length=32,
    lengths=(16, 32),
    ecb=Mechanism.AES_ECB,
    cbc=Mechanism.AES_CBC,
    ctr=Mechanism.AES_CTR,
    key_wraps=(Mechanism.AES_KEY_WRAP_PAD, Mechanism.AES_KEY_WRAP_KWP),
    weak_wraps=(
        (Mechanism.AES_KEY_WRAP, None),
        (Mechanism.AES_CBC_PAD, bytes(16)),
        (Mechanism.AES_ECB, None),
    ),
)
"""As the standard has it. Of its key wraps, 0x210A is of PKCS#11 v2.40, which some pad by RFC 5649
and some as PKCS#7 does, and 0x210B of v3.0, which is RFC 5649."""


@dataclass(frozen=True, slots=True)
class Traits:
    """Of one module; what is not said is as the standard has it.

    Attributes:
        return_codes: What to do about codes of the vendor's own.
        user_type: Of C_Login.
        officer_type: Of the security officer's C_Login.
        login_per_session: C_Login covers one session, whatever C_GetSessionInfo says.
        tells_wrong_pins: CKF_USER_PIN_COUNT_LOW is set after a wrong PIN.
        ciphers: Whose keys seal and stand for key material while that is tried, in the order in
            which they are tried.
        mac_key_types: Types of MAC keys, in the order in which they are tried: some HSM tokens
            compute SHA256-HMAC with keys of the second alone.
        oaep_hashes: With which the module's own OAEP is tried.
        oaep_sources: Source field of OAEP parameters for an empty label, in the order in which they
            are tried. The standard has CKZ_DATA_SPECIFIED; some HSM tokens want 0 there.
        never_mechanisms: What the module is not asked for.
        never_attributes: What no template has.
    """

    return_codes: Mapping[int, Recovery] = field(default_factory=lambda: MappingProxyType({}))
    user_type: int = CKU_USER
    officer_type: int = CKU_SO
    login_per_session: bool = False
    tells_wrong_pins: bool = False
    ciphers: tuple[BlockCipher, ...] = (AES,)
    mac_key_types: tuple[KeyType, ...] = (KeyType.GENERIC_SECRET, KeyType.SHA256_HMAC)
    oaep_hashes: tuple[Mechanism, ...] = (Mechanism.SHA_1, Mechanism.SHA256)
    oaep_sources: tuple[int, ...] = (DATA_SPECIFIED, NO_SOURCE)
    never_mechanisms: frozenset[int] = frozenset()
    never_attributes: frozenset[int] = frozenset()

    def cipher_of(self, key_type: int | None) -> BlockCipher | None:
        """The one whose keys are of this type."""
        return next((each for each in self.ciphers if each.key_type == key_type), None)

    @property
    def forbidden(self) -> tuple[str, ...]:
        """What the module is never asked for, by name where it has one, else by number."""
        return (
            *sorted(_names("CKM", Mechanism, self.never_mechanisms)),
            *sorted(_names("CKA", Attribute, self.never_attributes)),
        )


def _names(prefix: str, kind: type[IntEnum], numbers: Iterable[int]) -> Iterator[str]:
    known = {int(member): name for name, member in kind.__members__.items()}
    return (f"{prefix}_{known[n]}" if n in known else f"{n:#x}" for n in numbers)


STANDARD = Traits()
_here: ContextVar[Traits] = ContextVar("traits of the PKCS#11 module", default=STANDARD)


def here() -> Traits:
    """Of the module that this thread is inside of; those of the standard outside."""
    return _here.get()


def behind(error: PKCS11Error) -> Traits:
    """Of the module that an exception is from."""
    traits = getattr(error, "traits", None)
    return traits if isinstance(traits, Traits) else here()


class inside:  # noqa: N801  # read as a statement: with inside(traits)
    """Be inside a module with these traits for the length of a ``with`` block."""

    __slots__ = ("_before", "_traits")

    def __init__(self, traits: Traits) -> None:
        self._traits = traits

    def __enter__(self) -> None:
        self._before = _here.set(self._traits)

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        _here.reset(self._before)
        if isinstance(error, PKCS11Error):  # for those who catch it outside
            error.traits = self._traits  # type: ignore[attr-defined]


def require_sent(mechanism: int | None, *templates: Iterable[int]) -> None:
    """Return unless the profile forbids to ask the module for this.

    What a module refuses is found out by asking. A profile forbids what cannot be asked: what makes
    the module hang or crash. The exception is that of a module that refuses.

    Raises:
        MechanismInvalid, AttributeTypeInvalid: It is forbidden.
    """
    traits = here()
    if mechanism is not None and mechanism in traits.never_mechanisms:
        (name,) = _names("CKM", Mechanism, [mechanism])
        raise MechanismInvalid(f"the profile forbids {name}")
    if not traits.never_attributes:
        return
    for template in templates:
        if forbidden := sorted(traits.never_attributes.intersection(template)):
            (name,) = _names("CKA", Attribute, forbidden[:1])
            raise AttributeTypeInvalid(f"the profile forbids {name}")
