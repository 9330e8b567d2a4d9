"""A range of etcd's keys through its JSON API, for the process that runs the embedded etcd.

The gRPC of `backbone.registry` would cost this process memory, and its threads are unsafe beside forks.
"""

from __future__ import annotations

import json
import ssl
from base64 import b64decode, b64encode
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import httpx

REQUEST_TIMEOUT_S = 2.0

ETCD_ERRORS = (httpx.HTTPError, ValueError, KeyError)
"""Exceptions of a call that etcd does not answer, or answers wrongly."""


@dataclass(frozen=True, slots=True)
class KeyListing:
    """The keys of a range at one moment."""

    values: dict[str, bytes]
    cluster: str
    """Id of the etcd; a new one after its data was lost."""
    revision: int


@dataclass(frozen=True, slots=True)
class KeyChanges:
    """Changes to keys of a range; the value of a deleted key is None."""

    values: dict[str, bytes | None]
    revision: int


@dataclass(frozen=True, slots=True)
class EtcdApiLogin:
    """The login to an etcd with TLS."""

    user: str
    password: str = field(repr=False)
    context: ssl.SSLContext = field(repr=False)


class EtcdApi:
    """The keys from `first` to `end`, without `end`. Every call raises one of `ETCD_ERRORS`."""

    def __init__(self, url: str, first: str, end: str, login: EtcdApiLogin | None = None) -> None:
        verify = login.context if login else True
        self._http = httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S, trust_env=False, verify=verify)
        self._login = login
        self._range = {"key": _encode(first), "range_end": _encode(end)}

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def list(self) -> KeyListing:
        """Return all keys. Logs in again: a token expires five minutes after its last use."""
        await self._log_in()
        answer = await self._call("/v3/kv/range", self._range)
        header = answer["header"]
        values = {_decode(kv["key"]): b64decode(kv.get("value", "")) for kv in answer.get("kvs", ())}
        return KeyListing(values, header["cluster_id"], int(header["revision"]))

    async def put(self, key: str, value: bytes) -> None:
        """Write one key."""
        await self._call("/v3/kv/put", {"key": _encode(key), "value": b64encode(value).decode()})

    async def watch(self, revision: int) -> AsyncGenerator[KeyChanges, None]:
        """Yield changes from `revision` on, until etcd cancels the watch; list again then."""
        request = {"create_request": {**self._range, "start_revision": revision}}
        timeout = httpx.Timeout(REQUEST_TIMEOUT_S, read=None)
        async with self._http.stream("POST", "/v3/watch", json=request, timeout=timeout) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                result = json.loads(line)["result"]
                if result.get("canceled"):
                    return
                if events := result.get("events"):
                    yield KeyChanges(dict(map(_change, events)), int(result["header"]["revision"]))

    async def _log_in(self) -> None:
        if self._login is None:
            return
        self._http.headers.pop("authorization", None)
        login = {"name": self._login.user, "password": self._login.password}
        self._http.headers["authorization"] = (await self._call("/v3/auth/authenticate", login))["token"]

    async def _call(self, path: str, body: dict[str, Any]) -> Any:
        response = await self._http.post(path, json=body)
        response.raise_for_status()
        return response.json()


def _change(event: dict[str, Any]) -> tuple[str, bytes | None]:
    kv = event["kv"]
    is_deleted = event.get("type") == "DELETE"  # JSON leaves PUT out, the default
    return _decode(kv["key"]), None if is_deleted else b64decode(kv.get("value", ""))


def _encode(key: str) -> str:
    return b64encode(key.encode()).decode()


def _decode(key: str) -> str:
    return b64decode(key).decode(errors="replace")
