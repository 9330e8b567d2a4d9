"""Ids are unique, well formed, and sort by time."""

from __future__ import annotations

import os
import uuid

from backbone.ids import new_job_id, new_request_id, new_token, random_bytes


def test_job_ids_are_uuids_of_version_7_that_sort_by_time() -> None:
    """A job id is a UUIDv7: version and variant are right, and later ids are not smaller by their time part."""
    ids = [new_job_id() for _ in range(2000)]
    assert len(set(ids)) == len(ids)
    for text in ids:
        value = uuid.UUID(text.removeprefix("job_"))
        assert (value.version, value.variant) == (7, uuid.RFC_4122)
    stamps = [text[4:16] for text in ids]
    assert stamps == sorted(stamps)


def test_no_two_ids_are_alike() -> None:
    """Ids stay unique across the blocks of randomness that they are cut from."""
    assert len({new_request_id() for _ in range(5000)}) == 5000
    assert len({new_token() for _ in range(5000)}) == 5000
    assert {len(random_bytes(n)) for n in (16,) * 600} == {16}


def test_a_forked_child_has_ids_of_its_own() -> None:
    """Two processes never give out the same ids, although one began as a copy of the other."""
    random_bytes(1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, new_token().encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 32).decode() != new_token()
