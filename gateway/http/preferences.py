"""How a caller wants a request to be answered: RFC 7240's `Prefer`, `Idempotency-Key`, `x-nexus-resume`."""

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
"""Commas within quotes separate nothing."""
_ASYNC = re.compile(r'respond-async(?:\s*=\s*(?:"")?)?')
_WAIT = re.compile(r'wait\s*=\s*(?:(\d{1,9})|"(\d{1,9})")')


@dataclass(frozen=True, slots=True)
class DeliveryPreferences:
    """What makes a request a durable job."""

    respond_async: bool = False
    wait_s: float | None = None
    """Of `respond_async`: the answer itself, if it is there in this time."""
    key: str = ""
    resume: bool = False

    @property
    def applied(self) -> bytes:
        """The `Preference-Applied` of a 202."""
        return b"respond-async" if self.wait_s is None else b"respond-async, wait=%d" % self.wait_s


def read_preferences(headers: Headers) -> DeliveryPreferences | None:
    """None: the request is answered as usual. Raises InvalidRequest."""
    found = [(name, value) for name, value in headers if name in NAMES]
    if not found:
        return None
    prefer = ", ".join(value.decode("latin-1") for name, value in found if name == PREFER)
    respond_async, wait_s = _prefer(prefer)
    key = next((value.decode("latin-1") for name, value in found if name == KEY), None)
    if key is not None and not (0 < len(key) <= MAX_KEY and key.isprintable()):
        raise InvalidRequest(f"an Idempotency-Key is 1 to {MAX_KEY} printable characters", param="Idempotency-Key")
    resume = any(value.strip().lower() in {b"true", b"1"} for name, value in found if name == RESUME)
    if not (respond_async or key or resume):
        return None
    return DeliveryPreferences(respond_async, wait_s, key or "", resume)


def _prefer(text: str) -> tuple[bool, float | None]:
    """What is not understood is ignored, and of what is said twice the first holds, as the RFC wants it."""
    respond_async, wait_s = False, None
    for preference in _PREFERENCE.findall(text):
        word = preference.split(";")[0].strip().lower()
        if _ASYNC.fullmatch(word):
            respond_async = True
        elif wait_s is None and (match := _WAIT.fullmatch(word)):
            wait_s = min(float(match[1] or match[2]), MAX_WAIT_S)
    return respond_async, wait_s if respond_async else None
