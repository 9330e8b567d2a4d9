"""Keys of teams: what they seal is noise without them, and nothing is stored in plain text by mistake."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from backbone.bus.content_keys import ContentKeys
from backbone.secret_files import ConfigurationError
from backbone.store.sealed_documents import SealedDocumentStore
from backbone.team_keys import TeamKeyMissing, TeamKeys
from backbone.testing.bus import MemoryBroker
from backbone.testing.documents import MemoryDocumentStore
from backbone.testing.job_log import MemoryJobLog


def key() -> bytes:
    return os.urandom(32)


def text(value: bytes) -> str:
    return base64.b64encode(value).decode()


def test_sealed_data_opens_in_its_place_alone() -> None:
    """With each key of the team; not under another name, nor when a bit has changed."""
    old, new = key(), key()
    before, after = TeamKeys({"t": {"1": old}}), TeamKeys({"t": {"2": new, "1": old}})
    for keys in (before, after):
        sealed = keys.seal("t", "name", b"secret")
        assert b"secret" not in sealed
        assert after.open("name", sealed) == b"secret"
        for wrong in (sealed[:-1], sealed + b"x", sealed[:60], sealed.replace(b'"t"', b'"u"')):
            with pytest.raises(TeamKeyMissing):
                after.open("name", wrong)
        with pytest.raises(TeamKeyMissing):
            after.open("other", sealed)
    with pytest.raises(TeamKeyMissing, match="'2'") as caught:
        before.open("name", after.seal("t", "name", b"secret"))
    assert (caught.value.info.status, "TEAM_KEYS_FILE" in caught.value.info.message) == (503, True)
    with pytest.raises(TeamKeyMissing, match="another"):
        TeamKeys({"t": {"1": key()}}).open("name", before.seal("t", "name", b"secret"))
    assert after.open("name", b'{"plain": 1}') == after.seal("other", "name", b'{"plain": 1}') == b'{"plain": 1}'


def test_the_file_is_read(tmp_path: Path) -> None:
    """The first key of a team encrypts."""
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"t": [{"id": "b", "key": text(key())}, {"id": "a", "key": text(key())}]}))
    keys = TeamKeys.read(str(path))
    assert (keys.has("t"), keys.has("u"), TeamKeys.read("").has("t")) == (True, False, False)
    assert b'"key":"b"' in keys.seal("t", "n", b"")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"t": [{"id": "a", "key": "c2hvcnQ="}]}, "32 random bytes"),
        ({"t": [{"id": "a b", "key": text(b"k" * 32)}]}, "t.0.id"),
        ({"t": []}, "t"),
        ({"t": [{"id": "a", "key": text(b"k" * 32)}] * 2}, "same id"),
        ([], "keys.json"),
    ],
)
def test_a_wrong_file_is_refused_without_its_keys(tmp_path: Path, content: Any, said: str) -> None:
    """The gateway does not start."""
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match=said) as caught:
        TeamKeys.read(str(path))
    assert "c2hvcnQ=" not in str(caught.value)
    assert text(b"k" * 32) not in str(caught.value)
    with pytest.raises(ConfigurationError, match="TEAM_KEYS_FILE"):
        TeamKeys.read(str(tmp_path / "missing"))


async def test_documents_of_teams_with_a_key_are_sealed() -> None:
    """Those of the kinds that hold content. Documents from before the key stay readable, and can be replaced."""
    inner, keys = MemoryDocumentStore(), TeamKeys({"t": {"1": key()}})
    documents = SealedDocumentStore(inner, keys, frozenset({"file"}))
    await inner.put("file", "t", "old", b"plain")
    assert await documents.add("file", "t", "new", b"content")
    await documents.put("other", "t", "x", b"content")
    await documents.put("file", "u", "x", b"content")
    assert await inner.get("other", "t", "x") == await inner.get("file", "u", "x") == b"content"
    assert b"content" not in (await inner.get("file", "t", "new") or b"content")
    assert await documents.get("file", "t", "new") == b"content"
    assert await documents.get("file", "t", "missing") is None
    assert not await documents.swap("file", "t", "new", b"other", b"changed")
    assert await documents.swap("file", "t", "new", b"content", b"changed")
    assert await documents.swap("file", "t", "old", b"plain", b"replaced")
    assert dict(await documents.page("file", "t")) == {"new": b"changed", "old": b"replaced"}
    assert all(value.startswith(b"nexus-sealed:") for _, value in await inner.page("file", "t"))


async def test_keys_of_jobs_are_wrapped() -> None:
    """A gateway without the team's key gives none, and says why; the first key of a job stays."""
    log = MemoryJobLog(MemoryBroker())
    content = ContentKeys(log, TeamKeys({"t": {"1": key()}}))
    assert content.are_needed("t", retain_none=False)
    assert not content.are_needed("u", retain_none=False)
    made = await content.create("job_1", "t", retain_none=False)
    assert str(made).encode() not in (await log.read_content_key("job_1") or b"")
    assert str(await content.create("job_1", "t", retain_none=True)) == str(made)
    found = await content.find("job_1")
    assert found is not None
    assert (str(found.key), found.retain_none) == (str(made), False)
    with pytest.raises(TeamKeyMissing):
        await ContentKeys(log, TeamKeys({})).find("job_1")
    await content.forget("job_1")
    assert await content.find("job_1") is None
