import pytest

from hsmwrap.backend import Custody
from hsmwrap.errors import ConfigurationError, TokenSelectionError
from hsmwrap.pkcs11.settings import Pkcs11Settings, WrappingCustody
from hsmwrap.pkcs11.token.pin import Pin, PinCommand, PinEnvironment, PinFile, PinLiteral
from hsmwrap.pkcs11.token.selection import TokenDescription, TokenSelector, select, selector_from
from hsmwrap.pkcs11.token.uri import parse
from hsmwrap.sm2.formats import Layout

SECRET = "Zx9-4711-QQ"

ONE = TokenDescription(7, "one".ljust(32), "0001".ljust(16), "Acme", "v2")
TWO = TokenDescription(9, "two\0\0\0", "0002", "Acme", "v2")
TWIN = TokenDescription(11, "two", "0003", "Acme", "v2")
BLANK = TokenDescription(13, " " * 32, "", "Acme", "v2", initialised=False)


def refusal(selector, present):
    with pytest.raises(TokenSelectionError) as caught:
        select(selector, present)
    return str(caught.value)


class TestSelect:
    @pytest.mark.parametrize(
        "selector",
        [
            TokenSelector(label="one"),
            TokenSelector(label="one  "),
            TokenSelector(serial="0001"),
            TokenSelector(slot_id=7),
            TokenSelector(label="one", serial="0001", slot_id=7, manufacturer="Acme", model="v2"),
        ],
    )
    def test_one_match(self, selector):
        assert select(selector, [BLANK, TWO, ONE, TWIN]) is ONE

    def test_padding_with_nuls(self):
        assert select(TokenSelector(label="two"), [ONE, TWO]) is TWO

    def test_an_empty_selector_takes_the_only_token(self):
        assert select(TokenSelector(), [BLANK, TWO]) is TWO

    def test_every_setting_counts(self):
        assert not TokenSelector(label="one", serial="0002").matches(ONE)
        assert not TokenSelector(slot_id=0).matches(ONE)
        assert not TokenSelector(manufacturer="Other").matches(ONE)
        assert not TokenSelector(model="v1").matches(ONE)
        assert not TokenSelector(label="ONE").matches(ONE)
        assert not TokenSelector(label=" one").matches(ONE)

    def test_none_matches(self):
        assert refusal(TokenSelector(label="three"), [ONE, BLANK, TWO]).splitlines() == [
            "0 of 2 tokens match token_label 'three'; exactly one has to",
            "  label 'one', serial '0001', slot 7",
            "  label 'two', serial '0002', slot 9",
            "  not initialised, not counted: slot 13",
            "set one of: token_serial, token_label, slot_id",
        ]

    def test_several_match(self):
        assert refusal(TokenSelector(label="two", model="v2"), [ONE, TWO, TWIN]).splitlines() == [
            "2 of 3 tokens match token_label 'two', token_model 'v2'; exactly one has to",
            "  label 'one', serial '0001', slot 7",
            "  label 'two', serial '0002', slot 9",
            "  label 'two', serial '0003', slot 11",
            "set one of: token_serial, slot_id",
        ]

    def test_an_empty_selector_does_not_guess(self):
        assert "2 of 2 tokens match no setting" in refusal(TokenSelector(), [ONE, TWO])

    def test_no_token_at_all(self):
        assert "no initialised token" in refusal(TokenSelector(), [])
        assert "slot 13" in refusal(TokenSelector(slot_id=13), [BLANK])

    def test_a_label_cannot_forge_a_line(self):
        evil = TokenDescription(1, "a\n  label 'x'", "1", "", "")
        assert len(refusal(TokenSelector(label="b"), [evil]).splitlines()) == 3


class TestSelectorFrom:
    EVERYTHING = TokenSelector("one", "0001", 7, "Acme", "v2")

    def test_settings(self):
        settings = {
            "token_label": "one",
            "token_serial": "0001",
            "slot_id": 7,
            "token_manufacturer": "Acme",
            "token_model": "v2",
            "module": "m",
        }
        assert selector_from(settings) == self.EVERYTHING

    def test_uri(self):
        uri = parse("pkcs11:token=one;serial=0001;slot-id=7;manufacturer=Acme;model=v2;object=k")
        assert selector_from({}, uri) == self.EVERYTHING

    def test_both_complete_each_other(self):
        uri = parse("pkcs11:token=one%20")
        assert selector_from({"token_label": "one", "slot_id": 0}, uri) == TokenSelector(
            label="one", slot_id=0
        )

    def test_both_contradict_each_other(self):
        with pytest.raises(ConfigurationError, match=r"token_label is 'two'.* says 'one'"):
            selector_from({"token_label": "two"}, parse("pkcs11:token=one"))
        with pytest.raises(ConfigurationError, match="slot_id is 0"):
            selector_from({"slot_id": 0}, parse("pkcs11:slot-id=1"))

    def test_what_is_not_understood_is_not_passed_over(self):
        with pytest.raises(ConfigurationError, match="slot-description"):
            selector_from({}, parse("pkcs11:token=one;slot-description=left"))


def settings_of(**mapping):
    return Pkcs11Settings.from_mapping({"module": "/lib/m.so"} | mapping)


