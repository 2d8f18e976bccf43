"""What an HSM token can do, found out by doing it: mechanism lists do not say (field note 8).

What is used is what is tried: for each wrapping algorithm an import with known answers, by the code
that imports, from ciphertext over check value to use. A step that fails removes what needs it,
is told, and the next best way is tried. Everything is done in one session, once per backend, with
session objects where the HSM token has them, and with one RSA pair.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any, TypeVar

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pkcs11.constants import Attribute
from pkcs11.exceptions import PKCS11Error
from pkcs11.mechanisms import KeyType, Mechanism

from hsmwrap.backend import Custody, Exposure, FailedTrial, PrivateKeyRef, Protection
from hsmwrap.catalog import KeySpec, WrappingAlgorithm
from hsmwrap.checkvalue import check_value
from hsmwrap.errors import (
    HsmwrapError,
    InvalidCiphertext,
    InvalidKeyMaterial,
    ProtectionNotKept,
)
from hsmwrap.pkcs11.binding import objects, traits
from hsmwrap.pkcs11.binding.gcm import Gcm
from hsmwrap.pkcs11.binding.objects import Way
from hsmwrap.pkcs11.binding.profiles import VendorSm2
from hsmwrap.pkcs11.binding.returncodes import answer_of, mechanism_name, recovery_of, said
from hsmwrap.pkcs11.binding.templates import (
    Template,
    for_unwrap,
    private_key,
    secret_key,
    stored,
)
from hsmwrap.pkcs11.binding.traits import AES, DATA_SPECIFIED, BlockCipher
from hsmwrap.pkcs11.binding.trials import refuses_changed
from hsmwrap.pkcs11.keysets import hardening
from hsmwrap.pkcs11.keysets.keys import KeySets, Role
from hsmwrap.pkcs11.sessions.session import PendingObject, PooledSession
from hsmwrap.pkcs11.settings import Pkcs11Settings, WrappingCustody
from hsmwrap.pkcs11.wrapping import protections, sm2
from hsmwrap.pkcs11.wrapping import rsa as rsa_keys
from hsmwrap.pkcs11.wrapping.custody import WrappingKeyStore, new_object_id
from hsmwrap.pkcs11.wrapping.features import (
    RSA_ALGORITHMS,
    CheckMethod,
    ImportPath,
    Row,
    TokenFeatures,
    check_methods,
    oaep_hash,
)
from hsmwrap.pkcs11.wrapping.material import (
    HostMaterial,
    MaterialSource,
    MaterialStore,
    kept_open,
    material_custody,
)
from hsmwrap.pkcs11.wrapping.use import (
    SM4_DATA,
    SM4_KEY,
    SM4_NONCE,
    SM4_PLAINTEXT,
    SM4_SEALED,
    MessageCipher,
    sm4_ciphers,
)
from hsmwrap.sm2 import Layout, Sm2Ciphertext, decode_spki, sm2_kdf, sm3
from hsmwrap.sm2.curve import GX, GY
from hsmwrap.sm2.kdf import xor

_T = TypeVar("_T")
_AES_128, _AES_256 = 16, 32
_BROKEN_CIPHERTEXTS = 3
_SEALED, _RESIDENT = Custody.HSM_ENCRYPTED_DATABASE, Custody.HSM_INTERNAL
_KEY_ENCRYPTION_ROLES = tuple(role for role in Role if role is not Role.MAC)
_UNKNOWN = "its length or its check value cannot be told without bringing it into the host"
_USES = (Attribute.UNWRAP, Attribute.DECRYPT)


class _Wrong(Exception):
    """The HSM token answered, but not what it had to."""


class _Asked(Exception):
    """Handled while trials run."""


@dataclass(frozen=True, slots=True)
class _Try:
    """One way of importing, to be tried."""

    algorithm: WrappingAlgorithm
    row: Row
    private: Any
    encrypt: Callable[[bytes], Any]


def probe(
    pooled: PooledSession,
    keys: KeySets,
    settings: Pkcs11Settings,
    gcm: Gcm,
    vendor: VendorSm2 | None = None,
) -> TokenFeatures:
    """Try everything that the backend might want to do.

    Args:
        pooled: A session to work in.
        keys: The backend's own keys.
        settings: How keys are to be kept.
        gcm: How the backend will use imported keys.
        vendor: The vendor's SM2, if the profile names some.

    Raises:
        PKCS11Error: A return code that says something about the connection, not the token.
        ConfigurationError: The HSM token has no current key set.
    """
    trials = Probe(pooled, keys, settings, gcm, vendor)
    try:
        # Else what the caller handles would be the context of errors, and taken for an answer.
        raise _Asked  # noqa: TRY301  # handled at once
    except _Asked:
        try:
            return trials.run()
        finally:
            trials.clean_up()


class Probe:
    """The trials; :attr:`features` is what they have found until now."""

    def __init__(
        self,
        pooled: PooledSession,
        keys: KeySets,
        settings: Pkcs11Settings,
        gcm: Gcm,
        vendor: VendorSm2 | None,
    ) -> None:
        """Try nothing yet."""
        self.features = TokenFeatures()
        self._pooled = pooled
        self._session = pooled.session
        self._keys = keys
        self._settings = settings
        self._gcm = gcm
        self._vendor = vendor
        self._number = 0
        self._known_ways: set[str] = set()
        self._made: list[Any] = []
        self._failed: list[FailedTrial] = []

    def run(self) -> TokenFeatures:
        """Try everything; returns what was found."""
        self._number = self._keys.current(self._pooled)
        keks = list(filter(None, map(self._own, _KEY_ENCRYPTION_ROLES)))
        refused = hardening.missing_on(keks[0]) if keks else self._refused()
        self._found(refused=refused, sm4=self._settings.sm4 is not None)
        self._basics()
        aes = self.features.cipher.key_type == KeyType.AES
        self._found(key_specs=frozenset(KeySpec if aes else {KeySpec.ALIYUN_SM4}))
        pair = self._rsa_pair()
        tried = self._protections(pair and pair[1])
        self._found(refused=refused | protections.useless(tried), protections=tried)
        self._rsa(pair)
        self._sm2()
        if not self.features.rows:
            self._found(ciphers=MappingProxyType({}), key_specs=frozenset())
        self._found(failed=tuple(self._failed))
        return self.features

    def clean_up(self) -> None:
        """Destroy what was made; what cannot be destroyed goes with the session."""
        for key in self._made:
            try:
                key.destroy()
            except PKCS11Error as error:
                if recovery_of(error) is not None:
                    raise

    # --- how a trial is made -----------------------------------------------------------------

    def _try(self, attempt: Callable[[], _T], failed: Callable[[Exception], None]) -> _T | None:
        # The answer is kept for as long as the backend is open: what fails once may work again.
        for again in (True, False):
            try:
                return attempt()
            except (PKCS11Error, HsmwrapError, _Wrong) as error:
                if _speaks_of_the_connection(error):
                    raise _answer_behind(error) from None
                if not again or isinstance(error, ProtectionNotKept):
                    failed(error)
                    break
        return None

    def _step(self, step: str, attempt: Callable[[], _T], consequence: str = "") -> _T | None:
        """Make a trial that is told of if it fails; None if it does."""
        return self._try(
            attempt, lambda error: self._failed.append(failed_trial(step, error, consequence))
        )

    def _works(self, attempt: Callable[[], object]) -> bool:
        return bool(self._try(attempt, lambda _error: None))

    def _found(self, **what: Any) -> None:
        self.features = replace(self.features, **what)

    def _own(self, role: Role) -> Any:
        return self._keys.find(self._pooled, role, self._number)

    def _keep(self, key: _T) -> _T:
        self._made.append(key)
        return key

    def _placed(self, template: Template) -> Template:
        """The template of an object that can be made: a token object where no other exists."""
        if self.features.session_objects:
            return template
        return stored(template, new_object_id(), f"{self._settings.key_prefix}:probe")

    # --- what does not depend on an algorithm ------------------------------------------------

    def _refused(self) -> frozenset[Attribute]:
        """Hardening attributes that the token refuses, tried on a key that it generates."""
        for cipher in traits.here().ciphers:
            attempt = partial(hardening.refused_by, self._session, cipher)
            refused = self._try(attempt, lambda _error: None)  # told in what follows
            if refused is not None:
                return refused
        return hardening.NOTHING

    def _key(
        self,
        cipher: BlockCipher,
        *uses: Attribute,
        length: int | None = None,
        extractable: bool = False,
    ) -> Any:
        template = secret_key(
            cipher.key_type, *uses or (Attribute.ENCRYPT,), extractable=extractable
        )
        placed = self.features.fit(self._placed(template))
        return self._keep(objects.generate_key(self._session, placed, length or cipher.length))

    def _makes(self) -> tuple[list[BlockCipher], list[tuple[BlockCipher, Exception]]]:
        """The ciphers whose keys the token generates, and what it answered for the others."""
        made: list[BlockCipher] = []
        failed: list[tuple[BlockCipher, Exception]] = []
        for cipher in traits.here().ciphers:

            def tell(error: Exception, cipher: BlockCipher = cipher) -> None:
                failed.append((cipher, error))

            if self._try(partial(self._key, cipher), tell) is not None:
                made.append(cipher)
        return made, failed

    def _makes_mac_key(self) -> Any:
        template = self.features.fit(secret_key(KeyType.GENERIC_SECRET, Attribute.SIGN))
        mechanism = Mechanism.GENERIC_SECRET_KEY_GEN
        made = objects.generate_key(self._session, template, _AES_256, mechanism=mechanism)
        return self._keep(made)

    def _basics(self) -> None:
        made, failed = self._makes()
        if not made and not self._works(self._makes_mac_key):
            step = "make a session object"
            consequence = "Wrapping keys and imported keys are token objects, and no key is sealed."
            self._failed.append(failed_trial(step, failed[0][1], consequence))
            self._found(session_objects=False)
            made, failed = self._makes()
        self._found(cipher=made[0] if made else AES)
        for cipher, error in failed:
            consequence = f"No key is sealed by {cipher.name} keys."
            if cipher.key_type == KeyType.AES:
                consequence += " Aliyun_AES_256 keys are not imported."
            self._failed.append(failed_trial(f"make an {cipher.name} key", error, consequence))
        if self.features.session_objects:
            self._key_wrap(made)
        self._check_method()
        creates = self._step(
            f"make an {self.features.cipher.name} key by C_CreateObject",
            self._create,
            "Material that comes through the host does not become a key: pairs that are not "
            "unwrapped inside the HSM token are not served.",
        )
        self._found(creates_keys=bool(creates))

    def _create(self) -> bool:
        cipher = self.features.cipher
        template = self._placed(secret_key(cipher.key_type, Attribute.ENCRYPT, extractable=True))
        value = secrets.token_bytes(cipher.length)
        self._keep(objects.create(self._session, self.features.fit(template), value))
        return True

    def _key_wrap(self, ciphers: Iterable[BlockCipher]) -> None:
        """Find out what key sets wrap by: the current one, and those before it."""
        of_current = self._keys.cipher_of(self._number)
        for cipher in ciphers:
            failed: list[Exception] = []
            for mechanism in cipher.key_wraps:
                attempt = partial(self._wrapped_lengths, cipher, mechanism)
                lengths = self._try(attempt, failed.append)
                if lengths:
                    wraps = {**self.features.key_wraps, cipher.key_type: mechanism}
                    self._found(key_wraps=MappingProxyType(wraps))
                    if cipher.key_type == of_current.key_type:
                        self._found(wrapped_lengths=MappingProxyType(lengths))
                    break
            else:
                step, consequence = f"wrap an {cipher.name} key", "No key is sealed."
                if cipher.key_type != of_current.key_type:
                    consequence = f"No key is sealed by {cipher.name} keys."
                self._failed += [failed_trial(step, error, consequence) for error in failed]

    def _wrapped_lengths(self, cipher: BlockCipher, mechanism: Mechanism) -> dict[int, int]:
        kek, of = self._key(cipher, Attribute.WRAP, Attribute.UNWRAP), self.features.cipher
        lengths: dict[int, int] = {}
        for length in of.lengths:
            key = self._key(of, length=length, extractable=True)
            blob = kek.wrap_key(key, mechanism=mechanism)
            becomes = self.features.fit(secret_key(of.key_type, Attribute.ENCRYPT))

            def unwrap(way: Way, blob: bytes = blob) -> None:
                self._unwrapped(kek, blob, becomes, mechanism, way)  # noqa: B023

            self._by_way("sealed_secret", unwrap)
            lengths[length] = len(blob)
        known = self.features.ways.sealed_secret
        if not refuses_changed(blob, lambda changed: unwrap(known, changed)):
            raise _Wrong("a wrapped key unwraps that was changed")
        if len({*lengths.values()}) != len(lengths):
            raise _Wrong("keys of 16 and 32 bytes have the same length when they are wrapped")
        return lengths

    def _unwrapped(
        self, kek: Any, blob: bytes, becomes: Template, mechanism: Mechanism, way: Way
    ) -> None:
        self._keep(objects.unwrap(kek, blob, becomes, mechanism=mechanism, way=way))

    def _by_way(self, what: str, attempt: Callable[[Way], _T]) -> _T:
        """Find out by the first unwrapping which way the HSM token needs for this kind."""
        if what in self._known_ways:
            return attempt(getattr(self.features.ways, what))
        not_kept: Exception | None = None
        for way in Way:
            try:
                result = attempt(way)
            except ProtectionNotKept as error:
                not_kept = not_kept or error
            except (PKCS11Error, HsmwrapError) as error:
                if not_kept is None or _speaks_of_the_connection(error):
                    raise
            else:
                self._found(ways=replace(self.features.ways, **{what: way}))
                self._known_ways.add(what)
                return result
        raise not_kept or _Wrong("no way")

    def _check_method(self) -> None:
        methods = check_methods(self.features.cipher)
        for method, then in zip(methods, (*methods[1:], None), strict=True):
            consequence = (
                f"The check value is computed by {mechanism_name(then.mechanism)}."
                if then
                else "The check value is computed in the host, where the material is; nothing is "
                "unwrapped inside the HSM token."
            )
            step = f"compute a check value by {mechanism_name(method.mechanism)}"
            if self._step(step, partial(self._encrypts, method), consequence):
                self._found(check=method)
                return

    def _encrypts(self, method: CheckMethod) -> bool:
        value = method.of(self._key(self.features.cipher))
        if len(value) != len(method.block):
            raise _Wrong(f"one block became {len(value)} bytes")
        return True

    # --- RSA ---------------------------------------------------------------------------------

    def _rsa_pair(self) -> tuple[bytes, Any] | None:
        """DER public key and private key of a pair for all rows; extractable if possible."""
        for extractable in (True, False):
            template = private_key(KeyType.RSA, *_USES, extractable=extractable)
            fitting = self.features.fit(self._placed(template))
            kind = "extractable" if extractable else "unextractable"
            step = f"generate an RSA pair with an {kind} private key"
            consequence = "RSA wrapping keys are not sealed." if extractable else "No RSA."
            made = self._step(step, partial(self._pair, fitting), consequence)
            if made is not None:
                return made
        return None

    def _pair(self, template: Template) -> tuple[bytes, Any]:
        public, private = rsa_keys.generate(
            self._session, template, None if self.features.session_objects else self._placed({})
        )
        self._made += [public, private]
        return rsa_keys.public_key_der(public), private

    def _rsa(self, pair: tuple[bytes, Any] | None) -> None:
        if pair is None:
            for algorithm in RSA_ALGORITHMS:
                self._told(algorithm, self._failed[-1:])
            return
        der, private = pair
        client = load_der_public_key(der)
        assert isinstance(client, rsa.RSAPublicKey)  # noqa: S101  # what rsa_keys.generate makes
        held = _Held(self, private)
        for algorithm in RSA_ALGORITHMS:
            self._rsa_row(algorithm, client, held)
        row = self.features.rows.get(WrappingAlgorithm.RSAES_PKCS1_V1_5)
        if row is not None:
            served = {row.path}
            if self._works(partial(self._decrypts, private, client)):
                served.add(ImportPath.DECRYPT)
            self._found(implicit_rejection=self._rejects_implicitly(private, client, served))

    @staticmethod
    def _decrypts(private: Any, client: rsa.RSAPublicKey) -> bool:
        message = secrets.token_bytes(_AES_256)
        ciphertext = client.encrypt(message, padding.PKCS1v15())
        return bool(private.decrypt(ciphertext, mechanism=Mechanism.RSA_PKCS) == message)

    def _rsa_row(self, algorithm: WrappingAlgorithm, client: rsa.RSAPublicKey, held: _Held) -> None:
        tried: list[FailedTrial] = []
        # PKCS#1 v1.5 is never decoded in the host, and has no parameters.
        oaep, module = oaep_hash(algorithm), traits.here()
        native = module.oaep_sources if oaep in module.oaep_hashes else ()
        if oaep is None:
            native = (DATA_SPECIFIED,)
        ways = [(p, source) for p in (ImportPath.UNWRAP, ImportPath.DECRYPT) for source in native]
        ways += [(ImportPath.RAW, DATA_SPECIFIED)] if oaep else []
        for path, source in ways:
            attempt = partial(self._rsa_import, algorithm, path, source, client, held)
            answers: list[FailedTrial] = []
            if self._row(algorithm, path, attempt, answers):
                break
            # The other source field is of interest where it makes a difference.
            known = [replace(each, step="") for each in tried]
            odd = "" if source == DATA_SPECIFIED else f" (source field {source})"
            tried += [
                replace(each, step=each.step + odd)
                for each in answers
                if not odd or replace(each, step="") not in known
            ]
        self._told(algorithm, tried)

    def _rsa_import(
        self,
        algorithm: WrappingAlgorithm,
        path: ImportPath,
        source: int,
        client: rsa.RSAPublicKey,
        held: _Held,
    ) -> Row:
        encrypt = partial(client.encrypt, padding=_padding(algorithm))
        with held.by(path.role) as (custody, key):
            row = Row(path, custody, source)
            trial = _Try(algorithm, row, key, encrypt)
            if path is ImportPath.UNWRAP and not self._knows_unwrapped(trial):
                raise _Wrong(_UNKNOWN)
            self._rehearse(trial)
            return row

    def _knows_unwrapped(self, trial: _Try) -> bool:
        """Whether an unwrapped key's length and check value can be told."""
        if self.features.check is None:
            return False
        if not self.features.knows_length:
            self._found(value_length=bool(self._works(partial(self._value_length, trial))))
        return self.features.knows_length

    def _value_length(self, trial: _Try) -> bool:
        key_type = self.features.cipher.key_type
        becomes = self.features.fit(self._placed(secret_key(key_type, Attribute.ENCRYPT)))

        def unwrapped(way: Way) -> Any:
            features = replace(self.features, ways=replace(self.features.ways, material=way))
            source = self._source(features, trial, bytes(_AES_128), KeySpec.ALIYUN_SM4)
            return self._keep(source.make_object(self._session, becomes))

        return bool(self._by_way("material", unwrapped)[Attribute.VALUE_LEN] == _AES_128)

    def _row(
        self,
        algorithm: WrappingAlgorithm,
        path: ImportPath,
        attempt: Callable[[], Row],
        tried: list[FailedTrial],
        form: str = "",
    ) -> bool:
        """Whether an import works; then it is a row, else told in ``tried``."""
        step = f"import by {algorithm}: {path.description}{form}"
        row = self._try(attempt, lambda error: tried.append(failed_trial(step, error)))
        if row is not None:
            self._found(rows=MappingProxyType({**self.features.rows, algorithm: row}))
        return row is not None

    def _told(self, algorithm: WrappingAlgorithm, tried: list[FailedTrial]) -> None:
        told = {**self.features.tried, algorithm: tuple(tried)}
        self._found(tried=MappingProxyType(told))

    # --- an import with known answers --------------------------------------------------------

    def _rehearse(self, trial: _Try) -> None:
        """Import as the backend does, and use the key.

        Raises:
            PKCS11Error, HsmwrapError: The HSM token does not do it.
            _Wrong: What came out is not what went in.
        """
        custody = material_custody(self._settings, self.features)
        sm4 = KeySpec.ALIYUN_SM4
        spec, wrong = KeySpec.ALIYUN_AES_256, _AES_128
        if spec not in self.features.key_specs:
            spec, wrong = sm4, _AES_256
        unwraps = trial.row.path.exposure is Exposure.IN_HSM
        by_sm2 = trial.algorithm is WrappingAlgorithm.SM2PKE
        kind = "sm2_material" if by_sm2 else "material"

        def first(way: Way) -> MaterialStore:
            ways = replace(self.features.ways, **{kind: way})
            features = replace(self.features, ways=ways)
            name, prefix = self._settings.name, self._settings.key_prefix
            store = MaterialStore(
                name, self._keys, prefix, custody, features, kept_open(self._settings)
            )
            self._import(store, trial, spec)
            return store

        store = self._by_way(kind, first) if unwraps else first(Way.AS_ASKED)
        if by_sm2 and trial.row.path is not ImportPath.DERIVE:  # else the host compares C3
            with suppress(InvalidKeyMaterial):
                self._import(store, _with_another_c3(trial), spec)
                raise _Wrong("a ciphertext passes whose C3 was changed")
        elif unwraps:  # else the host sees the length, which an SM2 ciphertext tells by its own
            with suppress(InvalidKeyMaterial):
                self._import(store, trial, spec, length=wrong)
                raise _Wrong(f"a key of {wrong} bytes passes for one of {spec.material_length}")
        others = self.features.key_specs - {spec}
        if sm4 in others and not self._imports_sm4(store, trial):
            self._found(key_specs=self.features.key_specs - {sm4})

    def _imports_sm4(self, store: MaterialStore, trial: _Try) -> bool:
        sm4 = KeySpec.ALIYUN_SM4
        step = f"import an {sm4} key by {trial.algorithm}"
        if self.features.sm4:
            if self._step(
                f"{step}, of the vendor's type",
                lambda: self._import(store, trial, sm4),
                f"{sm4} keys are kept as generic secrets and cannot be used.",
            ):
                return True
            ciphers = {s: each for s, each in self.features.ciphers.items() if s is not sm4}
            self._found(sm4=False, ciphers=MappingProxyType(ciphers))
        kept = replace(store, features=replace(store.features, sm4=False))
        attempt = partial(self._import, kept, trial, sm4)
        return bool(self._step(step, attempt, f"{sm4} keys are not imported."))

    def _import(
        self,
        store: MaterialStore,
        trial: _Try,
        key_spec: KeySpec,
        length: int | None = None,
    ) -> bool:
        material = secrets.token_bytes(length or key_spec.material_length)
        if key_spec is KeySpec.ALIYUN_SM4 and length is None:
            material = SM4_KEY
        source = self._source(store.features, trial, material, key_spec)
        pending = PendingObject(new_object_id())
        try:
            ref, check = store.make(self._pooled, source, key_spec, None, pending)
            if length is None and check != check_value(material, check[0]):
                raise _Wrong("the check value is not that of the material")
            usable = key_spec is KeySpec.ALIYUN_AES_256 or store.features.sm4
            if usable and length is None:
                with store.opened(self._pooled, ref) as key:
                    self._use(key, key_spec, material)
        except HsmwrapError as error:
            # As the cause: generators that it passes may replace its context.
            raise error from error.__context__
        finally:
            if pending.may_exist:
                self._pooled.destroy({Attribute.ID: pending.object_id})
        return True

    def _source(
        self, features: TokenFeatures, trial: _Try, material: bytes, key_spec: KeySpec
    ) -> MaterialSource:
        ciphertext, row = trial.encrypt(material), trial.row
        if row.path is ImportPath.VENDOR_UNWRAP:
            way = features.ways.sm2_material
            return sm2.wrapped_material(self._vendor, trial.private, lambda: ciphertext, way)
        if row.path is ImportPath.UNWRAP:
            return rsa_keys.wrapped_material(
                trial.private, trial.algorithm, ciphertext, features.ways.material, row.source
            )
        if isinstance(ciphertext, Sm2Ciphertext):
            decrypt = partial(sm2.decrypt, trial.private, ciphertext, self._vendor)
        else:
            decrypt = partial(
                rsa_keys.decrypt,
                trial.private,
                trial.algorithm,
                ciphertext,
                native=row.path is ImportPath.DECRYPT,
                source=row.source,
            )
        return HostMaterial(cache(decrypt), key_spec.material_length)

    def _use(self, key: Any, key_spec: KeySpec, material: bytes) -> None:
        """Encrypt with the imported key; an HSM token that cannot keeps keys all the same."""
        known = self.features.ciphers.get(key_spec)
        possible = self._ciphers(key_spec) if known is None else known
        works = [
            cipher
            for cipher, more in zip(possible, (*possible[1:], None), strict=False)
            if self._step(
                f"encrypt with an imported {key_spec} key by {cipher.name}",
                partial(self._encrypts_by, cipher, key, material, control=known is None),
                f"Imported {key_spec} keys encrypt by {more.name}."
                if more
                else f"Imported {key_spec} keys can be kept but not used.",
            )
        ]
        ciphers = {**self.features.ciphers, key_spec: tuple(works)}
        self._found(ciphers=MappingProxyType(ciphers))

    def _ciphers(self, key_spec: KeySpec) -> tuple[MessageCipher, ...]:
        if key_spec is KeySpec.ALIYUN_AES_256:
            return (self._gcm,)
        sm4 = self._settings.sm4
        return () if sm4 is None else sm4_ciphers(self._settings.module, sm4)

    def _encrypts_by(
        self, cipher: MessageCipher, key: Any, material: bytes, *, control: bool
    ) -> bool:
        nonce, message, data = secrets.token_bytes(12), secrets.token_bytes(24), b"a"
        expected = AESGCM(material).encrypt(nonce, message, data)
        if material == SM4_KEY:
            nonce, message, data = SM4_NONCE, SM4_PLAINTEXT, SM4_DATA
            expected = SM4_SEALED[cipher.version]
        if cipher.encrypt(key, nonce, message, data) != expected:
            raise _Wrong(f"the ciphertext is not that of {cipher.name} under the imported key")
        if cipher.decrypt(key, nonce, expected, data) != message:
            raise _Wrong(f"{cipher.name} does not decrypt what it encrypted")
        if control:
            with suppress(InvalidCiphertext):
                cipher.decrypt(key, nonce, expected, data + b"b")
                raise _Wrong(f"{cipher.name} decrypts under other additional data")
        return True

    # --- SM2 ---------------------------------------------------------------------------------

    def _sm2(self) -> None:
        algorithm = WrappingAlgorithm.SM2PKE
        by_vendor = self._vendor is not None and self._vendor.decrypt is not None
        paths = [ImportPath.VENDOR if by_vendor else ImportPath.DERIVE]
        if self._vendor is not None and self._vendor.unwrap is not None:
            paths.insert(0, ImportPath.VENDOR_UNWRAP)
        tried: list[FailedTrial] = []
        custodies = self.custodies()
        for path in paths:
            answers: list[FailedTrial] = []
            for custody in custodies:
                attempt = partial(self._sm2_import, path, custody)
                form = f" ({custody}, {self._sm2_form(path)})"
                if self._row(algorithm, path, attempt, answers, form):
                    break
            served = algorithm in self.features.rows
            remedy = "" if served or not custodies else self._other_layout(path, custodies[-1])
            tried += [replace(each, consequence=remedy) for each in answers]
            if served:
                break
        self._told(algorithm, tried)

    def _sm2_form(self, path: ImportPath) -> str:
        """What the HSM token is given, in words."""
        layout = self._layout(path)
        return "C1 as 04 x y" if layout is None else f"ciphertext as {layout}"

    def _layout(self, path: ImportPath) -> Layout | None:
        if self._vendor is None or path is ImportPath.DERIVE:
            return None
        unwraps = path is ImportPath.VENDOR_UNWRAP
        return self._vendor.unwrap_layout if unwraps else self._vendor.ciphertext

    def _other_layout(self, path: ImportPath, custody: Custody) -> str:
        """What the profile has to say where the vendor's mechanism takes another layout.

        Told and not used: it is the profile that says what a mechanism takes.
        """
        given = self._layout(path)
        if self._vendor is None or given is None:
            return ""
        for layout in (each for each in Layout if each is not given):
            vendor = replace(self._vendor, ciphertext=layout, unwrap_ciphertext=None)
            # Trials of their own, as what is found by them is not so with the settings that are.
            other = Probe(self._pooled, self._keys, self._settings, self._gcm, vendor)
            other.features, other._number = self.features, self._number
            works = other._works(partial(other._sm2_import, path, custody))
            self._made += other._made
            if works:
                return (
                    f"With {layout} it works: ciphertext (unwrap_ciphertext) under [sm2] of the "
                    "profile."
                )
        return ""

    def _sm2_import(self, path: ImportPath, custody: Custody) -> Row:
        row = Row(path, custody)
        if path is ImportPath.VENDOR_UNWRAP and self.features.check is None:
            raise _Wrong(_UNKNOWN)
        with self._sm2_key(path.role, custody) as (der, private):
            encrypt = partial(_encrypt_sm2, decode_spki(der))
            trial = _Try(WrappingAlgorithm.SM2PKE, row, private, encrypt)
            self._rehearse(trial)
        return row

    @contextmanager
    def _sm2_key(self, role: Role, custody: Custody) -> Iterator[tuple[bytes, Any]]:
        sealed, store = custody is _SEALED, self.store()
        template = self._keys.unwrapped_template(role)
        if sealed:
            template = store.sealing_template(role, trusted=self._keys.trusts(self._number))
        fitting = self.features.fit(self._placed(template))
        placed = None if self.features.session_objects else self._placed({})
        public, private = sm2.generate(self._session, fitting, self._vendor, placed)
        self._made += [public, private]
        der = sm2.public_key_der(public)
        if not sealed:
            yield der, private
            return
        ref = store.seal(self._pooled, role, private, self._number)
        self._opens(ref)
        with self.store().fetched(self._pooled, ref) as (_role, opened):
            yield der, opened

    # --- sealing -----------------------------------------------------------------------------

    def custodies(self) -> tuple[Custody, ...]:
        """How private wrapping keys can be kept, the best first, as far as is known by now."""
        wanted = self._settings.wrapping_custody
        sealed = (_SEALED,) if self.features.wraps_secret_keys else ()
        if wanted is WrappingCustody.AUTO:
            return (*sealed, _RESIDENT)
        return (_RESIDENT,) if wanted is WrappingCustody.HSM_INTERNAL else sealed

    def store(self) -> WrappingKeyStore:
        """The store of wrapping keys, as the backend has it."""
        return WrappingKeyStore(self._keys, self._settings.key_prefix, self.features)

    def _opens(self, ref: PrivateKeyRef) -> None:
        def opens(way: Way) -> None:
            ways = replace(self.features.ways, sealed_private=way)
            store = replace(self.store(), features=replace(self.features, ways=ways))
            with store.fetched(self._pooled, ref):
                pass

        self._by_way("sealed_private", opens)

    def sealed(self, role: Role, private: Any) -> PrivateKeyRef | None:
        """The private key, sealed under our own key of this role; None if it cannot be."""
        if _SEALED not in self.custodies():
            return None

        def attempt() -> PrivateKeyRef:
            ref = self.store().seal(self._pooled, role, private, self._number)
            self._opens(ref)
            return ref

        return self._step(
            f"seal an RSA private key under {self._keys.label(role, self._number)}",
            attempt,
            "RSA wrapping keys for this use are not sealed.",
        )

    # --- attributes and paddings -------------------------------------------------------------

    def _rejects_implicitly(
        self, private: Any, client: rsa.RSAPublicKey, served: Collection[ImportPath]
    ) -> bool:
        """Whether each of these functions makes random bytes of wrong padding."""
        mechanism, numbers = Mechanism.RSA_PKCS, client.public_numbers()
        # Not an AES key: the random bytes have a random length.
        becomes = for_unwrap(self.features.fit(self._placed(secret_key(KeyType.GENERIC_SECRET))))
        functions: Mapping[ImportPath, Callable[[bytes], Any]] = {
            ImportPath.UNWRAP: lambda c: self._keep(
                private.unwrap_key(key_data=c, mechanism=mechanism, **becomes)
            ),
            ImportPath.DECRYPT: lambda c: private.decrypt(c, mechanism=mechanism),
        }

        def accepted(function: Callable[[bytes], Any]) -> bool:
            # As a block it starts with 00 03 where 00 02 is due.
            block = int.from_bytes(b"\3" + secrets.token_bytes(254), "big")
            ciphertext = pow(block, numbers.e, numbers.n).to_bytes(256, "big")
            return self._works(lambda: function(ciphertext) is not None)

        # Several, as the random length may be one that cannot be a key: none.
        return bool(served) and all(
            any(accepted(functions[each]) for _ in range(_BROKEN_CIPHERTEXTS)) for each in served
        )

    def _sealing(self) -> BlockCipher:
        """Whose keys the key-encryption keys of the current set are."""
        own = self._keys.cipher_of(self._number)
        cipher = own if own.key_type in self.features.key_wraps else self.features.cipher
        return replace(cipher, key_wraps=(self.features.key_wrap(cipher),))

    def _extractable_sm2(self) -> Any:
        template = self._keys.unwrapped_template(Role.WRAPPING_SM2_UNWRAP)
        template = self.features.fit(self._placed(template | {Attribute.EXTRACTABLE: True}))
        placed = None if self.features.session_objects else self._placed({})
        pair = sm2.generate(self._session, template, self._vendor, placed)
        self._made += pair
        return pair[1]

    def _protections(self, rsa_private: Any) -> tuple[Protection, ...]:
        role, private = Role.WRAPPING_UNWRAP, rsa_private
        if private is None and self._vendor is not None and self._vendor.unwrap is not None:
            role = Role.WRAPPING_SM2_UNWRAP
            private = self._try(self._extractable_sm2, lambda _error: None)
        own = self._own(role)
        tried = own and protections.OwnKey(
            key=own,
            becomes=self._keys.unwrapped_template(role),
            private=private,
            trusted=self._keys.trusts(self._number),
        )
        return protections.tried(
            self._session,
            tried,
            lambda template: self.features.fit(self._placed(template)),
            cipher=self._sealing(),
            makes_trusted=self._keys.user_makes_trusted,
        )


