"""Sign people in with OpenID Connect: the authorization code flow with PKCE, state and nonce.

Guarantees:
- An ID token counts only with a valid asymmetric signature of the issuer, for this client, within its time, with the nonce that was
  sent, and with the access token that came with it.
- The provider is asked when somebody signs in, never for another request. Its answers are bounded in time and size.
- Keys that the provider has replaced are fetched when a token's signature does not match a known one.
"""

from __future__ import annotations

import asyncio
import importlib
import ssl
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote_plus, urlencode, urlsplit

import orjson
import structlog

from backbone.secret_files import ConfigurationError, Password
from gateway import clock
from schemas.errors import AuthenticationFailed, NexusError, Unavailable

if TYPE_CHECKING:
    import httpx
    from joserfc.jwk import KeySet

log = structlog.get_logger(__name__)

Claims = dict[str, Any]
T = TypeVar("T")

TIMEOUT_S = 5.0
MAX_OPEN = 16
"""Sign-ins at once that wait for the provider."""
METADATA_MAX_AGE_S = 3600.0
CLOCK_SKEW_S = 60
"""By how much the provider's clock may differ."""
MAX_ANSWER_BYTES = 1024 * 1024
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519"]
"""Signatures that only the provider can make: no shared secrets, and never `none`."""
BASIC, POST = "client_secret_basic", "client_secret_post"
ENDPOINTS = ("authorization_endpoint", "token_endpoint", "jwks_uri")
OPTIONAL_ENDPOINTS = ("userinfo_endpoint", "end_session_endpoint")
METADATA_PATH = "/.well-known/openid-configuration"


class SignInFailed(AuthenticationFailed):
    """The sign-in failed."""

    code = "sign_in_failed"


class ProviderUnavailable(Unavailable):
    """The identity provider is unavailable."""

    code = "identity_provider_unavailable"


