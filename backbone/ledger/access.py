"""How a gateway reaches the ledger's database: URL and password."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from backbone.secret_files import ConfigurationError, Password
from backbone.settings import GatewaySettings

POSTGRESQL_SCHEMES = frozenset({"postgresql", "postgres"})


@dataclass(frozen=True, slots=True)
class LedgerAccess:
    """A SQLite file, or a PostgreSQL server."""

    sqlite_file: Path | None = None
    postgresql_url: str = ""
    """As libpq takes it; it may hold a password and parameters such as `sslmode`."""
    password: Password | None = None
    """The password from a file, read at each connection."""


def read_ledger_access(settings: GatewaySettings) -> LedgerAccess | None:
    """Return what the settings say; None: no ledger. Raises ConfigurationError."""
    url = settings.ledger_url.get_secret_value()
    password = Password("LEDGER_PASSWORD", None, settings.ledger_password_file)
    if not url:
        return None
    path = url.removeprefix("sqlite:///")
    if path != url:
        if not path or "?" in path:
            raise ConfigurationError(
                "LEDGER_URL must name a file after sqlite:///, such as sqlite:////var/lib/nexus/ledger.db"
            )
        return LedgerAccess(sqlite_file=Path(path).absolute())
    try:
        parts = urlsplit(url)
        valid = parts.scheme in POSTGRESQL_SCHEMES and bool(parts.path.strip("/")) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:  # the URL is not repeated: it may hold a password
        raise ConfigurationError(
            "LEDGER_URL must look like sqlite:////path/to/file or postgresql://user:password@host:5432/database"
        )
    if parts.password and password:
        raise ConfigurationError("LEDGER_URL holds a password and LEDGER_PASSWORD_FILE is set: remove one")
    return LedgerAccess(postgresql_url=url, password=password or None)
