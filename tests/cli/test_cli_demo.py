"""The demo end to end on the software backend, and proof that each of its checks can fail."""

import dataclasses
import functools
import secrets
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import ClassVar

import pytest

from hsmwrap import imports, policy, registry
from hsmwrap.backend import Exposure, KeyCapability, KeySetInfo
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.cli import main
from hsmwrap.errors import ConfigurationError, InvalidKeyMaterial, UnsupportedOperation
from hsmwrap.software import SoftwareBackend, rsa
from hsmwrap.testing import MemoryBackend
from hsmwrap.testing.clients import OPENSSL

pytestmark = pytest.mark.slow

KEYS = {
    "wrapping_key_spec",
    "wrapping_algorithm",
    "protection_level",
    "allowed",
    "outcome",
    "code",
    "exposure",
    "client",
    "backend",
    "issue_ms",
    "key_specs",
    "import_ms",
}
RSA_ALGORITHMS = ("RSAES_PKCS1_V1_5", "RSAES_OAEP_SHA_1", "RSAES_OAEP_SHA_256")
ALLOWED = {
    *(
        ("RSA_2048", algorithm, level, "openssl")
        for algorithm in RSA_ALGORITHMS
        for level in ("SOFTWARE", "HSM")
    ),
    ("EC_SM2", "SM2PKE", "HSM", "openssl"),
    ("EC_SM2", "SM2PKE", "HSM", "gmssl"),
}
REFUSED = {
    *(
        ("EC_SM2", algorithm, level, None)
        for algorithm in RSA_ALGORITHMS
        for level in ("SOFTWARE", "HSM")
    ),
    ("RSA_2048", "SM2PKE", "SOFTWARE", None),
    ("RSA_2048", "SM2PKE", "HSM", None),
    ("EC_SM2", "SM2PKE", "SOFTWARE", None),
}


def name(row):
    keys = ("wrapping_key_spec", "wrapping_algorithm", "protection_level", "client")
    return tuple(row[key] for key in keys)


def rows_that(document, **wanted):
    return [row for row in document["rows"] if wanted.items() <= row.items()]


@pytest.fixture
def one_rsa_pair(monkeypatch):
    """Generate one RSA key pair only: dozens of runs would otherwise take a minute."""
    monkeypatch.setattr(rsa, "generate", functools.cache(rsa.generate))


@pytest.fixture
def demo(run_json, one_rsa_pair):
    """Run the demo on the software backend; exit code and document."""
    return lambda: run_json("demo", "--backend", "software")


@pytest.fixture
def sabotage(monkeypatch):
    """Put a backend class in the place of the software backend."""

    def put(backend_class):
        monkeypatch.setattr(
            registry, "open_backend", lambda _, settings: backend_class.from_settings(settings)
        )

    return put


class TestHonest:
    def test_every_row_does_what_the_table_says(self, demo):
        status, document = demo()
        assert status == 0
        assert document["ok"] is True
        assert document.keys() == {"rows", "ok"}
        assert {name(row) for row in rows_that(document, allowed=True)} == ALLOWED
        assert {name(row) for row in rows_that(document, allowed=False)} == REFUSED
        assert len(document["rows"]) == len(ALLOWED) + len(REFUSED)

    def test_rows_have_the_documented_keys_and_values(self, demo):
        for row in demo()[1]["rows"]:
            assert row.keys() == KEYS
            assert row["backend"] == "software"
            if row["allowed"]:
                assert (row["outcome"], row["code"], row["exposure"]) == ("imported", None, "host")
                assert row["issue_ms"] > 0 < row["import_ms"]
            else:
                assert (row["outcome"], row["code"]) == ("refused", "InvalidParameter")
                assert row["exposure"] is row["issue_ms"] is row["import_ms"] is None

    def test_the_report_for_people(self, capsys):
        assert main(["demo", "--backend", "software"]) == 0
        out, err = capsys.readouterr()
        assert out.splitlines()[-1] == "ok: all 17 rows did what the compatibility table says"
        assert out.count("AES_256 used, SM4 used") == len(ALLOWED)
        assert out.count("algorithm-of-spec") == len(REFUSED) - 1
        assert "not for production" in out
        assert "Exposure: where the key material was" in out
        assert len([line for line in err.splitlines() if "/17] " in line]) == 17

    def test_json_stands_alone_on_stdout_and_progress_on_stderr(self, capsys):
        main(["demo", "--backend", "software", "--json"])
        out, err = capsys.readouterr()
        assert out.startswith("{")
        assert "[17/17] EC_SM2 SM2PKE HSM by gmssl: imported" in err
        assert "not for production" in err

    def test_nothing_is_left_behind(self, demo, sabotage):
        store, closed = {}, []

        class Resident(MemoryBackend):
            @classmethod
            def from_settings(cls, _settings):
                custody = dict.fromkeys(["wrapping_custody", "material_custody"], "HsmInternal")
                return super().from_settings({"store": store, **custody})

            def close(self):
                closed.append(len(store))

        sabotage(Resident)
        assert demo()[0] == 0
        assert closed == [len(store)]
        assert set(store) == {"key-set-1"}

    def test_a_key_spec_that_can_only_be_stored_is_shown_as_such(self, sabotage, capsys):
        sabotage(StoresSm4)
        assert main(["demo", "--backend", "software"]) == 0
        assert capsys.readouterr().out.count("AES_256 used, SM4 stored") == len(ALLOWED)


