"""Replies of the gateways to attempts, in both of their forms."""

from __future__ import annotations

import pytest

from schemas.frames import PROCEED, STOP, SUPERSEDED
from schemas.job_events import GateReply, GateVerdict, decode_reply


@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (PROCEED, GateReply(kind=GateVerdict.PROCEED)),
        (STOP, GateReply(kind=GateVerdict.STOP)),
        (SUPERSEDED, GateReply(kind=GateVerdict.SUPERSEDED)),
        (b'{"kind":"+","attempt":2}', GateReply(kind=GateVerdict.PROCEED, attempt=2)),
        (b'{"kind":"w","delay_s":1.5}', GateReply(kind=GateVerdict.WAIT, delay_s=1.5)),
        (b"?", None),
        (b"", None),
        (b'{"kind":"?"}', None),
    ],
)
def test_a_verdict_alone_and_json_are_one_reply(data: bytes, reply: GateReply | None) -> None:
    """A waiting gateway answers with a verdict, the attempt gate with JSON; anything else is no reply."""
    assert decode_reply(data) == reply
