"""Creates users and roles of etcd with the grants of `role_grants`."""

from __future__ import annotations

from collections.abc import Mapping

import grpc.aio  # type: ignore[import-untyped]
from etcd3aio import EtcdError, prefix_range_end
from etcd3aio.auth import AuthService, PermissionType

from backbone.registry.auth import EtcdAccess, parse_endpoints
from backbone.registry.etcd_client import create_channel
from backbone.registry.permissions import ROOT, EtcdGrant, role_grants
from backbone.retry import Backoff, retry
from schemas.errors import Unavailable

CALL_TIMEOUT_S = 10.0
START_TIMEOUT_S = 30.0
"""For an etcd that is just starting."""


async def create_users(access: EtcdAccess, prefix: str, passwords: Mapping[str, str]) -> bool:
    """Create or update users, passwords, roles and authentication. False: authentication was enabled already.

    `passwords` by user, root among them; root's must be the current one where authentication is enabled. Raises Unavailable.
    """
    (address, secure), *_ = parse_endpoints(access.url)
    channel = create_channel(address, secure, access.tls)
    try:
        auth = AuthService(channel)
        enabled = await _wait_until_answered(auth)
        if enabled:
            auth.set_token((await auth.authenticate(ROOT, passwords[ROOT], timeout=CALL_TIMEOUT_S)).token)
        users = set((await auth.user_list(timeout=CALL_TIMEOUT_S)).users)
        roles = set((await auth.role_list(timeout=CALL_TIMEOUT_S)).roles)
        for user, password in passwords.items():
            if user not in users:
                await auth.user_add(user, password, timeout=CALL_TIMEOUT_S)
            elif not enabled or not await _password_works(auth, user, password):
                await auth.user_change_password(user, password, timeout=CALL_TIMEOUT_S)
        for role, wanted in {ROOT: (), **role_grants(prefix)}.items():
            if role not in roles:
                await auth.role_add(role, timeout=CALL_TIMEOUT_S)
            await _grant(auth, role, wanted)
            if role in passwords:
                await auth.user_grant_role(role, role, timeout=CALL_TIMEOUT_S)
        if not enabled:
            await auth.auth_enable(timeout=CALL_TIMEOUT_S)
        return not enabled
    except (EtcdError, grpc.aio.AioRpcError, TimeoutError) as error:
        text = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
        raise Unavailable(f"etcd at {address}: {text}") from error
    finally:
        await channel.close()


async def _grant(auth: AuthService, role: str, wanted: tuple[EtcdGrant, ...]) -> None:
    """Make these the role's only permissions. Unchanged ones are not written: each change makes every process log in again."""
    there = {
        (bytes(one.key), bytes(one.range_end)): one.permType
        for one in (await auth.role_get(role, timeout=CALL_TIMEOUT_S)).perm
    }
    ranges = {(grant.prefix.encode(), prefix_range_end(grant.prefix)): PermissionType[grant.kind] for grant in wanted}
    for key, end in there:
        if role != ROOT and (key, end) not in ranges:
            await auth.role_revoke_permission(role, key, end, timeout=CALL_TIMEOUT_S)
    for (key, end), kind in ranges.items():
        if there.get((key, end)) != kind:
            await auth.role_grant_permission(role, key, end, perm_type=kind, timeout=CALL_TIMEOUT_S)


async def _password_works(auth: AuthService, user: str, password: str) -> bool:
    try:
        await auth.authenticate(user, password, timeout=CALL_TIMEOUT_S, max_attempts=1)
    except (EtcdError, grpc.aio.AioRpcError) as error:
        text = (error.details() or "") if isinstance(error, grpc.aio.AioRpcError) else str(error)
        if "authentication failed" not in text:
            raise
        return False
    return True


async def _wait_until_answered(auth: AuthService) -> bool:
    """Wait until etcd answers, and return whether authentication is enabled."""

    async def is_enabled() -> bool:
        try:
            return bool((await auth.auth_status(timeout=2.0, max_attempts=1)).enabled)
        except grpc.aio.AioRpcError as error:
            if "user name is empty" in (error.details() or ""):
                return True  # etcd 3.5 answers this question to root alone
            raise

    errors = (EtcdError, grpc.aio.AioRpcError, TimeoutError)
    return await retry(is_enabled, on=errors, backoff=Backoff(initial_s=0.3), deadline_s=START_TIMEOUT_S)