class TestSettings:
    def test_defaults(self):
        settings = settings_of()
        expected = {
            "module": "/lib/m.so",
            "library_parameters": None,
            "selector": TokenSelector(),
            "pin": None,
            "force_login": False,
            "sessions": 8,
            "session_wait": 10.0,
            "lazy": False,
            "initial_backoff": 0.5,
            "max_backoff": 30.0,
            "wrapping_custody": WrappingCustody.AUTO,
            "material_custody": Custody.HSM_ENCRYPTED_DATABASE,
            "sm2_layouts": (Layout.C1C3C2, Layout.C1C3C2_BARE, Layout.DER),
            "require_trusted_keys": False,
            "profile": None,
            "name": "pkcs11",
            "key_prefix": "hsmwrap",
        }
        assert {name: getattr(settings, name) for name in expected} == expected
        assert settings == Pkcs11Settings(module="/lib/m.so")

    def test_every_default_is_accepted_as_a_value(self):
        defaults = {s.name: s.default for s in Pkcs11Settings.table() if s.default is not None}
        assert settings_of(**defaults) == settings_of()

    def test_plain_values_become_typed_ones(self):
        settings = settings_of(
            token_label="one",
            pin_env="PIN",
            wrapping_custody="HsmInternal",
            material_custody="HsmInternal",
            sm2_layouts=["DER", "C1C2C3"],
            session_wait=3,
        )
        assert settings.selector == TokenSelector(label="one")
        assert settings.pin == PinEnvironment("PIN")
        assert settings.wrapping_custody is WrappingCustody.HSM_INTERNAL
        assert settings.material_custody is Custody.HSM_INTERNAL
        assert settings.sm2_layouts == (Layout.DER, Layout.C1C2C3)
        assert isinstance(settings.session_wait, float)

    def test_a_uri_says_it_all(self):
        uri = "pkcs11:token=one?module-path=/lib/m.so&pin-source=/etc/pin"
        settings = Pkcs11Settings.from_mapping({"uri": uri})
        assert (settings.module, settings.selector.label) == ("/lib/m.so", "one")
        assert settings.pin == PinFile("/etc/pin")

    def test_pin_value_where_allowed(self):
        uri = f"pkcs11:?pin-value={SECRET}"
        settings = settings_of(uri=uri, allow_pin_value=True)
        assert settings.pin == PinLiteral(Pin(SECRET))
        assert SECRET not in f"{settings} {settings!r}"
        with pytest.raises(ConfigurationError, match="allow_pin_value") as caught:
            settings_of(uri=uri)
        assert SECRET not in str(caught.value)

    def test_repr_hides_a_commands_arguments(self):
        settings = settings_of(pin_command=["/bin/echo", SECRET])
        assert settings.pin == PinCommand(("/bin/echo", SECRET))
        assert SECRET not in repr(settings)

    @pytest.mark.parametrize(
        ("mapping", "fault"),
        [
            ({"module": None}, "module: give the module's path"),
            ({"modul": "m"}, "unknown setting modul; did you mean module[?] There are uri, module"),
            ({"pin": SECRET}, "unknown setting pin; "),
            ({"zzz": 1}, "unknown setting zzz; There are"),
            ({"uri": "pkcs11:?module-path=/lib/other.so"}, "module is '/lib/m.so'.*other"),
            ({"uri": "pkcs11:token=A", "token_label": "B"}, "token_label is 'B'"),
            ({"pin_env": "A", "pin_file": "/a"}, "found pin_file and pin_env"),
            ({"pin_env": "A", "uri": "pkcs11:?pin-source=/a"}, "found pin_env and pin-source"),
            ({"pin_file": 4711}, "pin_file: takes an absolute path"),
            ({"initial_backoff": 31}, "initial_backoff exceeds max_backoff"),
            ({"module": ""}, "module: takes text"),
            ({"module": "a\0b"}, "module: takes text"),
            ({"token_label": 4711}, "token_label: takes text.*write it in quotes"),
            ({"slot_id": "7"}, "slot_id: takes a slot number"),
            ({"slot_id": True}, "slot_id: takes a slot number"),
            ({"slot_id": -1}, "slot_id: takes a slot number"),
            ({"sessions": 0}, "sessions: takes a whole number, 1 to 1024"),
            ({"sessions": 1.5}, "sessions: takes a whole number"),
            ({"session_wait": -1}, "session_wait: takes a number of seconds"),
            ({"session_wait": float("nan")}, "session_wait: takes a number of seconds"),
            ({"max_backoff": float("inf")}, "max_backoff: takes a number of seconds"),
            ({"lazy": "yes"}, "lazy: takes true or false"),
            ({"force_login": 1}, "force_login: takes true or false"),
            ({"wrapping_custody": "Auto"}, "takes one of auto, HsmInternal, HsmEncryptedDatabase"),
            ({"material_custody": []}, "takes one of HsmInternal, HsmEncryptedDatabase"),
            ({"sm2_layouts": "DER"}, "sm2_layouts: takes a list of C1C3C2"),
            ({"sm2_layouts": [{}]}, "sm2_layouts: takes a list of C1C3C2"),
            ({"sm2_layouts": ["SM"]}, "unknown SM2 ciphertext layout"),
            ({"name": "ü"}, "name: takes 1 to 32 ASCII"),
            ({"name": "a\n"}, "name: takes 1 to 32 ASCII"),
            ({"key_prefix": "x" * 33}, "key_prefix: takes 1 to 32 ASCII"),
        ],
    )
    def test_refusals(self, mapping, fault):
        with pytest.raises(ConfigurationError, match=fault) as caught:
            settings_of(**mapping)
        assert SECRET not in str(caught.value)
        assert "4711" not in str(caught.value)
