"""Cookies, origins and targets of redirects: what a browser's requests are judged by."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from gateway.http.asgi import Headers, Scope
from gateway.signed_urls import base_url
from schemas.errors import PermissionDenied

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
MAX_TARGET_CHARS = 2048
TARGET = re.compile(r"/(?![/\\])[!-\[\]-~]*")
"""A path of this origin: no second slash, no backslash (browsers read it as a slash), no space or control character."""
HOME = "/"
CONSOLE = "/ui/"
"""Where a browser goes after a sign-in that names no target."""


class CrossSiteRequest(PermissionDenied):
    """The request comes from a page of another site."""

    code = "cross_site_request"


def header(headers: Headers, name: bytes) -> str:
    """Return the first header of this name; empty: there is none."""
    return next((value.decode("latin-1") for found, value in headers if found == name), "")


class Origin:
    """The origin at which browsers reach the gateway."""

    def __init__(self, public_url: str = "") -> None:
        """`public_url`: of the settings; empty: taken from each request."""
        self._public_url = public_url.rstrip("/")

    def base(self, scope: Scope) -> str:
        """Return the URL at which the caller reaches the gateway."""
        return self._public_url or base_url(scope)

    def is_secure(self, scope: Scope) -> bool:
        """Return whether callers reach the gateway by https."""
        return self.base(scope).startswith("https://")

    def require_same(self, scope: Scope) -> None:
        """Raise CrossSiteRequest for a request that a browser sends for a page of another origin."""
        headers = scope["headers"]
        site, origin = header(headers, b"sec-fetch-site"), header(headers, b"origin")
        if site not in {"", "same-origin", "none"} or (origin and origin != _origin_of(self.base(scope))):
            raise CrossSiteRequest(
                "This request comes from a page of another site, and was refused. Use the gateway's own pages."
            )


def _origin_of(url: str) -> str:
    """Return a URL's origin as browsers write it: in lower case, without a default port."""
    parts = urlsplit(url.lower())
    default = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    return f"{parts.scheme}://{parts.netloc.removesuffix(default)}"


def local_target(text: str) -> str:
    """Return a path of this gateway to which a browser may be sent, in place of anything else `HOME`."""
    if len(text) <= MAX_TARGET_CHARS and TARGET.fullmatch(text) and not text.startswith("/auth/"):
        return text
    return HOME


class Cookie:
    """A cookie that scripts cannot read and that other sites cannot send along with a POST."""

    def __init__(self, name: str, max_age_s: float) -> None:
        self._name = name
        self._max_age_s = int(max_age_s)

    def read(self, headers: Headers, *, secure: bool) -> str:
        """Return the cookie's value; empty: the request has none."""
        wanted = self._full_name(secure=secure)
        for name, value in headers:
            if name == b"cookie":
                for pair in value.decode("latin-1").split(";"):
                    found, _, text = pair.strip().partition("=")
                    if found == wanted:
                        return text
        return ""

    def set(self, value: str, *, secure: bool) -> str:
        """Return the `Set-Cookie` header for a value; an empty value deletes the cookie."""
        age = self._max_age_s if value else 0
        attributes = f"Path=/; Max-Age={age}; HttpOnly; SameSite=Lax{'; Secure' if secure else ''}"
        return f"{self._full_name(secure=secure)}={value}; {attributes}"

    def _full_name(self, *, secure: bool) -> str:
        """Return the name: browsers accept the prefix from this host alone, and only by https."""
        return f"__Host-{self._name}" if secure else self._name