class StoresSm4(SoftwareBackend):
    """Its capabilities call SM4 keys unusable, and it refuses to use them."""

    def capabilities(self):
        aes, sm4 = super().capabilities().keys
        sm4 = dataclasses.replace(sm4, usable=False)
        return dataclasses.replace(super().capabilities(), keys=(aes, sm4))

    def encrypt(self, key, plaintext, additional_data=b""):
        if key.key_spec is KeySpec.ALIYUN_SM4:
            raise UnsupportedOperation("not here")
        return super().encrypt(key, plaintext, additional_data)


class ImportsAnotherKey(SoftwareBackend):
    """Accepts the client's ciphertext but keeps another key."""

    def unwrap_material(self, private_key, algorithm, encrypted_material, *, key_spec, **options):
        spec = WrappingKeySpec.RSA_2048
        algorithm = WrappingAlgorithm.RSAES_OAEP_SHA_256
        expires_at = datetime.now(UTC) + timedelta(hours=1)
        key = self.generate_wrapping_key(spec, algorithm, expires_at=expires_at)
        other = secrets.token_bytes(key_spec.material_length)
        encrypted = OPENSSL.encrypt(algorithm, key.public_key, other)
        return super().unwrap_material(
            key.private_key, algorithm, encrypted, key_spec=key_spec, **options
        )


class IgnoresAdditionalData(SoftwareBackend):
    def encrypt(self, key, plaintext, additional_data=b""):
        return super().encrypt(key, plaintext)


class EncryptsAnotherMessage(SoftwareBackend):
    def encrypt(self, key, plaintext, additional_data=b""):
        return super().encrypt(key, plaintext[::-1], additional_data)


class DecryptsToNothing(SoftwareBackend):
    def decrypt(self, key, ciphertext, additional_data=b""):
        return b""


class BoastsOfTheHsm(SoftwareBackend):
    """Its imports claim another exposure than its capabilities."""

    def unwrap_material(self, *args, **kwargs):
        imported = super().unwrap_material(*args, **kwargs)
        return dataclasses.replace(imported, exposure=Exposure.IN_HSM)


class Crashes(SoftwareBackend):
    def encrypt(self, key, plaintext, additional_data=b""):
        raise RuntimeError("a bug of the backend")


class UsesSm4AgainstItsWord(StoresSm4):
    encrypt = SoftwareBackend.encrypt


class DisownsAes(SoftwareBackend):
    """Its AES-256 keys cannot be used, as its capabilities say, so its CMKs are unusable."""

    def capabilities(self):
        keys = tuple(
            KeyCapability(k.key_spec, usable=False, custody=k.custody)
            for k in super().capabilities().keys
        )
        return dataclasses.replace(super().capabilities(), keys=keys)

    def encrypt(self, key, plaintext, additional_data=b""):
        raise UnsupportedOperation("not here")


@pytest.mark.parametrize(
    "backend_class",
    [
        ImportsAnotherKey,
        IgnoresAdditionalData,
        EncryptsAnotherMessage,
        DecryptsToNothing,
        BoastsOfTheHsm,
        Crashes,
        UsesSm4AgainstItsWord,
        DisownsAes,
    ],
)
def test_a_dishonest_backend_fails_every_allowed_row(backend_class, demo, sabotage):
    sabotage(backend_class)
    status, document = demo()
    assert status == 1
    assert document["ok"] is False
    assert {name(row) for row in rows_that(document, outcome="failed")} == ALLOWED
    assert {name(row) for row in rows_that(document, outcome="refused")} == REFUSED


def test_one_failing_algorithm_fails_its_rows_alone(demo, sabotage):
    class RejectsOaep1(SoftwareBackend):
        def unwrap_material(self, private_key, algorithm, *args, **kwargs):
            if algorithm is WrappingAlgorithm.RSAES_OAEP_SHA_1:
                raise InvalidKeyMaterial
            return super().unwrap_material(private_key, algorithm, *args, **kwargs)

    sabotage(RejectsOaep1)
    status, document = demo()
    failed = rows_that(document, outcome="failed")
    assert status == 1
    assert {name(row)[:2] for row in failed} == {("RSA_2048", "RSAES_OAEP_SHA_1")}
    assert {row["code"] for row in failed} == {"InvalidKeyMaterial"}


