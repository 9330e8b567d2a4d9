"""StackCredentials of an embedded stack: passwords and certificates that each start makes anew, in a folder of their owner's.

Processes are given the names of these files, never what is in them: command lines and logs hold no secret.
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
"""The two certificates: etcd's own, and the one that its clients show."""
PASSWORD_BYTES = 24


class StackCredentials:
    """Paths and contents of the files in one folder. `make` comes first."""

    def __init__(self, folder: Path) -> None:
        """Describe the folder; nothing is written yet."""
        self.folder = folder
        self.ca_file = folder / "ca.crt"
        self._passwords: dict[str, str] = {}

    def make(self) -> None:
        """Write new passwords and certificates in the place of all earlier ones. Raises OSError."""
        from cli.embedded.certificates import make_certificates  # 80 ms to import

        self.forget()
        private_folder(self.folder)
        authority, pairs = make_certificates((SERVER, CLIENT))
        write_private(self.ca_file, authority, durable=False)
        for name, pair in pairs.items():
            write_private(self.certificate_file(name), pair.certificate, durable=False)
            write_private(self.key_file(name), pair.key, durable=False)
        self._passwords = {name: secrets.token_urlsafe(PASSWORD_BYTES) for name in PASSWORDS}
        for name, password in self._passwords.items():
            write_private(self.password_file(name), password + "\n", durable=False)

    def forget(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def password(self, name: str) -> str:
        """Return one of `PASSWORDS`."""
        return self._passwords[name]

    def password_file(self, name: str) -> Path:
        """Return where one of `PASSWORDS` is."""
        return self.folder / f"{name}-password"

    def certificate_file(self, name: str) -> Path:
        """Return where `SERVER`'s or `CLIENT`'s certificate is."""
        return self.folder / f"{name}.crt"

    def key_file(self, name: str) -> Path:
        """Return where the private key of that certificate is."""
        return self.folder / f"{name}.key"

    def client_context(self) -> ssl.SSLContext:
        """Return what a client of etcd needs for its TLS handshake."""
        context = ssl.create_default_context(cafile=self.ca_file)
        context.load_cert_chain(self.certificate_file(CLIENT), self.key_file(CLIENT))
        return context

    def settings(self, role: str) -> dict[str, str]:
        """Return the environment variables by which a process of this role, `gateway` or `worker`, logs in everywhere."""
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
