"""Random ids from the operating system's generator, which is read in blocks: a read per id would be a system call per id."""

from __future__ import annotations

import os

from backbone.clock import now

_BLOCK = 4096
_pool = b""
_used = 0


def random_bytes(count: int) -> bytes:
    """Return `count` unpredictable bytes, none of which is returned twice."""
    global _pool, _used  # noqa: PLW0603 - a pool of random bytes, read by every caller
    if _used + count > len(_pool):
        _pool, _used = os.urandom(_BLOCK), 0
    _used += count
    return _pool[_used - count : _used]


def _forget_pool() -> None:
    """Drop the pool: a forked child must not return its parent's bytes."""
    global _pool, _used
    _pool, _used = b"", 0


os.register_at_fork(after_in_child=_forget_pool)


def new_id(prefix: str) -> str:
    """Return `prefix` and a UUIDv7 (RFC 9562) in hex: ids sort by the time they were made, by the clock of all gateways."""
    random = int.from_bytes(random_bytes(10), "big")
    number = int(now() * 1000) << 80 | 0x7 << 76 | (random >> 68) << 64 | 0x2 << 62 | random & (1 << 62) - 1
    return f"{prefix}{number:032x}"


def new_job_id() -> str:
    """Return a new id for a job."""
    return new_id("job_")


def new_request_id() -> str:
    """Return `req_` and 96 random bits."""
    return "req_" + random_bytes(12).hex()


def new_token() -> str:
    """Return 128 random bits as hex, for names that must not be guessed."""
    return random_bytes(16).hex()
