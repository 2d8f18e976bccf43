"""docs/importing-keys.md: each recipe imports a key, and each mistake is answered as written."""

import base64
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key
from support.documents import ROOT, section_of, text_of
from support.fast import needs_service
from support.http.kms_over_http import ShiftedClock
from support.importing import OAEP1, OAEP256, PKCS1, SM2PKE, open_software, spec_of
from support.kms.fakes import Client, build_kms

from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.customer import encrypt_key_material
from hsmwrap.errors import HsmwrapError
from hsmwrap.sm2 import Layout, parse
from hsmwrap.testing.clients import pyca_encrypt

PAGE = ROOT / "docs" / "importing-keys.md"
RECIPES = dict(
    re.findall(r"^```\w+\n(?:#|//) (\S+)\n(.*?)^```$", text_of(PAGE), re.MULTILINE | re.DOTALL)
)
BOUNCY_CASTLE = Path("/usr/share/java/bcprov.jar")  # Debian: libbcprov-java
PROGRAMS = {
    ".sh": ["bash", "-euo", "pipefail"],
    ".py": [sys.executable, "-W", "error"],
    ".mjs": ["node"],
    ".java": ["java", "-XX:TieredStopAtLevel=1", "-cp", str(BOUNCY_CASTLE)],
}
# What the page says has to be changed for another algorithm.
CHANGES = {
    ("hsmwrap-wrap.sh", OAEP1): {OAEP256: OAEP1},
    ("hsmwrap-wrap.sh", PKCS1): {OAEP256: PKCS1},
    ("hsmwrap-wrap.sh", SM2PKE): {OAEP256: SM2PKE},
    ("openssl.sh", OAEP1): {"sha256": "sha1"},
    ("openssl.sh", PKCS1): {
        "-pkeyopt rsa_padding_mode:oaep -pkeyopt rsa_oaep_md:sha256 -pkeyopt rsa_mgf1_md:sha256": (
            "-pkeyopt rsa_padding_mode:pkcs1"
        )
    },
    ("wrap.py", OAEP1): {"SHA256": "SHA1"},
    ("wrap.py", PKCS1): {
        "padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), label=None)": (
            "padding.PKCS1v15()"
        )
    },
    ("wrap-checked.py", OAEP1): {OAEP256: OAEP1},
    ("wrap-checked.py", SM2PKE): {OAEP256: SM2PKE},
    ("wrap.mjs", OAEP1): {"sha256": "sha1"},
    ("wrap.mjs", PKCS1): {"RSA_PKCS1_OAEP_PADDING": "RSA_PKCS1_PADDING"},
    ("wrap-web.mjs", OAEP1): {"SHA-256": "SHA-1"},
    ("Wrap.java", OAEP1): {
        "OAEPWithSHA-256And": "OAEPWithSHA-1And",
        '"SHA-256"': '"SHA-1"',
        "MGF1ParameterSpec.SHA256": "MGF1ParameterSpec.SHA1",
    },
    ("openssl-sm2.sh", SM2PKE): {},
    ("WrapSm2.java", SM2PKE): {},
} | {
    (name, OAEP256): {}
    for name in RECIPES
    if name not in {"key-material.sh", "openssl-sm2.sh", "WrapSm2.java"}
}


@pytest.fixture(scope="module")
def kms(tmp_path_factory):
    directory, clock = tmp_path_factory.mktemp("kms"), ShiftedClock()
    url, audit_file = f"sqlite:///{directory}/kms.db", directory / "audit.log"
    with open_software() as backend, build_kms(url, backend, audit_file, clock) as opened:
        yield opened, clock


@pytest.fixture
def customer(kms, tmp_path):
    return Customer(*kms, tmp_path)


class Customer:
    """Has a key without key material and works in a directory."""

    def __init__(self, kms, clock, directory):
        self.call = Client(kms)
        self.clock = clock
        self.directory = directory
        self.key_id = self.call.create()
        self.material = secrets.token_bytes(32)

    def parameters(self, algorithm, key_id=None):
        return self.call(
            "GetParametersForImport",
            KeyId=key_id or self.key_id,
            WrappingKeySpec=spec_of(algorithm),
            WrappingAlgorithm=algorithm,
        )

    def send(self, parameters, encrypted, **more):
        """Import; returns None, or the code of the error."""
        if isinstance(encrypted, bytes):
            encrypted = base64.b64encode(encrypted).decode()
        request = {
            "KeyId": self.key_id,
            "ImportToken": parameters["ImportToken"],
            "EncryptedKeyMaterial": encrypted,
        }
        try:
            self.call("ImportKeyMaterial", **request | more)
        except HsmwrapError as error:
            return error.code
        return None

    def run(self, name, program, parameters):
        """Run a recipe; returns what it writes."""
        (self.directory / "parameters.json").write_text(json.dumps(parameters))
        (self.directory / "key-material.bin").write_bytes(self.material)
        (self.directory / "key-material.bin").chmod(0o600)
        run_recipe(name, program, self.directory)
        return (self.directory / "encrypted.b64").read_text()

    def imported(self, material):
        """Whether the KMS has this key material: it takes no other."""
        parameters = self.parameters(OAEP256)
        return self.send(parameters, oaep(parameters, material)) is None


