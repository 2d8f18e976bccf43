"""What it costs that the protection of each key is read back: one unwrapping with it and without.

An import reads back two keys, the wrapping key and the material, and a resident one three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pkcs11.constants import Attribute
from pkcs11.mechanisms import KeyType

from benchmarks.hsm import RawToken
from benchmarks.plan import Plan, say
from benchmarks.timing import Side, Timing, take_turns
from hsmwrap.pkcs11.binding import objects
from hsmwrap.pkcs11.binding.templates import AES_KEY_WRAP, for_unwrap, secret_key
from hsmwrap.pkcs11.keysets.keys import Role


@dataclass(frozen=True, slots=True)
class Protection:
    """Unwrapping an imported key as the backend does, and by the bare call."""

    kept: Timing
    bare: Timing

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {"kept": self.kept.to_json(), "bare": self.bare.to_json()}


def measure(token: RawToken, plan: Plan) -> Protection:
    """Unwrap one sealed key again and again."""
    say("pkcs11: protection is read back")
    session = token.session()
    kek = session.key(Role.MATERIAL_AES)
    extractable = secret_key(KeyType.AES, Attribute.ENCRYPT, extractable=True)
    key = objects.generate_key(session.session, token.features.fit(extractable), 32)
    blob = kek.wrap_key(key, mechanism=AES_KEY_WRAP)
    key.destroy()
    template = token.features.fit(session.material_template(Role.MATERIAL_AES))
    arguments = for_unwrap(template)

    def bare() -> Any:
        return kek.unwrap_key(key_data=blob, mechanism=AES_KEY_WRAP, **arguments)

    sides = {
        "kept": Side(lambda: objects.unwrap(kek, blob, template), _destroy),
        "bare": Side(bare, _destroy),
    }
    return Protection(**take_turns(sides, plan.seconds, plan.least))


def _destroy(key: Any) -> None:
    key.destroy()
