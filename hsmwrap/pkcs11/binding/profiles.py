"""Vendor profiles: what a family of PKCS#11 modules does in its own way, as data.

A profile is a TOML file: ``vendors/NAME.toml`` here, or one of the operator's. Values
collide between vendors (0x80008200 is Sansec's and TASS's), so a profile is chosen by
configuration, one per module, and only proposed by what a module calls itself. What a profile says
is tried before it is relied on. What a token refuses is found out by asking, so a profile need not
say it; but a vendor's own numbers cannot be found out, and a module that hangs or crashes when it
is asked must not be asked. The form of EC points is read from the point.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import cache
from importlib import resources
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeVar

from pkcs11.constants import Attribute
from pkcs11.mechanisms import KeyType, Mechanism

from hsmwrap.ckr import CKR
from hsmwrap.errors import ConfigurationError
from hsmwrap.pkcs11.binding.returncodes import BY_REMEDY, Recovery
from hsmwrap.pkcs11.binding.traits import (
    AES,
    DATA_SPECIFIED,
    NO_SOURCE,
    STANDARD,
    BlockCipher,
    Traits,
)
from hsmwrap.settings import (
    HEX,
    REQUIRED,
    SWITCH,
    TEXT,
    Kind,
    Settings,
    choice,
    did_you_mean,
    integer,
    setting,
    several,
    typed,
    unknown_setting,
)
from hsmwrap.sm2 import Layout

_E = TypeVar("_E", KeyType, Mechanism)


class OaepHash(StrEnum):
    """Hashes of OAEP in wrapping algorithms."""

    SHA_1 = "SHA-1"
    SHA_256 = "SHA-256"


_HASHES = {OaepHash.SHA_1: Mechanism.SHA_1, OaepHash.SHA_256: Mechanism.SHA256}

_DIRECTORY = resources.files("hsmwrap.pkcs11.binding") / "vendors"
_SUFFIX = ".toml"
_SETTINGS = (
    "library_parameters",
    "library_parameters_hex",
    "sessions",
    "wrapping_custody",
    "material_custody",
)
_REMEDIES = {remedy.name.lower().replace("_", " "): row for remedy, row in BY_REMEDY.items()}
_NUMBER = integer(0, 2**32 - 1)


# --- what is read


def _table(kind: type[Settings], value: Any) -> Settings:
    return value if isinstance(value, kind) else kind.from_mapping(typed(value, dict))


def _settings(value: Any) -> Mapping[str, Any]:
    if unknown := sorted(typed(value, dict, MappingProxyType).keys() - set(_SETTINGS)):
        raise unknown_setting("profile: settings", unknown, _SETTINGS)
    return MappingProxyType(dict(value))


def _return_codes(value: Any) -> Mapping[int, Recovery]:
    rows = {}
    for text, remedy in typed(value, dict, MappingProxyType).items():
        if isinstance(remedy, Recovery):  # checked before
            rows[text] = remedy
            continue
        code = _code(text)
        if code in rows:
            raise ConfigurationError(f"profile: return_codes: {text} is there twice; keep one")
        if remedy not in _REMEDIES:
            near = did_you_mean([str(remedy)], list(_REMEDIES))
            raise ConfigurationError(
                f"profile: return_codes: {text}: {remedy!r} is not a remedy; {near}"
                f"There are {', '.join(_REMEDIES)}"
            )
        rows[code] = _REMEDIES[remedy]
    return MappingProxyType(rows)


def _code(text: str) -> int:
    """A code of a vendor's own: what those of the standard mean is not for a profile to say."""
    try:
        code = _NUMBER.read(int(text, 0))
    except ValueError:
        raise ConfigurationError(
            f"profile: return_codes: {text!r} is not a return code; write it as 0x80000001"
        ) from None
    if code in list(CKR):
        raise ConfigurationError(
            f"profile: return_codes: {text} is CKR_{CKR(code).name} of the standard, whose remedy "
            "is known; leave it out"
        )
    return int(code)


def _mechanisms(value: Any) -> frozenset[int]:
    known = {f"CKM_{name}": int(each) for name, each in Mechanism.__members__.items()}
    return _numbers("mechanisms", known, value)


def _attributes(value: Any) -> frozenset[int]:
    known = {f"CKA_{name}": int(each) for name, each in Attribute.__members__.items()}
    return _numbers("attributes", known, value)