class _Held:
    """The RSA private key as the rows use it: sealed, once for each role, or as it is."""

    def __init__(self, trials: Probe, private: Any) -> None:
        self._trials, self._private = trials, private
        self._refs: dict[Role, PrivateKeyRef | None] = {}

    @contextmanager
    def by(self, role: Role) -> Iterator[tuple[Custody, Any]]:
        """Custody and private key object for this role.

        Raises:
            _Wrong: The configuration asks for sealed keys, and the HSM token seals none.
        """
        if role not in self._refs:
            self._refs[role] = self._trials.sealed(role, self._private)
        ref = self._refs[role]
        if ref is not None:
            with self._trials.store().fetched(self._trials._pooled, ref) as (_role, key):  # noqa: SLF001
                yield _SEALED, key
        elif _RESIDENT in self._trials.custodies():
            yield _RESIDENT, self._private
        else:
            raise _Wrong("the configuration forbids resident wrapping keys, and none is sealed")


def failed_trial(step: str, error: Exception, consequence: str = "") -> FailedTrial:
    """What is told of a trial that ended with this error."""
    fault = _answer_behind(error)
    answer = answer_of(fault) if isinstance(fault, PKCS11Error) else None
    if answer is None:
        wrong = said(fault) if isinstance(fault, PKCS11Error) else str(fault)
        return FailedTrial(step, wrong=wrong or type(error).__name__, consequence=consequence)
    mechanism = None if answer.mechanism is None else mechanism_name(answer.mechanism)
    return FailedTrial(step, answer.function, mechanism, answer.code, consequence=consequence)


