"""The backend's own keys in the HSM token: one MAC key and the key-encryption keys.

A *key set* has a number; the highest is current, older ones keep opening what they sealed until
they are retired. Each key does one job. A key-encryption key wraps and unwraps, nothing else, and
carries CKA_UNWRAP_TEMPLATE: the holder of the PIN can unwrap a blob only into the very kind of
object that this backend would make, sensitive, not extractable, and of no other use. Where the
security officer helps, it is CKA_TRUSTED too, and what it is to wrap is marked
CKA_WRAP_WITH_TRUSTED, so that no other key can wrap it (field note 20).

Where the token also keeps extractable keys for trusted keys alone (:mod:`.movability`), the set is
*movable*: what it unseals can be wrapped again under the next set, inside the token, and its own
keys can be cloned by a trusted key that the security officer makes. Its key-encryption keys wrap no
key of a key set (CKA_WRAP_TEMPLATE).

Keys are found by their label, and the holder of the PIN can give any key that label. So a key is
accepted only if it has the attributes of one that was generated here; and beside a trusted
key-encryption key none is that is not trusted, neither in its own set nor as a newer set.

The MAC key is made last and destroyed last: a set without one is unfinished, or is being retired,
and nothing is sealed with it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from types import MappingProxyType
from typing import Any

from pkcs11.constants import Attribute, ObjectClass
from pkcs11.exceptions import KeyHandleInvalid, PKCS11Error
from pkcs11.mechanisms import KeyType, Mechanism
from pkcs11.types import Session

from hsmwrap.backend import KeySetInfo
from hsmwrap.errors import ConfigurationError, HsmUnavailable, KeyNotFound
from hsmwrap.pkcs11.binding import objects, traits
from hsmwrap.pkcs11.binding.client_errors import attribute_reads, read_if_known
from hsmwrap.pkcs11.binding.profiles import VendorSm2, VendorSm4
from hsmwrap.pkcs11.binding.returncodes import HsmLost
from hsmwrap.pkcs11.binding.templates import (
    AES_KEY_WRAP,
    USES,
    NestedTemplate,
    Template,
    private_key,
    secret_key,
    stored,
    without,
)
from hsmwrap.pkcs11.binding.traits import AES, BlockCipher
from hsmwrap.pkcs11.keysets import hardening, origin
from hsmwrap.pkcs11.keysets.movability import ONLY_UNDER_TRUSTED
from hsmwrap.pkcs11.sessions.session import HANDLE_INVALID, PooledSession, find_objects

CURRENT_SET_LIFETIME = 60.0
"""Seconds until a process looks again whether another one rotated the keys."""


class Role(StrEnum):
    """What a key of a key set does; part of its label."""

    MAC = "mac"
    """Authenticates import tokens (SHA256-HMAC)."""
    WRAPPING_UNWRAP = "kek-wrapping-unwrap"
    """Wraps RSA wrapping keys that may only C_UnwrapKey."""
    WRAPPING_DECRYPT = "kek-wrapping-decrypt"
    """Wraps RSA wrapping keys that may only C_Decrypt, for the paths through the host."""
    WRAPPING_DERIVE = "kek-wrapping-derive"
    """Wraps SM2 wrapping keys, where the token can unwrap them (a vendor's may C_Decrypt)."""
    WRAPPING_SM2_UNWRAP = "kek-wrapping-sm2-unwrap"
    """Wraps a vendor's SM2 wrapping keys that may only C_UnwrapKey; in sets of such tokens."""
    MATERIAL_AES = "kek-material-aes"
    """Wraps imported AES keys."""
    MATERIAL_SM4 = "kek-material-sm4"
    """Wraps imported SM4 keys; a token that has no SM4 keeps them as generic secrets."""


ROLES = tuple(role for role in Role if role is not Role.WRAPPING_SM2_UNWRAP)
"""Of the keys that a set has on an HSM token that keeps to the standard."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Which own keys an HSM token can use, and how (:func:`hsmwrap.pkcs11.keysets.needs.needs_of`).

    Attributes:
        roles: Of the keys that a set has, the MAC key last in making.
        mac_key_type: Of the MAC key.
        cipher: Whose keys the key-encryption keys are.
        key_wrap: What they wrap by.
    """

    roles: tuple[Role, ...] = ROLES
    mac_key_type: KeyType = KeyType.GENERIC_SECRET
    cipher: BlockCipher = AES
    key_wrap: Mechanism = AES_KEY_WRAP


EVERYTHING = Needs()

UNWRAPPED: Mapping[Role, Template] = MappingProxyType(
    {
        Role.WRAPPING_UNWRAP: private_key(KeyType.RSA, Attribute.UNWRAP),
        Role.WRAPPING_DECRYPT: private_key(KeyType.RSA, Attribute.DECRYPT),
        Role.WRAPPING_DERIVE: private_key(KeyType.EC, Attribute.DERIVE),
        Role.WRAPPING_SM2_UNWRAP: private_key(KeyType.EC, Attribute.UNWRAP),
        Role.MATERIAL_AES: secret_key(KeyType.AES, Attribute.ENCRYPT, Attribute.DECRYPT),
        Role.MATERIAL_SM4: secret_key(KeyType.GENERIC_SECRET),
    }
)
"""What each key-encryption key unwraps a blob into, and the only thing that it can."""


def unwrapped_template(
    role: Role, vendor: VendorSm2 | None = None, sm4: VendorSm4 | None = None
) -> Template:
    """The same, where a vendor has SM2 keys of its own, or SM4 keys that encrypt."""
    if role in _SM2_ROLES and vendor is not None:
        use = Attribute.DERIVE if vendor.decrypt is None else Attribute.DECRYPT
        if role is Role.WRAPPING_SM2_UNWRAP:
            use = Attribute.UNWRAP
        return private_key(vendor.key_type or KeyType.EC, use)
    if role is Role.MATERIAL_SM4 and sm4 is not None:
        return secret_key(sm4.key_type, Attribute.ENCRYPT, Attribute.DECRYPT)
    return UNWRAPPED[role]


_SM2_ROLES = frozenset({Role.WRAPPING_DERIVE, Role.WRAPPING_SM2_UNWRAP})
_MATERIAL_ROLES = frozenset({Role.MATERIAL_AES, Role.MATERIAL_SM4})


HIGHEST_NUMBER = 0xFFFF
"""References to sealed keys have two bytes for the number of the key set."""


@dataclass(frozen=True, slots=True)
class _FoundKey:
    """A key with a label of ours; ``generated_here`` if it has the attributes of ours as well."""

    role: Role
    number: int
    trusted: bool
    movable: bool
    generated_here: bool
    cipher: BlockCipher | None
    key: Any


@dataclass(frozen=True, slots=True)
class KeySet:
    """A key set as found in the HSM token."""

    number: int
    current: bool
    roles: tuple[Role, ...]
    trusted: bool
    movable: bool
    cipher: BlockCipher = AES

    @property
    def finished(self) -> bool:
        """Whether it has a MAC key, which is made last."""
        return Role.MAC in self.roles

    def info(self) -> KeySetInfo:
        """For ``hsmwrap keys list``."""
        trust = "trusted" if self.trusted else "NOT trusted (made without the SO PIN)"
        of = "" if self.cipher.key_type is AES.key_type else f" of {self.cipher.name}"
        count = "1 key" if len(self.roles) == 1 else f"{len(self.roles)} keys"
        detail = f"{count}, key-encryption keys{of} {trust}"
        if not self.movable:
            detail += "; keys cannot move to another set"
        if not self.finished:
            detail = f"{count}, NOT finished: `hsmwrap keys retire` removes them"
        return KeySetInfo(str(self.number), self.current, detail, self.finished)


class KeySets:
    """Finds the key sets of one prefix; an instance is shared by the threads of a backend."""

    def __init__(
        self,
        prefix: str,
        *,
        must_be_trusted: bool = False,
        vendor: VendorSm2 | None = None,
        sm4: VendorSm4 | None = None,
    ) -> None:
        """Find and make keys.

        Args:
            prefix: Start of the labels of this backend's objects.
            must_be_trusted: Whether only trusted key sets count.
            vendor: The vendor's SM2 keys, if the profile names some.
            sm4: The vendor's SM4 keys, if the profile names some.
        """
        self._prefix = prefix
        self._must_be_trusted = must_be_trusted
        self.vendor = vendor
        self._sm4 = sm4
        self._current: tuple[int, float, int] | None = None
        self._newest: KeySet | None = None
        self._highest = 0
        self._trusted: frozenset[int] = frozenset()
        self._movable: frozenset[int] = frozenset()
        self._trusted_sets: frozenset[int] = frozenset()
        self._listed: frozenset[int] = frozenset()
        self._origin_told: origin.Told | None = None
        self._ciphers: dict[int, BlockCipher] = {}
        self._user_makes_trusted: bool | None = None
        self._trust_tried = False

    def label(self, role: Role, number: int) -> str:
        """CKA_LABEL of one key."""
        return f"{self._prefix}:{role}:{number}"

    def unwrapped_template(self, role: Role, *, sm4: bool = True) -> Template:
        """What this key-encryption key unwraps a blob into, where keys do not move.

        ``sm4=False``: SM4 keys are only kept, although the profile names the vendor's.
        """
        return unwrapped_template(role, self.vendor, self._sm4 if sm4 else None)

    def material_template(self, role: Role, number: int, *, sm4: bool = True) -> Template:
        """What this key-encryption key of a set unwraps imported keys into; ``sm4`` as above."""
        becomes = self.unwrapped_template(role, sm4=sm4)
        return becomes | (ONLY_UNDER_TRUSTED if self.moves(number) else {})

    def current(self, pooled: PooledSession) -> int:
        """Number of the current key set.

        Raises:
            ConfigurationError: There is none, and none was there before.
            HsmLost: The keys that were there are gone.
        """
        number, until, epoch = self._current or (0, 0.0, -1)
        if (
            time.monotonic() < until
            and epoch == pooled.epoch.number
            # Costs a search in a session's first use: one that replaces a session that failed looks
            # whether the set was retired meanwhile.
            and self._found(pooled, Role.MAC, number) is not None
        ):
            return number
        epoch = pooled.epoch.number
        number = self.look(pooled)
        if not number:
            if self._must_be_trusted and any(
                each.finished
                for each in KeySets(self._prefix, vendor=self.vendor).list(pooled.session)
            ):
                raise ConfigurationError(
                    f"the HSM token has no trusted keys labelled {self._prefix}:…, but others; "
                    "`hsmwrap keys rotate` with the SO PIN (--so-pin-file) makes trusted ones"
                )
            kind = "trusted " if self._must_be_trusted else ""
            raise ConfigurationError(
                f"the HSM token has no {kind}keys labelled {self._prefix}:…; "
                "run `hsmwrap keys init`"
            )
        self._current = (number, time.monotonic() + CURRENT_SET_LIFETIME, epoch)
        return number

    def look(self, pooled: PooledSession) -> int:
        """Number of the current key set by a search; 0 if there is none, and none was before.

        A key of the current set that was seen before is not retired and does not vanish: the HSM
        token, or its state, is another one. The module is restarted then. If it goes on with an
        older set after that (a backup from before a rotation), that is the current one.

        Raises:
            HsmLost: Keys that were there are gone.
            UserNotLoggedIn: Nothing can be seen.
        """
        found = self._newest_in(pooled)
        known = self._newest
        if known is not None and not _has_all_of(found, known):
            pooled.require_login()
            found = self._newest_in(pooled)  # the login may have come between
        if known is not None and not _has_all_of(found, known):
            if found is not None and found.number < known.number:
                self._newest = found
            pooled.epoch.end()
            kind = "trusted " if self._trusted_sets else ""
            raise HsmLost(
                f"the HSM token lost its {kind}keys labelled {self._prefix}:…:{known.number}: is "
                "it another one, or an old backup?"
            )
        if found is None:
            pooled.require_login()
            return 0
        self._newest = found
        self._highest = max(self._highest, found.number)
        return found.number

    def _newest_in(self, pooled: PooledSession) -> KeySet | None:
        return next((each for each in self.list(pooled.session) if each.current), None)

    def origin_told(self, session: Session) -> origin.Told:
        """Attributes by which the HSM token tells keys that it generated; tried once."""
        if self._origin_told is None:  # two threads may both try; both find the same
            self._origin_told = origin.told_by(session)
        return self._origin_told

    def user_makes_trusted(self, session: Session) -> bool | None:
        """As :func:`.origin.user_makes_trusted`; tried once, two threads may both."""
        if not self._trust_tried:
            self._user_makes_trusted = origin.user_makes_trusted(session)
            self._trust_tried = True
        return self._user_makes_trusted

    def trusts(self, number: int) -> bool:
        """Whether this set's keys were seen to be CKA_TRUSTED."""
        return number in self._trusted

    def moves(self, number: int) -> bool:
        """Whether keys sealed under this set were seen to be movable to another one."""
        return number in self._movable

    def cipher_of(self, number: int) -> BlockCipher:
        """Whose keys this set's key-encryption keys were seen to be; AES where it has none."""
        return self._ciphers.get(number, AES)

    def find(
        self, pooled: PooledSession, role: Role, number: int, *, authentic: bool = True
    ) -> Any:
        """The key object of this session, or None if its set was retired.

        Args:
            pooled: The session.
            role: What the key does.
            number: Of its set.
            authentic: Whether a reference of ours says the number. If a client does, only a set
                that this process has seen is missed.

        Raises:
            HsmLost: Keys that were there are gone.
            HsmUnavailable: It is of a newer set that was there and is gone.
        """
        key = self._found(pooled, role, number)
        if key is None and (authentic or number <= self._highest):
            newest = self.look(pooled)
            if newest < number <= self._highest:
                raise _is_older(newest, number)
        return key

    def opening(self, pooled: PooledSession, role: Role, number: int) -> Any:
        """The key-encryption key that sealed an imported key.

        Raises:
            KeyNotFound: Its set was retired.
            HsmLost, HsmUnavailable: As for :meth:`find`, or this process has never seen its set.
        """
        key = self.find(pooled, role, number)
        if key is not None:
            return key
        newest = self.look(pooled)
        if number > newest:
            raise _is_older(newest, number)
        raise KeyNotFound(f"key set {number}, which sealed this key, was retired")

    def _found(self, pooled: PooledSession, role: Role, number: int) -> Any:
        label, epoch = self.label(role, number), pooled.epoch.number
        known = pooled.objects.get(label)
        if known is not None and known[0] == epoch:
            return known[1]
        if number not in self._listed:
            self.list(pooled.session)  # says whether the set is trusted, and takes no other key
        present = list(self._search(pooled.session, label))
        if not present:
            pooled.require_login()
            present = list(self._search(pooled.session, label))  # the login may have come between
        found = [each for each in present if self._is_accepted(each)]
        if len(found) != 1:
            return None
        pooled.objects[label] = epoch, found[0].key
        return found[0].key

    def require(self, pooled: PooledSession, role: Role, number: int) -> Any:
        """The key object of this session, of the set that :meth:`current` said.

        Raises:
            KeyHandleInvalid: The set was retired since, and another one is current: try again.
            ConfigurationError: The key does not exist, or more than one does.
            HsmLost: It existed.
        """
        key = self._found(pooled, role, number)
        if key is not None:
            return key
        pooled.epoch.end()
        if self.current(pooled) != number:
            raise KeyHandleInvalid(f"key set {number} was retired")
        raise ConfigurationError(
            f"the HSM token has not exactly one key {self.label(role, number)}; "
            "`hsmwrap keys rotate` makes a new set"
        )

    def list(self, session: Session) -> list[KeySet]:
        """All key sets, oldest first; one without a MAC key is unfinished and never current."""
        return [*self.survey(session)[0]]

    def survey(self, session: Session) -> tuple[tuple[KeySet, ...], frozenset[int]]:
        """What :meth:`list` and :meth:`numbers` say, by one search."""
        present = list(self._search(session))
        numbers = frozenset(each.number for each in present)
        self._listed |= numbers
        found = [each for each in present if each.generated_here]
        self._trusted |= {each.number for each in found if each.trusted}
        self._movable |= {each.number for each in found if each.movable}
        roles: dict[int, set[Role]] = {}
        for each in filter(self._is_accepted, found):
            roles.setdefault(each.number, set()).add(each.role)
            if each.cipher is not None:
                self._ciphers[each.number] = each.cipher
        finished = {number for number in roles if Role.MAC in roles[number]}
        self._trusted_sets |= finished & self._trusted
        only_trusted = self._must_be_trusted or self._trusted_sets
        current = max(finished & self._trusted if only_trusted else finished, default=None)
        sets = tuple(
            KeySet(
                number=number,
                current=number == current,
                roles=tuple(sorted(roles[number])),
                trusted=number in self._trusted,
                movable=number in self._movable,
                cipher=self.cipher_of(number),
            )
            for number in sorted(roles)
        )
        return sets, numbers

    def numbers(self, session: Session) -> frozenset[int]:
        """Numbers in any label of ours: of finished and unfinished sets, and of foreign keys."""
        return frozenset(each.number for each in self._search(session))

    def is_complete(self, session: Session, number: int, roles: frozenset[Role]) -> bool:
        """Whether the set has exactly one key for each of these roles, and no other key."""
        found = [each for each in self._search(session) if each.number == number]
        self._trusted |= {each.number for each in found if each.trusted and each.generated_here}
        return Counter(each.role for each in found) == Counter(roles) and all(
            self._is_accepted(each) for each in found
        )

    def _search(self, session: Session, label: str | None = None) -> Iterator[_FoundKey]:
        """Keys with a label of ours, or this one, that may do what :meth:`create` allows."""
        wanted: list[Template] = [{Attribute.WRAP: True}, {Attribute.SIGN: True}]
        if label is not None:
            wanted = [{Attribute.LABEL: label}]
        secret: Template = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.TOKEN: True}
        seen: set[int | None] = set()
        origin_told = self.origin_told(session)
        told = frozenset[Attribute]().union(*origin_told.values())
        wanted_attributes = (Attribute.LABEL, *_TRUST, *_IDENTIFYING, *told)
        for key in chain.from_iterable(find_objects(session, secret | each) for each in wanted):
            attributes = _read(key, *wanted_attributes)
            named = self._parse(attributes.get(Attribute.LABEL, ""))
            if named is None or key.handle in seen:
                continue
            seen.add(key.handle)
            trusted = bool(attributes.get(Attribute.TRUSTED, False))
            extractable = attributes.get(Attribute.EXTRACTABLE) is True
            movable = trusted and extractable and self.user_makes_trusted(session) is False
            generated_here = _generated_here(named[0], attributes, origin_told, movable=movable)
            cipher = traits.here().cipher_of(attributes.get(Attribute.KEY_TYPE))
            yield _FoundKey(*named, trusted, movable, generated_here, cipher, key)

    def _parse(self, label: str) -> tuple[Role, int] | None:
        try:
            _, role, number = label.rsplit(":", 2)
            named = Role(role), int(number)
        except ValueError:
            return None
        canonical = label == self.label(*named) and 0 < named[1] <= HIGHEST_NUMBER
        return named if canonical else None

    def _is_accepted(self, found: _FoundKey) -> bool:
        """A set with one trusted key has no others."""
        needs_trust = self._must_be_trusted or found.number in self._trusted
        return found.generated_here and (found.trusted or not needs_trust)

    def create(
        self,
        session: Session,
        role: Role,
        number: int,
        made_by: str,
        *,
        trusted: bool,
        movable: bool = False,
        needs: Needs = EVERYTHING,
    ) -> None:
        """Create one key, as hardened as the HSM token can.

        A trusted key needs the security officer's session, and may be one of a set whose keys move
        (:mod:`hsmwrap.pkcs11.keysets.movability`). ``made_by`` is a fresh word that :meth:`destroy`
        finds these keys again by, and no others.
        """

        def generate(refused: frozenset[Attribute]) -> Any:
            template = self.template(
                *(role, number, made_by),
                trusted=trusted,
                movable=movable,
                needs=needs,
                refused=refused,
            )
            cipher, of_mac = needs.cipher, role is Role.MAC
            mechanism = Mechanism.GENERIC_SECRET_KEY_GEN if of_mac else cipher.generate
            length = _MAC_KEY_BYTES if of_mac else cipher.length
            return objects.generate_key(session, template, length, mechanism=mechanism)

        refused = hardening.NOTHING
        try:
            key = generate(refused)
        except PKCS11Error:
            refused = hardening.refused_by(session, needs.cipher)
            if not refused:
                raise
            key = generate(refused)
        if role is Role.MAC:
            return
        # What the token ignores no unwrapped key will have, so no unwrap template may ask for it.
        ignored = (hardening.missing_on(key) & hardening.OF_UNWRAPPED_KEYS) - refused
        if ignored:
            key.destroy()
            generate(refused | ignored)

    def template(
        self,
        role: Role,
        number: int,
        made_by: str,
        *,
        trusted: bool,
        movable: bool,
        needs: Needs,
        refused: frozenset[Attribute] = hardening.NOTHING,
    ) -> Template:
        """Of the key object, for an HSM token that refuses some attributes."""
        if role is Role.MAC:
            template = {**_MAC_KEY, Attribute.KEY_TYPE: needs.mac_key_type}
        else:
            becomes = self.unwrapped_template(role)
            if movable and role in _MATERIAL_ROLES:
                becomes = becomes | ONLY_UNDER_TRUSTED
            template = _key_encryption_key(role, becomes, needs, refused=refused)
            if movable:
                template[Attribute.WRAP_TEMPLATE] = NestedTemplate(_wrappable(role))
        if movable:
            template = template | ONLY_UNDER_TRUSTED
        if trusted:
            # The security officer sees public objects only. Private or not, the key is sensitive,
            # and what a key-encryption key unwraps has to be private, which takes a login.
            template = {**template, Attribute.TRUSTED: True, Attribute.PRIVATE: False}
        template = stored(template, self.key_id(role, number, made_by), self.label(role, number))
        return without(template, refused)

    def key_id(self, role: Role, number: int, made_by: str) -> bytes:
        """CKA_ID; never used twice: NSS replaces a key by another of its id (field note 46)."""
        return f"{self.label(role, number)}:{made_by}".encode()

    def destroy(self, pooled: PooledSession, number: int, made_by: str | None = None) -> int:
        """Destroy what there is of a key set, or only what one :meth:`create` made of it.

        Returns:
            The number of keys destroyed. After an error some may be left; another call goes on.

        Raises:
            UserNotLoggedIn: Without a login, what is left would not be seen.
        """
        # What is being retired stays listed to the end; what was never finished must not look so.
        mac_key_first = made_by is not None
        destroyed = 0
        for role in sorted(Role, key=lambda role: role is Role.MAC, reverse=mac_key_first):
            wanted: Template = {Attribute.LABEL: self.label(role, number), Attribute.TOKEN: True}
            if made_by is not None:
                wanted[Attribute.ID] = self.key_id(role, number, made_by)
            destroyed += pooled.destroy(wanted)
        pooled.epoch.end()
        return destroyed


