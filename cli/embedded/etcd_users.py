"""Users and roles of the embedded etcd, made by its JSON API: see `etcd_api` for why not by gRPC."""

from __future__ import annotations

import ssl
from base64 import b64encode
from collections.abc import Mapping
from typing import Any

import httpx

from backbone.registry.permissions import role_grants
from cli.embedded.managed_process import ProcessStartError

CALL_S = 5.0
NO_LOGIN = "user name is empty"
"""What etcd says to calls without a login, once authentication is on."""


async def make_users(url: str, context: ssl.SSLContext, passwords: Mapping[str, str], prefix: str) -> None:
    """Make users, their roles and grants, and switch authentication on; does nothing where it is on.

    `passwords` by user, root among them; roles are called as their users are. Raises ProcessStartError.
    """
    async with httpx.AsyncClient(base_url=url, verify=context, trust_env=False, timeout=CALL_S) as http:
        try:
            if await _is_on(http):
                return
            for user, password in passwords.items():
                await _call(http, "user/add", name=user, password=password)
                await _call(http, "role/add", name=user)
                for grant in role_grants(prefix).get(user, ()):
                    await _call(http, "role/grant", name=user, perm=_permission(grant.kind, grant.prefix))
                await _call(http, "user/grant", user=user, role=user)
            await _call(http, "enable")
        except httpx.HTTPError as error:
            raise ProcessStartError(f"etcd does not take its users: {error}") from error


async def _is_on(http: httpx.AsyncClient) -> bool:
    answer = await http.post("/v3/auth/status", json={})
    if NO_LOGIN in answer.text:
        return True  # root alone may ask then
    answer.raise_for_status()
    return bool(answer.json().get("enabled"))


async def _call(http: httpx.AsyncClient, what: str, **body: Any) -> None:
    answer = await http.post(f"/v3/auth/{what}", json=body)
    if answer.is_error and "already exists" not in answer.text:  # a start that was cut short
        raise ProcessStartError(f"etcd does not take its users: auth/{what}: {answer.text[:200]}")


def _permission(kind: str, prefix: str) -> dict[str, str]:
    end = prefix[:-1] + chr(ord(prefix[-1]) + 1)  # a prefix ends with a slash
    return {"permType": kind, "key": b64encode(prefix.encode()).decode(), "range_end": b64encode(end.encode()).decode()}
