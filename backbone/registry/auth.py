"""How a process connects to etcd: endpoints, login and TLS."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from backbone.secret_files import ConfigurationError, Password, read_file
from backbone.settings import CommonSettings

DEFAULT_PORT = 2379


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """PEM bytes for https endpoints. Without `ca`: the system's authorities."""

    ca: bytes | None = None
    key: bytes | None = None
    cert: bytes | None = None


@dataclass(frozen=True, slots=True)
class EtcdCredentials:
    """A user of etcd."""

    user: str
    password: Password


@dataclass(frozen=True, slots=True)
class EtcdAccess:
    """The URL and credentials for every endpoint."""

    url: str
    """`http(s)://host:port`, several separated by commas."""
    tls: EtcdTls = EtcdTls()
    login: EtcdCredentials | None = None


def read_etcd_access(settings: CommonSettings) -> EtcdAccess:
    """Return what the settings say. Raises ConfigurationError."""
    password = Password("ETCD_PASSWORD", settings.etcd_password, settings.etcd_password_file)
    if bool(settings.etcd_user) != bool(password):
        raise ConfigurationError(
            "ETCD_USER and ETCD_PASSWORD (or ETCD_PASSWORD_FILE) belong together: set both or neither"
        )
    try:
        parse_endpoints(settings.etcd_url)
    except ValueError as error:
        raise ConfigurationError(f"ETCD_URL (--etcd-url) cannot be used: {error}") from None
    ca, cert, key = settings.etcd_tls_ca, settings.etcd_tls_cert, settings.etcd_tls_key
    if bool(cert) != bool(key):
        raise ConfigurationError("ETCD_TLS_CERT and ETCD_TLS_KEY belong together: set both or neither")
    if (ca or cert) and "https://" not in settings.etcd_url:
        raise ConfigurationError("ETCD_TLS_CA is set, but ETCD_URL is not https: nothing would be encrypted")
    tls = EtcdTls(
        ca=_pem("ETCD_TLS_CA", ca, b"CERTIFICATE"),
        key=_pem("ETCD_TLS_KEY", key, b"PRIVATE KEY"),
        cert=_pem("ETCD_TLS_CERT", cert, b"CERTIFICATE"),
    )
    return EtcdAccess(settings.etcd_url, tls, EtcdCredentials(settings.etcd_user, password) if password else None)


def _pem(setting: str, path: str, what: bytes) -> bytes | None:
    if not path:
        return None
    data = read_file(setting, path)
    if what + b"-----" not in data:
        raise ConfigurationError(f"{setting}: {path} contains no {what.decode().lower()} in PEM form")
    return data


def parse_endpoints(url: str) -> list[tuple[str, bool]]:
    """Parse the URL: `http://a:2379,https://b` -> [("a:2379", False), ("b:2379", True)]. Raises ValueError."""
    found = []
    for part in filter(None, (part.strip() for part in url.split(","))):
        parts = urlsplit(part if "://" in part else f"http://{part}")
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username:
            raise ValueError("an etcd URL is http(s)://host:port, several separated by commas")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        found.append((f"{host}:{parts.port or DEFAULT_PORT}", parts.scheme == "https"))
    if not found:
        raise ValueError("the etcd URL is empty")
    return found
