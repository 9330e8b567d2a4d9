"""Encrypt what is stored for a team with a key of the team, which only the gateways have, in a file.

The file is JSON: for each team its keys, the newest first. The first one encrypts, all of them decrypt:

    {"hospital": [{"id": "2027-01", "key": "<32 bytes in Base64>"}, {"id": "2026-01", "key": "…"}]}

Sealed data is a line that names team and key, and behind it a random nonce of 96 bits and AES-256-GCM's bytes. The line and the
name of the data are authenticated too, so that no data can take the place of another.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from typing import Annotated, Any

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from backbone.secret_files import ConfigurationError, read_file
from schemas.errors import Unavailable

SETTING = "TEAM_KEYS_FILE"
KEY_BYTES = 32
NONCE_BYTES = 12
PREFIX = b"nexus-sealed:"
"""Begins sealed data; JSON never begins like this."""


class TeamKeyMissing(Unavailable):
    """The gateway lacks the key that encrypts this data, or the data was damaged."""

    code = "team_key_missing"
    should_retry = False


def _decode_key(text: str) -> bytes:
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key is {KEY_BYTES} random bytes in Base64: `openssl rand -base64 {KEY_BYTES}`")
    return key


class _Key(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    id: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    key: Annotated[str, AfterValidator(lambda text: _decode_key(text) and text)]


_FILE = TypeAdapter(dict[str, Annotated[list[_Key], Field(min_length=1, max_length=100)]])


class TeamKeys:
    """The keys of teams. A team without a key is stored as it comes."""

    def __init__(self, keys: Mapping[str, Mapping[str, bytes]]) -> None:
        """`keys`: by team, by id, the one that encrypts first."""
        self._ciphers = {team: {key: AESGCM(value) for key, value in own.items()} for team, own in keys.items()}

    @classmethod
    def read(cls, path: str) -> TeamKeys:
        """Return the keys in a file; none where `path` is empty. Raises ConfigurationError, whose message holds no key."""
        if not path:
            return cls({})
        try:
            teams = _FILE.validate_json(read_file(SETTING, path))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "it"
            raise ConfigurationError(f"{SETTING}: {path}: {where}: {first['msg']}") from None
        found: dict[str, dict[str, bytes]] = {}
        for team, keys in teams.items():
            found[team] = {one.id: _decode_key(one.key) for one in keys}
            if len(found[team]) != len(keys):
                raise ConfigurationError(f"{SETTING}: {path}: two keys of the team '{team}' have the same id")
        return cls(found)

    def has(self, team: str) -> bool:
        """Return whether what is stored for the team is encrypted."""
        return team in self._ciphers

    def seal(self, team: str, name: str, data: bytes) -> bytes:
        """Return the data sealed with the team's newest key; unchanged for a team without one. `name`: what the data is."""
        ciphers = self._ciphers.get(team)
        if ciphers is None:
            return data
        key, cipher = next(iter(ciphers.items()))
        head = PREFIX + orjson.dumps({"team": team, "key": key}) + b"\n"
        nonce = os.urandom(NONCE_BYTES)
        return head + nonce + cipher.encrypt(nonce, data, head + name.encode())

    def open(self, name: str, data: bytes) -> bytes:
        """Return what `seal` was given; data that is not sealed, unchanged. Raises TeamKeyMissing."""
        if not data.startswith(PREFIX):
            return data
        head, _, sealed = data.partition(b"\n")
        try:
            about: dict[str, Any] = orjson.loads(head.removeprefix(PREFIX))
            team, key = str(about["team"]), str(about["key"])
        except (ValueError, KeyError, TypeError):
            raise TeamKeyMissing("Stored data was damaged, and cannot be decrypted.") from None
        cipher = self._ciphers.get(team, {}).get(key)
        if cipher is None:
            raise TeamKeyMissing(
                f"Data of the team '{team}' is encrypted with its key '{key}', which this gateway does not have. "
                f"Ask the operator to add the key to {SETTING} of all gateways, and to restart them."
            )
        try:
            return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], head + b"\n" + name.encode())
        except (InvalidTag, ValueError):
            raise TeamKeyMissing(
                f"Data of the team '{team}' cannot be decrypted: it was damaged, or the key '{key}' in {SETTING} is another "
                "one than at the time when it was stored."
            ) from None
