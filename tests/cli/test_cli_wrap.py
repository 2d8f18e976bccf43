"""hsmwrap wrap: openssl and gmssl decrypt what it encrypts; it refuses a customer's mistakes."""

import base64
import json
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from support.frames import assert_no_secret
from support.importing import AES, SM2PKE, SM4, Desk, each_algorithm, open_software

from hsmwrap.catalog import KeySpec, WrappingAlgorithm
from hsmwrap.cli import main, wrap
from hsmwrap.customer import encrypt_key_material, read_parameters, require_key_material
from hsmwrap.errors import ExpiredImportToken, InvalidParameter
from hsmwrap.sm2 import Layout, parse

DECRYPT = {
    WrappingAlgorithm.RSAES_PKCS1_V1_5: ["rsa_padding_mode:pkcs1"],
    WrappingAlgorithm.RSAES_OAEP_SHA_1: ["rsa_padding_mode:oaep", "rsa_oaep_md:sha1"],
    WrappingAlgorithm.RSAES_OAEP_SHA_256: [
        *("rsa_padding_mode:oaep", "rsa_oaep_md:sha256", "rsa_mgf1_md:sha256"),
    ],
    SM2PKE: [],
}
OAEP256 = WrappingAlgorithm.RSAES_OAEP_SHA_256
KEY = bytes(range(100, 164, 2))  # not text


