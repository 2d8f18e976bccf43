"""Protections are tried with a control; SoftHSM2 plays tokens that ignore or lack some."""

from types import SimpleNamespace

import pytest
from pkcs11.constants import Attribute, ObjectClass
from pkcs11.exceptions import TemplateInconsistent
from pkcs11.mechanisms import KeyType
from support.pkcs11 import protection_scenarios, scenarios

from hsmwrap.backend import Outcome
from hsmwrap.pkcs11.wrapping import protections
from hsmwrap.pkcs11.wrapping.protections import OwnKey


@pytest.mark.parametrize("scenario", scenarios.names_of(protection_scenarios))
def test_scenario(softhsm, tmp_path, scenario):
    scenarios.run(protection_scenarios, scenario, tmp_path, softhsm.settings("protections"))


class Comparing:
    """A key-encryption key that compares its CKA_UNWRAP_TEMPLATE, if it has one.

    ``makes`` is what the token makes of a template that it takes.
    """

    def __init__(self, only, makes):
        self.only, self.makes = only, makes

    def wrap_key(self, _key, **_named):
        return b"blob"

    def unwrap_key(self, *, template, **_named):
        if self.only is not None and any(template[a] != v for a, v in self.only.items()):
            raise TemplateInconsistent
        return template | self.makes


@pytest.mark.parametrize(
    ("makes", "outcome", "said"),
    [
        ({}, Outcome.HONOURED, "Fails with it and succeeds without"),
        ({Attribute.SENSITIVE: False}, Outcome.NOT_HONOURED, "without it: CKA_SENSITIVE."),
        (
            {Attribute.EXTRACTABLE: True},
            Outcome.NOT_HONOURED,
            "without it: CKA_EXTRACTABLE.",
        ),
    ],
)
def test_a_template_that_is_compared_and_not_kept_protects_nothing(makes, outcome, said):
    """As opencryptoki 3.23 does (field note 105)."""
    becomes = {
        Attribute.CLASS: ObjectClass.PRIVATE_KEY,
        Attribute.KEY_TYPE: KeyType.RSA,
        Attribute.TOKEN: False,
        Attribute.SENSITIVE: True,
        Attribute.EXTRACTABLE: False,
        Attribute.DECRYPT: False,
    }
    own = OwnKey(Comparing(becomes, makes), becomes, private=object(), trusted=False)
    cipher = SimpleNamespace(key_wraps=("wrap",), weak_wraps=())
    trials = protections._Trials(None, own, lambda template: template, cipher, None)
    found = trials._of_own_key(Attribute.UNWRAP_TEMPLATE, trials._unwrapping(), Comparing(None, {}))
    assert found.outcome is outcome
    assert said in found.control
