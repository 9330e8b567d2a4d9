"""The etcd of `nexus up`: connections need a certificate of this stack, reads and writes need a login.

Passwords alone would not suffice: etcd before 3.5.28 lists members, sets alarms and grants leases without a login.
Users are made by etcd's JSON API: gRPC would cost this process memory, and its threads are unsafe beside forks.
"""

from __future__ import annotations

import asyncio
import ssl
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from backbone.registry.permissions import role_grants
from cli.embedded.credentials import ETCD_USERS, SERVER, StackCredentials
from cli.embedded.managed_process import ProcessStartError
from cli.embedded.servers import HOST, EtcdServer

BCRYPT_COST = "4"
"""The least that etcd takes. The passwords are random: slow hashes would protect nothing and delay each login."""
REQUEST_TIMEOUT_S = 5.0
LOGIN_REQUIRED = "user name is empty"
"""etcd's error for a call without a login, once authentication is on."""


class SecuredEtcdServer(EtcdServer):
    """An `EtcdServer` with TLS for clients and peers, and with the users and roles of production."""

    scheme = "https"

    def __init__(self, data_dir: Path, credentials: StackCredentials, *, prefix: str = "/nexus/") -> None:
        """Describe the server. `credentials` exist before its start; roles cover the keys under `prefix`."""
        super().__init__(data_dir)
        self._credentials = credentials
        self._prefix = prefix

    async def start(self) -> None:
        """Start the server, make its users and turn authentication on. Raises as `EmbeddedServer.start` does."""
        await super().start()
        await self._make_users()

    async def restart(self) -> None:
        """Start the server again on the same port and data, and make users that it has lost."""
        await super().restart()
        await self._make_users()

    async def _make_users(self) -> None:
        passwords = {user: self._credentials.password(f"etcd-{user}") for user in ETCD_USERS}
        await make_users(self.url, self._credentials.client_context(), passwords, self._prefix)

    def _arguments(self) -> list[str]:
        files = self._credentials
        certificate, key, ca = str(files.certificate_file(SERVER)), str(files.key_file(SERVER)), str(files.ca_file)
        return [
            *super()._arguments(),
            *("--cert-file", certificate, "--key-file", key, "--trusted-ca-file", ca, "--client-cert-auth"),
            *("--peer-cert-file", certificate, "--peer-key-file", key),
            *("--peer-trusted-ca-file", ca, "--peer-client-cert-auth"),
            *("--auth-token", "simple", "--bcrypt-cost", BCRYPT_COST),
        ]

    async def _is_ready(self) -> bool:
        """Return whether it serves. Another server on its port would have no certificate of this stack's authority."""
        context = self._credentials.client_context()
        reader, writer = await asyncio.open_connection(HOST, self.port, ssl=context)
        try:
            writer.write(b"GET /health HTTP/1.0\r\n\r\n")
            return b'"health":"true"' in await reader.read()
        finally:
            writer.close()


async def make_users(url: str, context: ssl.SSLContext, passwords: Mapping[str, str], prefix: str) -> None:
    """Make users, their roles and grants, and turn authentication on. Does nothing if it is on.

    `passwords` are by user, root among them; each role has its user's name. Raises ProcessStartError.
    """
    async with httpx.AsyncClient(base_url=url, verify=context, trust_env=False, timeout=REQUEST_TIMEOUT_S) as http:
        try:
            if await _is_authentication_on(http):
                return
            for user, password in passwords.items():
                await _call(http, "user/add", name=user, password=password)
                await _call(http, "role/add", name=user)
                for grant in role_grants(prefix).get(user, ()):
                    await _call(http, "role/grant", name=user, perm=_permission(grant.kind, grant.prefix))
                await _call(http, "user/grant", user=user, role=user)
            await _call(http, "enable")
        except httpx.HTTPError as error:
            raise ProcessStartError(f"etcd rejects its users: {error}") from error


async def _is_authentication_on(http: httpx.AsyncClient) -> bool:
    answer = await http.post("/v3/auth/status", json={})
    if LOGIN_REQUIRED in answer.text:  # with authentication on, only root may ask
        return True
    answer.raise_for_status()
    return bool(answer.json().get("enabled"))


async def _call(http: httpx.AsyncClient, method: str, **body: Any) -> None:
    answer = await http.post(f"/v3/auth/{method}", json=body)
    if answer.is_error and "already exists" not in answer.text:  # made by a start that was interrupted
        raise ProcessStartError(f"etcd rejects its users: auth/{method}: {answer.text[:200]}")


def _permission(kind: str, prefix: str) -> dict[str, str]:
    end = prefix[:-1] + chr(ord(prefix[-1]) + 1)  # a prefix ends with a slash
    return {"permType": kind, "key": b64encode(prefix.encode()).decode(), "range_end": b64encode(end.encode()).decode()}