def openssl(*arguments, given=None):
    done = subprocess.run(["openssl", *arguments], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Private key files of openssl's and their public keys, for RSA and SM2."""
    directory, made = tmp_path_factory.mktemp("pairs"), {}
    for name, options in {"RSA": ["-pkeyopt", "rsa_keygen_bits:2048"], "SM2": []}.items():
        file = directory / name
        openssl("genpkey", "-algorithm", name, *options, "-out", str(file))
        made[name] = file, openssl("pkey", "-in", str(file), "-pubout", "-outform", "DER")
    return made


def answer(public_key, **changed):
    in_a_day = datetime.now(UTC) + timedelta(hours=24)
    return {
        "KeyId": "1234abcd-12ab-34cd-56ef-1234567890ab",
        "ImportToken": base64.b64encode(b"a token").decode(),
        "PublicKey": base64.b64encode(public_key).decode(),
        "TokenExpireTime": f"{in_a_day:%Y-%m-%dT%H:%M:%SZ}",
        "RequestId": "8eaeaa8b-4491-4f1e-a51e-f95a4e54620c",
    } | changed


@pytest.fixture
def here(tmp_path, monkeypatch, pairs):
    """A directory with parameters.json (RSA) and key (32 bytes)."""
    monkeypatch.setattr(wrap, "forbid_core_dumps", lambda: None)
    monkeypatch.chdir(tmp_path)
    Path("parameters.json").write_text(json.dumps(answer(pairs["RSA"][1])))
    keep("key", KEY)
    return tmp_path


def keep(name, content, mode=0o600):
    Path(name).write_bytes(content)
    Path(name).chmod(mode)


def wrap_key(*options, algorithm=OAEP256, parameters="parameters.json", material="key"):
    given = [] if material is None else ["--key-material", material]
    return main(
        ["wrap", "--parameters", parameters, "--algorithm", algorithm, *given, *options]
    )  # fmt: skip


def decrypted_by_openssl(file, algorithm, ciphertext):
    options = [word for option in DECRYPT[algorithm] for word in ("-pkeyopt", option)]
    return openssl("pkeyutl", "-decrypt", "-inkey", str(file), *options, given=ciphertext)


@each_algorithm
@pytest.mark.parametrize("key_spec", KeySpec)
def test_openssl_decrypts_it(here, pairs, capsysbinary, algorithm, key_spec):
    file, public = pairs["SM2" if algorithm is SM2PKE else "RSA"]
    Path("parameters.json").write_text(json.dumps(answer(public)))
    material = KEY[: key_spec.material_length]
    keep("key", material)
    assert wrap_key("--key-spec", key_spec, algorithm=algorithm) == 0
    ciphertext = base64.b64decode(capsysbinary.readouterr().out, validate=True)
    if algorithm is SM2PKE:
        assert ciphertext[0] == 4
        ciphertext = parse(ciphertext, len(material), [Layout.C1C3C2]).to_der()
    assert decrypted_by_openssl(file, algorithm, ciphertext) == material


def test_gmssl_decrypts_it(here, pairs, capsysbinary):
    from gmssl.sm2 import CryptSM2

    file, public = pairs["SM2"]
    Path("parameters.json").write_text(json.dumps(answer(public)))
    assert wrap_key("--format", "raw", algorithm=SM2PKE) == 0
    ciphertext = capsysbinary.readouterr().out
    client = CryptSM2(private_key=scalar_of(file), public_key="", mode=1)
    assert bytes(client.decrypt(ciphertext[1:])) == KEY


def scalar_of(file):
    """The scalar, by openssl: pyca has no SM2."""
    text = openssl("pkey", "-in", str(file), "-noout", "-text").decode()
    octets = text.split("priv:")[1].split("pub:")[0]
    return "".join(octets.split()).replace(":", "")[-64:].rjust(64, "0")


def test_where_libcrypto_has_no_sm2_it_says_so(here, pairs, capsys, monkeypatch):
    monkeypatch.setattr("hsmwrap.sm2.openssl.SONAME", "libcrypto-without-sm2.so")
    Path("parameters.json").write_text(json.dumps(answer(pairs["SM2"][1])))
    assert wrap_key("--generate", "new", algorithm=SM2PKE, material=None) == 2
    assert "needs the distribution's OpenSSL 3 with SM2" in capsys.readouterr().err
    assert not Path("new").exists()


@each_algorithm
def test_the_kms_imports_it(here, capsys, algorithm):
    with open_software() as backend:
        desk = Desk(backend, clock=lambda: datetime.now(UTC))
        parameters = desk.issue(algorithm)
        given = answer(
            parameters.public_key,
            ImportToken=base64.b64encode(parameters.import_token).decode(),
            TokenExpireTime=f"{parameters.expires_at:%Y-%m-%dT%H:%M:%SZ}",
        )
        Path("parameters.json").write_text(json.dumps(given))
        assert wrap_key("--format", "request", algorithm=algorithm) == 0
        request = json.loads(capsys.readouterr().out)
        assert request["KeyId"] == given["KeyId"]
        assert request["ImportToken"] == given["ImportToken"]
        ciphertext = base64.b64decode(request["EncryptedKeyMaterial"])
        imported = desk.bring_in(parameters, ciphertext).imported
        assert imported.key.key_spec is AES


class TestParameters:
    def read(self, text, capsysbinary, monkeypatch):
        Path("parameters.json").write_text(text)
        status = wrap_key()
        read = capsysbinary.readouterr()
        assert status == 0, read.err
        return base64.b64decode(read.out)

    @pytest.mark.parametrize(
        "printed",
        [
            json.dumps,
            repr,
            lambda answer: repr(json.dumps(answer).encode()),
            lambda answer: json.dumps({"headers": {}, "statusCode": 200, "body": answer}),
            lambda answer: str({"headers": {}, "statusCode": 200, "body": answer}),
            lambda answer: json.dumps(
                {name[0].lower() + name[1:]: answer[name] for name in answer}
            ),
            lambda answer: "\ufeff" + json.dumps(answer),
        ],
        ids=["json", "dict", "bytes", "json body", "dict body", "java names", "byte-order mark"],
    )
    def test_what_sdks_print_is_read(self, here, pairs, capsysbinary, monkeypatch, printed):
        file, public = pairs["RSA"]
        ciphertext = self.read(printed(answer(public)), capsysbinary, monkeypatch)
        assert decrypted_by_openssl(file, OAEP256, ciphertext) == KEY

    def test_what_the_current_sdk_prints_is_read(self, here, pairs, capsysbinary, monkeypatch):
        models = pytest.importorskip("alibabacloud_kms20160120.models")
        body = models.GetParametersForImportResponseBody().from_map(answer(pairs["RSA"][1]))
        response = models.GetParametersForImportResponse(headers={}, status_code=200, body=body)
        self.read(str(response), capsysbinary, monkeypatch)
        self.read(str(body.to_map()), capsysbinary, monkeypatch)

    def test_standard_input(self, here, pairs):
        command = [sys.executable, "-m", "hsmwrap.cli", "wrap", "--algorithm", OAEP256]
        done = subprocess.run(
            [*command, "--key-material", "key", "--out", "out"],
            input=Path("parameters.json").read_bytes(),
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == b""
        out = base64.b64decode(Path("out").read_bytes(), validate=True)
        assert decrypted_by_openssl(pairs["RSA"][0], OAEP256, out) == KEY

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"PublicKey": ""}, "PublicKey is needed"),
            ({"ImportToken": None}, "ImportToken is needed"),
            ({"KeyId": 7}, "KeyId: is not a text"),
            ({"PublicKey": "AA\nAA"}, "not base64 in one line"),
            ({"ImportToken": "AAA"}, "not base64"),
            ({"TokenExpireTime": "tomorrow"}, "is not a time such as"),
            ({"TokenExpireTime": "2026-03-01T12:00:00Z"}, "expired at 2026-03-01T12:00:00Z"),
            ({"PublicKey": base64.b64encode(b"no key").decode()}, "neither an RSA key of 2048"),
        ],
    )
    def test_other_parameters_are_refused(self, here, pairs, capsys, changed, said):
        Path("parameters.json").write_text(json.dumps(answer(pairs["RSA"][1], **changed)))
        assert wrap_key() != 0
        read = capsys.readouterr()
        assert said in read.err
        assert read.out == ""

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "are not the JSON object"),
            ("[1]", "are not the JSON object"),
            ("[" * 100_000, "are not the JSON object"),
            ('{"Code": "Forbidden.KeyNotFound"}', "are an error that the KMS answered"),
            ("\x00", "are not the JSON object"),
            ('{"KeyId": "key-1"}', "ImportToken is needed"),
        ],
    )
    def test_other_texts_are_refused(self, here, capsys, text, said):
        Path("parameters.json").write_text(text)
        assert wrap_key() == 1
        assert said in capsys.readouterr().err

    def test_other_files_are_refused(self, here, capsys):
        assert wrap_key(parameters="none") == 2
        assert "No such file" in capsys.readouterr().err
        Path("parameters.json").write_bytes(b"\xff")
        assert wrap_key() == 1
        assert "UTF-8" in capsys.readouterr().err
        Path("parameters.json").write_bytes(bytes(1024 * 1024 + 1))
        assert wrap_key() == 2
        assert "more than" in capsys.readouterr().err

    def test_they_are_taken_until_they_expire(self, pairs):
        parameters = read_parameters(json.dumps(answer(pairs["RSA"][1])))
        parameters.require_usable(OAEP256, parameters.expires_at - timedelta(microseconds=1))
        with pytest.raises(ExpiredImportToken, match="GetParametersForImport again"):
            parameters.require_usable(OAEP256, parameters.expires_at)


