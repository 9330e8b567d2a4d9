"""Certificates for servers on 127.0.0.1, signed by an authority whose key is discarded afterwards.

The subjects have no common name: etcd would take it for the name of an authenticated user.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID_DAYS = 3650
"""Longer than a stack runs; each start makes new certificates."""
CLOCK_SKEW = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate and its private key, in PEM form."""

    certificate: str
    key: str


def make_certificates(names: Iterable[str]) -> tuple[str, dict[str, KeyPair]]:
    """Return the certificate of a new authority, and a key pair for each name, good for servers and clients alike."""
    authority_key = generate_private_key(SECP256R1())
    authority_name = _subject("authority")
    authority = _sign(_draft(authority_name, authority_name, authority_key, is_authority=True), authority_key)
    return authority, {name: _key_pair(name, authority_name, authority_key) for name in names}


def _key_pair(name: str, issuer: x509.Name, issuer_key: EllipticCurvePrivateKey) -> KeyPair:
    key = generate_private_key(SECP256R1())
    usages = [
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    ]  # etcd's JSON API is a client of etcd itself
    hosts = [x509.IPAddress(ip_address("127.0.0.1")), x509.DNSName("localhost")]
    draft = _draft(_subject(name), issuer, key, is_authority=False)
    draft = draft.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    draft = draft.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return KeyPair(_sign(draft, issuer_key), secret)


def _draft(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, *, is_authority: bool
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    )


def _sign(draft: x509.CertificateBuilder, key: EllipticCurvePrivateKey) -> str:
    return draft.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"nexus up, {name}")])
