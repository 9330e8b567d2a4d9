"""Build the parts that sign people in, from the settings."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from urllib.parse import urlsplit

from backbone.secret_files import ConfigurationError, Password
from backbone.settings import GatewaySettings
from backbone.store.documents import DocumentStore
from gateway.auth.authenticator import Authenticator
from gateway.auth.key_store import KeyStore
from gateway.people.browser import Origin
from gateway.people.group_rules import parse_role_rules, parse_team_rules
from gateway.people.openid_connect import OpenIdConnect
from gateway.people.people_store import GroupMapping, PeopleStore
from gateway.people.session_gate import SessionGate
from gateway.people.sessions import SessionStore
from gateway.people.sign_in import SignIn

CALLBACK = "/auth/callback"


@dataclass(frozen=True, slots=True)
class PeopleParts:
    """The parts that routes use."""

    origin: Origin
    sessions: SessionStore
    store: PeopleStore
    gate: SessionGate
    sign_in: SignIn
    provider_name: str
    """What the page calls the identity provider."""


def build_people(
    settings: GatewaySettings, documents: DocumentStore, keys: KeyStore, auth: Authenticator, bootstrap_key: str
) -> PeopleParts:
    """Return the parts. Raises ConfigurationError."""
    secret = Password("OIDC_CLIENT_SECRET", settings.oidc_client_secret, settings.oidc_client_secret_file)
    provider = _provider(settings, secret) if settings.oidc_issuer else None
    origin = Origin(settings.public_url)
    sessions = SessionStore(documents, idle_s=settings.session_idle_s, longest_s=settings.session_max_s)
    mapping = GroupMapping(
        [name.strip() for name in settings.oidc_groups_claims.split(",") if name.strip()],
        parse_role_rules("OIDC_ROLES", settings.oidc_roles),
        parse_team_rules("OIDC_TEAMS", settings.oidc_teams),
    )
    store = PeopleStore(keys, sessions, mapping)
    # Without a common secret, a sign-in ends at the gateway at which it began.
    signing = bootstrap_key or (secret.read() if secret else secrets.token_urlsafe(32))
    return PeopleParts(
        origin=origin,
        sessions=sessions,
        store=store,
        gate=SessionGate(sessions, keys, auth, origin),
        sign_in=SignIn(sessions, store, auth, origin, documents, provider, secret=signing),
        provider_name=settings.oidc_name or urlsplit(settings.oidc_issuer).hostname or "",
    )


def _provider(settings: GatewaySettings, secret: Password) -> OpenIdConnect:
    if not settings.public_url:
        raise ConfigurationError("OIDC_ISSUER needs PUBLIC_URL: the identity provider sends browsers back to it.")
    if not settings.oidc_roles:
        raise ConfigurationError("OIDC_ISSUER needs OIDC_ROLES: without a rule, nobody has a role.")
    return OpenIdConnect(
        settings.oidc_issuer,
        settings.oidc_client_id,
        secret,
        redirect_uri=settings.public_url.rstrip("/") + CALLBACK,
        scopes=settings.oidc_scopes,
        tls_ca=settings.oidc_tls_ca,
    )