def der(key):
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.DER, form)


@pytest.mark.parametrize(
    "make",
    [
        lambda: rsa.generate_private_key(65537, 1024),
        lambda: ec.generate_private_key(ec.SECP256R1()),
    ],
)
def test_other_kinds_of_public_key_are_refused(here, capsys, make):
    Path("parameters.json").write_text(json.dumps(answer(der(make()))))
    assert wrap_key() == 1
    assert "neither an RSA key of 2048 bits nor an SM2 key" in capsys.readouterr().err


@pytest.mark.parametrize(
    "case",
    [("RSA", SM2PKE, "which is of RSA_2048"), ("SM2", OAEP256, "which is of EC_SM2")],
)
def test_an_algorithm_for_another_key_is_refused(here, pairs, capsys, case):
    kind, algorithm, said = case
    Path("parameters.json").write_text(json.dumps(answer(pairs[kind][1])))
    assert wrap_key(algorithm=algorithm) == 1
    assert said in capsys.readouterr().err


class TestMaterial:
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "has 0 bytes; Aliyun_AES_256 takes 32 bytes"),
            (KEY[:31], "has 31 bytes"),
            (KEY[:16], "has 16 bytes"),
            (KEY + b"\n", "has 33 bytes; Aliyun_AES_256 takes 32 bytes, and these have a line end"),
            (KEY + b"\r\n", "have a line end"),
            (KEY + b"x", "has 33 bytes"),
            (KEY.hex().encode(), "is hexadecimal text"),
            (KEY.hex(":").encode() + b"\n", "is hexadecimal text"),
            (KEY[:16].hex().encode(), "is hexadecimal text"),
            (base64.b64encode(KEY), "is base64 text"),
            (base64.b64encode(KEY) + b"\n", "is base64 text"),
            (base64.urlsafe_b64encode(bytes(range(200, 224))), "is base64 text"),
            (b"-----BEGIN PRIVATE KEY-----\n" + KEY, "is PEM"),
            (b"correct horse, battery; staple!!", "is text"),
            (bytes(32), "is one byte repeated"),
        ],
    )
    def test_what_cannot_be_meant_is_refused_and_not_shown(self, here, capsys, content, said):
        keep("key", content)
        assert wrap_key() == 1
        read = capsys.readouterr()
        assert said in read.err
        assert read.out == ""
        for form in (content, content.hex().encode(), base64.b64encode(content)):
            assert not content or form.decode("latin-1") not in read.err

    def test_sm4_takes_16_bytes(self, here, capsys):
        assert wrap_key("--key-spec", SM4) == 1
        assert "Aliyun_SM4 takes 16 bytes" in capsys.readouterr().err

    def test_a_file_that_is_open_to_others_is_refused(self, here, capsys):
        keep("key", KEY, 0o644)
        assert wrap_key() == 2
        assert "is open to others (mode 0644)" in capsys.readouterr().err

    @pytest.mark.parametrize("given", [KEY.hex(), KEY[:16].hex(), base64.b64encode(KEY).decode()])
    def test_material_on_the_command_line_is_not_repeated(self, here, capsys, given):
        assert wrap_key(material=given) == 2
        assert wrap_key(given) == 2
        read = capsys.readouterr()
        assert given not in read.err
        assert read.err.count("never given on a command line") == 2

    def test_one_source_is_needed(self, here, capsys):
        for options in ([], ["--key-material", "key", "--generate", "new"]):
            with pytest.raises(SystemExit):
                wrap_key(*options, material=None)
        assert not Path("new").exists()
        assert "--generate" in capsys.readouterr().err


