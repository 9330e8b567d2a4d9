"""An HTTP client for commands that only call a gateway: the standard library's, with proxies, forms and error classes.

httpx takes a quarter of a second of CPU to import, more than such a command needs in all.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import (
    HTTPConnection,
    HTTPException,
    HTTPMessage,
    HTTPResponse,
    HTTPSConnection,
    IncompleteRead,
    InvalidURL,
)
from ipaddress import ip_address
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import SplitResult, urljoin, urlsplit

if TYPE_CHECKING:
    from ssl import SSLContext

CONNECT_TIMEOUT_S = 3.0
READ_BYTES = 64 * 1024
DEFAULT_PORTS = {"http": 80, "https": 443}

Files = list[tuple[str, tuple[str, IO[bytes]]]]
"""File fields of a form: the field, then the file's name and content."""


class HttpError(Exception):
    """A request failed without a complete answer."""


class InvalidUrl(HttpError):
    """The URL or a header's value cannot be sent."""


class NoConnection(HttpError):
    """Nothing answers at the URL."""


class UntrustedCertificate(HttpError):
    """The server's certificate has no authority that this machine trusts, or names another host."""


class HttpTimeout(HttpError):
    """The answer or its next part did not arrive in time."""


class ConnectionBroken(HttpError):
    """The connection ended before the answer did."""


class StreamedResponse:
    """A response whose body is read as it arrives. The caller closes it."""

    def __init__(self, connection: HTTPConnection, raw: HTTPResponse) -> None:
        self._connection = connection
        self._raw = raw
        self._body: bytes | None = None
        self.status = raw.status
        self.reason = raw.reason
        self.headers: HTTPMessage = raw.headers

    def parts(self) -> Iterator[bytes]:
        """Yield the body as it arrives. Raises HttpError."""
        with _translate_errors():
            while part := self._raw.read1(READ_BYTES):
                yield part
            if self._raw.length:
                raise IncompleteRead(b"", self._raw.length)

    def read(self) -> bytes:
        """Return the whole body. Raises HttpError."""
        if self._body is None:
            self._body = b"".join(self.parts())
        return self._body

    def json(self) -> Any:
        """Return the body as JSON. Raises HttpError and ValueError."""
        return json.loads(self.read())

    def close(self) -> None:
        """Close the connection, upon which the gateway stops the answer."""
        self._raw.close()
        self._connection.close()


