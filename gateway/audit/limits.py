"""What is recorded of the limits of a key or a team."""

from __future__ import annotations

from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from schemas.keys import LIMITS, AccessLimits


def audited_limits(limits: AccessLimits) -> dict[str, Any]:
    """Return the limits. A webhook's URL, which may hold a secret, is its host and a fingerprint that shows changes."""
    found = limits.model_dump(mode="json", include=set(LIMITS))
    if (url := limits.budget_webhook) is not None:
        parts = urlsplit(url)
        found["budget_webhook"] = f"{parts.scheme}://{parts.hostname}/… ({sha256(url.encode()).hexdigest()[:8]})"
    return found
