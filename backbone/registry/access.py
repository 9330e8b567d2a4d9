"""How one process gets into etcd: who it is, and whom it believes."""

from __future__ import annotations

from dataclasses import dataclass

from backbone.secret_files import Misconfigured, Password, read_file
from backbone.settings import CommonSettings


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM bytes for https endpoints. No `ca`: the system's roots."""

    ca: bytes | None = None
    key: bytes | None = None
    cert: bytes | None = None


@dataclass(frozen=True, slots=True)
class Login:
    """A user of etcd."""

    user: str
    password: Password


@dataclass(frozen=True, slots=True)
class EtcdAccess:
    """For every endpoint alike."""

    url: str
    """`http(s)://host:port`, several separated by commas."""
    tls: Tls = Tls()
    login: Login | None = None


def etcd_access(settings: CommonSettings) -> EtcdAccess:
    """What the settings say. Raises Misconfigured."""
    password = Password("ETCD_PASSWORD", settings.etcd_password, settings.etcd_password_file)
    if bool(settings.etcd_user) != bool(password):
        raise Misconfigured("ETCD_USER and ETCD_PASSWORD (or ETCD_PASSWORD_FILE) go together: set both or neither")
    ca, cert, key = settings.etcd_tls_ca, settings.etcd_tls_cert, settings.etcd_tls_key
    if bool(cert) != bool(key):
        raise Misconfigured("ETCD_TLS_CERT and ETCD_TLS_KEY go together: set both or neither")
    if (ca or cert) and "https://" not in settings.etcd_url:
        raise Misconfigured("ETCD_TLS_CA is set, but ETCD_URL is not https: nothing would be encrypted")
    tls = Tls(
        ca=_pem("ETCD_TLS_CA", ca, b"CERTIFICATE"),
        key=_pem("ETCD_TLS_KEY", key, b"PRIVATE KEY"),
        cert=_pem("ETCD_TLS_CERT", cert, b"CERTIFICATE"),
    )
    return EtcdAccess(settings.etcd_url, tls, Login(settings.etcd_user, password) if password else None)


def _pem(setting: str, path: str, what: bytes) -> bytes | None:
    if not path:
        return None
    data = read_file(setting, path)
    if what + b"-----" not in data:
        raise Misconfigured(f"{setting}: {path} holds no {what.decode().lower()} in PEM form")
    return data
