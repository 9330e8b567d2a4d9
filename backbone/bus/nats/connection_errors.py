"""Describes errors of a connection to NATS to the operator, with what to do about them."""

from __future__ import annotations

import ssl

from backbone.secret_files import ConfigurationError


def describe_error(error: Exception, last: Exception) -> str:
    """Describe a failure that may pass, and what to look at."""
    refused = next((one for one in (error, last) if isinstance(one, OSError) and one.strerror), None)
    if refused is not None:
        advice = "Is it running? NATS_URL (--nats-url) says where it is; `nexus up` starts a whole stack"
        return f"{refused.strerror}. {advice}"
    if isinstance(error, TimeoutError) and isinstance(last, TimeoutError):
        return "no NATS server answers there; check NATS_URL (--nats-url)"
    return str(error) or str(last) or type(error).__name__


def describe_permanent_error(error: Exception) -> str | None:
    """Describe an error that will not pass by itself; None for one that may."""
    text = str(error)
    if isinstance(error.__cause__, ConfigurationError):
        return f"cannot be used: {error.__cause__}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"has an untrusted certificate ({error.verify_message}): check NATS_TLS_CA and the host name"
    if isinstance(error, ssl.SSLError):
        return f"fails the TLS handshake ({error.reason}): check NATS_TLS_CA, NATS_TLS_CERT and NATS_TLS_KEY"
    lowered = text.lower()
    if "offers no tls" in lowered:
        return "offers no TLS, which these settings require; nothing was sent"
    if "authorization violation" in lowered or "authentication" in lowered:
        return "refuses this user or its password: check NATS_USER and NATS_PASSWORD, or NATS_CREDS_FILE"
    if "permissions violation" in lowered:
        return f"denies this user a permission ({text}): compare it with `nexus permissions`"
    return None