def test_an_error_keeps_no_key_material(pairs):
    with pytest.raises(InvalidParameter) as caught:
        require_key_material(KEY, SM4)
    assert_no_secret(caught.value, {"key material": KEY})
    with pytest.raises(InvalidParameter) as caught:
        encrypt_key_material(SM2PKE, pairs["RSA"][1], KEY)
    assert_no_secret(caught.value, {"key material": KEY})


class TestGenerate:
    @pytest.mark.parametrize("key_spec", KeySpec)
    def test_what_is_drawn_is_kept(self, here, pairs, capsysbinary, key_spec):
        seen = set()
        for name in ("one", "two"):
            assert wrap_key("--generate", name, "--key-spec", key_spec, material=None) == 0
            read = capsysbinary.readouterr()
            kept = Path(name).read_bytes()
            ciphertext = base64.b64decode(read.out)
            assert decrypted_by_openssl(pairs["RSA"][0], OAEP256, ciphertext) == kept
            assert len(kept) == key_spec.material_length
            assert stat.S_IMODE(Path(name).stat().st_mode) == 0o600
            assert kept not in read.err
            assert kept.hex().encode() not in read.err
            seen.add(kept)
        assert len(seen) == 2

    def test_the_mode_does_not_depend_on_the_umask(self, here, capsys):
        before = os.umask(0)
        try:
            assert wrap_key("--generate", "new", material=None) == 0
        finally:
            os.umask(before)
        assert stat.S_IMODE(Path("new").stat().st_mode) == 0o600

    def test_a_re_import_takes_what_was_kept(self, here, pairs, capsysbinary):
        assert wrap_key("--generate", "new", material=None) == 0
        capsysbinary.readouterr()
        assert wrap_key(material="new") == 0
        ciphertext = base64.b64decode(capsysbinary.readouterr().out)
        kept = decrypted_by_openssl(pairs["RSA"][0], OAEP256, ciphertext)
        assert kept == Path("new").read_bytes()

    def test_what_looks_like_text_by_chance_is_drawn_again(self, here, capsys, monkeypatch):
        drawn = [b"0123456789abcdef" * 2, KEY]
        monkeypatch.setattr(wrap.secrets, "token_bytes", lambda _: drawn.pop(0))
        assert wrap_key("--generate", "new", material=None) == 0
        assert Path("new").read_bytes() == KEY

    @pytest.mark.parametrize("option", ["--generate", "--out"])
    def test_no_file_is_overwritten(self, here, capsys, option):
        Path("there").write_bytes(b"as before")
        Path("link").symlink_to("nowhere")
        for name in ("there", "link"):
            material = None if option == "--generate" else "key"
            assert wrap_key(option, name, material=material) == 2
            assert "exists, and is never overwritten" in capsys.readouterr().err
        assert Path("there").read_bytes() == b"as before"
        assert not Path("nowhere").exists()

    @pytest.mark.parametrize("option", ["--generate", "--out"])
    def test_nor_one_that_comes_meanwhile(self, here, capsys, monkeypatch, option):
        Path("there").write_bytes(b"as before")
        monkeypatch.setattr(wrap.os.path, "lexists", lambda path: path == "key")
        assert wrap_key(option, "there", material=None if option == "--generate" else "key") == 2
        assert "File exists" in capsys.readouterr().err
        assert Path("there").read_bytes() == b"as before"

    def test_nothing_is_kept_where_something_is_refused(self, here, capsys):
        options = ("--generate", "new", "--out", "out")
        assert wrap_key(*options, algorithm=SM2PKE, material=None) == 1
        assert not Path("new").exists()
        assert not Path("out").exists()

    def test_nothing_is_given_out_that_could_not_be_kept(self, here, capsys, monkeypatch):
        real = os.fsync

        def full(descriptor):
            real(descriptor)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(wrap.os, "fsync", full)
        assert wrap_key("--generate", "new", material=None) == 2
        read = capsys.readouterr()
        assert "No space left on device" in read.err
        assert read.out == ""
        assert not Path("new").exists()


