"""Types of arguments, checked at the doors of the public API: a wrong one is a typed error.

Python does not check annotations. Without this, a number in place of a time is an AttributeError
somewhere inside. What is checked are the annotations themselves, so that they cannot differ from
the check: classes, ``| None``, and the members of ``Mapping[str, str]``. ``bool`` is not an ``int``
here. Protocols and ``Any`` are not checked, and of containers not what is in them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from hsmwrap.errors import (
    ConfigurationError,
    HsmwrapError,
    InvalidParameter,
    MissingParameter,
)

_P = ParamSpec("_P")
_T = TypeVar("_T")
_C = TypeVar("_C", bound=type)


def of_the_api(name: str, takes: str, value: object) -> HsmwrapError:
    """The error for an argument of an operation, named as the API's parameter (``KeyId``)."""
    parameter = "".join(word.capitalize() for word in name.split("_"))
    if value is None:
        return MissingParameter(parameter)
    return InvalidParameter(parameter, f"takes {takes}, not {type(value).__name__}")


def of_a_setting(name: str, takes: str, value: object) -> HsmwrapError:
    """The error for an argument of what an embedder or operator sets up."""
    return ConfigurationError(f"{name}: takes {takes}, not {type(value).__name__}")


_Refusal = Callable[[str, str, object], HsmwrapError]


def checked(refusal: _Refusal) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Decorate a function or method: each argument has the type that its annotation says.

    Args:
        refusal: Makes the error of the argument's name, what it takes in words, and its value.
    """

    def decorate(call: Callable[_P, _T]) -> Callable[_P, _T]:
        names = list(inspect.signature(call).parameters)
        # At the first call: annotations may name what is defined later.
        hints = functools.cache(lambda: _checks(get_type_hints(call)))

        @functools.wraps(call)
        def checking(*arguments: _P.args, **named: _P.kwargs) -> _T:
            checks = hints()
            for name, value in (*zip(names, arguments, strict=False), *named.items()):
                _require(checks, name, value, refusal)
            return call(*arguments, **named)

        return checking

    return decorate


def checked_methods(kind: _C) -> _C:
    """Decorate a class: its public methods are :func:`checked`, as operations of the API."""
    for name, method in list(vars(kind).items()):
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(kind, name, checked(of_the_api)(method))
    return kind


def require_fields(instance: Any, names: tuple[str, ...], refusal: _Refusal) -> None:
    """Check these fields of a dataclass, for its ``__post_init__``.

    Raises:
        HsmwrapError: What ``refusal`` makes of the first one that has another type.
    """
    kind: Any = type(instance)
    checks = _checks_of(kind)
    for field in fields(instance):
        if field.name in names:
            _require(checks, field.name, getattr(instance, field.name), refusal)


_Checks = Mapping[str, tuple[tuple[type, ...], bool]]
"""The classes that each argument may be of, and whether it is a mapping of texts."""


@functools.cache
def _checks_of(kind: Any) -> _Checks:
    return _checks(get_type_hints(kind))


def _checks(hints: Mapping[str, Any]) -> _Checks:
    found = {}
    for name, hint in hints.items():
        types = tuple(_types(hint))
        if name != "return" and None not in types:
            texts = get_origin(hint) is Mapping and get_args(hint) == (str, str)
            found[name] = (tuple(each for each in types if each is not None), texts)
    return found


def _types(hint: Any) -> Iterator[type | None]:
    """The classes of an annotation; None among them: it cannot be checked."""
    origin = get_origin(hint)
    if origin in {Union, UnionType}:
        for each in get_args(hint):
            yield from _types(each)
    elif isinstance(hint, type) and origin is None:
        yield None if getattr(hint, "_is_protocol", False) else hint
        if hint is float:
            yield int  # PEP 484
    else:
        yield origin if isinstance(origin, type) else None


def _require(checks: _Checks, name: str, value: object, refusal: _Refusal) -> None:
    if name not in checks:
        return
    types, texts = checks[name]
    if type(value) in types and not texts:
        return
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        takes = " or ".join("None" if each is NoneType else each.__name__ for each in types)
        raise refusal(name, takes, value)
    if texts and isinstance(value, Mapping):
        for each in (*value.keys(), *value.values()):
            if not isinstance(each, str):
                raise refusal(name, "texts only", each)
