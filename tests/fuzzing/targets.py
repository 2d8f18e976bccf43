"""What is fuzzed, and which outcomes are right: a value that holds, or a typed error."""

import io
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from hsmwrap import oaep, sm2, tokens
from hsmwrap.backend import KeyRef, Mac
from hsmwrap.errors import (
    ConfigurationError,
    HsmwrapError,
    InvalidCiphertext,
    InvalidImportToken,
    InvalidKeyMaterial,
    InvalidMac,
    KeyNotFound,
)
from hsmwrap.http.message import read_message
from hsmwrap.http.signature import read_claim
from hsmwrap.kms import audit, auditfiles
from hsmwrap.kms.api import OPERATIONS
from hsmwrap.kms.blobs import CiphertextBlob
from hsmwrap.kms.config import load_config
from hsmwrap.kms.errors import InvalidAction
from hsmwrap.kms.parameters import AliasName, encryption_context, parse, unix_time
from hsmwrap.kms.recommend import recommend
from hsmwrap.kms.schema import ALIAS_LENGTH
from hsmwrap.kms.signing import SigningSecret
from hsmwrap.pkcs11.token import pin, uri

CORPUS = Path(__file__).with_name("corpus")
_MATERIAL = (16, 32)
_MAX_BODY = 4096
_OTHER_SECRET = SigningSecret("a secret that nothing was signed with")


@dataclass(frozen=True)
class Target:
    """A function that takes any bytes; any exception from it is a finding."""

    run: Callable[[bytes], None]

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def corpus(self) -> Path:
        return CORPUS / self.name

    def seeds(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted(self.corpus.iterdir())]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _refuse_mac(_data: bytes, _mac: Mac) -> None:
    raise InvalidMac


def import_token(data: bytes) -> None:
    """A client's token: refused; and where the MAC is right, read back to the same bytes."""
    with suppress(InvalidImportToken):
        tokens.decode(data, _refuse_mac)
        raise AssertionError("a token without a right MAC was taken")
    macs = []
    with suppress(InvalidImportToken):
        claims = tokens.decode(data, lambda _body, mac: macs.append(mac))
        again = tokens.encode(claims, lambda _body: macs[0])
        assert again == data, "a token that means what another one means"


def key_reference(data: bytes) -> None:
    """What a database row holds."""
    with suppress(KeyNotFound):
        assert KeyRef.from_bytes(data).to_bytes() == data


def ciphertext_blob(data: bytes) -> None:
    """What Decrypt gets."""
    with suppress(InvalidCiphertext):
        assert CiphertextBlob.from_bytes(data).to_bytes() == data


def sm2_ciphertext(data: bytes) -> None:
    """A client's SM2 ciphertext, in any layout; the first byte chooses the material's length."""
    if not data:
        return
    with suppress(InvalidKeyMaterial):
        read = sm2.parse(data[1:], _MATERIAL[data[0] & 1])
        written = (read.to_c1c3c2(), read.to_c1c3c2()[1:], read.to_der())
        assert data[1:] in written, "an encoding that is not written so"


def public_key_der(data: bytes) -> None:
    """An SM2 SubjectPublicKeyInfo."""
    with suppress(ValueError):
        assert sm2.encode_spki(sm2.decode_spki(data)) == data


def oaep_block(data: bytes) -> None:
    """What a raw RSA decryption of a client's ciphertext gave."""
    for name in ("sha1", "sha256"):
        with suppress(InvalidKeyMaterial):
            assert len(oaep.decode(data, name)) <= len(data)


def pkcs11_uri(data: bytes) -> None:
    """A URI from the configuration; what is logged of it has no PIN."""
    text = _text(data)
    uri.redact(text)
    with suppress(ConfigurationError):
        read = uri.parse(text, allow_pin_value=True)
        with suppress(ConfigurationError):
            assert uri.parse(read.to_uri()).to_uri() == read.to_uri()


def pin_source(data: bytes) -> None:
    """Where the configuration says that the PIN is; nothing is run or opened here."""
    text = _text(data)
    for settings in ({"pin-source": text}, {"pin_file": text}, {"pin_env": text}):
        with suppress(ConfigurationError):
            pin.from_settings(settings)
    with suppress(HsmwrapError):
        pin.checked_pin(text, "here")


def http_request(data: bytes) -> None:
    """A request: query, then headers, then body, divided by newlines and an empty line."""
    head, _, body = data.partition(b"\n\n")
    query, *lines = head.decode("latin-1").split("\n")
    environ = {
        "REQUEST_METHOD": "POST",
        "QUERY_STRING": query,
        "CONTENT_TYPE": "application/x-www-form-urlencoded",
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
        "wsgi.url_scheme": "http",
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
    }
    for line in lines:
        name, _, value = line.partition(":")
        environ[f"HTTP_{name.upper().replace('-', '_')}"] = value
    status = 400
    try:
        claim = read_claim(read_message(environ, _MAX_BODY))
        assert not claim.is_signed_with(_OTHER_SECRET)
        claim.disclosed()
    except HsmwrapError as error:
        status = error.http_status
    assert 400 <= status < 500, status


def encryption_context_json(data: bytes) -> None:
    """EncryptionContext and KeyMaterialExpireUnix."""
    for read in (encryption_context, unix_time):
        with suppress(HsmwrapError):
            read("Name", _text(data))


def api_parameters(data: bytes) -> None:
    """An action and its parameters, as a form: values, or an error with advice."""
    form = dict(parse_qsl(_text(data), keep_blank_values=True))
    action = form.pop("Action", "")
    operation = OPERATIONS.get(action)
    try:
        if operation is None:
            raise InvalidAction
        arguments = parse(operation.parameters, form)
    except HsmwrapError as error:
        advice = recommend(error, action, form)
        assert advice
        # Only what looks like a name is repeated.
        assert not any(len(value) > 64 and value in advice for value in form.values())
        return
    assert arguments.keys() == operation.parameters.keys()
    for name, value in arguments.items():
        if isinstance(value, AliasName):
            assert value == form[name]
            assert len(value) <= len("alias/") + ALIAS_LENGTH


def configuration(data: bytes) -> None:
    """The server's file."""
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        file.write(data)
        file.flush()
        with suppress(ConfigurationError):
            load_config(Path(file.name))


def audit_log(data: bytes) -> None:
    """A log on the disk: verified whole, and its last line found."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        path = Path(file.name)
        assert auditfiles.verify(path).lines >= 0
        with suppress(audit.AuditFailed):
            audit.AuditLog(path, clock=_never).head()


def _never() -> None:
    raise AssertionError("nothing is written")


TARGETS = {
    target.name: target
    for target in map(
        Target,
        (
            import_token,
            key_reference,
            ciphertext_blob,
            sm2_ciphertext,
            public_key_der,
            oaep_block,
            pkcs11_uri,
            pin_source,
            http_request,
            encryption_context_json,
            api_parameters,
            configuration,
            audit_log,
        ),
    )
}
