import ctypes
import ctypes.util
import pickle
import re
from dataclasses import replace
from traceback import walk_tb

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hsmwrap.errors import ConfigurationError
from hsmwrap.pkcs11.token.pin import Pin
from hsmwrap.pkcs11.token.uri import _QUERY, Pkcs11Uri, parse, redact

SECRET = "Zx9-4711-QQ"

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ABSOLUTE = TEXT.map(lambda text: "/" + text)
URIS = st.builds(
    Pkcs11Uri,
    **dict.fromkeys(
        (
            "token",
            "manufacturer",
            "serial",
            "model",
            "library_manufacturer",
            "library_description",
            "object",
            "slot_manufacturer",
            "slot_description",
            "module_name",
        ),
        st.none() | TEXT,
    ),
    library_version=st.none() | st.tuples(st.integers(0, 255), st.integers(0, 255)),
    type=st.sampled_from([None, "public", "private", "cert", "secret-key", "data"]),
    id=st.none() | st.binary(max_size=20),
    slot_id=st.none() | st.integers(0, 2**64 - 1),
    module_path=st.none() | ABSOLUTE,
    pin_source=st.none(),
    pin_value=st.none(),
)


def refusal(uri, **options):
    with pytest.raises(ConfigurationError) as caught:
        parse(uri, **options)
    return str(caught.value)


def everything_in(error):
    """All that a traceback of ``error`` could show."""
    shown = []
    while error:
        shown += [str(error), repr(error), repr(error.args), repr(vars(error))]
        error = error.__cause__ or error.__context__
    return "\n".join(shown)


@given(URIS)
@example(Pkcs11Uri())
@example(Pkcs11Uri(token="a&pin-value=1"))
def test_what_is_written_reads_back_the_same(uri):
    written = uri.to_uri()
    assert parse(written) == uri
    assert re.fullmatch(r"pkcs11:[\x21-\x7e]*", written)


@given(URIS)
def test_a_uri_without_pin_is_logged_unchanged(uri):
    assert redact(uri.to_uri()) == uri.to_uri()


def test_the_attributes_of_the_rfc():
    uri = parse(
        "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;"
        "model=1.0;serial=;object=my-certificate;type=cert;id=%69%95%3E%5C%F4%BD%EC%91;"
        "library-version=3;slot-id=327;slot-manufacturer=S;library-description=L"
        "?module-path=/usr/lib/softhsm/libsofthsm2.so&module-name=a/b?c&pin-source=file:/etc/pin"
    )
    assert uri == Pkcs11Uri(
        token="The Software PKCS#11 Softtoken",
        manufacturer="Snake Oil, Inc.",
        model="1.0",
        serial="",
        object="my-certificate",
        type="cert",
        id=bytes.fromhex("69953e5cf4bdec91"),
        library_version=(3, 0),
        slot_id=327,
        slot_manufacturer="S",
        library_description="L",
        module_path="/usr/lib/softhsm/libsofthsm2.so",
        module_name="a/b?c",
        pin_source="file:/etc/pin",
    )


@pytest.mark.parametrize("uri", ["pkcs11:", "pkcs11:?", "PKCS11:"])
def test_an_empty_path_restricts_nothing(uri):
    assert parse(uri) == Pkcs11Uri()


def test_names_and_types_are_read_without_case():
    assert parse("pkcs11:TOKEN=A;Type=Private") == Pkcs11Uri(token="A", type="private")


def test_unknown_attributes_of_the_query_are_ignored_even_when_repeated():
    assert parse("pkcs11:token=A?x-y=1&x-y=2&module-name=m") == Pkcs11Uri(
        token="A", module_name="m"
    )