def test_an_allowed_row_that_the_backend_does_not_serve_fails(demo, sabotage, capsys):
    class HasNoSm2(SoftwareBackend):
        def capabilities(self):
            known = super().capabilities()
            served = tuple(w for w in known.wrapping if w.spec is WrappingKeySpec.RSA_2048)
            return dataclasses.replace(known, wrapping=served)

    sabotage(HasNoSm2)
    status, document = demo()
    assert status == 1
    assert [name(row) for row in rows_that(document, allowed=True, outcome="refused")] == [
        ("EC_SM2", "SM2PKE", "HSM", "openssl"),
        ("EC_SM2", "SM2PKE", "HSM", "gmssl"),
    ]
    assert main(["demo", "--backend", "software"]) == 1
    assert "FAILED: 2 of 17 rows did not" in capsys.readouterr().out


class HasSm4UnderSm2(SoftwareBackend):
    """As an HSM that has nothing but the Chinese algorithms."""

    def capabilities(self):
        known = super().capabilities()
        wrapping = tuple(w for w in known.wrapping if w.spec is WrappingKeySpec.EC_SM2)
        keys = tuple(k for k in known.keys if k.key_spec is KeySpec.ALIYUN_SM4)
        return dataclasses.replace(known, wrapping=wrapping, keys=keys)


