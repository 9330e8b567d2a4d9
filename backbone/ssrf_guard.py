"""An HTTP client for URLs of strangers, which does not reach what only this host can reach.

- `http` and `https` only, without credentials in the URL. A host is judged by its addresses: every one must be public, also
  those that are embedded in IPv6 (mapped, 6to4, NAT64, Teredo).
- The connection goes to the very address that was checked, so that a name which resolves differently a moment later (rebinding)
  gains nothing; TLS still checks the certificate against the name.
- Each redirect of a GET is checked like a first URL; a POST follows none. Bodies are bounded in size, and the whole request in
  time. Proxies and credentials of the environment are not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urljoin, urlsplit

from backbone.public_addresses import Address, is_public
from schemas.errors import InvalidRequest

if TYPE_CHECKING:
    import httpx

REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 3
MAX_POST_RESPONSE_BYTES = 4096
"""The body of a response to a POST is read up to this size, and dropped."""
BODY_TIMEOUT_S = 1.0
CONTENT_TYPE = re.compile(r"[\w.+\-]{1,64}/[\w.+\-]{1,128}", re.ASCII)
NOT_PUBLIC_MESSAGE = "the URL's host is not public"
Resolve = Callable[[str, int], Awaitable[list[str]]]


class FetchRefused(InvalidRequest):
    """The URL must not be fetched."""

    code = "url_refused"


@dataclass(frozen=True, slots=True)
class FetchedContent:
    """The content of a URL."""

    data: bytes
    content_type: str
    """Without parameters, in lower case."""


async def resolve(host: str, port: int) -> list[str]:
    """Return every address of `host`. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class GuardedHttpClient:
    """An HTTP client for URLs of strangers; see the module's docstring."""

    def __init__(
        self,
        *,
        max_bytes: int,
        timeout_s: float,
        private_hosts: frozenset[str] = frozenset(),
        resolve: Resolve = resolve,
        setting: str = "",
    ) -> None:
        """Configure the limits. `private_hosts`: `host` or `host:port` that may be fetched whatever their addresses; `setting`:
        the setting that holds them, for messages.
        """
        self._not_public = (
            f"{NOT_PUBLIC_MESSAGE}; an operator can allow it: host:port in {setting}" if setting else NOT_PUBLIC_MESSAGE
        )
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._private_hosts = private_hosts
        self._resolve = resolve
        self._client: httpx.AsyncClient | None = None

    async def close(self) -> None:
        """Close every connection."""
        if self._client is not None:
            await self._client.aclose()

    async def fetch(self, url: str, kind: str) -> FetchedContent:
        """Return the content of `url`, whose content type must begin with `kind`. Raises FetchRefused with the reason."""
        try:
            async with asyncio.timeout(self._timeout_s):
                for _ in range(MAX_REDIRECTS + 1):
                    found = await self._get(url, kind)
                    if isinstance(found, FetchedContent):
                        return found
                    url = urljoin(url, found)
        except TimeoutError as error:
            raise FetchRefused(f"the URL did not answer within {self._timeout_s:g} s") from error
        raise FetchRefused(f"the URL redirects more than {MAX_REDIRECTS} times")

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Send `body`, and return the status of the response, also of a redirect, which is not followed. Raises FetchRefused
        with the reason.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._send("POST", url, headers, body)
        except TimeoutError as error:
            raise FetchRefused(f"the URL did not answer within {self._timeout_s:g} s") from error
        try:
            await self._drain(response)
        finally:
            await response.aclose()
        return response.status_code

    def validate_url(self, url: str) -> None:
        """Check a URL without a request, and raise FetchRefused for one that can never work. Names are resolved when they are
        used.
        """
        parts = _parse(url)
        host, port = (parts.hostname or "").rstrip("."), _port(parts)
        if {host, f"{host}:{port}"} & self._private_hosts:
            return
        address = _literal(host)
        if host == "localhost" or host.endswith(".localhost") or (address is not None and not is_public(address)):
            raise FetchRefused(self._not_public)

    async def _get(self, url: str, kind: str) -> FetchedContent | str:
        """Return the content, or the location of a redirect."""
        import httpx

        response = await self._send("GET", url, {"accept": f"{kind}*", "accept-encoding": "identity"})
        try:
            if response.status_code in REDIRECT_STATUSES:
                return str(response.headers.get("location", ""))
            return await self._read(response, kind)
        except httpx.HTTPError as error:
            raise FetchRefused(f"the URL cannot be reached: {type(error).__name__}") from error
        finally:
            await response.aclose()

    async def _send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> httpx.Response:
        """Return the response with its body unread. Close it."""
        import httpx

        parts = _parse(url)
        address = await self._address(parts)
        host = f"[{address}]" if isinstance(address, IPv6Address) else str(address)
        if self._client is None:
            # Creating a client loads some hundred certificates: do it once.
            self._client = httpx.AsyncClient(
                trust_env=False,
                follow_redirects=False,
                timeout=self._timeout_s,
                limits=httpx.Limits(max_keepalive_connections=0),
            )
        try:
            request = self._client.build_request(
                method,
                httpx.URL(url).copy_with(host=host),
                content=body,
                headers={**headers, "host": parts.netloc, "user-agent": "nexus"},
                extensions={"sni_hostname": parts.hostname},
            )
            return await self._client.send(request, stream=True)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise FetchRefused(f"the URL cannot be reached: {type(error).__name__}") from error

    async def _drain(self, response: httpx.Response) -> None:
        """Read a short body to its end, so that the connection closes in order; a long or slow one is cut off."""
        import httpx

        size = 0
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for part in response.aiter_raw(MAX_POST_RESPONSE_BYTES):
                    size += len(part)
                    if size >= MAX_POST_RESPONSE_BYTES:
                        return

    async def _read(self, response: httpx.Response, kind: str) -> FetchedContent:
        if response.status_code != 200:
            raise FetchRefused(f"the URL answers {response.status_code}")
        coding = response.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):  # a few encoded bytes may decode to very many
            raise FetchRefused(f"the URL's content is compressed ({coding[:40]}) although the request excluded that")
        content_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type and not CONTENT_TYPE.fullmatch(content_type):
            raise FetchRefused("the URL's answer has no valid Content-Type")
        if not content_type.startswith(kind):
            raise FetchRefused(f"the URL's Content-Type is {content_type or 'missing'}; it must begin with {kind}")
        parts: list[bytes] = []
        size = 0
        async for part in response.aiter_raw():
            size += len(part)
            if size > self._max_bytes:
                raise FetchRefused(f"the URL's content is larger than {self._max_bytes} bytes")
            parts.append(part)
        return FetchedContent(b"".join(parts), content_type)

    async def _address(self, parts: SplitResult) -> Address:
        """Return the address to connect to. Raises FetchRefused when one of them is not public."""
        host, port = parts.hostname or "", _port(parts)
        try:
            addresses = [ip_address(text.partition("%")[0]) for text in await self._resolve(host, port)]
        except (OSError, ValueError) as error:
            raise FetchRefused("the URL's host cannot be resolved") from error
        if not addresses:
            raise FetchRefused("the URL's host cannot be resolved")
        if not {host, f"{host}:{port}"} & self._private_hosts and not all(map(is_public, addresses)):
            raise FetchRefused(self._not_public)
        return addresses[0]


def _parse(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        valid = bool(parts.hostname) and parts.netloc.isascii() and (parts.port is None or parts.port > 0)
    except ValueError as error:
        raise FetchRefused("the URL is not valid") from error
    if parts.scheme not in ("http", "https") or not valid:
        raise FetchRefused("the URL must be http or https, with the host in ASCII")
    if parts.username is not None or parts.password is not None:
        raise FetchRefused("the URL must not contain credentials")
    return parts


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _literal(host: str) -> Address | None:
    """Return the address that `host` spells, also in old notations (`127.1`, `0x7f.0.0.1`); None: it is a name."""
    with contextlib.suppress(ValueError):
        return ip_address(host.partition("%")[0])
    with contextlib.suppress(OSError):
        return IPv4Address(socket.inet_aton(host))
    return None