@pytest.mark.parametrize(
    ("uri", "position", "fault"),
    [
        ("", 1, "starts with pkcs11:"),
        ("pkcs12:token=A", 1, "starts with pkcs11:"),
        ("pkcs11:token=A;x-vendor=1", 16, "no attribute x-vendor"),
        ("pkcs11:token=A;token=A", 16, "token is given twice"),
        ("pkcs11:token=A;TOKEN=B", 16, "token is given twice"),
        ("pkcs11:?module-name=a&module-name=b", 23, "module-name is given twice"),
        ("pkcs11:token=A;;serial=B", 16, "takes name=value"),
        ("pkcs11:token=A;", None, "takes name=value"),
        ("pkcs11:token", 8, "takes name=value"),
        ("pkcs11:=A", 8, "takes name=value"),
        ("pkcs11:tok%65n=A", 8, "takes name=value"),
        ("pkcs11:token=A?module-name=b&", None, "takes name=value"),
        ("pkcs11:token=A B", 15, "character of token"),
        ("pkcs11:token=A/B", 15, "character of token"),
        ("pkcs11:token=A|B", 15, "character of token"),
        ("pkcs11:token=Ä", 14, "character of token"),
        ("pkcs11:token=A#B", 15, "character of token"),
        ("pkcs11:token=A%2", 15, "character of token"),
        ("pkcs11:token=A%GG", 15, "character of token"),
        ("pkcs11:token=A\n", 15, "character of token"),
        ("pkcs11:token=%FF", 8, "token takes UTF-8"),
        ("pkcs11:?module-name=a;b", 22, "character of module-name"),
        ("pkcs11:?x-y=a;b", 14, "character of x-y"),
        ("pkcs11:?token=A", 9, "token does not belong in the query"),
        ("pkcs11:module-path=/a", 8, "module-path does not belong in the path"),
        ("pkcs11:?module-path=a.so", 9, "module-path takes an absolute path"),
        ("pkcs11:slot-id=", 8, "slot-id takes a number"),
        ("pkcs11:slot-id=-1", 8, "slot-id takes a number"),
        ("pkcs11:slot-id=%31", 8, "slot-id takes a number"),
        ("pkcs11:slot-id=18446744073709551616", 8, "slot-id takes a number"),
        ("pkcs11:slot-id=" + "9" * 5000, 8, "slot-id takes a number"),
        ("pkcs11:library-version=3.256", 8, "library-version takes a version"),
        ("pkcs11:library-version=3.", 8, "library-version takes a version"),
        ("pkcs11:type=key", 8, "type takes one of public"),
        ("pkcs11:token=A?pin-source=/a&pin-value=1", 16, "exclude each other"),
    ],
)
def test_a_refusal_names_the_position_and_the_attribute(uri, position, fault):
    text = refusal(uri, allow_pin_value=True)
    assert fault in text
    assert f"character {position or len(uri) + 1}:" in text


@pytest.mark.parametrize(
    "uri",
    [
        f"pkcs11:token=A;pin-value={SECRET}",
        f"pkcs11:token=A&pin-value={SECRET}",
        f"pkcs11:token=A?module-path=/m?pin-value={SECRET}",
        f"pkcs11:token=A?module-path=/m;pin-value={SECRET}",
        f"pkcs11:token=A?pin-value=%FF{SECRET}",
        f"pkcs11:token=A?pin-value=a {SECRET}",
        f"pkcs11:token=A?pin-value=a%0A{SECRET}",
        f"pkcs11:token=A?pin-value=a&{SECRET}",
        f"pkcs11:token=A?pin-value=a&{SECRET}=b#",
        f"pkcs11:token=A?pin-value={SECRET}&pin-value={SECRET}",
        f"pkcs11:token=A?pin-value={SECRET}&pin-source={SECRET}",
        f"pkcs11:token=A?pin-source=|echo%20{SECRET}&pin-source=b",
        f"pkcs11:token=A;pin-source=|echo%20{SECRET}",
        f"pkcs11 :token=A?pin-value={SECRET}",
    ],
)
@pytest.mark.parametrize("allow", [False, True])
def test_no_refusal_and_no_log_line_shows_a_pin(uri, allow):
    assert SECRET not in redact(uri)
    with pytest.raises(ConfigurationError) as caught:
        parse(uri, allow_pin_value=allow)
    assert SECRET not in everything_in(caught.value)


@pytest.mark.parametrize("name", ["pin-value", "PIN-VALUE"])
def test_pin_value_has_to_be_allowed(name):
    text = refusal(f"pkcs11:?{name}={SECRET}")
    assert "set allow_pin_value" in text
    assert SECRET not in text + redact(f"pkcs11:?{name}={SECRET}")
    uri = parse(f"pkcs11:token=A?{name}={SECRET}", allow_pin_value=True)
    assert uri.pin_value == Pin(SECRET)
    assert uri.pin_settings() == {"pin-value": Pin(SECRET)}
    assert SECRET not in f"{uri} {uri!r} {uri.to_uri()}"
    with pytest.raises(TypeError):
        pickle.dumps(uri)


def test_pin_attributes_are_not_written():
    uri = Pkcs11Uri(token="A", pin_source="|/bin/echo 1234", pin_value=Pin(SECRET))
    assert str(uri) == uri.to_uri() == "pkcs11:token=A"
    assert "1234" not in repr(uri)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("pkcs11:token=A?pin-source=|echo 1234", "pkcs11:token=A?pin-source=***"),
        (
            "pkcs11:token=A?module-path=/m&pin-value=1&module-name=n",
            "pkcs11:token=A?module-path=/m&pin-value=***&module-name=n",
        ),
        ("pkcs11:token=A;pin-value=12?34", "pkcs11:token=A;pin-value=***?***"),
        ("pkcs11:token=A?x-password=1", "pkcs11:token=A?***"),
        ("pkcs11:serial=1;token=A#B", "pkcs11:serial=1;***"),
        ("1234", "***"),
        ("", "***"),
    ],
)
def test_redact(uri, shown):
    assert redact(uri) == shown


