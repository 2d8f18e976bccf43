"""The files of the TLS certificate and its key: what is refused, and when they are read again."""

from __future__ import annotations

import ssl
from contextlib import suppress

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from support.certificates import DAY, Certificate

from hsmwrap.errors import ConfigurationError
from hsmwrap.kms.tls import Tls


def served(tls: Tls) -> bytes:
    """The certificate that a client is shown, by a handshake in memory."""
    pipes = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    client = context.wrap_bio(pipes[0], pipes[1])
    server = tls.current().wrap_bio(pipes[1], pipes[0], server_side=True)
    for _ in range(3):
        for side in (client, server):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return client.getpeercert(binary_form=True)


def test_what_is_served(tmp_path):
    made = Certificate()
    tls = Tls(*made.write(tmp_path))
    assert served(tls) == made.der
    assert tls.current().minimum_version == ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"certificate": b""}, r"certificate\.pem: is not a certificate in PEM"),
        ({"key": b"SECRET"}, r"tls_key_file \S+key\.pem: is not a private key in PEM"),
        ({"key": Certificate().key}, r"key\.pem: is not the key of the first certificate of"),
        ({"key": Certificate().key_under(b"SECRET")}, r"key\.pem: has a passphrase"),
    ],
    ids=["no-certificate", "no-key", "another-key", "passphrase"],
)
def test_wrong_files(tmp_path, content, said):
    certificate, key = Certificate().write(tmp_path)
    for file in (certificate, key):
        if file.stem in content:
            file.chmod(0o600)
            file.write_bytes(content[file.stem])
    if said.endswith("passphrase"):
        certificate, key = Certificate().write(tmp_path, content["key"])
    with pytest.raises(ConfigurationError, match=said) as refused:
        Tls(certificate, key)
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (Certificate(-2 * DAY, -DAY), r"expired at \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ; renew it"),
        (Certificate(DAY, 2 * DAY), "is not valid before"),
        (Certificate(key=rsa.generate_private_key(65537, 1024)), "OpenSSL refuses it"),
    ],
    ids=["expired", "not-yet", "short"],
)
def test_wrong_certificates(tmp_path, made, said):
    with pytest.raises(ConfigurationError, match=said):
        Tls(*made.write(tmp_path))


def test_the_key_is_a_private_file(tmp_path):
    certificate, key = Certificate().write(tmp_path)
    key.chmod(0o444)
    with pytest.raises(ConfigurationError, match=r"key\.pem: is open to others \(mode 0444\)"):
        Tls(certificate, key)
    key.unlink()
    with pytest.raises(ConfigurationError, match=r"tls_key_file \S+: No such file"):
        Tls(certificate, key)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()])
def test_changed_files_are_read_when_they_are_seen_twice(tmp_path, curve):
    first, second = Certificate(), Certificate(key=ec.generate_private_key(curve))
    tls = Tls(*first.write(tmp_path))
    tls.refresh()
    second.write(tmp_path)
    tls.refresh()
    assert served(tls) == first.der
    tls.refresh()
    assert served(tls) == second.der
    first.write(tmp_path)
    tls.refresh(at_once=True)
    assert served(tls) == first.der


def test_a_wrong_change_keeps_what_was_there_and_is_said_once(tmp_path):
    first, second = Certificate(), Certificate()
    tls = Tls(*first.write(tmp_path))
    second.write(tmp_path, first.key)
    assert not tls.refresh()
    with pytest.raises(ConfigurationError, match="is not the key of the first certificate"):
        tls.refresh()
    assert not tls.refresh()
    assert served(tls) == first.der
    (tmp_path / "key.pem").unlink()
    with pytest.raises(ConfigurationError, match="No such file"):
        tls.refresh(at_once=True)
    second.write(tmp_path)
    assert tls.refresh(at_once=True)
    assert served(tls) == second.der
