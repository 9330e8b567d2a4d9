"""Sessions on a store without a server, with a clock of the test."""

from __future__ import annotations

from backbone.testing.documents import MemoryDocumentStore
from gateway.people.sessions import MAX_SESSIONS, SessionStore, csrf_token

IDLE_S, LONGEST_S = 600.0, 3600.0


class Desk:
    """A store of sessions, and a clock."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.documents = MemoryDocumentStore(lambda: self.now)
        self.sessions = SessionStore(self.documents, idle_s=IDLE_S, longest_s=LONGEST_S, clock=lambda: self.now)

    async def is_open(self, secret: str) -> bool:
        return await self.sessions.find(secret) is not None

    def stored(self) -> int:
        return len(self.documents._documents)


async def test_a_session_ends_when_idle_and_after_its_longest_time() -> None:
    """Use keeps it, up to its end."""
    desk = Desk()
    idle, used = await desk.sessions.begin(person="person_1"), await desk.sessions.begin(person="person_1")
    for _ in range(6):
        desk.now += IDLE_S - 10
        assert await desk.is_open(used)
    assert not await desk.is_open(idle)
    desk.now += 100
    assert not await desk.is_open(used)
    assert await desk.sessions.count("person_1") == 0


async def test_the_oldest_sessions_of_a_person_end() -> None:
    """Another person's, and those of keys, are counted apart."""
    desk = Desk()
    other, key = await desk.sessions.begin(person="person_2"), await desk.sessions.begin(key=b"\x01")
    begun = []
    for _ in range(MAX_SESSIONS + 2):
        desk.now += 1
        begun.append(await desk.sessions.begin(person="person_1"))
    assert [await desk.is_open(secret) for secret in begun] == [False] * 2 + [True] * MAX_SESSIONS
    assert await desk.is_open(other)
    assert await desk.is_open(key)
    await desk.sessions.end_all("person_1")
    assert await desk.sessions.count("person_1") == 0
    assert not await desk.is_open(begun[-1])


async def test_a_session_that_ends_while_it_is_used_stays_ended() -> None:
    """The note of its use does not bring it back."""
    desk = Desk()
    secret = await desk.sessions.begin(person="person_1")
    desk.now += IDLE_S / 2
    swap = desk.documents.swap

    async def end_first(*arguments: bytes | str) -> bool:
        await desk.sessions.end(secret)
        return await swap(*arguments)  # type: ignore[arg-type]

    desk.documents.swap = end_first  # type: ignore[method-assign, assignment]
    assert await desk.is_open(secret)
    assert not await desk.is_open(secret)
    assert desk.stored() == 0


async def test_the_store_holds_no_cookie() -> None:
    """Nor the token against forged requests, nor does a wrong cookie find anything."""
    desk = Desk()
    secret = await desk.sessions.begin(person="person_1")
    stored = b"".join(str(name).encode() + document.value for name, document in desk.documents._documents.items())
    assert secret.encode() not in stored
    assert csrf_token(secret).encode() not in stored
    for wrong in ("", secret[:-1], secret + "x", "ü" * 43, secret.swapcase()):
        assert not await desk.is_open(wrong)