def run_recipe(name, program, directory):
    command = PROGRAMS[Path(name).suffix]
    if command[0] == "java":
        needs_service()  # its start takes two seconds
    needed = {"java": "javac"}.get(command[0], command[0])  # a JRE alone runs no source files
    if not shutil.which(needed):
        pytest.skip(f"capability: {needed} is not installed")
    if "bouncycastle" in program and not BOUNCY_CASTLE.exists():
        pytest.skip("capability: BouncyCastle is not installed")
    (directory / name).write_text(program)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [*command, name],
        cwd=directory,
        env=os.environ | {"PATH": path},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()


def changed(name, changes):
    program = RECIPES[name]
    for old, new in changes.items():
        assert old in program
        program = program.replace(old, new)
    return program


@pytest.mark.parametrize(("name", "algorithm"), CHANGES, ids=map("-".join, CHANGES))
def test_the_recipe_imports_the_key_material(customer, name, algorithm):
    program = changed(name, CHANGES[name, algorithm])
    if algorithm is PKCS1 and name == "openssl.sh":
        assert "sha256" not in program
    parameters = customer.parameters(algorithm)
    assert customer.send(parameters, customer.run(name, program, parameters)) is None
    assert customer.imported(customer.material)
    assert not customer.imported(secrets.token_bytes(32))


def test_each_recipe_is_tried():
    assert RECIPES.keys() == {name for name, _ in CHANGES} | {"key-material.sh"}


def test_key_material_is_drawn(tmp_path):
    run_recipe("key-material.sh", RECIPES["key-material.sh"], tmp_path)
    file = tmp_path / "key-material.bin"
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(file.read_bytes()) == 32


@pytest.mark.parametrize(
    ("name", "algorithm", "old", "new"),
    [
        (
            *("Wrap.java", OAEP256),
            *(re.search(r", new OAEPParameterSpec\(.*?\)", RECIPES["Wrap.java"], re.DOTALL)[0], ""),
        ),
        ("WrapSm2.java", SM2PKE, "SM2Engine.Mode.C1C3C2", ""),
        ("openssl.sh", OAEP256, "-pkeyopt rsa_oaep_md:sha256 -pkeyopt rsa_mgf1_md:sha256", ""),
        ("wrap.mjs", OAEP256, 'oaepHash: "sha256",', ""),
    ],
    ids=["Java", "BouncyCastle", "openssl", "Node.js"],
)
def test_what_a_default_gives_is_refused(customer, name, algorithm, old, new):
    """So the recipes set what they set for a reason."""
    parameters = customer.parameters(algorithm)
    encrypted = customer.run(name, changed(name, {old: new}), parameters)
    assert customer.send(parameters, encrypted) == "InvalidKeyMaterial"


def test_line_breaks_of_openssl_are_refused(customer):
    parameters = customer.parameters(OAEP256)
    program = changed("openssl.sh", {"openssl base64 -A": "openssl base64"})
    assert customer.send(parameters, customer.run("openssl.sh", program, parameters)) == (
        "InvalidParameter"
    )


# --- the table of mistakes


def public(parameters):
    return base64.b64decode(parameters["PublicKey"])


def oaep(parameters, material, **options):
    if not options:
        return pyca_encrypt(OAEP256, public(parameters), material)
    options = {"mgf": SHA256(), "algorithm": SHA256(), "label": None} | options
    padding = OAEP(MGF1(options["mgf"]), options["algorithm"], options["label"])
    return load_der_public_key(public(parameters)).encrypt(material, padding)


def with_material(change):
    def make(customer):
        parameters = customer.parameters(OAEP256)
        return customer.send(parameters, oaep(parameters, change(customer.material)))

    return make


def with_padding(**options):
    def make(customer):
        parameters = customer.parameters(OAEP256)
        return customer.send(parameters, oaep(parameters, customer.material, **options))

    return make


def with_ciphertext(change, **more):
    def make(customer):
        parameters = customer.parameters(OAEP256)
        return customer.send(parameters, change(oaep(parameters, customer.material)), **more)

    return make


def with_pkcs1(customer):
    parameters = customer.parameters(OAEP256)
    encrypted = pyca_encrypt(WrappingAlgorithm.RSAES_PKCS1_V1_5, public(parameters), bytes(32))
    return customer.send(parameters, encrypted)


