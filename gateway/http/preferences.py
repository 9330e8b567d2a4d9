"""Parse a request's delivery preferences: RFC 7240's `Prefer`, `Idempotency-Key`, `x-nexus-resume`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gateway.http.asgi import Headers
from schemas.errors import InvalidRequest

PREFER, KEY, RESUME = b"prefer", b"idempotency-key", b"x-nexus-resume"
NAMES = frozenset({PREFER, KEY, RESUME})
MAX_WAIT_S = 300.0
MAX_KEY = 255

_PREFERENCE = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*"?)+')
"""One preference; commas within quotes do not separate."""
_ASYNC = re.compile(r'respond-async(?:\s*=\s*(?:"")?)?')
_WAIT = re.compile(r'wait\s*=\s*(?:(\d{1,9})|"(\d{1,9})")')


@dataclass(frozen=True, slots=True)
class DeliveryPreferences:
    """Preferences that make a request a durable job."""

    respond_async: bool = False
    wait_s: float | None = None
    """With `respond_async`: seconds within which the answer itself is sent, if the job ends."""
    key: str = ""
    resume: bool = False

    @property
    def applied(self) -> bytes:
        """Value of the header `Preference-Applied` in a 202."""
        return b"respond-async" if self.wait_s is None else b"respond-async, wait=%d" % self.wait_s


def read_preferences(headers: Headers) -> DeliveryPreferences | None:
    """Return the delivery preferences; None for a synchronous request. Raises InvalidRequest."""
    found = [(name, value) for name, value in headers if name in NAMES]
    if not found:
        return None
    prefer = ", ".join(value.decode("latin-1") for name, value in found if name == PREFER)
    respond_async, wait_s = _prefer(prefer)
    key = next((value.decode("latin-1") for name, value in found if name == KEY), None)
    if key is not None and not (0 < len(key) <= MAX_KEY and key.isprintable()):
        raise InvalidRequest(
            f"An Idempotency-Key must have 1 to {MAX_KEY} printable characters.", param="Idempotency-Key"
        )
    resume = any(value.strip().lower() in {b"true", b"1"} for name, value in found if name == RESUME)
    if not (respond_async or key or resume):
        return None
    return DeliveryPreferences(respond_async, wait_s, key or "", resume)


def _prefer(text: str) -> tuple[bool, float | None]:
    """Parse `Prefer`. As the RFC says, unknown preferences are ignored, and the first of two equal ones counts."""
    respond_async, wait_s = False, None
    for preference in _PREFERENCE.findall(text):
        word = preference.split(";")[0].strip().lower()
        if _ASYNC.fullmatch(word):
            respond_async = True
        elif wait_s is None and (match := _WAIT.fullmatch(word)):
            wait_s = min(float(match[1] or match[2]), MAX_WAIT_S)
    return respond_async, wait_s if respond_async else None
