"""Which own keys an HSM token can use: ``hsmwrap keys`` asks it for no others.

A key-encryption key is of use only where AES key wrap works, and one for private wrapping keys only
where there are private keys that can be wrapped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pkcs11.constants import Attribute, MechanismFlag
from pkcs11.exceptions import PKCS11Error
from pkcs11.mechanisms import KeyType, Mechanism
from pkcs11.types import Session

from hsmwrap.errors import ConfigurationError, ProtectionNotKept
from hsmwrap.pkcs11.binding import objects, traits
from hsmwrap.pkcs11.binding.profiles import VendorSm2
from hsmwrap.pkcs11.binding.returncodes import recovery_of, said
from hsmwrap.pkcs11.binding.templates import (
    AES_KEY_WRAP,
    Template,
    for_unwrap,
    private_key,
    secret_key,
)
from hsmwrap.pkcs11.keysets.keys import ROLES, Needs, Role
from hsmwrap.sm2 import OID_DER

_BYTES = 32
_P_256 = bytes.fromhex("06082a8648ce3d030107")
_WITHOUT_WRAPPING_KEYS = (Role.MAC, Role.MATERIAL_AES, Role.MATERIAL_SM4)


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
        kek = self._try(partial(self._aes, Attribute.WRAP, Attribute.UNWRAP))
        # Without session objects nothing is sealed.
        self._stored = not kek and not self._try(partial(self._aes, Attribute.ENCRYPT))
        mac_key_type = self._mac_key_type()
        wraps = traits.here().key_wraps if kek else ()
        key_wrap = next((m for m in wraps if self._try(partial(self._wraps, kek, m))), None)
        if key_wrap is None:
            return Needs((Role.MAC,), mac_key_type, AES_KEY_WRAP)
        roles = ROLES if self._has_extractable_private_keys() else _WITHOUT_WRAPPING_KEYS
        return Needs(roles, mac_key_type, key_wrap)

    def clean_up(self) -> None:
        for key in self._made:
            self._try(key.destroy)

    @staticmethod
    def _try(attempt: Callable[[], Any]) -> Any:
        # What fails once may work again.
        failed = _Failed("")
        for _ in range(2):
            try:
                return attempt() or True
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

    def _generate(self, template: Template, mechanism: Mechanism | None = None) -> Any:
        template = {**template, Attribute.TOKEN: self._stored}
        key = self._session.generate_key(
            template[Attribute.KEY_TYPE],
            8 * _BYTES,
            store=self._stored,
            capabilities=MechanismFlag(0),
            mechanism=mechanism,
            template={a: v for a, v in template.items() if a not in _CLOSING},
        )
        return self._keep(key)

    def _aes(self, *uses: Attribute) -> Any:
        return self._generate(secret_key(KeyType.AES, *uses, extractable=True))

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
        template = secret_key(key_type, Attribute.SIGN)
        key = self._generate(template, Mechanism.GENERIC_SECRET_KEY_GEN)
        first, second = (key.sign(data, mechanism=Mechanism.SHA256_HMAC) for data in (b"1", b"2"))
        return len(first) == _BYTES and first != second

    def _wraps(self, kek: Any, mechanism: Mechanism) -> bool:
        blob = kek.wrap_key(self._aes(Attribute.ENCRYPT), mechanism=mechanism)
        becomes = for_unwrap(self._loose(secret_key(KeyType.AES, Attribute.ENCRYPT)))
        self._keep(kek.unwrap_key(key_data=blob, mechanism=mechanism, **becomes))
        return True

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