def with_c1c2c3(customer):
    parameters = customer.parameters(SM2PKE)
    written = encrypt_key_material(SM2PKE, public(parameters), customer.material)
    parts = parse(written, 32, [Layout.C1C3C2])
    return customer.send(parameters, parts.c1 + parts.c2 + parts.c3)


def with_another_public_key(customer):
    first, second = (customer.parameters(OAEP256) for _ in range(2))
    return customer.send(second, oaep(first, customer.material))


def with_other_material(customer):
    parameters = customer.parameters(OAEP256)
    assert customer.send(parameters, oaep(parameters, customer.material)) is None
    return customer.send(parameters, oaep(parameters, secrets.token_bytes(32)))


def with_the_token_of_another_cmk(customer):
    parameters = customer.parameters(OAEP256, customer.call.create())
    return customer.send(parameters, oaep(parameters, customer.material))


def after_24_hours(customer):
    parameters = customer.parameters(OAEP256)
    with customer.clock.shifted(hours=24):
        return customer.send(parameters, oaep(parameters, customer.material))


def expiring_in_milliseconds(customer):
    in_an_hour = (datetime.now(UTC) + timedelta(hours=1)).timestamp()
    expiry = {"KeyMaterialExpireUnix": str(int(in_an_hour * 1000))}
    return with_ciphertext(lambda encrypted: encrypted, **expiry)(customer)


def with_plus(replacement):
    def change(encrypted):
        return base64.b64encode(encrypted).decode().replace("+", replacement)

    return change


def until_plus(make):
    """A ciphertext with a + in its base64, which nearly each has."""

    def tried(customer):
        while True:
            parameters = customer.parameters(OAEP256)
            encrypted = oaep(parameters, customer.material)
            if "+" in base64.b64encode(encrypted).decode():
                return customer.send(parameters, make(encrypted))

    return tried


MISTAKES = {
    "key material in hexadecimal": with_material(lambda m: m.hex().encode()),
    "key material in base64": with_material(base64.b64encode),
    "line end after the key material": with_material(lambda m: m + b"\n"),
    "32 characters of hexadecimal for an AES-256 key": with_material(
        lambda m: m[:16].hex().encode()
    ),
    "another hash for OAEP than asked for": with_padding(mgf=SHA1(), algorithm=SHA1()),
    "MGF1 with SHA-1 beside OAEP with SHA-256": with_padding(mgf=SHA1()),
    "PKCS#1 v1.5 padding where OAEP was asked for": with_pkcs1,
    "a label for OAEP": with_padding(label=b"key-1"),
    "SM2 in the order C1C2C3": with_c1c2c3,
    "ciphertext in reversed byte order": with_ciphertext(lambda encrypted: encrypted[::-1]),
    "public key of one answer, token of another": with_another_public_key,
    "other key material than the first time": with_other_material,
    "token of another CMK": with_the_token_of_another_cmk,
    "parameters older than 24 hours": after_24_hours,
    "line breaks in the base64": with_ciphertext(lambda e: base64.encodebytes(e).decode()),
    "base64 for URLs (`-` and `_`)": until_plus(with_plus("-")),
    "base64 whose `+` became a space": until_plus(with_plus(" ")),
    "KeyMaterialExpireUnix in milliseconds": expiring_in_milliseconds,
}


def rows():
    table = section_of(PAGE, "Before you send")
    for line in table.splitlines():
        if line.startswith("| ") and not line.startswith("| mistake"):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_each_mistake_is_tried():
    assert [row[0] for row in rows()] == list(MISTAKES)


@pytest.mark.parametrize("row", list(rows()), ids=lambda row: row[0])
def test_the_mistake_is_answered_like_this(customer, row):
    answer = MISTAKES[row[0]](customer)
    assert (answer or "**accepted**") == row[1]


def test_a_token_takes_20_failures(customer):
    parameters = customer.parameters(OAEP256)
    answers = [customer.send(parameters, bytes(256)) for _ in range(21)]
    assert answers == ["InvalidKeyMaterial"] * 20 + ["InvalidImportToken"]


# --- what libraries write for SM2


def test_the_layouts_of_gmssl(customer):
    from gmssl.sm2 import CryptSM2

    for mode, expected in ((1, None), (0, "InvalidKeyMaterial")):
        parameters = customer.parameters(SM2PKE)
        client = CryptSM2(private_key="", public_key="", mode=mode)
        client.public_key = public(parameters)[-64:].hex()
        encrypted = bytes(client.encrypt(customer.material))
        assert len(encrypted) == 96 + 32
        assert customer.send(parameters, encrypted) == expected