class OpenIdConnect:
    """The client of one identity provider."""

    def __init__(
        self,
        issuer: str,
        client_id: str,
        client_secret: Password,
        *,
        redirect_uri: str,
        scopes: str,
        tls_ca: str = "",
        clock: Callable[[], float] = clock.now,
    ) -> None:
        """Configure a client; the provider is not reached yet. Raises ConfigurationError.

        `issuer`: URL of the provider, exactly as it names itself. `tls_ca`: PEM file of the authority behind its certificate.
        """
        if urlsplit(issuer).scheme not in {"https", "http"} or not client_id:
            raise ConfigurationError("OIDC_ISSUER must be a URL, and OIDC_CLIENT_ID must be set too.")
        self.issuer = issuer
        self._client_id = client_id
        self._client_secret = client_secret
        self._redirect_uri = redirect_uri
        self._scopes = scopes
        self._tls_ca = tls_ca
        self._clock = clock
        self._metadata: Claims = {}
        self._metadata_at = float("-inf")
        self._keys: KeySet | None = None
        self._keys_at = float("-inf")
        self._open = 0
        self._lock = asyncio.Lock()

    async def authorization_url(self, *, state: str, nonce: str, verifier: str) -> str:
        """Return the provider's URL to which the browser goes. Raises ProviderUnavailable."""

        async def make(http: httpx.AsyncClient) -> str:
            from authlib.oauth2.rfc6749.parameters import prepare_grant_uri
            from authlib.oauth2.rfc7636 import create_s256_code_challenge

            metadata = await self._load_metadata(http)
            return str(
                prepare_grant_uri(
                    metadata["authorization_endpoint"],
                    self._client_id,
                    "code",
                    redirect_uri=self._redirect_uri,
                    scope=self._scopes,
                    state=state,
                    nonce=nonce,
                    code_challenge=create_s256_code_challenge(verifier),
                    code_challenge_method="S256",
                )
            )

        return await self._ask(make)

    async def identify(self, *, code: str, nonce: str, verifier: str) -> Claims:
        """Exchange an authorization code for the person's claims. Raises SignInFailed, ProviderUnavailable."""

        async def exchange(http: httpx.AsyncClient) -> Claims:
            metadata = await self._load_metadata(http)
            token = await self._fetch_token(http, code, verifier)
            claims = await self._verified(http, token, nonce)
            if not (endpoint := metadata.get("userinfo_endpoint")):
                return claims
            more = await _get_json(http, endpoint, {"authorization": f"Bearer {token['access_token']}"})
            if more.get("sub") != claims["sub"]:
                raise ValueError("the user info is of somebody else")
            return more | claims

        return await self._ask(exchange)

    def sign_out_url(self, after: str) -> str | None:
        """Return the provider's URL that signs the person out there, and then leads to `after`; None: it has none."""
        endpoint = self._metadata.get("end_session_endpoint")
        if not endpoint:
            return None
        query = urlencode({"client_id": self._client_id, "post_logout_redirect_uri": after})
        return f"{endpoint}{'&' if '?' in endpoint else '?'}{query}"

    async def _ask(self, use: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
        """Return what `use` returns for a client of the provider. Translates its errors."""
        import httpx

        if self._open >= MAX_OPEN:
            raise ProviderUnavailable("Too many people sign in at once. Retry shortly.", retry_after_s=2.0)
        self._open += 1
        try:
            # In a thread: the libraries take a second to import, in which the gateway would serve nobody.
            errors = await asyncio.to_thread(_import_libraries)
            async with asyncio.timeout(3 * TIMEOUT_S), httpx.AsyncClient(timeout=TIMEOUT_S, verify=self._tls()) as http:
                return await use(http)
        except NexusError:
            raise
        except (httpx.HTTPError, TimeoutError, OSError, ConfigurationError) as error:
            log.warning("people.provider_unavailable", issuer=self.issuer, error=_text(error))
            raise ProviderUnavailable(
                "The identity provider cannot be reached, so that nobody can sign in with it now. API keys and open sessions "
                "work on. Retry shortly.",
                retry_after_s=5.0,
            ) from error
        except Exception as error:
            if not isinstance(error, (errors, ValueError, KeyError, TypeError)):
                raise
            log.warning("people.answer_refused", issuer=self.issuer, error=_text(error))
            raise SignInFailed("The identity provider's answer cannot be trusted. Start again.") from error
        finally:
            self._open -= 1

    def _tls(self) -> ssl.SSLContext | bool:
        return ssl.create_default_context(cafile=self._tls_ca) if self._tls_ca else True

    async def _fetch_token(self, http: httpx.AsyncClient, code: str, verifier: str) -> Claims:
        """Return the provider's answer to the code. Raises SignInFailed, HTTPError, ValueError."""
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self._redirect_uri,
            "code_verifier": verifier,
        }
        status, token = 0, Claims()
        for headers, fields in self._credentials():
            status, token = await _send(http, "POST", self._metadata["token_endpoint"], headers, form | fields)
            if token.get("error") != "invalid_client":
                break
        if status != 200:
            reason = f"{token.get('error')}: {token.get('error_description')}"[:200]
            log.info("people.code_refused", issuer=self.issuer, status=status, error=reason)
            raise SignInFailed("The identity provider refused the sign-in. Start again.")
        return token

    def _credentials(self) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
        """Yield the ways in which the client authenticates, as headers and form fields: a provider may want one for each client."""
        secret = self._client_secret.read() if self._client_secret else ""
        if not secret:
            yield {}, {"client_id": self._client_id}
            return
        methods = self._metadata.get("token_endpoint_auth_methods_supported", [BASIC])
        if BASIC in methods:
            pair = f"{quote_plus(self._client_id)}:{quote_plus(secret)}"
            yield {"authorization": f"Basic {b64encode(pair.encode()).decode()}"}, {}
        if POST in methods:
            yield {}, {"client_id": self._client_id, "client_secret": secret}

    async def _load_metadata(self, http: httpx.AsyncClient) -> Claims:
        async with self._lock:
            if monotonic() - self._metadata_at >= METADATA_MAX_AGE_S:
                metadata = await _get_json(http, self.issuer.rstrip("/") + METADATA_PATH)
                if metadata.get("issuer") != self.issuer:
                    raise ValueError(f"OIDC_ISSUER is not what the provider calls itself: {metadata.get('issuer')}")
                for name in ENDPOINTS:
                    _check_endpoint(metadata.get(name, ""), self.issuer)
                for name in OPTIONAL_ENDPOINTS:
                    if name in metadata:
                        _check_endpoint(metadata[name], self.issuer)
                self._metadata, self._metadata_at = metadata, monotonic()
        return self._metadata

    async def _verified(self, http: httpx.AsyncClient, token: Claims, nonce: str) -> Claims:
        """Return the claims of the ID token. Raises JoseError, ValueError, KeyError."""
        from joserfc import jwt
        from joserfc.errors import JoseError

        id_token = token["id_token"]
        try:
            decoded = jwt.decode(id_token, await self._load_keys(http, METADATA_MAX_AGE_S), algorithms=ALGORITHMS)
        except (JoseError, ValueError):
            # The provider may have replaced its keys.
            decoded = jwt.decode(id_token, await self._load_keys(http, 0.0), algorithms=ALGORITHMS)
        return check_claims(
            decoded.claims,
            decoded.header,
            issuer=self.issuer,
            client_id=self._client_id,
            nonce=nonce,
            access_token=token.get("access_token", ""),
            now=self._clock(),
        )

    async def _load_keys(self, http: httpx.AsyncClient, max_age_s: float) -> KeySet:
        from joserfc.jwk import KeySet

        async with self._lock:
            if self._keys is None or monotonic() - self._keys_at >= max_age_s:
                found: Any = await _get_json(http, self._metadata["jwks_uri"])
                self._keys, self._keys_at = KeySet.import_key_set(found), monotonic()
            return self._keys