class TestOutput:
    def test_base64_in_one_line_without_a_line_end(self, here, capsysbinary):
        assert wrap_key() == 0
        printed = capsysbinary.readouterr().out
        assert wrap_key("--out", "out") == 0
        for content in (printed, Path("out").read_bytes()):
            assert len(content) == 344
            assert not set(content) & set(b"\r\n ")

    def test_raw_bytes(self, here, pairs, capsysbinary):
        assert wrap_key("--format", "raw") == 0
        ciphertext = capsysbinary.readouterr().out
        assert decrypted_by_openssl(pairs["RSA"][0], OAEP256, ciphertext) == KEY

    def test_raw_bytes_do_not_go_to_a_terminal(self, here, capsys, monkeypatch):
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        assert wrap_key("--format", "raw") == 2
        assert "do not go to a terminal" in capsys.readouterr().err

    def test_the_public_key_can_be_compared(self, here, pairs, capsys):
        assert wrap_key() == 0
        fingerprint = openssl("dgst", "-sha256", "-r", given=pairs["RSA"][1]).split()[0].decode()
        assert f"public key SHA-256 {fingerprint}" in capsys.readouterr().err


def test_it_needs_the_core_dependencies_only(here):
    """On an air-gapped machine: without the extras, without PKCS#11 module, openssl and network."""
    blocked = """
import socket, subprocess, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"gunicorn", "sqlalchemy", "pydantic", "prometheus_client",
                                      "gmssl", "pytest", "werkzeug", "alembic", "httptools"}:
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
def refuse(*_, **__): raise AssertionError("not offline")
socket.socket = subprocess.Popen = refuse
from hsmwrap.cli import main
status = main(sys.argv[1:])
import resource
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
sys.exit(status)
"""
    command = [sys.executable, "-c", blocked, "wrap", "--parameters", "parameters.json"]
    done = subprocess.run(
        [*command, "--algorithm", OAEP256, "--key-material", "key"],
        env={"PATH": "/nonexistent"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(base64.b64decode(done.stdout)) == 256