_MAC_KEY_BYTES = 32
_MAC_KEY = secret_key(KeyType.GENERIC_SECRET, Attribute.SIGN)
_WRAPS = (Attribute.WRAP, Attribute.UNWRAP)


def _key_encryption_key(
    role: Role, becomes: Template, needs: Needs, *, refused: frozenset[Attribute]
) -> Template:
    # Imported keys may become token objects. Wrapping keys may not: what was unsealed while the
    # set was there must not outlive its retirement.
    loose = {Attribute.TOKEN} if role in _MATERIAL_ROLES else frozenset()
    pinned: Template = {key: value for key, value in becomes.items() if key not in loose}
    return {
        **secret_key(needs.cipher.key_type, *_WRAPS),
        Attribute.UNWRAP_TEMPLATE: NestedTemplate(without(pinned, refused)),
        Attribute.ALLOWED_MECHANISMS: (needs.key_wrap,),
    }


def _wrappable(role: Role) -> Template:
    """What a key-encryption key of a movable set wraps: no key of a key set.

    A key-encryption key that another one has wrapped could be unwrapped as a key that decrypts.
    """
    if role not in _MATERIAL_ROLES:
        return {Attribute.CLASS: ObjectClass.PRIVATE_KEY}
    idle = (Attribute.WRAP, Attribute.UNWRAP, Attribute.SIGN, Attribute.VERIFY, Attribute.DERIVE)
    wrappable: Template = {Attribute.CLASS: ObjectClass.SECRET_KEY, **dict.fromkeys(idle, False)}
    # Or an SM4 key would become an AES key that encrypts. Material is an AES key while it is tried.
    aes: Template = {Attribute.KEY_TYPE: KeyType.AES} if role is Role.MATERIAL_AES else {}
    return wrappable | aes


