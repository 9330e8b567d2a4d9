"""Webhook signatures as defined by https://www.standardwebhooks.com: HMAC-SHA256 over id, timestamp and body."""

from __future__ import annotations

import base64
import hashlib
import hmac

PREFIX = "whsec_"


class InvalidWebhookSecret(ValueError):
    """The webhook secret is invalid. It must be `whsec_` followed by Base64."""


def signature_headers(secret: str, hook_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the headers with which a receiver that knows `secret` verifies a webhook. Raises InvalidWebhookSecret.

    Args:
        secret: `whsec_` followed by Base64.
        hook_id: The message's id, the same for all attempts.
        timestamp: The time of this attempt in Unix seconds.
        body: The message's body.
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