class ConsoleHttpClient:
    """Sends requests to one server, each on its own connection."""

    def __init__(self, base_url: str, headers: Mapping[str, str] | None = None) -> None:
        self._base = base_url
        self._headers = {"user-agent": "nexus", **(headers or {})}
        self._tls: SSLContext | None = None

    def send(
        self,
        method: str,
        path: str,
        *,
        read_s: float,
        body: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> StreamedResponse:
        """Send a request and return the response, its body unread. Raises HttpError.

        `read_s` is the time limit for each read.
        """
        url = _parse_url(self._base.rstrip("/") + path)
        connection, target, extra = self._connection(url)
        try:
            with _translate_errors(NoConnection):
                connection.connect()
            with _translate_errors():
                connection.sock.settimeout(read_s)
                _send(connection, method, target, body, {**self._headers, **extra, **(headers or {})})
                return StreamedResponse(connection, connection.getresponse())
        except BaseException:
            connection.close()
            raise

    def _connection(self, url: SplitResult) -> tuple[HTTPConnection, str, dict[str, str]]:
        """Return a connection for `url`, the target of the request line, and headers for a proxy."""
        host, port = url.hostname or "", url.port or DEFAULT_PORTS[url.scheme]
        target = url._replace(scheme="", netloc="", path=url.path or "/", fragment="").geturl()
        proxy = None if is_loopback(host) else _proxy(url)
        place = (proxy.hostname or "", proxy.port or DEFAULT_PORTS["http"]) if proxy else (host, port)
        extra = _proxy_authorization(proxy) if proxy else {}
        if url.scheme == "https":
            tls = HTTPSConnection(*place, timeout=CONNECT_TIMEOUT_S, context=self._tls_context())
            if proxy:
                tls.set_tunnel(host, port, headers=extra)
            return tls, target, {}
        plain = HTTPConnection(*place, timeout=CONNECT_TIMEOUT_S)
        return plain, url._replace(fragment="").geturl() if proxy else target, extra

    def _tls_context(self) -> SSLContext:
        """Return a context that trusts SSL_CERT_FILE; without that, this machine's authorities and certifi's if installed."""
        if self._tls is None:
            import ssl

            self._tls = ssl.create_default_context()
            if not os.environ.get("SSL_CERT_FILE"):
                with suppress(ImportError, OSError):
                    import certifi

                    self._tls.load_verify_locations(certifi.where())
        return self._tls


def resolve_url(base: str, url: str) -> tuple[str, str]:
    """Return the server and the path of `url`, which may be relative to `base`. Raises InvalidUrl."""
    parts = _parse_url(urljoin(base, url))
    return f"{parts.scheme}://{parts.netloc}", parts._replace(scheme="", netloc="").geturl()


def is_loopback(host: str) -> bool:
    """Return whether the host is this machine. Proxies are not used for it."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def encode_form(fields: Mapping[str, Any], files: Files) -> tuple[Iterator[bytes], dict[str, str]]:
    """Return a multipart/form-data body and its headers. Files are read while the body is sent."""
    from mimetypes import guess_type
    from secrets import token_hex

    boundary = token_hex(16)
    heads: list[tuple[bytes, bytes | IO[bytes]]] = []
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        heads.extend((_part_head(boundary, name), str(one).encode()) for one in values)
    for name, (file_name, file) in files:
        kind = guess_type(file_name)[0] or "application/octet-stream"
        heads.append((_part_head(boundary, name, file_name, kind), file))
    end = f"--{boundary}--\r\n".encode()
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    sizes = [_size(content) for _, content in heads]
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes):
        total = sum(len(head) + 2 for head, _ in heads) + sum(known) + len(end)
        headers["content-length"] = str(total)
    return _form_parts(heads, end), headers


def _form_parts(heads: list[tuple[bytes, bytes | IO[bytes]]], end: bytes) -> Iterator[bytes]:
    for head, content in heads:
        yield head
        if isinstance(content, bytes):
            yield content
        else:
            while part := content.read(READ_BYTES):
                yield part
        yield b"\r\n"
    yield end


def _part_head(boundary: str, name: str, file_name: str | None = None, kind: str = "") -> bytes:
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{_quoted(name)}"'
    if file_name is not None:
        head += f'; filename="{_quoted(file_name)}"\r\nContent-Type: {kind}'
    return f"{head}\r\n\r\n".encode()


def _quoted(name: str) -> str:
    """Escape a name as the HTML standard prescribes."""
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def _size(content: bytes | IO[bytes]) -> int | None:
    """Return the bytes left to read; None for a pipe."""
    if isinstance(content, bytes):
        return len(content)
    status = os.fstat(content.fileno())
    return status.st_size - content.tell() if stat.S_ISREG(status.st_mode) else None


def _send(
    connection: HTTPConnection,
    method: str,
    target: str,
    body: bytes | Iterable[bytes] | None,
    headers: Mapping[str, str],
) -> None:
    chunked = not (body is None or isinstance(body, bytes) or "content-length" in headers)
    extra = {"transfer-encoding": "chunked"} if chunked else {}
    with suppress(BrokenPipeError, ConnectionResetError):  # the server rejected the request early: its answer says why
        connection.request(method, target, body=body, headers={**headers, **extra}, encode_chunked=chunked)


def _parse_url(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise InvalidUrl(str(error)) from error
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        raise InvalidUrl(f"{url} has no host, or does not begin with http:// or https://")
    return parts


def _proxy(url: SplitResult) -> SplitResult | None:
    """Return the proxy for `url` by HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY."""
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    address = proxies.get(url.scheme) or proxies.get("all")
    if not address or proxy_bypass(url.hostname or ""):
        return None
    proxy = _parse_url(address if "://" in address else f"http://{address}")
    if proxy.scheme != "http":
        raise InvalidUrl(f"the proxy {proxy.hostname} does not begin with http://")
    return proxy


def _proxy_authorization(proxy: SplitResult) -> dict[str, str]:
    if not proxy.username:
        return {}
    from base64 import b64encode
    from urllib.parse import unquote

    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"proxy-authorization": f"Basic {b64encode(pair.encode()).decode()}"}


@contextmanager
def _translate_errors(otherwise: type[HttpError] = ConnectionBroken) -> Iterator[None]:
    """Raise the standard library's errors as HttpError."""
    try:
        yield
    except TimeoutError as error:
        raise (HttpTimeout if otherwise is ConnectionBroken else otherwise)("no answer in time") from error
    except (InvalidURL, UnicodeError) as error:
        raise InvalidUrl(f"the URL or the key holds characters that HTTP does not allow ({error})") from error
    except (OSError, HTTPException) as error:
        if reason := getattr(
            error, "verify_message", ""
        ):  # of ssl.SSLCertVerificationError, which is not imported for http://
            raise UntrustedCertificate(reason) from error
        raise otherwise(str(error) or type(error).__name__) from error
    except ValueError as error:  # a line break in a header
        raise InvalidUrl(f"the URL or the key holds characters that HTTP does not allow ({error})") from error
