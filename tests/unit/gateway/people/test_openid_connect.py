"""What an ID token must say, signed with real keys. tests/flow/test_people.py signs in with a real provider."""

from __future__ import annotations

from typing import Any

import pytest
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, KeySet, OctKey

from backbone.secret_files import ConfigurationError, Password
from gateway.people.openid_connect import ALGORITHMS, CLOCK_SKEW_S, OpenIdConnect, check_claims

NOW = 1_800_000_000
ISSUER, CLIENT, NONCE = "https://login.example", "nexus", "n" * 43
CLAIMS = {"iss": ISSUER, "aud": CLIENT, "sub": "ann", "iat": NOW, "exp": NOW + 300, "nonce": NONCE}
KEY = ECKey.generate_key("P-256", auto_kid=True)


def check(**changes: Any) -> dict[str, Any]:
    claims = {name: value for name, value in (CLAIMS | changes).items() if value is not None}
    token = jwt.decode(jwt.encode({"alg": "ES256", "kid": KEY.kid}, claims, KEY), KeySet([KEY]), algorithms=ALGORITHMS)
    return check_claims(
        token.claims, token.header, issuer=ISSUER, client_id=CLIENT, nonce=NONCE, access_token="a", now=NOW
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"aud": [CLIENT, "other"], "azp": CLIENT},
        {"exp": NOW - CLOCK_SKEW_S + 1},
        {"iat": NOW + CLOCK_SKEW_S - 1},
        {"nbf": NOW + CLOCK_SKEW_S - 1},
    ],
)
def test_a_token_for_this_client_counts(changes: dict[str, Any]) -> None:
    """Clocks may differ by a minute."""
    assert check(**changes)["sub"] == "ann"


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "https://evil.example"},
        {"iss": None},
        {"aud": "other"},
        {"aud": []},
        {"aud": None},
        {"aud": ["other", CLIENT], "azp": "other"},
        {"nonce": "x"},
        {"nonce": None},
        {"sub": None},
        {"sub": ""},
        {"sub": 7},
        {"sub": "x" * 256},
        {"exp": NOW - CLOCK_SKEW_S - 1},
        {"exp": None},
        {"iat": NOW + CLOCK_SKEW_S + 1},
        {"nbf": NOW + CLOCK_SKEW_S + 1},
        {"at_hash": "of-another-token"},
    ],
)
def test_any_other_token_does_not(changes: dict[str, Any]) -> None:
    with pytest.raises((JoseError, ValueError)):
        check(**changes)


def test_only_the_issuers_own_signatures_count() -> None:
    """None, and what is signed with a secret that this client has too, or with another key, are refused."""
    secret = OctKey.import_key("x" * 32)
    other = ECKey.generate_key("P-256", auto_kid=True)
    symmetric = jwt.encode({"alg": "HS256"}, CLAIMS, secret)
    unsigned = symmetric.replace(symmetric.split(".")[0], "eyJhbGciOiJub25lIn0").rpartition(".")[0] + "."
    for token, key in ((symmetric, secret), (unsigned, KEY), (jwt.encode({"alg": "ES256"}, CLAIMS, other), KEY)):
        with pytest.raises((JoseError, ValueError)):
            jwt.decode(token, KeySet([key]), algorithms=ALGORITHMS)


@pytest.mark.parametrize(("issuer", "client"), [("login.example", "nexus"), ("https://login.example", "")])
def test_a_provider_needs_an_url_and_a_client(issuer: str, client: str) -> None:
    with pytest.raises(ConfigurationError, match="OIDC_"):
        OpenIdConnect(issuer, client, Password("X", None, ""), redirect_uri="x", scopes="openid")
