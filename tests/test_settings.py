"""Settings: one table for each component, and one way to check it."""

from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from typing import ClassVar

import pytest

from hsmwrap.errors import ConfigurationError
from hsmwrap.keypool import PoolSettings
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.settings import (
    DURATION,
    NAME,
    REQUIRED,
    SWITCH,
    TEXT,
    Settings,
    choice,
    did_you_mean,
    integer,
    seconds,
    setting,
    several,
)
from hsmwrap.software.settings import SoftwareSettings

SECRET = "Zx9-4711-QQ"


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Acme(Settings):
    component: ClassVar[str] = "acme"

    key_file: str = setting(TEXT, "File with the key.", REQUIRED)
    sessions: int = setting(integer(1, 64), "Sessions.", 8)
    colour: Colour = setting(choice(Colour), "Colour.", Colour.RED)
    wait: float = setting(seconds(), "Wait.", 1)
    colours: tuple[Colour, ...] = setting(several(choice(Colour), "red and blue"), "Colours.", ())
    password: str | None = setting(TEXT, "Password.", show=False)


def refusal(call, *arguments, **named):
    with pytest.raises(ConfigurationError) as caught:
        call(*arguments, **named)
    assert SECRET not in str(caught.value)
    return str(caught.value)


def test_values_become_those_that_are_used():
    settings = Acme.from_mapping({"key_file": "/k", "colour": "blue", "wait": 2, "password": None})
    assert settings == Acme("/k", 8, Colour.BLUE, 2.0)
    assert isinstance(settings.colour, Colour)
    assert isinstance(settings.wait, float)


def test_a_value_may_be_kept_out_of_the_repr():
    assert SECRET not in repr(Acme("/k", password=SECRET))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "acme: key_file: required; File with the key."),
        (
            {"keyfile": SECRET},
            "unknown setting keyfile; did you mean key_file? There are key_file, sessions, colour,",
        ),
        ({"zzz": 1}, "acme: unknown setting zzz; There are key_file, "),
        ({"key_file": None}, "acme: key_file: takes text that is not empty; this NoneType"),
        ({"key_file": "k", "sessions": SECRET}, "acme: sessions: takes a whole number, 1 to 64"),
        ({"key_file": "k", "sessions": None}, "this NoneType does not fit"),
        ({"key_file": "k", "colour": SECRET}, "acme: colour: takes one of red, blue; this text"),
        ({"key_file": "k", "colour": "bleu"}, "one of red, blue; did you mean blue? this text"),
        ({"key_file": "k", "colour": "BLUE"}, "one of red, blue; did you mean blue? this text"),
        ({"key_file": "k", "colour": 1}, "acme: colour: takes one of red, blue; this number"),
        ({"key_file": "k", "colour": True}, "acme: colour: takes one of red, blue; this boolean"),
        ({"KEY_FILE": "k"}, "unknown setting KEY_FILE; did you mean key_file? There are"),
        ({"key_file": "k", "sessions": "8"}, "takes a whole number, 1 to 64; write it without qu"),
        ({"key_file": "k", "sessions": "65"}, "takes a whole number, 1 to 64; this text does not"),
        ({"key_file": "k", "sessions": "8\nkey = 1"}, "write it without quotes"),
        ({"key_file": "k", "sessions": "8 8"}, "takes a whole number, 1 to 64; this text does not"),
        ({"key_file": 7}, "acme: key_file: takes text that is not empty; write it in quotes"),
        ({"key_file": True}, "acme: key_file: takes text that is not empty; this boolean does not"),
        ({"key_file": "k", "colours": "red"}, "takes a list of red and blue; write it in [ ]"),
        ({"key_file": "k", "colours": ["re"]}, "did you mean red? this list does not fit"),
    ],
)
def test_refusals(given, text):
    assert text in refusal(Acme.from_mapping, given)


def test_settings_are_checked_however_they_are_made():
    assert "sessions: takes" in refusal(Acme, "k", 65)
    assert "wait: takes" in refusal(replace, Acme("k"), wait=-1)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (integer(1, 3), [1, 3], [0, 4, True, "2", 2.0, None]),
        (integer(0), [0, 10**9], [-1]),
        (seconds(), [0, 0.5], [-1, float("nan"), float("inf"), True, "1"]),
        (seconds(zero=False), [0.001], [0]),
        (SWITCH, [True, False], [0, 1, "true", None]),
        (TEXT, ["x"], ["", "a\0b", b"x", 1]),
        (NAME, ["a", "A.b-c_9", "x" * 32], ["", "a b", "a\n", "ü", "x" * 33, 1]),
        (DURATION, [1, 0.5, timedelta(days=1)], [0, -1, timedelta(0), True, "1"]),
        (choice(["a", "b"]), ["a"], ["A", "", None, []]),
    ],
)
def test_kinds(kind, good, bad):
    for value in good:
        assert kind.read(kind.read(value)) == kind.read(value)
    for value in bad:
        with pytest.raises(ValueError):
            kind.read(value)


@pytest.mark.parametrize("settings", [Pkcs11Settings, SoftwareSettings, PoolSettings])
def test_our_tables_explain_each_setting(settings):
    table = settings.table()
    assert all(row.help.endswith(".") and row.takes for row in table)
    assert "setting" in refusal(settings.from_mapping, {table[-1].name + "x": 1})
    assert f"did you mean {table[-1].name}?" in refusal(
        settings.from_mapping, {table[-1].name + "x": 1}
    )


def test_names_are_near_in_capitals_too():
    assert did_you_mean(["der", "C1C3C2_bare"], ["DER", "C1C3C2_BARE"]) == (
        "did you mean DER, C1C3C2_BARE? "
    )


def test_a_wrong_name_in_a_list_of_layouts():
    text = refusal(SoftwareSettings.from_mapping, {"sm2_layouts": "DRE"})
    assert "sm2_layouts: takes a list of C1C3C2, " in text
