"""Key sets in another HSM token, by files: each token has processes of its own."""

import base64
import json
import secrets
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pkcs11 import exceptions as ck
from pkcs11.constants import Attribute, MechanismFlag, ObjectClass
from pkcs11.mechanisms import KeyType, Mechanism
from support.pkcs11.attacker import KEY_FUNCTION_NOT_PERMITTED, SHA1_OAEP, Attacker, readable
from support.pkcs11.clone_user import MATERIAL, sealed_on, used_on
from support.services.softhsm import two_slots as make_two_slots

from hsmwrap.checkvalue import check_value
from hsmwrap.errors import ConfigurationError, UnsupportedOperation
from hsmwrap.pkcs11.keysets.cloning import TransportKey, WrappedSets, _public_numbers
from hsmwrap.pkcs11.keysets.keys import ROLES, Role
from hsmwrap.pkcs11.keysets.movability import ONLY_UNDER_TRUSTED
from hsmwrap.registry import KeySetManager
from hsmwrap.testing.softhsm import SoftHsm, SoftHsmError


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A token in a directory of its own: this process never sees it."""
    return SoftHsm.make(tmp_path_factory.mktemp("target"), "target")


class Steps:
    """The three steps, as an operator does them."""

    def __init__(self, source, target, prefix, directory):
        self.source, self.target, self.prefix = source, target, prefix
        self.transport_file, self.exported_file = directory / "transport", directory / "exported"

    def transport_key(self):
        self.transport_file.unlink(missing_ok=True)
        out = ("--out", str(self.transport_file))
        shown = json.loads(self.target.run_keys("transport-key", self.prefix, *out))
        self.transport_fingerprint = shown["fingerprint"]

    def export(self, fingerprint=None):
        self.exported_file.unlink(missing_ok=True)
        files = ("--file", str(self.transport_file), "--out", str(self.exported_file))
        confirmed = ("--fingerprint", fingerprint or self.transport_fingerprint)
        shown = json.loads(self.source.run_keys("export", self.prefix, *files, *confirmed))
        self.fingerprint = shown["fingerprint"]

    def import_(self, fingerprint=None):
        confirmed = ("--fingerprint", fingerprint or self.fingerprint)
        file = ("--file", str(self.exported_file))
        return sets(self.target.run_keys("import", self.prefix, *file, *confirmed))

    def listed(self):
        return sets(self.target.run_keys("list", self.prefix))

    def changed(self, change):
        """Change the exported file; its fingerprint is that of the changed one."""
        document = json.loads(self.exported_file.read_text())
        change(document)
        self.exported_file.write_text(json.dumps(document))
        self.fingerprint = WrappedSets.from_json(self.exported_file.read_text()).fingerprint


def sets(printed):
    return [(each["key_set"], each["current"]) for each in json.loads(printed)["key_sets"]]


def exported(source, target, directory):
    """Up to the exported file."""
    prefix = f"clone-{secrets.token_hex(4)}"
    source.run_keys("init", prefix)
    made = Steps(source, target, prefix, directory)
    made.transport_key()
    made.export()
    return made


@pytest.fixture
def steps(softhsm, target, tmp_path):
    return exported(softhsm, target, tmp_path)


@pytest.fixture(scope="module")
def refused_once(softhsm, target, tmp_path_factory):
    return exported(softhsm, target, tmp_path_factory.mktemp("refused"))


@pytest.fixture
def refused(refused_once, tmp_path):
    """For tests that import nothing: their files are their own, the token's keys are shared."""
    one = Steps(refused_once.source, refused_once.target, refused_once.prefix, tmp_path)
    one.transport_file.write_text(refused_once.transport_file.read_text())
    one.exported_file.write_text(refused_once.exported_file.read_text())
    one.transport_fingerprint = refused_once.transport_fingerprint
    one.fingerprint = refused_once.fingerprint
    return one


def require_used(token, prefix, directory, sealed):
    """Keys, messages, import tokens and ciphertexts from elsewhere serve here."""
    done = used_on(token, prefix, sealed, directory)
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    assert bytes.fromhex(used["message"]) == b"message"
    assert bytes.fromhex(used["check_value"]) == check_value(MATERIAL)


@pytest.fixture(scope="module")
def two_slots(tmp_path_factory):
    """Two tokens of one module, with PINs of their own."""
    tokens = make_two_slots(tmp_path_factory.mktemp("slots"))
    assert len({Path(each.environment["HSMWRAP_PIN_FILE"]).read_text() for each in tokens}) == 2
    return tokens


@pytest.fixture(params=["another directory", "another slot"])
def two_tokens(request, softhsm, target):
    if request.param == "another slot":
        return request.getfixturevalue("two_slots")
    return softhsm, target