def _numbers(what: str, known: Mapping[str, int], value: Any) -> frozenset[int]:
    given = typed(value, list, tuple, frozenset)
    if unknown := [each for each in given if isinstance(each, str) and each not in known]:
        near = did_you_mean(unknown, list(known))
        raise ConfigurationError(
            f"profile: never: {what}: unknown {', '.join(unknown)}; {near}Others are given as "
            "numbers"
        )
    return frozenset(known[e] if isinstance(e, str) else int(_NUMBER.read(e)) for e in given)


# --- what there is


def _starts(value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else typed(value, list, tuple)
    if not given:
        raise ValueError
    return tuple(map(TEXT.read, given))


_STARTS = Kind("text that is not empty, or a list of such texts", _starts)


@dataclass(frozen=True, slots=True)
class ModuleNames(Settings):
    """``[module]``: how a module of the family calls itself, each the start of the text.

    Versions may differ in that; hence a list is one start or another.
    """

    component: ClassVar[str] = "profile: module"

    manufacturer: tuple[str, ...] | None = setting(
        _STARTS, "Manufacturer of the HSM token (C_GetTokenInfo)."
    )
    model: tuple[str, ...] | None = setting(_STARTS, "Model of the HSM token (C_GetTokenInfo).")
    library: tuple[str, ...] | None = setting(_STARTS, "Description of the module (C_GetInfo).")

    def fit(self, manufacturer: str, model: str, library: str) -> bool:
        """Whether each name that is given begins what the module says; False if none is."""
        said = {"manufacturer": manufacturer, "model": model, "library": library}
        given = {name: start for name in said if (start := getattr(self, name)) is not None}
        return bool(given) and all(said[name].startswith(start) for name, start in given.items())


def _number(kind: type[_E], what: str) -> Kind:
    number = integer(0, 2**32 - 1)

    def read(value: Any) -> _E:
        return value if isinstance(value, kind) else by_number(kind, number.read(value))

    return Kind(f"{what} of PKCS#11 as a number, such as 0x80000001", read)


def by_number(kind: type[_E], value: int) -> _E:
    """A member by number, for python-pkcs11, which takes no plain int (field note 6)."""
    for member in kind:
        if member.value == value:
            return member
    made: _E = int.__new__(kind, value)
    made._name_ = f"VENDOR_{value:#010x}"
    made._value_ = value
    return made


@dataclass(frozen=True, slots=True)
class VendorSm2(Settings):
    """``[sm2]``: a vendor's SM2."""

    component: ClassVar[str] = "profile: sm2"

    key_type: KeyType | None = setting(
        _number(KeyType, "a key type"), "Type of its SM2 keys; without it CKK_EC."
    )
    generate: Mechanism | None = setting(
        _number(Mechanism, "a mechanism"),
        "Mechanism of key pair generation; without it CKM_EC_KEY_PAIR_GEN.",
    )
    decrypt: Mechanism | None = setting(
        _number(Mechanism, "a mechanism"),
        "Mechanism of C_Decrypt; without it CKM_ECDH1_DERIVE does what the token does of SM2.",
    )
    ciphertext: Layout = setting(
        choice(Layout), "What that mechanism takes; C1C3C2_BARE is without 04.", Layout.C1C3C2
    )
    unwrap: Mechanism | None = setting(
        _number(Mechanism, "a mechanism"),
        "Mechanism of C_UnwrapKey; without it key material passes through the host.",
    )
    unwrap_parameter: bytes | None = setting(HEX, "That mechanism's parameter; without it none.")
    unwrap_ciphertext: Layout | None = setting(
        choice(Layout), "What that mechanism takes; without it the same as that of C_Decrypt."
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: A value is wrong, or belongs to a mechanism that is not given.
        """
        Settings.__post_init__(self)
        alone = {
            "unwrap_parameter": self.unwrap is None and self.unwrap_parameter is not None,
            "unwrap_ciphertext": self.unwrap is None and self.unwrap_ciphertext is not None,
            "ciphertext": (self.unwrap or self.decrypt) is None
            and self.ciphertext is not Layout.C1C3C2,
        }
        for name in (name for name, wrong in alone.items() if wrong):
            needs = "decrypt or unwrap" if name == "ciphertext" else "unwrap"
            raise ConfigurationError(
                f"profile: sm2: {name}: give {needs} as well; no mechanism takes it"
            )

    @property
    def unwrap_layout(self) -> Layout:
        """What the mechanism of C_UnwrapKey takes."""
        return self.unwrap_ciphertext or self.ciphertext


_SM4_MECHANISM = _number(Mechanism, "a mechanism")
_SM4_BYTES = 16


@dataclass(frozen=True, slots=True)
class VendorSm4(Settings):
    """``[sm4]``: a vendor's SM4. PKCS#11 has none of its own, up to version 3.2."""

    component: ClassVar[str] = "profile: sm4"

    key_type: KeyType = setting(_number(KeyType, "a key type"), "Type of its SM4 keys.", REQUIRED)
    generate: Mechanism | None = setting(_SM4_MECHANISM, "Mechanism of key generation.")
    ecb: Mechanism | None = setting(_SM4_MECHANISM, "ECB of whole blocks.")
    cbc: Mechanism | None = setting(
        _SM4_MECHANISM, "CBC of whole blocks; its parameter is the initialisation vector."
    )
    ctr: Mechanism | None = setting(
        _SM4_MECHANISM, "CTR; its parameter is CK_AES_CTR_PARAMS. Used where ecb is not given."
    )
    gcm: Mechanism | None = setting(
        _SM4_MECHANISM, "GCM; its parameter is CK_GCM_PARAMS. Where it does not work, keys encrypt "
        "by CCM, over cbc and one of ecb and ctr."
    )  # fmt: skip
    key_wrap: Mechanism | None = setting(
        _SM4_MECHANISM, "Key wrap with padding, of secret and private keys, without a parameter: "
        "seals keys where the HSM token has no AES key wrap."
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: A value is wrong, or keys could not encrypt.
        """
        Settings.__post_init__(self)
        if self.gcm is None and (self.cbc is None or (self.ecb or self.ctr) is None):
            raise ConfigurationError(
                "profile: sm4: give gcm, or cbc and one of ecb and ctr; no key can encrypt and "
                "authenticate without"
            )
        if self.key_wrap is not None and self.generate is None:
            raise ConfigurationError(
                "profile: sm4: give generate beside key_wrap; keys that seal are generated"
            )

    @property
    def ciphers(self) -> tuple[BlockCipher, ...]:
        """What keys can be generated of, if any."""
        if self.generate is None:
            return ()
        return (
            BlockCipher(
                name="SM4",
                key_type=self.key_type,
                generate=self.generate,
                length=_SM4_BYTES,
                lengths=(_SM4_BYTES,),
                ecb=self.ecb,
                cbc=self.cbc,
                ctr=self.ctr,
                key_wraps=() if self.key_wrap is None else (self.key_wrap,),
                weak_wraps=(
                    *(() if self.ecb is None else ((self.ecb, None),)),
                    *(() if self.cbc is None else ((self.cbc, bytes(_SM4_BYTES)),)),
                ),
            ),
        )


@dataclass(frozen=True, slots=True)
class Login(Settings):
    """``[login]``: how the module wants C_Login to be called."""

    component: ClassVar[str] = "profile: login"

    user_type: int = setting(
        _NUMBER, "User type of the user; without it CKU_USER.", STANDARD.user_type
    )
    officer_type: int = setting(
        _NUMBER, "User type of the security officer; without it CKU_SO.", STANDARD.officer_type
    )
    per_session: bool = setting(
        SWITCH, "Log in through every session, though the module says that it is.", default=False
    )
    tells_wrong_pins: bool = setting(
        SWITCH,
        "CKF_USER_PIN_COUNT_LOW is set after a wrong PIN and cleared by a right one (tried): then "
        "another answer to C_Login without it is not about the PIN.",
        default=False,
    )


@dataclass(frozen=True, slots=True)
class Asked(Settings):
    """``[asked]``: what the module is asked for, where the standard has more than one way."""

    component: ClassVar[str] = "profile: asked"

    key_wraps: tuple[Mechanism, ...] = setting(
        several(_number(Mechanism, "a mechanism"), "mechanisms by number"),
        "Mechanisms of AES key wrap with padding, the first that works is used; [] for none.",
        AES.key_wraps,
    )
    mac_key_types: tuple[KeyType, ...] = setting(
        several(_number(KeyType, "a key type"), "key types by number"),
        "Types of keys for CKM_SHA256_HMAC, the first that works is used.",
        STANDARD.mac_key_types,
    )
    oaep_hashes: tuple[OaepHash, ...] = setting(
        several(choice(OaepHash), " and ".join(OaepHash)),
        "With which the module's own OAEP is tried; with another it is decoded in the host.",
        tuple(OaepHash),
    )
    oaep_sources: tuple[int, ...] = setting(
        several(integer(NO_SOURCE, DATA_SPECIFIED), "0 and 1"),
        "Source field of OAEP parameters, the first that works is used.",
        STANDARD.oaep_sources,
    )


@dataclass(frozen=True, slots=True)
class Never(Settings):
    """``[never]``: what makes the module hang, crash or lock."""

    component: ClassVar[str] = "profile: never"

    mechanisms: frozenset[int] = setting(
        Kind("a list of mechanisms by number or name", _mechanisms),
        "Not asked for; what rests on them is reported as refused.",
        frozenset(),
    )
    attributes: frozenset[int] = setting(
        Kind("a list of attributes by number or name", _attributes),
        "In no template; what rests on them is reported as not enforced.",
        frozenset(),
    )


@dataclass(frozen=True, slots=True)
class Profile(Settings):
    """A whole file."""

    component: ClassVar[str] = "profile"

    summary: str = setting(TEXT, "What it is for, in a line.", REQUIRED)
    tried: str = setting(TEXT, "On which version and when it was tried, or where it is from.",
                         REQUIRED)  # fmt: skip
    module: ModuleNames = setting(
        Kind("a table", lambda value: _table(ModuleNames, value)),
        "How the module calls itself: `hsmwrap doctor` proposes the profile by it.",
        ModuleNames(),
    )
    sm2: VendorSm2 | None = setting(
        Kind("a table", lambda value: _table(VendorSm2, value)),
        "SM2 by the vendor's own mechanisms; without it by those of the standard.",
    )
    sm4: VendorSm4 | None = setting(
        Kind("a table", lambda value: _table(VendorSm4, value)),
        "SM4 by the vendor's own mechanisms; without it SM4 keys are kept and cannot be used.",
    )
    settings: Mapping[str, Any] | None = setting(
        Kind("a table", _settings),
        f"What the backend takes where the configuration does not say it: {', '.join(_SETTINGS)}.",
    )
    return_codes: Mapping[int, Recovery] | None = setting(
        Kind("a table", _return_codes),
        f"Codes of the vendor's own, each with what mends the connection: {', '.join(_REMEDIES)}.",
    )
    login: Login = setting(Kind("a table", lambda value: _table(Login, value)), "C_Login.", Login())
    asked: Asked = setting(
        Kind("a table", lambda value: _table(Asked, value)), "What is tried.", Asked()
    )
    never: Never = setting(
        Kind("a table", lambda value: _table(Never, value)), "What is not.", Never()
    )
    quirks: tuple[str, ...] = setting(
        several(TEXT, "texts"),
        "What else is known of it, in words.",
        (),
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: A value is wrong, or a number is given for two things.
        """
        Settings.__post_init__(self)
        numbers = vendor_numbers(self.sm2, self.sm4)
        for one, other in combinations(numbers, 2):
            same = type(numbers[one]) is type(numbers[other]) and numbers[one] == numbers[other]
            if same and {one, other} != _MAY_BE_ONE:
                raise ConfigurationError(
                    f"profile: {one} and {other} are both {numbers[one]:#x}; one of them is wrong"
                )
        for name, number in numbers.items():
            if isinstance(number, Mechanism) and number in self.never.mechanisms:
                raise ConfigurationError(
                    f"profile: never: mechanisms: {number:#x} is {name}; leave one of them out"
                )

    @property
    def traits(self) -> Traits:
        """What the calls of the module depend on."""
        return Traits(
            return_codes=self.return_codes or MappingProxyType({}),
            user_type=self.login.user_type,
            officer_type=self.login.officer_type,
            login_per_session=self.login.per_session,
            tells_wrong_pins=self.login.tells_wrong_pins,
            ciphers=(
                replace(AES, key_wraps=self.asked.key_wraps),
                *(self.sm4.ciphers if self.sm4 is not None else ()),
            ),
            mac_key_types=self.asked.mac_key_types,
            oaep_hashes=tuple(_HASHES[each] for each in self.asked.oaep_hashes),
            oaep_sources=self.asked.oaep_sources,
            never_mechanisms=self.never.mechanisms,
            never_attributes=self.never.attributes,
        )

    @classmethod
    def read(cls, name: str, text: str) -> Self:
        """Parse a file.

        Raises:
            ConfigurationError: It is not TOML, or not a profile; the text says what is wrong where.
        """
        try:
            given = tomllib.loads(text)
            _check_places(given)
            return cls.from_mapping(given)
        except tomllib.TOMLDecodeError as error:
            raise ConfigurationError(f"profile {name}: not TOML: {error}") from None
        except ConfigurationError as error:
            raise ConfigurationError(f"{name}: {error}") from None


PARTS: Mapping[str, type[Settings]] = MappingProxyType(
    {"module": ModuleNames, "sm2": VendorSm2, "sm4": VendorSm4, "login": Login}
    | {"asked": Asked, "never": Never}
)
"""The tables of a profile, by name."""


def vendor_numbers(sm2: VendorSm2 | None, sm4: VendorSm4 | None) -> dict[str, KeyType | Mechanism]:
    """The vendor's numbers, by table and name: ``sm2.decrypt``."""
    return {
        f"{table}.{each.name}": number
        for table, of in (("sm2", sm2), ("sm4", sm4))
        for each in (fields(of) if of is not None else ())
        if isinstance(number := getattr(of, each.name), KeyType | Mechanism)
    }


_MAY_BE_ONE = {"sm2.decrypt", "sm2.unwrap"}
"""The mechanisms of a vendor that may have one number."""


def _check_places(given: Mapping[str, Any]) -> None:
    """Say where a key is known that stands in another table.

    Raises:
        ConfigurationError: One does.
    """
    known = {name: {row.name for row in part.table()} for name, part in PARTS.items()}
    known = {"": {row.name for row in Profile.table()}, **known, "settings": {*_SETTINGS}}
    tables = {"": given, **{name: given[name] for name in known if name in given}}
    for table, keys in tables.items():
        for key in sorted(keys.keys() - known[table]) if isinstance(keys, dict) else ():
            if right := [f"[{name}]" if name else "" for name in known if key in known[name]]:
                place = f"the table {' or '.join(right)}" if right[0] else "no table, at the top"
                where = f"profile: {table}: " if table else "profile: "
                near = did_you_mean([key], sorted(known[table]))
                raise ConfigurationError(f"{where}unknown setting {key}; {near}One is in {place}")


def names() -> tuple[str, ...]:
    """Those that hsmwrap brings along."""
    files = (each.name for each in _DIRECTORY.iterdir())
    return tuple(sorted(n.removesuffix(_SUFFIX) for n in files if n.endswith(_SUFFIX)))


def text_of(name: str) -> str:
    """The file of a profile that hsmwrap brings along, as text.

    Raises:
        ConfigurationError: No profile has this name.
    """
    if name not in (known := names()):
        near = did_you_mean([name], known)
        raise ConfigurationError(
            f"profile: {name!r} is unknown; {near}there are {', '.join(known)}, and profile_file "
            "takes one of your own"
        )
    return (_DIRECTORY / f"{name}{_SUFFIX}").read_text("utf-8")


@cache
def load(name: str) -> Profile:
    """A profile that hsmwrap brings along.

    Raises:
        ConfigurationError: No profile has this name.
    """
    return Profile.read(name, text_of(name))


def load_file(path: str) -> Profile:
    """A profile of the operator's.

    Raises:
        ConfigurationError: The file cannot be read, or is not a profile.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        why = str(error.strerror) if isinstance(error, OSError) else "not UTF-8"
        if path in names():
            why += "; this profile comes with hsmwrap, and the setting profile names it"
        raise ConfigurationError(f"profile_file {path}: {why}") from None
    return Profile.read(path, text)


def chosen(name: str | None, path: str | None) -> Profile | None:
    """The profile that the configuration names, by name or by file; None for none.

    Raises:
        ConfigurationError: It names both, or what :func:`load` and :func:`load_file` raise.
    """
    if name is not None and path is not None:
        raise ConfigurationError("profile and profile_file: give one of them")
    if path is not None:
        return load_file(path)
    return None if name is None else load(name)


def fitting(manufacturer: str, model: str, library: str) -> tuple[str, ...]:
    """Names of the profiles that are for a module and HSM token that call themselves this."""
    return tuple(n for n in names() if load(n).module.fit(manufacturer, model, library))