def _answer_behind(error: Exception) -> BaseException:
    """The HSM token's answer, also where it was mapped to a client's error."""
    behind: BaseException | None = error
    while isinstance(behind, HsmwrapError):  # one hides another where a stand-in failed too
        behind = behind.__cause__ or behind.__context__
    return behind if isinstance(behind, PKCS11Error) else error


def _speaks_of_the_connection(error: Exception) -> bool:
    fault = _answer_behind(error)
    return isinstance(fault, PKCS11Error) and recovery_of(fault) is not None


def _encrypt_sm2(public: bytes, material: bytes) -> Sm2Ciphertext:
    """Encrypt with k = 1: C1 is the generator, and the shared point is the public key itself."""
    x, y = public[-64:-32], public[-32:]
    c2 = xor(material, sm2_kdf(x, y, len(material)))
    return Sm2Ciphertext(GX, GY, sm3(x + material + y), c2)


def _with_another_c3(trial: _Try) -> _Try:
    def encrypt(material: bytes) -> Any:
        genuine = trial.encrypt(material)
        return replace(genuine, c3=xor(genuine.c3, b"\1" * len(genuine.c3)))

    return replace(trial, encrypt=encrypt)


def _padding(algorithm: WrappingAlgorithm) -> padding.AsymmetricPadding:
    if algorithm is WrappingAlgorithm.RSAES_PKCS1_V1_5:
        return padding.PKCS1v15()
    sha1 = algorithm is WrappingAlgorithm.RSAES_OAEP_SHA_1
    digest = hashes.SHA1() if sha1 else hashes.SHA256()  # noqa: S303  # the API's algorithm
    return padding.OAEP(padding.MGF1(digest), digest, None)
