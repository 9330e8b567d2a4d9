"""Signatures of webhooks, as https://www.standardwebhooks.com says: HMAC-SHA256 over id, time and body."""

from __future__ import annotations

import base64
import hashlib
import hmac

PREFIX = "whsec_"


class InvalidWebhookSecret(ValueError):
    """This is no secret for signing webhooks."""


def signature_headers(secret: str, hook_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers that let a receiver who knows `secret` (`whsec_` and base64) check the rest. Raises InvalidWebhookSecret.

    `hook_id` stays the same over all tries at one message; `timestamp` (Unix seconds) is that of the try.
    """
    mac = hmac.new(_key(secret), f"{hook_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return {
        "webhook-id": hook_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(mac.digest()).decode()}",
    }


def _key(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except ValueError as error:
        raise InvalidWebhookSecret(InvalidWebhookSecret.__doc__) from error
    if not key:
        raise InvalidWebhookSecret(InvalidWebhookSecret.__doc__)
    return key
