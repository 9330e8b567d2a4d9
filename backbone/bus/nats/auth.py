"""How a process connects to NATS: addresses, credentials and TLS."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from backbone.bus.refusal_counter import RefusalCounter
from backbone.secret_files import ConfigurationError, Password, read_file
from backbone.settings import CommonSettings

INBOX = "_INBOX"
SCHEMES = frozenset({"nats", "tls", "ws", "wss"})
_TOKEN = re.compile(r"[A-Za-z0-9_-]+")
_INBOX = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True, slots=True)
class NatsAccess:
    """The addresses and credentials of every connection of a process. A URL alone means an open server without TLS."""

    url: str
    """`nats://` or `tls://`, with user and password unless these are given below; several separated by commas."""
    user: str = ""
    password: Password | None = None
    creds_file: str = ""
    """A user's JWT and seed, as `nsc` writes them."""
    tls: ssl.SSLContext | None = None
    inbox_prefix: str = INBOX
    """The prefix of every inbox of this process, so that permissions can keep its user out of all others."""
    refusals: RefusalCounter = field(default_factory=RefusalCounter, compare=False)
    """Refusals on the connections of this process."""

    @property
    def servers(self) -> list[str]:
        """The URLs one by one."""
        return [part.strip() for part in self.url.split(",") if part.strip()]

    @property
    def requires_tls(self) -> bool:
        """Whether a connection without TLS is refused."""
        return self.tls is not None

    @property
    def redacted_url(self) -> str:
        """The URLs without their secrets."""
        return ",".join(_without_password(server) for server in self.servers)


def read_nats_access(settings: CommonSettings) -> NatsAccess:
    """Return what the settings say. Raises ConfigurationError."""
    password = Password("NATS_PASSWORD", settings.nats_password, settings.nats_password_file)
    user, creds = settings.nats_user, settings.nats_creds_file
    if bool(user) != bool(password):
        raise ConfigurationError(
            "NATS_USER and NATS_PASSWORD (or NATS_PASSWORD_FILE) belong together: set both or neither"
        )
    if creds and user:
        raise ConfigurationError("NATS_CREDS_FILE and NATS_USER are both set: remove one")
    if creds:
        read_file("NATS_CREDS_FILE", creds)
    _check_urls(settings.nats_url)
    return NatsAccess(
        url=settings.nats_url,
        user=user,
        password=password or None,
        creds_file=creds,
        tls=_tls(settings),
        inbox_prefix=_inbox(settings.nats_inbox_prefix, user),
    )


def _check_urls(text: str) -> None:
    """Check the URLs. Raises ConfigurationError, without repeating an URL: it may hold a password."""
    urls = [part.strip() for part in text.split(",") if part.strip()]
    for url in urls:
        try:
            parts = urlsplit(url if "://" in url else f"nats://{url}")
            valid = parts.scheme in SCHEMES and bool(parts.hostname) and " " not in url and parts.port != 0
        except ValueError:
            valid = False
        if not valid:
            urls = []
    if not urls:
        raise ConfigurationError(
            "NATS_URL (--nats-url) must look like nats://host:4222 or tls://host:4222, several separated by commas"
        )


def _inbox(wanted: str, user: str) -> str:
    """Return the configured prefix, else the user's own, as `nexus permissions` grants it."""
    inbox = wanted or (f"{INBOX}.{user}" if _TOKEN.fullmatch(user) else INBOX)
    if not _INBOX.fullmatch(inbox):
        raise ConfigurationError("NATS_INBOX_PREFIX must be one or more words of [A-Za-z0-9_-], separated by dots")
    return inbox


def _tls(settings: CommonSettings) -> ssl.SSLContext | None:
    ca, cert, key = settings.nats_tls_ca, settings.nats_tls_cert, settings.nats_tls_key
    wanted = any(part.strip().startswith("tls://") for part in settings.nats_url.split(","))
    if not (ca or cert or key or wanted):
        return None
    return create_client_tls_context("NATS", ca, cert, key)


def create_client_tls_context(name: str, ca: str, cert: str, key: str) -> ssl.SSLContext:
    """Return a TLS context that trusts `ca`, or the system's authorities, and presents `cert`. Raises ConfigurationError."""
    if bool(cert) != bool(key):
        raise ConfigurationError(f"{name}_TLS_CERT and {name}_TLS_KEY belong together: set both or neither")
    for setting, path in ((f"{name}_TLS_CA", ca), (f"{name}_TLS_CERT", cert), (f"{name}_TLS_KEY", key)):
        if path:
            read_file(setting, path)
    try:
        context = ssl.create_default_context(cafile=Path(ca) if ca else None)
    except ssl.SSLError as error:
        raise ConfigurationError(f"{name}_TLS_CA: {ca} contains no certificate in PEM form") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert:
        try:
            context.load_cert_chain(cert, key)
        except ssl.SSLError as error:
            raise ConfigurationError(
                f"{name}_TLS_CERT and {name}_TLS_KEY do not contain a certificate and its key"
            ) from error
    return context


def _without_password(url: str) -> str:
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
