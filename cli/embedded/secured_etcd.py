"""The etcd of `nexus up`: nobody connects without a certificate of this stack, and nobody reads or writes without a login.

Passwords alone would not do: etcd before 3.5.28 lists members, sets alarms and grants leases for callers who have not logged in.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from cli.embedded.credentials import ETCD_USERS, SERVER, StackCredentials
from cli.embedded.etcd_users import make_users
from cli.embedded.servers import HOST, EtcdServer

BCRYPT_COST = "4"
"""The least that etcd takes: these passwords are random, and logins shall not cost what makes guessing slow."""


class SecuredEtcdServer(EtcdServer):
    """An `EtcdServer` with TLS for clients and peers alike, and with the users and roles of production."""

    scheme = "https"

    def __init__(self, data_dir: Path, credentials: StackCredentials, *, prefix: str = "/nexus/") -> None:
        """Describe the server. `credentials` are made before its start; roles are for the keys under `prefix`."""
        super().__init__(data_dir)
        self._credentials = credentials
        self._prefix = prefix

    async def start(self) -> None:
        """Start it as every server is started; when this returns, its users are there and authentication is on."""
        await super().start()
        await self._make_users()

    async def restart(self) -> None:
        """Start it again on the same port and data; one that has lost its users gets them again."""
        await super().restart()
        await self._make_users()

    async def _make_users(self) -> None:
        passwords = {user: self._credentials.password(f"etcd-{user}") for user in ETCD_USERS}
        await make_users(self.url, self._credentials.client_context(), passwords, self._prefix)

    def _arguments(self) -> list[str]:
        made = self._credentials
        certificate, key, ca = str(made.certificate_file(SERVER)), str(made.key_file(SERVER)), str(made.ca_file)
        return [
            *super()._arguments(),
            *("--cert-file", certificate, "--key-file", key, "--trusted-ca-file", ca, "--client-cert-auth"),
            *("--peer-cert-file", certificate, "--peer-key-file", key),
            *("--peer-trusted-ca-file", ca, "--peer-client-cert-auth"),
            *("--auth-token", "simple", "--bcrypt-cost", BCRYPT_COST),
        ]

    async def _answers(self) -> bool:
        """Whether it serves. No other server on its port has a certificate that this stack's authority signed."""
        context = self._credentials.client_context()
        reader, writer = await asyncio.open_connection(HOST, self.port, ssl=context)
        try:
            writer.write(b"GET /health HTTP/1.0\r\n\r\n")
            return b'"health":"true"' in await reader.read()
        finally:
            writer.close()