def check_claims(
    claims: Claims, header: Claims, *, issuer: str, client_id: str, nonce: str, access_token: str, now: float
) -> Claims:
    """Return the claims of an ID token whose signature is valid. Raises JoseError, ValueError."""
    from authlib.oidc.core import CodeIDToken

    options = {"iss": {"essential": True, "value": issuer}, "aud": {"essential": True, "value": client_id}}
    checked = CodeIDToken(
        claims, header, options, {"nonce": nonce, "client_id": client_id, "access_token": access_token}
    )
    checked.validate(now=int(now), leeway=CLOCK_SKEW_S)
    if not isinstance(claims["sub"], str) or not 0 < len(claims["sub"]) <= 255:
        raise ValueError("the subject is no text of up to 255 characters")
    return dict(claims)


def _check_endpoint(url: str, issuer: str) -> None:
    """Raise ValueError for an endpoint that is less secure than the issuer."""
    scheme = urlsplit(url).scheme
    if scheme != "https" and not (scheme == "http" and urlsplit(issuer).scheme == "http"):
        raise ValueError("an endpoint of the provider is not https")


async def _get_json(http: httpx.AsyncClient, url: str, headers: dict[str, str] | None = None) -> Claims:
    """Return a JSON object. Raises HTTPError, ValueError."""
    status, found = await _send(http, "GET", url, headers or {})
    if status != 200:
        raise ValueError(f"the provider answers {status} to GET {url}")
    return found


async def _send(
    http: httpx.AsyncClient, method: str, url: str, headers: dict[str, str], form: dict[str, str] | None = None
) -> tuple[int, Claims]:
    """Return the status and the JSON object of an answer. Raises HTTPError for an outage, ValueError for another answer."""
    size, parts = 0, []
    async with http.stream(method, url, headers={"accept": "application/json"} | headers, data=form) as response:
        if response.status_code >= 500:
            response.raise_for_status()
        async for part in response.aiter_bytes():
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                raise ValueError("an answer of the provider is too large")
            parts.append(part)
    found = orjson.loads(b"".join(parts))
    if not isinstance(found, dict):
        raise TypeError("an answer of the provider is no JSON object")
    return response.status_code, found


def _import_libraries() -> type[Exception]:
    """Import what checks the provider's answers. Returns the base class of its errors."""
    for name in ("authlib.oauth2.rfc6749.parameters", "authlib.oauth2.rfc7636", "authlib.oidc.core", "joserfc.jwt"):
        importlib.import_module(name)
    from joserfc.errors import JoseError

    return JoseError


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
