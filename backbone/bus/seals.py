"""Seals: signatures that only gateways can make, so that workers can prove what they were given and cannot forge anything else.

All seals are HMAC-SHA256 under one secret that the gateways share and workers never see (the bucket `nexus-seals`;
docs/adr/0033).

| seal | place | proof |
|---|---|---|
| ticket | the envelope | none by itself: it is the key of attempt tokens, different for each job |
| attempt token | events, gate requests | the sender has the job's envelope |
| seal of a job | the envelope; a worker's outcome repeats it | a gateway submitted this run of this job, with this owner, key, webhook, model, … |
| seal of an outcome | a gateway's outcome: cancelled, expired, refused | a gateway wrote it as it is |
| seal of a message | the envelope | envelope and body are as a gateway stored them: a failed job is retried from the message that its worker returns |
| seal of a record, of an item | QUEUED events, work queues | a gateway wrote it as it is |
"""

from __future__ import annotations

import base64
import hmac
from dataclasses import dataclass

import orjson

from backbone.ids import new_token
from schemas.job_events import NO_TOKEN
from schemas.jobs import Envelope, JobSpec, JobStatus
from schemas.outcome import Outcome

SECRET_BYTES = 32
NONCE = 12
"""Characters of an attempt token that distinguish attempts."""
BY_GATEWAY = "g"
BY_WORKER = "w"
"""The first letter of an outcome's seal names the party that vouches for it."""
MESSAGE_SEAL = b',"message_seal":"%b"}'
"""The end of a sealed envelope: the seal covers the bytes before it."""
WORKER_STATUSES = frozenset({JobStatus.COMPLETED, JobStatus.FAILED})


@dataclass(frozen=True, slots=True)
class SealSecret:
    """The secret, and the time since which it is in use."""

    key: bytes
    made_at: int
    """Unix seconds, by NATS's clock; data that was stored earlier has no seals."""


def attempt_token(ticket: str) -> str:
    """Return a new token for an attempt at the job whose envelope holds `ticket`."""
    nonce = new_token()[:NONCE]
    return nonce + _mac(ticket.encode(), b"attempt", nonce.encode()) if ticket else nonce


@dataclass(frozen=True, slots=True)
class Seals:
    """Makes and verifies seals."""

    key: bytes

    # Jobs

    def envelope(self, envelope: Envelope, body: bytes) -> Envelope:
        """Return the envelope with its ticket and its seals, for this body."""
        given = envelope.model_copy(
            update={
                "ticket": self._ticket(envelope.job),
                "seal": self._job(envelope),
                "message_seal": "",
            }
        )
        return given.model_copy(update={"message_seal": self._message(given.encode(b"")[:-1], body)})

    def is_message(self, message: bytes, outcome: Outcome) -> bool:
        """Return whether a job message is the one that a gateway stored for the job of `outcome`."""
        try:
            envelope, body = Envelope.decode(message)
        except ValueError:
            return False
        line = message[: len(message) - len(body) - 1]
        sealed = line.removesuffix(MESSAGE_SEAL % envelope.message_seal.encode()) + b"}"
        # A retry that could not be queued ends with the message of the previous run.
        same = envelope.job == outcome.job and envelope.run <= outcome.run
        return same and _equal(self._message(sealed, body), envelope.message_seal)

    # Outcomes

    def outcome(self, outcome: Outcome) -> Outcome:
        """Return the outcome with a gateway's seal."""
        bare = outcome.model_copy(update={"seal": ""})
        return bare.model_copy(update={"seal": self._outcome(bare)})

    def is_outcome(self, outcome: Outcome) -> bool:
        """Return whether a gateway wrote this outcome, or a worker that was given this very run of the job."""
        if outcome.seal.startswith(BY_GATEWAY):
            return _equal(self._outcome(outcome.model_copy(update={"seal": ""})), outcome.seal)
        return outcome.status in WORKER_STATUSES and _equal(self._job(outcome), outcome.seal)

    # Events

    def is_attempt(self, job: str, token: str) -> bool:
        """Return whether the token belongs to an attempt of a worker that was given the job."""
        nonce, proof = token[:NONCE], token[NONCE:]
        return bool(proof) and _equal(_mac(self._ticket(job).encode(), b"attempt", nonce.encode()), proof)

    def record(self, job: str, payload: bytes) -> str:
        """Return the token of a QUEUED event with this payload."""
        return _mac(self.key, b"record", job.encode(), payload)

    def is_record(self, job: str, payload: bytes, token: str) -> bool:
        """Return whether a gateway wrote this QUEUED event."""
        return token != NO_TOKEN and _equal(self.record(job, payload), token)

    # Work items

    def item(self, queue: str, data: bytes) -> bytes:
        """Return an item with its seal in front."""
        return _mac(self.key, b"item", queue.encode(), data).encode() + b"\n" + data

    def open_item(self, queue: str, sealed: bytes) -> bytes | None:
        """Return the item's data; None: no gateway wrote it."""
        seal, _, data = sealed.partition(b"\n")
        return data if hmac.compare_digest(_mac(self.key, b"item", queue.encode(), data).encode(), seal) else None

    def _ticket(self, job: str) -> str:
        return _mac(self.key, b"ticket", job.encode())

    def _job(self, job: JobSpec) -> str:
        """Seal what a worker cannot change: every statement of an outcome about its job rather than its attempt."""
        values = orjson.dumps(tuple(job.spec().values()), option=orjson.OPT_SORT_KEYS)
        return BY_WORKER + _mac(self.key, b"job", values)

    def _outcome(self, outcome: Outcome) -> str:
        return BY_GATEWAY + _mac(self.key, b"outcome", outcome.model_dump_json(exclude_defaults=True).encode())

    def _message(self, envelope: bytes, body: bytes) -> str:
        return _mac(self.key, b"message", envelope, body)


def _mac(key: bytes, purpose: bytes, *parts: bytes) -> str:
    """Return 144 bits as text. Each part goes in with its length, so that two lists of parts never become the same bytes."""
    message = b"".join((purpose, *(b"\n%d\n%b" % (len(part), part) for part in parts)))
    return base64.urlsafe_b64encode(hmac.digest(key, message, "sha256")[:18]).decode()


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())
