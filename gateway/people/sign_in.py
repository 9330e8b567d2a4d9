"""Sign people in and out: with OpenID Connect, with an API key, or with a link that an administrator made."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Callable
from typing import NamedTuple

import orjson

from backbone.store.documents import DocumentStore
from gateway import clock
from gateway.audit.events import Actor, actor_of
from gateway.auth.authenticator import Authenticator, read_key
from gateway.http.asgi import Headers, Scope
from gateway.people.browser import CONSOLE, Cookie, Origin, local_target
from gateway.people.openid_connect import OpenIdConnect, SignInFailed
from gateway.people.people_store import PeopleStore
from gateway.people.sessions import SessionStore
from schemas.audit import ActorKind
from schemas.errors import InvalidRequest, NotFound

PENDING_S = 600.0
"""Time for a person to sign in at the provider."""
LINK_KIND = "link-used"
LINK_S = 300.0
"""Time for which a sign-in link is valid."""
START_AGAIN = "Open /auth/login, and sign in within ten minutes in the same browser."


class NoProvider(NotFound):
    """This gateway has no identity provider."""

    code = "no_identity_provider"


class SignedIn(NamedTuple):
    """A session that has begun."""

    secret: str
    """For the cookie."""
    target: str
    """The path to which the browser goes."""
    actor: Actor
    """Who has signed in."""


class SignIn:
    """Begins and ends sessions."""

    def __init__(
        self,
        sessions: SessionStore,
        people: PeopleStore,
        auth: Authenticator,
        origin: Origin,
        documents: DocumentStore,
        provider: OpenIdConnect | None = None,
        *,
        secret: str,
        clock: Callable[[], float] = clock.now,
    ) -> None:
        """`secret`: common to all gateways; it signs what a browser holds while somebody signs in."""
        self._sessions = sessions
        self._people = people
        self._auth = auth
        self._origin = origin
        self._documents = documents
        self._provider = provider
        self._signing = hashlib.sha256(b"nexus sign-in\n" + secret.encode()).digest()
        self._clock = clock
        self.pending = Cookie("nexus-sign-in", PENDING_S)

    @property
    def has_provider(self) -> bool:
        """Whether people can sign in with OpenID Connect."""
        return self._provider is not None

    async def start(self, target: str) -> tuple[str, str]:
        """Return the provider's URL, and the value of the cookie `pending`. Raises NoProvider, ProviderUnavailable."""
        state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
        url = await self._require_provider().authorization_url(state=state, nonce=nonce, verifier=verifier)
        return url, self._seal("pending", PENDING_S, [state, nonce, verifier, local_target(target)])

    async def finish(self, scope: Scope, *, state: str, code: str, issuer: str = "") -> SignedIn:
        """Begin the session of a person whom the provider sent back. `issuer`: the parameter `iss`, if it came.

        Raises SignInFailed, NoRole, TooManyWrongKeys, ProviderUnavailable, Unavailable.
        """
        provider = self._require_provider()
        sent = self._open("pending", self.pending.read(scope["headers"], secure=self._origin.is_secure(scope)))
        if sent is None or not hmac.compare_digest(str(sent[0]).encode(), state.encode()):
            raise SignInFailed(f"This sign-in was not begun in this browser, or too long ago. {START_AGAIN}")
        if issuer not in {"", provider.issuer}:
            raise SignInFailed(f"Another identity provider answered than the one that was asked. {START_AGAIN}")
        _, nonce, verifier, target = sent
        try:
            claims = await provider.identify(code=code, nonce=nonce, verifier=verifier)
        except SignInFailed:
            # Each wrong code costs a request to the provider.
            self._auth.record_wrong_secret(scope, code.encode())
            raise
        person = await self._people.sign_in(provider.issuer, claims)
        actor = Actor(ActorKind.PERSON, person.team, person=person.id)
        return SignedIn(await self._sessions.begin(person=person.id), target, actor)

    async def with_key(self, scope: Scope, key: str, target: str) -> SignedIn:
        """Begin a session with an API key. Raises AuthenticationFailed, TooManyWrongKeys."""
        given = key.strip().encode()
        principal = self._auth.authenticate({**scope, "headers": [(b"authorization", b"Bearer " + given)]})
        secret = await self._sessions.begin(key=self._auth.fingerprint(given))
        return SignedIn(secret, local_target(target), actor_of(principal))

    def make_link(self, headers: Headers) -> tuple[str, int]:
        """Return the token of a link that begins one session with the request's API key, and when it ends, in Unix seconds.

        Raises InvalidRequest for a request without a key.
        """
        key = read_key(headers)
        if not key:
            raise InvalidRequest("Make the link with an API key: send it as 'Authorization: Bearer KEY'.")
        values = [self._auth.fingerprint(key).hex(), secrets.token_urlsafe(16)]
        return self._seal("link", LINK_S, values), int(self._clock() + LINK_S)

    async def with_link(self, token: str) -> SignedIn:
        """Begin the session of a link. Raises SignInFailed for a link that is unknown, over, or used."""
        sent = self._open("link", token)
        if sent is None or not await self._documents.add(LINK_KIND, "", sent[1], b"{}", ttl_s=LINK_S):
            raise SignInFailed(
                "This link is not valid: it was used, or is too old. Make another one with `nexus login`."
            )
        fingerprint = bytes.fromhex(sent[0])
        principal = self._auth.find_fingerprint(fingerprint)
        return SignedIn(await self._sessions.begin(key=fingerprint), CONSOLE, actor_of(principal))

    def provider_sign_out_url(self, after: str) -> str | None:
        """Return the URL at which a person signs out at the provider too; None: there is none."""
        return self._provider.sign_out_url(after) if self._provider is not None else None

    def _require_provider(self) -> OpenIdConnect:
        if self._provider is None:
            raise NoProvider("This gateway has no identity provider. Its operator can set OIDC_ISSUER.")
        return self._provider

    def _seal(self, purpose: str, lifetime_s: float, values: list[str]) -> str:
        data = orjson.dumps([purpose, self._clock() + lifetime_s, *values])
        return f"{_encode(data)}.{_encode(self._mac(data))}"

    def _open(self, purpose: str, sealed: str) -> list[str] | None:
        """Return the values of `_seal`; None: they were not made here for this purpose, or are too old."""
        try:
            data, mac = (base64.urlsafe_b64decode(part + "==") for part in sealed.split("."))
        except ValueError:
            return None
        if not hmac.compare_digest(mac, self._mac(data)):
            return None
        found, until, *values = orjson.loads(data)
        return values if found == purpose and self._clock() < until else None

    def _mac(self, data: bytes) -> bytes:
        return hmac.new(self._signing, data, hashlib.sha256).digest()


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