# None of these digits stands in any other part of the URIs below.
@given(st.text("023456789;&?=|#% /\\\n", min_size=1), st.sampled_from([";", "?", "&", "?a=b&"]))
def test_redact_masks_a_pin_of_any_characters(pin, before):
    for name in ("pin-value", "Pin-Source"):
        shown = redact(f"pkcs11:token=A{before}{name}={pin}")
        assert not re.search(r"[02-9#%\\\n |]", shown)


class P11Kit:
    """The URI parser of p11-kit, an independent implementation."""

    _ANY = 0xFFFF

    def __init__(self, library):
        self._library = ctypes.CDLL(library)
        self._library.p11_kit_uri_new.restype = ctypes.c_void_p

    def rewrite(self, uri):
        handle = ctypes.c_void_p(self._library.p11_kit_uri_new())
        text = ctypes.c_char_p()
        try:
            if self._library.p11_kit_uri_parse(uri.encode(), self._ANY, handle):
                return None
            assert not self._library.p11_kit_uri_format(handle, self._ANY, ctypes.byref(text))
            return text.value.decode()
        finally:
            self._library.p11_kit_uri_free(handle)


@pytest.fixture(scope="module")
def p11_kit():
    library = ctypes.util.find_library("p11-kit")
    if not library:
        pytest.skip("libp11-kit is not installed")
    return P11Kit(library)


# Its text fields have the fixed length of CK_TOKEN_INFO, and are padded with blanks.
FIELD = st.none() | st.text("aZ09 &?;/%=#é", min_size=1, max_size=6).map(str.strip).filter(bool)


@given(uri=URIS, fields=st.tuples(FIELD, FIELD, FIELD, FIELD))
def test_p11_kit_reads_what_is_written_and_the_reverse(p11_kit, uri, fields):
    token, serial, manufacturer, model = fields
    ours = Pkcs11Uri(
        token=token,
        serial=serial,
        manufacturer=manufacturer,
        model=model,
        object=(uri.object or "").replace("\0", "") or None,
        id=uri.id or None,
        type=uri.type,
        slot_id=None if uri.slot_id is None else uri.slot_id % 2**32,
    )
    assert parse(p11_kit.rewrite(ours.to_uri())) == ours


def test_replace_keeps_working():
    assert replace(Pkcs11Uri(token="A"), serial="1").to_uri() == "pkcs11:token=A;serial=1"


@pytest.mark.parametrize("before", ["", "object=B;"])
def test_a_stray_pin_is_shown_by_its_position(before):
    uri = f"pkcs11:{before}token=A&pin-value=1234"
    with pytest.raises(
        ConfigurationError, match=rf"character {uri.index('&') + 1}: a PIN attribute"
    ):
        parse(uri)


def test_a_uri_with_a_pin_has_the_hash_of_one_without():
    """A PIN that is overwritten would change it."""
    one = parse("pkcs11:token=A?pin-value=1234", allow_pin_value=True)
    assert hash(one) == hash(parse("pkcs11:token=A"))


def test_a_pin_and_its_source_alone_exclude_each_other_too():
    uri = f"pkcs11:?pin-source=/run/pin&pin-value={SECRET}"
    assert "pin-source and pin-value exclude each other" in refusal(uri, allow_pin_value=True)


@pytest.mark.parametrize(
    ("largest", "larger"),
    [
        (f"slot-id={2**64 - 1}", f"slot-id={2**64}"),
        ("library-version=255.255", "library-version=255.256"),
        ("library-version=255", "library-version=256.255"),
    ],
)
def test_the_largest_numbers(largest, larger):
    assert parse(f"pkcs11:{largest}")
    assert "takes a" in refusal(f"pkcs11:{larger}")


def test_no_repr_has_a_place_for_a_pin():
    uri = f"pkcs11:?pin-value={SECRET}"
    assert "pin" not in repr(parse(uri, allow_pin_value=True))
    (attribute,) = _QUERY.read(uri, len("pkcs11:?"))
    assert attribute.raw == SECRET
    assert SECRET not in repr(attribute)


def test_a_refusal_keeps_no_variables_of_the_reader():
    with pytest.raises(ConfigurationError) as caught:
        parse(f"pkcs11:?pin-value={SECRET}")
    frames = [frame.f_code.co_filename for frame, _ in walk_tb(caught.value.__traceback__)]
    assert frames
    assert parse.__wrapped__.__code__.co_filename not in frames