_TRUST = (Attribute.TRUSTED, Attribute.WRAP_WITH_TRUSTED)
_MOVABLE = (Attribute.CLASS, Attribute.KEY_TYPE, Attribute.SENSITIVE, *ONLY_UNDER_TRUSTED)
_IDENTIFYING = (
    Attribute.CLASS,
    Attribute.KEY_TYPE,
    Attribute.SENSITIVE,
    Attribute.EXTRACTABLE,
    Attribute.ALWAYS_SENSITIVE,
    Attribute.NEVER_EXTRACTABLE,
    *USES,
)


def _generated_here(
    role: Role,
    attributes: Mapping[Attribute, Any],
    told: origin.Told,
    *,
    movable: bool,
) -> bool:
    """Whether the HSM token generated this key, it never left the token, and has its own uses only.

    Its histories alone do not tell: a key that is derived from data that the holder of the PIN
    can encrypt is always sensitive and never extractable, and its value is known. What an HSM
    token does not tell of an object is taken for granted. A movable key is extractable, but only
    under a trusted key.
    """
    made, key_type = _MAC_KEY, attributes.get(Attribute.KEY_TYPE)
    if role is not Role.MAC:
        # Of a type that seals here; of another it is not accepted.
        made = secret_key((traits.here().cipher_of(key_type) or AES).key_type, *_WRAPS)
    elif key_type in traits.here().mac_key_types:
        made = {**made, Attribute.KEY_TYPE: key_type}
    if movable:
        # It may be a clone, whose histories are those of an unwrapped key (field note 23). That the
        # security officer made it is told by CKA_TRUSTED, where a user cannot set that.
        wanted = made | ONLY_UNDER_TRUSTED
        return all(attributes.get(each) == wanted[each] for each in (*_MOVABLE, *USES))
    made = made | {Attribute.ALWAYS_SENSITIVE: True, Attribute.NEVER_EXTRACTABLE: True}
    generated = origin.generated(made[Attribute.KEY_TYPE])
    right = origin.of_others(told) if role is Role.MAC else told.get(made[Attribute.KEY_TYPE], ())
    return all(attributes.get(each, made[each]) == made[each] for each in _IDENTIFYING) and all(
        attributes.get(each) == generated[each] for each in right
    )


def _is_older(newest: int, number: int) -> HsmUnavailable:
    return HsmUnavailable(
        f"the HSM token has no key set {number}, its newest is {newest}: is it another one, or an "
        "old backup?"
    )


def _has_all_of(found: KeySet | None, known: KeySet) -> bool:
    """Whether it is a newer set, or the same one with the same keys."""
    if found is None or found.number < known.number:
        return False
    return found.number > known.number or set(found.roles) >= set(known.roles)


def is_trusted(key: Any) -> bool:
    """Whether this key-encryption key is CKA_TRUSTED."""
    return bool(read_if_known(key, Attribute.TRUSTED))


def _read(key: Any, *attributes: Attribute) -> Mapping[Attribute, Any]:
    """Those of these attributes that the HSM token tells; none if the object is gone."""
    for _ in range(2):  # a handle that is refused once may be one that the token lost for a moment
        try:
            with attribute_reads():
                found: Mapping[Attribute, Any] = key.get_attributes(attributes)
        except HANDLE_INVALID:
            continue
        return found
    return {}
