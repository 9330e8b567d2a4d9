"""How a gateway connects to Redis: URL, credentials and TLS."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

from redis.credentials import CredentialProvider

from backbone.secret_files import ConfigurationError, Password, read_file
from backbone.settings import CommonSettings

SCHEMES = frozenset({"redis", "rediss", "unix"})


@dataclass(frozen=True, slots=True)
class RedisAccess:
    """The URL, a password file, and a certificate authority."""

    url: str
    """As redis-py takes it: `redis://`, `rediss://`, `unix://`; with or without user and password."""
    credentials: CredentialProvider | None = None
    ca_file: str = ""


class _FromFile(CredentialProvider):
    """Reads the password from its file for each connection."""

    def __init__(self, user: str, password: Password) -> None:
        self._user = user
        self._password = password

    def get_credentials(self) -> tuple[str, str] | tuple[str]:
        try:
            password = self._password.read()
        except ConfigurationError as error:
            raise OSError(str(error)) from error
        return (self._user, password) if self._user else (password,)

    async def get_credentials_async(self) -> tuple[str, str] | tuple[str]:
        return self.get_credentials()


def _parsed(url: str) -> SplitResult:
    """Parse the URL. Raises ConfigurationError for an invalid one, without repeating it: it may hold a password."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in SCHEMES and (parts.scheme == "unix" or parts.port != 0)
        if parts.scheme != "unix":
            valid = valid and parts.path.strip("/").isdecimal() | (parts.path.strip("/") == "")
    except ValueError:
        valid = False
    if not valid:
        raise ConfigurationError(
            "REDIS_URL (--redis-url) must look like redis://host:6379/0, rediss://user:password@host:6379/0 or unix:///path"
        )
    return parts


def read_redis_access(settings: CommonSettings) -> RedisAccess:
    """Return what the settings say. Raises ConfigurationError."""
    parts = _parsed(settings.redis_url)
    ca = settings.redis_tls_ca
    if ca:
        if parts.scheme != "rediss":
            raise ConfigurationError("REDIS_TLS_CA is set, but REDIS_URL is not rediss://: nothing would be encrypted")
        if b"CERTIFICATE-----" not in read_file("REDIS_TLS_CA", ca):
            raise ConfigurationError(f"REDIS_TLS_CA: {ca} contains no certificate in PEM form")
    password = Password("REDIS_PASSWORD", None, settings.redis_password_file)
    if not password:
        return RedisAccess(settings.redis_url, ca_file=ca)
    if parts.password:
        raise ConfigurationError("REDIS_URL holds a password and REDIS_PASSWORD_FILE is set: remove one")
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return RedisAccess(bare, _FromFile(unquote(parts.username or ""), password), ca)
