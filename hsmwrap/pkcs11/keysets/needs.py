"""Which own keys an HSM token can use: ``hsmwrap keys`` asks it for no others.

A key-encryption key is of use only where key wrap works, by AES or by a vendor's SM4, one for
private wrapping keys only where there are private keys that can be wrapped, and one for AES keys
only where there are AES keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pkcs11.constants import Attribute
from pkcs11.exceptions import PKCS11Error
from pkcs11.mechanisms import KeyType, Mechanism
from pkcs11.types import Session

from hsmwrap.errors import ConfigurationError, ProtectionNotKept
from hsmwrap.pkcs11.binding import objects, traits
from hsmwrap.pkcs11.binding.profiles import VendorSm2
from hsmwrap.pkcs11.binding.returncodes import recovery_of, said
from hsmwrap.pkcs11.binding.templates import (
    Template,
    for_unwrap,
    private_key,
    secret_key,
)
from hsmwrap.pkcs11.binding.traits import AES, BlockCipher
from hsmwrap.pkcs11.binding.trials import generate_trial_key, refuses_changed
from hsmwrap.pkcs11.keysets.keys import ROLES, Needs, Role
from hsmwrap.sm2 import OID_DER

_BYTES = 32
_P_256 = bytes.fromhex("06082a8648ce3d030107")
_FOR_WRAPPING_KEYS = frozenset({Role.WRAPPING_UNWRAP, Role.WRAPPING_DECRYPT, Role.WRAPPING_DERIVE})


def needs_of(session: Session, vendor: VendorSm2 | None) -> Needs:
    """Try what the own keys are for; what is made for that is destroyed.

    Args:
        session: The user's session.
        vendor: The vendor's SM2, if the profile names some. What it unwraps by is not tried here.

    Raises:
        ConfigurationError: The HSM token has no HMAC that authenticates import tokens.
        PKCS11Error: A return code that says something about the connection, not the token.
    """
    trials = _Trials(session)
    try:
        needs = trials.run()
    finally:
        trials.clean_up()
    if vendor is None or vendor.unwrap is None or Role.WRAPPING_DERIVE not in needs.roles:
        return needs
    return replace(needs, roles=(Role.WRAPPING_SM2_UNWRAP, *needs.roles))


@dataclass(frozen=True, slots=True)
class _Failed:
    """What a trial ended with."""

    why: str

    def __bool__(self) -> bool:
        return False


class _Trials:
    def __init__(self, session: Session) -> None:
        self._session = session
        self._made: list[Any] = []
        self._stored = False

    def run(self) -> Needs:
        tried = [(each, self._try(partial(self._key, each))) for each in traits.here().ciphers]
        made = [(cipher, key) for cipher, key in tried if key]
        # Without session objects nothing is sealed.
        self._stored = not made and not self._makes_mac_keys()
        mac_key_type = self._mac_key_type()
        sealing = next(
            (
                (cipher, key_wrap)
                for cipher, _ in made
                for key_wrap in cipher.key_wraps
                if self._try(partial(self._wraps, cipher, key_wrap, *made[0]))
            ),
            None,
        )
        if sealing is None:
            return Needs((Role.MAC,), mac_key_type)
        unused = set() if made[0][0].key_type == AES.key_type else {Role.MATERIAL_AES}
        if not self._has_extractable_private_keys():
            unused |= _FOR_WRAPPING_KEYS
        roles = tuple(role for role in ROLES if role not in unused)
        return Needs(roles, mac_key_type, *sealing)

    def clean_up(self) -> None:
        for key in self._made:
            self._try(key.destroy)

    @staticmethod
    def _try(attempt: Callable[[], Any]) -> Any:
        # What fails once may work again.
        failed = _Failed("")
        for _ in range(2):
            try:
                made = attempt()
                return True if made is None else made or _Failed("its answer is wrong")
            except ProtectionNotKept as error:
                return _Failed(str(error))
            except PKCS11Error as error:
                if recovery_of(error) is not None:
                    raise
                failed = _Failed(said(error))
        return failed

    def _keep(self, key: Any) -> Any:
        self._made.append(key)
        return key

    def _generate(self, template: Template, mechanism: Mechanism, length: int = _BYTES) -> Any:
        placed = self._loose(template) | {Attribute.TOKEN: self._stored}
        return self._keep(generate_trial_key(self._session, placed, length, mechanism))

    def _key(self, cipher: BlockCipher, *uses: Attribute) -> Any:
        template = secret_key(cipher.key_type, *uses or (Attribute.ENCRYPT,), extractable=True)
        return self._generate(template, cipher.generate, cipher.length)

    def _makes_mac_keys(self) -> bool:
        return any(
            self._try(partial(self._mac_key, key_type)) for key_type in traits.here().mac_key_types
        )

    def _mac_key(self, key_type: KeyType) -> Any:
        template = secret_key(key_type, Attribute.SIGN)
        return self._generate(template, Mechanism.GENERIC_SECRET_KEY_GEN)

    def _mac_key_type(self) -> KeyType:
        answers = []
        for key_type in traits.here().mac_key_types:
            works = self._try(partial(self._signs, key_type))
            if works:
                return key_type
            answers.append(f"with a CKK_{key_type.name} key: {works.why}")
        raise ConfigurationError(
            "the HSM token cannot authenticate import tokens, and a key set would be useless: "
            f"CKM_SHA256_HMAC does not work: {'; '.join(answers)}"
        )

    def _signs(self, key_type: KeyType) -> bool:
        key = self._mac_key(key_type)
        first, second = (key.sign(data, mechanism=Mechanism.SHA256_HMAC) for data in (b"1", b"2"))
        return len(first) == _BYTES and first != second

    def _wraps(self, cipher: BlockCipher, mechanism: Mechanism, of: BlockCipher, key: Any) -> bool:
        kek = self._key(cipher, Attribute.WRAP, Attribute.UNWRAP)
        blob = kek.wrap_key(key, mechanism=mechanism)
        becomes = for_unwrap(self._loose(secret_key(of.key_type, Attribute.ENCRYPT)))

        def unwrap(data: bytes) -> Any:
            return self._keep(kek.unwrap_key(key_data=data, mechanism=mechanism, **becomes))

        unwrap(blob)
        return refuses_changed(blob, unwrap)

    def _loose(self, template: Template) -> Template:
        return {a: v for a, v in template.items() if a not in _CLOSING}

    def _has_extractable_private_keys(self) -> bool:
        """False where extractability is what a pair is refused for."""
        for curve in (_P_256, OID_DER):
            template = self._loose(private_key(KeyType.EC, Attribute.DERIVE))
            extractable = {**template, Attribute.EXTRACTABLE: True}
            if self._try(partial(self._pair, extractable, curve)):
                return True
            if self._try(partial(self._pair, template, curve)):
                return False
        return True

    def _pair(self, template: Template, curve: bytes) -> Any:
        public, private = objects.generate_pair(
            self._session,
            template,
            public_template={Attribute.EC_PARAMS: curve},
            mechanism=Mechanism.EC_KEY_PAIR_GEN,
        )
        self._made += [public, private]
        return private


_CLOSING = frozenset({Attribute.MODIFIABLE, Attribute.COPYABLE})
