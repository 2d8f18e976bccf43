"""Which protections an HSM token honours: each attack with a control.

That an attack fails on a key with an attribute says nothing by itself: NSS in FIPS mode refuses
readable keys whatever CKA_UNWRAP_TEMPLATE says (field note 84). So the same attack is made on a
key that differs in the attribute alone, where it has to succeed. What no attack proves is not
claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from pkcs11.constants import Attribute
from pkcs11.mechanisms import Mechanism
from pkcs11.types import Session

from hsmwrap.backend import Outcome, Protection
from hsmwrap.pkcs11.binding.templates import (
    Template,
    for_unwrap,
    secret_key,
    without,
)
from hsmwrap.pkcs11.binding.traits import BlockCipher
from hsmwrap.pkcs11.binding.trials import generate_trial_key, unless_refused

_READABLE: Template = {Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}
_EXTRACTABLE: Template = {Attribute.EXTRACTABLE: True}
_ANOTHER_USE: Template = {Attribute.WRAP: True}
_KEK_USES = (Attribute.WRAP, Attribute.UNWRAP)
_CONSEQUENCES: Mapping[Attribute, str] = MappingProxyType(
    {
        Attribute.SENSITIVE: "The holder of the PIN may read keys.",
        Attribute.EXTRACTABLE: "The holder of the PIN may wrap keys, and read them.",
        Attribute.UNWRAP_TEMPLATE: (
            "The holder of the PIN can unwrap sealed blobs, and clients' ciphertexts, into "
            "readable objects."
        ),
        Attribute.ALLOWED_MECHANISMS: (
            "The holder of the PIN can use a key with every mechanism of its type, weak ones "
            "included."
        ),
        Attribute.COPYABLE: (
            "The holder of the PIN can copy keys, and give the copies other uses."
        ),
        Attribute.MODIFIABLE: "The holder of the PIN can give keys other uses.",
        Attribute.WRAP_WITH_TRUSTED: (
            "The holder of the PIN can wrap key material with a key of their own while it is being "
            "imported."
        ),
        Attribute.TRUSTED: (
            "The holder of the PIN can make key-encryption keys that count as the security "
            "officer's."
        ),
    }
)


@dataclass(frozen=True, slots=True)
class OwnKey:
    """A key-encryption key of the backend, for what session objects do not show.

    Attributes:
        key: The key object.
        becomes: The only template that it unwraps into: of a private key that may UNWRAP alone.
        private: An extractable private key of that type to wrap; None where there are none.
        trusted: Whether it is CKA_TRUSTED.
    """

    key: Any
    becomes: Template
    private: Any
    trusted: bool


@dataclass(frozen=True, slots=True)
class _Attack:
    """Something that a protection has to prevent: what it is, and the attack on a key object."""

    words: str
    succeeds: Callable[[Any], bool]


def tried(
    session: Session,
    own: OwnKey | None,
    fit: Callable[[Template], Template],
    *,
    cipher: BlockCipher,
    makes_trusted: Callable[[Session], bool | None],
) -> tuple[Protection, ...]:
    """Try each protection; what is made for that is destroyed.

    Args:
        session: A session with a login.
        own: A key-encryption key of the backend; None where there are none.
        fit: From the template of a session object to that of an object that the HSM token makes:
            without the hardening attributes that it refuses.
        cipher: Whose keys key-encryption keys are, and those that are made; with the key wrap that
            the HSM token has.
        makes_trusted: Tries whether the user can make a trusted key, or tells what was found.

    Raises:
        PKCS11Error: A return code that says something about the connection, not the token.
    """
    trials = _Trials(session, own, fit, cipher, makes_trusted)
    try:
        return tuple(trials.run())
    finally:
        trials.clean_up()


def useless(protections: Iterable[Protection]) -> frozenset[Attribute]:
    """What templates are made without: CKA_UNWRAP_TEMPLATE, unless it is honoured.

    Whether a key has it cannot be read (field note 50), and where it is refused, the return code
    may be one that tells of the connection (field note 49).
    """
    name = f"CKA_{Attribute.UNWRAP_TEMPLATE.name}"
    honoured = any(p.name == name and p.outcome is Outcome.HONOURED for p in protections)
    return frozenset() if honoured else frozenset({Attribute.UNWRAP_TEMPLATE})


class _Trials:
    def __init__(
        self,
        session: Session,
        own: OwnKey | None,
        fit: Callable[[Template], Template],
        cipher: BlockCipher,
        makes_trusted: Callable[[Session], bool | None],
    ) -> None:
        self._session = session
        self._makes_trusted = makes_trusted
        self._own = own
        self._fit = fit
        self._cipher = cipher
        (self._mechanism,) = cipher.key_wraps
        self._made: list[Any] = []

    def run(self) -> Iterator[Protection]:
        """One protection after the other."""
        bare_kek = unless_refused(lambda: self._generate(self._template(*_KEK_USES)))
        guarded, extractable = self._template(), self._template() | _EXTRACTABLE
        # SoftHSM copies no key with MODIFIABLE false, which would prove nothing.
        copied = without(guarded, {Attribute.MODIFIABLE})
        wrapping = _Attack("wrapping a key out", partial(self._is_wrapped, bare_kek))
        copying = [
            _Attack("copying a key", partial(self._is_copied, {})),
            _Attack("copying a key with another use", partial(self._is_copied, _ANOTHER_USE)),
        ]
        changing = [_Attack("giving a key another use", self._is_changed)]
        reading = [_Attack("reading a key", _is_read)]
        for attribute, attacks, template, control in (
            (Attribute.SENSITIVE, reading, extractable, guarded | _READABLE),
            (Attribute.EXTRACTABLE, [wrapping], guarded, extractable),
            (Attribute.COPYABLE, copying, copied, without(copied, {Attribute.COPYABLE})),
            (Attribute.MODIFIABLE, changing, guarded, without(guarded, {Attribute.MODIFIABLE})),
            (
                Attribute.WRAP_WITH_TRUSTED,
                [wrapping],
                extractable | {Attribute.WRAP_WITH_TRUSTED: True},
                extractable,
            ),
        ):
            yield self._judged(
                attribute,
                attacks,
                lambda: self._generate(template) if attribute in template else None,  # noqa: B023
                lambda: self._generate(control),  # noqa: B023
            )
        yield self._of_own_key(Attribute.UNWRAP_TEMPLATE, self._unwrapping(), bare_kek)
        wrapping_otherwise = _Attack("wrapping a key by another mechanism", self._wraps_otherwise)
        yield self._of_own_key(Attribute.ALLOWED_MECHANISMS, [wrapping_otherwise], bare_kek)
        yield self._trusted()

    def clean_up(self) -> None:
        """Destroy what was made; what cannot be destroyed goes with the session."""
        for key in self._made:
            unless_refused(key.destroy)

    # --- the judgement -----------------------------------------------------------------------

    def _judged(
        self,
        attribute: Attribute,
        attacks: Sequence[_Attack],
        make: Callable[[], Any],
        make_bare: Callable[[], Any],
    ) -> Protection:
        """The outcome of attacks on a key with the attribute, and on one without as the control."""
        bare = unless_refused(make_bare)
        if bare is None:
            return _told(attribute, Outcome.NOT_PROVABLE, "The HSM token makes no key without it.")
        guarded = unless_refused(make)
        if guarded is None:
            return _told(attribute, Outcome.NOT_HONOURED, "The HSM token makes no key with it.")
        stopped, done, unproven = [], [], []
        for attack in attacks:
            if not unless_refused(partial(attack.succeeds, bare)):
                unproven.append(attack.words)
            elif unless_refused(partial(attack.succeeds, guarded)):
                done.append(attack.words)
            else:
                stopped.append(attack.words)
        if done:
            return _told(attribute, Outcome.NOT_HONOURED, f"Succeeds despite it: {_list(done)}.")
        if not stopped:
            control = f"Fails without it, too: {_list(unproven)}."
            return _told(attribute, Outcome.NOT_PROVABLE, control)
        control = f"Fails with it and succeeds without: {_list(stopped)}."
        return _told(attribute, Outcome.HONOURED, control)

    def _of_own_key(
        self, attribute: Attribute, attacks: Sequence[_Attack], bare_kek: Any
    ) -> Protection:
        own = self._own
        if attribute not in self._fit({attribute: None}):
            return _told(attribute, Outcome.NOT_HONOURED, "The HSM token makes no key with it.")
        if own is None:
            control = "The HSM token has no key-encryption key to try it on."
            return _told(attribute, Outcome.NOT_PROVABLE, control)
        # It differs from the control in more than the attribute: what it is for has to work.
        unwrapped = own.private and unless_refused(partial(self._unwrapped, own.key, own, {}))
        if not unwrapped:
            control = "Nothing shows it: no private key was wrapped and unwrapped as intended."
            return _told(attribute, Outcome.NOT_PROVABLE, control)
        if attribute is Attribute.UNWRAP_TEMPLATE and (weak := _weakened(unwrapped, own.becomes)):
            control = f"What is unwrapped as intended is made without it: {_list(weak)}."
            return _told(attribute, Outcome.NOT_HONOURED, control)
        return self._judged(attribute, attacks, lambda: own.key, lambda: bare_kek)

    def _trusted(self) -> Protection:
        made = self._makes_trusted(self._session)
        if made:
            control = "Succeeds with the user's PIN: making a trusted key."
            return _told(Attribute.TRUSTED, Outcome.NOT_HONOURED, control)
        if self._own is None or not self._own.trusted:
            control = "No key-encryption key is trusted, so none shows that the officer makes them."
            return _told(Attribute.TRUSTED, Outcome.NOT_PROVABLE, control)
        if made is None:
            control = "Nothing shows it: a key that is not private is not made without it either."
            return _told(Attribute.TRUSTED, Outcome.NOT_PROVABLE, control)
        control = "Fails with the user's PIN: making a trusted key; the security officer made some."
        return _told(Attribute.TRUSTED, Outcome.HONOURED, control)

    # --- keys and attacks --------------------------------------------------------------------

    def _template(self, *uses: Attribute) -> Template:
        template = secret_key(self._cipher.key_type, *(uses or (Attribute.ENCRYPT,)))
        return self._fit(template)

    def _keep(self, key: Any) -> Any:
        self._made.append(key)
        return key

    def _generate(self, template: Template) -> Any:
        cipher = self._cipher
        return self._keep(
            generate_trial_key(self._session, template, cipher.length, cipher.generate)
        )

    def _is_wrapped(self, kek: Any, key: Any) -> bool:
        ways = ((self._mechanism, None), *self._cipher.weak_wraps)
        return kek is not None and _wraps(kek, key, ways)

    def _wraps_otherwise(self, kek: Any) -> bool:
        # Of the kind that the key-encryption key is for: a movable set's wrap no other.
        private = self._own and self._own.private
        key = private or self._generate(self._template() | _EXTRACTABLE)
        return _wraps(kek, key, self._cipher.weak_wraps)

    def _is_copied(self, changes: Template, key: Any) -> bool:
        copy = self._keep(key.copy({Attribute.TOKEN: key[Attribute.TOKEN], **changes}))
        return all(copy[attribute] == value for attribute, value in changes.items())

    @staticmethod
    def _is_changed(key: Any) -> bool:
        key[Attribute.WRAP] = True
        return bool(key[Attribute.WRAP])

    def _unwrapping(self) -> list[_Attack]:
        return [
            _Attack(f"unwrapping a blob into a {kind}", partial(self._is_unwrapped, deviation))
            for kind, deviation in (
                ("readable key", _READABLE),
                ("key that can be wrapped", _EXTRACTABLE),
                ("key with another use", {Attribute.DECRYPT: True}),
            )
        ]

    def _is_unwrapped(self, deviation: Template, kek: Any) -> bool:
        if self._own is None or self._own.private is None:
            return False
        key = self._unwrapped(kek, self._own, deviation)
        return all(key[attribute] == value for attribute, value in deviation.items())

    def _unwrapped(self, kek: Any, own: OwnKey, deviation: Template) -> Any:
        """The private key, wrapped and unwrapped."""
        blob = kek.wrap_key(own.private, mechanism=self._mechanism)
        becomes = self._fit({**own.becomes, **deviation})
        return self._keep(
            kek.unwrap_key(key_data=blob, mechanism=self._mechanism, **for_unwrap(becomes))
        )


def _weakened(key: Any, becomes: Template) -> list[str]:
    """Which protections a key lacks that was unwrapped as intended.

    A token may compare the templates and make the key otherwise (field note 105).
    """
    return [
        f"CKA_{attribute.name}"
        for attribute in _READABLE
        if attribute in becomes and unless_refused(lambda: key[attribute] != becomes[attribute])  # noqa: B023
    ]


def _wraps(kek: Any, key: Any, ways: Iterable[tuple[Mechanism, bytes | None]]) -> bool:
    return any(
        unless_refused(partial(kek.wrap_key, key, mechanism=mechanism, mechanism_param=parameter))
        for mechanism, parameter in ways
    )


def _is_read(key: Any) -> bool:
    return bool(key[Attribute.VALUE])


def _list(words: Sequence[str]) -> str:
    return ", ".join(words)


def _told(attribute: Attribute, outcome: Outcome, control: str) -> Protection:
    consequence = "" if outcome is Outcome.HONOURED else _CONSEQUENCES[attribute]
    return Protection(f"CKA_{attribute.name}", outcome, control, consequence)