def test_asked_for_what_is_served_the_rest_is_shown_and_refused(run_json, sabotage, capsys):
    sabotage(HasSm4UnderSm2)
    status, document = run_json("demo", "--backend", "software", "--served")
    assert (status, document["ok"]) == (0, True)
    imported = rows_that(document, allowed=True, outcome="imported")
    assert {name(row)[:3] for row in imported} == {("EC_SM2", "SM2PKE", "HSM")}
    assert [row["key_specs"] for row in imported] == [{"Aliyun_SM4": "used"}] * 2
    assert all(row["issue_ms"] > 0 < row["import_ms"] for row in imported)
    unserved = rows_that(document, allowed=True, outcome="not served")
    assert {name(row) for row in unserved} | {(*name(row)[:3], None) for row in imported} == {
        (*row[:3], None) for row in ALLOWED
    }
    assert {row["code"] for row in unserved} == {"InvalidParameter"}
    assert main(["demo", "--backend", "software", "--served"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.endswith(f"; {len(unserved)} of them are allowed, and not served here")


def test_a_backend_that_serves_no_row_is_refused(sabotage, capsys):
    class ServesNothing(SoftwareBackend):
        def capabilities(self):
            return dataclasses.replace(super().capabilities(), wrapping=())

    sabotage(ServesNothing)
    assert main(["demo", "--backend", "software", "--served"]) != 0
    said = capsys.readouterr()
    assert "serve no row" in said.err
    assert "hsmwrap doctor" in said.err
    assert said.out == ""


def test_a_row_that_is_issued_though_it_is_not_served_fails(run_json, sabotage, monkeypatch):
    sabotage(HasSm4UnderSm2)
    monkeypatch.setattr(
        imports.ImportService, "get_parameters_for_import", lambda *_arguments: None
    )
    status, document = run_json("demo", "--backend", "software", "--served")
    assert status == 1
    assert {name(row)[0] for row in rows_that(document, allowed=True, outcome="issued")} == {
        "RSA_2048"
    }


def test_a_backend_without_key_specs_fails(demo, sabotage):
    class HasNoKeys(SoftwareBackend):
        def capabilities(self):
            return dataclasses.replace(super().capabilities(), keys=())

    sabotage(HasNoKeys)
    status, document = demo()
    assert (status, rows_that(document, outcome="imported")) == (1, [])


def replace_policy(monkeypatch, check):
    """Give the import service another policy than the demo's."""
    monkeypatch.setattr(imports, "policy", SimpleNamespace(check=check))


def test_a_refused_row_that_is_issued_fails(demo, monkeypatch):
    replace_policy(monkeypatch, lambda *_: policy.ALLOWED)
    status, document = demo()
    assert status == 1
    assert [name(row) for row in rows_that(document, outcome="issued")] == [
        ("EC_SM2", "SM2PKE", "SOFTWARE", None)
    ]


def test_a_refusal_by_another_rule_fails(demo, monkeypatch):
    def check(*combination):
        verdict = policy.check(*combination)
        return verdict if verdict.allowed else dataclasses.replace(verdict, rule="a-whim")

    replace_policy(monkeypatch, check)
    status, document = demo()
    assert status == 1
    assert document["ok"] is False


def test_a_refusal_with_another_code_fails(demo, monkeypatch):
    def check(*combination):
        verdict = policy.check(*combination)
        if verdict.rule != "protection-level":
            return verdict
        return dataclasses.replace(verdict, rule="no-managed-hsm", parameter="ProtectionLevel")

    replace_policy(monkeypatch, check)
    status, document = demo()
    assert status == 1
    assert [name(row) for row in rows_that(document, code="Unsupported.ProtectionLevel")] == [
        ("EC_SM2", "SM2PKE", "SOFTWARE", None)
    ]


def test_a_refusal_after_a_key_was_generated_fails(demo, monkeypatch, capsys):
    issue = imports.ImportService.get_parameters_for_import

    def generate_first(self, cmk, spec, algorithm):
        pair = (WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE)
        expires_at = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
        self._issue(self._backend_of(cmk), cmk, *pair, expires_at)
        return issue(self, cmk, spec, algorithm)

    monkeypatch.setattr(imports.ImportService, "get_parameters_for_import", generate_first)
    assert main(["demo", "--backend", "software"]) == 1
    assert capsys.readouterr().out.count("key pairs generated: 1 instead of 0") == len(REFUSED)


class FakeToken(SoftwareBackend):
    """Replaces the PKCS#11 backend in tests that need no HSM token."""

    initialised: ClassVar = None

    @classmethod
    def initialise_keys(cls, settings, *, so_pin_file):
        assert cls.initialised is None
        cls.initialised = (dict(settings), so_pin_file)
        return KeySetInfo("1", current=True, detail="fake")

    def mac(self, data):
        if self.initialised is None:
            raise ConfigurationError("the token has no keys")
        return super().mac(data)


class TestOnAToken:
    VARIABLES: ClassVar = {
        "HSMWRAP_PKCS11_MODULE": "/lib/module.so",
        "HSMWRAP_TOKEN_LABEL": "hsmwrap",
        "HSMWRAP_PIN_FILE": "/pins/user",
    }
    SETTINGS: ClassVar = {
        "module": "/lib/module.so",
        "token_label": "hsmwrap",
        "pin_file": "/pins/user",
    }

    @pytest.fixture
    def opened(self, monkeypatch, one_rsa_pair):
        opened = {}

        def open_backend(kind, settings):
            opened[kind] = settings
            if kind == "software":
                return SoftwareBackend.from_settings(settings)
            return FakeToken.from_settings({"serve_hsm_level": True})

        monkeypatch.setattr(registry, "open_backend", open_backend)
        monkeypatch.setattr(registry, "load", lambda _name: FakeToken)
        monkeypatch.setattr(FakeToken, "initialised", None)
        monkeypatch.delenv("HSMWRAP_SO_PIN_FILE", raising=False)
        for variable, value in self.VARIABLES.items():
            monkeypatch.setenv(variable, value)
        return opened

    def test_each_protection_level_selects_its_backend(self, opened, run_json):
        status, _ = run_json("demo")
        assert status == 0
        assert opened == {"software": {}, "pkcs11": self.SETTINGS}
        assert FakeToken.initialised == (self.SETTINGS, None)

    def test_the_so_pin_file_is_handed_on(self, opened, run_json, monkeypatch):
        monkeypatch.setenv("HSMWRAP_SO_PIN_FILE", "/pins/so")
        run_json("demo")
        assert FakeToken.initialised == (self.SETTINGS, "/pins/so")

    def test_a_token_that_has_its_keys_keeps_them(self, opened, run_json):
        FakeToken.initialised = "before"
        assert run_json("demo")[0] == 0
        assert FakeToken.initialised == "before"

    def test_settings_come_from_a_file_for_any_plug_in(self, opened, run_json, tmp_path):
        file = tmp_path / "acme.toml"
        file.write_text('slot = 3\nzones = ["a"]\n')
        status, document = run_json("demo", "--backend", "acme", "--settings", str(file))
        assert (status, document["ok"]) == (0, True)
        assert opened == {"software": {}, "acme": {"slot": 3, "zones": ["a"]}}
        assert FakeToken.initialised == ({"slot": 3, "zones": ["a"]}, None)

    @pytest.mark.parametrize("variable", VARIABLES)
    def test_a_missing_variable_is_named(self, opened, variable, monkeypatch, capsys):
        monkeypatch.setenv(variable, "")
        assert main(["demo"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"hsmwrap: no token is configured: {variable} not set")
        assert not opened


def test_a_missing_client_stops_the_demo_before_anything_is_opened(monkeypatch, capsys):
    def open_backend(*_):
        raise AssertionError

    def require():
        raise ConfigurationError("no openssl")

    monkeypatch.setattr(registry, "open_backend", open_backend)
    monkeypatch.setattr("hsmwrap.cli.demo.OPENSSL", dataclasses.replace(OPENSSL, require=require))
    assert main(["demo"]) == 2
    assert capsys.readouterr() == ("", "hsmwrap: no openssl\n")