def test_what_was_sealed_on_one_token_opens_on_the_other_and_back(two_tokens, tmp_path):
    """Keys, messages, import tokens, ciphertexts; and the clone is a set like any other."""
    first = exported(*two_tokens, tmp_path)
    source, target, prefix = *two_tokens, first.prefix
    sealed = sealed_on(source, prefix, tmp_path)
    assert first.import_() == [("1", True)]
    require_used(target, prefix, tmp_path, sealed)
    require_used(source, prefix, tmp_path, sealed_on(target, prefix, tmp_path))
    assert sets(target.run_keys("rotate", prefix)) == [("1", False), ("2", True)]
    sealed = sealed_on(target, prefix, tmp_path)
    back = Steps(target, source, prefix, tmp_path)
    back.transport_key()
    back.export()
    assert back.import_() == [("1", False), ("2", True)]
    require_used(source, prefix, tmp_path, sealed)


def test_without_the_clone_it_does_not_open(softhsm, target, tmp_path):
    """The control: another key set of the same number."""
    prefix = f"other-{secrets.token_hex(4)}"
    for token in (softhsm, target):
        token.run_keys("init", prefix)
    sealed = sealed_on(softhsm, prefix, tmp_path)
    require_used(softhsm, prefix, tmp_path, sealed)
    assert used_on(target, prefix, sealed, tmp_path).returncode != 0


def test_a_set_that_is_there_is_left_alone_and_a_transport_key_serves_once(steps):
    steps.import_()
    steps.source.run_keys("rotate", steps.prefix)
    steps.export()
    with pytest.raises(SoftHsmError, match="another transport key"):
        steps.import_()
    assert steps.listed() == [("1", True)]
    steps.transport_key()
    steps.export()
    assert steps.import_() == [("1", False), ("2", True)]


# --- what is refused ------------------------------------------------------------------------------


def flip_a_bit(document):
    blobs = document["key_sets"][0]["keys"]
    blob = blobs[str(Role.MATERIAL_AES)]
    blobs[str(Role.MATERIAL_AES)] = ("A" if blob[0] != "A" else "B") + blob[1:]


def swap_two(document):
    blobs = document["key_sets"][0]["keys"]
    blobs[str(Role.MAC)] = blobs[str(Role.MATERIAL_AES)][:-8] + "AAAAAA=="


def seal_by_another(document):
    proof = document["key_sets"][0]["proof"]
    proof["sealed"] = document["key_sets"][0]["keys"][str(Role.MAC)]


def authenticate_by_another(document):
    document["key_sets"][0]["proof"]["tag"] = base64.b64encode(bytes(32)).decode()


@pytest.mark.parametrize("change", [seal_by_another, authenticate_by_another])
def test_a_set_that_does_not_open_what_it_opened_before_does_not_count(steps, change):
    """Where the file's fingerprint was confirmed all the same: the control is the test above."""
    steps.changed(change)
    with pytest.raises(SoftHsmError, match="does not open or authenticate what it did before"):
        steps.import_()
    assert steps.listed() == []


@pytest.mark.parametrize("change", [flip_a_bit, swap_two])
def test_a_changed_file_leaves_nothing(refused, change):
    """By its fingerprint; and where that was confirmed all the same, by the HSM token."""
    confirmed = refused.fingerprint
    refused.changed(change)
    with pytest.raises(SoftHsmError, match="not the one that was confirmed"):
        refused.import_(confirmed)
    with pytest.raises(SoftHsmError, match="does not unwrap"):
        refused.import_()
    assert refused.listed() == []


def test_a_file_for_another_target_is_refused(refused):
    refused.target = SoftHsm.make(refused.transport_file.parent / "another", "another")
    with pytest.raises(SoftHsmError, match="another transport key"):
        refused.import_()
    assert refused.listed() == []


def test_another_transport_key_than_the_one_that_was_confirmed_is_refused(refused):
    with pytest.raises(SoftHsmError, match="not the one that was confirmed"):
        refused.export("0" * 64)
    assert not refused.exported_file.exists()


def test_another_set_of_the_same_number_is_not_replaced(steps):
    steps.target.run_keys("init", steps.prefix)
    with pytest.raises(SoftHsmError, match="another key set 1"):
        steps.import_()
    assert steps.listed() == [("1", True)]


