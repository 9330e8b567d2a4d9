"""A part of etcd's keys by its JSON API: listed, written, followed. For the process that runs the embedded etcd.

It has an HTTP client already; gRPC, which `backbone.registry` uses, would cost it its memory and threads beside forks.
"""

from __future__ import annotations

import json
import ssl
from base64 import b64decode, b64encode
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import httpx

CALL_S = 2.0

ETCD_ERRORS = (httpx.HTTPError, ValueError, KeyError)
"""What calls raise when etcd does not answer, or not as it should."""


@dataclass(frozen=True, slots=True)
class KeyListing:
    """The keys of a range at one moment."""

    values: dict[str, bytes]
    store: str
    """Of which etcd: another one after its data was lost."""
    revision: int


@dataclass(frozen=True, slots=True)
class KeyChanges:
    """What happened to keys of a range; None: gone."""

    values: dict[str, bytes | None]
    revision: int


@dataclass(frozen=True, slots=True)
class EtcdLogin:
    """A user of an etcd with TLS."""

    user: str
    password: str = field(repr=False)
    context: ssl.SSLContext = field(repr=False)


class EtcdApi:
    """The keys from `first` up to, and without, `end`. Every call raises one of `ETCD_ERRORS`."""

    def __init__(self, url: str, first: str, end: str, login: EtcdLogin | None = None) -> None:
        verify = login.context if login else True
        self._http = httpx.AsyncClient(base_url=url, timeout=CALL_S, trust_env=False, verify=verify)
        self._login = login
        self._range = {"key": _encode(first), "range_end": _encode(end)}

    async def aclose(self) -> None:
        """Drop the connections."""
        await self._http.aclose()

    async def listing(self) -> KeyListing:
        """All keys now. Logs in anew: a token is good for five minutes after its last use."""
        await self._log_in()
        answer = await self._call("/v3/kv/range", self._range)
        header = answer["header"]
        values = {_decode(kv["key"]): b64decode(kv.get("value", "")) for kv in answer.get("kvs", ())}
        return KeyListing(values, header["cluster_id"], int(header["revision"]))

    async def put(self, key: str, value: bytes) -> None:
        """Write one key."""
        await self._call("/v3/kv/put", {"key": _encode(key), "value": b64encode(value).decode()})

    async def watch(self, revision: int) -> AsyncGenerator[KeyChanges, None]:
        """Yield the changes from `revision` on, until etcd ends it: list again then."""
        request = {"create_request": {**self._range, "start_revision": revision}}
        timeout = httpx.Timeout(CALL_S, read=None)
        async with self._http.stream("POST", "/v3/watch", json=request, timeout=timeout) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                said = json.loads(line)["result"]
                if said.get("canceled"):
                    return
                if events := said.get("events"):
                    yield KeyChanges(dict(map(_change, events)), int(said["header"]["revision"]))

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
    gone = event.get("type") == "DELETE"  # a PUT is left out, as the default of the field
    return _decode(kv["key"]), None if gone else b64decode(kv.get("value", ""))


def _encode(key: str) -> str:
    return b64encode(key.encode()).decode()


def _decode(key: str) -> str:
    return b64decode(key).decode(errors="replace")
