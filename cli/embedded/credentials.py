"""Credentials of an embedded stack: passwords and certificates, new at each start, in a folder that only its owner reads.

Processes get the paths of these files, not their content, so that command lines and logs hold no secret.
"""

from __future__ import annotations

import secrets
import shutil
import ssl
from pathlib import Path

from cli.private_files import private_folder, write_private

NATS_USER = "nexus"
ETCD_USERS = ("root", "gateway", "worker")
PASSWORDS = ("nats", "redis", *(f"etcd-{user}" for user in ETCD_USERS))
SERVER, CLIENT = "etcd", "etcd-client"
"""Names of the two certificates: etcd's own, and its clients'."""
PASSWORD_BYTES = 24


class StackCredentials:
    """The files of credentials in one folder. Call `make` first."""

    def __init__(self, folder: Path) -> None:
        """Describe the folder; nothing is written."""
        self.folder = folder
        self.ca_file = folder / "ca.crt"
        self._passwords: dict[str, str] = {}

    def make(self) -> None:
        """Write new passwords and certificates in place of earlier ones. Raises OSError."""
        from cli.embedded.certificates import make_certificates  # takes 80 ms to import

        self.remove()
        private_folder(self.folder)
        authority, pairs = make_certificates((SERVER, CLIENT))
        write_private(self.ca_file, authority, durable=False)
        for name, pair in pairs.items():
            write_private(self.certificate_file(name), pair.certificate, durable=False)
            write_private(self.key_file(name), pair.key, durable=False)
        self._passwords = {name: secrets.token_urlsafe(PASSWORD_BYTES) for name in PASSWORDS}
        for name, password in self._passwords.items():
            write_private(self.password_file(name), password + "\n", durable=False)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def password(self, name: str) -> str:
        """Return one of `PASSWORDS`."""
        return self._passwords[name]

    def password_file(self, name: str) -> Path:
        """Return the file of one of `PASSWORDS`."""
        return self.folder / f"{name}-password"

    def certificate_file(self, name: str) -> Path:
        """Return the file of the certificate of `SERVER` or `CLIENT`."""
        return self.folder / f"{name}.crt"

    def key_file(self, name: str) -> Path:
        """Return the file of the private key of `SERVER` or `CLIENT`."""
        return self.folder / f"{name}.key"

    def client_context(self) -> ssl.SSLContext:
        """Return the TLS context for a client of etcd."""
        context = ssl.create_default_context(cafile=self.ca_file)
        context.load_cert_chain(self.certificate_file(CLIENT), self.key_file(CLIENT))
        return context

    def settings(self, role: str) -> dict[str, str]:
        """Return the variables with which a process of this role, `gateway` or `worker`, logs in to all servers."""
        found = {
            "NATS_USER": NATS_USER,
            "NATS_PASSWORD_FILE": str(self.password_file("nats")),
            "ETCD_USER": role,
            "ETCD_PASSWORD_FILE": str(self.password_file(f"etcd-{role}")),
            "ETCD_TLS_CA": str(self.ca_file),
            "ETCD_TLS_CERT": str(self.certificate_file(CLIENT)),
            "ETCD_TLS_KEY": str(self.key_file(CLIENT)),
        }
        return found | ({"REDIS_PASSWORD_FILE": str(self.password_file("redis"))} if role == "gateway" else {})