def test_sets_that_are_not_trusted_are_not_exported(refused):
    refused.prefix = f"clone-{secrets.token_hex(4)}"
    refused.source.run_keys("init", refused.prefix, trusted=False)
    with pytest.raises(SoftHsmError, match="no key set whose keys can leave it"):
        refused.export()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "hsmwrap-key-sets/9"}', "[" * 100_000]
)
def test_a_file_of_something_else_is_refused(text):
    with pytest.raises(ConfigurationError, match="not a file of key sets"):
        WrappedSets.from_json(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda each: each["keys"].pop("mac"),
        lambda each: each["keys"].update(other="AA=="),
        lambda each: each["keys"].update(mac="A"),
        lambda each: each.update(number=0),
        lambda each: each.update(number=65_536),
        lambda each: each.update(made_by="a:b"),
        lambda each: each.pop("cipher"),
        lambda each: each["proof"].pop("tag"),
        lambda each: each["proof"].update(sealed=None),
    ],
)
def test_an_incomplete_key_set_is_refused(change):
    keys = {str(role): "AA==" for role in ROLES}
    proof = {"sealed": "AA==", "tag": "AA=="}
    each = {"number": 1, "made_by": "ab", "cipher": "AES", "keys": keys, "proof": proof}
    document = {"format": "hsmwrap-key-sets/1", "transport_key": "00", "key_sets": [each]}
    WrappedSets.from_json(json.dumps(document))
    change(each)
    with pytest.raises(ConfigurationError, match="not a file of key sets"):
        WrappedSets.from_json(json.dumps(document))


def test_a_plug_in_that_does_not_clone_says_so(tmp_path):
    key_sets = KeySetManager("software", {"keyring_file": str(tmp_path / "keyring")})
    with pytest.raises(UnsupportedOperation, match="does not clone key sets"):
        key_sets.make_transport_key()


# --- the holder of the user PIN, with the file ----------------------------------------------------


@pytest.fixture
def here(softhsm, tmp_path):
    """A transport key on this process's token, and an export for it."""
    return exported(softhsm, softhsm, tmp_path)


@pytest.fixture
def attacker(softhsm):
    attacker = Attacker(softhsm)
    yield attacker
    attacker.clean_up()
    attacker.close()


def wrapped_keys(here):
    (one,) = WrappedSets.from_json(here.exported_file.read_text()).sets
    return one.keys.values()


def test_a_careless_transport_key_opens_the_file(attacker):
    """The control: an RSA key that unwraps without a template of its own."""
    public, private = attacker.naive_pair()
    known, value = attacker.known_key(EXTRACTABLE=True)
    blob = public.wrap_key(known, mechanism=Mechanism.RSA_PKCS_OAEP, mechanism_param=SHA1_OAEP)
    wanted = readable(ObjectClass.SECRET_KEY, KeyType.AES)
    arguments = (blob, wanted, Mechanism.RSA_PKCS_OAEP, SHA1_OAEP)
    assert attacker.unwrap(private, *arguments)[Attribute.VALUE] == value


def test_the_holder_of_the_pin_can_do_nothing_with_transport_key_and_file(here, attacker):
    transport = attacker.ours(CLASS=ObjectClass.PRIVATE_KEY, LABEL=f"{here.prefix}:transport")
    wanted = readable(ObjectClass.SECRET_KEY, KeyType.AES)
    asked = {**wanted, Attribute.SENSITIVE: True, **ONLY_UNDER_TRUSTED}
    idle = (Attribute.ENCRYPT, Attribute.DECRYPT, Attribute.DERIVE, Attribute.VERIFY)
    # As the key set would have it, but not trusted: it would unwrap blobs into readable objects.
    untrusted = {**asked, Attribute.UNWRAP: True, **dict.fromkeys(idle, False)}
    for blob in wrapped_keys(here):
        for template in (wanted, asked, untrusted, untrusted | {Attribute.DECRYPT: True}):
            arguments = (blob, template, Mechanism.RSA_PKCS_OAEP, SHA1_OAEP)
            with attacker.refused(ck.TemplateInconsistent):
                attacker.unwrap(transport, *arguments)
        for mechanism, parameter in (
            (Mechanism.RSA_PKCS_OAEP, SHA1_OAEP),
            (Mechanism.RSA_X_509, None),
        ):
            with pytest.raises(ck.PKCS11Error) as caught:
                transport.decrypt(blob, mechanism=mechanism, mechanism_param=parameter)
            assert KEY_FUNCTION_NOT_PERMITTED in str(caught.value)


def test_a_user_cannot_make_a_public_key_trusted(attacker):
    template = {Attribute.TRUSTED: True, Attribute.TOKEN: False}
    with pytest.raises(ck.AttributeReadOnly):
        attacker.session.generate_keypair(
            KeyType.RSA, 2048, capabilities=MechanismFlag.WRAP, public_template=template
        )


def test_a_transport_key_with_another_exponent_is_refused():
    numbers = rsa.generate_private_key(65537, 3072).public_key().public_numbers()
    for exponent in (3, 2**32 + 1):
        odd = rsa.RSAPublicNumbers(exponent, numbers.n).public_key()
        der = odd.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        with pytest.raises(ConfigurationError, match="exponent 65537"):
            _public_numbers(TransportKey(der))
