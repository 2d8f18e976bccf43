"""The import service: issue parameters for import, import key material. The main job.

Issue:  origin → policy → key pair from the backend that the protection level selects → token.
Import: origin → token (authentic, of this CMK, for this backend, unexpired) → policy → unwrap →
key, if it is what was asked for.

A service is stateless and safe to share between threads and processes; what has to last (key
references, check values, used token ids) is the caller's to store.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import logging
import secrets
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Protocol

from hsmwrap import policy, tokens
from hsmwrap.arguments import checked, of_a_setting, of_the_api, require_fields
from hsmwrap.backend import (
    Backend,
    Capabilities,
    Custody,
    Exposure,
    ImportedKey,
    WrappingCapability,
    WrappingKey,
)
from hsmwrap.catalog import (
    KeySpec,
    Origin,
    ProtectionLevel,
    WrappingAlgorithm,
    WrappingKeySpec,
    configured,
)
from hsmwrap.errors import (
    CombinationRefused,
    ConfigurationError,
    ExpiredImportToken,
    HsmwrapError,
    InvalidImportToken,
    InvalidKeyMaterial,
    InvalidParameter,
    ServiceUnavailable,
    TooManyWrappingKeys,
    UnsupportedOrigin,
    UnsupportedProtectionLevel,
)
from hsmwrap.guard import guard_all, guarded
from hsmwrap.policy import Deployment

TOKEN_LIFETIME = timedelta(hours=24)
"""How long an import token is valid (Alibaba's rule)."""
MAX_FAILED_IMPORTS = 20
"""How many imports under one token may fail before the token is refused."""
MAX_RESIDENT_KEYS_OF_CMK = 100
"""How many resident wrapping keys one CMK may have outstanding."""
MAX_RESIDENT_KEYS = 10_000
"""How many resident wrapping keys may be outstanding for all CMKs together."""
MARK_MARGIN = timedelta(hours=1)
"""How much longer than the token its mark of single use is kept, for clocks that are set back."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cmk:
    """What the service has to know of a CMK; the KMS keeps the rest.

    A text in place of a member of an enum becomes the member that it spells.

    Attributes:
        key_id: The KMS's id of the CMK, at most 255 bytes of UTF-8.
        key_spec: What its key material is.
        protection_level: Where its key material lives.
        origin: Only EXTERNAL takes imports.
        check_value: Check value of the material imported before; None before the first import.
            A re-import has to match it.

    Raises:
        InvalidParameter: The key id is empty, too long, or no text that UTF-8 can carry; a text
            spells no member; or something has another type.
        MissingParameter: The key id or a member is None, or a member is an empty text.
    """

    key_id: str
    key_spec: KeySpec
    protection_level: ProtectionLevel
    origin: Origin = Origin.EXTERNAL
    check_value: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require_fields(self, ("key_id", "check_value"), of_the_api)
        try:
            fits = 1 <= len(self.key_id.encode()) <= tokens.MAX_CMK_ID_LENGTH
        except UnicodeEncodeError:
            fits = False
        if not fits:
            raise InvalidParameter("KeyId", f"takes 1 to {tokens.MAX_CMK_ID_LENGTH} bytes of UTF-8")
        object.__setattr__(self, "key_spec", KeySpec.parse(self.key_spec))
        level = ProtectionLevel.parse(self.protection_level)
        object.__setattr__(self, "protection_level", level)
        object.__setattr__(self, "origin", Origin.parse(self.origin))


def new_request_id() -> str:
    """A RequestId as the API writes it: a random UUID in capitals."""
    return str(uuid.uuid4()).upper()


@dataclass(frozen=True, slots=True)
class ImportParameters:
    """The answer of GetParametersForImport.

    Attributes:
        key_id: Id of the CMK.
        spec: Wrapping key spec.
        algorithm: Wrapping algorithm.
        public_key: DER SubjectPublicKeyInfo of the wrapping key.
        import_token: The import token, raw bytes.
        expires_at: When the token expires; aware, whole seconds.
    """

    key_id: str
    spec: WrappingKeySpec
    algorithm: WrappingAlgorithm
    public_key: bytes
    import_token: bytes = field(repr=False)
    expires_at: datetime

    def to_api(self, request_id: str | None = None) -> dict[str, str]:
        """The API's five fields: base64 for bytes, ``YYYY-MM-DDThh:mm:ssZ`` for the time."""
        return {
            "RequestId": request_id or new_request_id(),
            "KeyId": self.key_id,
            "ImportToken": base64.b64encode(self.import_token).decode("ascii"),
            "PublicKey": base64.b64encode(self.public_key).decode("ascii"),
            "TokenExpireTime": self.expires_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }


@dataclass(frozen=True, slots=True)
class ImportResult:
    """The outcome of ImportKeyMaterial, for the KMS to store.

    Attributes:
        imported: Key reference, check value and exposure.
        token_id: Id of the import token that was used (for the audit log).
        expires_at: When the material is to be deleted; None: never.
    """

    imported: ImportedKey
    token_id: bytes
    expires_at: datetime | None


class UsedTokens(Protocol):
    """Where single-use deployments remember token ids; share it between processes."""

    def claim(self, token_id: bytes, expires_at: datetime) -> bool:
        """Mark the id as used, atomically; False if it was already, or if its token is over.

        A mark has to outlast its token by more than clocks differ or are set back.
        """

    def release(self, token_id: bytes) -> None:
        """Take a claim back after a failed import."""


class KeySource(Protocol):
    """Where wrapping keys come from: made inline, or ahead of time by a key-pair pool."""

    def __call__(
        self,
        backend: Backend,
        spec: WrappingKeySpec,
        algorithm: WrappingAlgorithm,
        expires_at: datetime,
    ) -> WrappingKey:
        """Return a pair that no other caller gets."""


def generate_inline(
    backend: Backend, spec: WrappingKeySpec, algorithm: WrappingAlgorithm, expires_at: datetime
) -> WrappingKey:
    """The plain :class:`KeySource`: one key pair per call."""
    return backend.generate_wrapping_key(spec, algorithm, expires_at=expires_at)


class FailedImports(Protocol):
    """Where the failed imports of each token are counted; share it between processes.

    A captured ciphertext belongs to one wrapping key and so to one import token. An attack that
    decrypts it by trying (Bleichenbacher 1998, Manger 2001) needs thousands of imports at least,
    whatever an answer or its time tells. So a token takes a bounded number of failed ones.
    """

    def count(self, token_id: bytes) -> int:
        """The number of failed imports under this token."""

    def record(self, token_id: bytes, expires_at: datetime) -> int:
        """Count one more, atomically; returns the number.

        A count has to outlast its token by more than clocks differ or are set back.
        """


@dataclass(frozen=True, slots=True)
class ResidentBounds:
    """How many resident wrapping keys may be outstanding.

    Attributes:
        of_cmk: For one CMK.
        in_all: For all CMKs together.

    Raises:
        ConfigurationError: A bound is not a number, or less than 1.
    """

    of_cmk: int = MAX_RESIDENT_KEYS_OF_CMK
    in_all: int = MAX_RESIDENT_KEYS

    def __post_init__(self) -> None:
        require_fields(self, ("of_cmk", "in_all"), of_a_setting)
        for name, bound in (("_of_cmk", self.of_cmk), ("", self.in_all)):
            if bound < 1:
                raise ConfigurationError(
                    f"max_resident_keys{name}: takes a whole number, 1 or more"
                )

    def require(self, of_cmk: int, in_all: int) -> None:
        """Return if one more is allowed beside so many.

        Raises:
            TooManyWrappingKeys: It is not.
        """
        for there, bound, whose in (
            (of_cmk, self.of_cmk, "this CMK has"),
            (in_all, self.in_all, "all CMKs together have"),
        ):
            if there >= bound:
                raise TooManyWrappingKeys(
                    f"{whose} {there} wrapping keys in the HSM, of at most {bound}; each goes when "
                    "its import token expires"
                )


class ResidentKeys(Protocol):
    """Where outstanding resident wrapping keys are counted; share it between processes.

    A resident wrapping key is an object in the HSM until its import token expires, and each one
    makes the searches of all calls slower. So a client gets a bounded number of them.
    """

    def claim(self, cmk_id: str, expires_at: datetime, bounds: ResidentBounds) -> bytes:
        """Count one more until ``expires_at``; returns what :meth:`release` takes.

        Raises:
            TooManyWrappingKeys: A bound is reached.
        """

    def release(self, claim: bytes) -> None:
        """Take a claim back: its key was not made, or was destroyed."""


class _ByToken:
    """A number for each token id; forgotten :data:`MARK_MARGIN` after its token."""

    def __init__(self, clock: Callable[[], datetime] | None = None) -> None:
        """Take the clock that says which tokens are over."""
        self._clock = clock or _utc_now
        self._lock = threading.Lock()
        self._numbers: dict[bytes, int] = {}
        self._by_expiry: list[tuple[datetime, bytes]] = []

    def _put(self, token_id: bytes, expires_at: datetime, number: int) -> None:
        """Set a number, in the one place of its token; the caller holds the lock."""
        over = self._clock() - MARK_MARGIN
        while self._by_expiry and self._by_expiry[0][0] <= over:
            del self._numbers[heapq.heappop(self._by_expiry)[1]]
        if token_id not in self._numbers:
            heapq.heappush(self._by_expiry, (expires_at, token_id))
        self._numbers[token_id] = number


class MemoryUsedTokens(_ByToken):
    """:class:`UsedTokens` for one process; forgets an id :data:`MARK_MARGIN` after its token."""

    def claim(self, token_id: bytes, expires_at: datetime) -> bool:
        """Mark the id as used; False if it was already, or if its token is over."""
        with self._lock:
            if self._numbers.get(token_id) or expires_at <= self._clock():
                return False
            self._put(token_id, expires_at, 1)
            return True

    def release(self, token_id: bytes) -> None:
        """Take a claim back after a failed import."""
        with self._lock:
            if token_id in self._numbers:
                self._numbers[token_id] = 0


class MemoryFailedImports(_ByToken):
    """:class:`FailedImports` for one process; forgets as :class:`MemoryUsedTokens` does."""

    def count(self, token_id: bytes) -> int:
        """The number of failed imports under this token."""
        with self._lock:
            return self._numbers.get(token_id, 0)

    def record(self, token_id: bytes, expires_at: datetime) -> int:
        """Count one more; returns the number."""
        with self._lock:
            number = self._numbers.get(token_id, 0) + 1
            self._put(token_id, expires_at, number)
            return number


class MemoryResidentKeys:
    """:class:`ResidentKeys` for one process."""

    def __init__(self, clock: Callable[[], datetime] | None = None) -> None:
        """Take the clock that says which keys have expired."""
        self._clock = clock or _utc_now
        self._lock = threading.Lock()
        self._claims: dict[bytes, str] = {}
        self._by_expiry: list[tuple[datetime, bytes]] = []
        self._of_cmk: Counter[str] = Counter()

    def claim(self, cmk_id: str, expires_at: datetime, bounds: ResidentBounds) -> bytes:
        """Count one more until ``expires_at``; returns what :meth:`release` takes."""
        with self._lock:
            now = self._clock()
            while self._by_expiry and self._by_expiry[0][0] <= now:
                self._drop(heapq.heappop(self._by_expiry)[1])
            bounds.require(self._of_cmk[cmk_id], len(self._claims))
            claim = secrets.token_bytes(tokens.TOKEN_ID_LENGTH)
            self._claims[claim] = cmk_id
            heapq.heappush(self._by_expiry, (expires_at, claim))
            self._of_cmk[cmk_id] += 1
            return claim

    def release(self, claim: bytes) -> None:
        """Take a claim back."""
        with self._lock:
            self._drop(claim)

    def _drop(self, claim: bytes) -> None:
        cmk_id = self._claims.pop(claim, None)
        if cmk_id is not None:
            self._of_cmk[cmk_id] -= 1
            if not self._of_cmk[cmk_id]:
                del self._of_cmk[cmk_id]


def _utc_now() -> datetime:
    return datetime.now(UTC)


class ImportService:
    """GetParametersForImport and ImportKeyMaterial over any backends."""

    @checked(of_a_setting)
    def __init__(
        self,
        backends: Mapping[ProtectionLevel, Backend],
        deployment: Deployment,
        *,
        former_backends: Collection[Backend] = (),
        clock: Callable[[], datetime] = _utc_now,
        token_lifetime: timedelta = TOKEN_LIFETIME,
        required_exposure: Exposure | str | None = None,
        refused_algorithms: Collection[WrappingAlgorithm] = frozenset(),
        used_tokens: UsedTokens | None = None,
        failed_imports: FailedImports | None = None,
        max_failed_imports: int = MAX_FAILED_IMPORTS,
        resident_keys: ResidentKeys | None = None,
        resident_bounds: ResidentBounds | None = None,
        key_source: KeySource = generate_inline,
    ) -> None:
        """Put the service together. Members of enums may be given as the texts that spell them.

        Args:
            backends: The backend of each protection level. A backend that does not list the
                level in its capabilities is refused here. One that is not guarded gets a guard
                (:mod:`hsmwrap.guard`).
            deployment: Where this runs, for the policy.
            former_backends: Backends of before: they issue nothing, and import what they issued
                import tokens for, at the levels that they list in their capabilities.
            clock: Returns the current aware time.
            token_lifetime: Validity of import tokens.
            required_exposure: ``Exposure.IN_HSM`` refuses HSM-level combinations whose material
                would pass through the host, by the backend's present capabilities. Where a token
                was issued by other ones, the host may have had the material by the time that the
                backend says so; the import then fails and the key is destroyed.
            refused_algorithms: Refused whatever the compatibility table says, for tokens that
                were issued before as well; ``RSAES_PKCS1_V1_5`` is a candidate.
            used_tokens: Makes import tokens single-use; None: reusable within their lifetime.
            failed_imports: Where failed imports are counted; None: in this process.
            max_failed_imports: How many imports under one token may fail before it is refused.
                Those that run at the same time can exceed it, by as many as run.
            resident_keys: Where outstanding resident wrapping keys are counted; None: in this
                process.
            resident_bounds: How many may be outstanding; issues that run at the same time can
                exceed that, by as many as run, where the store is not of one process.
            key_source: Where wrapping keys come from.

        Raises:
            ConfigurationError: A level, the exposure or an algorithm has an unknown spelling,
                ``max_failed_imports`` is less than 1, or an argument has another type.
            UnsupportedProtectionLevel: A backend may not serve the level that it is given for.
        """
        self._backends = {
            configured(ProtectionLevel, "backends", level): backend
            for level, backend in guard_all(backends).items()
        }
        for level, backend in self._backends.items():
            # An unavailable backend is asked again by each call that needs the answer.
            with suppress(ServiceUnavailable):
                _require_level(backend, level)
        self._former = tuple(guarded(backend) for backend in former_backends)
        self._deployment = deployment
        self._clock = clock
        self._lifetime = token_lifetime
        self._required_exposure = (
            None
            if required_exposure is None
            else configured(Exposure, "required_exposure", required_exposure)
        )
        self._refused = frozenset(
            configured(WrappingAlgorithm, "refused_algorithms", algorithm)
            for algorithm in refused_algorithms
        )
        if max_failed_imports < 1:
            raise ConfigurationError("max_failed_imports: takes a whole number, 1 or more")
        self._used_tokens = used_tokens
        self._failed_imports = failed_imports or MemoryFailedImports(clock)
        self._max_failed_imports = max_failed_imports
        self._resident_keys = resident_keys or MemoryResidentKeys(clock)
        self._resident_bounds = resident_bounds or ResidentBounds()
        self._key_source = key_source

    @checked(of_the_api)
    def get_parameters_for_import(
        self,
        cmk: Cmk,
        wrapping_key_spec: WrappingKeySpec | str,
        wrapping_algorithm: WrappingAlgorithm | str,
    ) -> ImportParameters:
        """Issue a fresh public wrapping key and an import token.

        Raises:
            MissingParameter, InvalidParameter: Spec or algorithm is missing or unknown, or an
                argument has another type.
            UnsupportedOrigin: The CMK does not take imports.
            UnsupportedProtectionLevel: No HSM in this region, or no backend for this level.
            CombinationRefused: The compatibility table, the configuration (refused algorithms,
                required exposure) or the backend's capabilities refuse the combination. Nothing
                was generated.
            TooManyWrappingKeys: The pair would be an object in the HSM, where there are too many of
                this CMK or in all.
            ServiceUnavailable: The backend is unavailable.
            HsmError: The backend made another pair than it was asked for, or one that fits no
                import token.
            ConfigurationError: The clock or the lifetime of tokens makes no time of expiry.
        """
        spec = WrappingKeySpec.parse(wrapping_key_spec)
        algorithm = WrappingAlgorithm.parse(wrapping_algorithm)
        _require_external(cmk)
        self._require_allowed(cmk, spec, algorithm)
        backend = self._backend_of(cmk)
        capability = self._require_capability(backend, cmk, spec, algorithm)
        expires_at = (self._now() + self._lifetime).replace(microsecond=0)
        if capability.custody != Custody.HSM_INTERNAL:
            return self._issue(backend, cmk, spec, algorithm, expires_at)
        claim = self._resident_keys.claim(cmk.key_id, expires_at, self._resident_bounds)
        try:
            return self._issue(backend, cmk, spec, algorithm, expires_at)
        except BaseException:
            self._resident_keys.release(claim)
            raise

    @checked(of_the_api)
    def import_key_material(
        self,
        cmk: Cmk,
        encrypted_key_material: bytes,
        import_token: bytes,
        key_material_expire: datetime | None = None,
        *,
        object_id: bytes | None = None,
    ) -> ImportResult:
        """Make key material that a client encrypted into a usable key.

        Args:
            cmk: The CMK; its ``check_value`` makes this a re-import.
            encrypted_key_material: The client's ciphertext, raw bytes.
            import_token: The import token, raw bytes.
            key_material_expire: Aware time of deletion; None: never.
            object_id: See :meth:`Backend.unwrap_material`.

        Raises:
            UnsupportedOrigin: The CMK does not take imports.
            InvalidParameter: The expiry is not in the future, or has no time zone; or an argument
                has another type.
            InvalidImportToken: Changed, of another CMK, key spec or backend, used up, or too many
                imports under it failed.
            ExpiredImportToken: Authentic, but too old.
            UnsupportedProtectionLevel: No HSM in this region, or no backend for this level.
            CombinationRefused: The token's algorithm is not allowed or not served here any more, or
                not with the required exposure.
            InvalidKeyMaterial: The ciphertext did not become the key; never says why.
            ServiceUnavailable: The backend is unavailable.
            HsmError: The backend made another key than its capabilities promise; it is destroyed.
        """
        _require_external(cmk)
        self._require_future(key_material_expire)
        backend, claims = self._open_token(cmk, import_token)
        self._require_allowed(cmk, claims.spec, claims.algorithm)
        self._require_capability(backend, cmk, claims.spec, claims.algorithm)
        with _SingleUse(self._used_tokens, claims, self._require_unexpired):
            # Again: the calls in between may have waited for an unavailable HSM.
            self._require_unexpired(claims)
            self._require_few_failures(claims)
            try:
                imported = backend.unwrap_material(
                    claims.private_key,
                    claims.algorithm,
                    encrypted_key_material,
                    key_spec=cmk.key_spec,
                    expected_check_value=cmk.check_value,
                    object_id=object_id,
                )
            except InvalidKeyMaterial:
                self._record_failure(cmk, backend, claims)
                raise
        _log_event("imported key material", cmk, backend, claims.token_id, imported.exposure)
        return ImportResult(imported, claims.token_id, key_material_expire)

    @checked(of_the_api)
    def backend_for_import(self, cmk: Cmk, import_token: bytes) -> Backend:
        """The backend that imports under this token: the one that issued it.

        Without former backends it is that of the CMK's level, and the token is not looked at.

        Raises:
            HsmwrapError: As :meth:`import_key_material`.
        """
        if self._former:
            return self._open_token(cmk, import_token)[0]
        return self._backend_of(cmk)

    def _backend_of(self, cmk: Cmk) -> Backend:
        backend = self._backends.get(cmk.protection_level)
        if backend is None:
            raise UnsupportedProtectionLevel(
                "no-backend", f"no backend is configured for level {cmk.protection_level}"
            )
        return backend

    def _require_allowed(
        self, cmk: Cmk, spec: WrappingKeySpec, algorithm: WrappingAlgorithm
    ) -> None:
        verdict = policy.check(spec, algorithm, cmk.protection_level, self._deployment)
        if not verdict.allowed:
            raise verdict.error()
        if algorithm in self._refused:
            raise CombinationRefused(
                "WrappingAlgorithm",
                "configuration",
                f"{algorithm} is turned off here by refused_algorithms; use another one",
            )

    def _now(self) -> datetime:
        now = self._clock()
        if now.tzinfo is None:
            raise ConfigurationError(
                "clock: returns a time without a time zone; it has to be aware"
            )
        return now

    def _require_future(self, expires_at: datetime | None) -> None:
        name = "KeyMaterialExpireUnix"
        if expires_at is None:
            return
        if expires_at.tzinfo is None:
            raise InvalidParameter(name, "is a time without a time zone; give an aware datetime")
        if expires_at <= self._now():
            raise InvalidParameter(name, "is in the past; 0 means never")

    def _require_unexpired(self, claims: tokens.ImportTokenClaims) -> None:
        if claims.expires_at <= self._now():
            raise ExpiredImportToken(
                f"the import token expired at {claims.expires_at:%Y-%m-%dT%H:%M:%SZ}; "
                "call GetParametersForImport again"
            )

    def _require_few_failures(self, claims: tokens.ImportTokenClaims) -> None:
        if self._failed_imports.count(claims.token_id) >= self._max_failed_imports:
            raise InvalidImportToken(
                f"{self._max_failed_imports} imports under this import token failed, and it takes "
                "no more; call GetParametersForImport again"
            )

    def _record_failure(self, cmk: Cmk, backend: Backend, claims: tokens.ImportTokenClaims) -> None:
        failures = self._failed_imports.record(claims.token_id, claims.expires_at)
        if failures == self._max_failed_imports:
            event = "import token refused from now on: too many failed imports"
            _log.warning(event, extra=_described(cmk, backend, claims.token_id))

    def _require_capability(
        self, backend: Backend, cmk: Cmk, spec: WrappingKeySpec, algorithm: WrappingAlgorithm
    ) -> WrappingCapability:
        capabilities = _require_level(backend, cmk.protection_level)
        wrapping = capabilities.wrapping_for(spec, algorithm)
        key = capabilities.key_for(cmk.key_spec)
        if wrapping is None or key is None:
            raise CombinationRefused(
                "WrappingAlgorithm",
                "backend-capability",
                f"backend {backend.name} does not serve {algorithm} for {cmk.key_spec}; its "
                "capability report says what it serves",
            )
        demanded = self._required_exposure if cmk.protection_level == ProtectionLevel.HSM else None
        if demanded == Exposure.IN_HSM and wrapping.exposure != Exposure.IN_HSM:
            raise CombinationRefused(
                "WrappingAlgorithm",
                "exposure",
                f"on backend {backend.name}, material under {algorithm} would pass through the "
                "host, and the configuration demands in_hsm",
            )
        return wrapping

    def _issue(
        self,
        backend: Backend,
        cmk: Cmk,
        spec: WrappingKeySpec,
        algorithm: WrappingAlgorithm,
        expires_at: datetime,
    ) -> ImportParameters:
        key = self._key_source(backend, spec, algorithm, expires_at)
        try:
            claims = _claims(cmk, backend.name, key, expires_at)
            token = tokens.encode(claims, backend.mac)
        except BaseException:
            _discard(backend, key)
            raise
        _log_event("issued parameters for import", cmk, backend, claims.token_id)
        return ImportParameters(cmk.key_id, spec, algorithm, key.public_key, token, expires_at)

    def _candidates(self, cmk: Cmk) -> Iterator[Backend]:
        """The backends that may have issued a token for this CMK, the present one first."""
        yield self._backend_of(cmk)
        yield from self._former

    def _open_token(
        self, cmk: Cmk, import_token: bytes
    ) -> tuple[Backend, tokens.ImportTokenClaims]:
        """The claims of a token, and the backend that issued it."""
        refused: HsmwrapError | None = None
        for backend in self._candidates(cmk):
            try:
                return backend, self._claims_of(backend, cmk, import_token)
            except (InvalidImportToken, ServiceUnavailable, UnsupportedProtectionLevel) as error:
                # What another backend did not issue, an unavailable one may have issued.
                if refused is None or isinstance(error, ServiceUnavailable):
                    refused = error
        raise refused or InvalidImportToken("no backend issued the import token")

    def _claims_of(
        self, backend: Backend, cmk: Cmk, import_token: bytes
    ) -> tokens.ImportTokenClaims:
        if backend in self._former:
            _require_level(backend, cmk.protection_level)
        claims = tokens.decode(import_token, backend.verify_mac)
        if claims.cmk_id != cmk.key_id:
            raise InvalidImportToken("the import token belongs to another CMK")
        if claims.key_spec != cmk.key_spec:
            raise InvalidImportToken(
                f"the import token is for {claims.key_spec}, and the CMK is {cmk.key_spec}"
            )
        if (claims.backend, claims.protection_level) != (backend.name, cmk.protection_level):
            raise InvalidImportToken("the import token belongs to another backend")
        self._require_unexpired(claims)
        return claims


class _SingleUse:
    """Claims a token id for the length of an import; a failed import gives it back."""

    def __init__(
        self,
        used: UsedTokens | None,
        claims: tokens.ImportTokenClaims,
        require_unexpired: Callable[[tokens.ImportTokenClaims], None],
    ) -> None:
        self._used = used
        self._claims = claims
        self._require_unexpired = require_unexpired

    def __enter__(self) -> None:
        used, claims = self._used, self._claims
        if used is not None and not used.claim(claims.token_id, claims.expires_at):
            self._require_unexpired(claims)  # which is a reason of its own
            raise InvalidImportToken("the import token was used before, and is single-use here")

    def __exit__(self, exc_type: object, *_exc: object) -> None:
        if self._used is not None and exc_type is not None:
            self._used.release(self._claims.token_id)


def _require_external(cmk: Cmk) -> None:
    if cmk.origin != Origin.EXTERNAL:
        raise UnsupportedOrigin(
            f"CMK {cmk.key_id} has origin {cmk.origin}; only EXTERNAL takes imported material"
        )


def _require_level(backend: Backend, level: ProtectionLevel) -> Capabilities:
    capabilities = backend.capabilities()
    if level not in capabilities.protection_levels:
        listed = ", ".join(sorted(capabilities.protection_levels))
        raise UnsupportedProtectionLevel(
            "backend-level", f"backend {backend.name} serves {listed}, not {level}"
        )
    return capabilities


def _discard(backend: Backend, key: WrappingKey) -> None:
    """Destroy a key that is not returned; if that fails, it is reaped when it expires."""
    try:
        backend.discard_wrapping_key(key.private_key)
    except HsmwrapError as error:
        extra = {"backend": backend.name, "error": type(error).__name__}
        _log.warning("could not discard a wrapping key", extra=extra)


def _claims(
    cmk: Cmk, backend: str, key: WrappingKey, expires_at: datetime
) -> tokens.ImportTokenClaims:
    return tokens.ImportTokenClaims(
        token_id=secrets.token_bytes(tokens.TOKEN_ID_LENGTH),
        cmk_id=cmk.key_id,
        key_spec=cmk.key_spec,
        spec=key.spec,
        algorithm=key.algorithm,
        protection_level=cmk.protection_level,
        backend=backend,
        public_key_sha256=hashlib.sha256(key.public_key).digest(),
        expires_at=expires_at,
        private_key=key.private_key,
    )


def _log_event(
    event: str, cmk: Cmk, backend: Backend, token_id: bytes, exposure: Exposure | None = None
) -> None:
    _log.info(event, extra={**_described(cmk, backend, token_id), "exposure": exposure})


def _described(cmk: Cmk, backend: Backend, token_id: bytes) -> dict[str, str]:
    return {"cmk_id": cmk.key_id, "backend": backend.name, "token_id": token_id.hex()}
