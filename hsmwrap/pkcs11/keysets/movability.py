"""Whether an HSM token keeps keys that only trusted keys may wrap: tried, each with a control.

Sealed keys can move to another key set if what a key-encryption key unseals is extractable, under
trusted keys only. On a token that does not enforce that, they would be readable for the holder of
the PIN. So each attribute that it rests on is tried with the deviation that it has to refuse, and
the same deviation without the attribute has to succeed:

* CKA_WRAP_WITH_TRUSTED: a key that is not trusted does not wrap such a key;
* CKA_UNWRAP_TEMPLATE: a blob does not unwrap without CKA_WRAP_WITH_TRUSTED;
* CKA_WRAP_TEMPLATE: a key-encryption key does not wrap another one. Otherwise the holder of the PIN
  unwraps that as a key that decrypts, and opens blobs with it in the host.
"""

from __future__ import annotations

from itertools import starmap
from typing import Any

from pkcs11.constants import Attribute, MechanismFlag
from pkcs11.mechanisms import Mechanism
from pkcs11.types import Session

from hsmwrap.pkcs11.binding.templates import NestedTemplate, Template, for_unwrap, secret_key
from hsmwrap.pkcs11.binding.traits import BlockCipher
from hsmwrap.pkcs11.binding.trials import generate_trial_key, unless_refused

ONLY_UNDER_TRUSTED: Template = {Attribute.EXTRACTABLE: True, Attribute.WRAP_WITH_TRUSTED: True}
"""What a movable key has in place of CKA_EXTRACTABLE = false."""

_PUBLIC: Template = {Attribute.PRIVATE: False}  # a security officer's session sees no others
_WRAPS = MechanismFlag.WRAP | MechanismFlag.UNWRAP


def is_kept(session: Session, cipher: BlockCipher, key_wrap: Mechanism) -> bool:
    """Whether this HSM token refuses each deviation, and allows it without the attribute.

    Makes session objects in a security officer's session, and destroys them.

    Args:
        session: The security officer's.
        cipher: Whose keys key-encryption keys are.
        key_wrap: What they wrap by.

    Raises:
        PKCS11Error: A return code that says something about the connection, not the token.
    """
    return _Trial(session, cipher, key_wrap).run()


class _Trial:
    def __init__(self, session: Session, cipher: BlockCipher, key_wrap: Mechanism) -> None:
        self._session = session
        self._cipher = cipher
        self._key_wrap = key_wrap
        self._made: list[Any] = []

    def run(self) -> bool:
        try:
            return bool(unless_refused(self._wrapping) and unless_refused(self._unwrapping))
        finally:
            for key in reversed(self._made):
                unless_refused(key.destroy)

    def _wrapping(self) -> bool:
        trusted = {Attribute.TRUSTED: True}
        picky = trusted | {Attribute.WRAP_TEMPLATE: NestedTemplate({Attribute.WRAP: False})}
        untrusted_key, trusted_key = self._key(_WRAPS, {}), self._key(_WRAPS, trusted)
        picky_key = self._key(_WRAPS, picky)
        marked = self._key(MechanismFlag.ENCRYPT, ONLY_UNDER_TRUSTED)
        unmarked = self._key(MechanismFlag.ENCRYPT, {Attribute.EXTRACTABLE: True})
        wrapping_key = self._key(_WRAPS, ONLY_UNDER_TRUSTED)
        allowed = (
            (untrusted_key, unmarked),
            (trusted_key, marked),
            (trusted_key, wrapping_key),
            (picky_key, marked),
        )
        refused = ((untrusted_key, marked), (picky_key, wrapping_key))
        return all(starmap(self._wraps, allowed)) and not any(starmap(self._wraps, refused))

    def _unwrapping(self) -> bool:
        data_key = secret_key(self._cipher.key_type, Attribute.ENCRYPT)
        asked = data_key | _PUBLIC | ONLY_UNDER_TRUSTED
        pinned = NestedTemplate({k: v for k, v in asked.items() if k is not Attribute.TOKEN})
        trusted = {Attribute.TRUSTED: True}
        pinning, plain = (
            self._key(_WRAPS, trusted | more) for more in ({Attribute.UNWRAP_TEMPLATE: pinned}, {})
        )
        marked = self._key(MechanismFlag.ENCRYPT, ONLY_UNDER_TRUSTED)
        unmarked = {**asked, Attribute.WRAP_WITH_TRUSTED: False}
        return (
            self._unwraps(pinning, marked, asked)
            and self._unwraps(plain, marked, unmarked)
            and not self._unwraps(pinning, marked, unmarked)
        )

    def _key(self, capabilities: MechanismFlag, more: Template) -> Any:
        template = {
            Attribute.KEY_TYPE: self._cipher.key_type,
            **_PUBLIC,
            Attribute.SENSITIVE: True,
            Attribute.EXTRACTABLE: False,
            **more,
        }
        cipher = self._cipher
        key = generate_trial_key(
            self._session, template, cipher.length, cipher.generate, uses=capabilities
        )
        self._made.append(key)
        return key

    def _wraps(self, kek: Any, key: Any) -> bool:
        return bool(unless_refused(lambda: kek.wrap_key(key, mechanism=self._key_wrap)))

    def _unwraps(self, kek: Any, key: Any, template: Template) -> bool:
        blob = kek.wrap_key(key, mechanism=self._key_wrap)

        def unwrap() -> bool:
            arguments = for_unwrap(template)
            self._made.append(kek.unwrap_key(key_data=blob, mechanism=self._key_wrap, **arguments))
            return True

        return bool(unless_refused(unwrap))
