"""Translates the headers about rate limits into Anthropic's. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from gateway.http.asgi import Headers

PREFIX = b"x-ratelimit-"
RESET = b"reset"


def anthropic_rate_headers(headers: Iterable[tuple[bytes, bytes]], now: float) -> Headers:
    """Return `anthropic-ratelimit-requests-limit` and the like for `x-ratelimit-limit-requests` and the like. `now`: Unix seconds."""
    found: Headers = []
    for name, value in headers:
        if name.startswith(PREFIX):
            fact, _, counted = name.removeprefix(PREFIX).partition(b"-")
            found.append(
                (b"anthropic-ratelimit-%b-%b" % (counted, fact), _time(value, now) if fact == RESET else value)
            )
    return found


def _time(seconds: bytes, now: float) -> bytes:
    """Return the time in so many seconds, as `6s` says, in the form of RFC 3339."""
    at = datetime.fromtimestamp(now + int(seconds.rstrip(b"s")), UTC)
    return at.strftime("%Y-%m-%dT%H:%M:%SZ").encode()
